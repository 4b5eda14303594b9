from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from pipeline.cache.index import read_index
from pipeline.config import short
from pipeline.data.registry import load_registry
from pipeline.review.status import Listing, list_cache, print_listing
from pipeline.review.units import in_few_words, run_folders, seconds_since
from tests.tiny import TAP, change_registry, work_of
from tests.unit.review.damage import shard, unit_at


def listing(registry: Path, *, named: bool = True) -> Listing:
    return list_cache(work_of(registry), load_registry(registry, files=False) if named else None)


def test_everything_that_is_there(built_cache: Path) -> None:
    found = listing(built_cache)
    assert [e.name for e in found.datasets] == ["liver-ct", "multi-ct", "spleen-ct"]
    assert [e.name for e in found.teachers] == ["liver", "spleen"]
    for entry in found.datasets:
        assert (entry.cases, entry.units, entry.damaged, entry.reached) == (3, 3, 0, 3)
        assert (entry.digest, entry.organs, entry.taps, entry.students) == ("", (), (), ())
        assert len(entry.keys) == 1
    for entry in found.teachers:
        assert (entry.cases, entry.units, entry.damaged, entry.reached) == (9, 9, 0, 9)
        assert (entry.organs, entry.taps) == ((entry.name,), (TAP,))
    files = [p for p in work_of(built_cache).rglob("*.zarr/**/*") if p.is_file()]
    size = sum(p.stat().st_size for p in files if p.name != "receipt.json")
    assert sum(e.num_bytes for e in (*found.datasets, *found.teachers)) == size
    assert found.to_json()["bytes"] == size


def test_what_the_registry_no_longer_means_is_listed_and_not_reached(tiny_cached: Path) -> None:
    change_registry(tiny_cached, lambda data: data["teachers"].pop("liver"))
    found = listing(tiny_cached)
    assert {e.name: e.reached for e in found.teachers} == {"liver": 0, "spleen": 9}
    (liver,) = (e for e in found.teachers if e.name == "liver")
    keys = {short(f.key) for f in read_index(work_of(tiny_cached))[0] if f.teacher}
    assert set(liver.keys) <= keys
    assert len(liver.keys) == 1


def test_without_its_index_a_teacher_is_known_by_its_arrays(tiny_cached: Path) -> None:
    shutil.rmtree(work_of(tiny_cached) / "index")
    found = listing(tiny_cached)
    assert [(e.organs, e.taps) for e in found.teachers] == [
        (("liver",), (TAP,)),
        (("spleen",), (TAP,)),
    ]
    assert {e.reached for e in found.teachers} == {0}
    assert {e.keys for e in (*found.datasets, *found.teachers)} == {()}


def test_damaged_units_are_counted(tiny_cached: Path) -> None:
    work = work_of(tiny_cached)
    unit = unit_at(work, "liver x multi-ct/case_001")
    shard(unit, "log_odds/liver").unlink()
    (entry,) = (e for e in listing(tiny_cached).teachers if e.name == "liver")
    assert (entry.units, entry.damaged) == (9, 1)


def student(registry: Path, run: str, **inputs: Any) -> Path:
    folder = work_of(registry) / "students" / run
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps({"config": {}, "inputs": inputs}))
    return folder


def test_which_students_used_what(tiny_cached: Path) -> None:
    teachers = {
        f.teacher.teacher: f.teacher.digest
        for f in read_index(work_of(tiny_cached))[0]
        if f.teacher
    }
    cases = {c.name: c.digest for f in read_index(work_of(tiny_cached))[0] for c in f.cases or ()}
    mine = {"liver-ct/case_000": cases["liver-ct/case_000"]}
    student(tiny_cached, "a", teachers={"liver": teachers["liver"]}, cases=mine)
    student(tiny_cached, "b", teachers={"liver": "0" * 64}, cases={}, validation=mine)
    folder = student(tiny_cached, "c", teachers=teachers, cases=mine)
    (folder / "finished.json").write_text("{}")
    broken = student(tiny_cached, "d")
    (broken / "config.json").write_text("{")
    found = listing(tiny_cached)
    assert {e.name: e.students for e in found.teachers} == {"liver": ("a", "c"), "spleen": ("c",)}
    assert {e.name: e.students for e in found.datasets} == {
        "liver-ct": ("a", "b", "c"),
        "multi-ct": (),
        "spleen-ct": (),
    }
    assert [(r.run, r.finished) for r in found.students] == [
        ("a", False), ("b", False), ("c", True), ("d", False),
    ]  # fmt: skip


def test_the_tables(tiny_cached: Path, capsys: pytest.CaptureFixture[str]) -> None:
    student(tiny_cached, "run-1", teachers={}, cases={})
    print_listing(listing(tiny_cached))
    shown = capsys.readouterr().out
    (row,) = (line for line in shown.splitlines() if "liver + 1 tap" in line)
    assert "9 of 9" in row
    assert "run-1" in shown
    print_listing(list_cache(work_of(tiny_cached) / "nothing"))
    assert "holds no units" in capsys.readouterr().out


def test_ages() -> None:
    assert seconds_since("1970-01-01T00:01:00Z", now=100) == 40
    assert seconds_since("1970-01-01T00:01:00Z", now=0) == -60
    assert seconds_since("yesterday") == float("inf")


def test_runs_of_a_comparison_are_found_and_counted(tiny_cached: Path) -> None:
    for run in ("kinds/a-seed0", "kinds/a-seed1", "alone"):
        student(tiny_cached, run)
    (work_of(tiny_cached) / "students" / "kinds" / "budget.json").write_text("{}")
    assert list(run_folders(work_of(tiny_cached))) == ["alone", "kinds/a-seed0", "kinds/a-seed1"]
    assert in_few_words(run_folders(work_of(tiny_cached))) == "alone, kinds (2 runs)"
    assert in_few_words([]) == "–"
