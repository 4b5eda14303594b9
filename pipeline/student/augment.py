"""Augmentation. Space: one sampled transform for everything. Intensity: the image alone.

All randomness comes from the generator that is given, so that a sample stays a pure function of its
number; MONAI's random transforms keep a state of their own and are not used. What is not legal for
organs named by their side is refused where organs are known (`check_sides`).
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import chain, combinations, product
from typing import TYPE_CHECKING, Annotated, Any, Literal

import numpy as np
import numpy.typing as npt
from pydantic import AfterValidator, Field, model_validator

from pipeline.config import Config
from pipeline.data.labels import LabelSpace
from pipeline.data.patches import Index3, Patch
from pipeline.data.volume import Grid
from pipeline.errors import ConfigError

if TYPE_CHECKING:
    from torch import Tensor

# Changes of intensity. Source of them, their order, probabilities and most ranges: nnU-Net v2's
# `nnUNetTrainer.get_training_transforms` (Isensee et al. 2021, Nature Methods 18).

FloatArray = npt.NDArray[np.float32]


def ordered(values: tuple[float, float]) -> tuple[float, float]:
    """(low, high), as a check of pydantic's."""
    if values[0] > values[1]:
        raise ValueError(f"{list(values)} must be [low, high] with low <= high")
    return values


Probability = Annotated[float, Field(ge=0, le=1, description="how often, per patch")]
_Finite = Annotated[float, Field(allow_inf_nan=False)]
_NotNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
_Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
_Fraction = Annotated[float, Field(ge=0.1, le=1)]
_Spread = Annotated[tuple[_NotNegative, _NotNegative], AfterValidator(ordered)]
_Factor = Annotated[tuple[_Positive, _Positive], AfterValidator(ordered)]
_DRAWN = "drawn from least to largest"


class NoiseConfig(Config):
    """Gaussian noise, in units of the network's input."""

    probability: Probability = 0.1
    std: _Spread = Field(default=(0.0, 0.1), description=f"of the noise; {_DRAWN}")


class BlurConfig(Config):
    """Gaussian blur, a ball in mm: sigma in voxels of the finest axis, fewer along coarser ones."""

    probability: Probability = 0.1
    sigma: _Spread = Field(default=(0.5, 1.0), description=f"voxels of the finest axis; {_DRAWN}")


class BrightnessConfig(Config):
    """A shift, in units of the network's input."""

    probability: Probability = 0.15
    shift: Annotated[tuple[_Finite, _Finite], AfterValidator(ordered)] = Field(
        default=(-0.15, 0.15), description=f"added to all voxels; {_DRAWN}"
    )


class ContrastConfig(Config):
    """Distances to the patch's mean times a factor."""

    probability: Probability = 0.15
    factor: _Factor = Field(default=(0.75, 1.25), description=_DRAWN)


class LowResolutionConfig(Config):
    """Voxels thrown away and interpolated back; the share that is kept along the finest axis.
    Coarser axes keep theirs until voxels are cubes: a thick slice is not made thicker first."""

    probability: Probability = 0.125
    zoom: Annotated[tuple[_Fraction, _Fraction], AfterValidator(ordered)] = Field(
        default=(0.5, 1.0), description=f"share of voxels kept; {_DRAWN}"
    )


class GammaConfig(Config):
    """Values between the patch's least and largest, as 0 .. 1, to the power of an exponent."""

    probability: Probability = 0.3
    exponent: _Factor = Field(default=(0.7, 1.5), description=_DRAWN)


class AppearanceConfig(Config):
    """Which changes, how often, how much; `intensity: 0` switches them all off."""

    intensity: float = Field(
        default=1.0, ge=0, le=1, description="factor on each probability below; 0: none of them"
    )
    noise: NoiseConfig = Field(default_factory=NoiseConfig)
    blur: BlurConfig = Field(default_factory=BlurConfig)
    brightness: BrightnessConfig = Field(default_factory=BrightnessConfig)
    contrast: ContrastConfig = Field(default_factory=ContrastConfig)
    low_resolution: LowResolutionConfig = Field(default_factory=LowResolutionConfig)
    gamma: GammaConfig = Field(default_factory=GammaConfig)


