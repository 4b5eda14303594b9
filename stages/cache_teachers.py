"""Stage one: CT + teachers -> cache.

Per case: CT -> student grid -> cases/; CT -> the teacher's own grid -> sliding window -> log-odds
and features -> student grid -> teachers/. Receipts last; what has one is skipped. The units by
which the admission gate judges the teachers come first.
"""

from __future__ import annotations

import time
import traceback
from collections.abc import Callable, Mapping, Sequence, Set
from contextlib import closing
from functools import partial
from typing import Any

from pydantic import Field

from pipeline.admission.gate import NOT_JUDGED, Verdict, check_accepted, run_gate
from pipeline.admission.looks import plan_looks, units_of
from pipeline.cache.index import (
    IndexedCase,
    read_dataset_index,
    write_dataset_index,
    write_teacher_index,
)
from pipeline.cache.leftovers import clean_temporaries
from pipeline.cache.schema import StorageConfig
from pipeline.cache.store import prepare_work_folder, write_json
from pipeline.case_checks import check_organs
from pipeline.config import Config
from pipeline.data.files import CaseFiles
from pipeline.data.registry import Registry
from pipeline.engine.overlap import in_turn, overlapped
from pipeline.errors import CacheError, CacheStale, PipelineError, WorkFolderError
from pipeline.folder import Folder
from pipeline.log import Log
from pipeline.network import pick_device
from pipeline.planning.record import check_space
from pipeline.tables import print_regions, region_rows
from pipeline.teachers.sliding_window import WindowConfig
from pipeline.teachers.window_passes import check_precision
from pipeline.unit_steps import CaseSteps, Unit, UnitSteps, missing_units
from pipeline.units import LoadedTeacher, open_teacher
from stages.report import StageReport


class CacheTeachersConfig(Config):
    """How stage one computes; see cache_teachers.yaml."""

    splits: tuple[str, ...] = ("train", "validation", "test")
    window: WindowConfig = Field(default_factory=WindowConfig)
    storage: StorageConfig = Field(default_factory=StorageConfig)


