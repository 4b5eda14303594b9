"""`pipeline report`: gathers what there is of a run and writes the page."""

from __future__ import annotations

import math
import platform
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
import torch
import yaml

from pipeline.consensus.cohort import in_ml
from pipeline.data.registry import Registry
from pipeline.errors import CheckpointError, ConfigError, PipelineError
from pipeline.figures import smoothed
from pipeline.folder import (
    Folder,
    check_writable,
    contains,
    is_local,
    refuse_foreign,
    replace_file,
    writing,
)
from pipeline.log import Log, duration
from pipeline.review.report.pictures import (
    LADDER,
    CaseLayers,
    CaseSource,
    Plane,
    fitting_planes,
    organ_colours,
)
from pipeline.review.report.scores import (
    METRICS,
    OrganRow,
    Scores,
    Student,
    kept_scores,
    open_student,
    scores_made_now,
    scores_of_predictions,
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
from pipeline.review.units import counted, megabytes

_ORDINALS = ("", "second", "third", "fourth", "fifth", "sixth")


@dataclass(frozen=True)
class PageSettings:
    """What is put on the page.

    Attributes:
        predict: settings of `pipeline predict` that predictions are expected to be made with.
        predictions: a folder that `predict` and `evaluate` filled; None for validation cases.
        num_worst: so many of the worst cases are shown, beside the median one.
        regions: whether every case is read for volumes and conflicts.
        workers: processes that measure them. Changes speed only.
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
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters |= {
        "score": _score,
        "ml": in_ml,
        "percent": _percent,
        "bytes": megabytes,
        "duration": _duration,
        "counted": counted,
        "mm": _mm,
        "count": _count,
    }
    return environment.get_template("report.html").render(
        c=content,
        lineage=lineage_json(content.record, content.lineage),
        training=TRAINING,
        most_region_rows=MOST_REGION_ROWS,
        most_open_rows=MOST_OPEN_ROWS,
        most_flagged_rows=MOST_FLAGGED_ROWS,
    )


def _score(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}"


def _percent(value: float | None) -> str:
    return "–" if value is None else f"{value:.1%}"


def _duration(seconds: float | None) -> str:
    if seconds is None:
        return "–"
    return f"{seconds:.1f} s" if seconds < 10 else duration(seconds)


def _mm(value: float | None) -> str:
    return "–" if value is None else f"{value:.1f}"


def _count(value: Any) -> str:
    return f"{int(value):,}".replace(",", "\u202f")


# Geometry of the page's charts; the template draws them as SVG.

Points = Sequence[tuple[float, float]]
WIDTH, HEIGHT = 520, 230
_LEFT, _RIGHT, _TOP, _BOTTOM = 46, 12, 10, 34
_MARKED = 40  # points up to which each has a mark of its own
_ROW, _AXIS = 40, 30
_DOT_APART = 5.0
_LABEL = 110


@dataclass(frozen=True)
class Tick:
    """A mark of an axis: where, in pixels, and what it says."""

    at: float
    text: str


@dataclass(frozen=True)
class Line:
    """One series: its name, its last value in words, a number for colour and dash.

    `faint` are the raw values under a smoothed line; `marks` single points. Pixels.
    """

    name: str
    last: str
    number: int
    path: str
    faint: str
    marks: Sequence[tuple[float, float]]


@dataclass(frozen=True)
class LineChart:
    """Series against steps; `alt` tells who cannot see it."""

    key: str
    title: str
    unit: str
    lines: Sequence[Line]
    x_ticks: Sequence[Tick]
    y_ticks: Sequence[Tick]
    alt: str
    width: int = WIDTH
    height: int = HEIGHT
    left: int = _LEFT
    right: int = WIDTH - _RIGHT
    top: int = _TOP
    bottom: int = HEIGHT - _BOTTOM


@dataclass(frozen=True)
class Dot:
    """A case: place in pixels, and what it is."""

    x: float
    y: float
    text: str


@dataclass(frozen=True)
class Strip:
    """One organ: its cases as dots, quartiles and median. `y` is the middle, in pixels."""

    organ: str
    y: float
    dots: Sequence[Dot]
    quartiles: tuple[float, float]
    median: float


@dataclass(frozen=True)
class StripChart:
    """One metric over all organs and cases."""

    key: str
    title: str
    strips: Sequence[Strip]
    x_ticks: Sequence[Tick]
    alt: str
    height: int
    width: int = WIDTH
    left: int = _LABEL
    right: int = WIDTH - 16


def line_chart(
    key: str,
    title: str,
    series: Mapping[str, Points],
    *,
    unit: str = "",
    smooth: bool = False,
    top: float | None = None,
) -> LineChart | None:
    """A chart of some series against steps; None if there is no point at all.

    Args:
        key: short name.
        title: of the chart.
        series: name -> (step, value), steps growing.
        unit: of the values.
        smooth: draw a running mean, and the values faintly below it.
        top: upper end of the axis; None for what the lines need.
    """
    known = {name: np.array(points, dtype=np.float64) for name, points in series.items() if points}
    if not known:
        return None
    drawn = {n: smoothed(p[:, 1]) if smooth else p[:, 1] for n, p in known.items()}
    last_step = max(float(p[-1, 0]) for p in known.values())
    low = min(0.0, *(float(v.min()) for v in drawn.values()))
    high = top if top is not None else max(float(v.max()) for v in drawn.values())
    y_values = _ticks(low, high if high > low else low + 1.0)
    x_values = _ticks(0.0, max(1.0, last_step))
    low, high = min(low, y_values[0]), max(high, y_values[-1])
    wide, tall = WIDTH - _LEFT - _RIGHT, HEIGHT - _TOP - _BOTTOM

    def x(step: float) -> float:
        return round(_LEFT + wide * step / max(1.0, last_step, x_values[-1]), 1)

    def y(value: float) -> float:
        share = (value - low) / (high - low)
        return round(_TOP + tall * (1 - min(1.0, max(0.0, share))), 1)

    lines = []
    for number, (name, points) in enumerate(known.items()):
        steps, values = points[:, 0], drawn[name]
        places = [(x(s), y(v)) for s, v in zip(steps, values, strict=True)]
        raw = [(x(s), y(v)) for s, v in points] if smooth else []
        marks = places if not smooth and len(places) <= _MARKED else []
        last = f"{values[-1]:.3g}"
        lines.append(Line(name, last, number, _path(places), _path(raw), marks))
    ends = ", ".join(f"{name} from {drawn[name][0]:.3g} to {drawn[name][-1]:.3g}" for name in known)
    return LineChart(
        key,
        title,
        unit,
        lines,
        [Tick(x(v), _step(v)) for v in x_values],
        [Tick(y(v), f"{v:g}") for v in y_values],
        f"{title} over {last_step:g} steps: {ends}.",
    )


def strip_chart(metric: str, organs: Sequence[str], rows: Sequence[OrganRow]) -> StripChart | None:
    """Every case's value of a metric, organ by organ; None if nobody measured it.

    Args:
        metric: one of `METRICS`.
        organs: from the top.
        rows: scores.
    """
    found = {}
    for organ in organs:
        known = [(row.value(metric), row.case) for row in rows if row.organ == organ]
        values = sorted((value, case) for value, case in known if value is not None)
        if values:
            found[organ] = values
    if not found:
        return None
    high = 1.0 if metric != "HD95_mm" else max(1.0, *(v[-1][0] for v in found.values()))
    ticks = _ticks(0.0, high)
    high = max(high, ticks[-1])
    wide = WIDTH - 16 - _LABEL

    def x(value: float) -> float:
        return round(_LABEL + wide * value / high, 1)

    unit = " mm" if metric == "HD95_mm" else ""
    strips, said = [], []
    for number, (organ, values) in enumerate(found.items()):
        middle = _ROW * number + _ROW / 2 + 4
        low, median, top = np.quantile([v for v, _ in values], (0.25, 0.5, 0.75))
        dots = _dots([(x(v), f"{case}: {v:.3g}{unit}") for v, case in values], middle)
        strips.append(Strip(organ, middle, dots, (x(low), x(top)), x(median)))
        said.append(f"{organ} median {median:.3g}{unit} of {len(values)}")
    title = {"Dice": "Dice", "NSD": "Normalised surface Dice", "HD95_mm": "HD95, mm"}[metric]
    return StripChart(
        metric.lower(),
        title,
        strips,
        [Tick(x(v), f"{v:g}") for v in ticks],
        f"{title} of every case: {'; '.join(said)}.",
        _ROW * len(strips) + 4 + _AXIS,
    )


def strip_charts(organs: Sequence[str], rows: Sequence[OrganRow]) -> list[StripChart]:
    """Those of the metrics that were measured."""
    charts = [strip_chart(metric, organs, rows) for metric in METRICS]
    return [chart for chart in charts if chart is not None]


def _dots(places: Sequence[tuple[float, str]], middle: float) -> list[Dot]:
    """Dots that would lie on each other go to the row above or below, up to three each way."""
    offsets = (0, -4, 4, -8, 8, -12, 12)
    last = dict.fromkeys(offsets, -math.inf)
    dots = []
    for x, text in places:
        fitting = [offset for offset in offsets if x - last[offset] >= _DOT_APART]
        free = fitting[0] if fitting else min(last, key=last.__getitem__)
        last[free] = x
        dots.append(Dot(x, middle + free, text))
    return dots


def _ticks(low: float, high: float, about: int = 5) -> list[float]:
    """Round numbers from `low` to `high`, roughly so many."""
    raw = (high - low) / about
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(m * power for m in (1, 2, 2.5, 5, 10) if m * power >= raw * 0.999)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [round(n * step, 10) for n in range(first, last + 1)]


def _path(places: Sequence[tuple[float, float]]) -> str:
    return " ".join(f"{x:g},{y:g}" for x, y in places)


def _step(value: float) -> str:
    return f"{value / 1000:g}k" if value >= 1e4 else f"{value:g}"


# Everything that the page tells, in the order of its sections; the template only lays it out.

_PACKAGES = ("organ-distill", "torch", "monai", "numpy", "zarr", "dask")


@dataclass(frozen=True)
class Shown:
    """A case in pictures: why it was chosen, its scores, and its planes or why there are none."""

    name: str
    why: str
    dice: float
    rows: Sequence[OrganRow]
    layers: CaseLayers | None = None
    planes: Sequence[Plane] = ()
    problem: str = ""


@dataclass(frozen=True)
class Spread:
    """One metric of one organ over cases."""

    mean: float
    median: float
    quartiles: tuple[float, float]
    worst: float
    worst_case: str


@dataclass(frozen=True)
class OrganSummary:
    """One organ: metric -> spread, absent where nobody measured it; cases with and without."""

    organ: str
    spreads: Mapping[str, Spread]
    num_cases: int
    without: int


@dataclass(frozen=True)
class Stored:
    """What something takes on disk, and what it took to make; None where nobody measured it."""

    what: str
    files: int
    num_bytes: int
    seconds: float | None


@dataclass(frozen=True)
class Content:
    """All that the template is given.

    Attributes:
        record: of the run.
        lineage: cases, units and teachers.
        settings_yaml: the run's settings as YAML.
        registered: teacher -> what the registry says of it beside its numbers.
        gate: verdicts.
        regions: volumes and conflicts.
        curves: charts of the training.
        scores: of the student; None without any.
        no_scores: why there are none.
        summaries: per organ.
        strips: charts of the metrics.
        shown: cases in pictures.
        limits: (slices per plane, pixels of the longest side) of the pictures.
        stored: storage and time.
        versions: of the packages that made the page.
        made_at: when, UTC.
    """

    record: RunRecord
    lineage: Lineage
    settings_yaml: str
    registered: Mapping[str, Mapping[str, str]]
    gate: Gate
    regions: Regions
    curves: Sequence[LineChart]
    scores: Scores | None
    no_scores: str
    summaries: Sequence[OrganSummary]
    strips: Sequence[StripChart]
    shown: Sequence[Shown]
    limits: tuple[int, int]
    stored: Sequence[Stored]
    versions: Mapping[str, str]
    made_at: str

    @property
    def organ_colours(self) -> Mapping[int, str]:
        """Organ id -> its colour in all pictures."""
        return organ_colours(self.record.space)

    @property
    def colour_by_organ(self) -> Mapping[str, str]:
        """The same by the organ's name, for charts."""
        return {organ: self.organ_colours[i] for organ, i in self.record.space.ids.items()}

    @property
    def cache_bytes(self) -> int:
        """Of the cases and units that the run used."""
        return sum(row.num_bytes for row in self.stored if not row.what.startswith("run: "))

    @property
    def seconds(self) -> float:
        """Of all that was measured."""
        return sum(row.seconds or 0.0 for row in self.stored)

    @property
    def mean_dice(self) -> float | None:
        """Mean over organs of their means, as `pipeline evaluate` has it."""
        means = [s.spreads["Dice"].mean for s in self.summaries if "Dice" in s.spreads]
        return sum(means) / len(means) if means else None


def settings_as_yaml(record: RunRecord) -> str:
    """What a configuration file of the same run says under `training`."""
    return yaml.safe_dump(dict(record.settings), sort_keys=False, default_flow_style=None)


def registered_teachers(
    registry: Registry, teachers: Sequence[TracedTeacher]
) -> dict[str, dict[str, str]]:
    """Kind, weights, licence and source of teachers, as far as the registry still has them."""
    found = {}
    for teacher in teachers:
        entry = registry.teachers.get(teacher.name)
        if entry is not None:
            names = ("kind", "weights", "trained_on", "licence", "source")
            found[teacher.name] = {n: str(getattr(entry, n) or "") for n in names}
    return found


def training_charts(record: RunRecord) -> list[LineChart]:
    """Loss, validation Dice, throughput and waiting, as far as they were recorded."""
    if record.training is None:
        return []
    history = record.training.history
    terms = {n: c.points for n, c in sorted(history.terms.items(), key=lambda t: t[0] != "total")}
    waits = [(step, 100 * share) for step, share in history.data_wait.points]
    charts = [
        line_chart("loss", "Training loss, weighted terms", terms, smooth=True),
        line_chart(
            "dice",
            "Validation Dice",
            {organ: curve.points for organ, curve in history.dice.items()},
            top=1.0,
        ),
        line_chart(
            "rate",
            "Throughput",
            {"samples per second": history.samples_per_second.points},
            unit="samples/s",
        ),
        line_chart("wait", "Waiting for data", {"share of the time": waits}, unit="%", top=100),
    ]
    return [chart for chart in charts if chart is not None]


def summarised(organs: Sequence[str], scores: Scores) -> list[OrganSummary]:
    """Per organ of the run, in its order; organs without any row are told with no case."""
    found = []
    cases = {row.case for row in scores.rows}
    for organ in organs:
        rows = [row for row in scores.rows if row.organ == organ]
        spreads = {m: s for m in METRICS if (s := _spread(rows, m)) is not None}
        num = sum(row.dice is not None for row in rows)
        found.append(OrganSummary(organ, spreads, num, len(cases) - num))
    return found


def _spread(rows: Sequence[OrganRow], metric: str) -> Spread | None:
    known = [(v, row.case) for row in rows if (v := row.value(metric)) is not None]
    if not known:
        return None
    low, median, high = (float(q) for q in np.quantile([v for v, _ in known], (0.25, 0.5, 0.75)))
    worst, case = max(known) if metric == "HD95_mm" else min(known)
    mean = sum(v for v, _ in known) / len(known)
    return Spread(mean, median, (low, high), worst, case)


def stored(record: RunRecord, lineage: Lineage) -> list[Stored]:
    """Cases, each teacher's units, and the run's own files."""
    units = [case.case.unit for case in lineage.cases]
    found = [_of_units("cases on the student grid", units)]
    for teacher in lineage.teachers:
        # What no training read is not what this run took.
        own = [case.units[teacher.name].unit for case in lineage.of(TRAINING)]
        found.append(_of_units(f"units of teacher {teacher.name}", own))
    groups: dict[str, list[int]] = {
        "checkpoints": [],
        "students (*.pt)": [],
        "records, curves": [],
    }
    for name, num_bytes in record.files.items():
        kind = "students (*.pt)" if name.endswith(".pt") else "records, curves"
        groups["checkpoints" if name.startswith("checkpoints/") else kind].append(num_bytes)
    found += [Stored(f"run: {what}", len(of), sum(of), None) for what, of in groups.items()]
    if record.training is not None:
        found.append(Stored("run: training steps", 0, 0, record.training.seconds))
        found.append(Stored("run: validations", 0, 0, record.training.validation_seconds))
    return found


def _of_units(what: str, units: Sequence[Any]) -> Stored:
    receipts = [unit.receipt for unit in units if unit is not None]
    seconds = sum(receipt.seconds for receipt in receipts) if receipts else None
    return Stored(what, len(receipts), sum(r.num_bytes for r in receipts), seconds)


def versions_here() -> dict[str, str]:
    """Of the packages on this machine, now."""
    found = {"Python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    return found


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
