"""Stage one: CT + teachers -> cache.

Per case: CT -> student grid -> cases/; CT -> the teacher's own grid -> sliding window -> log-odds
and features -> student grid -> teachers/. Receipts last; what has one is skipped. The units by
which the admission gate judges the teachers come first. An engine says where cases are worked on;
a part of the cases may be all that a run has to do.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable, Mapping, Sequence, Set
from dataclasses import dataclass, field

from pydantic import Field

from pipeline.admission.gate import NOT_JUDGED, Verdict, check_accepted
from pipeline.admission.looks import plan_looks, units_of
from pipeline.cache.index import IndexedCase
from pipeline.cache.leftovers import clean_temporaries
from pipeline.cache.schema import StorageConfig
from pipeline.cache.store import prepare_work_folder
from pipeline.cache_run import CacheRun
from pipeline.case_parts import begin_part, held_out_since, own_cases
from pipeline.config import Config
from pipeline.data.files import CaseFiles
from pipeline.data.registry import Registry
from pipeline.engine.here import HERE, Engine, first_told
from pipeline.engine.parts import Part
from pipeline.errors import OutputsError
from pipeline.folder import Folder
from pipeline.identity import claim_dataset, claim_teacher
from pipeline.log import Log
from pipeline.planning.record import check_space
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


_NAMED = 5


@dataclass(kw_only=True)
class _Run(CacheRun):
    """And how units are made."""

    config: CacheTeachersConfig
    engine: Engine
    overlap: bool
    dry_run: bool
    wrong: set[str] = field(default_factory=set)  # teachers of which no unit can be right


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
            a disk that is too small, an unknown name in `accept`, an engine that is gone, an
            entry of the index that is another project's.
            What concerns one case is in the report instead, and the other cases are done.
    """
    began = time.monotonic()
    this = _Run(
        config=config, registry=registry, work=work, log=log, part=part, accept=accept,
        show=tables, engine=engine, overlap=overlap, dry_run=dry_run,
    )  # fmt: skip
    check_accepted(registry, accept)
    for dataset in registry.datasets:
        claim_dataset(work, registry, dataset, log=log)
    if not dry_run:
        prepare_work_folder(work)
        removed = clean_temporaries(work)
        if removed:
            log.info(f"removed {removed} unfinished units of a run that was killed")
        if part is not None:
            begin_part(work, part)
    open_teachers = _teachers(this, device, window_batch)
    for teacher in this.known.values():
        claim_teacher(work, registry, teacher, log=log)
    files = [c for d in registry.datasets for c in registry.cases(d) if c.split in config.splits]
    own = this.files = files
    for note in registry.empty_splits(config.splits):
        log.remark(note)
    if seen := held_out_since(registry, work, files):
        more = f" and {len(seen) - _NAMED} more" if len(seen) > _NAMED else ""
        log.remark(
            "these validation and test cases were training cases when this work folder was filled "
            f"before: {', '.join(seen[:_NAMED])}{more}. What was trained then has seen them: train "
            "it again, or keep the splits of then (docs/registry.md, Registries from before)."
        )
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
        this.index(own, list(prepared.values()), config.splits)
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
    verdict = NOT_JUDGED if dry_run else this.judge(looks)
    usable = [name for name in this.known if name not in this.wrong]
    for name in sorted(this.wrong):
        log.warn(f"teacher {name}: outputs of the wrong kind, so no other unit of it is made")
    others = {(name, case) for name in usable for case in jobs} - asked
    if verdict.refused:
        log.warn(f"stopped at the admission gate: {len(others)} units are not looked at")
    else:
        _make(this, open_teachers, jobs, others, "teachers", verdict)
    this.report.seconds = time.monotonic() - began
    if not dry_run:
        this.finish(verdict)
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
            _tell(this, told)
            advance(told.case)

        def lost(source: CaseFiles, error: Exception) -> None:
            this.fail(source.name, error)
            advance(source.name)

        this.engine.run(work, own, tell=tell, lost=lost, name=lambda source: source.name)
    again = [name for name in this.report.warnings if name in this.report.skipped]
    if again:
        this.log.warn(
            f"{len(again)} cases that are there already have warnings, the first {again[0]}: "
            f"{this.report.warnings[again[0]][0]} All of them are under `warnings` in the stage's "
            "report (reports/ in the work folder, or --report)."
        )
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
            _tell(this, told)
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


def _tell(this: _Run, told: Told) -> None:
    if told.damage:
        this.log.warn(f"{told.damage} It is made again.")
    if told.error is not None:
        if isinstance(told.error, OutputsError):
            this.wrong.add(told.unit.removesuffix(f" x {told.case}"))
        this.fail(told.unit, told.error)
        return
    (this.report.done if told.made else this.report.skipped).append(told.unit)
    if told.warnings:
        this.report.warnings[told.unit] = list(told.warnings)
        for text in told.warnings if told.made else ():
            this.log.warn(f"{told.unit}: {text}")
    this.log.detail(f"{told.unit}: {'made' if told.made else 'was there'}")
    this.report.num_bytes += told.num_bytes
    if told.made and told.path and not this.dry_run:
        this.log.event("unit", unit=told.unit, path=told.path)
