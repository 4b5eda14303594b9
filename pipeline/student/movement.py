"""How a sample is moved: one transform for image, label, log-odds, regions and features.

Flips and quarter turns only move voxels, so they are exact for whatever a voxel holds. An affine
(turn by any angle, scale) interpolates: it reads a larger box and resamples it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn import functional

from pipeline.patches import Index3, Patch

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
        in_voxels: npt.NDArray[np.float64] = turned * spacing[None, :] / spacing[:, None]
        return in_voxels / self.scale


class Warp:
    """Resamples a patch from the box that an affine needs for it.

    Args:
        affine: about the patch's middle.
        patch: what is wanted.
        spacing_mm: z, y, x.

    Attributes:
        box: what is to be read. It may reach outside the case even where the patch does not, and
            has to be read with the "unknown" of each array there: nothing is made up here.
    """

    def __init__(self, affine: Affine, patch: Patch, spacing_mm: Sequence[float]) -> None:
        matrix = affine.matrix(spacing_mm)
        half = (np.asarray(patch.shape) - 1) / 2
        middle = np.asarray(patch.start) + half
        reach = np.abs(matrix) @ half
        # A voxel to spare, so that rounding never takes a value from beyond the box.
        first = np.floor(middle - reach).astype(int) - 1
        last = np.ceil(middle + reach).astype(int) + 1
        z, y, x = (int(n) for n in first)
        d, h, w = (int(n) for n in last - first + 1)
        self.box = Patch((z, y, x), (d, h, w))
        self._grid = _grid(matrix, middle - first, half, patch.shape, self.box.shape)

    def linear(self, values: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
        """(C, d, h, w) of the box -> float32 (C, D, H, W); next to NaN is NaN."""
        return self._sample(torch.from_numpy(values), "bilinear")

    def nearest(self, values: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
        """uint8 (d, h, w) of the box -> (D, H, W)."""
        moved = self._sample(torch.from_numpy(values[None].astype(np.float32)), "nearest")[0]
        return np.asarray(moved, dtype=np.uint8)

    def _sample(
        self, values: Tensor, mode: Literal["bilinear", "nearest"]
    ) -> npt.NDArray[np.float32]:
        moved = functional.grid_sample(values[None], self._grid, mode=mode, align_corners=True)
        return moved[0].numpy()


def _grid(
    matrix: npt.NDArray[np.float64],
    middle: npt.NDArray[np.float64],
    half: npt.NDArray[np.float64],
    shape: Index3,
    box: Index3,
) -> Tensor:
    """For `grid_sample`: (1, D, H, W, 3), x first, -1 .. 1 from the box's first to last voxel."""
    offsets = np.meshgrid(
        *(np.arange(n) - m for n, m in zip(shape, half, strict=True)), indexing="ij", sparse=True
    )
    grid = np.empty((*shape, 3), dtype=np.float32)
    for axis in range(3):
        scale = 2 / (box[axis] - 1)
        parts = [offsets[i] * (matrix[axis, i] * scale) for i in range(3)]
        grid[..., 2 - axis] = parts[0] + (middle[axis] * scale - 1) + parts[1] + parts[2]
    return torch.from_numpy(grid)[None]


@dataclass(frozen=True)
class Movement:
    """One sampled transform: the affine first, then flips, then quarter turns about z, y, x."""

    flips: tuple[int, ...] = ()
    turns: Index3 = (0, 0, 0)
    affine: Affine | None = None

    def apply(self, array: npt.NDArray[Any]) -> npt.NDArray[Any]:
        """Flips and turns (..., D, H, W): the last three axes, whatever stands before them."""
        moved = np.flip(array, axis=tuple(axis - 3 for axis in self.flips))
        for axis, turns in enumerate(self.turns):
            a, b = PLANES[axis]
            moved = np.rot90(moved, turns, axes=(a - 3, b - 3))
        return np.ascontiguousarray(moved)

    def spacing_after(self, spacing_mm: Sequence[float]) -> tuple[float, ...]:
        """mm per voxel along z, y, x of what `apply` returns."""
        moved = list(spacing_mm)
        for axis, turns in enumerate(self.turns):
            if turns % 2:
                a, b = PLANES[axis]
                moved[a], moved[b] = moved[b], moved[a]
        return tuple(moved)

    def warp(self, patch: Patch, spacing_mm: Sequence[float]) -> Warp | None:
        """The resampling that comes before `apply`; None if there is no affine."""
        return None if self.affine is None else Warp(self.affine, patch, spacing_mm)
