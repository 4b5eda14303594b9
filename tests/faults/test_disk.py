"""A full disk in the middle, a limit on file sizes, and folders that cannot be written.

Disks and read-only folders are mounts in a process of their own; where that is not permitted the
tests skip and say so.
"""

from __future__ import annotations

import random
import shutil
from pathlib import Path
from typing import Any

import pytest

from tests.faults.ledger import LEDGER, how_many
from tests.faults.nursery import Job, Nursery
from tests.faults.small import content, files_of, hidden, place_named, run_stage, unit_names
from tests.stages.test_predict import write_ct, write_student
from tests.tiny import copy_cohort, work_of


def one(nursery: Nursery, name: str, registry: Path, **args: Any) -> dict[str, Any]:
    (outcome,) = nursery.run(Job(name, {"registry": str(registry), **args}))
    assert outcome.status == 0, outcome.output
    if "impossible" in outcome.result:
        pytest.skip(outcome.result["impossible"])
    result: dict[str, Any] = outcome.result
    return result


# What stage one writes besides units.
TOLD = (
    "cache-teachers.json",
    "admission.json",
    "evidence of teacher one",
    "evidence of teacher two",
)


def test_a_disk_that_fills_up_at_any_moment(
    nursery: Nursery, small_built: Path, tmp_path: Path
) -> None:
    rng = random.Random(5)
    for number in range(how_many(6, 40)):
        registry = copy_cohort(small_built, tmp_path / str(number))
        fill_at = rng.randint(3, 300)
        told = one(nursery, "full_disk", registry, fill_at=fill_at)
        full, names = told["full"], unit_names(registry)
        where = f"filled before operation {fill_at}: {full}"
        if "stopped" in full:
            assert full["stopped"].startswith("WorkFolderError: "), where
            assert str(work_of(registry)) in full["stopped"], where
            assert full["exit_code"] == 2, where
        else:
            assert full["exit_code"] == (2 if full["failed"] else 0), where
            for unit, text in full["failed"].items():
                assert unit in (*names, *TOLD), where
                assert "cannot be written" in text, where
            assert not set(full["done"]) & set(full["failed"]), where
        assert told["damaged"] == [], where
        again = told["again"]
        assert (again["failed"], again["exit_code"]) == ({}, 0), where
        assert sorted(again["done"] + again["skipped"]) == sorted(names), where
        assert told["damaged_again"] == [], where
        LEDGER.add("a disk that fills up")
        shutil.rmtree(registry.parent)


