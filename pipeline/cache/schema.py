"""What a unit looks like inside: names, axes, dtypes, chunks, codecs; and the digest that names
it. See docs/cache-format.md.

Values are rounded in memory before they are written (`round_bits`), so that decoding is the
identity and the files hold core Zarr v3 codecs only.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import numcodecs
import numpy as np
import numpy.typing as npt
from pydantic import Field

from pipeline.config import Config, digest

if TYPE_CHECKING:
    from pipeline.data.entries import DatasetEntry, TeacherEntry

FORMAT_VERSION: Final = 1
# Of units with features: 1 took each cell from one window, and had no moments.
FEATURES_VERSION: Final = 2
IMAGE: Final = "image"
LABEL: Final = "label"
SPATIAL: Final = ("z", "y", "x")
FLOAT16_MAX: Final = 65504.0
# Voxels stored per organ region, to centre patches on. They steer what a student sees, so their
# number is part of the format and no setting.
CENTRES_PER_ORGAN: Final = 256


class StorageConfig(Config):
    """How arrays are stored; enters the digest, since rounding changes numbers."""

    chunk: int = Field(default=64, ge=8, description="inner chunk side in voxels; a read unit")
    log_odds_bits: int = Field(default=5, ge=1, le=10, description="mantissa bits kept of 10")
    feature_bits: int = Field(default=5, ge=1, le=10, description="mantissa bits kept of 10")
    zstd_level: int = Field(default=1, ge=1, le=19, description="of every array")


@dataclass(frozen=True)
class ArraySpec:
    """One array to be written: its name in the group, its values and the names of its axes."""

    name: str
    values: npt.NDArray[Any]
    axes: tuple[str, ...]
    fill_value: float | int


def log_odds_name(organ: str) -> str:
    """Array of an organ's log-odds in a teacher unit."""
    return f"log_odds/{organ}"


def features_name(tap: str) -> str:
    """Array of a tap's features in a teacher unit."""
    return f"features/{tap}"


def image_spec(image: npt.NDArray[np.int16]) -> ArraySpec:
    """int16 HU (D, H, W)."""
    return ArraySpec(IMAGE, image, SPATIAL, -1024)


def label_spec(label: npt.NDArray[np.uint8]) -> ArraySpec:
    """uint8 organ ids (D, H, W), 255 ignore."""
    return ArraySpec(LABEL, label, SPATIAL, 255)


def log_odds_spec(organ: str, values: npt.NDArray[np.float32], storage: StorageConfig) -> ArraySpec:
    """float32 (D, H, W) -> rounded float16; NaN means that the teacher did not see the voxel."""
    rounded = round_bits(values, storage.log_odds_bits)
    return ArraySpec(log_odds_name(organ), rounded, SPATIAL, float("nan"))


def features_spec(tap: str, values: npt.NDArray[np.float32], storage: StorageConfig) -> ArraySpec:
    """float32 (F, d, h, w) -> rounded float16; NaN means not seen."""
    rounded = round_bits(values, storage.feature_bits)
    return ArraySpec(features_name(tap), rounded, ("feature", *SPATIAL), float("nan"))


def feature_moments(values: npt.NDArray[np.float32]) -> dict[str, Any]:
    """How many cells of (F, d, h, w) are seen, and each channel's mean and standard deviation."""
    seen = np.isfinite(values[0])
    mean, std = [0.0] * len(values), [0.0] * len(values)
    for number, channel in enumerate(values if seen.any() else ()):
        cells = channel[seen].astype(np.float64)
        mean[number], std[number] = (float(f"{m:.6g}") for m in (cells.mean(), cells.std()))
    return {"cells": int(np.count_nonzero(seen)), "mean": mean, "std": std}


def round_bits(values: npt.NDArray[np.float32], bits: int) -> npt.NDArray[np.float16]:
    """Rounds to float16 with that many mantissa bits; sign, zero and NaN are kept.

    A non-zero value that would become zero keeps its sign as the smallest normal number, so that
    no voxel changes its region by rounding. Values beyond float16 are clipped to +-65504.
    """
    small = np.float32(np.finfo(np.float16).tiny)
    clipped = np.clip(values, -FLOAT16_MAX, FLOAT16_MAX)
    tiny = (clipped != 0) & (np.abs(clipped) < small)
    clipped = np.where(tiny, np.copysign(small, clipped), clipped)
    half = clipped.astype(np.float16)
    if bits >= 10:
        return half
    rounded = numcodecs.BitRound(keepbits=bits).encode(half).view(np.float16).reshape(half.shape)
    # Rounding up may pass the largest float16 and become infinite: truncate there instead.
    mask = np.uint16(0xFFFF << (10 - bits) & 0xFFFF)
    truncated = (half.view(np.uint16) & mask).view(np.float16)
    kept = np.where(np.isinf(rounded), truncated, rounded)
    return np.where(np.isnan(half), np.float16(np.nan), kept)


def describe(spec: ArraySpec) -> Mapping[str, Any]:
    """What the receipt says of an array."""
    values = spec.values
    return {"shape": list(values.shape), "dtype": str(values.dtype), "axes": list(spec.axes)}


# Digests: two units with the same digest hold the same numbers, whoever made them and wherever.
#
# What is digested is plain JSON, kept in the receipt, so that a difference can be named.

Inputs = Mapping[str, Any]


def case_inputs(
    entry: DatasetEntry,
    ids: Mapping[str, int],
    hashes: tuple[str, str],
    *,
    spacing_mm: Sequence[float],
    storage: StorageConfig,
) -> Inputs:
    """Everything that determines the image and label of a case on the student grid; `hashes` are
    the SHA-256 of their files, `spacing_mm` is that of the grid, z, y, x."""
    return {
        # Only where it is said: cases of before it could be keep their digests.
        **({} if entry.units == "hu" else {"units": entry.units}),
        "format_version": FORMAT_VERSION,
        "image_sha256": hashes[0],
        "label_sha256": hashes[1],
        "label_values": {organ: sorted(v) for organ, v in entry.annotated.items()},
        "organ_ids": {organ: ids[organ] for organ in entry.annotated},
        "ignore_values": sorted(entry.ignore_values),
        "background_values": sorted(entry.background_values),
        "grid": {"spacing_mm": list(spacing_mm), "orientation": "RAS"},
        "resampling": {"image": "linear", "label": "nearest"},
        "storage": storage.model_dump(mode="json"),
    }


def teacher_inputs(
    entry: TeacherEntry,
    description: Mapping[str, Any],
    *,
    weights_sha256: str,
    spacing_mm: Sequence[float],
    storage: StorageConfig,
) -> Inputs:
    """Everything that determines a teacher's numbers, whatever the case; `description` is what it
    says of itself, `spacing_mm` that of the student grid.

    `outputs` is left out at its default, so that units of before it existed keep their digests.
    """
    features = {"features_version": FEATURES_VERSION} if description.get("taps") else {}
    return {
        "format_version": FORMAT_VERSION,
        "weights_sha256": weights_sha256,
        "teacher": dict(description),
        "organs": {organ: sorted(channels) for organ, channels in entry.organs.items()},
        "activation": entry.activation,
        **({} if entry.outputs == "logits" else {"outputs": entry.outputs}),
        **features,
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
