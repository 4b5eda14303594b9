"""`pipeline evaluate --against`: folders of predictions scored on the same cases, side by side.

A folder's `summary.json` is used again if it was made with the same settings, of the same
references and of the predictions that are there now; a folder without one is evaluated first.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.cache.store import json_text
from pipeline.data.registry import Registry
from pipeline.errors import ConfigError, counted, listed
from pipeline.folder import contains, json_with, refuse_foreign, replace_files, writing
from pipeline.log import Log, number, print_table
from pipeline.review.metrics import known, outdated
from pipeline.review.statistics import (
    CONFIDENCE,
    MIN_CASES,
    MIN_PAIRS,
    OVER_ORGANS,
    Floats,
    Paired,
    bootstrap,
    holm,
    paired,
)
from stages import evaluate
from stages.evaluate import EvaluateConfig

HIGHER_IS_BETTER = {"Dice": True, "NSD": True, "HD95_mm": False}


@dataclass(frozen=True, eq=False)
class SideBySide:
    """Folders on the cases that all of them have.

    Attributes:
        names: of the folders, the first being the one that others are held against.
    """

    names: Sequence[str]
    folders: Sequence[Path]
    organs: Mapping[str, int]
    cases: Sequence[str]
    summaries: Sequence[Mapping[str, Any]]
    notices: Sequence[str]

    @cached_property
    def metrics(self) -> tuple[str, ...]:
        """Measured ones."""
        surface = self.summaries[0]["settings"]["surface"]
        return tuple(HIGHER_IS_BETTER) if surface else ("Dice",)

    def scores(self, number: int, metric: str) -> Floats:
        """(N, K) of a folder; NaN where the reference lacks the organ or nobody annotated it.

        Whether a score counts depends on the reference alone, so that scores are always pairs.
        """
        rows = {row["case"]: row["metrics"] for row in self.summaries[number]["metric_per_case"]}
        found = np.full((len(self.cases), len(self.organs)), np.nan)
        for n, case in enumerate(self.cases):
            for k, label in enumerate(self.organs.values()):
                values = rows[case][str(label)]
                if known(values["n_ref"]):
                    found[n, k] = values[metric]
        return found

    @cached_property
    def results(self) -> dict[str, list[dict[str, Paired]]]:
        """Metric -> for each other folder: organ, or `mean`, -> the paired result."""
        rows = [*self.organs, OVER_ORGANS]
        return {
            metric: [
                dict(zip(rows, paired(self.scores(0, metric), self.scores(n, metric)), strict=True))
                for n in range(1, len(self.names))
            ]
            for metric in self.metrics
        }

    def adjusted(self, metric: str) -> list[dict[str, float | None]]:
        """p after Holm's correction; the family is all tests of one metric: organs, their mean,
        and folders."""
        found = self.results[metric]
        flat = iter(holm([result.p for row in found for result in row.values()]))
        return [{organ: next(flat) for organ in row} for row in found]

    def losses(self, number: int, most: int = 5) -> list[dict[str, Any]]:
        """`case` and `organ` in which the first folder lost most Dice against another, and both;
        fewer if it lost less often."""
        first, other = self.scores(0, "Dice"), self.scores(number, "Dice")
        apart = np.nan_to_num(first - other, nan=0.0)
        organs = list(self.organs)
        worst = np.argsort(apart, axis=None, kind="stable")[:most]
        places = [np.unravel_index(place, apart.shape) for place in worst]
        return [
            {"case": self.cases[n], "organ": organs[k], "first": float(first[n, k]),
             "other": float(other[n, k])}
            for n, k in places
            if apart[n, k] < 0
        ]  # fmt: skip


def side_by_side(
    config: EvaluateConfig,
    registry: Registry,
    predictions: Path,
    others: Sequence[Path],
    *,
    log: Log,
) -> SideBySide:
    """Holds a folder that has just been evaluated against others.

    Args:
        others: folders of predictions, or of runs whose predictions are in `WORK/predictions`.

    Raises:
        ConfigError: the folders were judged by other settings or references, or share no case.
    """
    folders = [predictions, *map(predictions_of, others)]
    if len({folder.resolve() for folder in folders}) < len(folders):
        raise ConfigError(
            "a folder cannot be compared with itself.", where="--against", fix="Name another one."
        )
    first = _read(predictions)
    assert first is not None
    summaries = [first]
    for folder in folders[1:]:
        if why := _outdated(folder, first):
            log.info(f"{folder}: {why}; it is evaluated now")
            evaluate.run(config, registry, folder, log=log, table=False)
        found = _read(folder)
        assert found is not None
        summaries.append(found)
    names = [folder.resolve().name for folder in folders]
    if len(set(names)) < len(names):
        names = [str(folder) for folder in folders]
    scored = [[row["case"] for row in summary["metric_per_case"]] for summary in summaries]
    common = set(scored[0]).intersection(*scored[1:])
    cases = [case for case in scored[0] if case in common]
    if not cases:
        counts = ", ".join(f"{name} {len(own)}" for name, own in zip(names, scored, strict=True))
        raise ConfigError(
            f"no case was scored in all folders ({counts}).",
            where="--against",
            fix="Predict the same cases; `splits` of the settings says which are scored.",
        )
    notices = [
        f"{folder} could not be scored in {listed(list(summary['failed']))}."
        for folder, summary in zip(folders[1:], summaries[1:], strict=True)
        if summary["failed"]
    ]
    for name, own in zip(names, scored, strict=True):
        if extra := [case for case in own if case not in common]:
            notices.append(
                f"left out, since not scored in all folders, of {name}: {listed(extra)}."
            )
    notices += [
        f"{name}: {text}"
        for name, summary in zip(names, summaries, strict=True)
        for text in summary.get("warnings", [])
    ]
    for notice in notices:
        log.warn(notice)
    return SideBySide(names, folders, first["organs"], cases, summaries, notices)


def predictions_of(path: Path) -> Path:
    """A folder of predictions as it is; of a run in WORK/students, that of its predictions.

    Raises:
        ConfigError: there is no such folder, or nothing has been predicted with the run.
    """
    if not path.is_dir():
        raise ConfigError("there is no such folder.", where=path, fix="Check the path.")
    student = path / "student.pt"
    if not student.exists():
        return path
    parts = path.resolve().parts
    at = len(parts) - 1 - parts[::-1].index("students") if "students" in parts else len(parts) - 2
    found = Path(*parts[:at]) / "predictions" / Path(*parts[at + 1 :])
    if not found.is_dir():
        raise ConfigError(
            f"it is a run, and {found} is not there.",
            where=path,
            fix=f"`pipeline predict {student} -r data_registry.yaml -o {found}`, then this again.",
        )
    return found


def _check_settings(path: Path, summary: Mapping[str, Any], first: Mapping[str, Any]) -> None:
    ours, theirs = first["settings"], summary.get("settings")
    if theirs is None:
        raise ConfigError(
            "it was not written by this `pipeline evaluate`, so its settings are unknown.",
            where=path,
            fix="Move it away to have the folder evaluated here.",
        )
    differing = [key for key in ours if ours[key] != theirs.get(key)]
    if differing:
        said = ", ".join(
            "label values of the datasets"
            if key == "label_values"
            else f"{key} {theirs.get(key)} instead of {ours[key]}"
            for key in differing
        )
        raise ConfigError(
            f"it was evaluated with other settings: {said}.",
            where=path,
            fix="Evaluate both folders with the same registry and settings.",
        )


def _outdated(folder: Path, first: Mapping[str, Any]) -> str:
    """Why a folder has to be evaluated now; empty if its summary is of what is there."""
    summary = _read(folder)
    if summary is None:
        return "it has no summary.json yet"
    _check_settings(folder / "summary.json", summary, first)
    return outdated(summary, folder, {row["case"]: row for row in first["metric_per_case"]})


def _read(folder: Path) -> Mapping[str, Any] | None:
    path = folder / "summary.json"
    try:
        found: Mapping[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"cannot be read ({error}).", where=path, fix="Remove it to evaluate anew."
        ) from error
    return found


# Folders side by side: as tables for people, `against.json` and `against.csv`.

FORMAT_VERSION = 1
_CSV_BEGIN = "metric,case,organ"
_UNITS = {"HD95_mm": "HD95, mm (lower is better)"}


def check_place(folder: Path) -> None:
    """Before anything is computed: that both files may be written."""
    table, scores = folder / "against.json", folder / "against.csv"
    ours = {
        table: json_with(table, "first", "against") is not None,
        scores: contains(scores, _CSV_BEGIN),
    }
    refuse_foreign("evaluate --against", ours.items(), fix="Move away what is there.")


def write_side_by_side(found: SideBySide, folder: Path) -> list[Path]:
    """Writes `against.json`, all results, and `against.csv`, the scores that they are of."""
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
        "bootstrap": bootstrap("cases, with replacement", seeds=False),
        "test": {
            "name": "Wilcoxon signed-rank, two-sided, equal scores left out",
            "min_differing_cases": MIN_PAIRS,
            "correction": "Holm, over all organs, their mean and all folders of one metric",
        },
        "against": {
            name: {
                "metrics": {metric: _rows(found, metric, n) for metric in found.metrics},
                "largest_losses_of_dice": found.losses(n + 1),
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
    cases = counted(len(found.cases), "case")
    for n, name in enumerate(found.names[1:]):
        for metric in found.metrics:
            title = f"{_UNITS.get(metric, metric)}: {first} against {name}, {cases}"
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
            [one["case"], one["organ"], number(one["first"]), number(one["other"]),
             f"{one['first'] - one['other']:+.3f}"]
            for one in found.losses(n + 1)
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


def _rows(found: SideBySide, metric: str, other: int) -> dict[str, Any]:
    adjusted = found.adjusted(metric)[other]
    return {
        organ: {
            "first": result.first, "other": result.other,
            "difference": result.difference.mean,
            "low": result.difference.low, "high": result.difference.high,
            "num_cases": result.num_cases,
            "higher": result.higher, "equal": result.equal, "lower": result.lower,
            "p": result.p, "p_holm": adjusted[organ],
            "notes": [note for note in (result.difference.note, result.note) if note],
        }
        for organ, result in found.results[metric][other].items()
    }  # fmt: skip


def _cells(organ: str, result: Paired, adjusted: float | None, metric: str) -> list[str]:
    digits = 1 if metric in _UNITS else 3
    better, worse = result.higher, result.lower
    if not HIGHER_IS_BETTER[metric]:
        better, worse = worse, better
    return [
        organ,
        str(result.num_cases),
        *(number(mean, f".{digits}f") for mean in (result.first, result.other)),
        result.difference.in_words(digits),
        f"{better} / {result.equal} / {worse}",
        *(number(p, ".2g") for p in (result.p, adjusted)),
    ]
