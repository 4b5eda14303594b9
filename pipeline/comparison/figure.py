"""A comparison as a picture: scores by organ, and differences to the baseline."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from pipeline.comparison.results import Results
from pipeline.comparison.statistics import CONFIDENCE, OVER_ORGANS
from pipeline.figures import open_figure

_COLOURS = ("#3182bd", "#e6550d", "#31a354", "#8e44ad", "#00acc1", "#d81b60", "#7f6000", "#555555")
_MARKERS = "osD^vP*X"


def draw_comparison(results: Results, path: Path) -> None:
    """Left, per organ and configuration, the mean (bar) and every seed (dot). Right, the paired
    difference to the baseline, with its interval where there is one. Dice alone.

    Args:
        results: of a comparison.
        path: PNG.
    """
    names = [*results.organs, OVER_ORGANS]
    others = [config for config in results.configs if config != results.plan.baseline]
    width = 1.5 + max(4.0, 0.55 * len(names) * (1 + len(results.configs) / 3))
    halves = 2 if others else 1
    with open_figure(path, 1, halves, size=(width * halves, 4.6)) as (figure, axes):
        _draw_scores(axes[0, 0], results, names)
        if others:
            _draw_differences(axes[0, 1], results, names, others)
        seeds = len(results.plan.settings.seeds)
        figure.suptitle(
            f"{results.plan.settings.name}: {len(results.plan.cases)} {results.split} cases, "
            f"{seeds} seed{'s' if seeds > 1 else ''}",
            fontsize=11,
        )
        handles, labels = axes[0, 0].get_legend_handles_labels()
        figure.legend(
            handles, labels, loc="outside lower center", ncol=min(4, len(labels)),
            frameon=False, fontsize=9,
        )  # fmt: skip


def _draw_scores(ax: Any, results: Results, names: list[str]) -> None:
    bar = 0.8 / len(results.configs)
    for number, config in enumerate(results.configs):
        found = results.estimates(config, "Dice")
        at = np.arange(len(names)) + (number - (len(results.configs) - 1) / 2) * bar
        heights = [found[name].mean or 0.0 for name in names]
        label = f"{config} (baseline)" if config == results.plan.baseline else config
        ax.bar(at, heights, bar * 0.9, color=_colour(number), alpha=0.45, label=label)
        for x, name in zip(at, names, strict=True):
            values = [v for v in found[name].per_seed if v is not None]
            ax.plot(
                [x] * len(values), values, linestyle="", marker=_MARKERS[number % len(_MARKERS)],
                markersize=4, color=_colour(number),
            )  # fmt: skip
    ax.set_xticks(np.arange(len(names)), names)
    ax.set(ylabel="Dice", ylim=(0, 1), title="Mean over seeds (bar)\nand each seed (marker)")
    ax.axvline(len(names) - 1.5, color="0.7", linewidth=0.8)
    ax.grid(axis="y", alpha=0.3)
    ax.set_axisbelow(True)


def _draw_differences(ax: Any, results: Results, names: list[str], others: list[str]) -> None:
    step = 0.7 / len(others)
    intervals = False
    for index, config in enumerate(others):
        number = results.configs.index(config)
        found = results.differences(config, "Dice")
        for place, name in enumerate(names):
            d = found[name]
            if d.mean is None:
                continue
            x = place + (index - (len(others) - 1) / 2) * step
            if d.low is not None and d.high is not None:
                intervals = True
                ax.plot([x, x], [d.low, d.high], color=_colour(number), linewidth=1.6)
            ax.plot(
                x, d.mean, marker=_MARKERS[number % len(_MARKERS)], markersize=6,
                color=_colour(number), markerfacecolor="w" if d.low is None else _colour(number),
            )  # fmt: skip
    ax.axhline(0, color="0.3", linewidth=0.9)
    ax.axvline(len(names) - 1.5, color="0.7", linewidth=0.8)
    ax.set_xticks(np.arange(len(names)), names)
    ax.set_xlim(-0.6, len(names) - 0.4)
    low, high = ax.get_ylim()
    reach = 1.1 * max(abs(low), abs(high), 0.02)
    ax.set_ylim(-reach, reach)
    said = f"{CONFIDENCE:.0%} interval" if intervals else "too few seeds or cases for an interval"
    ax.set(ylabel="difference in Dice", title=f"Difference to {results.plan.baseline}\n({said})")
    ax.grid(axis="y", alpha=0.3)
    ax.set_axisbelow(True)


def _colour(number: int) -> str:
    return _COLOURS[number % len(_COLOURS)]
