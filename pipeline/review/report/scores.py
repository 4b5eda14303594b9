"""Scores of the student per case and organ: of predictions, of the run's own file, or made here."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import numpy.typing as npt

from pipeline.cache.reader import CachedCase
from pipeline.config import file_sha256, sha256_if_there
from pipeline.data.registry import Registry
from pipeline.errors import CacheError, ConfigError, listed
from pipeline.figures import hex_colour, svg_chart
from pipeline.folder import Folder, json_with
from pipeline.log import Log
from pipeline.networks.by_name import pick_device
from pipeline.review.metrics import NOT_ANNOTATED, RULES, known, outdated, score_case, score_json
from pipeline.review.report.trace import RunRecord
from pipeline.student.checkpoint import load_student, read_record

if TYPE_CHECKING:
    from torch import nn

METRICS = {"Dice": "Dice", "NSD": "Normalised surface Dice", "HD95_mm": "HD95, mm"}
"""Name -> as the page calls it."""
_KEPT = "scores_validation.json"


# One organ of one case: `case`, `organ`, the metrics, None where one was not measured or has no
# meaning, and `reason`: why the Dice is None, or the worst there is.
OrganRow = Mapping[str, Any]


@dataclass(frozen=True)
class ReportScores:
    """Scores, and where they are from.

    Attributes:
        rows: each case and organ that a label speaks of.
        failed: case -> why it has no scores.
        tolerance_mm: of NSD, where it is known.
    """

    rows: Sequence[OrganRow]
    kind: Literal["predictions", "kept", "now"]
    source: str
    failed: Mapping[str, str]
    tolerance_mm: float | None = None
    notes: Sequence[str] = ()

    @property
    def cases(self) -> dict[str, float]:
        """Case -> mean Dice over its organs, the worst first; cases without any are absent."""
        dice: dict[str, list[float]] = {}
        for row in self.rows:
            if row["Dice"] is not None:
                dice.setdefault(row["case"], []).append(row["Dice"])
        means = {case: sum(values) / len(values) for case, values in dice.items()}
        return dict(sorted(means.items(), key=lambda item: (item[1], item[0])))


class Student:
    """A run's student, to predict cases of the cache; its network is built for the first."""

    def __init__(self, path: Folder, device: str) -> None:
        self.record = read_record(path)
        self._path, self._device = path, device

    @cached_property
    def _network(self) -> nn.Module:
        return load_student(self._path)[1].to(pick_device(self._device))

    def label_map(
        self, case: CachedCase, *, overlap: float = 0.5, window_batch: int = 1
    ) -> npt.NDArray[np.uint8]:
        """uint8 organ ids (D, H, W) on the student grid, by the windows that `predict` uses."""
        from pipeline.student.inference import StudentWindows, running_argmax

        record, device = self.record, pick_device(self._device)
        windows = StudentWindows(
            self._network, record.intensity, record.patch, device, overlap, window_batch
        )
        logits = windows.logits(case.image())
        return record.label_space.to_ids(running_argmax(iter(logits)))

    def scores(
        self, case: CachedCase, *, surface: bool, tolerance_mm: float = 3.0, **windows: Any
    ) -> list[dict[str, Any]]:
        """One row per annotated organ: `case`, `organ`, and what `score_json` gives; `windows` as
        in `label_map`."""
        predicted, space = self.label_map(case, **windows), self.record.label_space
        ids = {organ: i for organ, i in space.ids.items() if organ in case.annotated}
        found = score_case(
            predicted, case.label(), ids, case.grid, tolerance_mm=tolerance_mm, surface=surface
        )
        return [{"case": case.name, "organ": one.organ, **score_json(one)} for one in found]


def scores_of_predictions(folder: Path, registry: Registry, record: RunRecord) -> ReportScores:
    """What `pipeline evaluate` wrote beside predictions. References and images that cannot be read
    here are not compared with what was evaluated.

    Raises:
        ConfigError: there is no summary.json that it wrote, or it is of other files than are there.
    """
    path = folder / "summary.json"
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        rows = [
            {"case": str(entry["case"]), "organ": organ, **{m: known(values[m]) for m in METRICS},
             "reason": entry["reasons"].get(str(label), "")}
            for entry in content["metric_per_case"]
            for organ, label in content["organs"].items()
            if (values := entry["metrics"].get(str(label))) is not None
        ]  # fmt: skip
        failed = {str(case): str(why) for case, why in content.get("failed", {}).items()}
        tolerance_mm = content["settings"]["tolerance_mm"]
        why = outdated(content, folder, _files_now(content, registry))
        notes = [*content.get("warnings", []), *_of_others(content, record)]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(
            f"no scores of predictions can be read ({type(error).__name__}: {error}).",
            where=path,
            fix="Run `pipeline evaluate FOLDER` first, or leave --predictions out.",
        ) from error
    if why:
        raise ConfigError(
            f"the scores are out of date: {why}.",
            where=path,
            fix=f"Run `pipeline evaluate {folder}` again.",
        )
    source = f"predictions in {folder}, scored on the images' own grids"
    return ReportScores(_judged(rows), "predictions", source, failed, tolerance_mm, notes)


def _files_now(summary: Mapping[str, Any], registry: Registry) -> dict[str, dict[str, str | None]]:
    """Case -> SHA-256 of its reference, and of its image where the prediction named its own."""
    rows = {row["case"]: row for row in summary["metric_per_case"]}
    cases = [case for d in registry.datasets for case in registry.cases(d) if case.name in rows]
    return {
        case.name: {
            f"{what}_sha256": sha256_if_there(path)
            for what, path in (("reference", case.label), ("image", case.image))
            if f"{what}_sha256" in rows[case.name]
        }
        for case in cases
    }


