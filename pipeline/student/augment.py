"""Augmentation. Space: one sampled transform for everything. Intensity: the image alone.

What is not legal for cached targets is refused: with features where the settings are read
(`student.settings`), with organs named by their side where organs are known (`check_sides`).
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from itertools import chain, combinations, product
from typing import Annotated, Literal

import numpy as np
from pydantic import AfterValidator, Field, model_validator

from pipeline.config import Config
from pipeline.errors import ConfigError
from pipeline.labels import LabelSpace
from pipeline.student.appearance import AppearanceConfig, Probability, ordered
from pipeline.student.movement import PLANES, Affine, Movement

Axis = Literal[0, 1, 2]
FEATURES_STAY = (
    "flips, rotations and affines are not legal with cached features (the features of a mirrored, "
    "turned or scaled image are not the mirrored, turned or scaled features)"
)


def _once(axes: tuple[Axis, ...]) -> tuple[Axis, ...]:
    if len(set(axes)) != len(axes):
        raise ValueError(f"{list(axes)} names an axis twice")
    return axes


_Scale = Annotated[float, Field(ge=0.5, le=2)]
_Angle = Annotated[float, Field(ge=0, le=45)]
_Axes = Annotated[tuple[Axis, ...], AfterValidator(_once)]


class AffineConfig(Config):
    """Turns and scales by interpolation; off unless it has a probability."""

    probability: Probability = 0.0
    degrees: tuple[_Angle, _Angle, _Angle] = Field(
        default=(15.0, 15.0, 15.0), description="largest turn about z, y, x, either way"
    )
    scale: Annotated[tuple[_Scale, _Scale], AfterValidator(ordered)] = Field(
        default=(0.8, 1.25), description="how much larger organs become"
    )

    @model_validator(mode="after")
    def _something(self) -> AffineConfig:
        if self.probability and not any(self.degrees) and self.scale == (1.0, 1.0):
            raise ValueError("neither turns nor scales: set probability to 0")
        return self


class AugmentConfig(AppearanceConfig):
    """Space and intensity; by default intensity alone."""

    flip_axes: _Axes = Field(
        default=(),
        description="axes (0 z, 1 y, 2 x) that may be mirrored; anatomy is not symmetric",
    )
    rotate_axes: _Axes = Field(
        default=(),
        description="axes to make quarter turns about; half turns where the patch is not square",
    )
    affine: AffineConfig = Field(default_factory=AffineConfig)

    @property
    def moves_voxels(self) -> bool:
        """Whether any spatial transform may be drawn."""
        return bool(self.flip_axes or self.rotate_axes or self.affine.probability)

    @property
    def swaps_sides(self) -> bool:
        """Whether a patient and the same one mirrored left to right can come out alike."""
        cube = np.arange(8).reshape(2, 2, 2)
        mirrored = np.flip(cube, axis=2)
        return not {m.apply(cube).tobytes() for m in _movements(self)}.isdisjoint(
            m.apply(mirrored).tobytes() for m in _movements(self)
        )


def _movements(config: AugmentConfig) -> Iterator[Movement]:
    """All flips and quarter turns that may be drawn."""
    axes = config.flip_axes
    flips = chain.from_iterable(combinations(axes, n) for n in range(len(axes) + 1))
    turns = product(*(range(4 if axis in config.rotate_axes else 1) for axis in range(3)))
    return (Movement(some, (z, y, x)) for some, (z, y, x) in product(flips, turns))


def check_sides(config: AugmentConfig, space: LabelSpace) -> None:
    """Organs named by their side, and mirror images of patients, do not go together.

    The mirrored image of a left kidney is that of a right one, with the label and log-odds of a
    left one.

    Raises:
        ConfigError: both are wanted.
    """
    sided = [organ for organ in space.organs if _is_sided(organ, space.organs)]
    if sided and config.swaps_sides:
        raise ConfigError(
            f"flip_axes {list(config.flip_axes)} with rotate_axes {list(config.rotate_axes)} "
            f"mirrors left and right, which the student is to tell apart: {', '.join(sided)}.",
            where="training.augment",
            fix="Take axis 2 out of flip_axes (and, with rotate_axes, the others), or merge "
            "left and right in the registry.",
        )


def _is_sided(organ: str, organs: Sequence[str]) -> bool:
    """Whether a word of its name is left or right; l or r only if the other one is there, too."""
    other = {"left": "right", "right": "left", "l": "r", "r": "l"}
    words = _words(organ)
    if {"left", "right"} & set(words):
        return True
    swapped = [other.get(word, word) for word in words]
    return swapped != words and swapped in [_words(o) for o in organs]


def _words(organ: str) -> list[str]:
    """kidney_left, Left Kidney, kidneyLeft -> kidney and left, in their order."""
    return [word.lower() for word in re.findall(r"[A-Z]?[a-z]+|[A-Z]+|\d+", organ)]


def draw_movement(
    config: AugmentConfig, patch: tuple[int, int, int], rng: np.random.Generator
) -> Movement:
    """Draws one transform; in a plane in which the patch is not square there are half turns."""
    affine = _draw_affine(config.affine, rng)
    flips = tuple(axis for axis in config.flip_axes if rng.random() < 0.5)
    turns = [0, 0, 0]
    for axis in config.rotate_axes:
        a, b = PLANES[axis]
        turns[axis] = int(rng.integers(4)) if patch[a] == patch[b] else 2 * int(rng.integers(2))
    return Movement(flips, (turns[0], turns[1], turns[2]), affine)


def _draw_affine(config: AffineConfig, rng: np.random.Generator) -> Affine | None:
    """Angles evenly, scale evenly in its logarithm: as often 1.25 as 1 / 1.25."""
    if rng.random() >= config.probability:
        return None
    z, y, x = (float(rng.uniform(-angle, angle)) for angle in config.degrees)
    low, high = (math.log(scale) for scale in config.scale)
    return Affine((z, y, x), math.exp(rng.uniform(low, high)))