def change_intensity(
    image: FloatArray,
    config: AppearanceConfig,
    rng: np.random.Generator,
    spacing_mm: Sequence[float] = (1.0, 1.0, 1.0),
) -> FloatArray:
    """Noise, blur, brightness, contrast, low resolution, gamma; each with its probability.

    Args:
        image: (1, D, H, W) in units of the network's input; left as it is.
        spacing_mm: only their ratios matter.
    """

    from scipy.ndimage import gaussian_filter

    def happens(probability: float) -> bool:
        return bool(rng.random() < config.intensity * probability)

    out = image
    if happens(config.noise.probability):
        std = np.float32(rng.uniform(*config.noise.std))
        out = out + std * rng.standard_normal(out.shape, dtype=np.float32)
    if happens(config.blur.probability):
        sigma = rng.uniform(*config.blur.sigma)
        sigmas = [0.0, *(sigma / edge for edge in _relative(out, spacing_mm))]
        out = gaussian_filter(out, sigmas, mode="nearest", truncate=3)
    if happens(config.brightness.probability):
        out = out + np.float32(rng.uniform(*config.brightness.shift))
    if happens(config.contrast.probability):
        mean = out.mean(dtype=np.float64).astype(np.float32)
        out = (out - mean) * np.float32(rng.uniform(*config.contrast.factor)) + mean
    if happens(config.low_resolution.probability):
        out = _low_resolution(out, rng.uniform(*config.low_resolution.zoom), spacing_mm)
    if happens(config.gamma.probability):
        low, high = float(out.min()), float(out.max())
        scale = max(high - low, 1e-6)
        exponent = np.float32(rng.uniform(*config.gamma.exponent))
        out = ((out - low) / scale) ** exponent * scale + low
    return out.astype(np.float32)


def _relative(image: FloatArray, spacing_mm: Sequence[float]) -> list[float]:
    """Voxel edges in units of the finest one; the thickness of one slice is no spacing."""
    edges = [edge for edge, n in zip(spacing_mm, image.shape[1:], strict=True) if n > 1]
    return [edge / min(edges or spacing_mm) for edge in spacing_mm]


def _low_resolution(image: FloatArray, zoom: float, spacing_mm: Sequence[float]) -> FloatArray:
    """Nearest voxels down, linear up, as nnU-Net does it."""
    import torch
    from torch.nn import functional

    full = image.shape[1:]
    kept = [
        max(1, round(n * min(1.0, zoom * edge)))
        for n, edge in zip(full, _relative(image, spacing_mm), strict=True)
    ]
    coarse = functional.interpolate(torch.from_numpy(image)[None], size=kept, mode="nearest-exact")
    return functional.interpolate(coarse, size=full, mode="trilinear")[0].numpy()


Axis = Literal[0, 1, 2]


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


# A strength by one word. `nnunet`: nnU-Net v2's own ranges and probabilities (intensity's are the
# defaults above; its mirroring is `flip_axes`, for registries in which no organ has a side).
# `strong`: what helped students on patients of another hospital, see docs/accuracy.md.
_PRESETS: dict[str, dict[str, Any]] = {
    "nnunet": {"affine": {"probability": 0.36, "degrees": (30.0, 30.0, 30.0), "scale": (0.7, 1.4)}},
    "strong": {
        "affine": {"probability": 0.9, "degrees": (11.0, 0.0, 0.0), "scale": (0.78, 1.28)},
        "noise": {"probability": 0.3, "std": (0.0, 0.12)},
        "blur": {"probability": 0.3, "sigma": (0.5, 1.0)},
        "brightness": {"probability": 0.4, "shift": (-0.4, 0.4)},
        "contrast": {"probability": 0.5, "factor": (0.67, 1.5)},
        "gamma": {"probability": 0.5, "exponent": (0.55, 1.8)},
    },
}


