from __future__ import annotations

import json
import shutil
from pathlib import Path

from pipeline.cache.schema import StorageConfig
from pipeline.data.registry import load_registry
from pipeline.data.sizes import case_sizes
from pipeline.setup.needs import CASES, Todo, find_todo
from pipeline.teachers.load import Teachers
from tests.tiny import cache_config, change_registry, work_of, write_teacher

ALL = ("train", "validation", "test")


def todo(registry_path: Path, storage: StorageConfig | None = None) -> Todo:
    registry = load_registry(registry_path)
    stored = storage or cache_config().storage
    teachers = Teachers(registry, cache_config().window, stored, "cpu").describe()
    sizes, _ = case_sizes(registry, ALL)
    return find_todo(work_of(registry_path), registry, sizes, teachers, stored)


def counts(found: Todo) -> dict[str, int]:
    return {what: len(cases) for what, cases in found.missing.items()}


def test_nothing_cached_all_to_make(built_cohort: Path) -> None:
    found = todo(built_cohort)
    assert counts(found) == {CASES: 9, "liver": 9, "spleen": 9}
    assert (found.num_missing, found.num_cached, found.cached_bytes) == (27, 0, 0)
    assert len(found.cases) == 9


def test_all_cached_nothing_to_make(built_cache: Path) -> None:
    found = todo(built_cache)
    assert counts(found) == {CASES: 0, "liver": 0, "spleen": 0}
    assert found.num_cached == 27
    files = [p for p in work_of(built_cache).rglob("*.zarr/**/*") if p.is_file()]
    on_disk = sum(p.stat().st_size for p in files if p.name != "receipt.json")
    assert found.cached_bytes == on_disk


def test_a_removed_and_a_damaged_unit_are_to_be_made(tiny_cached: Path) -> None:
    (removed,) = work_of(tiny_cached).glob("teachers/liver@*/multi-ct/case_001@*.zarr")
    shutil.rmtree(removed)
    (damaged,) = work_of(tiny_cached).glob("teachers/spleen@*/multi-ct/case_002@*.zarr")
    (damaged / "zarr.json").write_text("{}")
    found = todo(tiny_cached)
    assert counts(found) == {CASES: 0, "liver": 1, "spleen": 1}
    assert {c.source.name for c in found.cases} == {"multi-ct/case_001", "multi-ct/case_002"}


def test_what_changed_is_to_be_made_anew_and_the_others_stay(tiny_cached: Path) -> None:
    bits = cache_config().storage.log_odds_bits
    found = todo(tiny_cached, StorageConfig(log_odds_bits=bits + 1))
    assert counts(found) == {CASES: 9, "liver": 9, "spleen": 9}
    write_teacher(tiny_cached.parent / "teachers" / "liver.pt", "liver", seed=99)
    assert counts(todo(tiny_cached)) == {CASES: 0, "liver": 9, "spleen": 0}
    # Another meaning of labels leaves teachers' units.
    change_registry(tiny_cached, lambda r: r["datasets"]["liver-ct"].update(ignore_values=[7]))
    assert counts(todo(tiny_cached)) == {CASES: 3, "liver": 9, "spleen": 0}


def test_receipts_count_and_the_index_does_not(tiny_cached: Path) -> None:
    """Killed before the index was written, what is there is there."""
    shutil.rmtree(work_of(tiny_cached) / "index")
    assert todo(tiny_cached).num_missing == 0
    for receipt in work_of(tiny_cached).rglob("receipt.json"):
        content = json.loads(receipt.read_text())
        content["digest"] = "0" * 64
        receipt.write_text(json.dumps(content))
    assert todo(tiny_cached).num_cached == 0
