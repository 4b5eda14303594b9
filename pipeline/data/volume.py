"""Volume = array + grid. Data and geometry travel together in one frozen object.

Legend, valid in every module of this project:
    array order (D, H, W) = z, y, x; spacing, shape, patch size and index tuples in that order too.
    World coordinates are millimetres along (superior, anterior, right): the z, y, x of NIfTI's
    RAS+ world. An affine maps homogeneous (z, y, x) voxel indices to that world.
    Only `pipeline.data.nifti` and the axes of files, below, know the (x, y, z) order.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any, Final

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]
Index3 = tuple[int, int, int]
Spacing = tuple[float, float, float]

# Directions in files are rounded. Axes that are nearer to right angles than this count as upright,
# which puts a distance wrong by less than a two-thousandth.
_UPRIGHT_DEGREES = 0.05
# Per axis z, y, x: the letter of its RAS+ direction, and of the other one.
_LETTERS = ("SI", "AP", "RL")


@dataclass(frozen=True)
class Grid:
    """Where voxels are: shape (D, H, W) and an affine from (z, y, x) indices to mm.

    Attributes:
        affine: 4 x 4, row by row, from voxel index (z, y, x, 1) to (superior, anterior, right, 1)
            in mm. Plain tuples, so that grids compare and hash by value.
    """

    shape: Index3
    affine: tuple[tuple[float, ...], ...]

    @classmethod
    def from_matrix(cls, shape: Sequence[int], matrix: npt.ArrayLike) -> Grid:
        """A grid from any 3-sequence and any 4 x 4 array-like."""
        rows = np.asarray(matrix, dtype=np.float64)
        if len(shape) != 3 or rows.shape != (4, 4):
            raise ValueError(f"a grid needs 3 sizes and a 4 x 4 affine, not {shape}, {rows.shape}")
        d, h, w = (int(n) for n in shape)
        return cls((d, h, w), tuple(tuple(float(v) for v in row) for row in rows))

    @classmethod
    def axis_aligned(
        cls,
        shape: Sequence[int],
        spacing_mm: Sequence[float],
        origin_mm: Sequence[float] = (0, 0, 0),
    ) -> Grid:
        """A grid without rotation whose voxel (0, 0, 0) lies at `origin_mm`."""
        matrix = np.diag([*spacing_mm, 1.0])
        matrix[:3, 3] = origin_mm
        return cls.from_matrix(shape, matrix)

    @property
    def matrix(self) -> npt.NDArray[np.float64]:
        """The affine as a float64 array of shape (4, 4)."""
        return np.array(self.affine, dtype=np.float64)

    @property
    def spacing_mm(self) -> Spacing:
        """Distance between neighbouring voxel centres along z, y, x."""
        z, y, x = np.linalg.norm(self.matrix[:3, :3], axis=0)
        return float(z), float(y), float(x)

    @property
    def slice_axis(self) -> int | None:
        """The axis along which there is one voxel, if it is the only one: the grid is one slice;
        None for a volume."""
        return self.shape.index(1) if self.shape.count(1) == 1 else None

    @property
    def voxel_ml(self) -> float:
        """Volume of one voxel in millilitres."""
        return float(abs(np.linalg.det(self.matrix[:3, :3]))) / 1000.0

    @property
    def shear_degrees(self) -> float:
        """By how much two of the axes miss a right angle, at most: 0 but for sheared grids, such as
        those of a CT with tilted gantry. Of a slice, the two in its plane: how the stack that it
        was taken from leant changes nothing in it."""
        unit = self.matrix[:3, :3] / self.spacing_mm
        if self.slice_axis is not None:
            unit = np.delete(unit, self.slice_axis, axis=1)
        cosines = np.abs(unit.T @ unit)[np.triu_indices(len(unit.T), 1)]
        return float(np.degrees(np.arcsin(min(1.0, cosines.max()))))

    @property
    def is_sheared(self) -> bool:
        """Whether spacing alone does not say how far apart two voxels are."""
        return self.shear_degrees > _UPRIGHT_DEGREES

    def with_spacing(self, spacing_mm: Sequence[float]) -> Grid:
        """The same field of view, same directions and centre, at another spacing.

        The shape is rounded to whole voxels; since the centre is kept, every new voxel centre lies
        inside the old field of view, so that nothing is extrapolated. One slice stays one, with its
        thickness: there is nothing to interpolate between.
        """
        old, new = np.array(self.spacing_mm), np.array(spacing_mm, dtype=np.float64)
        if self.slice_axis is not None:
            new[self.slice_axis] = old[self.slice_axis]
        size = np.array(self.shape)
        shape = np.maximum(1, np.rint(size * old / new)).astype(int)
        matrix = self.matrix
        centre = matrix[:3, :3] @ ((size - 1) / 2) + matrix[:3, 3]
        matrix[:3, :3] = matrix[:3, :3] / old * new
        matrix[:3, 3] = centre - matrix[:3, :3] @ ((shape - 1) / 2)
        return Grid.from_matrix(shape.tolist(), matrix)

    def coarsen(self, stride: Sequence[int]) -> Grid:
        """The grid of cells of `stride` voxels; cell 0 covers voxels 0 .. stride - 1."""
        step = np.asarray(stride, dtype=np.float64)
        matrix = self.matrix
        matrix[:3, 3] += matrix[:3, :3] @ ((step - 1) / 2)
        matrix[:3, :3] *= step
        return Grid.from_matrix(
            [-(-n // s) for n, s in zip(self.shape, stride, strict=True)], matrix
        )

    def crop(self, start: Sequence[int], shape: Sequence[int]) -> Grid:
        """The grid of the box that begins at voxel `start` (may be negative: padding)."""
        matrix = self.matrix
        matrix[:3, 3] += matrix[:3, :3] @ np.asarray(start, dtype=np.float64)
        return Grid.from_matrix(shape, matrix)

    def with_shape(self, shape: Sequence[int]) -> Grid:
        """The same field of view, edge to edge, cut into another number of voxels.

        Voxel i of n new ones along an axis of m old ones has its centre at
        `(i + 0.5) * m / n - 0.5`: what libraries call "align_corners=False".
        """
        ratio = np.array(self.shape) / np.asarray(shape, dtype=np.float64)
        matrix = self.matrix
        matrix[:3, 3] += matrix[:3, :3] @ ((ratio - 1) / 2)
        matrix[:3, :3] *= ratio
        return Grid.from_matrix(shape, matrix)

    def index_map_from(self, target: Grid) -> npt.NDArray[np.float64]:
        """4 x 4 matrix from the voxel indices of `target` to (fractional) indices of this grid."""
        return np.asarray(np.linalg.solve(self.matrix, target.matrix), dtype=np.float64)

    def largest_corner_distance_mm(self, other: Grid) -> float:
        """How far the corner voxels of two grids of one shape lie apart, at most, in mm."""
        ends = [(0, n - 1) for n in self.shape]
        corners = np.array([[*corner, 1] for corner in product(*ends)], dtype=np.float64).T
        apart = ((self.matrix - other.matrix) @ corners)[:3]
        return float(np.linalg.norm(apart, axis=0).max())

    def to_json(self) -> dict[str, Any]:
        """Plain lists and numbers, exact under `from_json`."""
        return {"shape": list(self.shape), "affine_zyx": [list(row) for row in self.affine]}

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Grid:
        """The inverse of `to_json`."""
        return cls.from_matrix(data["shape"], data["affine_zyx"])


@dataclass(frozen=True)
class Orientation:
    """How the axes of an array lie, seen from (z, y, x) in RAS+ order.

    Attributes:
        axes: for each axis of the array, which of z, y, x (0, 1, 2) it runs along.
        reversed: for each axis of the array, whether it runs towards inferior, posterior or left.
    """

    axes: Index3 = (0, 1, 2)
    reversed: tuple[bool, bool, bool] = (False, False, False)

    @classmethod
    def from_code(cls, code: str) -> Orientation:
        """From letters that say where the axes point to, the fastest axis first, as is usual:
        RAS is this project's own order, LPS that of DICOM.

        Raises:
            ValueError: not one letter of each of RL, AP and SI.
        """
        places = [next((n for n, pair in enumerate(_LETTERS) if s in pair), -1) for s in code]
        if sorted(places) != [0, 1, 2]:
            raise ValueError(f"{code!r} needs one letter of each of R or L, A or P, S or I")
        fast, middle, slow = places
        turned = [letter == _LETTERS[n][1] for n, letter in zip(places, code, strict=True)]
        return cls((slow, middle, fast), (turned[2], turned[1], turned[0]))

    @property
    def code(self) -> str:
        """The inverse of `from_code`."""
        pairs = zip(self.axes, self.reversed, strict=True)
        return "".join(_LETTERS[axis][turned] for axis, turned in pairs)[::-1]

    def apply(self, volume: Volume) -> Volume:
        """The same voxels (..., D, H, W) in RAS+ order, at the same places in mm, with their axes
        in this order, as a view."""
        lead = tuple(range(volume.array.ndim - 3))
        array = volume.array.transpose(*lead, *(len(lead) + axis for axis in self.axes))
        matrix = volume.grid.matrix
        matrix[:3, :3] = matrix[:3, list(self.axes)]
        turned = _turned(array, matrix, self.reversed)
        return Volume(turned, Grid.from_matrix(turned.shape[-3:], matrix))

    def undo(self, volume: Volume) -> Volume:
        """The inverse of `apply`: back to RAS+ order, as a view."""
        matrix = volume.grid.matrix
        turned = _turned(volume.array, matrix, self.reversed)
        back = [self.axes.index(axis) for axis in range(3)]
        lead = tuple(range(turned.ndim - 3))
        array = turned.transpose(*lead, *(len(lead) + axis for axis in back))
        matrix[:3, :3] = matrix[:3, back]
        return Volume(array, Grid.from_matrix(array.shape[-3:], matrix))


RAS = Orientation()


def _turned(
    array: Array, matrix: npt.NDArray[np.float64], turn: Sequence[bool]
) -> npt.NDArray[Any]:
    """Flips the marked of the last three axes, and changes the affine in place accordingly."""
    for axis, size in enumerate(array.shape[-3:]):
        if turn[axis]:
            matrix[:3, 3] += matrix[:3, axis] * (size - 1)
            matrix[:3, axis] *= -1
    z, y, x = (slice(None, None, -1 if turned else 1) for turned in turn)
    return array[..., z, y, x]


@dataclass(frozen=True)
class Volume:
    """An array whose last three axes are (D, H, W) on `grid`; leading axes are channels.

    Attributes:
        stored: how the file that it was read from keeps its axes, slowest first. The array itself
            is in RAS+ order whatever this says; only a network that was trained on arrays in the
            order of their files needs it.

    Raises:
        ValueError: the array does not fit the grid.
    """

    array: Array
    grid: Grid
    stored: Orientation = RAS

    def __post_init__(self) -> None:
        if self.array.shape[-3:] != self.grid.shape:
            raise ValueError(f"array {self.array.shape} does not fit grid {self.grid.shape}")

    @property
    def spacing_mm(self) -> Spacing:
        """Distance between neighbouring voxel centres along z, y, x."""
        return self.grid.spacing_mm


# Arrays as NIfTI files and MONAI hold them: axes i, j, k, and an affine to (right, anterior,
# superior) mm, in whatever orientation.

_REVERSED = np.ix_([2, 1, 0, 3], [2, 1, 0, 3])


def as_file_array(
    volume: Volume, orientation: Orientation
) -> tuple[npt.NDArray[Any], npt.NDArray[np.float64]]:
    """A volume (D, H, W) in RAS+ -> what a file in that orientation holds: the array along i, j, k,
    as a view, and the 4 x 4 affine of its voxels."""
    turned = orientation.apply(volume)
    return turned.array.transpose(2, 1, 0), turned.grid.matrix[_REVERSED]


def from_file_array(array: npt.NDArray[Any], affine: npt.ArrayLike) -> Volume:
    """The inverse of `as_file_array`, for any affine (4 x 4): (.., i, j, k), leading axes
    channels -> the same voxels at the same places, axes in the order nearest to this project's,
    as a view."""
    matrix = np.asarray(affine, dtype=np.float64)
    reversed_axes = np.swapaxes(array, -1, -3)
    kept = Volume(reversed_axes, Grid.from_matrix(reversed_axes.shape[-3:], matrix[_REVERSED]))
    return orientation_of(matrix).undo(kept)


def orientation_of(affine: npt.NDArray[np.float64]) -> Orientation:
    """How a file with this affine keeps its axes, slowest (k) first, which is how its voxels follow
    one another."""
    from nibabel.orientations import io_orientation

    (i, turn_i), (j, turn_j), (k, turn_k) = io_orientation(affine).tolist()
    return Orientation(
        (2 - int(k), 2 - int(j), 2 - int(i)), (turn_k == -1, turn_j == -1, turn_i == -1)
    )


# How many connected parts a mask has: an organ that falls apart is improbable.

# Parts are counted on voxels so far apart: a whole mask at full size is not kept for it.
COMPONENT_MM: Final = 6.0
# A part is large if it has this share of all of the mask.
LARGE_SHARE: Final = 0.1
TOUCHING: Final = np.ones((3, 3, 3), dtype=np.bool_)


def coarse(spacing_mm: Sequence[float]) -> tuple[slice, slice, slice]:
    """Every how manieth voxel along z, y, x is looked at."""
    z, y, x = (max(1, round(COMPONENT_MM / mm)) for mm in spacing_mm)
    return slice(None, None, z), slice(None, None, y), slice(None, None, x)


def large_components(mask: npt.NDArray[np.bool_]) -> int:
    """How many connected parts (26 neighbours) have a tenth of the mask (D, H, W) or more."""
    from scipy import ndimage

    parts: Any = ndimage.label(mask, structure=TOUCHING)[0]
    sizes = np.bincount(parts.ravel())[1:]
    return int(np.count_nonzero(sizes >= LARGE_SHARE * max(1, sizes.sum())))
