"""Stage one: CT + teachers -> cache.

Per case: CT -> student grid -> cases/; CT -> the teacher's own grid -> sliding window -> log-odds
and features -> student grid -> teachers/. Receipts last; what has one is skipped. The units by
which the admission gate judges the teachers come first. An engine says where cases are worked on; a
part of the cases may be all that a run has to do.
"""

from __future__ import annotations

import json
import secrets
import time
import traceback
from collections.abc import Callable, Iterable, Mapping, Sequence, Set
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Any

from pydantic import Field

from pipeline.cache.cases import check_organs
from pipeline.cache.identity import claim_dataset, claim_teacher
from pipeline.cache.index import (
    IndexedCase,
    IndexedTeacher,
    case_records,
    dataset_file,
    read_dataset_index,
    read_sealed,
    write_case_record,
    write_dataset_index,
    write_failed_record,
    write_teacher_index,
)
from pipeline.cache.places import clean_temporaries
from pipeline.cache.schema import StorageConfig
from pipeline.cache.store import prepare_work_folder, write_json
from pipeline.config import Config, digest
from pipeline.consensus.cohort import print_regions, region_rows
from pipeline.consensus.evidence import Look, plan_looks, units_of
from pipeline.consensus.gate import NOT_JUDGED, Verdict, check_accepted, run_gate
from pipeline.data.entries import CaseFiles
from pipeline.data.registry import Registry
from pipeline.data.sizes import case_sizes
from pipeline.engine.here import HERE, Engine, first_told
from pipeline.engine.parts import Part, share
from pipeline.errors import CacheError, CacheStale, OutputsError, PipelineError, WorkFolderError
from pipeline.folder import Folder, matching, read_text, remove
from pipeline.log import Log
from pipeline.networks.windows import WindowConfig
from pipeline.setup.plan import check_space
from pipeline.teachers.units import (
    CaseJob,
    DescribeTeachers,
    MakeUnits,
    OpenTeachers,
    PrepareCases,
    Teachers,
    Told,
    is_there,
)
from stages.report import StageReport

# One run of stage one: what it knows of its cases and teachers, when the gate judges, and how it
# ends, alone or as one of several parts.


