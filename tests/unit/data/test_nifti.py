"""Files in every orientation come back in the right place, and bad files are refused by name."""

from __future__ import annotations

import gzip
import hashlib
import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pipeline.data import nifti
from pipeline.data.nifti import (
    NiftiVolume,
    read_grid,
    read_header,
    read_image,
    read_label,
    write_image,
)
from pipeline.data.nifti import write_like as write_like_file
from pipeline.data.volume import Grid, Volume
from pipeline.errors import GeometryError
from tests.tiny import file_limit

Array = npt.NDArray[Any]
Reader = Callable[[Path], NiftiVolume]

SHAPE_XYZ = (4, 5, 6)
SPACING_XYZ = (1.5, 2.0, 3.0)
ORIGIN = (-7.0, 11.0, -13.0)
ORIENTATIONS = [
    "".join(code)
    for axes in itertools.permutations(("LR", "PA", "IS"))
    for code in itertools.product(*axes)
]
BOTH_READERS = pytest.mark.parametrize("read", [read_image, read_label])


def ramp() -> Array:
    """A file-ordered (x, y, z) array in which every voxel has its own value."""
    return np.arange(np.prod(SHAPE_XYZ), dtype=np.int16).reshape(SHAPE_XYZ)


def affine_of(code: str, spacing: tuple[float, ...] = SPACING_XYZ) -> Array:
    """An affine whose voxel axes point along the code's directions."""
    start = nib.orientations.axcodes2ornt("RAS")
    to_ras = nib.orientations.ornt_transform(nib.orientations.axcodes2ornt(code), start)
    affine = np.zeros((4, 4))
    for axis, (world, direction) in enumerate(to_ras):
        affine[int(world), axis] = direction * spacing[axis]
    affine[:, 3] = (*ORIGIN, 1)
    return affine


def oblique() -> Array:
    """Turned by 25 degrees about z and 10 about x, and stored as LPS."""
    a, b = np.deg2rad(25), np.deg2rad(10)
    about_z = np.array([[np.cos(a), -np.sin(a), 0], [np.sin(a), np.cos(a), 0], [0, 0, 1]])
    about_x = np.array([[1, 0, 0], [0, np.cos(b), -np.sin(b)], [0, np.sin(b), np.cos(b)]])
    affine = affine_of("LPS")
    affine[:3, :3] = about_z @ about_x @ affine[:3, :3]
    return affine


def save(path: Path, array: Array, affine: Array | None = None) -> Path:
    nib.save(nib.Nifti1Image(array, np.eye(4) if affine is None else affine), path)
    return path


def value_by_world(array: Array, affine: Array) -> dict[tuple[float, ...], float]:
    """World point (x, y, z in mm, rounded) -> voxel value, of a file-ordered array."""
    index = np.stack(np.meshgrid(*map(np.arange, array.shape), indexing="ij"), axis=-1)
    points = index.reshape(-1, 3) @ affine[:3, :3].T + affine[:3, 3]
    rounded = np.round(points, 3) + 0.0
    return dict(zip(map(tuple, rounded.tolist()), array.ravel().tolist(), strict=True))


def world_of(volume: Volume) -> dict[tuple[float, ...], float]:
    """The same of a volume in (z, y, x) order, through its own grid."""
    index = np.stack(np.meshgrid(*map(np.arange, volume.grid.shape), indexing="ij"), axis=-1)
    matrix = volume.grid.matrix
    points = index.reshape(-1, 3) @ matrix[:3, :3].T + matrix[:3, 3]
    rounded = np.round(points[:, ::-1], 3) + 0.0
    return dict(zip(map(tuple, rounded.tolist()), volume.array.ravel().tolist(), strict=True))


