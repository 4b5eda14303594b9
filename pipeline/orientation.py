"""Arrays whose axes point elsewhere than this project's: as other tools store and want them.

An orientation names, axis by axis, the direction in which an index grows: R or L (right, left),
A or P (anterior, posterior), S or I (superior, inferior), as nibabel and MONAI do. This project's
own order z, y, x is "SAR"; most MONAI networks were trained on "RAS".
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from nibabel.orientations import (
    apply_orientation,
    axcodes2ornt,
    inv_ornt_aff,
    io_orientation,
    ornt_transform,
)

from pipeline.volume import Grid, Index3, Volume

OURS = "SAR"
_PAIRS = ({"R", "L"}, {"A", "P"}, {"S", "I"})


def is_orientation(code: str) -> bool:
    """Whether a text names each of the three directions once."""
    return len(code) == 3 and all(len(pair & set(code)) == 1 for pair in _PAIRS)


def to_orientation(array: npt.NDArray[Any], code: str) -> npt.NDArray[Any]:
    """(.., D, H, W) in this project's order -> the same voxels in another; nothing is copied."""
    return _apply(array, OURS, code)


def from_orientation(array: npt.NDArray[Any], code: str) -> npt.NDArray[Any]:
    """The inverse of `to_orientation`."""
    return _apply(array, code, OURS)


def sizes_to(sizes: Sequence[int], code: str) -> Index3:
    """Three sizes along z, y, x -> along the axes of an orientation."""
    return _permute(sizes, OURS, code)


def sizes_from(sizes: Sequence[int], code: str) -> Index3:
    """The inverse of `sizes_to`."""
    return _permute(sizes, code, OURS)


def as_file_array(volume: Volume, code: str) -> tuple[npt.NDArray[Any], npt.NDArray[np.float64]]:
    """A volume -> what a NIfTI in that orientation holds.

    Args:
        volume: (D, H, W) in RAS+.
        code: directions of the file's axes.

    Returns:
        The array, and the 4 x 4 affine from its voxel indices to RAS+ mm (right, anterior,
        superior).
    """
    turn = ornt_transform(axcodes2ornt(OURS), axcodes2ornt(code))
    affine = volume.grid.matrix @ inv_ornt_aff(turn, volume.grid.shape)
    return apply_orientation(volume.array, turn), affine[[2, 1, 0, 3]]


def from_file_array(array: npt.NDArray[Any], affine: npt.ArrayLike) -> Volume:
    """The inverse of `as_file_array`, for any affine; leading axes are channels.

    Axes are put into the order nearest to this project's, so that no rotation is left that a flip
    or a transposition could have undone.
    """
    matrix = np.asarray(affine, dtype=np.float64)
    turn = ornt_transform(io_orientation(matrix), axcodes2ornt(OURS))
    shape = array.shape[-3:]
    turned = _turn(array, turn)
    ours = (matrix @ inv_ornt_aff(turn, shape))[[2, 1, 0, 3]]
    return Volume(turned, Grid.from_matrix(turned.shape[-3:], ours))


def _permute(sizes: Sequence[int], begin: str, end: str) -> Index3:
    turn = ornt_transform(axcodes2ornt(begin), axcodes2ornt(end))
    places = {int(axis): int(size) for axis, size in zip(turn[:, 0], sizes, strict=True)}
    return places[0], places[1], places[2]


def _apply(array: npt.NDArray[Any], begin: str, end: str) -> npt.NDArray[Any]:
    return _turn(array, ornt_transform(axcodes2ornt(begin), axcodes2ornt(end)))


def _turn(array: npt.NDArray[Any], turn: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """nibabel turns the first three axes; ours are the last three."""
    first = np.moveaxis(array, (-3, -2, -1), (0, 1, 2))
    return np.moveaxis(apply_orientation(first, turn), (0, 1, 2), (-3, -2, -1))
