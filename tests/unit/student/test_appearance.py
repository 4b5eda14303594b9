from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from pydantic import ValidationError

from pipeline.student.augment import AppearanceConfig, change_intensity

NAMES = ("noise", "blur", "brightness", "contrast", "low_resolution", "gamma")


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.Generator(np.random.Philox(seed))


def image(shape: tuple[int, ...] = (1, 6, 6, 6)) -> npt.NDArray[np.float32]:
    return rng().uniform(-1, 1, shape).astype(np.float32)


def only(name: str, **values: Any) -> AppearanceConfig:
    """That change, always unless it says otherwise, and no other."""
    changes = {other: {"probability": 0.0} for other in NAMES}
    return AppearanceConfig.model_validate(changes | {name: {"probability": 1.0} | values})


def always(intensity: float = 1.0) -> AppearanceConfig:
    changes = {name: {"probability": 1.0} for name in NAMES}
    return AppearanceConfig.model_validate({**changes, "intensity": intensity})


class TestWhatDecides:
    def test_the_generator_alone(self) -> None:
        one, two = (change_intensity(image(), always(), rng(7)) for _ in range(2))
        assert np.array_equal(one, two)
        assert not np.array_equal(one, change_intensity(image(), always(), rng(8)))

    @pytest.mark.parametrize("name", NAMES)
    def test_each_has_its_own_probability(self, name: str) -> None:
        seldom = only(name, probability=0.25)
        changed = [
            not np.array_equal(change_intensity(image(), seldom, rng(seed)), image())
            for seed in range(200)
        ]
        assert 0.15 < np.mean(changed) < 0.35

    def test_intensity_is_a_factor_on_all_of_them(self) -> None:
        half = only("noise").model_copy(update={"intensity": 0.5})
        found = [change_intensity(image(), half, rng(seed)) for seed in range(200)]
        assert 0.4 < np.mean([np.array_equal(one, image()) for one in found]) < 0.6
        for seed in range(20):
            assert np.array_equal(change_intensity(image(), always(0), rng(seed)), image())

    def test_the_image_that_is_given_is_left_alone(self) -> None:
        given = image()
        for name in NAMES:
            change_intensity(given, only(name), rng())
        assert np.array_equal(given, image())

    @pytest.mark.parametrize("name", NAMES)
    def test_a_constant_image_gives_no_nan(self, name: str) -> None:
        flat = np.full((1, 4, 4, 4), -1, dtype=np.float32)
        found = change_intensity(flat, only(name), rng(1))
        assert found.dtype == np.float32
        assert found.shape == flat.shape
        assert np.isfinite(found).all()


class TestRanges:
    def test_noise(self) -> None:
        flat = np.zeros((1, 20, 20, 20), dtype=np.float32)
        for seed in range(5):
            found = change_intensity(flat, only("noise", std=(0.2, 0.3)), rng(seed))
            assert 0.19 < found.std() < 0.31

    def test_brightness_shifts_all_voxels_alike(self) -> None:
        for seed in range(5):
            shift = change_intensity(image(), only("brightness", shift=(0.2, 0.3)), rng(seed))
            shift -= image()
            assert np.ptp(shift) < 1e-6
            assert 0.2 <= shift.mean() <= 0.3 + 1e-6

    def test_contrast_keeps_the_mean(self) -> None:
        for seed in range(5):
            found = change_intensity(image() + 3, only("contrast", factor=(1.1, 1.2)), rng(seed))
            assert found.mean() == pytest.approx(float(image().mean()) + 3, abs=1e-5)
            assert 1.1 - 1e-4 < found.std() / image().std() < 1.2 + 1e-4

    def test_gamma_keeps_the_ends_and_the_order(self) -> None:
        found = change_intensity(image(), only("gamma", exponent=(1.4, 1.5)), rng(3))
        assert found.min() == pytest.approx(image().min(), abs=1e-6)
        assert found.max() == pytest.approx(image().max(), abs=1e-6)
        assert np.array_equal(np.argsort(found, axis=None), np.argsort(image(), axis=None))
        assert found.mean() < image().mean() - 0.1

    @pytest.mark.parametrize(
        "wrong",
        [
            {"noise": {"std": [0.2, 0.1]}},
            {"noise": {"std": [-0.1, 0.1]}},
            {"blur": {"sigma": [-1, 1]}},
            {"contrast": {"factor": [0, 1]}},
            {"gamma": {"exponent": [-1, 1]}},
            {"low_resolution": {"zoom": [0.5, 1.5]}},
            {"low_resolution": {"zoom": [0.0, 1.0]}},
            {"brightness": {"shift": [0, float("inf")]}},
            {"blur": {"probability": 1.5}},
            {"blur": {"probability": float("nan")}},
            {"intensity": -1},
            {"sharpen": {}},
        ],
    )
    def test_ranges_that_make_no_sense_are_refused(self, wrong: dict[str, Any]) -> None:
        with pytest.raises(ValidationError):
            AppearanceConfig.model_validate(wrong)


