"""From one grid to another, with what lies outside the field of view marked, never invented."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
from scipy import ndimage

from pipeline.volume import Grid, Volume

_SLAB_VOXELS = 4_000_000
_SAME_GRID_TOLERANCE = 1e-4


def resample(volume: Volume, grid: Grid, *, order: int, outside: float | None = None) -> Volume:
    """Resamples (..., D, H, W) onto a grid: order 1 linear, order 0 nearest.

    Values are interpolated between voxel centres; in the half voxel between the outermost centres
    and the edge of the field of view the outermost value holds. Works slab by slab, so that no
    more than the result and a slab are in memory.

    Args:
        volume: any real dtype; integers are rounded after interpolation.
        grid: where the result lies.
        order: 0 or 1.
        outside: value of voxels outside the source's field of view (NaN where a float result must
            say "not seen"); None holds the outermost value there too.

    Returns:
        A volume of the same dtype on `grid`.
    """
    if same_grid(volume.grid, grid):
        return Volume(volume.array, grid, volume.stored)
    source = volume.array
    to_source = volume.grid.index_map_from(grid)
    out = np.empty((*source.shape[:-3], *grid.shape), dtype=source.dtype)
    rows = max(1, _SLAB_VOXELS // (grid.shape[1] * grid.shape[2]))
    for begin in range(0, grid.shape[0], rows):
        end = min(grid.shape[0], begin + rows)
        shape = (end - begin, *grid.shape[1:])
        offset = to_source[:3, :3] @ np.array([begin, 0, 0]) + to_source[:3, 3]
        unseen = None if outside is None else _outside(to_source, offset, shape, source.shape[-3:])
        for channel in np.ndindex(*source.shape[:-3]):
            part = _interpolate(source[channel], to_source[:3, :3], offset, shape, order)
            if unseen is not None:
                part[unseen] = outside
            out[(*channel, slice(begin, end))] = part
    return Volume(out, grid, volume.stored)


def same_grid(a: Grid, b: Grid) -> bool:
    """Whether two grids are one within 0.1 micrometre at every corner."""
    return a.shape == b.shape and a.largest_corner_distance_mm(b) < _SAME_GRID_TOLERANCE


def _interpolate(
    source: npt.NDArray[Any],
    matrix: npt.NDArray[np.float64],
    offset: npt.NDArray[np.float64],
    shape: tuple[int, ...],
    order: int,
) -> npt.NDArray[Any]:
    diagonal = np.diag(matrix)
    # scipy takes a much faster separable path for a diagonal given as a vector.
    aligned = np.allclose(matrix, np.diag(diagonal), atol=1e-9)
    rounded = source.dtype.kind in "iub" and order > 0
    if rounded or source.dtype == np.float16:
        computed: type = np.float32 if source.dtype.itemsize <= 2 else np.float64
    else:
        computed = source.dtype.type
    result = ndimage.affine_transform(
        source.astype(computed, copy=False),
        diagonal if aligned else matrix,
        offset=offset,
        output_shape=shape,
        order=order,
        mode="nearest",
        prefilter=False,
    )
    return np.asarray(np.rint(result) if rounded else result, dtype=source.dtype)


def _outside(
    to_source: npt.NDArray[np.float64],
    offset: npt.NDArray[np.float64],
    shape: tuple[int, ...],
    source_shape: tuple[int, ...],
) -> npt.NDArray[np.bool_]:
    axes = [np.arange(n, dtype=np.float64) for n in shape]
    unseen = np.zeros(shape, dtype=np.bool_)
    for row in range(3):
        z, y, x = (to_source[row, i] * axes[i] for i in range(3))
        index = offset[row] + z[:, None, None] + y[None, :, None] + x[None, None, :]
        unseen |= (index < -0.5 - 1e-6) | (index > source_shape[row] - 0.5 + 1e-6)
    return unseen
