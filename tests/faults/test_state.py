"""Any order of adding, dropping and swapping teachers, changing a setting, running, killing,
corrupting, collecting garbage, verifying and repairing, beside a model of what must be there.

What a unit must hold is known from undisturbed runs of every combination. The model follows which
units are whole, which are damaged loudly (sizes, receipt: the next run makes them again) or quietly
(same size: only the deep check tells), and what the index says.
"""

from __future__ import annotations

import random
import shutil
import tempfile
from collections.abc import Mapping
from itertools import product
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    precondition,
    rule,
    run_state_machine_as_test,
)

from pipeline.cache.index import case_path, read_dataset_index, read_teacher_index
from pipeline.cache.places import find_units
from pipeline.data.registry import Registry, load_registry
from pipeline.errors import CacheStale, ConfigError
from pipeline.log import Log
from pipeline.review.gc import find_garbage, remove_garbage
from pipeline.review.verify import cheap_problems, deep_problems, repair, verify
from tests.faults.ledger import LEDGER, how_many
from tests.faults.nursery import Job, Nursery
from tests.faults.small import (
    DATASET,
    build_small,
    content,
    files_of,
    flip,
    hidden,
    run_stage,
    teacher,
    truncate,
    write_registry,
)
from tests.tiny import copy_cohort, work_of

NAMES, THRESHOLDS, BITS = ("one", "two"), (0.0, 90.0), (5, 7)
TABLES = "table of regions"
QUIET = Log(quiet=True)
Unit = str
"""Path of a unit, relative to the work folder."""


class World:
    """The cohort, and for each combination of threshold and bits what an undisturbed run makes."""

    def __init__(self, folder: Path, nursery: Nursery) -> None:
        self.nursery = nursery
        self.registry = build_small(folder / "cohort", num_cases=2)
        self.content: dict[Unit, dict[str, str]] = {}
        self.names: dict[Unit, str] = {}
        self.of: dict[tuple[str, float, int], set[Unit]] = {}
        for hu, bits in product(THRESHOLDS, BITS):
            registry = copy_cohort(self.registry, folder / f"{hu}-{bits}")
            write_registry(registry, {name: teacher(hu) for name in NAMES})
            assert run_stage(registry, bits=bits).exit_code == 0
            work = work_of(registry)
            for place in find_units(work):
                unit = place.path.relative_to(work).as_posix()
                self.content[unit], self.names[unit] = content(place.path), place.name
                key = (place.teacher or "", hu if place.teacher else 0.0, bits)
                self.of.setdefault(key, set()).add(unit)

    def cases(self, bits: int) -> set[Unit]:
        """The case units of one setting."""
        return self.of["", 0.0, bits]


