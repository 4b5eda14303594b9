"""Geometry of the page's charts; the template draws them as SVG."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from pipeline.html_report.scores import METRICS, OrganRow
from pipeline.student.curves import smoothed

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