def test_a_file_that_may_not_grow_fails_its_units_alone(
    nursery: Nursery, small: Path, undisturbed: Path
) -> None:
    """The limit is between the sizes of log-odds and of the image."""
    sizes = [
        max(path.stat().st_size for path in files_of(place_named(work_of(undisturbed), name).path))
        for name in ("liver-ct/case_000", "one x liver-ct/case_000")
    ]
    cases = {f"liver-ct/case_{n:03}" for n in range(3)}
    assert sizes[0] != sizes[1]
    told = one(nursery, "cache", small, file_limit=sum(sizes) // 2)
    fails = cases if sizes[0] > sizes[1] else unit_names(small) - cases
    assert set(told["failed"]) == fails
    for text in told["failed"].values():
        assert text.startswith("WorkFolderError: ")
        assert "File too large" in text
    assert told["exit_code"] == 2
    assert hidden(work_of(small)) == []
    report = run_stage(small)
    assert (set(report.skipped), report.exit_code) == (set(told["done"]), 0)
    assert content(work_of(small)) == content(work_of(undisturbed))
    LEDGER.add("a limit on the size of files")


def test_a_cache_that_cannot_be_written_is_read_and_refuses_a_run(
    nursery: Nursery, small_cached: Path
) -> None:
    before = content(work_of(small_cached))
    told = one(nursery, "read_only", small_cached, folder=".")
    assert told["stopped"].startswith(f"WorkFolderError: {work_of(small_cached)}")
    assert "Read-only file system" in told["stopped"]
    assert told["exit_code"] == 2
    assert told["damaged"] == []
    assert content(work_of(small_cached)) == before
    LEDGER.add("a read-only cache")


@pytest.mark.parametrize("part", ["cases", "teacher", "index", "reports"])
def test_a_part_of_the_cache_that_cannot_be_written(
    nursery: Nursery, small_cached: Path, undisturbed: Path, part: str
) -> None:
    work = work_of(small_cached)
    for name in ("liver-ct/case_001", "one x liver-ct/case_002", "two x liver-ct/case_002"):
        shutil.rmtree(place_named(work, name).path)
    for path in (*files_of(work / "index"), *files_of(work / "reports")):
        path.unlink()
    (folder,) = work.glob("teachers/one@*" if part == "teacher" else part)
    told = one(nursery, "read_only", small_cached, folder=folder.relative_to(work).as_posix())
    if part == "index":
        assert told["stopped"].startswith("WorkFolderError: ")
        assert str(folder) in told["stopped"]
    else:
        failed = {
            "cases": "liver-ct/case_001",
            "teacher": "one x liver-ct/case_002",
            "reports": "cache-teachers.json",
        }[part]
        also = {"admission.json"} if part == "reports" else set()
        assert set(told["failed"]) == {failed, *also}
        assert str(folder) in told["failed"][failed]
        assert "two x liver-ct/case_002" in told["done"]
    assert told["exit_code"] == 2
    report = run_stage(small_cached)
    assert (report.failed, report.exit_code) == ({}, 0)
    assert content(work) == content(work_of(undisturbed))
    LEDGER.add("a part of the cache that is read-only")


@pytest.fixture(scope="module")
def predicting(nursery: Nursery, tmp_path_factory: pytest.TempPathFactory) -> Nursery:
    """It has imported what predicting needs: each child would take seconds for that."""
    folder = to_predict(tmp_path_factory.mktemp("predict") / "warm")
    nursery.warm(Job("modules", {"job": "predict", "folder": str(folder)}))
    return nursery


def test_predictions_on_a_disk_that_fills_up_at_any_moment(
    predicting: Nursery, tmp_path: Path
) -> None:
    """A case fails by name, with no file of it that is not whole; the others are tried."""
    whole = one_of_predict(predicting, to_predict(tmp_path / "whole"), disk=True)
    wanted = whole["again"]["files"]
    rng = random.Random(7)
    for number in range(how_many(8, 60)):
        fill_at = rng.randint(1, whole["operations"])
        told = one_of_predict(
            predicting, to_predict(tmp_path / str(number)), disk=True, fill_at=fill_at
        )
        full, where = told["full"], f"filled before operation {fill_at}: {told['full']}"
        if "stopped" in full:
            assert full["stopped"].startswith("WorkFolderError: "), where
            assert "No space left on device" in full["stopped"], where
        else:
            assert set(full["done"]) | set(full["failed"]) == set("abc"), where
            for name, text in full["failed"].items():
                assert text.startswith(f"WorkFolderError: {name}, "), where
                assert "it cannot be written (No space left on device). Check free space" in text
            kept = {
                name: sha for name, sha in full["files"].items() if name[0] not in full["failed"]
            }
            assert kept.items() <= wanted.items(), where
            assert all(name[0] not in full["failed"] for name in full["files"]), where
        assert full["exit_code"] == (2 if "stopped" in full or full["failed"] else 0), where
        assert (told["again"]["failed"], told["again"]["files"]) == ({}, wanted), where
        LEDGER.add("a disk that fills up while predicting")


def test_predict_killed_before_any_operation_goes_on(predicting: Nursery, tmp_path: Path) -> None:
    """On the way from one settings' files to another's: none is taken for a stranger's."""
    whole = one_of_predict(predicting, to_predict(tmp_path / "whole"), overlap=0.25)
    first = to_predict(tmp_path / "first")
    one_of_predict(predicting, first)
    rng = random.Random(3)
    shutil.copytree(first, tmp_path / "counted")
    most = one_of_predict(predicting, tmp_path / "counted", overlap=0.25)["operations"]
    for number in range(how_many(12, 120)):
        folder = shutil.copytree(first, tmp_path / str(number))
        kill_at = rng.randint(1, most)
        args = {"folder": str(folder), "overlap": 0.25, "kill_at": kill_at}
        (outcome,) = predicting.run(Job("predict", args))
        assert outcome.killed, outcome.output
        again = one_of_predict(predicting, folder, overlap=0.25)
        assert again["failed"] == {}, kill_at
        assert again["files"] == whole["files"], kill_at
        assert list(folder.rglob(".*")) == [], kill_at
        LEDGER.add("SIGKILL while predicting")


def to_predict(folder: Path) -> Path:
    """A folder with a student and three images."""
    write_student(folder / "student.pt")
    for name in "abc":
        write_ct(folder / "in" / f"{name}.nii.gz", seed=ord(name))
    return folder


def one_of_predict(nursery: Nursery, folder: Path, **args: Any) -> dict[str, Any]:
    (outcome,) = nursery.run(Job("predict", {"folder": str(folder), **args}))
    assert outcome.status == 0, outcome.output
    if "impossible" in outcome.result:
        pytest.skip(outcome.result["impossible"])
    result: dict[str, Any] = outcome.result
    return result
