"""Samples that an affine moved. Every coded array is linear in z, y, x, and linear interpolation
of such an array is exact: each tells from where it was taken, between voxels too."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from scipy.ndimage import binary_erosion

from pipeline.cache.reader import CachedCase
from pipeline.data.labels import IGNORE, LabelSpace
from pipeline.errors import ConfigError
from pipeline.student.augment import AugmentConfig
from pipeline.student.dataset import AIR_HU, PatchDataset
from pipeline.student.sampling import SamplingConfig
from pipeline.student.settings import SupervisionConfig
from tests.unit.student.coded import (
    LIVER_PLANES,
    SHAPE,
    TAP,
    expected_odds,
    write_case,
)
from tests.unit.student.samples import CACHED, arrays, dataset, fingerprints

AFFINE = {"probability": 1.0, "degrees": [30, 30, 30], "scale": [0.7, 1.4]}
TURNED = AugmentConfig.model_validate({"intensity": 0, "affine": AFFINE})
SOMETIMES = AugmentConfig.model_validate({"intensity": 0, "affine": {**AFFINE, "probability": 0.5}})
TURNED_AND_FLIPPED = AugmentConfig.model_validate(
    {"intensity": 0, "affine": AFFINE, "flip_axes": [0, 1, 2], "rotate_axes": [0, 1, 2]}
)
Found = dict[str, npt.NDArray[Any]]


def samples(data: PatchDataset) -> list[Found]:
    return [arrays(data[item]) for item in range(len(data))]


def places(found: Found) -> npt.NDArray[np.float64]:
    """(3, D, H, W): where log-odds and image say that they come from; NaN outside."""
    liver, spleen = found["log_odds"].astype(np.float64)
    x = (spleen + 200) / 16
    rows = (found["image"][0] - x) / SHAPE[2]  # z * SHAPE[1] + y
    z = (liver + 300 - rows) / (32 - SHAPE[1])
    return np.stack([z, rows - z * SHAPE[1], x])


@pytest.mark.parametrize("augment", [TURNED, TURNED_AND_FLIPPED], ids=["turned", "flipped too"])
def test_all_arrays_come_from_one_place(coded_case: CachedCase, augment: AugmentConfig) -> None:
    for found in samples(dataset([coded_case], augment=augment)):
        place = places(found)
        inside = np.isfinite(place).all(axis=0)
        assert inside.mean() > 0.2
        # An affine of one step per voxel, not a smear: steps along each axis are all alike.
        steps = [np.diff(place, axis=axis + 1) for axis in range(3)]
        for step in steps:
            inner = step.reshape(3, -1)[:, np.isfinite(step).all(axis=0).ravel()]
            assert np.ptp(inner, axis=1).max() < 0.02
            assert 1 / 1.45 < np.linalg.norm(inner[:, 0]) < 1 / 0.65
        z = place[0][inside]
        clear = np.abs(z - np.floor(z) - 0.5) > 0.02  # not half way between two labels
        expected = (np.rint(z) % LIVER_PLANES == 0)[clear]
        assert np.array_equal(found["classes"][inside][clear], expected)


def test_labels_win_over_what_was_interpolated(coded_case: CachedCase) -> None:
    """Between +6 and -6 interpolation would give 0: there the label would not have won."""
    supervision = SupervisionConfig(confidence=6.0)
    plain = samples(dataset([coded_case], augment=TURNED))
    for found, raw in zip(
        samples(dataset([coded_case], augment=TURNED, supervision=supervision)), plain, strict=True
    ):
        liver, known = found["classes"] == 1, found["classes"] != IGNORE
        assert liver.any()
        strong = np.fmax(np.abs(raw["log_odds"]), 6.0)
        np.testing.assert_allclose(found["log_odds"][0][liver], strong[0][liver], rtol=1e-5)
        rest = known & ~liver
        np.testing.assert_allclose(found["log_odds"][0][rest], -strong[0][rest], rtol=1e-5)
        np.testing.assert_allclose(found["log_odds"][1][liver], -strong[1][liver], rtol=1e-5)


def test_outside_the_case_nothing_is_known_and_nothing_made_up(coded_folder: Path) -> None:
    small = (16, 12, 14)
    case = write_case(coded_folder, "liver-ct/b", shape=small)
    lowest, highest = expected_odds(np.array([[0, 0, 0], [15, 11, 13]])).T
    for found in samples(dataset([case], augment=TURNED, patch=(24, 24, 24))):
        unknown = np.isnan(found["log_odds"]).any(axis=0)
        assert 0.3 < unknown.mean() < 1
        assert (found["classes"] == IGNORE).mean() > 0.3
        far = binary_erosion(found["classes"] == IGNORE, iterations=2)
        assert far.any()
        np.testing.assert_allclose(found["image"][0][far], AIR_HU, atol=0.01)
        # 0 lies within the range of both organs, so it is the rest that must not appear.
        for organ in range(2):
            values = found["log_odds"][organ][~unknown]
            assert lowest[organ] - 0.01 <= values.min() <= values.max() <= highest[organ] + 0.01


def test_a_label_without_a_teacher_has_log_odds_where_it_wins(coded_folder: Path) -> None:
    case = write_case(coded_folder, "liver-ct/two", teachers=("two",))
    found = samples(dataset([case], augment=TURNED, supervision=SupervisionConfig()))[0]
    known = found["classes"] != IGNORE
    expected = np.where(found["classes"] == 1, 6.0, -6.0)
    np.testing.assert_array_equal(found["log_odds"][0][known], expected[known])
    assert np.isnan(found["log_odds"][0][~known]).all()


def test_temperatures_divide_what_is_resampled(coded_case: CachedCase) -> None:
    plain = samples(dataset([coded_case], augment=TURNED))
    hot = samples(dataset([coded_case], augment=TURNED, temperatures={("one", "liver"): 4.0}))
    for before, after in zip(plain, hot, strict=True):
        np.testing.assert_allclose(after["log_odds"][0], before["log_odds"][0] / 4, rtol=1e-4)
        np.testing.assert_array_equal(after["log_odds"][1], before["log_odds"][1])


def test_labels_alone_are_moved_too(coded_case: CachedCase) -> None:
    settings = {"augment": TURNED, "sampling": SamplingConfig(foreground=0)}
    marginal = SupervisionConfig(kind="marginal")
    moved = samples(dataset([coded_case], supervision=marginal, **settings))
    both = samples(dataset([coded_case], **settings))
    for found, expected in zip(moved, both, strict=True):
        assert set(found) == {"image", "classes", "annotated", "known"}
        assert np.array_equal(found["classes"], expected["classes"])


def test_it_is_a_function_of_the_number(coded_cases: list[CachedCase]) -> None:
    data = dataset(coded_cases, augment=TURNED_AND_FLIPPED)
    assert fingerprints(data) == fingerprints(data)


@pytest.mark.parametrize("augment", [SOMETIMES, AugmentConfig(intensity=0, flip_axes=(0,))])
def test_a_moved_sample_alone_has_no_features(
    coded_case: CachedCase, augment: AugmentConfig
) -> None:
    still = samples(dataset([coded_case], taps={TAP: CACHED}))
    moved = samples(dataset([coded_case], taps={TAP: CACHED}, augment=augment))
    (remark,) = dataset([coded_case], taps={TAP: CACHED}, augment=augment).remarks()
    assert re.search(r"that augmentation does not move: (4|5)\d%", remark)
    assert dataset([coded_case], augment=augment).remarks() == []
    kept = [np.array_equal(a["image"], b["image"]) for a, b in zip(still, moved, strict=True)]
    assert len(set(kept)) == 2
    for before, after, same in zip(still, moved, kept, strict=True):
        expected = before["feature0"] if same else np.full_like(before["feature0"], np.nan)
        assert np.array_equal(after["feature0"], expected, equal_nan=True)


def test_no_mirror_images_of_organs_with_a_side(coded_case: CachedCase) -> None:
    sided = LabelSpace({"liver": 1, "kidney_left": 2})
    with pytest.raises(ConfigError, match="kidney_left"):
        dataset([coded_case], space=sided, augment=AugmentConfig(flip_axes=(2,)))
    dataset([coded_case], space=sided, augment=AugmentConfig(flip_axes=(0,)))
