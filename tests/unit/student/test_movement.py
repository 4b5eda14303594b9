from __future__ import annotations

from itertools import product

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.spatial.transform import Rotation

from pipeline.data.patches import Patch
from pipeline.data.volume import Grid
from pipeline.student.augment import Affine, Movement, Warp

SHAPE = (3, 4, 5)
PATCH = Patch((4, 5, 6), (8, 10, 12))
SPACING = (3.0, 1.5, 1.0)
turns = st.integers(0, 3)
movements = st.builds(
    Movement,
    flips=st.lists(st.sampled_from([0, 1, 2]), unique=True).map(tuple),
    turns=st.tuples(turns, turns, turns),
)
angles = st.floats(-45, 45)
affines = st.builds(Affine, degrees=st.tuples(angles, angles, angles), scale=st.floats(0.5, 2.0))


def coded(shape: tuple[int, ...] = SHAPE) -> npt.NDArray[np.int64]:
    """Every voxel holds its own (z, y, x): (3, D, H, W)."""
    return np.stack(np.meshgrid(*(np.arange(n) for n in shape), indexing="ij"))


def places(warp: Warp) -> npt.NDArray[np.float32]:
    """Where each voxel of the patch is taken from, as (z, y, x) of the volume."""
    start = np.array(warp.box.start)[:, None, None, None]
    return warp.linear((coded(warp.box.shape) + start).astype(np.float32))


class TestMovement:
    @given(movements)
    @settings(max_examples=40)
    def test_all_arrays_move_together_whatever_their_leading_axes(self, movement: Movement) -> None:
        moved = movement.apply(coded())
        label = coded()[0] * 100 + coded()[1] * 10 + coded()[2]
        odds = np.stack([label + 0.5, -label])[None]
        assert np.array_equal(movement.apply(label), moved[0] * 100 + moved[1] * 10 + moved[2])
        assert np.array_equal(movement.apply(odds)[0, 0], movement.apply(label) + 0.5)
        assert np.array_equal(movement.apply(odds)[0, 1], -movement.apply(label))
        assert np.array_equal(movement.apply(label > 200), movement.apply(label) > 200)

    @given(movements, st.integers(0, 2))
    @settings(max_examples=40)
    def test_torch_takes_a_slice_whichever_way_it_was_turned(
        self, movement: Movement, axis: int
    ) -> None:
        slice_ = np.moveaxis(np.zeros((1, 4, 4), np.float32), 0, axis)
        assert torch.from_numpy(movement.apply(slice_)).numel() == 16

    @given(movements)
    @settings(max_examples=40)
    def test_it_only_moves_voxels(self, movement: Movement) -> None:
        values = np.random.default_rng(0).standard_normal(SHAPE).astype(np.float32)
        moved = movement.apply(values)
        assert moved.dtype == values.dtype
        assert moved.flags.c_contiguous
        assert np.array_equal(np.sort(moved, axis=None), np.sort(values, axis=None))

    @pytest.mark.parametrize("axis", [0, 1, 2])
    def test_a_flip_mirrors_its_axis(self, axis: int) -> None:
        moved = Movement(flips=(axis,)).apply(coded())
        for place in product(*(range(n) for n in SHAPE)):
            expected = list(place)
            expected[axis] = SHAPE[axis] - 1 - place[axis]
            assert moved[(slice(None), *place)].tolist() == expected

    @pytest.mark.parametrize(("axis", "plane"), [(0, (1, 2)), (1, (0, 2)), (2, (0, 1))])
    def test_a_quarter_turn_leaves_its_axis_and_turns_the_others(
        self, axis: int, plane: tuple[int, int]
    ) -> None:
        a, b = plane
        quarter = tuple(int(i == axis) for i in range(3))
        moved = Movement(turns=(quarter[0], quarter[1], quarter[2])).apply(coded())
        for place in product(*(range(n) for n in moved.shape[1:])):
            expected = list(place)
            expected[a], expected[b] = place[b], SHAPE[b] - 1 - place[a]
            assert moved[(slice(None), *place)].tolist() == expected

    @pytest.mark.parametrize("turns", [(0, 0, 0), (1, 0, 0), (0, 3, 0), (2, 1, 0), (1, 1, 1)])
    def test_the_spacing_goes_where_the_axes_go(self, turns: tuple[int, int, int]) -> None:
        shape = (4, 6, 10)
        moved = Movement(turns=turns)
        assert moved.spacing_after(shape) == moved.apply(np.zeros(shape)).shape

    def test_four_turns_and_two_flips_are_none(self) -> None:
        turned = coded()
        for _ in range(4):
            turned = Movement(turns=(1, 0, 0)).apply(turned)
        assert np.array_equal(turned, coded())
        twice = Movement(flips=(0, 2)).apply(Movement(flips=(0, 2)).apply(coded()))
        assert np.array_equal(twice, coded())

    def test_turns_about_three_axes_reach_all_rotations_and_no_mirror_image(self) -> None:
        cube = np.arange(27).reshape(3, 3, 3)
        reached = {
            Movement(turns=(z, y, x)).apply(cube).tobytes()
            for z, y, x in product(range(4), repeat=3)
        }
        assert len(reached) == 24
        assert np.flip(cube, 2).tobytes() not in reached


