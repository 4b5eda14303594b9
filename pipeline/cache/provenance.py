"""Digests: two units with the same digest hold the same numbers, whoever made them and wherever.

What is digested is plain JSON, kept in the receipt, so that a difference can be named.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from pipeline.cache.schema import FORMAT_VERSION, StorageConfig
from pipeline.config import digest

Inputs = Mapping[str, Any]


def case_inputs(
    *,
    image_sha256: str,
    label_sha256: str,
    values: Mapping[str, Sequence[int]],
    ids: Mapping[str, int],
    ignore_values: Sequence[int],
    background_values: Sequence[int],
    spacing_mm: Sequence[float],
    storage: StorageConfig,
    units: str = "hu",
) -> Inputs:
    """Everything that determines the image and label of a case on the student grid."""
    return {
        # Only where it is said: cases of before it could be keep their digests.
        **({} if units == "hu" else {"units": units}),
        "format_version": FORMAT_VERSION,
        "image_sha256": image_sha256,
        "label_sha256": label_sha256,
        "label_values": {organ: sorted(v) for organ, v in values.items()},
        "organ_ids": {organ: ids[organ] for organ in values},
        "ignore_values": sorted(ignore_values),
        "background_values": sorted(background_values),
        "grid": {"spacing_mm": list(spacing_mm), "orientation": "RAS"},
        "resampling": {"image": "linear", "label": "nearest"},
        "storage": storage.model_dump(mode="json"),
    }


def teacher_inputs(
    *,
    weights_sha256: str,
    description: Mapping[str, Any],
    organs: Mapping[str, Sequence[int]],
    activation: str,
    spacing_mm: Sequence[float],
    storage: StorageConfig,
    outputs: str = "logits",
) -> Inputs:
    """Everything that determines a teacher's numbers, whatever the case.

    `outputs` is left out at its default, so that units of before it existed keep their digests.
    """
    return {
        "format_version": FORMAT_VERSION,
        "weights_sha256": weights_sha256,
        "teacher": dict(description),
        "organs": {organ: sorted(channels) for organ, channels in organs.items()},
        "activation": activation,
        **({} if outputs == "logits" else {"outputs": outputs}),
        "grid": {"spacing_mm": list(spacing_mm), "orientation": "RAS"},
        "resampling": "linear",
        "storage": storage.model_dump(mode="json"),
    }


def unit_inputs(*, teacher_digest: str, image_sha256: str) -> Inputs:
    """One teacher's numbers for one image. The label does not enter: it changes none of them."""
    return {"teacher_digest": teacher_digest, "image_sha256": image_sha256}


def differing(old: Inputs, new: Inputs, prefix: str = "") -> list[str]:
    """The fields in which two inputs differ, as `field: old -> new`."""
    lines = []
    for key in sorted({*old, *new}):
        a, b = old.get(key, _ABSENT), new.get(key, _ABSENT)
        if isinstance(a, Mapping) and isinstance(b, Mapping):
            lines += differing(a, b, f"{prefix}{key}.")
        elif (a is _ABSENT) != (b is _ABSENT) or digest(a) != digest(b):
            lines.append(f"{prefix}{key}: {a} -> {b}")
    return lines


class _Absent:
    def __str__(self) -> str:
        return "absent"


_ABSENT = _Absent()
