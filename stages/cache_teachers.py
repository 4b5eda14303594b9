"""Stage one: CT + teachers -> cache.

Per case: CT -> student grid -> cases/; CT -> the teacher's own grid -> sliding window -> log-odds
and features -> student grid -> teachers/. Receipts last; what has one is skipped. The units by
which the admission gate judges the teachers come first. An engine says where cases are worked on.

In a job array the first job goes as far as the gate, for all cases. Each part then makes the units
of its own cases: it takes them from the index and the gate's evidence from the work folder.
"""

from __future__ import annotations

import secrets
import time
import traceback
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass, field, replace
from typing import Any

from pydantic import Field

from pipeline.cache.cases import CaseToGrid, StoredCase, check_organs
from pipeline.cache.identity import claim_dataset, claim_teacher, held_out_since, read_dataset
from pipeline.cache.index import (
    IndexedCase,
    IndexedTeacher,
    read_dataset_index,
    unit_path,
    write_dataset_index,
    write_teacher_index,
)
from pipeline.cache.places import clean_temporaries
from pipeline.cache.schema import StorageConfig
from pipeline.cache.store import prepare_work_folder, write_json
from pipeline.config import Config
from pipeline.consensus.cohort import doubtful_tap, print_regions, print_taps, region_rows, tap_rows
from pipeline.consensus.evidence import GateCases, plan_gate_cases, units_of
from pipeline.consensus.gate import (
    NOT_JUDGED,
    GateResult,
    check_accepted,
    print_gate_result,
    read_gate_result,
    run_gate,
)
from pipeline.data.entries import CaseFiles
from pipeline.data.patches import WindowConfig
from pipeline.data.sizes import cases_of_part
from pipeline.engine.here import Execution, Item, Outcome, Outcomes, Result, Steps
from pipeline.engine.parts import GATE, Gate, Part
from pipeline.errors import (
    CacheError,
    CacheStale,
    OutputsError,
    PipelineError,
    TeacherError,
    WorkFolderError,
)
from pipeline.log import Advance
from pipeline.setup.needs import check_space
from pipeline.teachers.load import Teachers
from pipeline.teachers.units import StoredUnit, TeacherOnCase, TeacherUnit, is_there
from stages.report import Scope, StageReport


class CacheTeachersConfig(Config):
    """How stage one computes; see cache_teachers.yaml."""

    splits: tuple[str, ...] = Field(
        default=("train", "validation", "test"), description="cases of others are left out"
    )
    window: WindowConfig = Field(default_factory=WindowConfig)
    storage: StorageConfig = Field(default_factory=StorageConfig)


def run(
    config: CacheTeachersConfig,
    scope: Scope,
    execution: Execution,
    *,
    part: Part | Gate | None = None,
    accept: Sequence[str] = (),
    dry_run: bool = False,
) -> StageReport:
    """Fills the cache; a second run does nothing. `CacheRun` describes the arguments.

    Raises:
        PipelineError: nothing can be done at all. What concerns one case is in the report instead,
            and the other cases are done.
    """
    this = CacheRun(config, scope, execution, part, accept, dry_run)
    this.begin()
    teachers = this.open_teachers()
    own = this.own_cases()
    check_space(
        scope.registry, scope.work, this.known, splits=config.splits, storage=config.storage,
        log=scope.log, force=execution.force or dry_run,
    )  # fmt: skip
    if isinstance(part, Part):
        this.read_index(own)
    else:
        # All of them before any teacher runs: bad input is found before GPU time is spent.
        spacing = scope.registry.grid.spacing_mm
        to_grid = CaseToGrid(scope.registry, scope.work, config.storage, spacing, dry_run)
        with this.follow("cases on the student grid", to_grid, own) as cases:
            for case in cases:
                this.add_case(case)
        this.write_index(own)
    gate_cases, first, rest = this.gate_units(own)
    on_case = TeacherOnCase(scope.work, teachers, this.known, dry_run=dry_run)
    with this.follow("units of the admission gate", on_case, first) as units:
        for unit in units:
            this.add_unit(unit)
    result = this.judge(gate_cases)
    rest = this.let_pass(rest, result)
    on_case = replace(on_case, notes=result.notes)
    with this.follow("teachers", on_case, rest) as units:
        for unit in units:
            this.add_unit(unit)
    return this.finish(result)


