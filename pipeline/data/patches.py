"""Where windows and patches lie, and how windows are put together again: no I/O, no torch.

All tuples are in (z, y, x) order and in voxels.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from typing import Literal

from pydantic import Field, field_validator

from pipeline.config import Config
from pipeline.errors import GeometryError

Index3 = tuple[int, int, int]
Slices3 = tuple[slice, slice, slice]
Precision = Literal["float32", "bfloat16", "float16"]


class WindowConfig(Config):
    """How a volume is cut into windows and put together again; all of it changes numbers.

    `precision` and `mirror` are left out of `model_dump` at their defaults, so that units made
    before these fields existed keep their digests.
    """

    shape: tuple[int, int, int] = Field(default=(96, 96, 96), description="voxels along z, y, x")
    overlap: float = Field(default=0.5, ge=0, lt=1, description="fraction shared by neighbours")
    sigma: float = Field(default=0.125, gt=0, description="Gaussian weight, in window sizes")
    precision: Precision = Field(
        default="float32",
        description="of the network's arithmetic, on a GPU only; blending is float32 always",
        exclude_if=lambda value: value == "float32",
    )
    mirror: tuple[Literal["z", "y", "x"], ...] = Field(
        default=(),
        description="axes: logits are averaged over the window and its mirror images",
        exclude_if=lambda value: value == (),
    )

    @field_validator("mirror")
    @classmethod
    def _in_order(cls, axes: tuple[str, ...]) -> tuple[str, ...]:
        """Each axis once, in one order, so that what means the same has one digest."""
        return tuple(axis for axis in "zyx" if axis in axes)


@dataclass(frozen=True)
class Patch:
    """A box of `shape` voxels that begins at voxel `start`; it may reach outside the volume."""

    start: Index3
    shape: Index3

    @property
    def slices(self) -> Slices3:
        """The box as slices; only for a box inside its volume."""
        z, y, x = (slice(a, a + n) for a, n in zip(self.start, self.shape, strict=True))
        return z, y, x

    def clip(self, volume: Sequence[int]) -> tuple[Slices3, tuple[tuple[int, int], ...]]:
        """The part inside a volume as slices, and how much is missing before and after per axis.

        Inside and missing add up to the box's shape, also for a box wholly outside.
        """
        inside, missing = [], []
        for start, length, size in zip(self.start, self.shape, volume, strict=True):
            low = min(max(start, 0), size)
            high = min(max(start + length, low), size)
            inside.append(slice(low, high))
            lacking = length - (high - low)
            before = min(max(-start, 0), lacking)
            missing.append((before, lacking - before))
        z, y, x = inside
        return (z, y, x), tuple(missing)

    def coarsen(self, stride: Sequence[int]) -> Patch:
        """The same box in cells of `stride` voxels.

        Raises:
            ValueError: the box does not begin and end on cell borders.
        """
        if any(a % s or n % s for a, n, s in zip(self.start, self.shape, stride, strict=True)):
            raise ValueError(f"{self} does not lie on cells of {tuple(stride)} voxels")
        z, y, x = (a // s for a, s in zip(self.start, stride, strict=True))
        d, h, w = (n // s for n, s in zip(self.shape, stride, strict=True))
        return Patch((z, y, x), (d, h, w))


def window_starts(size: int, window: int, overlap: float, align: int = 1) -> list[int]:
    """Where windows begin along one axis so that they cover it and overlap at least so much.

    Args:
        size: voxels along the axis.
        window: voxels of a window, at most `size`.
        overlap: fraction of a window shared with its neighbour, 0 <= overlap < 1; less where
            windows `align` voxels apart, the closest there are, do not overlap so much.
        align: every start is a multiple of it; `size - window` must be one too.

    Raises:
        ValueError: a window larger than the axis or smaller than `align`, or a last window off
            the alignment.
    """
    if not align <= window <= size or (size - window) % align:
        raise ValueError(f"window {window} does not fit {size} voxels aligned to {align}")
    step = max(align, int(window * (1 - overlap)) // align * align)
    starts = list(range(0, size - window, step))
    return [*starts, size - window]


def windows(
    shape: Sequence[int], window: Sequence[int], overlap: float, align: Sequence[int] = (1, 1, 1)
) -> list[Patch]:
    """All windows of a volume, z slowest, in a fixed order."""
    starts = [window_starts(n, w, overlap, a) for n, w, a in zip(shape, window, align, strict=True)]
    d, h, w = window
    return [Patch((z, y, x), (d, h, w)) for z, y, x in product(*starts)]


# What a student's patches must be for slices, and volumes beside them.
FLAT_PATCH = (
    "Set `patch` to [1, h, w], with a network of kernels [1, 3, 3] and strides [1, 2, 2] (it sees "
    "volumes slice by slice), or leave slices out."
)


def check_slice(shape: Sequence[int], window: Sequence[int], fix: str) -> None:
    """Refuses windows that are thicker than the one slice that an image is: a network would see one
    row of image among rows of padding, and answer all the same."""
    if list(shape).count(1) == 1 and window[list(shape).index(1)] > 1:
        size, patch = (" x ".join(str(n) for n in sizes) for sizes in (shape, window))
        raise GeometryError(
            f"one slice, {size} voxels, would be all but padding in patches of {patch}.", fix=fix
        )


# Of a patch: less image than that is worth a warning. Patches that fit are rounded up to the
# network's strides, so that a little padding is usual.
ENOUGH_IMAGE = 0.5


def image_share(shape: Sequence[int], patch: Sequence[int]) -> float:
    """The most of a patch that an image of that shape can fill; the rest is padding."""
    return math.prod(min(n, p) / p for n, p in zip(shape, patch, strict=True))


def padded_shape(shape: Sequence[int], window: Sequence[int], align: Sequence[int]) -> Index3:
    """The smallest shape that holds a window and is a whole number of `align` cells."""
    d, h, w = (max(-(-n // a) * a, win) for n, win, a in zip(shape, window, align, strict=True))
    return d, h, w


def patch_at(centre: Sequence[int], patch: Sequence[int], volume: Sequence[int]) -> Patch:
    """The patch nearest to being centred on a voxel that stays inside the volume where it fits.

    Where the patch is larger than the volume it begins at 0 and reaches outside.
    """
    z, y, x = (
        min(max(0, c - n // 2), max(0, size - n))
        for c, n, size in zip(centre, patch, volume, strict=True)
    )
    d, h, w = patch
    return Patch((z, y, x), (d, h, w))
