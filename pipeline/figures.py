"""Pictures and colours: overlays of a case, curves of a training, names and colours of a label
map. No screen is needed."""

from __future__ import annotations

import colorsys
import io
import os
import re
import xml.etree.ElementTree as ET
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

BACKGROUND_COLOUR = "#4dd0e1"
WINDOW_HU = (-160, 240)


def _busiest_voxel(masks: Iterable[npt.NDArray[Any]], image: npt.NDArray[Any]) -> tuple[int, ...]:
    """Per axis the slice that shows the most different regions, then the most of them; the middle
    one where nothing is shown. One mask is looked at after the other."""
    scores = [np.zeros(n) for n in image.shape]
    for mask in masks:
        for axis, score in enumerate(scores):
            areas = mask.sum(axis=tuple(a for a in range(3) if a != axis))
            score += areas / max(1, areas.max())
    return tuple(int(s.argmax()) if s.any() else s.size // 2 for s in scores)


@contextmanager
def open_figure(
    path: Path,
    rows: int,
    columns: int,
    *,
    size: tuple[float, float],
    heights: Sequence[float] | None = None,
) -> Iterator[tuple[Any, Any]]:
    """A figure and its axes (rows, columns); written whole at the end of the block, or not at all,
    and closed whatever happens."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(
        rows, columns, figsize=size, squeeze=False, constrained_layout=True, height_ratios=heights
    )
    temporary = path.with_name(f".{path.stem}.{os.getpid()}{path.suffix}")
    try:
        yield figure, axes
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(temporary, dpi=130)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
        plt.close(figure)


@dataclass(frozen=True)
class Marked:
    """The voxels of a map (D, H, W) that have one of some values; no mask of them all is kept."""

    values: npt.NDArray[Any]
    wanted: tuple[int, ...]

    def mask(self, index: tuple[Any, ...] = ()) -> npt.NDArray[np.bool_]:
        """bool, of the part at an index."""
        return np.isin(self.values[index], self.wanted)


# What lies at the left and at the right of a plane as it is shown, and at its top and bottom.
PLANE_ENDS = {
    "axial": ("R", "L", "A", "P"),
    "coronal": ("R", "L", "S", "I"),
    "sagittal": ("A", "P", "S", "I"),
}


def planes_of_shape(shape: Sequence[int]) -> dict[str, int]:
    """Plane -> the axis that it lies across; of one slice its own plane alone, since the others
    would be a line."""
    planes = {name: axis for axis, name in enumerate(PLANE_ENDS)}
    if list(shape).count(1) == 1:
        return {name: axis for name, axis in planes.items() if shape[axis] == 1}
    return planes


def save_planes(
    path: Path,
    image_hu: npt.NDArray[Any],
    panels: Mapping[str, Mapping[str, Marked]],
    spacing_mm: tuple[float, float, float],
    *,
    colours: Mapping[str, str],
    legend: Mapping[str, str],
    title: Sequence[str],
) -> None:
    """Axial, coronal and sagittal planes through the regions, one column per heading with what is
    drawn over the CT there, by name; of one slice its own plane.

    Regions are filled and outlined, so that the CT (D, H, W), in RAS+, stays visible. Planes are
    shown as radiologists look at them: the patient's right on the left, anterior at the top or,
    sagittal, on the left. Colours and what the legend says are by the regions' names.
    """
    from matplotlib.patches import Rectangle

    regions = [(n, m) for drawn in panels.values() for n, m in drawn.items()]
    centre = _busiest_voxel((m.mask() for n, m in regions if n != "agreed background"), image_hu)
    size_mm = [n * mm for n, mm in zip(image_hu.shape, spacing_mm, strict=True)]
    ratios = [size_mm[1] / size_mm[2], size_mm[0] / size_mm[2], size_mm[0] / size_mm[1]]
    planes = planes_of_shape(image_hu.shape)
    heights = [ratios[axis] for axis in planes.values()]
    size = (2.5 * len(panels), 2.5 * sum(heights) + 1.2 + 0.22 * (len(title) - 1))
    rows = len(planes)
    with open_figure(path, rows, len(panels), size=size, heights=heights) as (figure, axes):
        for column, (heading, drawn) in enumerate(panels.items()):
            axes[0, column].set_title(heading, fontsize=10)
            for row, (plane, axis) in enumerate(planes.items()):
                ax = axes[row, column]
                _draw_plane(ax, image_hu, drawn, plane, centre, spacing_mm, colours)
                if column == 0:
                    ax.set_ylabel(f"{plane}, slice {centre[axis] + 1}", fontsize=9)
        handles = [Rectangle((0, 0), 1, 1, color=colours[name]) for name in legend]
        figure.suptitle("\n".join(title), fontsize=11, x=0.01, ha="left")
        if handles:
            figure.legend(
                handles, list(legend.values()), loc="outside lower center", ncol=4, frameon=True,
                facecolor="#d9d9d9", fontsize=9,
            )  # fmt: skip


def _draw_plane(
    ax: Any,
    image_hu: npt.NDArray[Any],
    regions: Mapping[str, Marked],
    plane: str,
    centre: tuple[int, ...],
    spacing_mm: tuple[float, float, float],
    colours: Mapping[str, str],
) -> None:
    from matplotlib.colors import to_rgb
    from matplotlib.patheffects import withStroke

    axis = list(PLANE_ENDS).index(plane)
    rows_mm, columns_mm = (mm for n, mm in enumerate(spacing_mm) if n != axis)
    aspect = rows_mm / columns_mm
    index = tuple(centre[axis] if n == axis else slice(None) for n in range(3))
    low, high = WINDOW_HU
    shown = image_hu[index][:, ::-1]
    ax.imshow(shown, cmap="gray", vmin=low, vmax=high, origin="lower", aspect=aspect)
    for name, marked in regions.items():
        shown = marked.mask(index)[:, ::-1]
        rgba = np.zeros((*shown.shape, 4))
        rgba[..., :3] = to_rgb(colours[name])
        rgba[..., 3] = 0.45 * shown
        ax.imshow(rgba, origin="lower", aspect=aspect, interpolation="nearest")
        if shown.any() and not shown.all():
            ax.contour(shown, levels=[0.5], colors=[colours[name]], linewidths=0.8)
    ax.set_xticks([])
    ax.set_yticks([])
    left, right, top, bottom = PLANE_ENDS[plane]
    marks = ((0.03, 0.5, left), (0.97, 0.5, right), (0.5, 0.95, top), (0.5, 0.05, bottom))
    for x, y, letter in marks:
        ax.text(
            x, y, letter, color="w", transform=ax.transAxes, fontsize=8, ha="center", va="center",
            path_effects=[withStroke(linewidth=2, foreground="k")],
        )  # fmt: skip


# Names and colours of a label map, as the programs that show label maps read them.

Colour = tuple[int, int, int]

_GOLDEN_RATIO = 0.618033988749895
_ITKSNAP_HEAD = """################################################
# ITK-SnAP Label Description File
# File format:
# IDX   -R-  -G-  -B-  -A--  VIS MSH  LABEL
# Fields:
#    IDX:   Zero-based index
#    -R-:   Red color component (0..255)
#    -G-:   Green color component (0..255)
#    -B-:   Blue color component (0..255)
#    -A-:   Label transparency (0.00 .. 1.00)
#    VIS:   Label visibility (0 or 1)
#    IDX:   Label mesh visibility (0 or 1)
#  LABEL:   Label description
################################################
    0     0    0    0        0  0  0    "Clear Label\""""
# Of the first ids; all are as far from white paper as from the page's dark one and black air.
_FIRST = (
    "e6550d", "3182bd", "31a354", "b8860b", "8e44ad", "0097a7", "d81b60", "827717", "5c6bc0",
    "8d6e63",
)  # fmt: skip
_LIGHTEST, _DARKEST = 0.3, 0.125  # relative luminance (WCAG): 3:1 against white and the dark page
_WHITER = 0.2
_IGNORED, _GREY = 255, (128, 128, 128)  # voxels of a label map that nobody has judged
_ROW = re.compile(
    r'^ *(?P<id>\d+) +(?:(?P<bare>\S+)(?: +\d+){4}|(?: +[\d.]+){6} +"(?P<quoted>.*)") *$',
    re.MULTILINE,
)


def colour_of(organ_id: int) -> Colour:
    """Red, green and blue, 0 .. 255, of an organ id: the same in every file, picture, page and run.

    Behind the first ids, hues a golden ratio apart are never close for ids that are.
    """
    if organ_id == _IGNORED:
        return _GREY
    if organ_id <= len(_FIRST):
        red, green, blue = bytes.fromhex(_FIRST[organ_id - 1])
        return red, green, blue
    hue = (0.02 + (organ_id - 1) * _GOLDEN_RATIO) % 1.0
    value = (0.95, 0.75)[(organ_id // 7) % 2]
    rgb = colorsys.hsv_to_rgb(hue, 0.72, value)
    bright = luminance(rgb)
    too_light = max(1.0, bright / _LIGHTEST) ** (1 / 2.2)
    white = _WHITER if bright < _DARKEST else 0.0
    red, green, blue = (round(255 * (white + (1 - white) * c / too_light)) for c in rgb)
    return red, green, blue


def hex_colour(organ_id: int) -> str:
    """`colour_of` as `#rrggbb`."""
    return "#" + bytes(colour_of(organ_id)).hex()


def luminance(rgb: tuple[float, float, float]) -> float:
    """Relative luminance (WCAG) of red, green and blue, 0 .. 1, in sRGB."""
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in rgb]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def itksnap_text(names: Mapping[int, str]) -> str:
    """An ITK-SNAP label description file: Segmentation > Import Label Descriptions."""
    lines = [_ITKSNAP_HEAD]
    for organ_id, name in sorted(names.items()):
        red, green, blue = colour_of(organ_id)
        quoted = name.replace('"', "'")
        lines.append(f'{organ_id:5d} {red:5d} {green:4d} {blue:4d}        1  1  1    "{quoted}"')
    return "\n".join(lines) + "\n"


def slicer_text(names: Mapping[int, str], file_name: str) -> str:
    """A 3D Slicer colour table; names may hold no blanks there, so these become `_`."""
    lines = [
        f"# Color table file {file_name}",
        f"# {len(names) + 1} values",
        "0 background 0 0 0 0",
    ]
    for organ_id, name in sorted(names.items()):
        red, green, blue = colour_of(organ_id)
        lines.append(f"{organ_id} {'_'.join(name.split())} {red} {green} {blue} 255")
    return "\n".join(lines) + "\n"


def names_in(table: str) -> dict[int, str]:
    """Organ id -> name as it stands in a table of ITK-SNAP or 3D Slicer; none of background."""
    rows = _ROW.finditer(table)
    found = {int(row["id"]): row["quoted"] or row["bare"] for row in rows}
    return {organ_id: name for organ_id, name in found.items() if organ_id}


def caret_xml(names: Mapping[int, str]) -> str:
    """The label table that TotalSegmentator writes into a NIfTI header extension, and reads.

    Its reader takes `CaretExtension / VolumeInformation / LabelTable / Label` of the first
    extension; that table is in the format of the Caret programs.
    """
    labels = []
    for organ_id, name in sorted(names.items()):
        red, green, blue = (f"{c / 255:.4f}" for c in colour_of(organ_id))
        text = name.replace("]]>", "]] >")
        labels.append(
            f'<Label Key="{organ_id}" Red="{red}" Green="{green}" Blue="{blue}" Alpha="1">'
            f"<![CDATA[{text}]]></Label>"
        )
    head = '<?xml version="1.0" encoding="UTF-8"?>\n<CaretExtension><VolumeInformation Index="0">'
    end = "<VolumeType><![CDATA[Label]]></VolumeType>\n</VolumeInformation></CaretExtension>"
    return "\n".join([f"{head}<LabelTable>", *labels, f"</LabelTable>{end}"])


def caret_names(text: bytes) -> dict[int, str]:
    """The inverse of `caret_xml`: label value -> name; empty for what is no such table."""
    try:
        labels = list(ET.fromstring(text.strip(b"\0 \n")).iter("Label"))
        return {int(label.attrib["Key"]): (label.text or "").strip() for label in labels}
    except (ET.ParseError, KeyError, ValueError):
        return {}


# The curves of a training: loss terms, validation Dice, throughput.

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
    """Loss terms, validation Dice, and throughput with the wait for data, a share of the time,
    against steps. An organ's id says its colour; without `ids`, its place in `dice`."""
    with open_figure(path, 2, 3, size=(14, 5.2)) as (figure, axes):
        grid = axes[0, 0].get_gridspec()
        for ax in axes[:, :2].flat:
            ax.remove()
        losses, scores = figure.add_subplot(grid[:, 0]), figure.add_subplot(grid[:, 1])
        rates, waits = axes[:, 2]
        draw_terms(losses, terms)
        draw_dice(scores, dice, ids or {})
        draw_rate(rates, samples_per_second)
        draw_wait(waits, data_wait)
        losses.set_title("Training loss, weighted terms")
        scores.set_title("Validation, labelled organs")
        rates.set(title="Throughput", xlabel="")
        waits.set_title("Waiting for data")
        figure.suptitle(title, fontsize=12, x=0.01, ha="left")


def draw_terms(ax: Any, terms: Curves) -> None:
    """Loss terms against steps, raw and smoothed; `total` is black."""
    lowest = top = 0.0
    for number, name in enumerate(sorted(terms, key=lambda name: name != "total")):
        steps, values = np.array(terms[name], dtype=np.float64).T
        smooth = smoothed(values)
        style = _line_style(number - ("total" in terms))
        if name == "total":
            style = {"color": "#000000", "linestyle": "-"}
        ax.plot(steps, values, color=style["color"], alpha=0.18, linewidth=0.7)
        label = f"{name.replace('_', ' ')} {smooth[-1]:.3g}"
        ax.plot(steps, smooth, label=label, linewidth=1.6, **style)
        lowest, top = min(lowest, float(smooth.min())), max(top, float(smooth.max()))
    ax.set(xlabel="step", ylabel="loss")
    if top > 0:  # raw values of single steps may stick out far above
        ax.set_ylim(min(0.0, lowest), 1.1 * top)
    _finish_axes(ax, "last")


def draw_dice(ax: Any, dice: Curves, ids: Mapping[str, int]) -> None:
    """Validation Dice of organs against steps, in the organs' colours."""
    for number, (organ, points) in enumerate(dice.items()):
        steps, values = np.array(points, dtype=np.float64).T
        marker = "o" if len(points) <= 40 else None
        ax.plot(
            steps, values, label=f"{organ.replace('_', ' ')} {values[-1]:.2f}", marker=marker,
            markersize=4, linewidth=1.4,
            **_line_style(number) | {"color": hex_colour(ids.get(organ, number + 1))},
        )  # fmt: skip
    ax.set(xlabel="step", ylabel="Dice", ylim=(0, 1))
    _finish_axes(ax, "last")


def draw_rate(ax: Any, samples_per_second: Points) -> None:
    """Throughput against steps, raw and smoothed."""
    _draw_smoothed(ax, samples_per_second, _LINE_COLOURS[0])
    ax.set(xlabel="step", ylabel="samples per second")


def draw_wait(ax: Any, data_wait: Points) -> None:
    """The share of the time, 0 to 1, in which training waited for data, in percent."""
    _draw_smoothed(ax, [(step, 100 * value) for step, value in data_wait], _LINE_COLOURS[1])
    ax.set(xlabel="step", ylabel="% of the time")
    ax.set_ylim(0, max(5.0, 1.2 * ax.get_ylim()[1]) if len(data_wait) else 100)


def _draw_smoothed(ax: Any, points: Points, colour: str) -> None:
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
            fontsize="small", title_fontsize="small", alignment="left",
        )  # fmt: skip


def _line_style(number: int) -> dict[str, str]:
    """Okabe and Ito's colours, which the colour-blind tell apart; then with another dash."""
    dash = ("-", "--", ":", "-.")[number // len(_LINE_COLOURS) % 4]
    return {"color": _LINE_COLOURS[number % len(_LINE_COLOURS)], "linestyle": dash}


def smoothed(values: npt.NDArray[np.float64], share: int = 10) -> npt.NDArray[np.float64]:
    """A running mean over one `share`-th of the values."""
    width = max(1, min(51, len(values) // share))
    kernel = np.ones(width) / width
    padded = np.pad(values, (width // 2, width - 1 - width // 2), mode="edge")
    return np.convolve(padded, kernel, mode="valid")


# Charts as a part of a page.

_INK = "#010203"
_PAGE_STYLE: dict[Any, Any] = {
    "font.size": 12,
    "svg.fonttype": "none",
    "text.parse_math": False,
    **dict.fromkeys(("text.color", "axes.labelcolor", "axes.edgecolor", "grid.color"), _INK),
    **dict.fromkeys(("xtick.color", "ytick.color"), _INK),
}


def svg_chart(key: str, draw: Callable[[Any], None], *, height: float = 230) -> str:
    """A chart as an SVG element of a page, 520 units wide: in the page's font and colour, what is
    black in its `--ink`, lines in its `--c0` to `--c5`. Each chart of a page has another `key`, so
    that no two have an id in common."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    text = io.StringIO()
    with mpl.rc_context(_PAGE_STYLE | {"svg.hashsalt": key}):
        figure = Figure(figsize=(520 / 72, height / 72), layout="constrained")
        draw(figure.subplots())
        none = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        figure.savefig(text, format="svg", transparent=True, metadata=none)
    found = '<svg aria-hidden="true" viewBox=' + text.getvalue().partition("viewBox=")[2]
    found = re.sub(r"<style.*?</style>| font-family: .*?sans-serif;", "", found)
    found = re.sub(r'<g id=".*?"', "<g", found)
    colours = {_INK: "currentColor", "#000000": "var(--ink)"}
    colours |= {colour.lower(): f"var(--c{n})" for n, colour in enumerate(_LINE_COLOURS)}
    return re.sub("#[0-9a-f]{6}", lambda hex_: colours.get(hex_[0], hex_[0]), found)
