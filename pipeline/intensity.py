"""Hounsfield units -> what a network wants to see."""

from __future__ import annotations

import re
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from pydantic import Field, model_validator

from pipeline.config import Config

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
