"""`pipeline report`: gathers what there is of a run and writes the page."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from pipeline.data.registry import Registry
from pipeline.errors import CheckpointError, ConfigError, PipelineError
from pipeline.folder import (
    Folder,
    check_writable,
    contains,
    is_local,
    refuse_foreign,
    replace_file,
    writing,
)
from pipeline.html_report.case_layers import CaseSource
from pipeline.html_report.charts import strip_charts
from pipeline.html_report.content import (
    Content,
    Shown,
    registered_teachers,
    settings_as_yaml,
    stored,
    summarised,
    training_charts,
    versions_here,
)
from pipeline.html_report.gate import read_gate
from pipeline.html_report.lineage import VALIDATION, Lineage, trace
from pipeline.html_report.page import MARK, render
from pipeline.html_report.record import RunRecord, read_run
from pipeline.html_report.regions import Regions, measure_regions
from pipeline.html_report.scores import (
    Scores,
    Student,
    kept_scores,
    open_student,
    scores_made_now,
    scores_of_predictions,
)
from pipeline.html_report.sprites import LADDER, fitting_planes
from pipeline.log import Log

_ORDINALS = ("", "second", "third", "fourth", "fifth", "sixth")


@dataclass(frozen=True)
class PageSettings:
    """What is put on the page.

    Attributes:
        predictions: a folder that `predict` and `evaluate` filled; None for validation cases.
        num_worst: so many of the worst cases are shown, beside the median one.
        regions: whether every case is read for volumes and conflicts.
        workers: processes that measure them. Changes speed only.
    """

    predictions: Path | None = None
    num_worst: int = 2
    regions: bool = True
    workers: int = 0


def write_report(
    registry: Registry,
    work: Folder,
    run: str,
    settings: PageSettings,
    output: Folder | None = None,
    *,
    device: torch.device,
    log: Log,
) -> Folder:
    """Writes the page of a run; what is missing in the run is said there, where it would stand.

    Args:
        registry: read without its files.
        work: the work folder.
        run: its name.
        settings: what is put on the page.
        output: the file; None for report.html in the run's folder.
        device: where the student predicts, if it must.
        log: where progress goes.

    Returns:
        The file.

    Raises:
        ConfigError: no such run, no scores in `predictions`, or `output` is no HTML file, or one
            that is no report.
        CheckpointError: the run's record cannot be read.
        WorkFolderError: the page cannot be written.
    """
    record = read_run(work, run)
    path = record.folder / "report.html" if output is None else output
    if path.suffix not in (".html", ".htm"):
        raise ConfigError("the page is an HTML file.", where=path, fix="Name it report.html.")
    if is_local(path):
        check_writable(path.parent)
    refuse_foreign("report", [(path, contains(path, MARK))], fix="Name another file with --output.")
    content = gather(registry, work, record, settings, device=device, log=log)
    page = render(content).encode("utf-8")
    with writing(path, "Name another file with --output."):
        replace_file(path, page)
    return path


def gather(
    registry: Registry,
    work: Folder,
    record: RunRecord,
    settings: PageSettings,
    *,
    device: torch.device,
    log: Log,
) -> Content:
    """All that the page tells; see `write_report`."""
    folder = settings.predictions
    given = None if folder is None else scores_of_predictions(folder)
    lineage = trace(work, record)
    student, broken = _student(record, device)
    scores, no_scores = _scores(record, lineage, student, broken, given, log)
    source = CaseSource(work, registry, record, lineage, student, folder)
    shown, limits = _shown(source, scores, settings.num_worst)
    regions = Regions(absent="Not measured: the page was made with --no-regions.")
    if settings.regions:
        regions = measure_regions(record, lineage, workers=settings.workers, log=log)
    organs = record.space.organs
    return Content(
        record=record,
        lineage=lineage,
        settings_yaml=settings_as_yaml(record),
        registered=registered_teachers(registry, lineage.teachers),
        gate=read_gate(work, registry, lineage.teachers),
        regions=regions,
        curves=training_charts(record),
        scores=scores,
        no_scores=no_scores,
        summaries=[] if scores is None else summarised(organs, scores),
        strips=[] if scores is None else strip_charts(organs, scores.rows),
        shown=shown,
        limits=limits,
        stored=stored(record, lineage),
        versions=versions_here(),
        made_at=time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    )


def _student(record: RunRecord, device: torch.device) -> tuple[Student | None, str]:
    """The student, or why there is none."""
    try:
        found = open_student(record, device)
    except CheckpointError as error:
        return None, f"{record.student} cannot be read: {error.what}"
    return found, "" if found else "the run has neither student.pt nor best.pt yet"


def _scores(
    record: RunRecord,
    lineage: Lineage,
    student: Student | None,
    broken: str,
    given: Scores | None,
    log: Log,
) -> tuple[Scores | None, str]:
    """Scores, or why there are none."""
    kept = given or kept_scores(record)
    if kept is not None:
        return kept, ""
    if student is None:
        return None, f"No predictions were given, and {broken}."
    opened = [lineage.open(case) for case in lineage.of(VALIDATION)]
    cases = [case for case in opened if case is not None]
    if not opened:
        return None, "No predictions were given, and the run has no validation case."
    if not cases:
        return None, (
            "No predictions were given, and the cache no longer has the run's validation cases."
        )
    scores = scores_made_now(student, cases, log)
    gone = {
        case.name: case.case.problem for case in lineage.of(VALIDATION) if case.case.unit is None
    }
    return replace(scores, failed={**gone, **scores.failed}), ""


def _shown(
    source: CaseSource, scores: Scores | None, num_worst: int
) -> tuple[list[Shown], tuple[int, int]]:
    """The worst cases and the median one, with pictures where there are any."""
    found: list[Shown] = []
    for name, why in chosen_cases(scores, num_worst):
        assert scores is not None
        rows = [row for row in scores.rows if row.case == name]
        shown = Shown(name, why, scores.cases[name], rows)
        try:
            found.append(replace(shown, layers=source.layers(name)))
        except PipelineError as error:
            found.append(replace(shown, problem=str(error)))
    pictured = [case.layers for case in found if case.layers is not None]
    planes, limits = fitting_planes(pictured) if pictured else ([], LADDER[0])
    of = iter(planes)
    return [
        case if case.layers is None else replace(case, planes=next(of)) for case in found
    ], limits


def chosen_cases(scores: Scores | None, num_worst: int) -> Sequence[tuple[str, str]]:
    """(case, why it is shown): the worst by mean Dice over organs, and the median; each once."""
    ranked = [] if scores is None else list(scores.cases)
    if not ranked:
        return []
    chosen = {}
    for number, name in enumerate(ranked[:num_worst]):
        chosen[name] = f"{_ORDINALS[number]} worst case".strip()
    chosen.setdefault(ranked[(len(ranked) - 1) // 2], "median case")
    return list(chosen.items())
