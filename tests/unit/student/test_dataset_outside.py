"""Patches that reach beyond their case: what lies outside is unknown, in every array."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipeline.cache.reader import CachedCase
from pipeline.data.labels import IGNORE
from pipeline.student.augment import AugmentConfig
from pipeline.student.dataset import AIR_HU
from pipeline.student.settings import Kind, SupervisionConfig
from tests.unit.student.coded import TAP, place, write_case
from tests.unit.student.samples import CACHED, MOVING, STILL, arrays, check_places, dataset

SMALL = (16, 12, 14)
PATCHES = [(20, 12, 20), (24, 24, 24), (16, 12, 40)]


@pytest.fixture(scope="module")
def small(coded_folder: Path) -> CachedCase:
    return write_case(coded_folder, "liver-ct/b", shape=SMALL)


@pytest.mark.parametrize("patch", PATCHES)
@pytest.mark.parametrize("kind", ["naive", "marginal", "pseudo_label", "ms_kd", "full"])
@pytest.mark.parametrize("augment", [STILL, MOVING], ids=["still", "moving"])
def test_what_lies_outside_is_unknown_whatever_the_supervision(
    small: CachedCase, patch: tuple[int, int, int], kind: Kind, augment: AugmentConfig
) -> None:
    supervision = SupervisionConfig(kind=kind, labels_win=False)
    sample = dataset([small], patch=patch, supervision=supervision, augment=augment)[0]
    found = arrays(sample)
    inside, voxels = place(found["image"][0], SMALL)
    assert len(voxels) == np.prod(SMALL)
    assert found["image"].shape == (1, *patch)
    assert (found["image"][0][~inside] == AIR_HU).all()
    assert (found["classes"][~inside] == IGNORE).all()
    assert (found["classes"][inside] != IGNORE).all()
    if supervision.uses_teachers:
        check_places(sample, SMALL)
        assert np.isnan(found["log_odds"][:, ~inside]).all()
    else:
        assert "log_odds" not in found


def test_labels_do_not_win_where_there_is_no_case(small: CachedCase) -> None:
    found = arrays(dataset([small], patch=(24, 24, 24), supervision=SupervisionConfig())[0])
    outside = found["classes"] == IGNORE
    assert outside.sum() == 24**3 - np.prod(SMALL)
    assert np.isnan(found["log_odds"][:, outside]).all()


def test_cells_outside_are_not_seen(small: CachedCase) -> None:
    data = dataset([small], patch=(20, 12, 20), taps={TAP: CACHED})
    found = arrays(data[0])
    cells = place(found["image"][0], SMALL)[0][::2, ::2, ::2]
    assert 0 < cells.sum() < cells.size
    assert np.isnan(found["feature0"][:, ~cells]).all()
    assert np.isfinite(found["feature0"][:, cells]).all()


class TestRemarks:
    def test_the_smallest_case_is_named(self, coded_cases: list[CachedCase]) -> None:
        (remark,) = dataset(coded_cases, patch=(20, 20, 20)).remarks()
        assert "far larger than 1 of 5 cases" in remark
        assert "of liver-ct/b (16, 12, 14) at most 34% of a patch is image" in remark
        (remark,) = dataset(coded_cases, patch=(40, 40, 40)).remarks()
        assert "larger than 5 of 5 cases" in remark
        assert "liver-ct/b" in remark

    def test_an_organ_that_no_case_shows_is_named(self, coded_folder: Path) -> None:
        only_label: Any = write_case(coded_folder, "liver-ct/only-label", teachers=())
        (remark,) = dataset([only_label]).remarks()
        assert "no training case shows spleen" in remark

    def test_nothing_is_said_where_all_is_well(self, coded_cases: list[CachedCase]) -> None:
        assert dataset(coded_cases).remarks() == []
        # As `plan --student` proposes: rounded up to the network's strides.
        assert dataset(coded_cases, patch=(17, 10, 10)).remarks() == []
