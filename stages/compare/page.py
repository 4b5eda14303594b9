"""A comparison as files: a page that opens with what is asked first, its chart, tables and JSON."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from pipeline.cache.reader import CachedCase
from pipeline.cache.store import json_text
from pipeline.errors import PipelineError, counted
from pipeline.figures import hex_colour, open_figure
from pipeline.folder import replace_file, replace_files, writing
from pipeline.log import csv_text
from pipeline.review.report.page import Shown, chosen_cases, filled
from pipeline.review.report.pictures import (
    CaseLayers,
    Layer,
    among,
    data_uri,
    differing,
    organ_colours,
    side_by_side,
)
from pipeline.review.report.scores import Student
from pipeline.review.statistics import CONFIDENCE, OVER_ORGANS
from stages.compare.results import Results, all_tables, files_of, score_rows, table_rows


def write_results(results: Results, folder: Path, *, device: str = "auto") -> list[Path]:
    """Writes what a comparison found: `<split>.json`, `.html`, `.png`, `_table.csv`, `_scores.csv`;
    `device` is where two cases are predicted again, for the page."""
    page, data, picture, table, scores = files_of(folder, results.split)
    texts = {
        data: json_text(results.to_json()),
        table: csv_text(table_rows(results)),
        scores: csv_text(score_rows(results)),
    }
    with writing(folder):
        replace_files({path: text.encode() for path, text in texts.items()})
        draw_comparison(results, picture)
        with Image.open(picture) as drawn:
            chart = data_uri(drawn, "png", optimize=True)
        replace_file(page, to_html(results, chart, *shown_cases(results, device)).encode())
    return [page, data, picture, table, scores]


def to_html(
    results: Results,
    chart: str = "",
    shown: Sequence[Shown] = (),
    colours: Mapping[str, str] | None = None,
) -> str:
    """The page, with every metric: its chart is a data URI, and cases are shown in panels by these
    colours of organs."""
    plan = results.plan
    return filled(
        "compare.html",
        title=plan.settings.name,
        lead=in_sentences(results),
        chart=chart,
        shown=shown,
        colours=colours or {},
        tables=all_tables(results, results.metrics),
        notices=results.notices,
    )


def in_sentences(results: Results) -> list[str]:
    """What is asked first: which has the highest mean Dice, and how far the others are from it."""
    means = {c: results.estimates(c, "Dice")[OVER_ORGANS] for c in results.configs}
    ranked = sorted((-e.mean, config) for config, e in means.items() if e.mean is not None)
    if not ranked:
        return []
    seeds = counted(len(results.plan.settings.seeds), "seed")
    cases = f"{len(results.plan.cases)} {results.split} cases"
    best = ranked[0][1]
    found = [f"Highest mean Dice: {best}, {means[best].in_words()} ({cases}, {seeds})."]
    for config in results.others:
        apart = results.differences(config, "Dice")[OVER_ORGANS]
        if apart.mean is not None:
            known = "" if apart.low is not None else "; too few for an interval"
            found.append(f"{config} minus {results.plan.baseline}: {apart.in_words()}{known}.")
    return found


def shown_cases(results: Results, device: str) -> tuple[list[Shown], dict[str, str]]:
    """The worst case over all configurations and the median one, predicted by the first finished
    run of each that did not see it; and organ -> colour in them."""
    dice: dict[str, list[float]] = {}
    for row in (row for run in results.runs for row in run.rows if row["Dice"] is not None):
        dice.setdefault(row["case"], []).append(row["Dice"])
    means = {case: sum(values) / len(values) for case, values in dice.items()}
    chosen = chosen_cases(sorted(means, key=lambda case: (means[case], case)))
    colours: dict[str, str] = {}
    try:
        found = []
        for name, why in chosen.items():
            fold, case = next(
                (fold, case)
                for fold, cases in results.plan.scored.items()
                for case in cases
                if case.name == name
            )
            of_fold = [run for run in results.runs if run.fold == fold and run.error is None]
            runs = {run.config: run for run in reversed(of_fold)}
            students = {
                config: Student(runs[config].folder / "student.pt", device)
                for config in results.configs
                if config in runs
            }
            found.append(_pictured(case, students, Shown(name, why, means[name], ())))
            ids = next(iter(students.values())).record.label_space.ids
            colours = {organ: hex_colour(organ_id) for organ, organ_id in ids.items()}
        return found, colours
    except PipelineError as error:
        said = str(error)
        return [Shown(c, why, means[c], (), problem=said) for c, why in chosen.items()], {}


def _pictured(case: CachedCase, students: Mapping[str, Student], shown: Shown) -> Shown:
    space = next(iter(students.values())).record.label_space
    ids = [i for organ, i in space.ids.items() if organ in case.annotated]
    label, colours = case.label(), organ_colours(space)
    maps = {config: student.label_map(case) for config, student in students.items()}
    layers = [
        Layer(title, title, values, colours, "fill", True)
        for title, values in {"reference": among(label, ids), **maps}.items()
    ]
    wrong = np.any([differing(values, label, ids) for values in maps.values()], axis=0)
    found = CaseLayers(case.name, case.split, case.image(), case.grid.spacing_mm, layers, wrong, ())
    said, panels = side_by_side(found, {"CT": (), **{layer.key: (layer.key,) for layer in layers}})
    return replace(shown, slice=said, panels=panels)


# A comparison as a picture: scores by organ, and differences to the baseline.

_COLOURS = ("#3182bd", "#e6550d", "#31a354", "#8e44ad", "#00acc1", "#d81b60", "#7f6000", "#555555")
_MARKERS = "osD^vP*X"


def draw_comparison(results: Results, path: Path) -> None:
    """Left, per organ and configuration, the mean (bar) and every seed (dot). Right, the paired
    difference to the baseline, with its interval where there is one. Dice alone."""
    width = 1.5 + max(4.0, 0.55 * len(results.rows) * (1 + len(results.configs) / 3))
    halves = 2 if results.others else 1
    with open_figure(path, 1, halves, size=(width * halves, 4.6)) as (figure, axes):
        _draw_scores(axes[0, 0], results)
        if results.others:
            _draw_differences(axes[0, 1], results)
        seeds = len(results.plan.settings.seeds)
        figure.suptitle(
            f"{results.plan.settings.name}: {len(results.plan.cases)} {results.split} cases, "
            f"{counted(seeds, 'seed')}",
            fontsize=11,
        )
        handles, labels = axes[0, 0].get_legend_handles_labels()
        figure.legend(
            handles, labels, loc="outside lower center", ncol=min(4, len(labels)),
            frameon=False, fontsize=9,
        )  # fmt: skip


def _draw_scores(ax: Any, results: Results) -> None:
    bar = 0.8 / len(results.configs)
    for number, config in enumerate(results.configs):
        found = results.estimates(config, "Dice")
        at = np.arange(len(results.rows)) + (number - (len(results.configs) - 1) / 2) * bar
        label = f"{config} (baseline)" if config == results.plan.baseline else config
        heights = [e.mean or 0.0 for e in found.values()]
        ax.bar(at, heights, bar * 0.9, color=_colour(number), alpha=0.45, label=label)
        for x, e in zip(at, found.values(), strict=True):
            values = [value for value in e.per_seed if value is not None]
            ax.plot(
                [x] * len(values), values, linestyle="", marker=_MARKERS[number % len(_MARKERS)],
                markersize=4, color=_colour(number),
            )  # fmt: skip
    ax.set(ylabel="Dice", ylim=(0, 1), title="Mean over seeds (bar)\nand each seed (marker)")
    _finish(ax, results)


def _draw_differences(ax: Any, results: Results) -> None:
    step = 0.7 / len(results.others)
    said = "too few seeds or cases for an interval"
    for index, config in enumerate(results.others):
        colour = _colour(number := results.configs.index(config))
        for place, d in enumerate(results.differences(config, "Dice").values()):
            if d.mean is None:
                continue
            x = place + (index - (len(results.others) - 1) / 2) * step
            if d.low is not None:
                said = f"{CONFIDENCE:.0%} interval"
                ax.plot([x, x], [d.low, d.high], color=colour, linewidth=1.6)
            ax.plot(
                x, d.mean, marker=_MARKERS[number % len(_MARKERS)], markersize=6,
                color=colour, markerfacecolor="w" if d.low is None else colour,
            )  # fmt: skip
    ax.axhline(0, color="0.3", linewidth=0.9)
    _finish(ax, results)
    ax.set_xlim(-0.6, len(results.rows) - 0.4)
    reach = 1.1 * max(*map(abs, ax.get_ylim()), 0.02)
    ax.set_ylim(-reach, reach)
    ax.set(ylabel="difference in Dice", title=f"Difference to {results.plan.baseline}\n({said})")


def _finish(ax: Any, results: Results) -> None:
    """Organs below, a line before their mean, a grid behind."""
    ax.set_xticks(np.arange(len(results.rows)), results.rows)
    ax.axvline(len(results.rows) - 1.5, color="0.7", linewidth=0.8)
    ax.grid(axis="y", alpha=0.3)
    ax.set_axisbelow(True)


def _colour(number: int) -> str:
    return _COLOURS[number % len(_COLOURS)]
