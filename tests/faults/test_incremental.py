"""Adding, swapping or dropping a teacher writes into that teacher's folder alone, and a student
writes nothing into the cache: every file that a process opens for writing is counted."""

from __future__ import annotations

from collections.abc import Mapping
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import pytest

from tests.faults.nursery import Job, Nursery
from tests.faults.small import TEACHERS, teacher, write_registry
from tests.stages.stage_contract import snapshot
from tests.tiny import work_of

OLD = {name: teacher(hu) for name, hu in TEACHERS.items()}
OF_EACH_RUN = ("index/*", "reports/*", "events.jsonl", ".writable~*")


def touched(nursery: Nursery, job: str, registry: Path, **args: Any) -> dict[str, int]:
    """Runs a job; returns file, relative to the work folder -> bytes that it now has (a temporary:
    0), for every file that was opened for writing, renamed into place, or is not what it was."""
    work = work_of(registry)
    before = snapshot(work)
    (outcome,) = nursery.run(Job(job, {"registry": str(registry), **args}))
    assert outcome.status == 0, outcome.output
    assert outcome.result["exit_code"] == 0
    after = snapshot(work)
    assert set(before) <= set(after), "something was removed"
    found = {Path(path).relative_to(work).as_posix() for path in outcome.result["written"]}
    found |= {name for name, entry in after.items() if before.get(name) != entry}
    sizes = {}
    for name in found:
        path = work / name
        if not path.is_dir() and not any(fnmatch(name, pattern) for pattern in OF_EACH_RUN):
            sizes[name] = path.stat().st_size if path.exists() else 0
    return sizes


@pytest.mark.parametrize(
    ("what", "teachers"),
    [
        ("added", {**OLD, "three": teacher(40.0)}),
        ("swapped", {**OLD, "two": teacher(120.0)}),
    ],
)
def test_a_new_teacher_writes_into_its_own_folder_alone(
    nursery: Nursery, small_cached: Path, what: str, teachers: Mapping[str, Any]
) -> None:
    work = work_of(small_cached)
    before = set(work.glob("teachers/*"))
    write_registry(small_cached, teachers)
    written = touched(nursery, "cache", small_cached)
    (folder,) = set(work.glob("teachers/*")) - before
    assert folder.name.startswith("three@" if what == "added" else "two@")
    files = {p.relative_to(work).as_posix(): p.stat().st_size for p in folder.rglob("*")
             if p.is_file()}  # fmt: skip
    assert files
    assert {name: size for name, size in written.items() if size} == files
    inside = f"{folder.relative_to(work).as_posix()}/"
    assert [name for name in written if not name.startswith(inside)] == []


def test_a_dropped_teacher_touches_nothing(nursery: Nursery, small_cached: Path) -> None:
    write_registry(small_cached, {"one": OLD["one"]})
    assert touched(nursery, "cache", small_cached) == {}


def test_a_second_run_touches_nothing(nursery: Nursery, small_cached: Path) -> None:
    assert touched(nursery, "cache", small_cached) == {}


def test_a_student_with_other_settings_touches_nothing(
    nursery: Nursery, small_cached: Path
) -> None:
    for changes in ({}, {"steps": 3, "patch": [12, 12, 12], "seed": 5}):
        args = {**changes, "run": f"student-{len(changes)}"}
        written = touched(nursery, "train", small_cached, **args)
        assert written
        assert {name.split("/")[0] for name in written} == {"students"}
