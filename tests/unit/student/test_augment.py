from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from pydantic import ValidationError

from pipeline.data.labels import LabelSpace
from pipeline.errors import ConfigError
from pipeline.student.augment import AugmentConfig, check_sides, draw_movement


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.Generator(np.random.Philox(seed))


def space(*organs: str) -> LabelSpace:
    return LabelSpace({organ: number + 1 for number, organ in enumerate(organs)})


class TestDrawMovement:
    def test_the_generator_alone_decides(self) -> None:
        config = AugmentConfig.model_validate(
            {"flip_axes": (0, 1, 2), "rotate_axes": (0, 2), "affine": {"probability": 0.5}}
        )
        drawn = [draw_movement(config, (4, 4, 4), rng(seed)) for seed in range(400)]
        assert drawn == [draw_movement(config, (4, 4, 4), rng(seed)) for seed in range(400)]
        assert {m.turns for m in drawn} == {(z, 0, x) for z in range(4) for x in range(4)}
        assert len({m.flips for m in drawn}) == 8
        assert 0.4 < np.mean([0 in m.flips for m in drawn]) < 0.6
        assert 0.4 < np.mean([m.affine is not None for m in drawn]) < 0.6

    def test_only_what_is_allowed_is_drawn(self) -> None:
        drawn = [
            draw_movement(AugmentConfig(flip_axes=(1,)), (4, 4, 4), rng(seed)) for seed in range(50)
        ]
        assert {m.flips for m in drawn} == {(), (1,)}
        assert {m.turns for m in drawn} == {(0, 0, 0)}
        assert {m.affine for m in drawn} == {None}

    @pytest.mark.parametrize(("axis", "num_turns"), [(0, 2), (1, 4), (2, 2)])
    def test_a_plane_in_which_the_patch_is_not_square_turns_by_halves(
        self, axis: int, num_turns: int
    ) -> None:
        config = AugmentConfig.model_validate({"rotate_axes": (axis,)})
        drawn = [draw_movement(config, (4, 6, 4), rng(seed)) for seed in range(50)]
        assert len({m.turns for m in drawn}) == num_turns
        assert {m.apply(np.zeros((4, 6, 4))).shape for m in drawn} == {(4, 6, 4)}

    def test_affines_stay_within_their_ranges_and_fill_them(self) -> None:
        config = AugmentConfig.model_validate(
            {"affine": {"probability": 1, "degrees": [40, 0, 10], "scale": [0.5, 2]}}
        )
        drawn = [draw_movement(config, (4, 4, 4), rng(seed)).affine for seed in range(300)]
        angles = np.array([a.degrees for a in drawn if a])
        scales = np.array([a.scale for a in drawn if a])
        assert len(angles) == 300
        np.testing.assert_allclose(np.abs(angles).max(axis=0), [40, 0, 10], rtol=0.05)
        np.testing.assert_allclose(angles.mean(axis=0), 0, atol=4)
        assert 0.5 <= scales.min() < 0.52
        assert 1.9 < scales.max() <= 2
        # As often smaller as larger.
        assert 0.4 < (scales > 1).mean() < 0.6


