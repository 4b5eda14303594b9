from __future__ import annotations

from itertools import product

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from pipeline.student.augment import AugmentConfig, Movement, change_intensity, draw_movement

SHAPE = (3, 4, 4)
movements = st.builds(
    Movement,
    flips=st.lists(st.sampled_from([0, 1, 2]), unique=True).map(tuple),
    turns=st.integers(0, 3),
)


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.Generator(np.random.Philox(seed))


def coded(shape: tuple[int, ...] = SHAPE) -> npt.NDArray[np.int64]:
    """Every voxel holds its own (z, y, x): (3, D, H, W)."""
    return np.stack(np.meshgrid(*(np.arange(n) for n in shape), indexing="ij"))


def image(seed: int = 0) -> npt.NDArray[np.float32]:
    return rng(seed).uniform(-1, 1, (1, 6, 6, 6)).astype(np.float32)


class TestMovement:
    @given(movements)
    @settings(max_examples=40, deadline=None)
    def test_all_arrays_move_together_whatever_their_leading_axes(self, movement: Movement) -> None:
        places = movement.apply(coded())
        label = coded()[0] * 100 + coded()[1] * 10 + coded()[2]
        odds = np.stack([label + 0.5, -label])[None]
        assert np.array_equal(movement.apply(label), places[0] * 100 + places[1] * 10 + places[2])
        assert np.array_equal(movement.apply(odds)[0, 0], movement.apply(label) + 0.5)
        assert np.array_equal(movement.apply(odds)[0, 1], -movement.apply(label))
        assert np.array_equal(movement.apply(label > 200), movement.apply(label) > 200)

    @given(movements)
    @settings(max_examples=40, deadline=None)
    def test_it_only_moves_voxels(self, movement: Movement) -> None:
        values = rng().standard_normal(SHAPE).astype(np.float32)
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

    def test_a_quarter_turn_takes_x_to_y(self) -> None:
        moved = Movement(turns=1).apply(coded())
        for z, y, x in product(*(range(n) for n in SHAPE)):
            assert moved[:, z, y, x].tolist() == [z, x, SHAPE[1] - 1 - y]

    def test_four_turns_and_two_flips_are_none(self) -> None:
        values = coded()
        turned = values
        for _ in range(4):
            turned = Movement(turns=1).apply(turned)
        assert np.array_equal(turned, values)
        twice = Movement(flips=(0, 2)).apply(Movement(flips=(0, 2)).apply(values))
        assert np.array_equal(twice, values)


class TestDrawMovement:
    def test_the_generator_alone_decides(self) -> None:
        config = AugmentConfig(flip_axes=(0, 1, 2), rotate=True)
        drawn = [draw_movement(config, (4, 4, 4), rng(seed)) for seed in range(200)]
        assert drawn == [draw_movement(config, (4, 4, 4), rng(seed)) for seed in range(200)]
        assert {m.turns for m in drawn} == {0, 1, 2, 3}
        assert len({m.flips for m in drawn}) == 8
        assert 0.35 < sum(0 in m.flips for m in drawn) / len(drawn) < 0.65

    def test_only_what_is_allowed_is_drawn(self) -> None:
        drawn = [
            draw_movement(AugmentConfig(flip_axes=(1,)), (4, 4, 4), rng(seed)) for seed in range(50)
        ]
        assert {m.flips for m in drawn} == {(), (1,)}
        assert {m.turns for m in drawn} == {0}

    def test_a_patch_that_is_not_square_turns_by_halves_and_keeps_its_shape(self) -> None:
        config = AugmentConfig(rotate=True)
        drawn = [draw_movement(config, (4, 4, 6), rng(seed)) for seed in range(50)]
        assert {m.turns for m in drawn} == {0, 2}
        assert {m.apply(np.zeros((4, 4, 6))).shape for m in drawn} == {(4, 4, 6)}


class TestChangeIntensity:
    def test_the_generator_alone_decides(self) -> None:
        config = AugmentConfig(intensity=1)
        one, two = (change_intensity(image(), config, rng(7)) for _ in range(2))
        assert np.array_equal(one, two)
        assert not np.array_equal(one, change_intensity(image(), config, rng(8)))

    def test_probability_zero_changes_nothing(self) -> None:
        for seed in range(20):
            found = change_intensity(image(), AugmentConfig(intensity=0), rng(seed))
            assert np.array_equal(found, image())

    def test_the_image_that_is_given_is_left_alone(self) -> None:
        given_ = image()
        for seed in range(5):
            change_intensity(given_, AugmentConfig(intensity=1), rng(seed))
        assert np.array_equal(given_, image())

    @pytest.mark.parametrize(
        ("alone", "most"), [("brightness", 0.4), ("noise_std", 2.0), ("contrast", 0.5)]
    )
    def test_each_change_stays_within_its_range(self, alone: str, most: float) -> None:
        off = {"noise_std": 0.0, "brightness": 0.0, "contrast": 0.0, "gamma": 0.0}
        config = AugmentConfig.model_validate({"intensity": 1, **off, alone: 0.4})
        changes = [np.abs(change_intensity(image(), config, rng(s)) - image()) for s in range(20)]
        assert max(float(c.max()) for c in changes) < most
        assert max(float(c.max()) for c in changes) > 0.1

    def test_gamma_keeps_the_ends_and_the_order(self) -> None:
        off = {"noise_std": 0.0, "brightness": 0.0, "contrast": 0.0}
        config = AugmentConfig(intensity=1, gamma=0.5, **off)
        found = change_intensity(image(), config, rng(3))
        assert found.min() == pytest.approx(image().min(), abs=1e-6)
        assert found.max() == pytest.approx(image().max(), abs=1e-6)
        assert np.array_equal(np.argsort(found, axis=None), np.argsort(image(), axis=None))
        assert not np.allclose(found, image(), atol=1e-3)

    def test_a_constant_image_gives_no_nan(self) -> None:
        flat = np.full((1, 4, 4, 4), -1, dtype=np.float32)
        found = change_intensity(flat, AugmentConfig(intensity=1), rng(1))
        assert found.dtype == np.float32
        assert np.isfinite(found).all()


class TestConfig:
    @pytest.mark.parametrize("axes", [(3,), (-1,), (0, 0)])
    def test_axes_that_are_none_or_named_twice_are_refused(self, axes: tuple[int, ...]) -> None:
        # Axis 3 would be the first from the front: it would mirror the organs, silently.
        with pytest.raises(ValidationError, match="flip_axes"):
            AugmentConfig.model_validate({"flip_axes": axes})

    def test_moves_voxels(self) -> None:
        assert not AugmentConfig().moves_voxels
        assert AugmentConfig(flip_axes=(2,)).moves_voxels
        assert AugmentConfig(rotate=True).moves_voxels
