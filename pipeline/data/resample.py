"""From one grid to another, with what lies outside the field of view marked, never invented."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy import ndimage

from pipeline.data.volume import Grid, Volume

_SLAB_VOXELS = 4_000_000
_SAME_GRID_TOLERANCE = 1e-4
_ROUNDING = 1e-6


def resample(volume: Volume, grid: Grid, *, order: int, outside: float | None = None) -> Volume:
    """Resamples (..., D, H, W) onto a grid: order 1 linear, order 0 nearest.

    Values are interpolated between voxel centres; in the half voxel between the outermost centres
    and the edge of the field of view the outermost value holds. Works slab by slab, so that no
    more than the source, the result and a slab are in memory.

    Args:
        volume: any real dtype; integers are rounded after interpolation.
        outside: value of voxels outside the source's field of view (NaN where a float result must
            say "not seen"); None holds the outermost value there too.
    """
    if same_grid(volume.grid, grid):
        return Volume(volume.array, grid, volume.stored)
    source = volume.array
    between = _Between(volume.grid, grid, order, outside)
    out = np.empty((*source.shape[:-3], *grid.shape), dtype=source.dtype)
    for begin in range(0, grid.shape[0], between.rows_at_once):
        end = min(grid.shape[0], begin + between.rows_at_once)
        between.fill(out[..., begin:end, :, :], begin, end, source, 0)
    return Volume(out, grid, volume.stored)


class SlabRows:
    """Linear `resample` of a float32 volume that arrives slab by slab along z, handed out as soon
    as it can be: neither volume is ever whole in memory.

    Only the rows that target rows still need are kept: a few, where the two grids' z axes agree;
    more, up to all, the more they are turned against each other.
    """

    def __init__(self, source: Grid, target: Grid, *, outside: float | None = None) -> None:
        self._between = _Between(source, target, 1, outside)
        self._same = same_grid(source, target)
        self._first, self._last = self._between.needed_rows()
        self._pending = np.ones(target.shape[0], dtype=np.bool_)
        self._source, self._target = source, target
        self._begin = self._end = 0
        self._kept: npt.NDArray[np.float32] | None = None

    def put(
        self, slab: npt.NDArray[np.float32], out: npt.NDArray[np.float32] | None = None
    ) -> Iterator[tuple[int, npt.NDArray[np.float32]]]:
        """Takes the next rows, (..., n, H, W); yields what they complete of the target.

        Args:
            out: (..., D, H, W) of the target, which is filled; what is yielded are views of it.
                Without it, arrays of their own, a few rows at a time.

        Yields:
            The number of a target row, and (..., m, H, W) from there on.
        """
        begin, self._end = self._end, self._end + slab.shape[-3]
        if self._same:
            if out is not None:
                out[..., begin : self._end, :, :] = slab
            yield begin, slab
            return
        whole = slab if self._kept is None else np.concatenate([self._kept, slab], axis=-3)
        ready = np.flatnonzero(self._pending & (self._last < self._end))
        lead = slab.shape[:-3]
        at_once = self._between.rows_at_once
        if out is None:
            at_once = max(1, at_once // int(np.prod(lead)))
        for run in np.split(ready, np.flatnonzero(np.diff(ready) > 1) + 1):
            for at in range(0, len(run), at_once):
                first, end = int(run[at]), int(run[at : at + at_once][-1]) + 1
                if out is None:
                    rows = np.empty((*lead, end - first, *self._target.shape[1:]), np.float32)
                else:
                    rows = out[..., first:end, :, :]
                self._between.fill(rows, first, end, whole, self._begin)
                yield first, rows
        self._pending[ready] = False
        left = self._first[self._pending]
        keep_from = min(self._end, int(left.min()) if left.size else self._end)
        # A copy, so that the slab itself is not kept alive by a view.
        self._kept = whole[..., max(0, keep_from - self._begin) :, :, :].copy()
        self._begin = max(self._begin, keep_from)

    def check_complete(self) -> None:
        """Refuses a volume that has not arrived whole.

        Raises:
            ValueError: rows are missing.
        """
        if self._end != self._source.shape[0]:
            raise ValueError(f"{self._end} of {self._source.shape[0]} rows have arrived")


class SlabResampler:
    """`SlabRows` with the result held whole."""

    def __init__(self, source: Grid, target: Grid, *, outside: float | None = None) -> None:
        self._rows = SlabRows(source, target, outside=outside)
        self._target = target
        self._out: npt.NDArray[np.float32] | None = None

    def put(self, slab: npt.NDArray[np.float32]) -> None:
        """The next rows, (..., n, H, W)."""
        if self._out is None:
            shape = (*slab.shape[:-3], *self._target.shape)
            self._out = np.empty(shape, dtype=np.float32)
        for _ in self._rows.put(slab, self._out):
            pass

    def finish(self) -> Volume:
        """The volume on the target grid.

        Raises:
            ValueError: rows are missing.
        """
        self._rows.check_complete()
        assert self._out is not None
        return Volume(self._out, self._target)


def same_grid(a: Grid, b: Grid) -> bool:
    """Whether two grids are one within 0.1 micrometre at every corner."""
    return a.shape == b.shape and a.largest_corner_distance_mm(b) < _SAME_GRID_TOLERANCE


class _Between:
    """The map from the voxels of a target grid into a source grid, and what it takes to follow it
    for some rows."""

    def __init__(self, source: Grid, target: Grid, order: int, outside: float | None) -> None:
        matrix = source.index_map_from(target)
        self._matrix, self._offset = matrix[:3, :3], matrix[:3, 3]
        diagonal = np.diag(self._matrix)
        self._aligned = np.allclose(self._matrix, np.diag(diagonal), atol=1e-9)
        if self._aligned:
            self._matrix = np.diag(diagonal)
        self._source, self._target = source.shape, target.shape
        self._order, self._outside = order, outside
        self.rows_at_once = max(1, _SLAB_VOXELS // (target.shape[1] * target.shape[2]))

    def needed_rows(self) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """Per target row, the first and the last source row that its voxels depend on."""
        _, h, w = self._target
        ends = [
            self._matrix[0, 1] * y + self._matrix[0, 2] * x for y in (0, h - 1) for x in (0, w - 1)
        ]
        rows = self._matrix[0, 0] * np.arange(self._target[0]) + self._offset[0]
        last = self._source[0] - 1
        # Wider by more than rounding can move a coordinate.
        low = np.floor(rows + min(ends) - _ROUNDING).astype(np.int64)
        high = np.floor(rows + max(ends) + _ROUNDING).astype(np.int64) + 1
        return np.clip(low, 0, last), np.clip(high, 0, last)

    def fill(
        self, out: npt.NDArray[Any], begin: int, end: int, source: npt.NDArray[Any], first: int
    ) -> None:
        """Writes rows `begin` .. `end` of the target to `out`, which holds just these, from a
        source that begins at row `first`."""
        shape = (end - begin, *self._target[1:])
        offset = self._matrix @ np.array([begin, 0, 0]) + self._offset
        unseen = None
        if self._outside is not None:
            unseen = _outside(self._matrix, offset, shape, self._source)
        rounded = source.dtype.kind in "iub" and self._order > 0
        converted = rounded or source.dtype == np.float16
        if converted:  # of the source, only what these rows need is converted
            low, high = (needed[begin:end] for needed in self.needed_rows())
            start = int(low.min())
            source = source[..., start - first : int(high.max()) + 1 - first, :, :]
            first = start
        offset = offset - np.array([first, 0, 0])
        for channel in np.ndindex(*source.shape[:-3]):
            part = _interpolate(
                source[channel], self._matrix, offset, shape, self._order,
                aligned=self._aligned, rounded=rounded,
            )  # fmt: skip
            if unseen is not None:
                part[unseen] = self._outside
            out[channel] = part


def _interpolate(
    source: npt.NDArray[Any],
    matrix: npt.NDArray[np.float64],
    offset: npt.NDArray[np.float64],
    shape: tuple[int, ...],
    order: int,
    *,
    aligned: bool,
    rounded: bool,
) -> npt.NDArray[Any]:
    computed: type = source.dtype.type
    if rounded or source.dtype == np.float16:
        computed = np.float32 if source.dtype.itemsize <= 2 else np.float64
    result = ndimage.affine_transform(
        source.astype(computed, copy=False),
        # scipy takes a much faster separable path for a diagonal given as a vector.
        np.diag(matrix) if aligned else matrix,
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
    unseen = np.zeros(shape, dtype=np.bool_)
    for row in range(3):
        index = np.full((1, 1, 1), offset[row])
        for axis in range(3):
            if to_source[row, axis] != 0:  # else the test needs no full-size array
                along = np.arange(shape[axis], dtype=np.float64).reshape(
                    [-1 if a == axis else 1 for a in range(3)]
                )
                index = index + to_source[row, axis] * along
        unseen |= (index < -0.5 - 1e-6) | (index > source_shape[row] - 0.5 + 1e-6)
    return unseen
