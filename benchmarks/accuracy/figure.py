"""Findings as a picture: one panel per regime and budget."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.accuracy.configurations import KINDS
from benchmarks.accuracy.plan import EQUAL_TIME
from benchmarks.accuracy.regimes import REGIMES
from pipeline.figures import open_figure

# Okabe and Ito's colours, which people of all kinds of colour vision tell apart; shapes as well.
_COLOURS = ("#999999", "#F0E442", "#56B4E9", "#0072B2", "#E69F00", "#D55E00", "#000000")
_OTHERS = ("#009E73", "#CC79A7")
_MARKERS = "X*Pos^Dv<"


def draw(content: Mapping[str, Any], path: Path) -> None:
    """Mean Dice over organs: every seed a dot, the mean a bar; one row of panels per budget.

    Args:
        content: of a results file.
        path: PNG.
    """
    dice = content["findings"]["dice"]
    budgets = [budget for budget in dice if EQUAL_TIME not in budget]
    regimes = content["regimes"]
    shown = {budget: _columns(dice, budget) for budget in budgets}
    widest = max(len(columns) for columns in shown.values())
    size = (1.2 + (0.6 + 0.24 * widest) * len(regimes), 0.7 + 3.0 * len(budgets))
    with open_figure(path, len(budgets), len(regimes), size=size) as (figure, axes):
        for row, budget in enumerate(budgets):
            found = {r: _found(dice, budget, r) for r in regimes}
            values = [v for r in found.values() for one in r.values() for v in _seeds(one)]
            for column, regime in enumerate(regimes):
                ax = axes[row, column]
                for at, name in enumerate(shown[budget]):
                    if name in found[regime]:
                        _draw_one(ax, at, _look(name, shown[budget]), found[regime][name])
                _frame(ax, shown[budget], (min(values), max(values)))
                ax.tick_params(axis="y", labelsize=7, labelleft=column == 0)
                if row == 0:
                    ax.set_title(f"{regime}: {REGIMES[regime].title}", fontsize=8)
                if column == 0:
                    ax.set_ylabel(f"mean Dice, {budget} training", fontsize=8)
        seeds = len(content["seeds"])
        figure.suptitle(
            f"Mean Dice over organs, {content['split']} cases: each of {seeds} "
            f"seed{'s' if seeds > 1 else ''} (marker) and their mean (bar)",
            fontsize=10,
        )


def _columns(dice: Mapping[str, Any], budget: str) -> list[str]:
    """What stands beside each other in a panel; a baseline's longer training beside its own."""
    names = dict.fromkeys(n for by_name in dice[budget].values() for n in by_name)
    longer = dice.get(f"{budget}, {EQUAL_TIME}", {})
    extra = {n for by_name in longer.values() for n in by_name}
    return [c for n in names for c in ([n, f"{n}, {EQUAL_TIME}"] if n in extra else [n])]


def _found(dice: Mapping[str, Any], budget: str, regime: str) -> dict[str, Any]:
    longer = dice.get(f"{budget}, {EQUAL_TIME}", {}).get(regime, {})
    renamed = {f"{name}, {EQUAL_TIME}": found for name, found in longer.items()}
    return {**dice[budget].get(regime, {}), **renamed}


def _look(name: str, shown: list[str]) -> tuple[str, str]:
    """Colour and marker: a kind's own, whatever else is shown."""
    kind = name.split(",")[0]
    if kind in KINDS:
        number = KINDS.index(kind)
        return _COLOURS[number], _MARKERS[number]
    number = [n for n in shown if n not in KINDS].index(name)
    return _OTHERS[number % len(_OTHERS)], _MARKERS[number % len(_MARKERS)]


def _frame(ax: Any, shown: list[str], values: tuple[float, float]) -> None:
    pad = 0.05 * (values[1] - values[0]) + 0.005
    ax.set_xlim(-0.6, len(shown) - 0.4)
    ax.set_ylim(values[0] - pad, values[1] + pad)
    ax.set_xticks(range(len(shown)), shown, rotation=90, fontsize=7)
    ax.grid(axis="y", alpha=0.3)
    ax.set_axisbelow(True)


def _draw_one(ax: Any, at: int, look: tuple[str, str], found: Mapping[str, Any]) -> None:
    colour, marker = look
    values = _seeds(found)
    spots = [at + 0.4 * (i / max(1, len(values) - 1) - 0.5) for i in range(len(values))]
    ax.plot(
        spots, values, linestyle="", marker=marker, markersize=4.5, color=colour,
        markeredgecolor="0.2", markeredgewidth=0.4,
    )  # fmt: skip
    mean = found["mean"]["mean"]
    if mean is not None:
        ax.plot([at - 0.36, at + 0.36], [mean, mean], color=colour, linewidth=2.2, zorder=1)


def _seeds(found: Mapping[str, Any]) -> list[float]:
    return [value for value in found["mean"]["per_seed"] if value is not None]