@pytest.mark.parametrize("code", ORIENTATIONS)
def test_every_orientation_is_read_to_the_right_place_and_written_back(
    code: str, tmp_path: Path
) -> None:
    array, affine = ramp(), affine_of(code)
    path = save(tmp_path / "in.nii", array, affine)
    read = read_image(path)
    grid = read.volume.grid
    # z, y, x grow towards superior, anterior, right.
    np.testing.assert_array_equal(grid.matrix[:3, :3], np.diag(grid.spacing_mm))
    assert world_of(read.volume) == value_by_world(array, affine)
    assert read.file_shape == SHAPE_XYZ
    np.testing.assert_allclose(read.file_affine, affine)
    assert read_grid(path) == grid
    # The order of the file, slowest axis first, can be had again without the file.
    assert read.volume.stored.code == code
    as_stored = read.volume.stored.apply(read.volume)
    np.testing.assert_array_equal(as_stored.array, array.transpose(2, 1, 0))

    write_like_file(tmp_path / "like.nii", read.volume, path)
    write_image(tmp_path / "image.nii", read.volume, affine_xyz=affine)
    for name in ("like.nii", "image.nii"):
        back: Any = nib.load(tmp_path / name)
        np.testing.assert_array_equal(np.asarray(back.dataobj), array)
        np.testing.assert_allclose(back.affine, affine)
        assert "".join(nib.aff2axcodes(back.affine)) == code


@pytest.mark.parametrize("code", [*ORIENTATIONS[::7], "oblique"])
@pytest.mark.parametrize("shear", [0.0, 25.0])
def test_an_oblique_affine_is_kept(code: str, shear: float, tmp_path: Path) -> None:
    array, affine = ramp(), oblique() if code == "oblique" else affine_of(code)
    # What stood along z leans towards y, as under a tilted gantry; its length stays.
    lean = np.eye(4)
    lean[1:3, 2] = np.sin(np.radians(shear)), np.cos(np.radians(shear))
    affine = lean @ affine
    path = save(tmp_path / "in.nii.gz", array, affine)
    read = read_image(path)
    stored = nib.load(path).affine
    assert world_of(read.volume) == value_by_world(array, stored)
    if code == "oblique" and not shear:
        assert read.volume.spacing_mm == pytest.approx(SPACING_XYZ[::-1])
    assert read.volume.grid.is_sheared == bool(shear)
    assert read_grid(path) == read.volume.grid
    write_like_file(tmp_path / "like.nii.gz", read.volume, path)
    back: Any = nib.load(tmp_path / "like.nii.gz")
    np.testing.assert_array_equal(np.asarray(back.dataobj), array)
    np.testing.assert_array_equal(back.affine, stored)
    write_image(tmp_path / "ras.nii.gz", read.volume)
    again = read_image(tmp_path / "ras.nii.gz").volume
    np.testing.assert_array_equal(again.array, read.volume.array)
    assert again.grid.largest_corner_distance_mm(read.volume.grid) < 1e-4


@pytest.mark.parametrize("kind", [nib.Nifti1Image, nib.Nifti2Image])
@pytest.mark.parametrize("endianness", ["<", ">"])
@pytest.mark.parametrize("name", ["a.nii", "a.nii.gz"])
def test_the_geometry_of_a_file_is_preserved_exactly(
    kind: Any, endianness: str, name: str, tmp_path: Path
) -> None:
    header = kind.header_class(endianness=endianness)
    source = kind(ramp(), None, header)
    source.set_sform(oblique(), code=1)
    source.set_qform(affine_of("LPS"), code=4)
    source.header.set_xyzt_units("mm", "sec")
    path = tmp_path / name
    path.write_bytes(gzip.compress(source.to_bytes()) if name.endswith("gz") else source.to_bytes())
    read = read_image(path)
    label = Volume((read.volume.array % 3).astype(np.uint8), read.volume.grid)
    write_like_file(tmp_path / f"out_{name}", label, path, names={1: "liver"})
    before: Any = nib.load(path)
    after: Any = nib.load(tmp_path / f"out_{name}")
    assert type(after) is type(before)
    assert after.shape == before.shape
    assert after.get_data_dtype() == np.uint8
    assert after.header.get_slope_inter() in ((None, None), (1.0, 0.0))
    np.testing.assert_array_equal(np.asarray(after.dataobj), ramp() % 3)
    for field in ("sform_code", "qform_code", "srow_x", "srow_y", "srow_z", "pixdim"):
        np.testing.assert_array_equal(after.header[field], before.header[field])
    for field in ("quatern_b", "quatern_c", "quatern_d", "qoffset_x", "xyzt_units"):
        np.testing.assert_array_equal(after.header[field], before.header[field])


