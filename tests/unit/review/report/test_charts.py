"""Geometry of the charts."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.review.report.page import _ticks, line_chart, strip_chart, strip_charts
from pipeline.review.report.scores import OrganRow


def row(case: str, organ: str, dice: float | None, hd95_mm: float | None = None) -> OrganRow:
    return OrganRow(case, organ, dice, None, hd95_mm)


@given(
    low=st.floats(-1e3, 1e3),
    width=st.floats(1e-3, 1e6),
)
def test_ticks_are_round_few_and_within(low: float, width: float) -> None:
    ticks = _ticks(low, low + width)
    assert 2 <= len(ticks) <= 7
    steps = np.diff(ticks)
    assert steps == pytest.approx(np.full(len(steps), steps[0]))
    assert ticks[0] >= low - 1e-6 * width
    assert ticks[-1] <= low + width * (1 + 1e-6)


def test_lines_go_from_left_to_right_and_higher_is_further_up() -> None:
    chart = line_chart("dice", "Dice", {"liver": [(10, 0.0), (50, 0.5), (100, 1.0)]}, top=1.0)
    assert chart is not None
    (line,) = chart.lines
    places = [tuple(map(float, place.split(","))) for place in line.path.split()]
    assert places == list(line.marks)
    assert [x for x, _ in places] == sorted(x for x, _ in places)
    assert places[-1] == (chart.right, chart.top)
    assert places[0][1] == chart.bottom
    assert places[1][1] == pytest.approx((chart.top + chart.bottom) / 2)
    assert line.last == "1"
    assert chart.alt == "Dice over 100 steps: liver from 0 to 1."


def test_smoothed_lines_keep_the_raw_ones_faintly() -> None:
    noisy = [(float(s), float(s % 2)) for s in range(200)]
    chart = line_chart("loss", "Loss", {"total": noisy}, smooth=True)
    assert chart is not None
    (line,) = chart.lines
    assert len(line.faint.split()) == len(line.path.split()) == 200
    assert not line.marks
    heights = [float(p.split(",")[1]) for p in line.path.split()]
    raw = [float(p.split(",")[1]) for p in line.faint.split()]
    assert np.ptp(heights[20:-20]) < 0.2 * np.ptp(raw)


def test_nothing_lies_outside_the_axes() -> None:
    spikes = [(1.0, 1.0), *((float(s), 1.0) for s in range(2, 100)), (100.0, 1e6)]
    chart = line_chart("loss", "Loss", {"a": spikes, "b": [(5.0, -3.0)]}, smooth=True)
    assert chart is not None
    for line in chart.lines:
        for place in f"{line.path} {line.faint}".split():
            x, y = map(float, place.split(","))
            assert chart.left <= x <= chart.right
            assert chart.top <= y <= chart.bottom


def test_without_points_there_is_no_chart() -> None:
    assert line_chart("a", "A", {}) is None
    assert line_chart("a", "A", {"x": []}) is None
    assert strip_chart("Dice", ["liver"], [row("a/b", "liver", None)]) is None
    assert strip_charts(["liver"], []) == []


def test_a_constant_series_has_an_axis_all_the_same() -> None:
    chart = line_chart("a", "A", {"x": [(1.0, 0.0), (2.0, 0.0)]})
    assert chart is not None
    assert len(chart.y_ticks) > 1


def test_strips_show_every_case_its_quartiles_and_median() -> None:
    dice = [0.1, 0.5, 0.6, 0.7, 0.9]
    rows = [row(f"a/{n}", "liver", d) for n, d in enumerate(dice)]
    chart = strip_chart("Dice", ["spleen", "liver"], [*rows, row("a/9", "liver", None)])
    assert chart is not None
    (strip,) = chart.strips  # an organ that nobody measured has none
    wide = chart.right - chart.left

    def x(value: float) -> float:
        return pytest.approx(chart.left + wide * value, abs=0.06)

    assert [dot.x for dot in strip.dots] == [x(d) for d in dice]
    assert [dot.text for dot in strip.dots] == [f"a/{n}: {d:g}" for n, d in enumerate(dice)]
    assert strip.quartiles == (x(0.5), x(0.7))
    assert strip.median == x(0.6)
    assert "liver median 0.6 of 5" in chart.alt


def test_equal_values_lie_beside_each_other() -> None:
    rows = [row(f"a/{n}", "liver", 0.5) for n in range(7)]
    chart = strip_chart("Dice", ["liver"], rows)
    assert chart is not None
    assert len({dot.y for dot in chart.strips[0].dots}) == 7


def test_distances_have_an_axis_of_their_own() -> None:
    rows = [row("a/0", "liver", 0.5, 12.0), row("a/1", "liver", 0.5, 240.0)]
    dice, hd95 = strip_charts(["liver"], rows)
    assert dice.x_ticks[-1].text == "1"
    assert float(hd95.x_ticks[-1].text) == 200
    assert max(dot.x for dot in hd95.strips[0].dots) == hd95.right
    assert "a/1: 240 mm" in [dot.text for dot in hd95.strips[0].dots]
