"""Stage one: CT + teachers -> cache.

Per case: CT -> student grid -> cases/; CT -> the teacher's own grid -> sliding window -> log-odds
and features -> student grid -> teachers/. Receipts last; what has one is skipped. The units by
which the admission gate judges the teachers come first. An engine says where cases are worked on;
a part of the cases may be all that a run has to do.
"""

from __future__ import annotations

import secrets
import time
import traceback
from collections.abc import Callable, Mapping, Sequence, Set
from dataclasses import dataclass, field

from pydantic import Field

from pipeline.admission.gate import NOT_JUDGED, Verdict, check_accepted, run_gate
from pipeline.admission.looks import Look, plan_looks, units_of
from pipeline.cache.index import IndexedCase, IndexedTeacher, write_teacher_index
from pipeline.cache.leftovers import clean_temporaries
from pipeline.cache.schema import StorageConfig
from pipeline.cache.store import prepare_work_folder, write_json
from pipeline.case_checks import check_organs
from pipeline.case_parts import (
    Everyone,
    begin_part,
    forget_dataset,
    index_cases,
    look_at_everyone,
    own_cases,
    record_cases,
    report_file,
    run_digest,
)
from pipeline.config import Config
from pipeline.data.files import CaseFiles
from pipeline.data.registry import Registry
from pipeline.engine.here import HERE, Engine, first_told
from pipeline.engine.parts import Part
from pipeline.errors import CacheError, PipelineError, WorkFolderError
from pipeline.folder import Folder
from pipeline.log import Log
from pipeline.planning.record import check_space
from pipeline.tables import print_regions, region_rows
from pipeline.teachers.sliding_window import WindowConfig
from pipeline.unit_steps import CaseJob
from pipeline.unit_work import (
    DescribeTeachers,
    MakeUnits,
    OpenTeachers,
    PrepareCases,
    Teachers,
    Told,
    is_there,
)
from stages.report import StageReport


class CacheTeachersConfig(Config):
    """How stage one computes; see cache_teachers.yaml."""

    splits: tuple[str, ...] = Field(
        default=("train", "validation", "test"), description="cases of others are left out"
    )
    window: WindowConfig = Field(default_factory=WindowConfig)
    storage: StorageConfig = Field(default_factory=StorageConfig)


@dataclass
class _Run:
    """What every step of a run needs to know."""

    config: CacheTeachersConfig
    registry: Registry
    work: Folder
    log: Log
    engine: Engine
    part: Part | None
    overlap: bool
    dry_run: bool
    accept: Sequence[str]
    show: bool
    report: StageReport = field(default_factory=lambda: StageReport("cache-teachers"))
    known: Mapping[str, IndexedTeacher] = field(default_factory=dict)
    files: Sequence[CaseFiles] = ()

    def usable(self) -> list[str]:
        """Datasets that nothing is wrong with as a whole."""
        return [d for d in self.registry.datasets if f"dataset {d}" not in self.report.failed]

    def fail(self, unit: str, error: Exception) -> None:
        """One unit's failure does not stop the others; what nobody foresaw keeps its traceback."""
        self.report.failed[unit] = error
        known = isinstance(error, PipelineError)
        text = str(error) if known else "".join(traceback.format_exception(error))
        self.log.warn(f"{unit} failed: {text}")

    def everyone(self) -> Everyone:
        """What all parts have done; without parts this run is all there is."""
        assert self.part is not None
        tag = run_digest(self.registry, self.known, self.config, self.part)
        return look_at_everyone(self.registry, self.work, self.files, self.part, tag)


