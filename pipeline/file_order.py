"""Arrays as NIfTI files and MONAI hold them: axes i, j, k, and an affine to (right, anterior,
superior) mm, in whatever orientation. `pipeline.volume` says what this project's own order is.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
from nibabel.orientations import io_orientation

from pipeline.volume import Grid, Orientation, Volume

_REVERSED = np.ix_([2, 1, 0, 3], [2, 1, 0, 3])


def as_file_array(
    volume: Volume, orientation: Orientation
) -> tuple[npt.NDArray[Any], npt.NDArray[np.float64]]:
    """A volume -> what a file in that orientation holds.

    Args:
        volume: (D, H, W) in RAS+.
        orientation: how the file keeps its axes.

    Returns:
        The array along i, j, k, as a view, and the 4 x 4 affine of its voxels.
    """
    turned = orientation.apply(volume)
    return turned.array.transpose(2, 1, 0), turned.grid.matrix[_REVERSED]


def from_file_array(array: npt.NDArray[Any], affine: npt.ArrayLike) -> Volume:
    """The inverse of `as_file_array`, for any affine.

    Args:
        array: (.., i, j, k); leading axes are channels.
        affine: 4 x 4, of its voxels.

    Returns:
        The same voxels at the same places, axes in the order nearest to this project's, as a view.
    """
    matrix = np.asarray(affine, dtype=np.float64)
    reversed_axes = np.swapaxes(array, -1, -3)
    kept = Volume(reversed_axes, Grid.from_matrix(reversed_axes.shape[-3:], matrix[_REVERSED]))
    return orientation_of(matrix).undo(kept)


def orientation_of(affine: npt.NDArray[np.float64]) -> Orientation:
    """How a file with this affine keeps its axes, slowest (k) first, which is how its voxels follow
    one another."""
    (i, turn_i), (j, turn_j), (k, turn_k) = io_orientation(affine).tolist()
    return Orientation(
        (2 - int(k), 2 - int(j), 2 - int(i)), (turn_k == -1, turn_j == -1, turn_i == -1)
    )
