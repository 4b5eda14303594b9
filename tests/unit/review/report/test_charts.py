"""The charts of the page."""

from __future__ import annotations

import re
from typing import Any
from xml.etree import ElementTree as ET

import pytest

from pipeline.figures import hex_colour, svg_chart
from pipeline.review.report.scores import OrganRow, strip_charts
from tests.unit.review.report.pages import parse


def row(case: str, organ: str, dice: float | None, hd95_mm: float | None = None) -> OrganRow:
    return {"case": case, "organ": organ, "Dice": dice, "NSD": None, "HD95_mm": hd95_mm}


def two_lines(ax: Any) -> None:
    ax.plot([0, 1], [0, 1], color="#0072B2", label="a <b> $x$ & 1")
    ax.plot([0, 1], [1, 0], color="#000000", marker="o")
    ax.legend(frameon=False)


def test_a_chart_is_in_the_colours_and_the_font_of_the_page_around_it() -> None:
    svg = svg_chart("a", two_lines)
    assert {"var(--c0)", "var(--ink)", "currentColor"} <= set(re.findall(r"stroke: ([^;\"]*)", svg))
    assert not re.search(r"stroke: #|font-family|<style|<metadata", svg)
    assert ">a &lt;b&gt; $x$ &amp; 1</text>" in svg
    assert parse(svg).one("svg").attributes["viewbox"] == "0 0 520 230"


def test_charts_have_no_id_in_common_and_are_drawn_alike_twice() -> None:
    charts = {key: svg_chart(key, two_lines) for key in ("a", "b")}
    ids = [re.findall(r' id="(.*?)"', svg) for svg in charts.values()]
    assert all(ids)
    assert not {*ids[0]} & {*ids[1]}
    assert charts["a"] == svg_chart("a", two_lines)


def drawn(svg: str, tag: str) -> list[dict[str, str]]:
    root = ET.fromstring(svg.replace("<svg ", '<svg xmlns:xlink="xlink" ', 1))
    return [element.attrib for element in root.iter(f"{{http://www.w3.org/2000/svg}}{tag}")]


def test_strips_show_every_case_its_quartiles_and_median() -> None:
    dice = [0.1, 0.5, 0.6, 0.7, 0.9]
    rows = [row(f"a/{n}", "liver", d) for n, d in enumerate(dice)]
    ids = {"spleen": 1, "liver": 2}
    (chart,) = strip_charts(ids, [*rows, row("a/9", "liver", None)])
    assert chart.alt == "Dice of every case: liver median 0.6 of 5."
    assert "spleen" not in chart.svg  # nobody measured it
    dots = [use for use in drawn(chart.svg, "use") if hex_colour(2) in use["style"]]
    places = [float(dot["x"]) for dot in dots]
    pairs = zip(places, places[1:], dice, dice[1:], strict=False)
    apart = [(right - left) / (more - less) for left, right, less, more in pairs]
    assert apart == pytest.approx([apart[0]] * 4)
    assert len({dot["y"] for dot in dots}) == 5


def test_distances_have_an_axis_of_their_own() -> None:
    rows = [row("a/0", "liver", 0.8, 3.0), row("a/1", "liver", 0.5, 240.0)]
    dice, hd95 = strip_charts({"liver": 1}, rows)
    assert (dice.title, hd95.title) == ("Dice", "HD95, mm")
    assert ">200</text>" in hd95.svg
    assert hd95.alt == "HD95, mm of every case: liver median 122 mm of 2."


def test_without_values_there_is_no_chart() -> None:
    assert strip_charts({"liver": 1}, [row("a/b", "liver", None)]) == []
    assert strip_charts({"liver": 1}, []) == []
