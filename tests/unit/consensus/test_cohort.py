from __future__ import annotations

import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import dask
import dask.array as da
import numpy as np
import pytest

from pipeline.cache.reader import CachedCase
from pipeline.consensus.cohort import (
    Cohort,
    RegionRules,
    compute,
    known_organs,
    lazy_consensus,
    lazy_patch,
    open_cohort,
)
from pipeline.data.patches import Patch
from pipeline.data.registry import load_registry
from pipeline.errors import CacheIncomplete, CacheMissing
from tests.stages.stage_contract import snapshot
from tests.tiny import change_registry, work_of

NAMES = ("log_odds", "organ", "background", "conflict", "abstained")
TEACHERS = ("liver", "spleen")


def opened(registry: Path, **options: Any) -> Cohort:
    options.setdefault("teachers", TEACHERS)
    return open_cohort(work_of(registry), load_registry(registry, files=False), **options)


def find(cohort: Cohort, name: str) -> CachedCase:
    (case,) = (c for c in cohort.cases if c.name == name)
    return case


def regions(case: CachedCase, registry: Path, **options: Any) -> dict[str, Any]:
    space = load_registry(registry, files=False).label_space
    found, _ = lazy_consensus(case, space, RegionRules(**options))
    return dict(zip(NAMES, compute(*(getattr(found, n) for n in NAMES)), strict=True))


def test_all_cases_with_their_splits_and_organs(built_cache: Path) -> None:
    cohort = opened(built_cache)
    assert not cohort.problems
    assert len(cohort.cases) == 9
    assert Counter(c.split for c in cohort.cases) == {"train": 4, "validation": 3, "test": 2}
    assert find(cohort, "spleen-ct/case_000").annotated == ("spleen",)
    assert find(cohort, "multi-ct/case_001").annotated == ("liver", "spleen")
    assert set(cohort.cases[0].teachers) == {"liver", "spleen"}


def test_what_is_not_asked_for_is_not_opened(built_cache: Path) -> None:
    cohort = opened(built_cache, datasets=["liver-ct"], splits=("train",), teachers=["spleen"])
    assert {c.name for c in cohort.cases} == {"liver-ct/case_001", "liver-ct/case_002"}
    assert set(cohort.teachers) == {"spleen"}
    assert cohort.cases[0].experts == {"liver": [], "spleen": ["spleen"]}


def test_the_consensus_is_of_what_is_cached(built_cache: Path) -> None:
    case = find(opened(built_cache), "liver-ct/case_001")
    found = regions(case, built_cache)
    label = case.label()
    np.testing.assert_array_equal(found["organ"][0], label == 1)
    spleen = case.log_odds("spleen", "spleen")
    elsewhere = label != 1
    np.testing.assert_array_equal(found["log_odds"][1][elsewhere], spleen[elsewhere])
    assert np.all(found["log_odds"][1][label == 1] <= -6)
    teachers_alone = regions(case, built_cache, labels_win=False)
    np.testing.assert_array_equal(teachers_alone["log_odds"][1], spleen)
    np.testing.assert_array_equal(teachers_alone["organ"][0], case.log_odds("liver", "liver") > 0)


def test_margin_and_confidence_reach_the_regions(built_cache: Path) -> None:
    case = find(opened(built_cache), "liver-ct/case_001")
    odds = case.log_odds("spleen", "spleen").astype(np.float32)
    margin = float(np.median(np.abs(odds)))
    found = regions(case, built_cache, margin=margin, labels_win=False)
    np.testing.assert_array_equal(found["organ"][1], odds > margin)
    assert 0 < np.sum(odds > margin) < np.sum(odds > 0)
    sure = regions(case, built_cache, confidence=9.0)["log_odds"]
    assert np.abs(sure[0]).min() == 9.0


def test_a_patch_is_one_task_that_reads_each_array_once(
    built_cache: Path, reads: list[tuple[str, int]]
) -> None:
    case = find(opened(built_cache), "liver-ct/case_001")
    space = load_registry(built_cache, files=False).label_space
    patch = Patch((0, 0, 0), (16, 16, 16))
    classes = np.zeros(patch.shape, np.uint8)
    lazy = lazy_patch(case, space, RegionRules(), patch, classes)
    assert len(lazy.__dask_graph__()) == 1
    assert not reads
    compute(lazy)
    arrays = ["liver/log_odds/liver", "spleen/log_odds/spleen"]
    assert sorted(name for name, _ in reads) == arrays


def test_organs_that_nobody_knows_are_left_out(built_cache: Path) -> None:
    space = load_registry(built_cache, files=False).label_space
    case = find(opened(built_cache, teachers=["spleen"]), "liver-ct/case_001")
    assert known_organs(case, space) == [0, 1]
    assert known_organs(case, space, labels_win=False) == [1]
    assert known_organs(find(opened(built_cache, teachers=[]), "liver-ct/case_001"), space) == [0]


def test_an_organ_known_by_its_label_alone(built_cache: Path) -> None:
    case = find(opened(built_cache, teachers=["spleen"]), "liver-ct/case_001")
    found = regions(case, built_cache)
    label = case.label()
    np.testing.assert_array_equal(found["organ"][0], label == 1)
    assert set(np.unique(found["log_odds"][0])) == {-6, 6}


def test_missing_and_damaged_units_are_problems_and_the_case_stays(tiny_cached: Path) -> None:
    work = work_of(tiny_cached)
    (gone,) = work.glob("teachers/liver@*/multi-ct/case_001@*.zarr")
    shutil.rmtree(gone)
    (broken,) = work.glob("teachers/spleen@*/liver-ct/case_002@*.zarr")
    next(p for p in broken.rglob("c/**/*") if p.is_file()).unlink()
    cohort = opened(tiny_cached)
    assert {n: type(e) for n, e in cohort.problems.items()} == {
        "liver x multi-ct/case_001": CacheMissing,
        "spleen x liver-ct/case_002": CacheIncomplete,
    }
    assert len(cohort.cases) == 9
    case = find(cohort, "multi-ct/case_001")
    assert set(case.teachers) == {"spleen"}
    assert case.experts == {"liver": [], "spleen": ["spleen"]}


def test_dropping_a_teacher_changes_the_regions_at_once_and_no_file(tiny_cached: Path) -> None:
    before = snapshot(work_of(tiny_cached))
    both = regions(find(opened(tiny_cached), "liver-ct/case_001"), tiny_cached)
    change_registry(tiny_cached, lambda data: data["teachers"].pop("spleen"))
    cohort = opened(tiny_cached, teachers=["liver"])
    case = find(cohort, "liver-ct/case_001")
    alone = regions(case, tiny_cached)
    assert (both["organ"].shape[0], alone["organ"].shape[0]) == (2, 1)
    outside = case.label() != 1
    np.testing.assert_array_equal(alone["background"], outside)
    assert both["background"].sum() < alone["background"].sum()
    assert snapshot(work_of(tiny_cached)) == before


def test_computing_does_not_import_distributed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each loader process would pay for it, and none uses it."""
    monkeypatch.setattr(dask.base, "_distributed_available", lambda: pytest.fail("asked for it"))
    assert compute(da.ones(3).sum()) == (3.0,)
