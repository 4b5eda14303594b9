"""What stage one tells about its cache: region sizes per case, teachers against labels."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from pipeline.cohort import compute, lazy_consensus, open_cohort
from pipeline.consensus import region_voxels
from pipeline.data.registry import Registry
from pipeline.folder import Folder
from pipeline.labels import IGNORE
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
    cohort = open_cohort(work, registry, teachers=list(registry.teachers), datasets=datasets)
    for case in cohort.cases:
        regions, known = lazy_consensus(case, space)
        names = [space.organs[k] for k in known]
        (sizes,) = compute(dict(region_voxels(regions, names)))
        voxel_ml = case.grid.voxel_ml
        ml = {name: round(float(count) * voxel_ml, 1) for name, count in sizes.items()}
        rows.append({"case": case.name, "split": case.split, "ml": ml})
    return rows


def teacher_rows(
    registry: Registry, work: Folder, datasets: Sequence[str] | None = None, *, flag_below: float
) -> list[dict[str, Any]]:
    """Each teacher against the labels, read back from the cache.

    Dice of {log-odds > 0} and the label, on the student grid, over the cases that annotate the
    organ: of its validation cases where there are any, else of all.
    """
    rows = []
    for teacher, entry in registry.teachers.items():
        for organ in entry.organs:
            chosen_datasets = [
                d
                for d, e in registry.datasets.items()
                if organ in e.annotated and (datasets is None or d in datasets)
            ]
            for dataset in chosen_datasets:
                cohort = open_cohort(work, registry, teachers=[teacher], datasets=[dataset])
                cases = [c for c in cohort.cases if teacher in c.teachers]
                chosen = [c for c in cases if c.split == "validation"] or cases
                scores = []
                for case in chosen:
                    label = case.label()
                    odds = case.log_odds(teacher, organ)
                    score = _dice(odds > 0, label == registry.organs[organ], label != IGNORE)
                    if score is not None:
                        scores.append(score)
                mean = float(np.mean(scores)) if scores else None
                flagged = mean is not None and mean < flag_below
                rows.append(
                    {
                        "teacher": teacher,
                        "organ": organ,
                        "dataset": dataset,
                        "split": "validation" if chosen and chosen != cases else "all",
                        "num_cases": len(scores),
                        "dice": None if mean is None else round(mean, 4),
                        "flag": f"POOR: Dice below {flag_below}" if flagged else "",
                    }
                )
    return rows


def print_tables(regions: Sequence[Mapping[str, Any]], scores: Sequence[Mapping[str, Any]]) -> None:
    """Both tables, for people."""
    if regions:
        names = list(regions[0]["ml"])
        names += [n for row in regions for n in row["ml"] if n not in names]
        names = list(dict.fromkeys(names))
        shown = regions[:_MOST_ROWS]
        more = f", first {_MOST_ROWS} of {len(regions)} cases" if len(regions) > _MOST_ROWS else ""
        rows = [[r["case"], *(_ml(r["ml"].get(name)) for name in names)] for r in shown]
        print_table(f"Regions in ml{more}", ["case", *names], rows)
    if scores:
        columns = ["teacher", "organ", "dataset", "cases", "Dice", ""]
        rows = [
            [
                r["teacher"],
                r["organ"],
                r["dataset"],
                f"{r['num_cases']} ({r['split']})",
                "–" if r["dice"] is None else f"{r['dice']:.3f}",
                r["flag"],
            ]
            for r in scores
        ]
        print_table("Teachers against the labels, read back from the cache", columns, rows)


def _ml(value: float | None) -> str:
    return "–" if value is None else f"{value:.0f}" if value >= 10 else f"{value:.1f}"


def _dice(
    predicted: np.ndarray[Any, Any], reference: np.ndarray[Any, Any], seen: np.ndarray[Any, Any]
) -> float | None:
    predicted, reference = predicted & seen, reference & seen
    total = int(predicted.sum()) + int(reference.sum())
    if not reference.any():
        return None
    return 2.0 * int((predicted & reference).sum()) / total
