"""Which images can be CT in Hounsfield units, and what the others are called."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from pipeline.data.hounsfield import Doubt, doubts, doubts_of, intensities, value_counts

Hu = npt.NDArray[np.int16]


def body(seed: int = 0, *, cropped: bool = False) -> Hu:
    """A round body of fat, soft tissue and bone in air."""
    rng = np.random.default_rng(seed)
    z, y, x = np.indices((20, 40, 40))
    radius = np.hypot(y - 19.5, x - 19.5)
    hu = np.full(z.shape, -1000.0)
    hu[radius < 17] = -100
    hu[radius < 14] = 45
    hu[(abs(y - 25) < 2) & (abs(x - 20) < 2)] = 900
    hu += rng.normal(0, 12, hu.shape)
    inner = hu[:, 8:32, 8:32] if cropped else hu
    return np.maximum(np.rint(inner), -1024).astype(np.int16)


def lung(level: float) -> Hu:
    """A crop within a lung: hardly a vessel, no wall."""
    rng = np.random.default_rng(1)
    hu = level + rng.normal(0, 60, (20, 40, 40))
    hu[rng.random(hu.shape) < 0.006] = 20
    return np.rint(hu).astype(np.int16)


def femur() -> Hu:
    """A crop around a shaft, without air: a third of it is dense bone."""
    rng = np.random.default_rng(2)
    z, y, x = np.indices((20, 40, 40))
    radius = np.hypot(y - 19.5, x - 19.5)
    hu = np.where(radius < 16, 1050.0, 60.0)
    hu[radius < 9] = -90
    return np.rint(hu + rng.normal(0, 20, z.shape)).astype(np.int16)


def found(array: npt.NDArray[Any]) -> list[Doubt]:
    stored = np.rint(array).astype(np.int16)
    counts = value_counts(stored)
    return doubts(counts, intensities(stored, counts))


def test_counts_are_of_every_value() -> None:
    rng = np.random.default_rng(0)
    hu = rng.integers(-32768, 32768, (7, 9, 11)).astype(np.int16)
    hu.flat[:4] = -32768, 32767, -1, 0
    values, numbers = np.unique(hu, return_counts=True)
    counts = value_counts(hu)
    assert counts.sum() == hu.size
    np.testing.assert_array_equal(counts[values.astype(int) + 32768], numbers)
    label = rng.integers(0, 65536, (5, 6, 7)).astype(np.uint16)
    values, numbers = np.unique(label, return_counts=True)
    np.testing.assert_array_equal(value_counts(label)[values], numbers)


@pytest.mark.parametrize(
    "plausible",
    [
        lambda hu: hu,
        lambda hu: np.where(hu < -900, -3024, hu),  # padding outside the round field of view
        lambda hu: hu + 35,  # another scanner
        lambda hu: np.clip(hu, -1024, 300),
        lambda hu: np.where(hu > 800, 3071, hu),  # metal
        lambda _: body(cropped=True),  # no air at all
        lambda _: femur(),
    ],
)
def test_what_scanners_make_passes(plausible: Callable[[Hu], Hu]) -> None:
    assert found(plausible(body())) == []


@pytest.mark.parametrize(
    ("change", "severity", "says"),
    [
        (lambda hu: hu * 0 - 5, "error", "every voxel is -5"),
        (lambda hu: (hu > 0) * 1, "error", "normalised, or a mask"),
        (lambda hu: np.clip((hu + 160) / 400, 0, 1) * 255, "error", "grey levels"),
        (lambda hu: hu + 1024, "error", "about 1000 too high"),
        (lambda hu: np.maximum(hu.astype(int) - 1024, -2048), "error", "about 1000 too low"),
        (lambda hu: np.clip(hu, -160, 240) + 160, "error", "no value is below 0 (0 to 400)"),
        (lambda hu: np.where(hu < -500, hu, hu + 4000), "error", "only 0.0% of the voxels lie"),
        (lambda hu: np.clip(hu, -160, 240), "warning", "of the voxels are exactly -160 and"),
        (lambda hu: np.where(hu < -500, hu, hu + 250), "warning", "lies at 29"),
        (lambda hu: hu / 2 + 20, "warning", "the corners of the image are at -480 HU"),
    ],
)  # fmt: skip
def test_what_is_no_ct_is_called_what_it_is(
    change: Callable[[Hu], Any], severity: str, says: str
) -> None:
    said = found(change(body()))
    assert [(d.severity, says in d.what) for d in said] == [(severity, True)], said
    assert all(d.fix for d in said)


@pytest.mark.parametrize(
    "crop",
    [lung(-780), lung(-900), np.where(lung(-780) < -900, -3024, lung(-900))],
    ids=["healthy", "emphysema", "emphysema, the rest masked"],
)
def test_a_crop_within_a_lung_is_improbable_at_most(crop: Hu) -> None:
    assert [doubt for doubt in found(crop) if doubt.severity == "error"] == []


@pytest.mark.parametrize("bone", [0.0, 0.4])
def test_a_crop_within_an_organ_or_a_bone_is_improbable_alone(bone: float) -> None:
    rng = np.random.default_rng(3)
    hu = 110 + rng.normal(0, 12, (16, 16, 16))
    hu[rng.random(hu.shape) < bone] += 300
    said = found(hu)[0]
    assert (said.severity, said.what.startswith("no value is below 0")) == ("warning", True)
    assert "crop within an organ" in said.fix


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda hu: np.abs(hu), "no value is below 0"),  # magnitudes, as MR has them: not shifted
        (lambda hu: (hu - hu.mean()) / hu.std(), "normalised"),
        (lambda hu: np.where(hu > 0, 7, 0), "normalised, or a mask"),
        (lambda hu: (hu > 0) * 1 + (hu > 800) * 30, "label map"),
    ],
)
def test_other_images_are_told_by_what_they_are(change: Callable[[Hu], Any], says: str) -> None:
    (said,) = found(change(body()))
    assert (said.severity, says in said.what) == ("error", True), said


def test_all_at_once_is_the_same() -> None:
    assert doubts_of(body() + np.int16(1024)) == found(body() + 1024)
    assert str(doubts_of(body() + np.int16(1024))[0]).endswith("and save again.")


def test_an_offset_without_air_is_seen_too() -> None:
    (said,) = found(body(cropped=True) + 1024)
    assert "about 1000 too high" in said.what