def test_scaling_and_extensions_of_the_source_are_not_inherited(tmp_path: Path) -> None:
    source = nib.Nifti1Image(ramp(), affine_of("RAS"))
    source.header.set_slope_inter(2.0, -1024.0)
    source.header["cal_max"] = 99
    source.header.extensions.append(nib.nifti1.Nifti1Extension("comment", b"name of a patient"))
    nib.save(source, tmp_path / "a.nii")
    read = read_image(tmp_path / "a.nii")
    np.testing.assert_array_equal(read.volume.array.transpose(2, 1, 0), 2 * ramp() - 1024)
    label = Volume(np.full(read.volume.grid.shape, 3, dtype=np.uint8), read.volume.grid)
    write_like_file(tmp_path / "b.nii", label, tmp_path / "a.nii")
    after: Any = nib.load(tmp_path / "b.nii")
    assert np.unique(np.asarray(after.dataobj)).tolist() == [3]
    assert float(after.header["cal_max"]) == 0
    assert len(after.header.extensions) == 0
    assert b"patient" not in (tmp_path / "b.nii").read_bytes()


@pytest.mark.parametrize("name", ["a.nii", "a.nii.gz"])
def test_organ_names_stand_in_the_header_extension(name: str, tmp_path: Path) -> None:
    path = save(tmp_path / f"in_{name}", ramp(), affine_of("LAS"))
    volume = read_image(path).volume
    names = {1: "liver", 12: "left kidney"}
    write_like_file(tmp_path / name, volume, path, names=names)
    _, extension = nib.load(tmp_path / name).header.extensions
    assert extension.get_code() == 6
    text = extension.get_content()
    content = json.loads(text if isinstance(text, str) else text.decode())
    assert content == {"labels": {"1": "liver", "12": "left kidney"}}
    again = read_image(tmp_path / name)
    np.testing.assert_array_equal(again.volume.array, volume.array)
    assert again.names == (names, names)
    assert read_image(path).names == ()


def test_a_trailing_axis_of_one_is_no_fourth_dimension(tmp_path: Path) -> None:
    path = save(tmp_path / "a.nii", ramp()[..., None], affine_of("LPS"))
    read = read_image(path)
    assert read.volume.grid.shape == SHAPE_XYZ[::-1]
    write_like_file(tmp_path / "b.nii", read.volume, path)
    np.testing.assert_array_equal(np.asarray(nib.load(tmp_path / "b.nii").dataobj), ramp())


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_fractional_hounsfield_units_are_rounded_to_the_nearest(dtype: Any, tmp_path: Path) -> None:
    array = np.zeros((2, 2, 2), dtype=dtype)
    array[0, 0] = -1000.4, 40.6
    array[1, 1] = -0.6, 32767.4
    read = read_image(save(tmp_path / "a.nii", array)).volume.array
    assert read.dtype == np.int16
    expected = [-1000, 41, -1, 32767]
    assert [*read[:, 0, 0].tolist(), *read[:, 1, 1].tolist()] == expected


