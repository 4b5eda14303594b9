"""Grids and volumes on numbers that can be checked by hand."""

from __future__ import annotations

import json
import math
from itertools import permutations, product

import numpy as np
import pytest

from pipeline.data.volume import RAS, Grid, Orientation, Volume


def turned(shape: tuple[int, int, int] = (4, 5, 6)) -> Grid:
    """Turned by 30 degrees about z, spacing 3, 2, 1.5."""
    a = math.radians(30)
    turn = np.array([[1, 0, 0], [0, math.cos(a), -math.sin(a)], [0, math.sin(a), math.cos(a)]])
    matrix = np.eye(4)
    matrix[:3, :3] = turn @ np.diag([3.0, 2.0, 1.5])
    matrix[:3, 3] = 0.1, -20.3, 7.7
    return Grid.from_matrix(shape, matrix)


def test_json_round_trip_is_exact() -> None:
    grid = turned()
    assert Grid.from_json(json.loads(json.dumps(grid.to_json()))) == grid
    assert hash(Grid.from_json(grid.to_json())) == hash(grid)


@pytest.mark.parametrize("shape", [(4, 5), (4, 5, 6, 1)])
def test_a_grid_has_three_sizes(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="3 sizes"):
        Grid.from_matrix(shape, np.eye(4))
    with pytest.raises(ValueError, match="4 x 4"):
        Grid.from_matrix((4, 5, 6), np.eye(3))


def test_spacing_and_voxel_volume_of_a_turned_grid() -> None:
    assert turned().spacing_mm == pytest.approx((3.0, 2.0, 1.5))
    assert turned().voxel_ml == pytest.approx(3.0 * 2.0 * 1.5 / 1000)


def test_shear_is_the_angle_that_axes_miss_a_right_one_by() -> None:
    assert turned().shear_degrees == pytest.approx(0, abs=1e-6)
    assert not turned().is_sheared
    matrix = np.diag([5.0, 2, 2, 1])
    matrix[1, 0] = 5 * math.tan(math.radians(-20))
    grid = Grid.from_matrix((4, 5, 6), matrix)
    assert (grid.shear_degrees, grid.is_sheared) == (pytest.approx(20), True)
    assert grid.voxel_ml == pytest.approx(5 * 2 * 2 / 1000)
    # Directions that were rounded to four digits are still upright.
    rounded = Grid.from_matrix((4, 5, 6), turned().matrix.round(4))
    assert 0 < rounded.shear_degrees < 0.05
    assert not rounded.is_sheared


def test_one_slice_stays_one_at_any_spacing_and_leans_in_its_plane_alone() -> None:
    new = turned((1, 6, 8)).with_spacing((1.0, 4.0, 3.0))
    assert (new.slice_axis, new.shape) == (0, (1, 3, 4))
    assert new.spacing_mm == pytest.approx((3.0, 4.0, 3.0))
    assert turned((1, 1, 8)).slice_axis is None
    matrix = np.diag([5.0, 2, 2, 1])
    matrix[1, 0] = 2.0
    assert Grid.from_matrix((2, 6, 8), matrix).is_sheared
    assert not Grid.from_matrix((1, 6, 8), matrix).is_sheared
    assert Grid.from_matrix((6, 1, 8), matrix[[1, 0, 2, 3]]).slice_axis == 1


def test_coarsen_puts_cells_in_the_middle_of_their_voxels() -> None:
    grid = turned((4, 5, 7))
    coarse = grid.coarsen((2, 1, 4))
    assert coarse.shape == (2, 5, 2)
    assert coarse.spacing_mm == pytest.approx((6.0, 2.0, 6.0))
    # Cell (1, 3, 1) covers voxels z 2..3, y 3, x 4..7.
    np.testing.assert_allclose(coarse.matrix @ [1, 3, 1, 1], grid.matrix @ [2.5, 3, 5.5, 1])


def test_crop_moves_the_origin() -> None:
    grid = turned()
    cropped = grid.crop((1, -2, 3), (2, 9, 3))
    assert cropped.shape == (2, 9, 3)
    np.testing.assert_allclose(cropped.matrix @ [0, 0, 0, 1], grid.matrix @ [1, -2, 3, 1])
    np.testing.assert_array_equal(cropped.matrix[:3, :3], grid.matrix[:3, :3])