@dataclass(kw_only=True)
class CacheRun:
    """What is known of a run, and what came of it.

    Attributes:
        config: what changes numbers.
        registry: read with its files.
        work: the work folder.
        log: where progress goes.
        part: the part of the cases that is this run's; None: all of them.
        accept: teachers to go on with although the gate would stop at them.
        show: print tables.
        report: of the stage.
        known: teachers, by name.
        files: cases of all parts.
    """

    config: Config
    registry: Registry
    work: Folder
    log: Log
    part: Part | None
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

    def index(
        self, own: Sequence[CaseFiles], prepared: Sequence[IndexedCase], splits: Sequence[str]
    ) -> None:
        """Tells what is wrong with organs, and writes which cases and teachers there are.

        What is wrong with a dataset as a whole only shows in all its cases: parts leave that to
        the one that comes last.

        Args:
            own: cases of this run.
            prepared: those of them that are on the student grid.
            splits: that the index is of.
        """
        registry, work = self.registry, self.work
        for what, wrong in check_organs(registry, work, prepared).items():
            if self.part is None or not what.startswith("dataset "):
                self.fail(what, wrong)
        for name, teacher in self.known.items():
            origin = claim_teacher(work, registry, teacher)
            write_teacher_index(work, registry.teacher_key(name), replace(teacher, origin=origin))
        failed = [source for source in own if source.name in self.report.failed]
        if self.part is not None:
            record_cases(registry, work, prepared, failed)
        else:
            index_cases(registry, work, prepared, self.usable(), splits)

    def judge(self, looks: Sequence[Look]) -> Verdict:
        """The gate's verdict; in a part, NOT_JUDGED while units of others may still come."""
        if self.part is not None:
            everyone = self.everyone()
            cases = [case for case in everyone.cases if case.dataset in self.usable()]
            looks = plan_looks(self.registry, cases)
            by_name = {case.name: case for case in cases}
            absent = sum(
                not is_there(self.work, self.known[teacher], by_name[case])
                for teacher, case in units_of(looks)
            )
            if not everyone.all_finished and (absent or not everyone.all_prepared):
                self.log.info(
                    "the admission gate has not judged: units that it looks at are still with "
                    "other parts. Whichever part finds them all there judges."
                )
                return NOT_JUDGED
        verdict = run_gate(
            self.registry, self.work, self.known, looks,
            accept=self.accept, log=self.log, show=self.show,
        )  # fmt: skip
        for what, error in verdict.failed.items():
            if what not in self.report.failed:
                self.fail(what, error)
        return verdict

    def finish(self, verdict: Verdict) -> None:
        """The report, tables, and what only the last of several parts can tell."""
        regions = []
        whole = self.part is None
        if self.part is not None:
            # First say that this part has ended, then look: of two that end at once, one sees both.
            tag = run_digest(self.registry, self.known, self.config, self.part)
            self.report.details = {"run": tag, "part": self.part.number, "num_parts": self.part.of}
            self._write_report()
            whole = self.everyone().all_finished
            if whole:
                self._check_datasets()
            if verdict is NOT_JUDGED:
                verdict = self.judge([])
        try:
            # Of a run that was refused most units are missing, and so are most regions.
            if whole and not verdict.refused:
                regions = region_rows(self.registry, self.work, self.usable())
        except CacheError as error:  # damage that only reading finds
            self.fail("table of regions", error)
        self.report.details |= {"regions_ml": regions, **verdict.to_json()}
        self._write_report()
        if self.show:
            print_regions(regions)

    def _check_datasets(self) -> None:
        for what, wrong in check_organs(self.registry, self.work, self.everyone().cases).items():
            if what.startswith("dataset "):
                self.fail(what, wrong)
                forget_dataset(self.registry, self.work, what.removeprefix("dataset "))

    def _write_report(self) -> None:
        path = report_file(self.work, self.part)
        try:
            write_json(path, self.report.to_json())
        except WorkFolderError as error:
            self.fail(path.name, error)


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


# What a run of stage one leaves in the index; and one part of it among others that nobody
# coordinates: which cases are its own, and what the others have left.


def own_cases(
    registry: Registry, files: Sequence[CaseFiles], splits: Sequence[str], part: Part
) -> list[CaseFiles]:
    """The cases of a part, so that all parts take about as long: cost follows the voxels of the CT
    and those on the student grid, by headers alone, and is the same factor for every teacher.

    A case whose header cannot be read belongs to a part too, which reports it.
    """
    sizes, _ = case_sizes(registry, splits)
    known = {size.source.name: float(size.native_voxels + size.voxels) for size in sizes}
    costs = {case.name: known.get(case.name, 1.0) for case in files}
    own = set(share(costs, part.of)[part.number])
    return [case for case in files if case.name in own]


def index_cases(
    registry: Registry,
    work: Folder,
    indexed: Sequence[IndexedCase],
    datasets: Iterable[str],
    splits: Sequence[str],
) -> None:
    """The index of whole datasets, by a run over all their cases. Cases of splits that it leaves
    out stay as an earlier run saw them.

    Raises:
        WorkFolderError: it cannot be written, or the entry is another project's.
    """
    for dataset in datasets:
        key = registry.dataset_key(dataset)
        origin = claim_dataset(work, registry, dataset)
        known = registry.cases(dataset)
        left_out = {c.case for c in known if c.split not in splits}
        try:
            earlier = [c for c in read_dataset_index(work, dataset, key) if c.case in left_out]
        except CacheStale:
            earlier = []
        cases = [*(case for case in indexed if case.dataset == dataset), *earlier]
        absent = {c.case for c in known} - {c.case for c in cases}
        write_dataset_index(work, dataset, key, cases, origin=origin, left_out=absent)


