from __future__ import annotations

import os
import shutil
import socket
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from pipeline.cache.places import find_units
from pipeline.cache.store import write_json
from pipeline.cli.app import app
from pipeline.data.registry import Registry, load_registry
from pipeline.errors import ConfigError
from pipeline.log import Advance, Log
from pipeline.review import gc
from pipeline.review.gc import Garbage, find_garbage, remove_garbage
from pipeline.review.units import registry_reach
from pipeline.review.verify import verify
from tests.stages.stage_contract import content, snapshot
from tests.tiny import (
    cache_config,
    change_registry,
    copy_cohort,
    fill_cache,
    run_cache,
    work_of,
    write_teacher,
)
from tests.unit.review.damage import lose_receipt, unit_at

QUIET = Log(quiet=True)


def known(registry: Path) -> Registry:
    return load_registry(registry, files=False)


def garbage_of(registry: Path, *others: Path, grace_hours: float = 0) -> Garbage:
    registries = [known(path) for path in (registry, *others)]
    return find_garbage(work_of(registry), registries, grace_hours=grace_hours)


def collect(registry: Path, *others: Path) -> tuple[int, int]:
    registries = [known(path) for path in (registry, *others)]
    found = find_garbage(work_of(registry), registries, grace_hours=0)
    return remove_garbage(work_of(registry), registries, found, log=QUIET)


def names(garbage: Garbage) -> set[str]:
    return {place.name for place in garbage.units}


def drop(*teachers: str) -> Any:
    return lambda data: [data["teachers"].pop(teacher) for teacher in teachers]


def second_registry(registry: Path, change: Any) -> Path:
    """Another registry beside the first."""
    other = registry.with_name("other_registry.yaml")
    shutil.copy(registry, other)
    return change_registry(other, change)


def test_a_dropped_teacher_goes_with_its_entry_and_nothing_else(tiny_cached: Path) -> None:
    work = work_of(tiny_cached)
    kept = content(work, without=["teachers/liver@*", "index/*/liver.*"])
    change_registry(tiny_cached, drop("liver"))
    before = sum(p.stat().st_size for p in work.rglob("*") if p.is_file())
    found = garbage_of(tiny_cached)
    assert {place.teacher for place in found.units} == {"liver"}
    assert len(found.units) == 9
    names = [f"{path.parent.name}/{path.name.split('.')[0]}" for path in found.index_files]
    assert names == ["teachers/liver", "evidence/liver"]
    number, freed = collect(tiny_cached)
    assert (number, freed) == (11, found.total)
    assert before - sum(p.stat().st_size for p in work.rglob("*") if p.is_file()) == freed
    assert content(work) == kept
    assert [path.name.split("@")[0] for path in (work / "teachers").iterdir()] == ["spleen"]
    assert garbage_of(tiny_cached).count == 0


def test_what_another_named_registry_reaches_stays(tiny_cached: Path) -> None:
    other = second_registry(tiny_cached, drop("spleen"))
    change_registry(tiny_cached, drop("liver"))
    assert garbage_of(tiny_cached, other).count == 0
    assert {place.teacher for place in garbage_of(tiny_cached).units} == {"liver"}


def test_what_the_entries_of_another_project_call_for_stays_until_it_is_given_up(
    tiny_cached: Path,
) -> None:
    """Of another folder, with datasets and teachers of its own and some in common."""
    work = work_of(tiny_cached)
    other = copy_cohort(tiny_cached, tiny_cached.parent.parent / "B")
    shutil.rmtree(work_of(other))
    write_teacher(other.parent / "teachers" / "liver.pt", "liver", seed=9)

    def change(data: dict[str, Any]) -> None:
        data["datasets"]["theirs"] = data["datasets"].pop("spleen-ct")
        data["teachers"]["theirs"] = data["teachers"].pop("liver")
        data["teachers"]["spleen"]["trained_on"] = "theirs"

    change_registry(other, change)
    report = run_cache(
        cache_config(), load_registry(other), work, log=QUIET, device="cpu", tables=False
    )
    assert not report.failed
    before = snapshot(work)
    found = garbage_of(tiny_cached)
    assert (found.count, found.others) == (0, (f"{other} on {socket.gethostname()}",))
    assert collect(tiny_cached) == (0, 0)
    assert snapshot(work) == before
    arguments = ["cache", "gc", str(tiny_cached), "-w", str(work), "--grace-hours", "0", "--yes"]
    result = CliRunner().invoke(app, arguments)
    assert f"gc: kept what the index has for other registries: {other} on " in result.output
    assert snapshot(work) == before
    change_registry(other, drop("theirs"))
    assert {place.teacher for place in garbage_of(tiny_cached).units} == {"theirs"}
    other.unlink()
    gone = garbage_of(tiny_cached)
    assert {place.dataset for place in gone.units if place.teacher != "theirs"} == {"theirs"}
    assert gone.others == ()
    collect(tiny_cached)
    assert verify(work, known(tiny_cached), deep=False, everything=True, log=QUIET).checked == 27


