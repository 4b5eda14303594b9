"""Resampling against brute force through world coordinates."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from scipy import ndimage

from pipeline.data import resample as module
from pipeline.data.resample import SlabResampler, resample, same_grid
from pipeline.data.volume import Grid, Orientation, Volume

Array = npt.NDArray[Any]


def rotation(seed: int) -> Array:
    """A proper rotation, drawn by the seed."""
    q, _ = np.linalg.qr(np.random.default_rng(seed).normal(size=(3, 3)))
    return np.asarray(q * np.sign(np.linalg.det(q)))


def tilt(degrees: float) -> Array:
    """Directions of axes of which the first, z, leans towards y."""
    turn = np.eye(3)
    turn[:2, 0] = np.cos(np.radians(degrees)), np.sin(np.radians(degrees))
    return turn


def grid_of(
    shape: tuple[int, int, int],
    spacing: tuple[float, float, float],
    centre: tuple[float, float, float] = (0, 0, 0),
    turn: Array | None = None,
) -> Grid:
    """A grid with its middle at a world point."""
    matrix = np.eye(4)
    matrix[:3, :3] = (np.eye(3) if turn is None else turn) @ np.diag(spacing)
    matrix[:3, 3] = np.array(centre) - matrix[:3, :3] @ ((np.array(shape) - 1) / 2)
    return Grid.from_matrix(shape, matrix)


def source_indices(source: Grid, target: Grid) -> Array:
    """(3, D, H, W): where each target voxel lies in the source, by way of millimetres."""
    index = np.indices(target.shape).reshape(3, -1)
    world = target.matrix[:3, :3] @ index + target.matrix[:3, 3:]
    back = np.linalg.inv(source.matrix)
    return np.asarray(back[:3, :3] @ world + back[:3, 3:]).reshape(3, *target.shape)


SOURCE = grid_of((9, 10, 11), (3.0, 2.0, 1.5), (5, -3, 8))
TARGETS = {
    "finer": grid_of((20, 15, 18), (1.0, 1.1, 0.7), (5, -3, 8)),
    "coarser": grid_of((5, 4, 4), (5.0, 5.0, 4.0), (5, -3, 8)),
    "beyond": grid_of((20, 20, 20), (2.0, 2.5, 2.0), (9, 0, 2)),
    "mirrored": grid_of((9, 10, 11), (-3.1, 2.0, -1.4), (5, -3, 8)),
    "turned": grid_of((12, 13, 14), (2.0, 2.0, 1.6), (6, -4, 8), rotation(1)),
    "permuted": grid_of((12, 13, 14), (1.7, 2.0, 1.6), (6, -4, 8), np.eye(3)[[1, 2, 0]]),
    "far away": grid_of((3, 3, 3), (1, 1, 1), (500, 0, 0)),
    # A gantry tilted by 25 degrees, and one that leans along all axes.
    "sheared": grid_of((12, 13, 14), (2.0, 1.6, 1.3), (5, -3, 8), tilt(25)),
    "leaning": grid_of((12, 13, 14), (2.0, 1.6, 1.3), (6, -4, 8), rotation(2) @ tilt(-30).T),
}
EACH_TARGET = pytest.mark.parametrize("target", TARGETS.values(), ids=TARGETS)


def noise(shape: tuple[int, ...], dtype: Any = np.float32, seed: int = 0) -> Array:
    return np.random.default_rng(seed).normal(0, 100, shape).astype(dtype)


@pytest.fixture
def small_slabs(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Called with how many voxels a slab may have."""
    return lambda voxels: monkeypatch.setattr(module, "_SLAB_VOXELS", voxels)


def test_the_same_grid_is_the_identity() -> None:
    for dtype in (np.int16, np.float32, np.uint8):
        array = noise(SOURCE.shape).astype(dtype)
        for order in (0, 1):
            found = resample(Volume(array, SOURCE), SOURCE, order=order, outside=7)
            np.testing.assert_array_equal(found.array, array)
            assert found.array.dtype == dtype


def test_a_grid_is_the_same_within_a_tenth_of_a_micrometre() -> None:
    near = SOURCE.crop((0.00001, 0, 0), SOURCE.shape)  # type: ignore[arg-type]
    far = SOURCE.crop((0.001, 0, 0), SOURCE.shape)  # type: ignore[arg-type]
    assert same_grid(SOURCE, near)
    assert not same_grid(SOURCE, far)
    assert not same_grid(SOURCE, SOURCE.crop((0, 0, 0), (9, 10, 10)))