def test_largest_corner_distance() -> None:
    grid = Grid.axis_aligned((11, 21, 31), (1, 1, 1))
    shifted = Grid.axis_aligned((11, 21, 31), (1, 1, 1), (3, 0, 4))
    assert grid.largest_corner_distance_mm(grid) == 0
    assert grid.largest_corner_distance_mm(shifted) == pytest.approx(5)
    # A spacing that is 1 % too large puts the far corner 0.1, 0.2, 0.3 mm off.
    larger = Grid.axis_aligned((11, 21, 31), (1.01, 1.01, 1.01))
    assert grid.largest_corner_distance_mm(larger) == pytest.approx(math.hypot(0.1, 0.2, 0.3))
    # Turned about the far corner, it is the near one that moves.
    flipped = Grid.from_matrix((11, 21, 31), np.diag([-1, 1, 1, 1]) + np.eye(4, k=3) * 10)
    assert grid.largest_corner_distance_mm(flipped) == pytest.approx(10)


def test_a_volume_fits_its_grid() -> None:
    grid = turned((4, 5, 6))
    assert Volume(np.zeros((4, 5, 6)), grid).spacing_mm == grid.spacing_mm
    assert Volume(np.zeros((7, 4, 5, 6)), grid).array.shape == (7, 4, 5, 6)
    for shape in ((6, 5, 4), (4, 5, 6, 7), (5, 6)):
        with pytest.raises(ValueError, match="does not fit grid"):
            Volume(np.zeros(shape), grid)


CODES = ["".join(c) for p in permutations(("RL", "AP", "SI")) for c in product(*p)]


def test_with_shape_keeps_the_faces_in_place() -> None:
    grid = Grid.axis_aligned((10, 4, 6), (3, 2, 1), (100, 0, 0))
    coarse = grid.with_shape((4, 8, 6))
    assert coarse.shape == (4, 8, 6)
    assert coarse.spacing_mm == pytest.approx((7.5, 1, 1))
    # The field of view begins half a voxel before the first centre, in both.
    np.testing.assert_allclose(coarse.matrix[:3, 3], [100 - 1.5 + 3.75, 0 - 1 + 0.5, 0])
    last = coarse.matrix @ [3, 7, 5, 1] + [3.75, 0.5, 0.5, 0]
    np.testing.assert_allclose(last, grid.matrix @ [9, 3, 5, 1] + [1.5, 1, 0.5, 0])
    assert turned((4, 5, 6)).with_shape((4, 5, 6)) == turned((4, 5, 6))


@pytest.mark.parametrize("code", CODES)
def test_an_orientation_moves_no_voxel(code: str) -> None:
    orientation = Orientation.from_code(code)
    assert orientation.code == code
    volume = Volume(np.arange(2 * 4 * 5 * 6).reshape(2, 4, 5, 6), turned())
    seen = orientation.apply(volume)
    assert np.shares_memory(seen.array, volume.array)
    # The same value at the same place: follow some voxels through both affines.
    to_seen = seen.grid.index_map_from(volume.grid)
    for index in ((0, 0, 0), (1, 2, 3), (3, 4, 5)):
        z, y, x = np.rint(to_seen @ [*index, 1])[:3].astype(int)
        assert seen.array[0, z, y, x] == volume.array[(0, *index)]
    back = orientation.undo(seen)
    np.testing.assert_array_equal(back.array, volume.array)
    np.testing.assert_allclose(back.grid.matrix, volume.grid.matrix)


def test_axes_point_where_the_letters_say() -> None:
    # LPS, fastest first: x runs left, y posterior, z superior.
    assert Orientation.from_code("LPS") == Orientation((0, 1, 2), (False, True, True))
    # The slowest axis runs to the right, the fastest inferior.
    assert Orientation.from_code("IAR") == Orientation((2, 1, 0), (False, False, True))
    assert Orientation.from_code("RAS") == RAS == Volume(np.zeros((4, 5, 6)), turned()).stored


@pytest.mark.parametrize("code", ["", "RA", "RAR", "RAX", "ras", "RASP"])
def test_letters_that_name_no_orientation(code: str) -> None:
    with pytest.raises(ValueError, match="one letter of each"):
        Orientation.from_code(code)
