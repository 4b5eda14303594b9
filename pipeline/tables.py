"""What stage one tells about its cache, read back from it: region sizes per case."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from pipeline.cohort import compute, lazy_consensus, open_cohort
from pipeline.consensus import region_voxels
from pipeline.data.registry import Registry
from pipeline.folder import Folder
from pipeline.log import print_table

_MOST_ROWS = 60


def region_rows(
    registry: Registry, work: Folder, datasets: Sequence[str] | None = None
) -> list[dict[str, Any]]:
    """Per case, the size of each region in ml: labels win, margin 0. `datasets`: None for all."""
    if not registry.teachers:
        return []
    space = registry.label_space
    rows = []
    teachers = list(registry.teachers)
    cohort = open_cohort(work, registry, teachers=teachers, datasets=datasets, as_indexed=True)
    for case in cohort.cases:
        regions, known = lazy_consensus(case, space)
        names = [space.organs[k] for k in known]
        sizes = region_voxels(regions, names)
        voxel_ml = case.grid.voxel_ml
        counts = zip(sizes, compute(*sizes.values()), strict=True)
        ml = {name: round(float(count) * voxel_ml, 1) for name, count in counts}
        rows.append({"case": case.name, "split": case.split, "ml": ml})
    return rows


def print_regions(regions: Sequence[Mapping[str, Any]]) -> None:
    """The table, for people."""
    if not regions:
        return
    names = list(dict.fromkeys(name for row in regions for name in row["ml"]))
    shown = regions[:_MOST_ROWS]
    more = f", first {_MOST_ROWS} of {len(regions)} cases" if len(regions) > _MOST_ROWS else ""
    rows = [[r["case"], *(in_ml(r["ml"].get(name)) for name in names)] for r in shown]
    print_table(f"Regions in ml{more}", ["case", *names], rows)


def in_ml(value: float | None) -> str:
    """A volume for people: whole ml from 10 on, a dash for none."""
    return "–" if value is None else f"{value:.0f}" if value >= 10 else f"{value:.1f}"
