"""Findings as a picture: one panel per regime and budget."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from textwrap import fill
from typing import Any

from benchmarks.accuracy.configurations import KINDS, METHOD
from benchmarks.accuracy.plan import EQUAL_TIME
from benchmarks.accuracy.regimes import REGIMES
from pipeline.figures import open_figure

# Okabe and Ito's colours, which people of all kinds of colour vision tell apart; shapes as well.
_COLOURS = ("#999999", "#F0E442", "#56B4E9", "#0072B2", "#E69F00", "#D55E00", "#000000")
_OTHERS = ("#009E73", "#CC79A7")
_MARKERS = "X*Pos^Dv<"
_REACH = 0.25  # Dice below the best; what lies further down is told as a number


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
    size = (1.0 + max(1.9, 0.3 + 0.22 * widest) * len(regimes), 0.9 + 3.0 * len(budgets))
    with open_figure(path, len(budgets), len(regimes), size=size) as (figure, axes):
        for row, budget in enumerate(budgets):
            found = {r: _found(dice, budget, r) for r in regimes}
            low, high = _range(found.values())
            for column, regime in enumerate(regimes):
                ax = axes[row, column]
                for at, name in enumerate(shown[budget]):
                    if name in found[regime]:
                        look = _look(name, shown[budget])
                        _draw_one(ax, at, look, found[regime][name], low)
                _frame(ax, shown[budget], low, high)
                ax.tick_params(axis="y", labelsize=7, labelleft=column == 0)
                if row == 0:
                    ax.set_title(fill(f"{regime}: {REGIMES[regime].title}", 24), fontsize=8)
                if column == 0:
                    ax.set_ylabel(f"mean Dice, {budget} training", fontsize=8)
        seeds = len(content["seeds"])
        said = f"Mean Dice over organs, {content['split']} cases\n"
        said += f"marker: each of {seeds} seeds, bar: their mean" if seeds > 1 else "one seed"
        if any(_is_longer(name) for columns in shown.values() for name in columns):
            said += f"; *: as many steps as fit in {METHOD}'s time"
        figure.suptitle(said, fontsize=9)


def _range(regimes: Collection[Mapping[str, Any]]) -> tuple[float, float]:
    """Of all seeds, but for what lies so far below that nothing else could be told apart."""
    ones = [one for by_name in regimes for one in by_name.values()]
    best = max(one["mean"]["mean"] for one in ones)
    near = [v for one in ones if one["mean"]["mean"] > best - _REACH for v in _seeds(one)]
    pad = 0.05 * (max(near) - min(near)) + 0.005
    return min(near) - pad, max(near) + pad


def _is_longer(name: str) -> bool:
    return name.endswith(f", {EQUAL_TIME}")


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


def _frame(ax: Any, shown: list[str], low: float, high: float) -> None:
    ax.set_xlim(-0.6, len(shown) - 0.4)
    ax.set_ylim(low, high)
    labels = [f"{n.split(',')[0]} *" if _is_longer(n) else n for n in shown]
    ax.set_xticks(range(len(shown)), labels, rotation=90, fontsize=7)
    ax.grid(axis="y", alpha=0.3)
    ax.set_axisbelow(True)


def _draw_one(
    ax: Any, at: int, look: tuple[str, str], found: Mapping[str, Any], low: float
) -> None:
    colour, marker = look
    mean, values = found["mean"]["mean"], _seeds(found)
    if mean < low:
        ax.text(at, low, f" ↓ {mean:.2f}", rotation=90, ha="center", va="bottom", fontsize=7)
        return
    middle = (len(values) - 1) / 2
    spots = [at + 0.4 * (i - middle) / max(1, len(values) - 1) for i in range(len(values))]
    ax.plot(
        spots, values, linestyle="", marker=marker, markersize=4.5, color=colour,
        markeredgecolor="0.2", markeredgewidth=0.4,
    )  # fmt: skip
    ax.plot([at - 0.36, at + 0.36], [mean, mean], color=colour, linewidth=2.2, zorder=1)


def _seeds(found: Mapping[str, Any]) -> list[float]:
    return [value for value in found["mean"]["per_seed"] if value is not None]
