"""One run of stage one: what it knows of its cases and teachers, when the gate judges, and how it
ends, alone or as one of several parts.
"""

from __future__ import annotations

import traceback
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from pipeline.admission.gate import NOT_JUDGED, Verdict, run_gate
from pipeline.admission.looks import Look, plan_looks, units_of
from pipeline.cache.index import IndexedCase, IndexedTeacher, write_teacher_index
from pipeline.cache.store import write_json
from pipeline.case_checks import check_organs
from pipeline.case_parts import (
    Everyone,
    forget_dataset,
    index_cases,
    look_at_everyone,
    record_cases,
    report_file,
    run_digest,
)
from pipeline.config import Config
from pipeline.data.files import CaseFiles
from pipeline.data.registry import Registry
from pipeline.engine.parts import Part
from pipeline.errors import CacheError, PipelineError, WorkFolderError
from pipeline.folder import Folder
from pipeline.identity import claim_teacher
from pipeline.log import Log
from pipeline.tables import print_regions, region_rows
from pipeline.unit_work import is_there
from stages.report import StageReport


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
