"""Two processes that make the same units at the same time, of nothing and over damaged ones; and
the moments of that race one by one."""

from __future__ import annotations

import random
import shutil
from pathlib import Path
from typing import Any

import pytest

from pipeline.cache import store
from pipeline.cache.places import find_units
from tests.faults.ledger import LEDGER, how_many
from tests.faults.nursery import Job, Nursery
from tests.faults.small import (
    content,
    files_of,
    hidden,
    place_named,
    run_stage,
    truncate,
    unit_names,
)
from tests.tiny import copy_cohort, work_of


@pytest.mark.parametrize("damaged", [False, True])
def test_two_processes_at_once_make_what_one_makes(
    nursery: Nursery, small_built: Path, undisturbed: Path, tmp_path: Path, damaged: bool
) -> None:
    rng = random.Random(3)
    for number in range(how_many(3, 30)):
        registry = copy_cohort(undisturbed if damaged else small_built, tmp_path / str(number))
        work = work_of(registry)
        if damaged:
            for place in find_units(work):
                truncate(rng.choice(files_of(place.path)), rng)
        job = Job("cache", {"registry": str(registry)})
        for outcome in nursery.run(job, job):
            assert outcome.status == 0, outcome.output
            assert (outcome.result["failed"], outcome.result["exit_code"]) == ({}, 0)
            told = outcome.result["done"] + outcome.result["skipped"]
            assert sorted(told) == sorted(unit_names(registry))
        assert content(work) == content(work_of(undisturbed))
        assert hidden(work) == []
        shutil.rmtree(registry.parent)
        LEDGER.add(f"two processes at once{', over damaged units' if damaged else ''}")


def test_one_is_killed_while_the_other_goes_on(
    nursery: Nursery, small_built: Path, undisturbed: Path, tmp_path: Path
) -> None:
    rng = random.Random(4)
    for number in range(how_many(3, 30)):
        registry = copy_cohort(small_built, tmp_path / str(number))
        args = {"registry": str(registry)}
        mortal = Job("cache", {**args, "kill_at": rng.randint(1, 400)})
        killed, other = nursery.run(mortal, Job("cache", args))
        assert other.status == 0, other.output
        assert other.result["exit_code"] == 0
        assert run_stage(registry).done == []
        assert content(work_of(registry)) == content(work_of(undisturbed))
        assert hidden(work_of(registry)) == []
        shutil.rmtree(registry.parent)
        LEDGER.add("two at once, one killed", tried=killed.killed, detected=killed.killed)


@pytest.mark.parametrize("moment", ["before looking", "before moving aside", "after moving aside"])
def test_a_damaged_unit_that_another_replaces_meanwhile(
    small_cached: Path, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    """The other's unit appears at a moment of the replacing; it is valid, so nothing fails."""
    work = work_of(small_cached)
    before = content(work)
    place = place_named(work, "one x liver-ct/case_001")
    whole = small_cached.parent / "whole"
    shutil.copytree(place.path, whole)
    truncate(files_of(place.path, "c/**/*")[0], random.Random(0))
    aside = small_cached.parent / "aside"

    def other_writer() -> None:
        """Moves what is there aside, if anything is, and puts its own."""
        if whole.exists():
            if place.path.exists():
                place.path.rename(aside)
            whole.rename(place.path)

    real_valid, real_rename = store.is_valid, Path.rename

    def is_valid(path: Path, expect: str) -> bool:
        if moment == "before looking":
            other_writer()
        valid = real_valid(path, expect)
        if moment == "before moving aside":
            other_writer()
        return valid

    def rename(self: Path, target: Any) -> Any:
        done = real_rename(self, target)
        if self == place.path and Path(target).name.startswith("."):
            if moment == "after moving aside":
                monkeypatch.setattr(Path, "rename", real_rename)
                other_writer()
        return done

    monkeypatch.setattr(store, "is_valid", is_valid)
    monkeypatch.setattr(Path, "rename", rename)
    report = run_stage(small_cached)
    assert not whole.exists()
    assert (report.failed, report.exit_code) == ({}, 0)
    monkeypatch.undo()
    assert content(work) == before
    assert hidden(work) == []
    LEDGER.add("two writers replace one damaged unit, at each moment")
