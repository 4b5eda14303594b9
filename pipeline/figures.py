"""Pictures: overlays of a case with its regions; no screen is needed."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

BACKGROUND_COLOUR = "#4dd0e1"
WINDOW_HU = (-160, 240)


def save_overlay(
    path: Path,
    image_hu: npt.NDArray[Any],
    panels: Mapping[str, Mapping[str, npt.NDArray[np.bool_]]],
    spacing_mm: tuple[float, float, float],
    *,
    title: str,
    colours: Mapping[str, str],
) -> None:
    """One row of slices per plane, one column per panel.

    Args:
        path: PNG.
        image_hu: (D, H, W) in RAS+.
        panels: column title -> region name -> bool (D, H, W) drawn over the CT; an empty mapping
            shows the CT alone.
        spacing_mm: z, y, x.
        title: above everything.
        colours: region name -> colour, of every name but "agreed background".
    """
    names = list(dict.fromkeys(n for regions in panels.values() for n in regions))
    palette = {"agreed background": BACKGROUND_COLOUR, **colours}
    centre = _busiest_voxel([m for n, m in _all(panels) if n != "agreed background"], image_hu)
    aspects = (spacing_mm[1] / spacing_mm[2], spacing_mm[0] / spacing_mm[2])
    with open_figure(path, 2, len(panels), size=(2.6 * len(panels), 5.4)) as (figure, axes):
        for column, (heading, regions) in enumerate(panels.items()):
            axes[0, column].set_title(heading, fontsize=9)
            for plane, aspect in enumerate(aspects):
                ax = axes[plane, column]
                ax.imshow(
                    _plane(image_hu, plane, centre), cmap="gray", vmin=WINDOW_HU[0],
                    vmax=WINDOW_HU[1], origin="lower", aspect=aspect,
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


def _busiest_voxel(masks: Iterable[npt.NDArray[Any]], image: npt.NDArray[Any]) -> tuple[int, ...]:
    """Per axis the slice that shows the most different regions, then the most of them; the middle
    one where nothing is shown. One mask is looked at after the other."""
    scores = [np.zeros(n) for n in image.shape]
    for mask in masks:
        for axis, score in enumerate(scores):
            areas = mask.sum(axis=tuple(a for a in range(3) if a != axis))
            score += areas / max(1, areas.max())
    return tuple(int(s.argmax()) if s.any() else s.size // 2 for s in scores)


def _patch(colour: str) -> Any:
    from matplotlib.patches import Rectangle

    return Rectangle((0, 0), 1, 1, color=colour)


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


@dataclass(frozen=True)
class Panel:
    """A column of `save_planes`: its heading, and what is drawn over the CT, by name."""

    heading: str
    regions: Mapping[str, Marked]


# What lies at the left and at the right of a plane as it is shown, and at its top and bottom.
PLANE_ENDS = {
    "axial": ("R", "L", "A", "P"),
    "coronal": ("R", "L", "S", "I"),
    "sagittal": ("A", "P", "S", "I"),
}


def save_planes(
    path: Path,
    image_hu: npt.NDArray[Any],
    panels: Sequence[Panel],
    spacing_mm: tuple[float, float, float],
    *,
    colours: Mapping[str, str],
    legend: Mapping[str, str],
    title: str,
    notes: Sequence[str] = (),
) -> None:
    """Axial, coronal and sagittal planes through the regions, one column per panel.

    Regions are filled and outlined, so that the CT stays visible. Planes are shown as radiologists
    look at them: the patient's right on the left, anterior at the top or, sagittal, on the left.

    Args:
        path: PNG.
        image_hu: (D, H, W) in RAS+.
        panels: columns.
        spacing_mm: z, y, x.
        colours: region name -> colour, of every name in the panels.
        legend: region name -> what the legend says, in that order.
        title: above everything.
        notes: lines below the legend.
    """
    regions = [(n, m) for panel in panels for n, m in panel.regions.items()]
    centre = _busiest_voxel((m.mask() for n, m in regions if n != "agreed background"), image_hu)
    size_mm = [n * mm for n, mm in zip(image_hu.shape, spacing_mm, strict=True)]
    heights = [size_mm[1] / size_mm[2], size_mm[0] / size_mm[2], size_mm[0] / size_mm[1]]
    width = 2.5 * len(panels)
    tall = 2.5 * sum(heights) + 1.2 + 0.22 * len(notes)
    with open_figure(path, 3, len(panels), size=(width, tall), heights=heights) as (figure, axes):
        for column, panel in enumerate(panels):
            axes[0, column].set_title(panel.heading, fontsize=10)
            for row, plane in enumerate(PLANE_ENDS):
                ax = axes[row, column]
                _draw_plane(ax, image_hu, panel.regions, plane, centre, spacing_mm, colours)
                if column == 0:
                    index = centre[row] + 1
                    ax.set_ylabel(f"{plane}, slice {index}", fontsize=9)
        handles = [_patch(colours[name]) for name in legend]
        text = "\n".join([title, *(f"improbable: {note}" for note in notes)])
        figure.suptitle(text, fontsize=11, x=0.01, ha="left")
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
        _fill(ax, shown, colours[name], aspect)
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