def spread_mm(
    found: npt.NDArray[np.float32], spacing_mm: tuple[float, ...]
) -> npt.NDArray[np.float64]:
    """Standard deviation, along each axis in mm, of what was one bright voxel."""
    weights = found[0] / found.sum()
    result = []
    for axis, edge in enumerate(spacing_mm):
        profile = weights.sum(axis=tuple(i for i in range(3) if i != axis))
        at = np.arange(len(profile)) * edge
        mean = (profile * at).sum()
        result.append(np.sqrt((profile * (at - mean) ** 2).sum()))
    return np.array(result)


class TestThickSlices:
    """Blur and loss of resolution are the same in mm along all axes, whatever the voxels."""

    def test_a_blur_is_a_ball_in_mm(self) -> None:
        point = np.zeros((1, 25, 25, 25), dtype=np.float32)
        point[0, 12, 12, 12] = 1
        cubes = change_intensity(point, only("blur", sigma=(1.5, 1.5)), rng(), (2, 2, 2))
        np.testing.assert_allclose(spread_mm(cubes, (2, 2, 2)), 3, atol=0.1)
        slices = change_intensity(point, only("blur", sigma=(2, 2)), rng(), (2, 1, 1))
        np.testing.assert_allclose(spread_mm(slices, (2, 1, 1)), 2, atol=0.1)

    def test_low_resolution_never_thickens_slices_that_are_coarser_already(self) -> None:
        half = only("low_resolution", zoom=(0.5, 0.5))
        fine = change_intensity(image((1, 8, 8, 8)), half, rng(), (1, 1, 1))
        assert not np.allclose(fine.mean(axis=(2, 3)), image((1, 8, 8, 8)).mean(axis=(2, 3)))
        # Every plane z alike along y and x: what is left differs along z only.
        planes = np.broadcast_to(image((1, 8, 1, 1)), (1, 8, 8, 8)).copy()
        thick = change_intensity(planes, half, rng(), (4, 1, 1))
        np.testing.assert_allclose(thick, planes, atol=1e-6)
        rows = np.broadcast_to(image((1, 1, 8, 1)), (1, 8, 8, 8)).copy()
        assert not np.allclose(change_intensity(rows, half, rng(), (4, 1, 1)), rows, atol=0.1)

    def test_the_thickness_of_one_slice_is_no_spacing(self) -> None:
        one = image((1, 1, 16, 16))
        for kind in (only("blur", sigma=(1, 1)), only("low_resolution", zoom=(0.5, 0.5))):
            thick, thin = (change_intensity(one, kind, rng(), (z, 2, 2)) for z in (9, 0.5))
            np.testing.assert_array_equal(thick, thin)
            assert not np.allclose(thick, one)

    def test_low_resolution_keeps_a_ramp_where_it_is(self) -> None:
        """Down and up again must not shift the image by a part of a voxel."""
        ramp = np.broadcast_to(np.arange(12, dtype=np.float32), (1, 12, 12, 12)).copy()
        found = change_intensity(ramp, only("low_resolution", zoom=(1 / 3, 1 / 3)), rng())
        np.testing.assert_allclose(found[..., 2:-2], ramp[..., 2:-2], atol=1e-5)