class TestWarp:
    @given(affines)
    @settings(max_examples=40)
    def test_every_voxel_comes_from_where_the_affine_says(self, affine: Affine) -> None:
        """Against scipy's rotations, in mm about the patch's middle."""
        warp = Warp(affine, PATCH, SPACING)
        z, y, x = affine.degrees
        # scipy's matrices are for (x, y, z). About y its positive turn runs from z to x, ours from
        # x to z; as ours say where a value is taken from, they are its transposes.
        about = [
            Rotation.from_euler(name, angle, degrees=True).as_matrix()[::-1, ::-1]
            for name, angle in (("z", z), ("y", -y), ("x", x))
        ]
        middle = np.array(PATCH.start) + (np.array(PATCH.shape) - 1) / 2
        offsets = coded(PATCH.shape).reshape(3, -1) + np.array(PATCH.start)[:, None]
        in_mm = (offsets - middle[:, None]) * np.array(SPACING)[:, None]
        back = about[0].T @ about[1].T @ about[2].T @ in_mm / affine.scale
        expected = back / np.array(SPACING)[:, None] + middle[:, None]
        np.testing.assert_allclose(places(warp).reshape(3, -1), expected, atol=2e-4)

    @given(affines)
    @settings(max_examples=40)
    def test_the_box_holds_every_place_with_a_voxel_to_spare(self, affine: Affine) -> None:
        warp = Warp(affine, PATCH, SPACING)
        found = places(warp).reshape(3, -1)
        first = np.array(warp.box.start)
        last = first + np.array(warp.box.shape) - 1
        assert (found.min(axis=1) >= first + 0.99).all()
        assert (found.max(axis=1) <= last - 0.99).all()

    def test_no_turn_and_no_scale_change_nothing(self) -> None:
        warp = Warp(Affine((0, 0, 0), 1.0), PATCH, SPACING)
        values = np.random.default_rng(1).integers(0, 255, warp.box.shape).astype(np.uint8)
        inside = tuple(
            slice(a - b, a - b + n)
            for a, b, n in zip(PATCH.start, warp.box.start, PATCH.shape, strict=True)
        )
        assert np.array_equal(warp.nearest(values), values[inside])
        same = warp.linear(values[None].astype(np.float32))[0]
        np.testing.assert_allclose(same, values[inside], atol=5e-3)

    def test_a_larger_scale_takes_values_from_nearer_the_middle(self) -> None:
        found = places(Warp(Affine((0, 0, 0), 2.0), PATCH, SPACING))
        assert found[0, -1, 0, 0] - found[0, 0, 0, 0] == pytest.approx(7 / 2, abs=1e-4)

    @given(affines, st.integers(0, 2))
    @settings(max_examples=30)
    def test_next_to_nan_is_nan_and_no_number_is_made_up(self, affine: Affine, axis: int) -> None:
        warp = Warp(affine, PATCH, SPACING)
        values = np.full((1, *warp.box.shape), 5.0, dtype=np.float32)
        edge = warp.box.shape[axis] // 2
        np.moveaxis(values[0], axis, 0)[edge:] = np.nan
        moved = warp.linear(values)[0]
        known = ~np.isnan(moved)
        np.testing.assert_allclose(moved[known], 5.0, rtol=1e-5)
        # Unknown exactly from beyond the last known voxel on.
        place = places(warp)[axis] - warp.box.start[axis]
        assert known[place < edge - 1.001].all()
        assert not known[place > edge - 0.999].any()

    @given(affines)
    @settings(max_examples=20)
    def test_one_slice_is_turned_and_scaled_in_its_plane(self, affine: Affine) -> None:
        grid = Grid.axis_aligned((1, 40, 40), SPACING)
        patch = Patch((0, 5, 6), (1, 10, 12))
        warp = Movement(affine=affine).warp(patch, grid)
        assert warp is not None
        assert (warp.box.start[0], warp.box.shape[0]) == (0, 1)  # nothing is known beside it
        found = places(warp)
        assert (found[0] == 0).all()
        ends_mm = (found[1:, 0, 0, -1] - found[1:, 0, 0, 0]) * SPACING[1:]
        assert np.linalg.norm(ends_mm) == pytest.approx(11 / affine.scale, abs=1e-2)
        volume = Movement(affine=affine).warp(patch, Grid.axis_aligned((9, 40, 40), SPACING))
        assert volume is not None
        assert volume.box.shape[0] > 1 or not any(affine.degrees[1:])

    def test_nearest_takes_one_of_the_values(self) -> None:
        warp = Warp(Affine((10, 20, 30), 1.2), PATCH, SPACING)
        values = np.random.default_rng(2).choice([0, 3, 255], warp.box.shape).astype(np.uint8)
        moved = warp.nearest(values)
        assert moved.dtype == np.uint8
        z, y, x = np.rint(places(warp) - np.array(warp.box.start)[:, None, None, None]).astype(int)
        assert (moved == values[z, y, x]).mean() > 0.999  # ties may go either way
