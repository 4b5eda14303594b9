"""Arrays in the order of files and of MONAI, held against nibabel and against our own reader."""

from __future__ import annotations

from itertools import permutations, product
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from pipeline.data.nifti import read_image
from pipeline.data.volume import Grid, Orientation, Volume, as_file_array, from_file_array

CODES = ["".join(c) for p in permutations(("RL", "AP", "SI")) for c in product(*p)]


def oblique() -> Volume:
    rng = np.random.default_rng(0)
    rotation, _ = np.linalg.qr(np.eye(3) + 0.1 * rng.normal(size=(3, 3)))
    matrix = np.eye(4)
    matrix[:3, :3] = rotation * np.sign(np.diag(rotation)) @ np.diag([3, 2, 1.5])
    matrix[:3, 3] = [5, 6, 7]
    array = rng.integers(-500, 500, (4, 5, 6)).astype(np.int16)
    return Volume(array, Grid.from_matrix(array.shape, matrix))


@pytest.mark.parametrize("code", CODES)
def test_a_file_written_so_is_read_back_and_has_that_orientation(tmp_path: Path, code: str) -> None:
    volume = oblique()
    array, affine = as_file_array(volume, Orientation.from_code(code))
    assert "".join(nib.aff2axcodes(affine)) == code
    back = from_file_array(array, affine)
    np.testing.assert_array_equal(back.array, volume.array)
    np.testing.assert_allclose(back.grid.matrix, volume.grid.matrix, atol=1e-12)
    nib.save(nib.Nifti1Image(array, affine), tmp_path / "image.nii")
    read = read_image(tmp_path / "image.nii").volume
    np.testing.assert_array_equal(read.array, volume.array)
    np.testing.assert_allclose(read.grid.matrix, volume.grid.matrix, atol=1e-5)
    assert read.stored.code == code


def test_channels_stay_in_front() -> None:
    volume = oblique()
    array, affine = as_file_array(volume, Orientation.from_code("LIP"))
    back = from_file_array(np.stack([array, -array]), affine)
    np.testing.assert_array_equal(back.array, np.stack([volume.array, -volume.array]))