@EACH_TARGET
def test_linear_is_map_coordinates(target: Grid) -> None:
    array = noise(SOURCE.shape)
    found = resample(Volume(array, SOURCE), target, order=1)
    expected = ndimage.map_coordinates(
        array.astype(np.float64), source_indices(SOURCE, target), order=1, mode="nearest"
    )
    assert found.grid == target
    np.testing.assert_allclose(found.array, expected, rtol=1e-4, atol=1e-3)


@EACH_TARGET
def test_nearest_is_the_nearest_voxel(target: Grid) -> None:
    array = noise(SOURCE.shape)
    found = resample(Volume(array, SOURCE), target, order=0).array
    index = source_indices(SOURCE, target)
    limits = np.array(SOURCE.shape).reshape(3, 1, 1, 1) - 1
    nearest = np.clip(np.rint(index), 0, limits).astype(int)
    # Halfway between two voxels, either may be taken.
    clear = (np.abs(index - np.floor(index) - 0.5) > 1e-6).all(axis=0)
    np.testing.assert_array_equal(found[clear], array[tuple(nearest)][clear])


@pytest.mark.parametrize("target", [*TARGETS, "its own spacing"])
def test_a_sheared_source_is_resampled_by_places_in_mm(target: str) -> None:
    source = grid_of(SOURCE.shape, (3.0, 2.0, 1.5), (5, -3, 8), tilt(25))
    assert source.shear_degrees == pytest.approx(25)
    onto = TARGETS.get(target, source.with_spacing((2.0, 1.7, 1.9)))
    array = noise(SOURCE.shape)
    index = source_indices(source, onto)
    found = resample(Volume(array, source), onto, order=1, outside=float("nan")).array
    expected = ndimage.map_coordinates(array.astype(np.float64), index, order=1, mode="nearest")
    limits = np.array(SOURCE.shape).reshape(3, 1, 1, 1) - 0.5
    beyond = np.any((index < -0.5 - 1e-5) | (index > limits + 1e-5), axis=0)
    inside = np.all((index > -0.5 + 1e-5) & (index < limits - 1e-5), axis=0)
    assert np.isnan(found[beyond]).all()
    np.testing.assert_allclose(found[inside], expected[inside], rtol=1e-4, atol=1e-3)
    if target == "its own spacing":
        assert onto.shear_degrees == pytest.approx(25)
        assert not np.isnan(found).any()


@pytest.mark.parametrize("order", [0, 1])
def test_the_border_of_the_field_of_view_belongs_to_it(order: int) -> None:
    source = Grid.axis_aligned((4, 4, 4), (1, 1, 1))
    # Voxel centres at -1, -0.5, 0, .. along z: the second lies on the border itself.
    target = Grid.axis_aligned((11, 4, 4), (0.5, 1, 1), (-1, 0, 0))
    volume = Volume(np.ones((4, 4, 4), np.float32), source)
    found = resample(volume, target, order=order, outside=float("nan")).array[:, 0, 0]
    assert np.isnan(found).tolist() == [True, *[False] * 9, True]


@EACH_TARGET
@pytest.mark.parametrize("order", [0, 1])
@pytest.mark.parametrize("voxels", [1, 500])
def test_where_slabs_end_does_not_matter(
    target: Grid, order: int, voxels: int, small_slabs: Callable[[int], None]
) -> None:
    volume = Volume(noise((2, *SOURCE.shape)), SOURCE)
    whole = resample(volume, target, order=order, outside=float("nan")).array
    small_slabs(voxels)
    slabs = resample(volume, target, order=order, outside=float("nan")).array
    np.testing.assert_array_equal(np.isnan(slabs), np.isnan(whole))
    np.testing.assert_allclose(slabs, whole, rtol=1e-5, atol=1e-3)


@EACH_TARGET
def test_channels_are_resampled_each_for_itself(target: Grid) -> None:
    array = noise((2, 3, *SOURCE.shape))
    found = resample(Volume(array, SOURCE), target, order=1, outside=-1.0).array
    assert found.shape == (2, 3, *target.shape)
    for channel in np.ndindex(2, 3):
        one = resample(Volume(array[channel], SOURCE), target, order=1, outside=-1.0).array
        np.testing.assert_array_equal(found[channel], one)


@EACH_TARGET
@pytest.mark.parametrize("dtype", [np.int16, np.uint8, np.int32, np.bool_])
def test_integers_are_rounded_and_keep_their_dtype(target: Grid, dtype: Any) -> None:
    array = (noise(SOURCE.shape) % 251 > 100).astype(dtype)
    if dtype != np.bool_:
        array = (np.abs(noise(SOURCE.shape)) % 251).astype(dtype)
    exact = resample(Volume(array.astype(np.float64), SOURCE), target, order=1).array
    found = resample(Volume(array, SOURCE), target, order=1).array
    assert found.dtype == dtype
    clear = np.abs(exact - np.floor(exact) - 0.5) > 1e-3
    np.testing.assert_array_equal(found[clear], np.rint(exact)[clear].astype(dtype))


