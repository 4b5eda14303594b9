"""Folders side by side: as tables for people, `against.json` and `against.csv`."""

from __future__ import annotations

import csv
import io
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.cache.store import json_text
from pipeline.comparison.folders import HIGHER_IS_BETTER, SideBySide
from pipeline.comparison.paired import MIN_PAIRS, Paired
from pipeline.comparison.statistics import CONFIDENCE, MIN_CASES, NUM_DRAWS
from pipeline.folder import contains, json_with, refuse_foreign, replace_files, writing
from pipeline.log import print_table

FORMAT_VERSION = 1
_CSV_BEGIN = "metric,case,organ"
_UNITS = {"HD95_mm": "HD95, mm (lower is better)"}


def check_place(folder: Path) -> None:
    """Before anything is computed: that both files may be written.

    Raises:
        ConfigError: one is there that `evaluate` did not write.
    """
    table, scores = folder / "against.json", folder / "against.csv"
    ours = {
        table: json_with(table, "first", "against") is not None,
        scores: contains(scores, _CSV_BEGIN),
    }
    refuse_foreign("evaluate --against", ours.items(), fix="Move away what is there.")


def write_side_by_side(found: SideBySide, folder: Path) -> list[Path]:
    """Writes `against.json`, all results, and `against.csv`, the scores that they are of.

    Raises:
        WorkFolderError: the folder cannot be written.
    """
    written = [folder / "against.json", folder / "against.csv"]
    texts = json_text(to_json(found)), to_csv(found)
    with writing(folder):
        replace_files({path: text.encode() for path, text in zip(written, texts, strict=True)})
    return written


def to_json(found: SideBySide) -> dict[str, Any]:
    """All results and how they were made, as plain values."""
    folders = zip(found.names, found.folders, strict=True)
    return {
        "format_version": FORMAT_VERSION,
        "first": found.names[0],
        "folders": {name: str(folder) for name, folder in folders},
        "settings": found.summaries[0]["settings"],
        "cases": list(found.cases),
        "notices": list(found.notices),
        "difference": "first minus other, over the same cases",
        "bootstrap": {
            "drawn": "cases, with replacement",
            "draws": NUM_DRAWS,
            "confidence": CONFIDENCE,
            "min_cases": MIN_CASES,
        },
        "test": {
            "name": "Wilcoxon signed-rank, two-sided, equal scores left out",
            "min_differing_cases": MIN_PAIRS,
            "correction": "Holm, over all organs, their mean and all folders of one metric",
        },
        "against": {
            name: {
                "metrics": {metric: _rows(found, metric, n) for metric in found.metrics},
                "largest_losses_of_dice": [asdict(loss) for loss in found.losses(n + 1)],
            }
            for n, name in enumerate(found.names[1:])
        },
    }


def to_csv(found: SideBySide) -> str:
    """One row per metric, case and organ, a column per folder; empty where there is no score."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow([*_CSV_BEGIN.split(","), *found.names])
    for metric in found.metrics:
        scores = [found.scores(n, metric) for n in range(len(found.names))]
        for n, case in enumerate(found.cases):
            for k, organ in enumerate(found.organs):
                values = [float(score[n, k]) for score in scores]
                cells = ["" if np.isnan(value) else value for value in values]
                writer.writerow([metric, case, organ, *cells])
    return text.getvalue()


def print_side_by_side(found: SideBySide) -> None:
    """A table per other folder and metric, the largest losses, and what the columns mean."""
    first = found.names[0]
    for n, name in enumerate(found.names[1:]):
        for metric in found.metrics:
            title = f"{_UNITS.get(metric, metric)}: {first} against {name}, {_cases(found)}"
            columns = [
                "organ", "cases", first, name, f"difference [{CONFIDENCE:.0%}]",
                "better / equal / worse", "p", "p, Holm",
            ]  # fmt: skip
            adjusted = found.adjusted(metric)[n]
            rows = [
                _cells(organ, result, adjusted[organ], metric)
                for organ, result in found.results[metric][n].items()
            ]
            print_table(title, columns, rows)
        losses = [
            [
                loss.case, loss.organ, f"{loss.first:.3f}", f"{loss.other:.3f}",
                f"{loss.first - loss.other:+.3f}",
            ]
            for loss in found.losses(n + 1)
        ]  # fmt: skip
        if losses:
            title = f"Where {first} lost most Dice against {name}"
            print_table(title, ["case", "organ", first, name, "difference"], losses, num_text=2)
    lines = [
        f"Differences are {first} minus the other, over the same cases. Intervals: bootstrap over "
        f"cases, none below {MIN_CASES}.",
        f"p: Wilcoxon signed-rank, none where fewer than {MIN_PAIRS} cases differ; Holm over all "
        "organs, their mean and all folders of one metric.",
        *found.notices,
    ]
    print("\n".join(lines))  # noqa: T201


def _rows(found: SideBySide, metric: str, number: int) -> dict[str, Any]:
    adjusted = found.adjusted(metric)[number]
    return {
        organ: {
            "first": result.first,
            "other": result.other,
            "difference": result.difference.mean,
            "low": result.difference.low,
            "high": result.difference.high,
            "num_cases": _num_cases(result),
            "higher": result.higher,
            "equal": result.equal,
            "lower": result.lower,
            "p": result.p,
            "p_holm": adjusted[organ],
            "notes": [note for note in (result.difference.note, result.note) if note],
        }
        for organ, result in found.results[metric][number].items()
    }


def _cells(organ: str, result: Paired, adjusted: float | None, metric: str) -> list[str]:
    gap, digits = result.difference, 1 if metric in _UNITS else 3
    apart = "–" if gap.mean is None else f"{gap.mean:+.{digits}f}"
    if gap.low is not None:
        apart += f" [{gap.low:+.{digits}f}, {gap.high:+.{digits}f}]"
    better, worse = result.higher, result.lower
    if not HIGHER_IS_BETTER[metric]:
        better, worse = worse, better
    return [
        organ,
        str(_num_cases(result)),
        *("–" if mean is None else f"{mean:.{digits}f}" for mean in (result.first, result.other)),
        apart,
        f"{better} / {result.equal} / {worse}",
        *("–" if p is None else f"{p:.2g}" for p in (result.p, adjusted)),
    ]


def _num_cases(result: Paired) -> int:
    return result.higher + result.equal + result.lower


def _cases(found: SideBySide) -> str:
    return f"{len(found.cases)} case{'' if len(found.cases) == 1 else 's'}"