@pytest.mark.parametrize("dtype", [np.uint8, np.int16, np.uint16, np.int32, np.float32, np.float64])
def test_labels_of_any_dtype_are_whole_numbers(dtype: Any, tmp_path: Path) -> None:
    top = 255 if dtype == np.uint8 else 32767 if dtype == np.int16 else 65535
    array = np.zeros((2, 3, 4), dtype=dtype)
    array[1, 2, 3] = top
    read = read_label(save(tmp_path / "a.nii", array)).volume.array
    assert read.dtype == np.uint16
    assert read[3, 2, 1] == top
    assert np.count_nonzero(read) == 1


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_labels_next_to_whole_numbers_are_taken_with_a_note(dtype: Any, tmp_path: Path) -> None:
    array = np.zeros((2, 3, 4), dtype=dtype)
    array[0, 0] = 2.9996, -0.0004, 1, 0
    read = read_label(save(tmp_path / "a.nii", array, affine_of("LPS")))
    assert read.volume.array.dtype == np.uint16
    assert sorted(np.unique(read.volume.array)) == [0, 1, 3]
    assert read.note.startswith("label values lie up to 0.0004 from whole numbers")
    assert "rounded (tolerance 0.001)" in read.note
    assert read_label(save(tmp_path / "b.nii", np.rint(array))).note == ""


def test_a_slope_that_a_library_chose_is_taken_out_again(tmp_path: Path) -> None:
    """Integers in storage, numbers next to integers after scaling."""
    image = nib.Nifti1Image((ramp() % 5 * 51).astype(np.uint8), np.eye(4))
    image.header.set_slope_inter(1 / 51, 1e-6)
    path = tmp_path / "a.nii"
    path.write_bytes(image.to_bytes())
    read = read_label(path)
    np.testing.assert_array_equal(read.volume.array, (ramp() % 5).T)
    assert "from whole numbers and were rounded" in read.note


def test_labels_further_off_are_refused_with_the_worst_voxel(tmp_path: Path) -> None:
    array = np.zeros((3, 4, 5), dtype=np.float32)
    array[0, 0, 0], array[2, 1, 4] = 1.002, 3.75
    path = save(tmp_path / "a.nii", array, affine_of("LPS"))
    refuses(read_label, path, "is 3.75, at voxel (2, 1, 4) (x, y, z in the file, from 0)")
    array[2, 1, 4] = -3
    array[0, 0, 0] = 7
    refuses(read_label, save(path, array), "they run from -3 to 7")


def test_the_hash_is_of_the_files_bytes(tmp_path: Path) -> None:
    path = save(tmp_path / "a.nii.gz", ramp())
    assert read_image(path).sha256 == hashlib.sha256(path.read_bytes()).hexdigest()


def test_gzip_under_a_plain_name_is_read(tmp_path: Path) -> None:
    path = tmp_path / "a.nii"
    path.write_bytes(gzip.compress(nib.Nifti1Image(ramp(), np.eye(4)).to_bytes()))
    read = read_image(path)
    write_like_file(tmp_path / "b.nii", read.volume, path)
    np.testing.assert_array_equal(np.asarray(nib.load(tmp_path / "b.nii").dataobj), ramp())


def refuses(read: Callable[[Path], object], path: Path, *says: str) -> None:
    with pytest.raises(GeometryError) as caught:
        read(path)
    message = str(caught.value)
    assert message.startswith(f"{path}: ")
    for part in says:
        assert part in message
    assert caught.value.fix
    assert caught.value.exit_code == 2


@BOTH_READERS
@pytest.mark.parametrize("kept", [0, 1, 10, 100, 1000, -1])
def test_a_truncated_gzip_file(read: Reader, kept: int, tmp_path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 100, (10, 10, 10)).astype(np.int16)
    path = save(tmp_path / "a.nii.gz", noise)
    path.write_bytes(path.read_bytes()[:kept])
    refuses(read, path, "not a readable NIfTI file", "truncated")


@BOTH_READERS
@pytest.mark.parametrize("kept", [0, 100, 348, 400, -1])
def test_a_truncated_plain_file(read: Reader, kept: int, tmp_path: Path) -> None:
    path = save(tmp_path / "a.nii", ramp())
    path.write_bytes(path.read_bytes()[:kept])
    refuses(read, path, "not a readable NIfTI file", "truncated")