def test_entries_of_another_host_stay_if_their_registry_is_not_here(
    tiny_cached: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fill_cache(tiny_cached)
    moved = tiny_cached.rename(tiny_cached.with_name("moved.yaml"))
    change_registry(moved, drop("liver"))
    assert {place.teacher for place in garbage_of(moved).units} == {"liver"}
    monkeypatch.setattr(socket, "gethostname", lambda: "elsewhere")
    assert garbage_of(moved).count == 0


def test_older_weights_and_older_cases_go(tiny_cached: Path) -> None:
    write_teacher(tiny_cached.parent / "teachers" / "liver.pt", "liver", seed=9)
    change_registry(
        tiny_cached, lambda data: data["datasets"]["multi-ct"].update(ignore_values=[9])
    )
    old = {place.path for place in find_units(work_of(tiny_cached))}
    fill_cache(tiny_cached)
    found = garbage_of(tiny_cached)
    assert {place.path for place in found.units} <= old
    assert sorted(place.name for place in found.units if place.teacher is None) == [
        "multi-ct/case_000", "multi-ct/case_001", "multi-ct/case_002",
    ]  # fmt: skip
    assert sum(place.teacher == "liver" for place in found.units) == 9
    # multi-ct as it was, and what was measured by the old cases: by both teachers
    assert [path.parent.name.split(".")[0] for path in found.index_files] == [
        *["multi-ct"] * 3, "evidence", "evidence",
    ]  # fmt: skip
    collect(tiny_cached)
    deep = verify(work_of(tiny_cached), known(tiny_cached), deep=True, everything=True, log=QUIET)
    assert (deep.checked, deep.findings) == (27, [])


def test_students_are_named_and_never_removed(tiny_cached: Path) -> None:
    work = work_of(tiny_cached)
    digest = next(
        unit.teacher.digest
        for unit in registry_reach(work, known(tiny_cached)).units.values()
        if unit.teacher is not None and unit.teacher.teacher == "liver"
    )
    run = work / "students" / "run-1"
    inputs = {"teachers": {"liver": digest}, "cases": {"liver-ct/case_000": "0" * 64}}
    write_json(run / "config.json", {"inputs": inputs})
    (run / "checkpoints").mkdir()
    (run / "checkpoints" / "step.pt").write_bytes(b"x")
    change_registry(tiny_cached, drop("liver"))
    found = garbage_of(tiny_cached)
    used = {place.name for place in found.units if found.students[place.path] == ["run-1"]}
    assert used == {"liver x liver-ct/case_000"}
    before = snapshot(run)
    collect(tiny_cached)
    assert snapshot(run) == before


def test_what_is_not_laid_out_as_a_cache_is_left_alone(tiny_cached: Path) -> None:
    work = work_of(tiny_cached)
    mine = [
        work / "cases" / "notes.txt",
        work / "cases" / "multi-ct" / "copy of case_000.zarr",
        work / "teachers" / "my-own-teacher.pt",
        work / "teachers" / "liver" / "multi-ct" / f"c@{'0' * 16}.zarr",
        work / "index" / "README",
        work / "reports" / "x.json",
        work / "teachers-in-training" / f"t@{'0' * 16}" / "d" / f"c@{'0' * 16}.zarr",
    ]
    for path in mine:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("mine")
    assert garbage_of(tiny_cached).count == 0
    collect(tiny_cached)
    assert all(path.read_text() == "mine" for path in mine)


def test_units_without_a_receipt_go_too_if_nobody_reaches_them(tiny_cached: Path) -> None:
    work = work_of(tiny_cached)
    lose_receipt(unit_at(work, "liver x multi-ct/case_000"))
    lose_receipt(unit_at(work, "spleen x multi-ct/case_000"))
    change_registry(tiny_cached, drop("liver"))
    assert "liver x multi-ct/case_000" in names(garbage_of(tiny_cached))
    collect(tiny_cached)
    assert unit_at(work, "spleen x multi-ct/case_000").is_dir()


# --- refusals -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda data: data["teachers"]["liver"].update(taps=[]), "teacher liver"),
        (lambda data: data["datasets"]["multi-ct"].update(ignore_values=[9]), "dataset multi-ct"),
        (lambda data: data["grid"].update(spacing_mm=[12.0, 12.0, 10.0]), "dataset liver-ct"),
    ],
)
def test_a_registry_that_was_not_cached_as_it_stands(
    tiny_cached: Path, change: Any, named: str
) -> None:
    change_registry(tiny_cached, change)
    with pytest.raises(ConfigError, match=named) as caught:
        garbage_of(tiny_cached)
    assert caught.value.exit_code == 2
    assert "Nothing was removed" in str(caught.value)
    assert str(tiny_cached) in str(caught.value)


