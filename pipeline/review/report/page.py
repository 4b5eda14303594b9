"""`pipeline report`: gathers what there is of a run and writes the page."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import jinja2
import yaml

from pipeline.config import versions
from pipeline.consensus.cohort import in_ml
from pipeline.data.registry import Registry
from pipeline.errors import CheckpointError, ConfigError, PipelineError, counted
from pipeline.figures import Points, draw_dice, draw_rate, draw_terms, draw_wait, svg_chart
from pipeline.folder import (
    Folder,
    check_writable,
    contains,
    is_local,
    refuse_foreign,
    replace_file,
    writing,
)
from pipeline.log import Log, duration, number
from pipeline.networks.by_name import pick_device
from pipeline.review.report.pictures import (
    CaseLayers,
    CaseSource,
    Plane,
    Sheet,
    fitting_planes,
    organ_colours,
    side_by_side,
)
from pipeline.review.report.scores import (
    Chart,
    OrganRow,
    OrganSummary,
    ReportScores,
    Student,
    kept_scores,
    scores_made_now,
    scores_of_predictions,
    strip_charts,
    summarised,
)
from pipeline.review.report.trace import (
    TRAINING,
    VALIDATION,
    Gate,
    Lineage,
    Regions,
    RunRecord,
    TracedTeacher,
    measure_regions,
    read_gate,
    read_run,
    trace,
)

# Title -> the layers that are laid over the CT.
_PANELS = {
    "CT": (),
    "reference": ("reference",),
    "teachers": ("regions", "conflict"),
    "student": ("student",),
}
_ORDINALS = ("", "second", "third", "fourth", "fifth", "sixth")


@dataclass(frozen=True)
class PageSettings:
    """What is put on the page.

    Attributes:
        predict: settings of `pipeline predict` that predictions are expected to be made with.
        predictions: a folder that `predict` and `evaluate` filled; None for validation cases.
        num_worst: so many of the worst cases are shown, beside the median one.
        regions: whether every case is read for volumes and conflicts, in `workers` processes.
    """

    predict: Mapping[str, Any]
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
    device: str,
    log: Log,
) -> Folder:
    """Writes the page of a run; what is missing in the run is said there, where it would stand.

    Args:
        registry: read without its files.
        output: the file that is returned; None for report.html in the run's folder.
        device: where the student predicts, if it must.

    Raises:
        ConfigError: no such run, no scores in `predictions`, or `output` is no HTML file, or one
            that is no report.
        CheckpointError: the run's record cannot be read.
        WorkFolderError: the page cannot be written.
    """
    if device != "auto":
        pick_device(device)
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
    device: str,
    log: Log,
) -> Content:
    """All that the page tells; see `write_report`."""
    folder = settings.predictions
    given = None if folder is None else scores_of_predictions(folder, registry, record)
    for note in () if given is None else given.notes:
        log.warn(note)
    lineage = trace(work, record)
    student, broken = _student(record, device)
    scores, no_scores = _scores(record, lineage, student, broken, given, log)
    source = CaseSource(work, registry, record, lineage, student, settings.predict, folder)
    shown, limits = _shown(source, scores, settings.num_worst)
    regions = Regions(absent="Not measured: the page was made with --no-regions.")
    if settings.regions:
        regions = measure_regions(record, lineage, workers=settings.workers, log=log)
    organs = record.space.organs
    return Content(
        record=record,
        lineage=lineage,
        settings_yaml=yaml.safe_dump(
            dict(record.settings), sort_keys=False, default_flow_style=None
        ),
        registered=registered_teachers(registry, lineage.teachers),
        gate=read_gate(work, registry, lineage.teachers),
        regions=regions,
        curves=training_charts(record),
        scores=scores,
        no_scores=no_scores,
        summaries=[] if scores is None else summarised(organs, scores),
        strips=[] if scores is None else strip_charts(record.space.ids, scores.rows),
        shown=shown,
        disputed=_disputed(source, regions),
        limits=limits,
        versions={name: versions()[name] or "not installed" for name in _PACKAGES},
        made_at=time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    )


def _student(record: RunRecord, device: str) -> tuple[Student | None, str]:
    """The student, or why there is none."""
    if record.student is None:
        return None, "the run has neither student.pt nor best.pt yet"
    try:
        return Student(record.folder / record.student, device), ""
    except CheckpointError as error:
        return None, f"{record.student} cannot be read: {error.what}"


def _scores(
    record: RunRecord,
    lineage: Lineage,
    student: Student | None,
    broken: str,
    given: ReportScores | None,
    log: Log,
) -> tuple[ReportScores | None, str]:
    """Scores, or why there are none."""
    kept = given or kept_scores(record)
    if kept is not None:
        return kept, ""
    if student is None:
        return None, f"No predictions were given, and {broken}."
    opened = [lineage.open(case) for case in lineage.of(VALIDATION)]
    cases = [case for case in opened if case is not None]
    if not cases:
        none = "cache no longer has the run's validation cases" if opened else (
            "run has no validation case"
        )  # fmt: skip
        return None, f"No predictions were given, and the {none}."
    try:
        scores = scores_made_now(student, cases, log)
    except CheckpointError as error:
        return None, f"No predictions were given, and {record.student} cannot be read: {error.what}"
    gone = {c.name: c.case.problem for c in lineage.of(VALIDATION) if c.case.unit is None}
    return replace(scores, failed={**gone, **scores.failed}), ""


def _shown(
    source: CaseSource, scores: ReportScores | None, num_worst: int
) -> tuple[list[Shown], tuple[int, int]]:
    """The worst cases and the median one, with pictures where there are any."""
    dice, rows = ({}, ()) if scores is None else (scores.cases, scores.rows)
    found = [
        _pictured(
            source, Shown(name, why, dice[name], [row for row in rows if row["case"] == name])
        )
        for name, why in chosen_cases([*dice], num_worst).items()
    ]
    planes, limits = fitting_planes([case.layers for case in found if case.layers is not None])
    of = iter(planes)
    pictured = [c if c.layers is None else replace(c, planes=next(of)) for c in found]
    return pictured, limits


def _pictured(source: CaseSource, shown: Shown) -> Shown:
    try:
        layers = source.layers(shown.name)
    except PipelineError as error:
        return replace(shown, problem=str(error))
    said, panels = side_by_side(layers, _PANELS)
    return replace(shown, layers=layers, slice=said, panels=panels)


def _disputed(source: CaseSource, regions: Regions) -> Shown | None:
    """Where two teachers claim most of the same voxels, at the slice with most of them."""
    if not regions.pairs:
        return None
    name = max(regions.cases, key=lambda case: case.conflict_ml).case
    shown = _pictured(source, Shown(name, "", 0.0, ()))
    if shown.layers is None:
        return shown
    for layer in shown.layers.layers:
        if layer.key == "conflict":
            said, panels = side_by_side(replace(shown.layers, wrong=layer.values > 0), _PANELS)
            return replace(shown, slice=said, panels=panels)
    return shown


def chosen_cases(ranked: Sequence[str], num_worst: int = 1) -> dict[str, str]:
    """Case -> why it is shown: of cases from the worst on the first few, and the median."""
    worst = zip(ranked[:num_worst], _ORDINALS, strict=False)
    chosen = {name: f"{ordinal} worst case".strip() for name, ordinal in worst}
    if ranked:
        chosen.setdefault(ranked[(len(ranked) - 1) // 2], "median case")
    return chosen


# Content -> HTML, by the templates beside this file. Everything that is put in is escaped.

TEMPLATES = Path(__file__).parent / "templates"
# Stands in every page: by it `report` knows what it may replace.
MARK = '<p class="kicker">organ-distill, report of a student run</p>'
MOST_REGION_ROWS = 60
MOST_FLAGGED_ROWS = 20
# Longer tables of cases are closed when the page opens, and on paper.
MOST_OPEN_ROWS = 12


def render(content: Content) -> str:
    """The page, whole: styles, code and pictures are in it."""
    return filled(
        "report.html",
        c=content,
        lineage=lineage_json(content.record, content.lineage),
        training=TRAINING,
        most_region_rows=MOST_REGION_ROWS,
        most_open_rows=MOST_OPEN_ROWS,
        most_flagged_rows=MOST_FLAGGED_ROWS,
    )


def filled(template: str, **values: Any) -> str:
    """A page by one of the templates."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES), autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True,
    )  # fmt: skip
    environment.filters |= {
        "score": number,
        "ml": in_ml,
        "percent": partial(number, form=".1%"),
        "duration": _duration,
        "counted": counted,
        "mm": partial(number, form=".1f"),
        "count": lambda value: f"{int(value):,}".replace(",", "\u202f"),
    }
    return environment.get_template(template).render(values)


