"""Augmentation. Space: one sampled transform for everything. Intensity: the image alone.

A spatial transform is exact for cached log-odds if it only moves voxels (flip, 90-degree
rotation). It is never legal for cached features: the features of a mirrored image are not the
mirrored features. Such a combination is refused when the configuration is read.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from pydantic import Field, model_validator

from pipeline.config import Config


class AugmentConfig(Config):
    """Probabilities and ranges; all off is `{flip_axes: [], rotate: false, intensity: 0}`."""

    flip_axes: tuple[Literal[0, 1, 2], ...] = Field(
        default=(),
        description="axes (0 z, 1 y, 2 x) that may be mirrored; anatomy is not symmetric",
    )
    rotate: bool = Field(default=False, description="90-degree rotations in the y-x plane")
    intensity: float = Field(
        default=0.5, ge=0, le=1, description="probability of each intensity change"
    )
    noise_std: float = Field(default=0.1, ge=0)
    brightness: float = Field(default=0.15, ge=0, description="largest shift")
    contrast: float = Field(default=0.2, ge=0, lt=1, description="largest relative change")
    gamma: float = Field(default=0.3, ge=0, lt=1, description="largest change of the exponent")

    @model_validator(mode="after")
    def _once(self) -> AugmentConfig:
        if len(set(self.flip_axes)) != len(self.flip_axes):
            raise ValueError(f"flip_axes {list(self.flip_axes)} names an axis twice")
        return self

    @property
    def moves_voxels(self) -> bool:
        """Whether any spatial transform may be drawn."""
        return bool(self.flip_axes) or self.rotate


@dataclass(frozen=True)
class Movement:
    """One sampled spatial transform: flips, then quarter turns in the y-x plane."""

    flips: tuple[int, ...] = ()
    turns: int = 0

    def apply(self, array: npt.NDArray[Any]) -> npt.NDArray[Any]:
        """(..., D, H, W): the last three axes move, whatever stands before them."""
        moved = np.flip(array, axis=tuple(axis - 3 for axis in self.flips))
        return np.ascontiguousarray(np.rot90(moved, self.turns, axes=(-2, -1)))


def draw_movement(
    config: AugmentConfig, patch: tuple[int, int, int], rng: np.random.Generator
) -> Movement:
    """Draws one transform; patches that are not square in y-x only turn by half a turn."""
    flips = tuple(axis for axis in config.flip_axes if rng.random() < 0.5)
    if not config.rotate:
        return Movement(flips)
    turns = int(rng.integers(4)) if patch[1] == patch[2] else 2 * int(rng.integers(2))
    return Movement(flips, turns)


def change_intensity(
    image: npt.NDArray[np.float32], config: AugmentConfig, rng: np.random.Generator
) -> npt.NDArray[np.float32]:
    """Noise, brightness, contrast and gamma, each with its probability; image around -1 .. 1."""
    out = image
    if rng.random() < config.intensity:
        out = out * np.float32(1 + rng.uniform(-config.contrast, config.contrast))
    if rng.random() < config.intensity:
        out = out + np.float32(rng.uniform(-config.brightness, config.brightness))
    if rng.random() < config.intensity and config.gamma:
        low, high = float(out.min()), float(out.max())
        exponent = np.float32(1 + rng.uniform(-config.gamma, config.gamma))
        scale = max(high - low, 1e-6)
        out = ((out - low) / scale) ** exponent * scale + low
    if rng.random() < config.intensity:
        noise = rng.standard_normal(out.shape, dtype=np.float32)
        out = out + noise * np.float32(rng.uniform(0, config.noise_std))
    return out.astype(np.float32)
