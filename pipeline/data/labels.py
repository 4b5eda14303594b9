"""Organ names and ids; dataset labels -> organs; teacher channels -> organs; HU -> what a
network sees.

Stored labels are uint8: 0 background, an organ's id from the registry, 255 ignore.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from pydantic import Field, model_validator

from pipeline.config import Config
from pipeline.errors import GeometryError, TeacherError

IGNORE = 255
MAX_ORGAN_ID = 254
NAME_THEM = (
    "Name them under the dataset's `annotated`, or list them in `background_values` (other "
    "structures) or `ignore_values` (unknown)."
)
_SHOWN = 8


@dataclass(frozen=True)
class LabelSpace:
    """The organs of a student, in the order of its output channels (channel 0 is background).

    Attributes:
        ids: organ name -> id in stored labels and in predicted label maps, ordered by id.
    """

    ids: Mapping[str, int]

    def __post_init__(self) -> None:
        object.__setattr__(self, "ids", dict(sorted(self.ids.items(), key=lambda kv: kv[1])))

    @property
    def organs(self) -> tuple[str, ...]:
        """Organ names; organ number k stands at student channel k + 1."""
        return tuple(self.ids)

    def index(self, organ: str) -> int:
        """The number 0 .. K - 1 of an organ."""
        return self.organs.index(organ)

    def to_classes(self, label: npt.NDArray[Any]) -> npt.NDArray[np.uint8]:
        """Stored ids (uint8, any shape) -> classes 0 .. K; ids of organs that are not in this space
        -> 0; 255 stays."""
        table = np.zeros(256, dtype=np.uint8)
        for number, organ_id in enumerate(self.ids.values()):
            table[organ_id] = number + 1
        table[IGNORE] = IGNORE
        return np.asarray(table[label], dtype=np.uint8)

    def to_ids(self, classes: npt.NDArray[Any]) -> npt.NDArray[np.uint8]:
        """Classes 0 .. K -> organ ids; any shape."""
        table = np.array([0, *self.ids.values()], dtype=np.uint8)
        return np.asarray(table[classes], dtype=np.uint8)


def map_labels(
    label: npt.NDArray[Any],
    values: Mapping[str, Sequence[int]],
    ids: Mapping[str, int],
    ignore_values: Sequence[int] = (),
    background_values: Sequence[int] = (),
    *,
    where: object = None,
) -> npt.NDArray[np.uint8]:
    """A dataset's own label values -> organ ids as stored in the cache.

    Args:
        label: (D, H, W), whole numbers as in the file; 0 is background.
        values: organ -> the values that mean it in this dataset.
        ignore_values: values that mean "unknown": stored as 255.
        background_values: values of structures that are none of the organs: stored as 0.

    Raises:
        GeometryError: a value that nothing here names.
    """
    low, high = min(int(label.min()), 0), max(int(label.max()), 0)
    # Room for negative values too: they index from the end, where every entry says unknown.
    table = np.full(high - low + 1, -1, dtype=np.int16)
    table[0] = 0
    organs = ((ids[organ], meant) for organ, meant in values.items())
    for meaning, meant in ((IGNORE, ignore_values), (0, background_values), *organs):
        for value in meant:
            if value <= high:
                table[value] = meaning
    out = table[label]
    if out.min() < 0:
        unknown = sorted(int(v) for v in np.unique(label[out < 0]))
        shown, more = some_values(unknown)
        raise GeometryError(
            f"label values {shown}{more} are not named in the registry.", where=where, fix=NAME_THEM
        )
    return np.asarray(out, dtype=np.uint8)


def some_values(values: list[int]) -> tuple[list[int], str]:
    """All that a label map may hold; of what must be an image, a few, and words for the others."""
    if len(values) <= MAX_ORGAN_ID:
        return values, ""
    return values[:_SHOWN], f" and {len(values) - _SHOWN} more (is it an image, not a label map?)"


def log_odds(
    logits: npt.NDArray[np.float32],
    channels: Sequence[int],
    activation: Literal["softmax", "sigmoid"],
    *,
    where: object = None,
) -> npt.NDArray[np.float32]:
    """A network's outputs (C, D, H, W) -> the log-odds of one organ (D, H, W), float32.

    softmax: d = logsumexp(channels that mean the organ) - logsumexp(all other channels), which for
    a binary softmax is the difference of its two logits.
    sigmoid: the channel's logit; of several channels that mean the organ, the union
    p = 1 - prod(1 - p_c), as log-odds.

    Raises:
        TeacherError: a channel that the network does not have, or no channel left for background.
    """
    num_channels = logits.shape[0]
    out_of_range = [c for c in channels if not 0 <= c < num_channels]
    if out_of_range:
        raise TeacherError(
            f"channels {out_of_range} are out of range: the network emits {num_channels} channels.",
            where=where,
            fix="Correct the teacher's `organs` in the registry (channels count from 0).",
        )
    ours = sorted(set(channels))
    if activation == "sigmoid":
        if len(ours) == 1:
            return np.asarray(logits[ours[0]], dtype=np.float32)
        from scipy.special import log_expit  # late: a registry is read without it, at once

        log_none = np.sum(log_expit(-logits[ours].astype(np.float64)), axis=0)
        # Clipped away from 0 so that a union of vanishing probabilities stays finite.
        log_any = np.log(-np.expm1(np.minimum(log_none, -1e-300)))
        return np.asarray(log_any - log_none, dtype=np.float32)
    others = [c for c in range(num_channels) if c not in ours]
    if not others:
        raise TeacherError(
            "every channel means the organ, so there is no background to compare with.",
            where=where,
            fix="Leave at least one channel out, or set `activation: sigmoid`.",
        )
    return np.asarray(_lse(logits, ours) - _lse(logits, others), dtype=np.float32)


def _lse(logits: npt.NDArray[np.float32], channels: Sequence[int]) -> npt.NDArray[Any]:
    if len(channels) == 1:
        return np.asarray(logits[channels[0]])
    from scipy.special import logsumexp

    return np.asarray(logsumexp(logits[list(channels)], axis=0))


def same_name(one: str, other: str) -> bool:
    """Spellings of one name: case, spaces, underscores and hyphens do not count."""
    return plain_name(one) == plain_name(other)


def plain_name(name: str) -> str:
    """The letters and digits of a name, which all its spellings share."""
    return "".join(letter for letter in name.casefold() if letter.isalnum())


# Hounsfield units -> what a network wants to see.

_CT = re.compile(r"(cb)?cta?")
_OTHER = re.compile(
    r"mri?|t[12](w|wi|c|ce|gd|n|f|star|weighted)?|flair|adc|dwi|swi|dce|mprage|pet|spect|us|"
    r"ultrasound|rgb"
)


def is_ct(channel: str) -> bool | None:
    """Whether what a file calls an image channel, or its modality, means CT; None: it does not say.

    A word of its own counts: `CT_venous` is CT, `T1w` and `MR` are not, `image` says nothing.
    """
    words = re.split(r"[\W_]+", channel.lower())
    if any(_CT.fullmatch(word) for word in words):
        return True
    return False if any(_OTHER.fullmatch(word) for word in words) else None


class Intensity(Config):
    """A CT window and how it is scaled.

    kind `window`: values are clipped to `window_hu` and mapped linearly to `scaled_to`.
    kind `zscore`: clipped to `window_hu`, then `(hu - mean_hu) / std_hu` (nnU-Net's CT scheme).
    kind `raw`: Hounsfield units as they are.
    """

    kind: Literal["window", "zscore", "raw"] = Field(
        default="window", description="how Hounsfield units are scaled"
    )
    window_hu: tuple[float, float] = Field(default=(-160.0, 240.0), description="low, high")
    # Left out of dumps at its default: what was digested before it existed keeps its digest.
    scaled_to: tuple[float, float] = Field(
        default=(-1.0, 1.0),
        description="what window_hu becomes, for kind window",
        exclude_if=lambda value: value == (-1.0, 1.0),
    )
    mean_hu: float = Field(default=0.0, description="for kind zscore")
    std_hu: float = Field(default=1.0, gt=0, description="for kind zscore")

    @model_validator(mode="after")
    def _ordered(self) -> Intensity:
        if self.window_hu[0] >= self.window_hu[1]:
            raise ValueError(f"window_hu {self.window_hu} must be (low, high) with low < high")
        if self.scaled_to[0] >= self.scaled_to[1]:
            raise ValueError(f"scaled_to {self.scaled_to} must be (low, high) with low < high")
        return self

    @property
    def air(self) -> float:
        """The value that air takes, in the units `apply` returns: what padding is filled with."""
        return float(self.apply(np.full((1,), -1024.0, dtype=np.float32))[0])

    def apply(self, hu: npt.NDArray[Any]) -> npt.NDArray[np.float32]:
        """Any shape in HU -> float32 of the same shape in the network's units."""
        low, high = self.window_hu
        values = hu.astype(np.float32)
        match self.kind:
            case "window":
                first, last = self.scaled_to
                scaled = (np.clip(values, low, high) - low) * ((last - first) / (high - low))
                scaled = scaled + first
            case "zscore":
                scaled = (np.clip(values, low, high) - self.mean_hu) / self.std_hu
            case "raw":
                scaled = values
        return scaled.astype(np.float32)