def run(
    config: CacheTeachersConfig,
    registry: Registry,
    work: Folder,
    *,
    log: Log,
    engine: Engine = HERE,
    part: Part | None = None,
    device: str = "auto",
    window_batch: int = 1,
    overlap: bool = True,
    force: bool = False,
    accept: Sequence[str] = (),
    dry_run: bool = False,
    tables: bool = True,
) -> StageReport:
    """Fills the cache; a second run does nothing.

    A teacher that the gate refuses is in the report as failed, and nothing is cached after that.
    A part judges when the units that the gate looks at are all there, or all other parts have
    ended; until then it goes on unjudged, since nobody can say whether the others will ever run.

    Args:
        config: what changes numbers.
        registry: read with its files.
        work: the work folder.
        log: where progress goes.
        engine: where cases are worked on; the registry and the work folder must be reached there
            by the same paths.
        part: do these cases only; None: all.
        device: auto, cpu, cuda, cuda:1.
        window_batch: windows per forward pass, at most.
        overlap: read the next case and write the last one while a network runs; without it, one
            thing at a time, with less memory.
        force: start even if what is still to be made will not fit.
        accept: teachers to go on with although the gate would stop at them.
        dry_run: say what would be done, write nothing.
        tables: also print the tables of teachers and of regions.

    Raises:
        PipelineError: nothing can be done at all: no work folder, a teacher that does not load,
            a disk that is too small, an unknown name in `accept`, an engine that is gone.
            What concerns one case is in the report instead, and the other cases are done.
    """
    began = time.monotonic()
    this = _Run(config, registry, work, log, engine, part, overlap, dry_run, accept, tables)
    check_accepted(registry, accept)
    if not dry_run:
        prepare_work_folder(work)
        removed = clean_temporaries(work)
        if removed:
            log.info(f"removed {removed} unfinished units of a run that was killed")
        if part is not None:
            begin_part(work, part)
    open_teachers = _teachers(this, device, window_batch)
    files = [c for d in registry.datasets for c in registry.cases(d) if c.split in config.splits]
    own = this.files = files
    if part is not None:
        own = own_cases(registry, files, config.splits, part)
        log.info(f"{part}: {len(own)} of {len(files)} cases")
    log.info(f"{len(own)} cases, {len(this.known)} teachers -> {work}")
    check_space(
        registry, work, this.known,
        splits=config.splits, storage=config.storage, log=log, force=force or dry_run,
    )  # fmt: skip
    prepared = _prepare_cases(this, own)
    if not dry_run:
        _check_and_index(this, own, list(prepared.values()))
    sources = {source.name: source for source in own}
    jobs = {
        name: CaseJob(case, sources[name], tuple(this.known))
        for name, case in prepared.items()
        if case.dataset in this.usable()
    }
    cases = [job.case for job in jobs.values()] if part is None else this.everyone().cases
    looks = plan_looks(registry, cases)
    asked = frozenset(unit for unit in units_of(looks) if unit[1] in jobs)
    _make(this, open_teachers, jobs, asked, "units of the admission gate")
    verdict = NOT_JUDGED if dry_run else _judge(this, looks)
    others = {(name, case) for name in this.known for case in jobs} - asked
    if verdict.refused:
        log.warn(f"stopped at the admission gate: {len(others)} units are not looked at")
    else:
        _make(this, open_teachers, jobs, others, "teachers", verdict)
    this.report.seconds = time.monotonic() - began
    if not dry_run:
        _finish(this, verdict)
    return this.report


def _teachers(this: _Run, device: str, window_batch: int) -> Callable[[], Teachers]:
    """What opens the teachers where units are made. With workers elsewhere, this process loads no
    network: one of them says what the teachers are."""
    config = this.config
    opens = OpenTeachers(
        this.registry, config.window, config.storage, device, window_batch,
        run=secrets.token_hex(8) if this.engine.remote else "",
    )  # fmt: skip
    if this.engine.remote:
        this.known = first_told(this.engine, DescribeTeachers(opens), name="loading teachers")
        return opens
    teachers = opens()
    this.known = {name: loaded.indexed for name, loaded in teachers.items()}
    return lambda: teachers


def _prepare_cases(this: _Run, own: Sequence[CaseFiles]) -> dict[str, IndexedCase]:
    """Every case is read and put on the student grid before any teacher runs, so that bad input is
    found before GPU time is spent. In the order of `own`."""
    found: dict[str, IndexedCase] = {}
    work = PrepareCases(this.registry, this.work, this.config.storage, this.dry_run, this.overlap)
    with this.log.progress("cases on the student grid", len(own)) as advance:

        def tell(told: Told) -> None:
            if told.indexed is not None:
                found[told.case] = told.indexed
            _note(this, told)
            advance(told.case)

        def lost(source: CaseFiles, error: Exception) -> None:
            this.fail(source.name, error)
            advance(source.name)

        this.engine.run(work, own, tell=tell, lost=lost, name=lambda source: source.name)
    return {source.name: found[source.name] for source in own if source.name in found}


