from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from typer.testing import CliRunner

from pipeline.cli.app import app
from pipeline.data.registry import load_registry
from pipeline.review.status import STATES, status
from tests.tiny import change_registry, repaint, work_of, write_teacher


def states(registry: Path) -> dict[tuple[str, str, str], str]:
    return dict(status(load_registry(registry, files=False), work_of(registry)).units)


def not_done(registry: Path) -> dict[tuple[str, str, str], str]:
    return {unit: state for unit, state in states(registry).items() if state != "done"}


def test_nothing_cached_is_missing(tiny_registry: Path) -> None:
    found = states(tiny_registry)
    assert len(found) == 9 * 3
    assert set(found.values()) == {"missing"}
    assert not work_of(tiny_registry).exists()


def test_all_cached_is_done(built_cache: Path) -> None:
    found = states(built_cache)
    assert set(found.values()) == {"done"}
    assert {(d, w) for d, w, _ in found} == {
        (d, w) for d in ("liver-ct", "spleen-ct", "multi-ct") for w in ("cases", "liver", "spleen")
    }


def test_another_image_makes_its_units_stale(tiny_cached: Path) -> None:
    repaint(tiny_cached.parent / "data" / "liver-ct" / "images" / "case_001.nii.gz")
    assert not_done(tiny_cached) == {
        ("liver-ct", what, "case_001"): "stale" for what in ("cases", "liver", "spleen")
    }


def test_other_weights_make_all_units_of_that_teacher_stale(tiny_cached: Path) -> None:
    write_teacher(tiny_cached.parent / "teachers" / "liver.pt", "liver", seed=99)
    found = not_done(tiny_cached)
    assert len(found) == 9
    assert {(what, state) for (_, what, _), state in found.items()} == {("liver", "stale")}


def test_another_dataset_entry_makes_its_cases_stale(tiny_cached: Path) -> None:
    change_registry(
        tiny_cached, lambda data: data["datasets"]["liver-ct"]["annotated"].update(liver=[1, 2])
    )
    found = not_done(tiny_cached)
    assert {d for d, _, _ in found} == {"liver-ct"}
    assert {state for (_, what, _), state in found.items() if what == "cases"} == {"stale"}


def test_another_teacher_entry_and_a_new_teacher(tiny_cached: Path) -> None:
    def change(data: dict[str, dict[str, dict[str, object]]]) -> None:
        data["teachers"]["liver"]["taps"] = []
        data["teachers"]["liver-2"] = dict(data["teachers"]["spleen"])

    change_registry(tiny_cached, change)
    found = not_done(tiny_cached)
    assert {(what, state) for (_, what, _), state in found.items()} == {
        ("liver", "stale"),
        ("liver-2", "missing"),
    }


def test_removed_and_damaged_units(tiny_cached: Path) -> None:
    work = work_of(tiny_cached)
    (gone,) = work.glob("teachers/liver@*/multi-ct/case_001@*.zarr")
    shutil.rmtree(gone)
    (broken,) = work.glob("cases/multi-ct/case_002@*.zarr")
    next(p for p in broken.rglob("c/**/*") if p.is_file()).unlink()
    assert not_done(tiny_cached) == {
        ("multi-ct", "liver", "case_001"): "missing",
        ("multi-ct", "cases", "case_002"): "damaged",
    }


def test_where_the_raw_data_are_not_the_cache_is_not_stale(tiny_cached: Path) -> None:
    shutil.rmtree(tiny_cached.parent / "data")
    shutil.rmtree(tiny_cached.parent / "teachers")
    found = states(tiny_cached)
    assert len(found) == 27
    assert set(found.values()) == {"done"}


def test_runs_of_students(tiny_registry: Path) -> None:
    students = work_of(tiny_registry) / "students"
    for run in ("a", "b"):
        (students / run).mkdir(parents=True)
    (students / "a" / "finished.json").write_text("{}")
    found = status(load_registry(tiny_registry), work_of(tiny_registry))
    assert found.runs == {"a": "finished", "b": "unfinished"}


@pytest.mark.parametrize("arguments", [[], ["--json"]])
def test_the_command(tiny_cached: Path, arguments: list[str]) -> None:
    work = work_of(tiny_cached)
    (gone,) = work.glob("teachers/liver@*/multi-ct/case_001@*.zarr")
    shutil.rmtree(gone)
    command = ["status", "-r", str(tiny_cached), "-w", str(work), *arguments]
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 0
    if not arguments:
        assert "multi-ct" in result.stdout
        return
    found = json.loads(result.stdout)
    assert set(found) == {"counts", "not_done", "runs", "jobs"}
    assert found["not_done"] == [
        {"dataset": "multi-ct", "unit": "liver", "case": "case_001", "state": "missing"}
    ]
    assert len(found["counts"]) == 9
    for row in found["counts"]:
        assert set(row) == {"dataset", "unit", *STATES}
        assert sum(row[state] for state in STATES) == 3
    (row,) = (r for r in found["counts"] if (r["dataset"], r["unit"]) == ("multi-ct", "liver"))
    assert (row["done"], row["missing"]) == (2, 1)
