"""Everything that the page tells, in the order of its sections; the template only lays it out."""

from __future__ import annotations

import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import numpy as np
import yaml

from pipeline.data.registry import Registry
from pipeline.html_report.case_layers import CaseLayers, organ_colours
from pipeline.html_report.charts import LineChart, StripChart, line_chart
from pipeline.html_report.gate import Gate
from pipeline.html_report.lineage import TRAINING, Lineage, TracedTeacher
from pipeline.html_report.record import RunRecord
from pipeline.html_report.regions import Regions
from pipeline.html_report.scores import METRICS, OrganRow, Scores
from pipeline.html_report.sprites import Plane

_PACKAGES = ("organ-distill", "torch", "monai", "numpy", "zarr", "dask")


@dataclass(frozen=True)
class Shown:
    """A case in pictures: why it was chosen, its scores, and its planes or why there are none."""

    name: str
    why: str
    dice: float
    rows: Sequence[OrganRow]
    layers: CaseLayers | None = None
    planes: Sequence[Plane] = ()
    problem: str = ""


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
    """One organ: metric -> spread, absent where nobody measured it; cases with and without."""

    organ: str
    spreads: Mapping[str, Spread]
    num_cases: int
    without: int


@dataclass(frozen=True)
class Stored:
    """What something takes on disk, and what it took to make; None where nobody measured it."""

    what: str
    files: int
    num_bytes: int
    seconds: float | None


@dataclass(frozen=True)
class Content:
    """All that the template is given.

    Attributes:
        record: of the run.
        lineage: cases, units and teachers.
        settings_yaml: the run's settings as YAML.
        registered: teacher -> what the registry says of it beside its numbers.
        gate: verdicts.
        regions: volumes and conflicts.
        curves: charts of the training.
        scores: of the student; None without any.
        no_scores: why there are none.
        summaries: per organ.
        strips: charts of the metrics.
        shown: cases in pictures.
        limits: (slices per plane, pixels of the longest side) of the pictures.
        stored: storage and time.
        versions: of the packages that made the page.
        made_at: when, UTC.
    """

    record: RunRecord
    lineage: Lineage
    settings_yaml: str
    registered: Mapping[str, Mapping[str, str]]
    gate: Gate
    regions: Regions
    curves: Sequence[LineChart]
    scores: Scores | None
    no_scores: str
    summaries: Sequence[OrganSummary]
    strips: Sequence[StripChart]
    shown: Sequence[Shown]
    limits: tuple[int, int]
    stored: Sequence[Stored]
    versions: Mapping[str, str]
    made_at: str

    @property
    def organ_colours(self) -> Mapping[int, str]:
        """Organ id -> its colour in all pictures."""
        return organ_colours(self.record.space)

    @property
    def colour_by_organ(self) -> Mapping[str, str]:
        """The same by the organ's name, for charts."""
        return {organ: self.organ_colours[i] for organ, i in self.record.space.ids.items()}

    @property
    def cache_bytes(self) -> int:
        """Of the cases and units that the run used."""
        return sum(row.num_bytes for row in self.stored if not row.what.startswith("run: "))

    @property
    def seconds(self) -> float:
        """Of all that was measured."""
        return sum(row.seconds or 0.0 for row in self.stored)

    @property
    def mean_dice(self) -> float | None:
        """Mean over organs of their means, as `pipeline evaluate` has it."""
        means = [s.spreads["Dice"].mean for s in self.summaries if "Dice" in s.spreads]
        return sum(means) / len(means) if means else None


def settings_as_yaml(record: RunRecord) -> str:
    """What a configuration file of the same run says under `training`."""
    return yaml.safe_dump(dict(record.settings), sort_keys=False, default_flow_style=None)


def registered_teachers(
    registry: Registry, teachers: Sequence[TracedTeacher]
) -> dict[str, dict[str, str]]:
    """Kind, weights, licence and source of teachers, as far as the registry still has them."""
    found = {}
    for teacher in teachers:
        entry = registry.teachers.get(teacher.name)
        if entry is not None:
            names = ("kind", "weights", "trained_on", "licence", "source")
            found[teacher.name] = {n: str(getattr(entry, n) or "") for n in names}
    return found