@dataclass
class CacheRun:
    """The arguments of `run`, what is known meanwhile, and what came of it.

    Attributes:
        part: do these cases only, after another run went as far as the gate; None: all.
        accept: teachers to go on with although the gate would stop at them.
        cases: that are on the student grid, of all parts, by name.
        wrong: teachers whose outputs are of the wrong kind, or of which a part knows that no unit
            could be made for the gate.
    """

    config: CacheTeachersConfig
    scope: Scope
    execution: Execution
    part: Part | Gate | None
    accept: Sequence[str]
    dry_run: bool
    report: StageReport = field(default_factory=lambda: StageReport("cache-teachers"))
    known: Mapping[str, IndexedTeacher] = field(default_factory=dict)
    cases: dict[str, IndexedCase] = field(default_factory=dict)
    wrong: set[str] = field(default_factory=set)
    _began: float = field(default_factory=time.monotonic)
    _advance: Advance | None = None

    def begin(self) -> None:
        """Refuses what cannot go well, before anything is loaded; makes the work folder ready."""
        registry, work, log = self.scope.registry, self.scope.work, self.scope.log
        check_accepted(registry, self.accept)
        for dataset in registry.datasets:
            claim_dataset(work, registry, dataset, log=log)
        if self.dry_run:
            return
        prepare_work_folder(work)
        removed = clean_temporaries(work)
        if removed:
            log.info(f"removed {removed} unfinished units of a run that was killed")

    def open_teachers(self) -> Teachers:
        """With workers elsewhere, this process loads no network: one of them says what the teachers
        are."""
        registry, execution = self.scope.registry, self.execution
        teachers = Teachers(
            registry, self.config.window, self.config.storage, execution.device,
            execution.window_batch, run=secrets.token_hex(8) if execution.engine.remote else "",
        )  # fmt: skip
        self.known = execution.engine.call(teachers.describe, name="loading teachers")
        for teacher in self.known.values():
            claim_teacher(self.scope.work, registry, teacher, log=self.scope.log)
        return teachers

    def own_cases(self) -> Sequence[CaseFiles]:
        """The cases of this run: all, or those of its part."""
        registry, work, log = self.scope.registry, self.scope.work, self.scope.log
        splits = self.config.splits
        files = [c for d in registry.datasets for c in registry.cases(d) if c.split in splits]
        own: Sequence[CaseFiles] = files
        for note in registry.empty_splits(splits):
            log.remark(note)
        if held_out := held_out_since(registry, work, files):
            log.remark(held_out)
        if isinstance(self.part, Part):
            own = cases_of_part(registry, files, splits, self.part)
            log.info(f"{self.part}: {len(own)} of {len(files)} cases")
        log.info(f"{len(own)} cases, {len(self.known)} teachers -> {work}")
        return own

    @contextmanager
    def follow(
        self, what: str, steps: Steps[Item, Any, Any, Result], items: Sequence[Item]
    ) -> Iterator[Outcomes[Item, Result]]:
        """What becomes of items, one by one, with progress."""
        with (
            self.scope.log.progress(what, len(items)) as self._advance,
            closing(self.execution.engine.run(steps, items)) as outcomes,
        ):
            yield outcomes

    def add_case(self, outcome: Outcome[CaseFiles, StoredCase]) -> None:
        """Takes down what became of a case on the student grid."""
        name, stored = outcome.item.name, outcome.result
        if stored is not None:
            self.cases[name] = stored.indexed
            made = self._done(name, stored.num_bytes)
            if stored.warnings:
                self.report.warnings[name] = list(stored.warnings)
            for text in stored.warnings if made else ():
                self.scope.log.warn(f"{name}: {text}")
        self._over(name, name, outcome.error)

    def add_unit(self, outcome: Outcome[TeacherUnit, StoredUnit]) -> None:
        """Takes down what became of a unit."""
        unit, stored, error = outcome.item, outcome.result, outcome.error
        work, log, known = self.scope.work, self.scope.log, self.known[unit.teacher]
        if stored is not None:
            if stored.damage:
                log.warn(f"{stored.damage} It is made again.")
            if self._done(unit.name, stored.num_bytes) and not self.dry_run:
                log.event("unit", unit=unit.name, path=str(unit_path(work, known, unit.case)))
        elif isinstance(error, OutputsError):
            self.wrong.add(unit.teacher)
        elif outcome.unreported and is_there(work, known, unit.case):
            self.report.done.append(unit.name)  # before its case was lost
            error = None
        self._over(unit.name, unit.case.name, error)

    def _done(self, name: str, num_bytes: int | None) -> bool:
        """Whether it was made now."""
        made = num_bytes is not None
        (self.report.done if made else self.report.skipped).append(name)
        self.report.num_bytes += num_bytes or 0
        self.scope.log.detail(f"{name}: {'made' if made else 'was there'}")
        return made

    def _over(self, name: str, case: str, error: Exception | None) -> None:
        if error is not None:
            self.fail(name, error)
        if self._advance is not None:
            self._advance(case)

    def fail(self, unit: str, error: Exception) -> None:
        """One unit's failure does not stop the others; what nobody foresaw keeps its traceback."""
        self.report.failed[unit] = error
        known = isinstance(error, PipelineError)
        text = str(error) if known else "".join(traceback.format_exception(error))
        self.scope.log.warn(f"{unit} failed: {text}")

    def usable(self) -> list[str]:
        """Datasets that nothing is wrong with as a whole."""
        failed = self.report.failed
        return [d for d in self.scope.registry.datasets if f"dataset {d}" not in failed]

    def read_index(self, own: Sequence[CaseFiles]) -> None:
        """The cases as the array's first job has left them; tells which of a part's own it could
        not take."""
        registry, work = self.scope.registry, self.scope.work
        names = {source.name for source in own}
        for dataset in registry.datasets:
            try:
                found, lost = read_dataset(work, registry, dataset, splits=self.config.splits)
            except CacheStale as error:
                self.fail(f"dataset {dataset}", error)
                continue
            self.cases |= {case.name: case for case in found}
            for name in sorted(names & {*lost}):
                self.fail(name, lost[name])

    def write_index(self, own: Sequence[CaseFiles]) -> None:
        """Tells what is wrong with organs, and writes which cases and teachers there are."""
        registry, work, report = self.scope.registry, self.scope.work, self.report
        again = [name for name in report.warnings if name in report.skipped]
        if again:
            self.scope.log.warn(
                f"{len(again)} cases that are there already have warnings, the first {again[0]}: "
                f"{report.warnings[again[0]][0]} All of them are under `warnings` in the stage's "
                "report (reports/ in the work folder, or --report)."
            )
        self.cases = {s.name: self.cases[s.name] for s in own if s.name in self.cases}  # in order
        if self.dry_run:
            return
        cases = list(self.cases.values())
        for what, wrong in check_organs(registry, work, cases).items():
            self.fail(what, wrong)
        for name, teacher in self.known.items():
            origin = claim_teacher(work, registry, teacher)
            write_teacher_index(work, registry.teacher_key(name), replace(teacher, origin=origin))
        for dataset in self.usable():
            key, origin = registry.dataset_key(dataset), claim_dataset(work, registry, dataset)
            asked = {c.case: c.split in self.config.splits for c in registry.cases(dataset)}
            indexed = [case for case in cases if case.dataset == dataset]
            with suppress(CacheStale):  # cases of splits that are left out stay as they were seen
                earlier = [] if all(asked.values()) else read_dataset_index(work, dataset, key)
                indexed += [case for case in earlier if not asked.get(case.case, True)]
            absent = {*asked} - {case.case for case in indexed}
            write_dataset_index(work, dataset, key, indexed, origin=origin, left_out=absent)

    def gate_units(
        self, own: Sequence[CaseFiles]
    ) -> tuple[Sequence[GateCases], Sequence[TeacherUnit], Sequence[TeacherUnit]]:
        """What the gate looks at, and the units of this run: those that it is about, and all
        others; case by case. In a part nothing is judged any more: there all are others."""
        usable = self.usable()
        cases = {name: case for name, case in self.cases.items() if case.dataset in usable}
        gate_cases = plan_gate_cases(self.scope.registry, list(cases.values()))
        asked = frozenset[Any]() if isinstance(self.part, Part) else units_of(gate_cases)
        units: dict[bool, list[TeacherUnit]] = {True: [], False: []}
        for source in own:
            for teacher in self.known if source.name in cases else ():
                unit = TeacherUnit(teacher, cases[source.name], source)
                units[(teacher, source.name) in asked].append(unit)
        return gate_cases, units[True], units[False]

    def judge(self, gate_cases: Sequence[GateCases]) -> GateResult:
        """The gate's result, in a part by what the first job has measured; NOT_JUDGED in a dry run.

        Raises:
            CacheMissing: a part, and the first job has not come to its end.
        """
        registry, work, log = self.scope.registry, self.scope.work, self.scope.log
        if self.dry_run:
            return NOT_JUDGED
        if isinstance(self.part, Part):
            result = read_gate_result(registry, work, self.known, gate_cases, self.accept)
            self.wrong |= {found.teacher for found in result.evidence if found.saw_nothing}
        else:
            result = run_gate(registry, work, self.known, gate_cases, accept=self.accept, log=log)
        if self.scope.tables:
            print_gate_result(result)
        for what, error in result.failed.items():
            if what not in self.report.failed:
                self.fail(what, error)
        return result

    def let_pass(self, units: Sequence[TeacherUnit], result: GateResult) -> Sequence[TeacherUnit]:
        """Those that are made after the gate: of teachers whose outputs are of the right kind; says
        what is left out."""
        log = self.scope.log
        for name in sorted(self.wrong):
            if isinstance(self.part, Part):
                error = TeacherError(
                    "the array's first job could make none of its units that the gate looks at, so "
                    "a part makes no other.",
                    where=f"teacher {name}",
                    fix="That job's report says why. Mend it, then run it again.",
                )
                self.fail(f"teacher {name}", error)
            else:
                log.warn(f"teacher {name}: outputs of the wrong kind, so no other unit is made")
        units = [unit for unit in units if unit.teacher not in self.wrong]
        if result.refused:
            log.warn(f"stopped at the admission gate: {len(units)} units are not looked at")
        elif self.part == GATE:
            log.info(f"the admission gate has judged: {len(units)} units are left to the parts")
        return [] if result.refused or self.part == GATE else units

    def finish(self, result: GateResult) -> StageReport:
        """The report, and the tables of all cases: of regions where all units are made, of taps
        from the gate on, before time is spent on one that no student can learn."""
        report, registry, work = self.report, self.scope.registry, self.scope.work
        report.seconds = time.monotonic() - self._began
        if self.dry_run:
            return report
        regions, taps = [], []
        try:
            # Of a run that was refused most units are missing, and so are most regions.
            if not isinstance(self.part, Part) and not result.refused:
                taps = tap_rows(registry, work, self.usable())
            if self.part is None and not result.refused:
                regions = region_rows(registry, work, self.usable())
        except CacheError as error:  # damage that only reading finds
            self.fail("table of regions", error)
        report.details = {"regions_ml": regions, "taps": taps, **result.to_json()}
        for row in taps:
            if (doubt := doubtful_tap(row["tap"], row["agreement"])) is not None:
                self.scope.log.warn(f"teacher {row['teacher']}: {doubt}")
        part = f".{self.part.tag}" if isinstance(self.part, Part) else ""
        path = work / "reports" / f"cache-teachers{part}.json"
        try:
            write_json(path, report.to_json())
        except WorkFolderError as error:
            self.fail(path.name, error)
        if self.scope.tables:
            print_taps(taps)
            print_regions(regions)
        return report