def _make(
    this: _Run,
    open_teachers: Callable[[], Teachers],
    jobs: Mapping[str, CaseJob],
    units: Set[tuple[str, str]],
    what: str,
    verdict: Verdict = NOT_JUDGED,
) -> None:
    """Makes those of `units` (teacher, case) that are not there."""
    digests = {name: teacher.digest for name, teacher in this.known.items()}
    notes = {name: verdict.notes(name) for name in this.known if verdict.notes(name)}
    work = MakeUnits(
        this.registry, this.work, this.config.storage, open_teachers, digests, notes,
        this.overlap, this.dry_run,
    )  # fmt: skip
    wanted = [
        CaseJob(job.case, job.source, tuple(t for t in job.teachers if (t, name) in units))
        for name, job in jobs.items()
    ]
    with this.log.progress(what, len(units)) as advance:

        def tell(told: Told) -> None:
            _note(this, told)
            advance(told.case)

        def lost(job: CaseJob, error: Exception) -> None:
            for name in job.teachers:
                unit = f"{name} x {job.case.name}"
                if is_there(this.work, this.known[name], job.case):
                    this.report.done.append(unit)  # before its case was lost
                else:
                    this.fail(unit, error)
                advance(job.case.name)

        left = [job for job in wanted if job.teachers]
        this.engine.run(work, left, tell=tell, lost=lost, name=lambda job: job.case.name)


def _note(this: _Run, told: Told) -> None:
    if told.damage:
        this.log.warn(f"{told.damage} It is made again.")
    if told.error is not None:
        this.fail(told.unit, told.error)
        return
    (this.report.done if told.made else this.report.skipped).append(told.unit)
    this.log.detail(f"{told.unit}: {'made' if told.made else 'was there'}")
    this.report.num_bytes += told.num_bytes
    if told.made and told.path and not this.dry_run:
        this.log.event("unit", unit=told.unit, path=told.path)


def _check_and_index(this: _Run, own: Sequence[CaseFiles], prepared: Sequence[IndexedCase]) -> None:
    """What is wrong with a dataset as a whole only shows in all its cases: parts leave that to the
    one that comes last."""
    registry, work = this.registry, this.work
    for what, wrong in check_organs(registry, work, prepared).items():
        if this.part is None or not what.startswith("dataset "):
            this.fail(what, wrong)
    for name, teacher in this.known.items():
        write_teacher_index(work, registry.teacher_key(name), teacher)
    failed = [source for source in own if source.name in this.report.failed]
    if this.part is not None:
        record_cases(registry, work, prepared, failed)
    else:
        index_cases(registry, work, prepared, this.usable(), this.config.splits)


def _judge(this: _Run, looks: Sequence[Look]) -> Verdict:
    """The gate's verdict; in a part, NOT_JUDGED while units of others may still come."""
    if this.part is not None:
        everyone = this.everyone()
        cases = [case for case in everyone.cases if case.dataset in this.usable()]
        looks = plan_looks(this.registry, cases)
        by_name = {case.name: case for case in cases}
        absent = sum(
            not is_there(this.work, this.known[teacher], by_name[case])
            for teacher, case in units_of(looks)
        )
        if not everyone.all_finished and (absent or not everyone.all_prepared):
            this.log.info(
                "the admission gate has not judged: units that it looks at are still with other "
                "parts. Whichever part finds them all there judges."
            )
            return NOT_JUDGED
    verdict = run_gate(
        this.registry, this.work, this.known, looks,
        accept=this.accept, log=this.log, show=this.show,
    )  # fmt: skip
    for what, error in verdict.failed.items():
        if what not in this.report.failed:
            this.fail(what, error)
    return verdict


def _finish(this: _Run, verdict: Verdict) -> None:
    """The report, tables, and what only the last of several parts can tell."""
    regions = []
    whole = this.part is None
    if this.part is not None:
        # First say that this part has ended, then look: of two that end at once, one sees both.
        tag = run_digest(this.registry, this.known, this.config, this.part)
        this.report.details = {"run": tag, "part": this.part.number, "num_parts": this.part.of}
        _write_report(this)
        whole = this.everyone().all_finished
        if whole:
            _check_datasets(this)
        if verdict is NOT_JUDGED:
            verdict = _judge(this, [])
    try:
        if whole and not verdict.refused:  # else most units are missing, and so are most regions
            regions = region_rows(this.registry, this.work, this.usable())
    except CacheError as error:  # damage that only reading finds
        this.fail("table of regions", error)
    this.report.details |= {"regions_ml": regions, **verdict.to_json()}
    _write_report(this)
    if this.show:
        print_regions(regions)


def _check_datasets(this: _Run) -> None:
    for what, wrong in check_organs(this.registry, this.work, this.everyone().cases).items():
        if what.startswith("dataset "):
            this.fail(what, wrong)
            forget_dataset(this.registry, this.work, what.removeprefix("dataset "))


def _write_report(this: _Run) -> None:
    path = report_file(this.work, this.part)
    try:
        write_json(path, this.report.to_json())
    except WorkFolderError as error:
        this.fail(path.name, error)