def training_charts(record: RunRecord) -> list[LineChart]:
    """Loss, validation Dice, throughput and waiting, as far as they were recorded."""
    if record.training is None:
        return []
    history = record.training.history
    terms = {n: c.points for n, c in sorted(history.terms.items(), key=lambda t: t[0] != "total")}
    waits = [(step, 100 * share) for step, share in history.data_wait.points]
    charts = [
        line_chart("loss", "Training loss, weighted terms", terms, smooth=True),
        line_chart(
            "dice",
            "Validation Dice",
            {organ: curve.points for organ, curve in history.dice.items()},
            top=1.0,
        ),
        line_chart(
            "rate",
            "Throughput",
            {"samples per second": history.samples_per_second.points},
            unit="samples/s",
        ),
        line_chart("wait", "Waiting for data", {"share of the time": waits}, unit="%", top=100),
    ]
    return [chart for chart in charts if chart is not None]


def summarised(organs: Sequence[str], scores: Scores) -> list[OrganSummary]:
    """Per organ of the run, in its order; organs without any row are told with no case."""
    found = []
    cases = {row.case for row in scores.rows}
    for organ in organs:
        rows = [row for row in scores.rows if row.organ == organ]
        spreads = {m: s for m in METRICS if (s := _spread(rows, m)) is not None}
        num = sum(row.dice is not None for row in rows)
        found.append(OrganSummary(organ, spreads, num, len(cases) - num))
    return found


def _spread(rows: Sequence[OrganRow], metric: str) -> Spread | None:
    known = [(v, row.case) for row in rows if (v := row.value(metric)) is not None]
    if not known:
        return None
    low, median, high = (float(q) for q in np.quantile([v for v, _ in known], (0.25, 0.5, 0.75)))
    worst, case = max(known) if metric == "HD95_mm" else min(known)
    mean = sum(v for v, _ in known) / len(known)
    return Spread(mean, median, (low, high), worst, case)


def stored(record: RunRecord, lineage: Lineage) -> list[Stored]:
    """Cases, each teacher's units, and the run's own files."""
    units = [case.case.unit for case in lineage.cases]
    found = [_of_units("cases on the student grid", units)]
    for teacher in lineage.teachers:
        # What no training read is not what this run took.
        own = [case.units[teacher.name].unit for case in lineage.of(TRAINING)]
        found.append(_of_units(f"units of teacher {teacher.name}", own))
    groups: dict[str, list[int]] = {
        "checkpoints": [],
        "students (*.pt)": [],
        "records, curves": [],
    }
    for name, num_bytes in record.files.items():
        kind = "students (*.pt)" if name.endswith(".pt") else "records, curves"
        groups["checkpoints" if name.startswith("checkpoints/") else kind].append(num_bytes)
    found += [Stored(f"run: {what}", len(of), sum(of), None) for what, of in groups.items()]
    if record.training is not None:
        found.append(Stored("run: training steps", 0, 0, record.training.seconds))
        found.append(Stored("run: validations", 0, 0, record.training.validation_seconds))
    return found


def _of_units(what: str, units: Sequence[Any]) -> Stored:
    receipts = [unit.receipt for unit in units if unit is not None]
    seconds = sum(receipt.seconds for receipt in receipts) if receipts else None
    return Stored(what, len(receipts), sum(r.num_bytes for r in receipts), seconds)


def versions_here() -> dict[str, str]:
    """Of the packages on this machine, now."""
    found = {"Python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    return found


def lineage_json(record: RunRecord, lineage: Lineage) -> dict[str, Any]:
    """Full digests, for machines that read the page."""
    return {
        "run": record.run,
        "run_digest": record.digest,
        "teachers": {
            t.name: {
                "digest": t.digest,
                "weights_sha256": None if t.inputs is None else t.inputs.get("weights_sha256"),
            }
            for t in lineage.teachers
        },
        "cases": {
            case.name: {
                "split": case.split,
                "digest": case.digest,
                "inputs": _inputs(case.case.unit, ("image_sha256", "label_sha256")),
                "units": {name: unit.receipt.digest for name, unit in case.usable.items()}
                if case.split == TRAINING
                else {},
            }
            for case in lineage.cases
        },
    }


def _inputs(unit: Any, names: Sequence[str]) -> dict[str, Any] | None:
    return None if unit is None else {name: unit.receipt.inputs.get(name) for name in names}