class AugmentConfig(AppearanceConfig):
    """Space and intensity; by default intensity alone."""

    preset: Literal["default", "nnunet", "strong"] = Field(
        default="default", description="a strength by one word; what is said besides holds"
    )
    flip_axes: _Axes = Field(
        default=(),
        description="axes (0 z, 1 y, 2 x) that may be mirrored; anatomy is not symmetric",
    )
    rotate_axes: _Axes = Field(
        default=(),
        description="axes to make quarter turns about; half turns where the patch is not square",
    )
    affine: AffineConfig = Field(default_factory=AffineConfig)

    @model_validator(mode="before")
    @classmethod
    def _fill_in(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        filled = dict(data)
        for name, values in _PRESETS.get(str(data.get("preset")), {}).items():
            said = data.get(name, {})
            filled[name] = values | said if isinstance(said, dict) else said
        return filled

    def swaps_sides(self, patch: Index3) -> bool:
        """Whether a patient and the same one mirrored left to right can come out alike. Of a patch
        of one slice half a turn about an axis in it is a mirror image."""
        shape = [min(2, n) for n in patch]
        cube = np.arange(math.prod(shape)).reshape(shape)
        mirrored = np.flip(cube, axis=2)
        return not {m.apply(cube).tobytes() for m in _movements(self)}.isdisjoint(
            m.apply(mirrored).tobytes() for m in _movements(self)
        )


def _movements(config: AugmentConfig) -> Iterator[Movement]:
    """All flips and quarter turns that may be drawn."""
    flips = chain.from_iterable(combinations(config.flip_axes, n) for n in range(4))
    turns = product(*(range(4 if axis in config.rotate_axes else 1) for axis in range(3)))
    return (Movement(some, (z, y, x)) for some, (z, y, x) in product(flips, turns))


def check_sides(config: AugmentConfig, space: LabelSpace, patch: Index3) -> None:
    """Organs named by their side, and mirror images of patients, do not go together: the mirrored
    image of a left kidney is that of a right one, with label and log-odds of a left one.

    Raises:
        ConfigError: both are wanted.
    """
    sided = sided_organs(space)
    if sided and config.swaps_sides(patch):
        raise ConfigError(
            f"flip_axes {list(config.flip_axes)} with rotate_axes {list(config.rotate_axes)} "
            f"mirrors left and right, which the student is to tell apart: {', '.join(sided)}.",
            where="training.augment",
            fix="Take axis 2 out of flip_axes (and, with rotate_axes, the others), or merge "
            "left and right in the registry.",
        )


def sided_organs(space: LabelSpace) -> list[str]:
    """Organs with left or right in their name; with l or r only if the other is there, too."""
    other = {"left": "right", "right": "left", "l": "r", "r": "l"}
    # kidney_left, Left Kidney, kidneyLeft: kidney and left, in their order.
    parts = {organ: re.findall(r"[A-Z]?[a-z]+|[A-Z]+|\d+", organ) for organ in space.organs}
    words = {organ: [part.lower() for part in found] for organ, found in parts.items()}
    swapped = {organ: [other.get(w, w) for w in found] for organ, found in words.items()}
    return [
        organ
        for organ, found in words.items()
        if {"left", "right"} & {*found}
        or (swapped[organ] != found and swapped[organ] in words.values())
    ]


def draw_movement(config: AugmentConfig, patch: Index3, rng: np.random.Generator) -> Movement:
    """Draws one transform; in a plane in which the patch is not square there are half turns. Angles
    are drawn evenly, scale evenly in its logarithm: as often 1.25 as 1 / 1.25."""
    affine = None
    if rng.random() < config.affine.probability:
        z, y, x = (float(rng.uniform(-angle, angle)) for angle in config.affine.degrees)
        low, high = (math.log(scale) for scale in config.affine.scale)
        affine = Affine((z, y, x), math.exp(rng.uniform(low, high)))
    flips = tuple(axis for axis in config.flip_axes if rng.random() < 0.5)
    turns = [0, 0, 0]
    for axis in config.rotate_axes:
        a, b = PLANES[axis]
        turns[axis] = int(rng.integers(4)) if patch[a] == patch[b] else 2 * int(rng.integers(2))
    return Movement(flips, (turns[0], turns[1], turns[2]), affine)


# How a sample is moved: one transform for image, label, log-odds, regions and features.
#
# Flips and quarter turns only move voxels, so they are exact for whatever a voxel holds. An affine
# (turn by any angle, scale) interpolates: it reads a larger box and resamples it.

# Axis -> the two axes of the plane that a turn about it turns.
PLANES = {0: (1, 2), 1: (0, 2), 2: (0, 1)}


@dataclass(frozen=True)
class Affine:
    """Turns about z, y, x in degrees, and how much larger everything becomes; in mm, not voxels."""

    degrees: tuple[float, float, float]
    scale: float

    def matrix(self, spacing_mm: Sequence[float]) -> npt.NDArray[np.float64]:
        """(3, 3): offset from the patch's middle in voxels -> that of where its value is taken."""
        turned = np.eye(3)
        for axis, angle in enumerate(np.deg2rad(self.degrees)):
            a, b = PLANES[axis]
            turn = np.eye(3)
            turn[a, a] = turn[b, b] = np.cos(angle)
            turn[a, b], turn[b, a] = -np.sin(angle), np.sin(angle)
            turned = turned @ turn
        spacing = np.asarray(spacing_mm)
        return np.asarray(turned * spacing[None, :] / spacing[:, None] / self.scale)

    def within(self, slice_axis: int | None) -> Affine:
        """The same for a volume (None); of one slice only the turn about the axis across it, since
        nothing is known of what the others would turn into it."""
        if slice_axis is None:
            return self
        z, y, x = (a if axis == slice_axis else 0.0 for axis, a in enumerate(self.degrees))
        return replace(self, degrees=(z, y, x))


class Warp:
    """Resamples a patch from the box that an affine about its middle needs for it.

    Attributes:
        box: what is to be read. It may reach outside the case even where the patch does not, and
            has to be read with the "unknown" of each array there: nothing is made up here.
    """

    def __init__(self, affine: Affine, patch: Patch, spacing_mm: Sequence[float]) -> None:
        matrix = affine.matrix(spacing_mm)
        half = (np.asarray(patch.shape) - 1) / 2
        middle = np.asarray(patch.start) + half
        reach = np.abs(matrix) @ half
        # A voxel to spare, so that rounding never takes a value from beyond the box; none along an
        # axis where each value comes from the middle itself: next to one slice nothing is known.
        spare = (reach > 0).astype(int)
        first = np.floor(middle - reach).astype(int) - spare
        last = np.ceil(middle + reach).astype(int) + spare
        z, y, x = (int(n) for n in first)
        d, h, w = (int(n) for n in last - first + 1)
        self.box = Patch((z, y, x), (d, h, w))
        self._grid = _grid(matrix, middle - first, patch.shape, self.box.shape)

    def linear(self, values: FloatArray) -> FloatArray:
        """(C, d, h, w) of the box -> float32 (C, D, H, W); next to NaN is NaN."""
        return self._sample(values, "bilinear")

    def nearest(self, values: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
        """uint8 (d, h, w) of the box -> (D, H, W)."""
        moved = self._sample(values[None].astype(np.float32), "nearest")[0]
        return np.asarray(moved, dtype=np.uint8)

    def _sample(self, values: FloatArray, mode: Literal["bilinear", "nearest"]) -> FloatArray:
        import torch
        from torch.nn import functional

        box = torch.from_numpy(values)[None]
        moved = functional.grid_sample(box, self._grid, mode=mode, align_corners=True)
        return moved[0].numpy()


def _grid(
    matrix: npt.NDArray[np.float64], middle: npt.NDArray[np.float64], shape: Index3, box: Index3
) -> Tensor:
    """For `grid_sample`: (1, D, H, W, 3), x first, -1 .. 1 from the box's first to last voxel."""
    import torch

    offsets = np.meshgrid(*(np.arange(n) - (n - 1) / 2 for n in shape), indexing="ij", sparse=True)
    grid = np.empty((*shape, 3), dtype=np.float32)
    for axis in range(3):
        scale = 2 / max(1, box[axis] - 1)
        parts = [offsets[i] * (matrix[axis, i] * scale) for i in range(3)]
        grid[..., 2 - axis] = parts[0] + (middle[axis] * scale - 1) + parts[1] + parts[2]
    return torch.from_numpy(grid)[None]


@dataclass(frozen=True)
class Movement:
    """One sampled transform: the affine first, then flips, then quarter turns about z, y, x."""

    flips: tuple[int, ...] = ()
    turns: Index3 = (0, 0, 0)
    affine: Affine | None = None

    @property
    def moves(self) -> bool:
        """Whether anything is moved."""
        return self != Movement()

    def apply(self, array: npt.NDArray[Any]) -> npt.NDArray[Any]:
        """Flips and turns (..., D, H, W): the last three axes, whatever stands before them."""
        moved = np.flip(array, axis=tuple(axis - 3 for axis in self.flips))
        for axis, turns in enumerate(self.turns):
            a, b = PLANES[axis]
            moved = np.rot90(moved, turns, axes=(a - 3, b - 3))
        # To numpy an axis of one voxel is contiguous in either direction, to torch in one.
        return moved.copy() if min(moved.strides) < 0 else np.ascontiguousarray(moved)

    def spacing_after(self, spacing_mm: Sequence[float]) -> tuple[float, ...]:
        """mm per voxel along z, y, x of what `apply` returns."""
        moved = list(spacing_mm)
        for axis, turns in enumerate(self.turns):
            if turns % 2:
                a, b = PLANES[axis]
                moved[a], moved[b] = moved[b], moved[a]
        return tuple(moved)

    def warp(self, patch: Patch, grid: Grid) -> Warp | None:
        """The resampling of a case on a grid that comes before `apply`; None without an affine."""
        if self.affine is None:
            return None
        return Warp(self.affine.within(grid.slice_axis), patch, grid.spacing_mm)
