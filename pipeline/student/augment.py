"""How a patch looks: changes of intensity, of the image alone.

All randomness comes from the generator that is given, so that a sample stays a pure function of
its number; MONAI's random transforms keep a state of their own and are not used.

Source of the changes, their order, probabilities and most ranges: nnU-Net v2's
`nnUNetTrainer.get_training_transforms` (Isensee et al. 2021, Nature Methods 18).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

import numpy as np
import numpy.typing as npt
import torch
from pydantic import AfterValidator, Field
from scipy.ndimage import gaussian_filter
from torch.nn import functional

from pipeline.config import Config

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


class NoiseConfig(Config):
    """Gaussian noise, in units of the network's input."""

    probability: Probability = 0.1
    std: Annotated[tuple[_NotNegative, _NotNegative], AfterValidator(ordered)] = Field(
        default=(0.0, 0.1), description="of the noise; drawn from least to largest"
    )


class BlurConfig(Config):
    """Gaussian blur, a ball in mm: sigma in voxels of the finest axis, fewer along coarser ones."""

    probability: Probability = 0.1
    sigma: Annotated[tuple[_NotNegative, _NotNegative], AfterValidator(ordered)] = Field(
        default=(0.5, 1.0), description="voxels of the finest axis; drawn from least to largest"
    )


class BrightnessConfig(Config):
    """A shift, in units of the network's input."""

    probability: Probability = 0.15
    shift: Annotated[tuple[_Finite, _Finite], AfterValidator(ordered)] = Field(
        default=(-0.15, 0.15), description="added to all voxels; drawn from least to largest"
    )


class ContrastConfig(Config):
    """Distances to the patch's mean times a factor."""

    probability: Probability = 0.15
    factor: Annotated[tuple[_Positive, _Positive], AfterValidator(ordered)] = Field(
        default=(0.75, 1.25), description="drawn from least to largest"
    )


class LowResolutionConfig(Config):
    """Voxels thrown away and interpolated back; the share that is kept along the finest axis.

    Coarser axes keep theirs until the voxels are cubes: a thick slice is not made thicker first.
    """

    probability: Probability = 0.125
    zoom: Annotated[tuple[_Fraction, _Fraction], AfterValidator(ordered)] = Field(
        default=(0.5, 1.0), description="share of voxels kept; drawn from least to largest"
    )


class GammaConfig(Config):
    """Values between the patch's least and largest, as 0 .. 1, to the power of an exponent."""

    probability: Probability = 0.3
    exponent: Annotated[tuple[_Positive, _Positive], AfterValidator(ordered)] = Field(
        default=(0.7, 1.5), description="drawn from least to largest"
    )


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
        config: which, and how much.
        rng: the only source of randomness.
        spacing_mm: z, y, x; only their ratios matter.
    """

    def happens(probability: float) -> bool:
        return bool(rng.random() < config.intensity * probability)

    out = image
    if happens(config.noise.probability):
        std = np.float32(rng.uniform(*config.noise.std))
        out = out + std * rng.standard_normal(out.shape, dtype=np.float32)
    if happens(config.blur.probability):
        out = _blur(out, rng.uniform(*config.blur.sigma), spacing_mm)
    if happens(config.brightness.probability):
        out = out + np.float32(rng.uniform(*config.brightness.shift))
    if happens(config.contrast.probability):
        mean = out.mean(dtype=np.float64).astype(np.float32)
        out = (out - mean) * np.float32(rng.uniform(*config.contrast.factor)) + mean
    if happens(config.low_resolution.probability):
        out = _low_resolution(out, rng.uniform(*config.low_resolution.zoom), spacing_mm)
    if happens(config.gamma.probability):
        out = _gamma(out, rng.uniform(*config.gamma.exponent))
    return out.astype(np.float32)


def _relative(spacing_mm: Sequence[float]) -> list[float]:
    """Voxel edges in units of the finest one."""
    return [edge / min(spacing_mm) for edge in spacing_mm]


def _blur(image: FloatArray, sigma: float, spacing_mm: Sequence[float]) -> FloatArray:
    sigmas = [0.0, *(sigma / edge for edge in _relative(spacing_mm))]
    blurred: FloatArray = gaussian_filter(image, sigmas, mode="nearest", truncate=3)
    return blurred


def _low_resolution(image: FloatArray, zoom: float, spacing_mm: Sequence[float]) -> FloatArray:
    """Nearest voxels down, linear up, as nnU-Net does it."""
    full = image.shape[1:]
    kept = [
        max(1, round(n * min(1.0, zoom * edge)))
        for n, edge in zip(full, _relative(spacing_mm), strict=True)
    ]
    few = functional.interpolate(torch.from_numpy(image)[None], size=kept, mode="nearest-exact")
    return functional.interpolate(few, size=full, mode="trilinear")[0].numpy()


def _gamma(image: FloatArray, exponent: float) -> FloatArray:
    low, high = float(image.min()), float(image.max())
    scale = max(high - low, 1e-6)
    return ((image - low) / scale) ** np.float32(exponent) * scale + low
