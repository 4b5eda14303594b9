"""The curves of a training: loss terms, validation Dice, throughput."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from pipeline.figures import open_figure
from pipeline.label_tables import hex_colour

Points = Sequence[tuple[float, float]]
Curves = Mapping[str, Points]
_LINE_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")


def save_curves(
    path: Path,
    terms: Curves,
    dice: Curves,
    *,
    samples_per_second: Points = (),
    data_wait: Points = (),
    ids: Mapping[str, int] | None = None,
    title: str = "",
) -> None:
    """Loss terms, validation Dice, and throughput with the wait for data, against steps.

    Args:
        path: PNG.
        terms: term -> (step, value), drawn raw and smoothed; `total` is drawn in black.
        dice: organ -> (step, Dice).
        samples_per_second: (step, samples/s).
        data_wait: (step, share of the time, 0 to 1).
        ids: organ -> id, which says its colour; else by its place in `dice`.
        title: above everything.
    """
    with open_figure(path, 2, 3, size=(14, 5.2)) as (figure, axes):
        grid = axes[0, 0].get_gridspec()
        for column in (0, 1):
            for row in (0, 1):
                axes[row, column].remove()
        _draw_terms(figure.add_subplot(grid[:, 0]), terms)
        _draw_dice(figure.add_subplot(grid[:, 1]), dice, ids or {})
        rates, waits = axes[0, 2], axes[1, 2]
        _draw_rate(rates, samples_per_second, "#0072B2")
        _draw_rate(waits, [(step, 100 * value) for step, value in data_wait], "#D55E00")
        rates.set(title="Throughput", ylabel="samples per second")
        waits.set(title="Waiting for data", ylabel="% of the time", xlabel="step")
        waits.set_ylim(0, max(5.0, 1.2 * waits.get_ylim()[1]) if len(data_wait) else 100)
        figure.suptitle(title, fontsize=12, x=0.01, ha="left")


def _draw_terms(ax: Any, terms: Curves) -> None:
    lowest = top = 0.0
    for number, name in enumerate(sorted(terms, key=lambda name: name != "total")):
        steps, values = np.array(terms[name], dtype=np.float64).T
        smooth = smoothed(values)
        style = _line_style(number - ("total" in terms), black=name == "total")
        ax.plot(steps, values, color=style["color"], alpha=0.18, linewidth=0.7)
        label = f"{name.replace('_', ' ')} {smooth[-1]:.3g}"
        ax.plot(steps, smooth, label=label, linewidth=1.6, **style)
        lowest, top = min(lowest, float(smooth.min())), max(top, float(smooth.max()))
    ax.set(title="Training loss, weighted terms", xlabel="step", ylabel="loss")
    if top > 0:  # raw values of single steps may stick out far above
        ax.set_ylim(min(0.0, lowest), 1.1 * top)
    _finish_axes(ax, "last")


def _draw_dice(ax: Any, dice: Curves, ids: Mapping[str, int]) -> None:
    for number, (organ, points) in enumerate(dice.items()):
        steps, values = np.array(points, dtype=np.float64).T
        marker = "o" if len(points) <= 40 else None
        ax.plot(
            steps, values, label=f"{organ.replace('_', ' ')} {values[-1]:.2f}", marker=marker,
            markersize=4, linewidth=1.4,
            **_line_style(number) | {"color": hex_colour(ids.get(organ, number + 1))},
        )  # fmt: skip
    ax.set(title="Validation, labelled organs", xlabel="step", ylabel="Dice", ylim=(0, 1))
    _finish_axes(ax, "last")


def _draw_rate(ax: Any, points: Points, colour: str) -> None:
    if len(points):
        steps, values = np.array(points, dtype=np.float64).T
        ax.plot(steps, values, color=colour, alpha=0.25, linewidth=0.7)
        ax.plot(steps, smoothed(values, share=40), color=colour, linewidth=1.6)
    ax.set_ylim(bottom=0)
    _finish_axes(ax, "")


def _finish_axes(ax: Any, legend_title: str) -> None:
    ax.grid(alpha=0.25)
    ax.set_xlim(left=0)
    ax.xaxis.set_major_formatter(
        lambda step, _: f"{step / 1000:g}k" if step >= 1e4 else f"{step:g}"
    )
    ax.spines[["top", "right"]].set_visible(False)
    labels = ax.get_legend_handles_labels()[1]
    if labels:
        ax.legend(
            title=legend_title, loc="upper left", bbox_to_anchor=(1.0, 1.0), frameon=False,
            fontsize=8, title_fontsize=8, alignment="left",
        )  # fmt: skip


def _line_style(number: int, *, black: bool = False) -> dict[str, str]:
    """Okabe and Ito's colours, which the colour-blind tell apart; then with another dash."""
    if black:
        return {"color": "#000000", "linestyle": "-"}
    dash = ("-", "--", ":", "-.")[number // len(_LINE_COLOURS) % 4]
    return {"color": _LINE_COLOURS[number % len(_LINE_COLOURS)], "linestyle": dash}


def smoothed(values: npt.NDArray[np.float64], share: int = 10) -> npt.NDArray[np.float64]:
    """A running mean over one `share`-th of the values."""
    width = max(1, min(51, len(values) // share))
    kernel = np.ones(width) / width
    padded = np.pad(values, (width // 2, width - 1 - width // 2), mode="edge")
    return np.convolve(padded, kernel, mode="valid")
