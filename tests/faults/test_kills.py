"""SIGKILL in stage one: at a random operation on files (open for writing, mkdir, rename, fsync,
remove) and at a random time, on an empty work folder and on one where damaged units are replaced.

Each round kills twice, so that a run also meets what a killed one left. After each kill nothing
is visible that is not whole; after each round a rerun completes and the cache is, byte for byte,
that of a run that nobody disturbed. A killed process loses no bytes that it has written; a power
cut may, and is not covered.
"""

from __future__ import annotations

import random
import shutil
from pathlib import Path

import pytest

from pipeline.cache.places import find_units
from pipeline.review.verify import deep_problems
from tests.faults.ledger import LEDGER, how_many
from tests.faults.nursery import Job, Nursery
from tests.faults.small import content, files_of, flip, hidden, truncate, unit_names
from tests.tiny import copy_cohort, work_of

KINDS = ("operation", "time", "operation, replacing damaged units")


@pytest.mark.slow
def test_killed_anywhere_a_rerun_gives_what_an_undisturbed_run_gives(
    nursery: Nursery, small_built: Path, undisturbed: Path, tmp_path: Path
) -> None:
    rng = random.Random(0)
    wanted, names = content(work_of(undisturbed)), unit_names(undisturbed)
    registry = copy_cohort(small_built, tmp_path / "measured")
    (whole,) = nursery.run(Job("cache", {"registry": str(registry)}))
    assert content(work_of(registry)) == wanted
    kills, rounds = 0, 0
    while kills < how_many(30, 210):
        how = KINDS[rounds % len(KINDS)]
        rounds += 1
        damaged: set[Path] = set()
        registry = copy_cohort(
            undisturbed if "damaged" in how else small_built, tmp_path / f"round_{rounds}"
        )
        if "damaged" in how:
            damaged = _damage_some(work_of(registry), rng)
        for share in (1.0, 0.6):
            args = {"registry": str(registry)}
            if how == "time":
                job = Job("cache", args, kill_after=rng.uniform(0.0, share * whole.seconds))
            else:
                most = int(share * whole.result["operations"])
                job = Job("cache", {**args, "kill_at": rng.randint(1, max(1, most))})
            (outcome,) = nursery.run(job)
            assert outcome.killed or outcome.status == 0, outcome.output
            kills += outcome.killed
            wrong = {p.path for p in find_units(work_of(registry)) if deep_problems(p)}
            assert wrong <= damaged, job
            if outcome.killed:
                LEDGER.add(f"SIGKILL at a random {how}")
        (rerun,) = nursery.run(Job("cache", {"registry": str(registry)}))
        assert rerun.status == 0, rerun.output
        assert (rerun.result["failed"], rerun.result["exit_code"]) == ({}, 0)
        assert sorted(rerun.result["done"] + rerun.result["skipped"]) == sorted(names)
        assert hidden(work_of(registry)) == []
        assert content(work_of(registry)) == wanted, f"round {rounds}, {how}"
        shutil.rmtree(registry.parent)


def _damage_some(work: Path, rng: random.Random) -> set[Path]:
    """Truncates or flips, so that some are made again; a flip is noticed in the receipt alone."""
    units = rng.sample([place.path for place in find_units(work)], 5)
    for unit in units[:3]:
        truncate(rng.choice(files_of(unit)), rng)
    for unit in units[3:]:
        flip(unit / "receipt.json", rng)
    return set(units)