class TestSides:
    @pytest.mark.parametrize(
        "organs",
        [
            ("liver", "kidney_left", "kidney_right"),
            ("Left Kidney",),
            ("kidneyLeft", "liver"),
            ("left-atrium",),
            ("kidney_l", "kidney_r"),
        ],
    )
    def test_mirror_images_are_refused_for_organs_named_by_their_side(
        self, organs: tuple[str, ...]
    ) -> None:
        with pytest.raises(ConfigError, match="left and right") as caught:
            check_sides(AugmentConfig(flip_axes=(0, 2)), space(*organs), (8, 8, 8))
        sided = [o for o in organs if o != "liver"]
        assert all(organ in str(caught.value) for organ in sided)
        assert "liver" not in str(caught.value)

    @pytest.mark.parametrize(
        "organs", [("liver", "kidneys"), ("vertebra_L1", "vertebra_L2"), ("bright_spot", "cleft")]
    )
    def test_other_organs_may_be_mirrored(self, organs: tuple[str, ...]) -> None:
        check_sides(
            AugmentConfig(flip_axes=(0, 1, 2), rotate_axes=(0, 1, 2)), space(*organs), (8, 8, 8)
        )

    @pytest.mark.parametrize(
        ("flips", "rotates", "mixed_up"),
        [
            ((), (), False),
            ((), (0, 1, 2), False),  # a turned patient is no mirrored one
            ((2,), (), True),
            ((0,), (), False),  # left stays on its side of the image
            ((1,), (), False),
            ((0, 1), (), False),
            ((1,), (0,), True),  # front to back, then half a turn: left is right
            ((0,), (1,), True),
            ((0,), (0,), False),
            ((1,), (1,), False),
            ((0,), (2,), False),
            ((0,), (0, 2), True),  # head to foot, turned to front to back, and round
        ],
    )
    def test_what_mixes_up_left_and_right(
        self, flips: tuple[int, ...], rotates: tuple[int, ...], mixed_up: bool
    ) -> None:
        config = AugmentConfig.model_validate({"flip_axes": flips, "rotate_axes": rotates})
        assert config.swaps_sides((8, 8, 8)) is mixed_up

    @pytest.mark.parametrize(("axis", "mixed_up"), [(0, False), (1, True), (2, False)])
    def test_half_a_turn_of_one_slice_is_its_mirror_image(self, axis: int, mixed_up: bool) -> None:
        config = AugmentConfig(rotate_axes=(axis,))  # type: ignore[arg-type]
        assert config.swaps_sides((1, 8, 8)) is mixed_up


class TestConfig:
    @pytest.mark.parametrize("field", ["flip_axes", "rotate_axes"])
    @pytest.mark.parametrize("axes", [(3,), (-1,), (0, 0)])
    def test_axes_that_are_none_or_named_twice_are_refused(
        self, field: str, axes: tuple[int, ...]
    ) -> None:
        # Axis 3 would be the first from the front: it would mirror the organs, silently.
        with pytest.raises(ValidationError, match=field):
            AugmentConfig.model_validate({field: axes})

    @pytest.mark.parametrize(
        ("affine", "why"),
        [
            ({"degrees": [46, 0, 0]}, "degrees"),
            ({"degrees": [-1, 0, 0]}, "degrees"),
            ({"degrees": [10, 10]}, "degrees"),
            ({"scale": [0, 1]}, "scale"),
            ({"scale": [0.9, 2.1]}, "scale"),
            ({"scale": [1.2, 0.8]}, "low <= high"),
            ({"scale": [float("nan"), 1.0]}, "scale"),
            (
                {"probability": 0.5, "degrees": [0, 0, 0], "scale": [1, 1]},
                "neither turns nor scales",
            ),
        ],
    )
    def test_affines_that_make_no_sense_are_refused(self, affine: dict[str, Any], why: str) -> None:
        with pytest.raises(ValidationError, match=why):
            AugmentConfig.model_validate({"affine": affine})


def test_a_preset_fills_in_what_is_not_said() -> None:
    plain = AugmentConfig()
    assert AugmentConfig(preset="default") == plain
    strong = AugmentConfig.model_validate({"preset": "strong", "gamma": {"probability": 0.1}})
    assert (strong.affine.probability, strong.noise.std) == (0.9, (0.0, 0.12))
    assert (strong.gamma.probability, strong.gamma.exponent) == (0.1, (0.55, 1.8))
    assert strong.low_resolution == plain.low_resolution
    nnunet = AugmentConfig(preset="nnunet")
    assert nnunet.affine.scale == (0.7, 1.4)
    assert nnunet.noise == plain.noise
    for config in (strong, nnunet):
        assert AugmentConfig.model_validate(config.model_dump()) == config
        assert AugmentConfig.model_validate_json(config.model_dump_json()) == config
    with pytest.raises(ValidationError, match="preset"):
        AugmentConfig.model_validate({"preset": "weak"})
