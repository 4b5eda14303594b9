"""Pictures: training curves, and the overlay of a case with its regions; no screen is needed."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

Points = Sequence[tuple[float, float]]
Curves = Mapping[str, Points]
ORGAN_COLOURS = ("#e6550d", "#3182bd", "#31a354", "#fdd835", "#8e44ad", "#00acc1", "#d81b60")
_LINE_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
_BACKGROUND_COLOUR = "#4dd0e1"
_WINDOW_HU = (-160, 240)


def save_curves(
    path: Path,
    terms: Curves,
    dice: Curves,
    *,
    samples_per_second: Points = (),
    data_wait: Points = (),
    title: str = "",
) -> None:
    """Loss terms, validation Dice, and throughput with the wait for data, against steps.

    Args:
        path: PNG.
        terms: term -> (step, value), drawn raw and smoothed; `total` is drawn in black.
        dice: organ -> (step, Dice).
        samples_per_second: (step, samples/s).
        data_wait: (step, share of the time, 0 to 1).
        title: above everything.
    """
    with open_figure(path, 2, 3, size=(14, 5.2)) as (figure, axes):
        grid = axes[0, 0].get_gridspec()
        for column in (0, 1):
            for row in (0, 1):
                axes[row, column].remove()
        _draw_terms(figure.add_subplot(grid[:, 0]), terms)
        _draw_dice(figure.add_subplot(grid[:, 1]), dice)
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
        smooth = _smooth(values)
        style = _line_style(number - ("total" in terms), black=name == "total")
        ax.plot(steps, values, color=style["color"], alpha=0.18, linewidth=0.7)
        label = f"{name.replace('_', ' ')} {smooth[-1]:.3g}"
        ax.plot(steps, smooth, label=label, linewidth=1.6, **style)
        lowest, top = min(lowest, float(smooth.min())), max(top, float(smooth.max()))
    ax.set(title="Training loss, weighted terms", xlabel="step", ylabel="loss")
    if top > 0:  # raw values of single steps may stick out far above
        ax.set_ylim(min(0.0, lowest), 1.1 * top)
    _finish_axes(ax, "last")


def _draw_dice(ax: Any, dice: Curves) -> None:
    for number, (organ, points) in enumerate(dice.items()):
        steps, values = np.array(points, dtype=np.float64).T
        marker = "o" if len(points) <= 40 else None
        ax.plot(
            steps, values, label=f"{organ.replace('_', ' ')} {values[-1]:.2f}", marker=marker,
            markersize=4, linewidth=1.4, **_line_style(number),
        )  # fmt: skip
    ax.set(title="Validation, labelled organs", xlabel="step", ylabel="Dice", ylim=(0, 1))
    _finish_axes(ax, "last")


def _draw_rate(ax: Any, points: Points, colour: str) -> None:
    if len(points):
        steps, values = np.array(points, dtype=np.float64).T
        ax.plot(steps, values, color=colour, alpha=0.25, linewidth=0.7)
        ax.plot(steps, _smooth(values, share=40), color=colour, linewidth=1.6)
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


def save_overlay(
    path: Path,
    image_hu: npt.NDArray[Any],
    panels: Mapping[str, Mapping[str, npt.NDArray[np.bool_]]],
    spacing_mm: tuple[float, float, float],
    *,
    title: str,
    colours: Mapping[str, str] | None = None,
) -> None:
    """One row of slices per plane, one column per panel.

    Args:
        path: PNG.
        image_hu: (D, H, W) in RAS+.
        panels: column title -> region name -> bool (D, H, W) drawn over the CT; an empty mapping
            shows the CT alone.
        spacing_mm: z, y, x.
        title: above everything.
        colours: region name -> colour; others take theirs in order of appearance.
    """
    names = list(dict.fromkeys(n for regions in panels.values() for n in regions))
    palette = {n: ORGAN_COLOURS[i % len(ORGAN_COLOURS)] for i, n in enumerate(names)}
    palette |= {"agreed background": _BACKGROUND_COLOUR, **(colours or {})}
    centre = _busiest_voxel([m for n, m in _all(panels) if n != "agreed background"], image_hu)
    aspects = (spacing_mm[1] / spacing_mm[2], spacing_mm[0] / spacing_mm[2])
    with open_figure(path, 2, len(panels), size=(2.6 * len(panels), 5.4)) as (figure, axes):
        for column, (heading, regions) in enumerate(panels.items()):
            axes[0, column].set_title(heading, fontsize=9)
            for plane, aspect in enumerate(aspects):
                ax = axes[plane, column]
                ax.imshow(
                    _plane(image_hu, plane, centre), cmap="gray", vmin=_WINDOW_HU[0],
                    vmax=_WINDOW_HU[1], origin="lower", aspect=aspect,
                )  # fmt: skip
                for name, mask in regions.items():
                    _fill(ax, _plane(mask, plane, centre), palette[name], aspect)
                ax.set_xticks([])
                ax.set_yticks([])
        for plane, name in enumerate(("axial", "coronal")):
            ax = axes[plane, 0]
            ax.set_ylabel(name, fontsize=9)
            ax.text(0.02, 0.5, "R", color="w", transform=ax.transAxes, fontsize=8)
        handles = [_patch(palette[n]) for n in names]
        if handles:
            figure.legend(
                handles, names, loc="outside lower center", ncol=min(8, len(names)),
                frameon=False, fontsize=9,
            )  # fmt: skip
        figure.suptitle(title, fontsize=10)


def _plane(volume: npt.NDArray[Any], plane: int, centre: tuple[int, ...]) -> npt.NDArray[Any]:
    """Axial (0) or coronal (1), as radiologists look: the patient's right is on the left."""
    slice_ = volume[centre[0]] if plane == 0 else volume[:, centre[1]]
    return slice_[:, ::-1]