class CacheMachine(RuleBasedStateMachine):
    """One work folder and what must be in it."""

    world: World

    def __init__(self) -> None:
        super().__init__()
        self.folder = Path(tempfile.mkdtemp())
        self.registry = copy_cohort(self.world.registry, self.folder / "cohort")
        self.work = work_of(self.registry)
        self.whole: set[Unit] = set()
        self.loud: set[Unit] = set()
        self.quiet: set[Unit] = set()
        # What the index leads to: case units, and which bits of a teacher with a threshold.
        self.cases: set[Unit] = set()
        self.index: dict[tuple[str, float], int] = {}

    @initialize(hu=st.sampled_from(THRESHOLDS), bits=st.sampled_from(BITS))
    def begin(self, hu: float, bits: int) -> None:
        self.bits = bits
        self.set_teachers({"one": hu})

    def teardown(self) -> None:
        if hasattr(self, "bits"):
            self.repair()
            self.run()
        shutil.rmtree(self.folder)

    # --- what a person changes ------------------------------------------------------------------

    @precondition(lambda self: len(self.teachers) < len(NAMES))
    @rule(hu=st.sampled_from(THRESHOLDS))
    def add(self, hu: float) -> None:
        name = next(name for name in NAMES if name not in self.teachers)
        self.set_teachers({**self.teachers, name: hu})

    @precondition(lambda self: len(self.teachers) > 1)
    @rule(name=st.sampled_from(NAMES))
    def drop(self, name: str) -> None:
        self.set_teachers({other: hu for other, hu in self.teachers.items() if other != name})

    @rule(data=st.data())
    def swap(self, data: st.DataObject) -> None:
        name = data.draw(st.sampled_from(sorted(self.teachers)))
        (other,) = set(THRESHOLDS) - {self.teachers[name]}
        self.set_teachers({**self.teachers, name: other})

    @rule()
    def change_setting(self) -> None:
        (self.bits,) = set(BITS) - {self.bits}

    # --- what happens to the cache --------------------------------------------------------------

    @rule()
    def run(self) -> None:
        report = run_stage(self.registry, bits=self.bits)
        self.was_run(report.done, {unit: str(error) for unit, error in report.failed.items()},
                     report.exit_code)  # fmt: skip

    @rule(kill_at=st.integers(1, 400))
    def kill(self, kill_at: int) -> None:
        args = {"registry": str(self.registry), "bits": self.bits, "kill_at": kill_at}
        (outcome,) = self.world.nursery.run(Job("cache", args))
        if outcome.killed:
            LEDGER.add("state machine: kill")
            self.look_after_kill()
        else:
            assert outcome.status == 0, outcome.output
            told = outcome.result
            self.was_run(told["done"], told["failed"], told["exit_code"])

    @precondition(lambda self: self.whole)
    @rule(data=st.data(), how=st.sampled_from(["truncate", "receipt", "no receipt", "array",
                                               "attributes"]))  # fmt: skip
    def corrupt(self, data: st.DataObject, how: str) -> None:
        unit = data.draw(st.sampled_from(sorted(self.whole)))
        rng = random.Random(data.draw(st.integers(0, 1000)))
        path = self.work / unit
        match how:
            case "truncate":
                truncate(rng.choice(files_of(path)), rng)
            case "receipt":
                text = (path / "receipt.json").read_text()
                (path / "receipt.json").write_text(text.replace('"digest": "', '"digest": "0', 1))
            case "no receipt":
                (path / "receipt.json").unlink()
            case "array":
                flip(rng.choice(files_of(path, "c/**/*")), rng)
            case "attributes":
                flip(path / "zarr.json", rng)
        self.whole.remove(unit)
        (self.quiet if how in ("array", "attributes") else self.loud).add(unit)
        LEDGER.add(f"state machine: corrupt, {how}")

    @rule()
    def verify(self) -> None:
        found = verify(self.work, None, deep=True, everything=True, log=QUIET)
        assert self.units(f.path for f in found.findings) == self.loud | self.quiet
        cheap = verify(self.work, None, deep=False, everything=True, log=QUIET)
        assert self.units(f.path for f in cheap.findings) == self.loud
        if self.is_indexed():
            asked = verify(self.work, load_registry(self.registry), deep=False, everything=True,
                           log=QUIET)  # fmt: skip
            missing = {f.unit for f in asked.findings if f.state == "missing"}
            gone = self.reached() - self.whole - self.loud - self.quiet
            assert missing == {self.world.names[unit] for unit in gone}

    @precondition(lambda self: self.loud or self.quiet)
    @rule()
    def repair(self) -> None:
        found = verify(self.work, None, deep=True, everything=True, log=QUIET)
        assert self.units(repair(self.work, found)) == self.loud | self.quiet
        self.loud, self.quiet = set(), set()
        self.compare()

    @rule()
    def gc(self) -> None:
        registry = load_registry(self.registry)
        if not self.is_indexed():
            with pytest.raises(ConfigError):
                find_garbage(self.work, [registry], grace_hours=0)
            self.compare()
            return
        garbage = find_garbage(self.work, [registry], grace_hours=0)
        remove_garbage(self.work, [registry], garbage, log=QUIET)
        reached = self.reached()
        self.whole, self.loud = self.whole & reached, self.loud & reached
        self.quiet &= reached
        self.index = {key: self.index[key] for key in self.teachers.items()}
        assert hidden(self.work) == []
        self.compare()
        LEDGER.add("state machine: gc")

    # --- the model ------------------------------------------------------------------------------

    def set_teachers(self, teachers: Mapping[str, float]) -> None:
        self.teachers = dict(teachers)
        write_registry(self.registry, {name: teacher(hu) for name, hu in teachers.items()})

    def entries(self) -> list[tuple[str, float]]:
        return [("", 0.0), *self.teachers.items()]

    def is_indexed(self) -> bool:
        return bool(self.cases) and all(entry in self.index for entry in self.teachers.items())

    def wanted(self) -> set[Unit]:
        return set().union(*(self.world.of[name, hu, self.bits] for name, hu in self.entries()))

    def reached(self) -> set[Unit]:
        names = {self.world.names[unit] for unit in self.cases}
        units = set().union(
            *(self.world.of[*key, self.index[key]] for key in self.teachers.items())
        )
        return self.cases | {u for u in units if self.world.names[u].rpartition(" x ")[2] in names}

    def units(self, paths: Any) -> set[Unit]:
        return {path.relative_to(self.work).as_posix() for path in paths}

    def was_run(self, done: list[str], failed: Mapping[str, str], exit_code: int) -> None:
        wanted = self.wanted()
        made = wanted - self.whole - self.quiet
        assert sorted(done) == sorted(self.world.names[unit] for unit in made)
        # What is damaged quietly is not made again by itself, but no number of it is used.
        spoilt = {self.world.names[unit] for unit in wanted & self.quiet}
        assert set(failed) <= ({TABLES} | spoilt if spoilt else set()), failed
        assert exit_code == (1 if failed else 0)
        self.whole |= made
        self.loud -= made
        self.cases = self.world.cases(self.bits)
        self.index.update(dict.fromkeys(self.teachers.items(), self.bits))
        assert hidden(self.work) == []
        self.compare()
        LEDGER.add("state machine: run")

    def look_after_kill(self) -> None:
        """A killed run has made some of what it had to, and the index is old or new, case by case
        and teacher by teacher."""
        there = self.units(place.path for place in find_units(self.work))
        made = {unit for unit in there & self.wanted() - self.whole - self.quiet
                if self.is_whole(unit)}  # fmt: skip
        self.whole |= made
        self.loud = (self.loud - made) & there  # it may have been moved aside already
        registry = load_registry(self.registry)
        indexed = self.indexed_cases(registry)
        assert indexed <= self.cases | self.world.cases(self.bits)
        assert {self.world.names[unit] for unit in indexed} >= {
            self.world.names[unit] for unit in self.cases
        }
        self.cases = indexed
        for name, hu in self.teachers.items():
            bits = self.indexed_bits(registry, name)
            assert bits in (self.bits, self.index.get((name, hu)))
            if bits is not None:
                self.index[name, hu] = bits
        self.compare()

    def indexed_cases(self, registry: Registry) -> set[Unit]:
        try:
            cases = read_dataset_index(self.work, DATASET, registry.dataset_key(DATASET))
        except CacheStale:
            return set()
        return self.units(case_path(self.work, case) for case in cases)

    def indexed_bits(self, registry: Registry, name: str) -> int | None:
        try:
            found = read_teacher_index(self.work, name, registry.teacher_key(name))
        except CacheStale:
            return None
        bits: int = found.inputs["storage"]["log_odds_bits"]
        return bits

    def compare(self) -> None:
        """What is on disk is what the model says."""
        there = self.units(place.path for place in find_units(self.work))
        assert there == self.whole | self.loud | self.quiet
        for unit in sorted(there):
            assert self.is_whole(unit) == (unit in self.whole), unit
            (place,) = (p for p in find_units(self.work) if p.path == self.work / unit)
            assert bool(cheap_problems(place)) == (unit in self.loud), unit
            assert bool(deep_problems(place)) == (unit not in self.whole), unit

    def is_whole(self, unit: Unit) -> bool:
        try:
            return content(self.work / unit) == self.world.content[unit]
        except (ValueError, KeyError):  # a damaged receipt
            return False


@pytest.mark.slow
def test_any_order_of_events_leaves_what_must_be_there(nursery: Nursery, tmp_path: Path) -> None:
    class Machine(CacheMachine):
        world = World(tmp_path, nursery)

    run_state_machine_as_test(
        Machine,
        settings=settings(
            max_examples=how_many(5, 80),
            stateful_step_count=how_many(7, 25),
            deadline=None,
            derandomize=True,
            database=None,
            phases=[Phase.generate],  # shrinking takes many minutes
            suppress_health_check=list(HealthCheck),
        ),
    )
