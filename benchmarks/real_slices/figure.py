"""Slices to look at: where the last configuration gained most over the first, and lost most."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from benchmarks.real_slices.road import Road
from benchmarks.real_slices.size import GREYS
from benchmarks.real_slices.slices import ORGANS
from pipeline.cache.reader import CachedCase
from pipeline.consensus.cohort import open_cohort
from pipeline.data.registry import load_registry
from pipeline.figures import hex_colour, open_figure
from pipeline.networks.by_name import pick_device
from pipeline.student.checkpoint import load_student
from pipeline.student.inference import StudentWindows
from stages.compare.results import Results

_SHOWN = 2  # slices of each end


def draw_slices(
    path: Path, road: Road, seed: int, found: Mapping[tuple[str, str], Results], split: str
) -> str:
    """One row per slice; columns: CT, reference, teachers, each configuration.

    Args:
        path: PNG.
        road: what was done.
        seed: of the repetition that is shown.
        found: of it.
        split: of the slices.

    Returns:
        What it shows, in words.
    """
    from matplotlib.patches import Rectangle

    results = found[road.terms[0], split]
    last, first = results.configs[-1], results.configs[0]
    gains = _gains(results, last, first)
    order = sorted(gains, key=lambda case: gains[case])
    wanted = list(dict.fromkeys([*order[: -_SHOWN - 1 : -1], *order[:_SHOWN][::-1]]))
    registry = load_registry(road.place(seed) / "data_registry.yaml", files=False)
    cohort = open_cohort(
        road.place(seed) / "work", registry, teachers=list(registry.teachers), splits=(split,)
    )
    cases = {case.name: case for case in cohort.cases}
    columns = ["CT", "reference", "teachers", *results.configs]
    size = (1.7 * len(columns), 1.8 * len(wanted) + 0.6)
    with open_figure(path, len(wanted), len(columns), size=size) as (figure, axes):
        for row, name in enumerate(wanted):
            case = cases[name]
            maps = [None, case.label(), _of_teachers(case), *_of_students(case, results, road)]
            for column, ids in enumerate(maps):
                _draw(axes[row, column], case.image(), ids)
            axes[row, 0].set_ylabel(f"{name.split('/')[-1]}\n{gains[name]:+.2f}", fontsize=6)
        for ax, heading in zip(axes[0], columns, strict=True):
            ax.set_title(heading, fontsize=8)
        said = (
            f"Largest gains and losses in Dice, {last} minus {first}, {split} slices, seed {seed}"
        )
        figure.suptitle(said, fontsize=9)
        handles = [Rectangle((0, 0), 1, 1, color=hex_colour(n)) for n in ORGANS.values()]
        figure.legend(handles, list(ORGANS), loc="outside lower center", ncol=3, fontsize=8)
    return said


def _gains(results: Results, last: str, first: str) -> dict[str, float]:
    """Slice -> difference in its mean Dice over the organs that it shows."""
    means = []
    for name in (last, first):
        values: dict[str, list[float]] = {}
        for row in (row for run in results.of(name) for row in run.rows if row["n_ref"]):
            values.setdefault(row["case"], []).append(row["Dice"])
        means.append({case: float(np.mean(dices)) for case, dices in values.items()})
    return {case: value - means[1][case] for case, value in means[0].items()}


def _of_teachers(case: CachedCase) -> npt.NDArray[Any]:
    """Organ ids: the likeliest of all organs and none."""
    odds = np.stack([np.nan_to_num(case.log_odds(o, o), nan=-1.0) for o in ORGANS])
    return np.asarray(np.concatenate([np.zeros_like(odds[:1]), odds]).argmax(axis=0))


def _of_students(case: CachedCase, results: Results, road: Road) -> list[npt.NDArray[Any]]:
    device = pick_device(road.device)
    found = []
    for name in results.configs:
        record, network = load_student(results.of(name)[0].folder / "student.pt")
        windows = StudentWindows(network.to(device), record.intensity, record.patch, device)
        found.append(windows.logits(case.image()).argmax(axis=0))
    return found


def _draw(ax: Any, image: npt.NDArray[Any], ids: npt.NDArray[Any] | None) -> None:
    """The first slice, as radiologists look at it: the patient's right on the left, back down."""
    from matplotlib.colors import to_rgba

    ax.imshow(image[0, ::-1, ::-1], cmap="gray", vmin=GREYS[0], vmax=GREYS[1])
    ax.set_xticks([])
    ax.set_yticks([])
    if ids is None:
        return
    colours = np.zeros((*ids.shape[1:], 4))
    for number in ORGANS.values():
        colours[ids[0] == number] = to_rgba(hex_colour(number), 0.5)
    ax.imshow(colours[::-1, ::-1], interpolation="nearest")