def _duration(seconds: float | None) -> str:
    if seconds is None:
        return "–"
    return f"{seconds:.1f} s" if seconds < 10 else duration(seconds)


_PACKAGES = ("python", "organ-distill", "torch", "monai", "numpy", "zarr", "dask")


@dataclass(frozen=True)
class Shown:
    """A case in pictures: why it was chosen, its scores, one slice of it in panels and all of it in
    planes, or why there are none."""

    name: str
    why: str
    dice: float
    rows: Sequence[OrganRow]
    layers: CaseLayers | None = None
    planes: Sequence[Plane] = ()
    problem: str = ""
    slice: str = ""
    panels: Sequence[Sheet] = ()


@dataclass(frozen=True)
class Content:
    """All that the template is given.

    Attributes:
        registered: teacher -> what the registry says of it beside its numbers.
        disputed: the case in which teachers contradict each other most; None where none do.
        limits: (slices per plane, pixels of the longest side) of the pictures.
    """

    record: RunRecord
    lineage: Lineage
    settings_yaml: str
    registered: Mapping[str, Mapping[str, str]]
    gate: Gate
    regions: Regions
    curves: Sequence[Chart]
    scores: ReportScores | None
    no_scores: str
    summaries: Sequence[OrganSummary]
    strips: Sequence[Chart]
    shown: Sequence[Shown]
    disputed: Shown | None
    limits: tuple[int, int]
    versions: Mapping[str, str]
    made_at: str

    @property
    def organ_colours(self) -> Mapping[int, str]:
        """Organ id -> its colour in all pictures."""
        return organ_colours(self.record.space)

    @property
    def mean_dice(self) -> float | None:
        """Mean over organs of their means, as `pipeline evaluate` has it."""
        means = [s.spreads["Dice"].mean for s in self.summaries if "Dice" in s.spreads]
        return sum(means) / len(means) if means else None