def _of_others(summary: Mapping[str, Any], record: RunRecord) -> list[str]:
    """Which predictions say that another student than the run's made them."""
    rows = summary["metric_per_case"]
    if record.student is None:
        return []
    own = file_sha256(record.folder / record.student)
    others = [row["case"] for row in rows if row.get("student_sha256", own) != own]
    number = f"{len(others)} of {len(rows)}"
    told = f"{number} predictions are by another student than this run's: {listed(others)}."
    return [told] if others else []


def kept_scores(record: RunRecord) -> ReportScores | None:
    """What `pipeline compare` wrote into the run; None if there is nothing of these very cases, or
    if it was scored by other rules."""
    content = json_with(record.folder / _KEPT, "rules", "rows")
    if content is None or content["rules"] != RULES:
        return None
    rows, fields = content["rows"], {"case", "organ", "reason", *METRICS}
    if not isinstance(rows, list) or not rows:
        return None
    if not all(isinstance(row, dict) and fields <= row.keys() for row in rows):
        return None
    if not {row["case"] for row in rows} <= set(record.validation):
        return None
    source = f"{_KEPT} of this run: validation cases of the cache, on the student grid"
    return ReportScores(_judged(rows), "kept", source, {})


def scores_made_now(student: Student, cases: Sequence[CachedCase], log: Log) -> ReportScores:
    """Predicts cases of the cache and scores them by the rules of `pipeline evaluate`, Dice alone;
    a case that turns out to be damaged is in `failed`."""
    found: list[OrganRow] = []
    failed: dict[str, str] = {}
    with log.progress("predict validation cases", len(cases)) as advance:
        for case in cases:
            try:
                found += student.scores(case, surface=False)
            except CacheError as error:
                failed[case.name] = str(error)
            advance(case.name)
    source = "validation cases of the cache, predicted for this page, on the student grid"
    return ReportScores(_judged(found), "now", source, failed)


def _judged(rows: Sequence[OrganRow]) -> list[OrganRow]:
    """Without organs that no label speaks of: nobody could score them."""
    return [row for row in rows if row["reason"] != NOT_ANNOTATED]


# Metrics per organ over all cases: in numbers, and every case's value in a chart.


@dataclass(frozen=True)
class Spread:
    """One metric of one organ over cases."""

    mean: float
    median: float
    quartiles: tuple[float, float]
    worst: float
    worst_case: str


@dataclass(frozen=True)
class OrganSummary:
    """One organ: metric -> spread, absent where nobody measured it; cases with a Dice."""

    organ: str
    spreads: Mapping[str, Spread]
    num_cases: int


def summarised(organs: Sequence[str], scores: ReportScores) -> list[OrganSummary]:
    """Per organ of the run, in its order; organs without any row are told with no case."""
    found = []
    for organ in organs:
        rows = [row for row in scores.rows if row["organ"] == organ]
        spreads = {m: s for m in METRICS if (s := _spread(rows, m)) is not None}
        found.append(OrganSummary(organ, spreads, sum(row["Dice"] is not None for row in rows)))
    return found


def _spread(rows: Sequence[OrganRow], metric: str) -> Spread | None:
    known = [(v, row["case"]) for row in rows if (v := row[metric]) is not None]
    if not known:
        return None
    low, median, high = (float(q) for q in np.quantile([v for v, _ in known], (0.25, 0.5, 0.75)))
    worst, case = max(known) if metric == "HD95_mm" else min(known)
    mean = sum(v for v, _ in known) / len(known)
    return Spread(mean, median, (low, high), worst, case)


@dataclass(frozen=True)
class Chart:
    """A chart of the page; `alt` tells who cannot see it."""

    key: str
    title: str
    alt: str
    svg: str


def strip_charts(ids: Mapping[str, int], rows: Sequence[OrganRow]) -> list[Chart]:
    """Those of the metrics that were measured; `ids` are organ -> id, from the top."""
    charts = []
    for metric, title in METRICS.items():
        found = {}
        for organ in ids:
            known = [row[metric] for row in rows if row["organ"] == organ]
            values = sorted(value for value in known if value is not None)
            if values:
                found[organ] = values
        if found:
            unit = " mm" if metric == "HD95_mm" else ""
            medians = (f"{o} median {np.median(v):.3g}{unit} of {len(v)}" for o, v in found.items())
            alt = f"{title} of every case: {'; '.join(medians)}."
            svg = _strips(f"{metric.lower()}-strips", found, ids)
            charts.append(Chart(f"{metric.lower()}-strips", title, alt, svg))
    return charts


def _strips(key: str, found: Mapping[str, Sequence[float]], ids: Mapping[str, int]) -> str:
    """A dot per case, a box from the lower to the upper quartile, a bar at the median."""

    def draw(ax: Any) -> None:
        for row, (organ, values) in enumerate(found.items()):
            colour = hex_colour(ids[organ])
            low, median, high = np.quantile(values, (0.25, 0.5, 0.75))
            ax.barh(row, high - low, 0.7, low, color=colour, alpha=0.16, linewidth=0)
            apart = row + (np.arange(len(values)) * 3 % 7 - 3) * 0.09
            ax.plot(values, apart, "o", color=colour, markersize=4, alpha=0.75, markeredgewidth=0)
            ax.plot([median, median], [row - 0.37, row + 0.37], color="#000000", linewidth=2)
        ax.set_yticks(range(len(found)), list(found))
        ax.set_ylim(len(found) - 0.5, -0.5)
        ax.set_xlim(0, max(1.0, *(values[-1] for values in found.values())) * 1.02)
        ax.grid(axis="x", alpha=0.25)
        ax.tick_params(axis="y", length=0)
        ax.spines[["top", "right", "left"]].set_visible(False)

    return svg_chart(key, draw, height=40 * len(found) + 34)
