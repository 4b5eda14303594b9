"""Predictions against references on the images' own grids: Dice, NSD, HD95 per case and organ."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from pydantic import Field

from pipeline.cache.store import prepare_work_folder, write_json
from pipeline.case_checks import GEOMETRY_TOLERANCE_MM, organ_labels
from pipeline.config import Config
from pipeline.data.files import CaseFiles
from pipeline.data.nifti import read_label
from pipeline.data.registry import Registry
from pipeline.errors import ConfigError, GeometryError, PipelineError
from pipeline.log import Log, print_table
from pipeline.metrics import NOT_ANNOTATED, OrganScore, score_case, summarise
from pipeline.volume import Grid
from stages.report import StageReport

_METRICS = ("Dice", "NSD", "HD95_mm")


class EvaluateConfig(Config):
    """How predictions are judged; see evaluate.yaml."""

    splits: tuple[str, ...] = Field(default=("test",), description="whose cases are scored")
    tolerance_mm: float = Field(
        default=3.0, gt=0, description="of the normalised surface Dice (NSD)"
    )
    surface: bool = Field(default=True, description="whether NSD and HD95 are measured")


def run(
    config: EvaluateConfig,
    registry: Registry,
    predictions: Path,
    *,
    log: Log,
    table: bool = True,
    dry_run: bool = False,
) -> StageReport:
    """Scores `predictions/<dataset>/<case>.nii.gz` and writes `predictions/summary.json`.

    A case without a prediction is a failed unit, not a silent gap. An organ that a dataset does not
    annotate is NaN in its cases and counted as missing.

    Args:
        config: tolerance and splits.
        registry: read with its files: it says where references are.
        predictions: folder that `pipeline predict` filled.
        log: where progress goes.
        table: also print it.
        dry_run: say what would be done, write nothing.

    Raises:
        ConfigError: the registry has no case in these splits.
        WorkFolderError: the folder cannot be written.
    """
    began = time.monotonic()
    report = StageReport("evaluate")
    cases = [c for d in registry.datasets for c in registry.cases(d) if c.split in config.splits]
    if not cases:
        raise ConfigError(
            f"no case is in {' or '.join(config.splits)}.",
            where=registry.path,
            fix="Set `split` in the registry, or `splits` in evaluate.yaml.",
        )
    if dry_run:
        report.done = [case.name for case in cases]
        return report
    prepare_work_folder(predictions)
    scores: dict[str, tuple[OrganScore, ...]] = {}
    with log.progress("evaluate", len(cases)) as advance:
        for case in cases:
            try:
                scores[case.name] = _score(config, registry, predictions, case)
                report.done.append(case.name)
            except PipelineError as error:
                report.failed[case.name] = error
                log.warn(f"{case.name} failed: {error}")
            advance(case.name)
    summary = {
        "tolerance_mm": config.tolerance_mm,
        "failed": {name: str(error) for name, error in report.failed.items()},
        **summarise(scores),
    }
    write_json(predictions / "summary.json", summary)
    report.details = {"mean": summary["mean"], "foreground_mean": summary["foreground_mean"]}
    report.seconds = time.monotonic() - began
    if table:
        print_summary(summary, title=f"{predictions}, tolerance {config.tolerance_mm} mm")
    return report


def print_summary(summary: dict[str, Any], *, title: str) -> None:
    """The means, per organ and over organs."""
    rows = [
        [
            organ,
            *(_number(means[m], m) for m in _METRICS),
            str(means["num_cases"]),
            str(means["num_missing"]),
        ]
        for organ, means in summary["mean"].items()
    ]
    overall = summary["foreground_mean"]
    rows.append(["mean over organs", *(_number(overall[m], m) for m in _METRICS), "", ""])
    print_table(title, ["organ", "Dice", "NSD", "HD95 mm", "cases", "without"], rows)


def _score(
    config: EvaluateConfig, registry: Registry, predictions: Path, case: CaseFiles
) -> tuple[OrganScore, ...]:
    entry = registry.datasets[case.dataset]
    path = predictions / case.dataset / f"{case.case}.nii.gz"
    if not path.exists():
        raise GeometryError(
            "there is no prediction.", where=f"{case.name}, {path}", fix="Run `pipeline predict`."
        )
    predicted, reference = read_label(path), read_label(case.label)
    _check_grid(reference.volume.grid, predicted.volume.grid, f"{case.name}, {path}")
    ids = {organ: registry.organs[organ] for organ in entry.annotated}
    truth = organ_labels(registry, case, reference)
    found = score_case(
        predicted.volume.array,
        truth,
        ids,
        reference.volume.spacing_mm,
        tolerance_mm=config.tolerance_mm,
        surface=config.surface,
    )
    by_organ = {score.organ: score for score in found}
    return tuple(
        by_organ.get(organ) or OrganScore.missing(organ, NOT_ANNOTATED)
        for organ in registry.label_space.organs
    )


def _check_grid(reference: Grid, predicted: Grid, where: str) -> None:
    fix = "Predict from this case's own image: label maps are written in its geometry."
    if reference.shape != predicted.shape:
        raise GeometryError(
            f"the prediction has shape {predicted.shape} (z, y, x), the reference "
            f"{reference.shape}.",
            where=where,
            fix=fix,
        )
    apart = reference.largest_corner_distance_mm(predicted)
    if apart > GEOMETRY_TOLERANCE_MM:
        raise GeometryError(
            f"the prediction lies up to {apart:.2f} mm away from the reference (tolerance "
            f"{GEOMETRY_TOLERANCE_MM} mm).",
            where=where,
            fix=fix,
        )


def _number(value: float | None, metric: str) -> str:
    if value is None:
        return "–"
    return f"{value:.1f}" if metric == "HD95_mm" else f"{value:.3f}"
