"""A clock that jumps: nothing but the time written in a receipt depends on it, and gc's grace."""

from __future__ import annotations

import os
import random
import time
from pathlib import Path

import pytest

from pipeline.data.registry import load_registry
from pipeline.log import Log
from pipeline.review.gc import find_garbage, remove_garbage
from pipeline.review.verify import verify
from tests.faults.ledger import LEDGER
from tests.faults.small import content, files_of, place_named, run_stage, teacher, write_registry
from tests.tiny import work_of

YEAR_S = 365 * 86400.0
JUMPS = {
    "to 1970": lambda now: 0.0,
    "to 2100": lambda now: 130 * YEAR_S,
    "back, at each look": lambda now: next(_falling),
    "about, at each look": lambda now: _random.uniform(0, 100 * YEAR_S),
}
_falling = iter(50 * YEAR_S - 3600.0 * n for n in range(10**9))
_random = random.Random(0)


def set_clock(monkeypatch: pytest.MonkeyPatch, jump: str) -> None:
    """Both the time of day and the one for measuring."""
    real, real_gmtime = time.time, time.gmtime

    def now() -> float:
        return JUMPS[jump](real())

    monkeypatch.setattr(time, "time", now)
    monkeypatch.setattr(time, "monotonic", now)
    monkeypatch.setattr(time, "gmtime", lambda s=None: real_gmtime(now() if s is None else s))


@pytest.mark.parametrize("jump", JUMPS)
def test_a_clock_that_jumps_changes_no_unit(
    small: Path, undisturbed: Path, monkeypatch: pytest.MonkeyPatch, jump: str
) -> None:
    set_clock(monkeypatch, jump)
    first = run_stage(small)
    again = run_stage(small)
    found = verify(work_of(small), load_registry(small), deep=True, everything=True,
                   log=Log(quiet=True))  # fmt: skip
    monkeypatch.undo()
    assert (first.failed, first.exit_code) == ({}, 0)
    assert (again.done, again.exit_code) == ([], 0)
    assert found.findings == []
    assert content(work_of(small)) == content(work_of(undisturbed))
    assert run_stage(small).done == []
    LEDGER.add("a clock that jumps", lost=0)


def test_times_of_files_mean_nothing(small_cached: Path) -> None:
    """What is done is read from receipts: a copy with other times is as good."""
    rng = random.Random(0)
    for path in files_of(small_cached.parent):
        os.utime(path, (rng.uniform(0, 4e9),) * 2)
    assert run_stage(small_cached).done == []


@pytest.mark.parametrize("jump", ["to 1970", "to 2100"])
def test_gc_under_a_wrong_clock_removes_nothing_that_a_registry_reaches(
    small_cached: Path, undisturbed: Path, monkeypatch: pytest.MonkeyPatch, jump: str
) -> None:
    work = work_of(small_cached)
    write_registry(small_cached, {"one": teacher(0.0)})
    assert run_stage(small_cached).done == []
    loaded = load_registry(small_cached)
    set_clock(monkeypatch, jump)
    remove_garbage(
        work, [loaded], find_garbage(work, [loaded], grace_hours=24), log=Log(quiet=True)
    )
    monkeypatch.undo()
    assert run_stage(small_cached).done == []
    right = content(work_of(undisturbed))
    assert content(work) == {n: d for n, d in right.items() if "/two" not in n}
    assert place_named(work, "one x liver-ct/case_000")
    LEDGER.add("gc under a clock that jumped")