def _fill(ax: Any, mask: npt.NDArray[Any], colour: str, aspect: float) -> None:
    from matplotlib.colors import to_rgb

    rgba = np.zeros((*mask.shape, 4))
    rgba[..., :3] = to_rgb(colour)
    rgba[..., 3] = 0.45 * mask
    ax.imshow(rgba, origin="lower", aspect=aspect, interpolation="nearest")


def _all(
    panels: Mapping[str, Mapping[str, npt.NDArray[np.bool_]]],
) -> list[tuple[str, npt.NDArray[np.bool_]]]:
    return [(name, mask) for regions in panels.values() for name, mask in regions.items()]


def _busiest_voxel(masks: Sequence[npt.NDArray[Any]], image: npt.NDArray[Any]) -> tuple[int, ...]:
    """Per axis the slice that shows the most different regions, then the most of them."""
    if not masks:
        return tuple(n // 2 for n in image.shape)
    chosen = []
    for axis in range(3):
        others = tuple(a for a in range(3) if a != axis)
        areas = np.array([m.sum(axis=others) for m in masks], dtype=np.float64)
        largest = areas.max(axis=1, keepdims=True).clip(min=1)
        chosen.append(int((areas / largest).sum(axis=0).argmax()))
    return tuple(chosen)


def _smooth(values: npt.NDArray[np.float64], share: int = 10) -> npt.NDArray[np.float64]:
    """A running mean over one `share`-th of the values."""
    width = max(1, min(51, len(values) // share))
    kernel = np.ones(width) / width
    padded = np.pad(values, (width // 2, width - 1 - width // 2), mode="edge")
    return np.convolve(padded, kernel, mode="valid")


def _patch(colour: str) -> Any:
    from matplotlib.patches import Rectangle

    return Rectangle((0, 0), 1, 1, color=colour)


@contextmanager
def open_figure(
    path: Path, rows: int, columns: int, *, size: tuple[float, float]
) -> Iterator[tuple[Any, Any]]:
    """A figure and its axes (rows, columns); written whole at the end of the block, or not at all,
    and closed whatever happens."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(rows, columns, figsize=size, squeeze=False, constrained_layout=True)
    temporary = path.with_name(f".{path.stem}.{os.getpid()}{path.suffix}")
    try:
        yield figure, axes
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(temporary, dpi=130)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
        plt.close(figure)