def test_extremes_of_int16_do_not_wrap_round() -> None:
    array = np.full(SOURCE.shape, 32767, dtype=np.int16)
    array[5:] = -32768
    found = resample(Volume(array, SOURCE), TARGETS["finer"], order=1).array
    assert (found.min(), found.max()) == (-32768, 32767)


def test_half_precision_is_resampled_too() -> None:
    array = noise(SOURCE.shape, np.float16)
    for order in (0, 1):
        found = resample(Volume(array, SOURCE), TARGETS["turned"], order=order).array
        wide = resample(Volume(array.astype(np.float32), SOURCE), TARGETS["turned"], order=order)
        assert found.dtype == np.float16
        np.testing.assert_array_equal(found, wide.array.astype(np.float16))


def test_the_source_is_not_changed() -> None:
    array = noise(SOURCE.shape)
    before = array.copy()
    resample(Volume(array, SOURCE), TARGETS["beyond"], order=0, outside=float("nan"))
    np.testing.assert_array_equal(array, before)


def test_how_the_file_kept_its_axes_is_not_forgotten() -> None:
    source = grid_of((4, 5, 6), (3, 2, 2))
    volume = Volume(np.zeros((4, 5, 6), np.int16), source, Orientation.from_code("LPS"))
    assert resample(volume, source, order=1).stored.code == "LPS"
    assert resample(volume, source.with_spacing((2, 2, 2)), order=1).stored.code == "LPS"


# --- slab by slab ---------------------------------------------------------------------------------


def by_slabs(array: Array, target: Grid, rows: int) -> Array:
    slabs = SlabResampler(SOURCE, target, outside=float("nan"))
    for begin in range(0, SOURCE.shape[0], rows):
        slabs.put(array[..., begin : begin + rows, :, :])
    found = slabs.finish()
    assert found.grid == target
    return found.array


@EACH_TARGET
@pytest.mark.parametrize("rows", [1, 4, 100])
def test_slabs_that_arrive_one_by_one_are_the_whole(target: Grid, rows: int) -> None:
    array = noise((2, *SOURCE.shape))
    whole = resample(Volume(array, SOURCE), target, order=1, outside=float("nan")).array
    found = by_slabs(array, target, rows)
    assert found.dtype == np.float32
    np.testing.assert_array_equal(np.isnan(found), np.isnan(whole))
    np.testing.assert_allclose(found, whole, rtol=1e-5, atol=1e-3)


def test_slabs_on_the_same_grid_are_the_identity() -> None:
    array = noise(SOURCE.shape)
    np.testing.assert_array_equal(by_slabs(array, SOURCE, 4), array)


@pytest.mark.parametrize("target", ["finer", "coarser", "beyond", "mirrored"])
def test_only_the_rows_that_are_still_needed_are_kept(target: str) -> None:
    source = grid_of((90, 10, 11), (0.3, 2.0, 1.5), (5, -3, 8))
    slabs = SlabResampler(source, TARGETS[target])
    rows_per_target_row = abs(TARGETS[target].matrix[0, 0]) / 0.3
    for begin in range(90):
        slabs.put(noise(source.shape)[begin : begin + 1])
        assert slabs._rows._kept is not None
        assert len(slabs._rows._kept) <= rows_per_target_row + 2
        assert slabs._rows._kept.base is None


def test_a_volume_of_which_rows_are_missing_is_refused() -> None:
    slabs = SlabResampler(SOURCE, TARGETS["finer"])
    slabs.put(noise((8, 10, 11)))
    with pytest.raises(ValueError, match="8 of 9 rows"):
        slabs.finish()


def test_of_an_integer_source_only_a_slab_is_converted(
    monkeypatch: pytest.MonkeyPatch, small_slabs: Callable[[int], None]
) -> None:
    """A CT of a gigabyte as int16 must not be held as float32 as well."""
    seen = []
    real = ndimage.affine_transform

    def spy(source: Array, *args: Any, **options: Any) -> Any:
        seen.append(source.shape[0])
        return real(source, *args, **options)

    source = grid_of((90, 10, 11), (0.3, 2.0, 1.5), (5, -3, 8))
    monkeypatch.setattr(ndimage, "affine_transform", spy)
    small_slabs(1)
    resample(Volume(noise(source.shape, np.int16), source), TARGETS["finer"], order=1)
    assert len(seen) == 20
    assert max(seen) <= 4
