"""Findings as a picture: one panel per regime and budget."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.accuracy.regimes import REGIMES
from pipeline.figures import open_figure

# Okabe and Ito's colours, which people of all kinds of colour vision tell apart; shapes as well.
_COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#000000", "#999999")
_MARKERS = "osD^vP*X"


def draw(content: Mapping[str, Any], path: Path) -> None:
    """Mean Dice over organs: every seed a dot, the mean a bar; one row of panels per budget.

    Args:
        content: of a results file.
        path: PNG.
    """
    dice = content["findings"]["dice"]
    budgets, regimes = list(dice), content["regimes"]
    names = list(dict.fromkeys(n for b in dice.values() for r in b.values() for n in r))
    size = (2.0 + 2.1 * len(regimes), 0.9 + 2.6 * len(budgets))
    with open_figure(path, len(budgets), len(regimes), size=size) as (figure, axes):
        for row, budget in enumerate(budgets):
            shown = [n for n in names if any(n in dice[budget][r] for r in dice[budget])]
            values = [v for r in dice[budget].values() for n in r.values() for v in _seeds(n)]
            low, high = min(values, default=0.0), max(values, default=1.0)
            for column, regime in enumerate(regimes):
                ax = axes[row, column]
                for at, name in enumerate(shown):
                    found = dice[budget].get(regime, {}).get(name)
                    if found is not None:
                        _draw_one(ax, at, names.index(name), found)
                ax.set_xlim(-0.6, len(shown) - 0.4)
                ax.set_ylim(max(0.0, low - 0.03), min(1.0, high + 0.03))
                ax.set_xticks(range(len(shown)), shown, rotation=60, ha="right", fontsize=7)
                ax.tick_params(axis="y", labelsize=7, labelleft=column == 0)
                ax.grid(axis="y", alpha=0.3)
                ax.set_axisbelow(True)
                if row == 0:
                    ax.set_title(f"{regime}: {REGIMES[regime].title}", fontsize=8)
                if column == 0:
                    ax.set_ylabel(f"Dice\n{budget}", fontsize=8)
        seeds = len(content["seeds"])
        figure.suptitle(
            f"Mean Dice over organs, {content['split']} cases: {seeds} seeds (dots), mean (bar)",
            fontsize=10,
        )


def _draw_one(ax: Any, at: int, number: int, found: Mapping[str, Any]) -> None:
    colour = _COLOURS[number % len(_COLOURS)]
    values = _seeds(found)
    spots = [at + 0.3 * (i / max(1, len(values) - 1) - 0.5) for i in range(len(values))]
    ax.plot(
        spots, values, linestyle="", marker=_MARKERS[number % len(_MARKERS)], markersize=4,
        color=colour, markeredgecolor="w", markeredgewidth=0.4,
    )  # fmt: skip
    mean = found["mean"]["mean"]
    if mean is not None:
        ax.plot([at - 0.32, at + 0.32], [mean, mean], color=colour, linewidth=1.8)


def _seeds(found: Mapping[str, Any]) -> list[float]:
    return [value for value in found["mean"]["per_seed"] if value is not None]