def registered_teachers(
    registry: Registry, teachers: Sequence[TracedTeacher]
) -> dict[str, dict[str, str]]:
    """Kind, weights, licence and source of teachers, as far as the registry still has them."""
    names = ("kind", "weights", "trained_on", "licence", "source")
    return {
        teacher.name: {n: str(getattr(entry, n) or "") for n in names}
        for teacher in teachers
        if (entry := registry.teachers.get(teacher.name)) is not None
    }


def training_charts(record: RunRecord) -> list[Chart]:
    """Loss, validation Dice, throughput and waiting, as far as they were recorded."""
    if record.training is None:
        return []
    history, ids = record.training.history, record.space.ids
    terms = {name: curve.points for name, curve in history.terms.items()}
    dice = {organ: curve.points for organ, curve in history.dice.items()}
    rates, waits = history.samples_per_second.points, history.data_wait.points
    percent = [(step, 100 * share) for step, share in waits]
    throughput = f"Throughput{_last(rates, ' samples per second')}"
    waiting = f"Waiting for data{_last(percent, ' % of the time')}"
    found = [
        ("loss", "Training loss, weighted terms", terms, lambda ax: draw_terms(ax, terms)),
        ("dice", "Validation Dice", dice, lambda ax: draw_dice(ax, dice, ids)),
        ("rate", throughput, {"samples per second": rates}, lambda ax: draw_rate(ax, rates)),
        ("wait", waiting, {"% of the time": percent}, lambda ax: draw_wait(ax, waits)),
    ]
    return [
        Chart(
            key, title, _in_words(title, curves),
            svg_chart(key, draw, height=max(230.0, 60.0 + 15.0 * len(curves))),  # of the legend
        )
        for key, title, curves, draw in found
        if any(curves.values())
    ]  # fmt: skip


def _in_words(title: str, curves: Mapping[str, Points]) -> str:
    ends = [f"{n} from {p[0][1]:.3g} to {p[-1][1]:.3g}" for n, p in curves.items() if p]
    last_step = max(points[-1][0] for points in curves.values() if points)
    return f"{title}. Over {last_step:g} steps: {', '.join(ends)}."


def _last(points: Points, unit: str) -> str:
    return f", last {points[-1][1]:.3g}{unit}" if points else ""


def lineage_json(record: RunRecord, lineage: Lineage) -> dict[str, Any]:
    """Full digests, for machines that read the page."""
    return {
        "run": record.run,
        "run_digest": record.digest,
        "teachers": {
            t.name: {
                "digest": t.digest,
                "weights_sha256": None if t.inputs is None else t.inputs.get("weights_sha256"),
            }
            for t in lineage.teachers
        },
        "cases": {
            case.name: {
                "split": case.split,
                "digest": case.digest,
                "inputs": _inputs(case.case.unit, ("image_sha256", "label_sha256")),
                "units": {name: unit.receipt.digest for name, unit in case.usable.items()}
                if case.split == TRAINING
                else {},
            }
            for case in lineage.cases
        },
    }


def _inputs(unit: Any, names: Sequence[str]) -> dict[str, Any] | None:
    return None if unit is None else {name: unit.receipt.inputs.get(name) for name in names}