def test_an_unreadable_entry_of_a_named_registry_stops_it(tiny_cached: Path) -> None:
    (path,) = (work_of(tiny_cached) / "index" / "teachers").glob("liver.*.json")
    path.write_text("{")
    with pytest.raises(ConfigError, match="teacher liver"):
        garbage_of(tiny_cached)


# --- beside a stage that runs ---------------------------------------------------------------------


def test_temporaries_of_the_living_and_of_other_hosts_stay(tiny_cached: Path) -> None:
    process = subprocess.Popen(["true"])
    process.wait()
    here = socket.gethostname()
    folder = unit_at(work_of(tiny_cached), "liver x multi-ct/case_000").parent
    dead = folder / f".c@{'0' * 16}.zarr~{here}~{process.pid}~ab.tmp"
    living = folder / f".c@{'0' * 16}.zarr~{here}~{os.getpid()}~ab.tmp"
    elsewhere = folder / f".c@{'0' * 16}.zarr~not-{here}~{process.pid}~ab.tmp"
    for path in (dead, living, elsewhere):
        (path / "image").mkdir(parents=True)
        (path / "image" / "x").write_bytes(b"12345")
    found = garbage_of(tiny_cached)
    assert (found.temporaries, found.count, found.total) == ((dead,), 1, 5)
    assert collect(tiny_cached) == (1, 5)
    assert [path.exists() for path in (dead, living, elsewhere)] == [False, True, True]


def test_young_case_units_stay_for_stage_one_to_index_them(tiny_cached: Path) -> None:
    """Between writing the cases and indexing them, a running stage has nobody who reaches them."""
    change_registry(
        tiny_cached, lambda data: data["datasets"].pop("multi-ct") and data["teachers"].pop("liver")
    )
    registries = [known(tiny_cached)]
    young = find_garbage(work_of(tiny_cached), registries, grace_hours=1)
    assert {place.name for place in young.young} == {f"multi-ct/case_00{n}" for n in range(3)}
    # Units of teachers are indexed before they are written, so that their age does not matter.
    assert {place.teacher for place in young.units} == {"liver", "spleen"}
    old = find_garbage(work_of(tiny_cached), registries, grace_hours=0)
    assert names(old) == names(young) | {place.name for place in young.young}
    assert old.young == ()


def test_what_comes_to_be_reached_meanwhile_stays(tiny_cached: Path) -> None:
    """An index entry moves back to units that were found unreached, after the question was put."""
    work = work_of(tiny_cached)
    teacher = tiny_cached.parent / "teachers" / "liver.pt"
    first = teacher.read_bytes()
    write_teacher(teacher, "liver", seed=9)
    fill_cache(tiny_cached)
    found = garbage_of(tiny_cached)
    assert len(found.units) == 9
    teacher.write_bytes(first)
    fill_cache(tiny_cached)
    assert remove_garbage(work, [known(tiny_cached)], found, log=QUIET) == (0, 0)
    assert all(place.path.is_dir() for place in found.units)


def test_the_index_is_read_again_while_units_go(
    tiny_cached: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    work, whole = work_of(tiny_cached), known(tiny_cached)
    registries = [known(change_registry(tiny_cached, drop("liver")))]
    found = find_garbage(work, registries, grace_hours=0)
    looked_at: list[str] = []

    class Meanwhile(Log):
        @contextmanager
        def progress(self, what: str, total: int, *, done: int = 0) -> Iterator[Advance]:
            yield self.advance

        def advance(self, note: str = "", steps: int = 1) -> None:
            """After the third unit, the registry has this teacher again."""
            looked_at.append(note)
            if len(looked_at) == 3:
                registries[:] = [whole]

    monkeypatch.setattr(gc, "_RECHECK_EVERY", 2)
    assert remove_garbage(work, registries, found, log=Meanwhile(quiet=True))[0] == 4
    assert len(looked_at) == 9