def run(
    config: CacheTeachersConfig,
    registry: Registry,
    work: Folder,
    *,
    log: Log,
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

    Args:
        config: what changes numbers.
        registry: read with its files.
        work: the work folder.
        log: where progress goes.
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
            a disk that is too small, an unknown name in `accept`.
            What concerns one case is in the report instead, and the other cases are done.
    """
    began = time.monotonic()
    report = StageReport("cache-teachers")
    check_accepted(registry, accept)
    if not dry_run:
        prepare_work_folder(work)
        removed = clean_temporaries(work)
        if removed:
            log.info(f"removed {removed} unfinished units of a run that was killed")
    check_precision(config.window.precision, pick_device(device))
    teachers = {
        name: open_teacher(
            name, registry, window=config.window, storage=config.storage,
            device=device, window_batch=window_batch,
        )
        for name in registry.teachers
    }  # fmt: skip
    files = [c for d in registry.datasets for c in registry.cases(d) if c.split in config.splits]
    log.info(f"{len(files)} cases, {len(teachers)} teachers -> {work}")
    check_space(
        registry, work, {name: loaded.indexed for name, loaded in teachers.items()},
        splits=config.splits, storage=config.storage, log=log, force=force or dry_run,
    )  # fmt: skip
    indexed = _prepare_cases(
        config, registry, work, files, report, log=log, dry_run=dry_run, overlap=overlap
    )
    if not dry_run:
        for what, wrong in check_organs(registry, work, [case for case, _ in indexed]).items():
            _fail(report, log, what, wrong)
        _write_index(config, registry, work, indexed, teachers, _usable_datasets(registry, report))
    usable = _usable_datasets(registry, report)
    jobs = [(case, source) for case, source in indexed if case.dataset in usable]
    make = partial(
        _cache_units, config, registry, work, teachers, jobs, report,
        log=log, dry_run=dry_run, overlap=overlap,
    )  # fmt: skip
    looks = plan_looks(registry, [case for case, _ in jobs])
    asked = units_of(looks)
    make(asked, "units of the admission gate")
    verdict = NOT_JUDGED
    if not dry_run:
        known = {name: loaded.indexed for name, loaded in teachers.items()}
        verdict = run_gate(registry, work, known, looks, accept=accept, log=log, show=tables)
        for what, error in verdict.failed.items():
            if what not in report.failed:
                _fail(report, log, what, error)
    others = {(name, case.name) for name in teachers for case, _ in jobs} - asked
    if verdict.refused:
        log.warn(f"stopped at the admission gate: {len(others)} units are not looked at")
    else:
        make(others, "teachers", notes=verdict.notes)
    report.seconds = time.monotonic() - began
    if not dry_run:
        _tell(registry, work, usable, verdict, report, log=log, show=tables)
    return report


def _cache_units(
    config: CacheTeachersConfig,
    registry: Registry,
    work: Folder,
    teachers: Mapping[str, LoadedTeacher],
    jobs: Sequence[tuple[IndexedCase, CaseFiles]],
    report: StageReport,
    units: Set[tuple[str, str]],
    what: str,
    *,
    notes: Callable[[str], Mapping[str, Any]] = lambda _: {},
    log: Log,
    dry_run: bool,
    overlap: bool,
) -> None:
    """Makes those of `units` (teacher, case) that are not there: the next CT is read while a
    network runs and the last unit is written. `notes` of a teacher go into the receipts."""
    steps = UnitSteps(registry, config.storage, notes)
    order = overlapped if overlap else in_turn
    with log.progress(what, len(units)) as advance:

        def there(unit: Unit, done: list[str] = report.skipped) -> None:
            done.append(unit.name)
            advance(unit.case.name)

        missing = missing_units(work, teachers, jobs, units, there=there, log=log)
        if dry_run:
            for unit in missing:
                there(unit, report.done)
            return
        with closing(
            order(missing, ahead=steps.read, work=steps.compute, behind=steps.store)
        ) as outcomes:
            for outcome in outcomes:
                unit = outcome.item
                if outcome.error is not None:
                    _fail(report, log, unit.name, outcome.error)
                else:
                    report.done.append(unit.name)
                    report.num_bytes += outcome.result or 0
                    log.event("unit", unit=unit.name, path=str(unit.path))
                advance(unit.case.name)


def _prepare_cases(
    config: CacheTeachersConfig,
    registry: Registry,
    work: Folder,
    files: Sequence[CaseFiles],
    report: StageReport,
    *,
    log: Log,
    dry_run: bool,
    overlap: bool = True,
) -> list[tuple[IndexedCase, CaseFiles]]:
    """Every case is read and put on the student grid before any teacher runs, so that bad input is
    found before GPU time is spent."""
    steps = CaseSteps(registry, work, config.storage, dry_run)
    prepared = []
    order = overlapped if overlap else in_turn
    with (
        log.progress("cases on the student grid", len(files)) as advance,
        closing(order(files, ahead=steps.read, work=steps.fit, behind=steps.store)) as outcomes,
    ):
        for outcome in outcomes:
            source = outcome.item
            if outcome.result is None:
                assert outcome.error is not None
                _fail(report, log, source.name, outcome.error)
            else:
                indexed, wrote = outcome.result
                prepared.append((indexed, source))
                (report.skipped if wrote is None else report.done).append(indexed.name)
                report.num_bytes += wrote or 0
            advance(source.name)
    return prepared


def _write_index(
    config: CacheTeachersConfig,
    registry: Registry,
    work: Folder,
    indexed: Sequence[tuple[IndexedCase, CaseFiles]],
    teachers: Mapping[str, LoadedTeacher],
    datasets: Sequence[str],
) -> None:
    """Cases of splits that this run leaves out stay as an earlier run saw them."""
    for dataset in datasets:
        key = registry.dataset_key(dataset)
        left_out = {c.case for c in registry.cases(dataset) if c.split not in config.splits}
        try:
            earlier = [c for c in read_dataset_index(work, dataset, key) if c.case in left_out]
        except CacheStale:
            earlier = []
        cases = [case for case, _ in indexed if case.dataset == dataset]
        write_dataset_index(work, dataset, key, [*cases, *earlier])
    for name, loaded in teachers.items():
        write_teacher_index(work, registry.teacher_key(name), loaded.indexed)


def _usable_datasets(registry: Registry, report: StageReport) -> list[str]:
    return [d for d in registry.datasets if f"dataset {d}" not in report.failed]


def _fail(report: StageReport, log: Log, unit: str, error: Exception) -> None:
    """One unit's failure does not stop the others; what nobody foresaw keeps its traceback."""
    report.failed[unit] = error
    known = isinstance(error, PipelineError)
    text = str(error) if known else "".join(traceback.format_exception(error))
    log.warn(f"{unit} failed: {text}")


def _tell(
    registry: Registry,
    work: Folder,
    datasets: Sequence[str],
    verdict: Verdict,
    report: StageReport,
    *,
    log: Log,
    show: bool,
) -> None:
    regions = []
    try:
        if not verdict.refused:  # else most units are missing, and so are most regions
            regions = region_rows(registry, work, datasets)
    except CacheError as error:  # damage that only reading finds
        _fail(report, log, "table of regions", error)
    report.details = {"regions_ml": regions, **verdict.to_json()}
    path = work / "reports" / "cache-teachers.json"
    try:
        write_json(path, report.to_json())
    except WorkFolderError as error:
        _fail(report, log, path.name, error)
    if show:
        print_regions(regions)