def held_out_since(registry: Registry, work: Folder, files: Sequence[CaseFiles]) -> list[str]:
    """Validation and test cases that trained when another registry filled this work folder: what
    was trained then has seen them. Once this registry is in the index, nothing more is said.

    Raises:
        WorkFolderError: the index cannot be listed.
    """
    new = {
        dataset
        for dataset in registry.datasets
        for key in [registry.dataset_key(dataset)]
        if not dataset_file(work, dataset, key).exists() and not case_records(work, dataset, key)
    }
    trained = set()
    for pattern in ("datasets/[!.]*.json", "datasets/*/[!.]*.json") if new else ():
        for path in matching(work / "index", pattern):
            with suppress(OSError, ValueError, KeyError, TypeError):  # which others report
                content = read_sealed(path)
                trained |= {
                    f"{content['dataset']}/{case['case']}"
                    for case in content["cases"]
                    if case["split"] == "train"
                }
    return [c.name for c in files if c.dataset in new and c.split != "train" and c.name in trained]


def record_cases(
    registry: Registry, work: Folder, indexed: Iterable[IndexedCase], failed: Iterable[CaseFiles]
) -> None:
    """Leaves a record of each own case; in that of one that failed now, there is no case.

    Raises:
        WorkFolderError: it cannot be written, or the entry is another project's.
    """
    keys = {name: registry.dataset_key(name) for name in registry.datasets}
    origins = {name: claim_dataset(work, registry, name) for name in registry.datasets}
    for case in indexed:
        name = case.dataset
        write_case_record(work, keys[name], case, origin=origins[name])
    for source in failed:
        name = source.dataset
        write_failed_record(work, name, keys[name], source.case, origin=origins[name])


def forget_dataset(registry: Registry, work: Folder, dataset: str) -> None:
    """Stage two must not find a dataset that turned out to be wrong as a whole."""
    key = registry.dataset_key(dataset)
    for record in case_records(work, dataset, key):
        remove(record)


@dataclass(frozen=True)
class Everyone:
    """What all parts together have done so far.

    Attributes:
        cases: of all parts, as far as they are on the student grid.
        all_prepared: each case of the registry is among them.
        all_finished: every other part has come to its end, whatever became of its units.
    """

    cases: Sequence[IndexedCase]
    all_prepared: bool
    all_finished: bool


def look_at_everyone(
    registry: Registry, work: Folder, files: Sequence[CaseFiles], part: Part, run: str
) -> Everyone:
    """Reads what all parts have left.

    Args:
        registry: what exists.
        work: the work folder.
        files: the cases of all parts.
        part: the one that asks.
        run: from `run_digest`.
    """
    wanted = {case.name for case in files}
    cases: list[IndexedCase] = []
    for dataset in registry.datasets:
        try:
            found = read_dataset_index(work, dataset, registry.dataset_key(dataset))
        except CacheStale:
            continue
        cases += [case for case in found if case.name in wanted]
    finished = all(_finished_run(work, other) == run for other in part.others())
    return Everyone(cases, len(cases) == len(wanted), finished)


def run_digest(
    registry: Registry, teachers: Mapping[str, IndexedTeacher], settings: Any, part: Part
) -> str:
    """What parts have in common that belong together."""
    return digest(
        {
            "datasets": {name: registry.dataset_key(name) for name in registry.datasets},
            "teachers": {name: teacher.digest for name, teacher in teachers.items()},
            "settings": settings,
            "num_parts": part.of,
        }
    )


def report_file(work: Folder, part: Part | None) -> Folder:
    """Where stage one's report is; that of a part says, by being there, that it came to its end."""
    name = "cache-teachers" if part is None else f"cache-teachers.{part.tag}"
    return work / "reports" / f"{name}.json"


def begin_part(work: Folder, part: Part) -> None:
    """A part that runs again has not come to its end."""
    remove(report_file(work, part))


def _finished_run(work: Folder, part: Part) -> str | None:
    try:
        content = json.loads(read_text(report_file(work, part)))
        return str(content["run"])
    except (OSError, ValueError, KeyError, TypeError):
        return None