def test_a_flipped_bit_anywhere_in_a_gzip_file_is_found_or_changes_nothing(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    noise = rng.integers(-1000, 1000, (12, 11, 10)).astype(np.int16)
    path = save(tmp_path / "a.nii.gz", noise)
    data, right = path.read_bytes(), read_image(path).volume.array
    found = 0
    for at in rng.integers(0, len(data), 300):
        damaged = bytearray(data)
        damaged[at] ^= 1 << int(rng.integers(8))
        path.write_bytes(damaged)
        try:
            np.testing.assert_array_equal(read_image(path).volume.array, right)
        except GeometryError:
            found += 1
    assert found > 290  # the rest: the name and the time in gzip's header


@pytest.mark.parametrize(
    ("behind", "readable"), [(b"\0" * 12, True), (b"rubbish", False), ("again", True)]
)
def test_what_stands_behind_the_gzip_stream(
    behind: bytes | str, readable: bool, tmp_path: Path
) -> None:
    """As Python's gzip has it: zeros are padding, another member is more content, else an error."""
    path = save(tmp_path / "a.nii.gz", ramp())
    right, data = read_image(path).volume.array, path.read_bytes()
    path.write_bytes(data + (data if isinstance(behind, str) else behind))
    if readable:
        np.testing.assert_array_equal(read_image(path).volume.array, right)
    else:
        refuses(read_image, path, "not a readable NIfTI file")


@pytest.mark.parametrize("rows", [1, 3, 1000])
def test_rescaled_voxels_are_read_slab_by_slab(
    rows: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A CT stored with a slope is float64 when it is scaled: never all of it at once."""
    image = nib.Nifti1Image(ramp(), np.diag([-1.0, 2.0, 3.0, 1.0]))
    image.header.set_slope_inter(0.7, -3.3)
    path = tmp_path / "a.nii.gz"
    path.write_bytes(gzip.compress(image.to_bytes()))
    expected = np.rint(np.asarray(nib.as_closest_canonical(nib.load(path)).dataobj)).T
    monkeypatch.setattr(nifti, "_SLAB_VOXELS", rows * ramp().shape[0] * ramp().shape[1])
    np.testing.assert_array_equal(read_image(path).volume.array, expected)


@pytest.mark.parametrize("read", [read_image, read_label, read_grid])
def test_a_file_that_is_not_gzip_though_its_name_says_so(
    read: Callable[[Path], object], tmp_path: Path
) -> None:
    path = tmp_path / "a.nii.gz"
    path.write_bytes(nib.Nifti1Image(ramp(), np.eye(4)).to_bytes())
    refuses(read, path, "not a readable NIfTI file", "not gzip")


@pytest.mark.parametrize("read", [read_image, read_label, read_grid])
def test_a_file_that_is_something_else(read: Callable[[Path], object], tmp_path: Path) -> None:
    path = tmp_path / "a.nii"
    path.write_bytes(b"DICM" * 1000)
    refuses(read, path, "not a readable NIfTI file")


@pytest.mark.parametrize("read", [read_image, read_label, read_grid])
def test_an_absent_file_and_a_folder(read: Callable[[Path], object], tmp_path: Path) -> None:
    refuses(read, tmp_path / "absent.nii.gz")
    refuses(read, tmp_path)


@pytest.mark.parametrize("read", [read_image, read_label, read_grid])
@pytest.mark.parametrize(
    "shape", [(5,), (5, 1), (1, 5, 1), (1, 1, 1), (4, 5, 6, 2), (4, 5, 6, 1, 3)]
)
def test_rows_and_four_dimensions(
    read: Callable[[Path], object], shape: tuple[int, ...], tmp_path: Path
) -> None:
    path = save(tmp_path / "a.nii", np.zeros(shape, dtype=np.int16))
    shape = (*shape, 1, 1)[: max(3, len(shape))]
    refuses(read, path, "expected one volume or one slice", str(shape), "4D")


@pytest.mark.parametrize("code", ["RAS", "LPS", "PIR"])
@pytest.mark.parametrize("shape", [(5, 6), (5, 6, 1), (1, 5, 6), (5, 1, 6), (5, 6, 1, 1)])
def test_one_slice_is_read_and_written_back(
    shape: tuple[int, ...], code: str, tmp_path: Path
) -> None:
    """A 2D file is one slice of its third axis, and a label map of it is a 2D file again."""
    array = np.arange(30, dtype=np.int16).reshape(shape)
    path = save(tmp_path / "a.nii", array, affine_of(code))
    spatial = (*shape, 1)[:3]
    volume = read_image(path).volume
    assert volume.grid.slice_axis is not None
    assert volume.grid == read_grid(path) == read_label(path).volume.grid
    assert world_of(volume) == value_by_world(array.reshape(spatial), affine_of(code))
    write_like_file(tmp_path / "b.nii", volume, path)
    back: Any = nib.load(tmp_path / "b.nii")
    assert back.shape == shape[:3]
    np.testing.assert_array_equal(np.asarray(back.dataobj), array.reshape(shape[:3]))
    np.testing.assert_array_equal(back.affine, affine_of(code))


def test_headers_of_2d_files_are_doubted_as_others_are(tmp_path: Path) -> None:
    image = nib.Nifti1Image(np.zeros((5, 6), np.int16), affine_of("RAS"))
    image.set_qform(affine_of("LPS"), code=1)
    nib.save(image, tmp_path / "a.nii")
    (doubt,) = read_image(tmp_path / "a.nii").doubts
    assert "sform and qform" in doubt.what


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_nan_and_infinity(value: float, tmp_path: Path) -> None:
    array = np.zeros((3, 3, 3), dtype=np.float32)
    array[1, 2] = value
    path = save(tmp_path / "a.nii", array)
    refuses(read_image, path, "3 voxels are NaN or infinite", "-1024")
    refuses(read_label, path, "not whole numbers")


@pytest.mark.parametrize("value", [-40000.0, 40000.0, 1e30])
def test_values_that_are_no_hounsfield_units(value: float, tmp_path: Path) -> None:
    array = np.zeros((3, 3, 3), dtype=np.float32)
    array[0, 0, 0] = value
    refuses(read_image, save(tmp_path / "a.nii", array), "not Hounsfield units", "rescale slope")


@pytest.mark.parametrize("value", [0.5, -1.0, 65536.0])
def test_values_that_are_no_labels(value: float, tmp_path: Path) -> None:
    array = np.ones((3, 3, 3), dtype=np.float32)
    array[0, 0, 0] = value
    refuses(read_label, save(tmp_path / "a.nii", array), "not whole numbers from 0 to 65535")


@BOTH_READERS
def test_colour_and_complex_voxels(read: Reader, tmp_path: Path) -> None:
    colour = np.zeros((3, 3, 3), dtype=[("R", "u1"), ("G", "u1"), ("B", "u1")])
    refuses(read, save(tmp_path / "rgb.nii", colour), "not one real number")
    wave = np.zeros((3, 3, 3), dtype=np.complex64)
    refuses(read, save(tmp_path / "complex.nii", wave), "not one real number")


@pytest.mark.parametrize("read", [read_image, read_label, read_grid, read_header])
@pytest.mark.parametrize("kind", [nib.Nifti1Image, nib.Nifti2Image])
@pytest.mark.parametrize("code", [0, 1])
def test_a_file_without_voxel_size(
    read: Callable[[Path], object], kind: Any, code: int, tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    """nibabel would take it for 1 mm, by a qform too."""
    data = bytearray(kind(ramp(), affine_of("RAS")).to_bytes())
    header = np.frombuffer(data, dtype=kind.header_class.template_dtype, count=1)
    header["sform_code"], header["qform_code"] = 0, code
    path = tmp_path / "a.nii"
    path.write_bytes(data)
    read(path)  # the size alone is said: `check` doubts it
    header["pixdim"][0, 2:4] = 0
    path.write_bytes(data)
    with pytest.raises(GeometryError) as caught:
        read(path)
    assert str(caught.value) == (
        f"{path}: the header has no voxel size (pixdim is 1.5, 0, 0). Write the file again with "
        "its spacing and orientation."
    )
    assert not caplog.records
    header["sform_code"] = 1  # then it alone counts
    path.write_bytes(data)
    read(path)


@pytest.mark.parametrize("read", [read_image, read_label, read_grid])
@pytest.mark.parametrize("what", ["zero", "flat", "nan", "infinite", "huge"])
def test_an_affine_that_is_not_invertible(
    read: Callable[[Path], object], what: str, tmp_path: Path
) -> None:
    image = nib.Nifti1Image(np.zeros((3, 3, 3), dtype=np.int16), np.eye(4))
    rows = {
        "zero": [0, 0, 0, 0],
        "flat": [1, 0, 0, 0],
        "nan": [np.nan, 0, 0, 0],
        "infinite": [0, 0, np.inf, 0],
        "huge": [1e18, 0, 1, 0],
    }
    image.header["srow_z"] = rows[what]
    path = tmp_path / "a.nii"
    header = image.header.binaryblock
    path.write_bytes(header + bytes(4) + bytes(3 * 3 * 3 * 2))
    refuses(read, path, "the affine is not invertible", "spacing and orientation")


@settings(
    deadline=None,
    max_examples=100,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(
    changes=st.lists(
        st.tuples(st.integers(0, 351), st.integers(0, 255)), min_size=1, max_size=6, unique=True
    )
)
def test_whatever_a_damaged_header_says_it_is_a_volume_or_a_clear_error(
    changes: list[tuple[int, int]], tmp_path: Path
) -> None:
    data = bytearray(nib.Nifti1Image(np.ones((2, 3, 4), np.uint8), affine_of("LPS")).to_bytes())
    for position, value in changes:
        data[position] = value
    path = tmp_path / "a.nii"
    path.write_bytes(data)
    readers: list[Reader] = [read_image, read_label]
    for read in readers:
        try:
            volume = read(path).volume
        except GeometryError as error:
            says = str(error)
        else:
            says = f"{path}: {volume.array.shape}"
            assert np.isfinite(volume.grid.matrix).all()
            assert volume.array.shape == volume.grid.shape
        assert says.startswith(f"{path}: ")


def left_in(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.rglob("*") if p.is_file())


@pytest.mark.parametrize("name", ["out.nii", "out.nii.gz", "in.nii"])
def test_a_write_that_fails_leaves_what_was_there(name: str, tmp_path: Path) -> None:
    source = save(tmp_path / "in.nii", ramp(), affine_of("LPS"))
    before = source.read_bytes()
    volume = read_image(source).volume
    for write in (
        lambda path: write_like_file(path, volume, source),
        lambda path: write_image(path, volume),
    ):
        with file_limit(100), pytest.raises(OSError, match="File too large"):
            write(tmp_path / name)
    assert left_in(tmp_path) == ["in.nii"]
    assert source.read_bytes() == before


def test_writing_like_a_file_that_cannot_be_read(tmp_path: Path) -> None:
    volume = Volume(np.zeros((3, 3, 3), np.uint8), Grid.axis_aligned((3, 3, 3), (1, 1, 1)))
    (tmp_path / "bad.nii.gz").write_bytes(b"bad")
    for like in (tmp_path / "absent.nii", tmp_path / "bad.nii.gz"):
        refuses(lambda path: write_like_file(tmp_path / "out.nii", volume, path), like)
    assert left_in(tmp_path) == ["bad.nii.gz"]


def test_a_mask_is_written_as_zero_and_one(tmp_path: Path) -> None:
    mask = np.zeros((3, 4, 5), dtype=np.bool_)
    mask[1, 2, 3] = True
    write_image(tmp_path / "a.nii.gz", Volume(mask, Grid.axis_aligned((3, 4, 5), (1, 1, 1))))
    label = read_label(tmp_path / "a.nii.gz").volume.array
    np.testing.assert_array_equal(label, mask.astype(np.uint16))
    assert nib.load(tmp_path / "a.nii.gz").get_data_dtype() == np.uint8
