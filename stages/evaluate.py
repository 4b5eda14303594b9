"""Predictions against references on the images' own grids: Dice, NSD, HD95 per case and organ."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import stdev
from typing import Any

from pydantic import Field

from pipeline.cache.cases import GEOMETRY_TOLERANCE_MM, organ_labels
from pipeline.cache.store import json_text, prepare_work_folder
from pipeline.config import Config, digest, file_sha256, sha256_if_there
from pipeline.data.entries import CaseFiles
from pipeline.data.files import is_absent
from pipeline.data.nifti import read_label
from pipeline.data.registry import Registry
from pipeline.data.volume import Grid
from pipeline.errors import ConfigError, GeometryError, PipelineError, WorkFolderError, listed
from pipeline.folder import contains, json_with, refuse_foreign, replace_files, writing
from pipeline.log import Log, number, print_table
from pipeline.review.metrics import (
    ABSENT,
    CSV_HEADER,
    NOT_ANNOTATED,
    OrganScore,
    organ_means,
    overall_means,
    score_case,
    summarise,
    to_csv,
)
from pipeline.review.predictions import (
    SUFFIXES,
    ReadAs,
    json_beside,
    predicted_labels,
    prediction_file,
)
from stages.report import StageReport

_METRICS = ("Dice", "NSD", "HD95_mm")
_OVER_ORGANS = "mean"  # in `folds` and `std_over_folds`, beside the organs
_NAMED = 5
_MOVE_AWAY = "Move away what is there, or copy the predictions to a folder of their own."


class EvaluateConfig(Config):
    """How predictions are judged; see evaluate.yaml."""

    splits: tuple[str, ...] = Field(default=("test",), description="whose cases are scored")
    folds: bool = Field(
        default=False, description="instead of `splits`: the cases of all folds, held out once each"
    )
    tolerance_mm: float = Field(
        default=3.0, gt=0, description="of the normalised surface Dice (NSD)"
    )
    surface: bool = Field(default=True, description="whether NSD and HD95 are measured")


@dataclass(frozen=True)
class _Scored:
    """Scores of a case, the files that they are of, who predicted it, how it was read, and what was
    done to the values of both."""

    scores: tuple[OrganScore, ...]
    files: dict[str, str | None]
    maker: str
    read_as: ReadAs
    notes: list[str]


def settings_of(config: EvaluateConfig, registry: Registry) -> dict[str, Any]:
    """What two summaries must have in common for their numbers to be comparable."""
    meanings = {
        name: [entry.annotated, entry.ignore_values, entry.background_values]
        for name, entry in registry.datasets.items()
    }
    return {
        "tolerance_mm": config.tolerance_mm,
        "surface": config.surface,
        "organs": dict(registry.label_space.ids),
        "label_values": digest(meanings),
    }


def run(
    config: EvaluateConfig,
    registry: Registry,
    predictions: Path,
    *,
    log: Log,
    table: bool = True,
    dry_run: bool = False,
) -> StageReport:
    """Scores `predictions/<dataset>/<case>.nii.gz`, or `.nii`; writes `summary.json` and
    `scores.csv` there.

    A case without a prediction is a failed unit, not a silent gap. An organ that a dataset does not
    annotate is NaN in its cases and counted as missing. `pipeline.review.metrics` says what is in
    them.

    Args:
        registry: read with its files: it says where references are.

    Raises:
        ConfigError: the registry has no case in these splits, there is no such folder, its label
            maps lie where no case is looked for, or files of other programs are in the way.
        WorkFolderError: the folder cannot be written.
    """
    began = time.monotonic()
    report = StageReport("evaluate")
    cases = _cases(config, registry)
    _check_folder(predictions, cases)
    written = [predictions / name for name in ("summary.json", "scores.csv")]
    ours = json_with(written[0], "settings", "metric_per_case"), contains(written[1], CSV_HEADER)
    refuse_foreign("evaluate", zip(written, map(bool, ours), strict=True), fix=_MOVE_AWAY)
    for note in registry.empty_splits(() if config.folds else config.splits):
        log.remark(note)
    if config.folds and (note := registry.teachers_know()):
        log.remark(note)
    if dry_run:
        report.done = [case.name for case in cases]
        return report
    prepare_work_folder(predictions)
    scored = _score_all(config, registry, predictions, cases, report, log)
    _say_organs({name: case.read_as for name, case in scored.items()}, log)
    folds = {case.name: case.fold for case in cases if config.folds and case.name in scored}
    summary = _summary(config, registry, scored, folds)
    if mixed := _mixed({name: case.maker for name, case in scored.items()}, folds):
        summary["warnings"] = report.warnings[written[0].name] = [mixed]
    summary["failed"] = {name: str(error) for name, error in report.failed.items()}
    try:
        texts = json_text(summary), to_csv(summary)
        with writing(written[0]):
            replace_files({path: text.encode() for path, text in zip(written, texts, strict=True)})
    except WorkFolderError as error:
        report.failed[written[0].name] = error
        log.warn(str(error))
    report.details = {"mean": organ_means(summary), "foreground_mean": overall_means(summary)}
    report.seconds = time.monotonic() - began
    if table:
        print_summary(summary, title=f"{predictions}, tolerance {config.tolerance_mm} mm")
    if mixed:
        log.warn(mixed)
    return report


def _cases(config: EvaluateConfig, registry: Registry) -> list[CaseFiles]:
    """Those of the splits, or of all folds."""
    known = [case for dataset in registry.datasets for case in registry.cases(dataset)]
    cases = [c for c in known if (c.fold is not None if config.folds else c.split in config.splits)]
    if config.folds and not cases:
        raise ConfigError(
            "its cases are in no folds.",
            where=registry.path,
            fix="Write `split: {folds: 5}` for its datasets, or leave out --folds.",
        )
    if not cases:
        empty = "".join(f"; {note}" for note in registry.empty_splits(config.splits))
        raise ConfigError(
            f"no case is in {' or '.join(config.splits)}.",
            where=registry.path,
            fix=f"Set `split` in the registry, or `splits` in evaluate.yaml{empty or '.'}",
        )
    return cases


def _score_all(
    config: EvaluateConfig,
    registry: Registry,
    predictions: Path,
    cases: Sequence[CaseFiles],
    report: StageReport,
    log: Log,
) -> dict[str, _Scored]:
    """What could be scored; the rest is told and stands in the report."""
    scored: dict[str, _Scored] = {}
    with log.progress("evaluate", len(cases)) as advance:
        for case in cases:
            try:
                found = scored[case.name] = _score(config, registry, predictions, case)
                report.done.append(case.name)
                each = [s for s in found.scores if not math.isnan(s.dice)]
                told = ", ".join(f"{s.organ} Dice {s.dice:.3f}" for s in each) or "no organ"
                log.detail(f"{case.name}: {told}")
                if found.notes:
                    report.warnings[case.name] = found.notes
                    log.warn(f"{case.name}: {' '.join(found.notes)}")
            except PipelineError as error:
                report.failed[case.name] = error
                log.warn(f"{case.name} failed: {error}")
            advance(case.name)
    return scored


def _summary(
    config: EvaluateConfig,
    registry: Registry,
    scored: Mapping[str, _Scored],
    folds: Mapping[str, int | None],
) -> dict[str, Any]:
    """summary.json, but for warnings and failures."""
    found = {name: case.scores for name, case in scored.items()}
    summary = summarise(found, registry.label_space.ids)
    for row in summary["metric_per_case"]:
        row |= scored[row["case"]].files
    summary["settings"] = settings_of(config, registry)
    if folds:
        summary |= fold_summary(found, folds, registry.label_space.ids)
    return summary


def fold_summary(
    found: Mapping[str, Sequence[OrganScore]],
    folds: Mapping[str, int | None],
    ids: Mapping[str, int],
) -> dict[str, Any]:
    """`folds`: fold -> its `cases` and their means; `std_over_folds`: organ, or `mean` over organs,
    -> metric -> standard deviation of the folds' means (divided by their number - 1), None for one.
    """
    told: dict[str, Any] = {}
    for fold in sorted({k for k in folds.values() if k is not None}):
        own = {name: scores for name, scores in found.items() if folds[name] == fold}
        one = summarise(own, ids)
        means = {**organ_means(one), _OVER_ORGANS: overall_means(one)}
        told[str(fold)] = {"cases": list(own), "mean": means}
    spread: dict[str, dict[str, float | None]] = {}
    for organ in (*ids, _OVER_ORGANS):
        for metric in _METRICS:
            values = [v for f in told.values() if (v := f["mean"][organ][metric]) is not None]
            std = stdev(values) if len(values) > 1 else None
            spread.setdefault(organ, {})[metric] = std
    return {"folds": told, "std_over_folds": spread}


def print_summary(summary: dict[str, Any], *, title: str) -> None:
    """The means, per organ and over organs."""
    spread = summary.get("std_over_folds", {})
    rows = [
        [organ, *(_number(means[m], m, spread.get(organ)) for m in _METRICS),
         str(means["num_cases"]), str(means["num_missing"])]
        for organ, means in organ_means(summary).items()
    ]  # fmt: skip
    overall = overall_means(summary)
    last = spread.get(_OVER_ORGANS)
    rows.append(["mean over organs", *(_number(overall[m], m, last) for m in _METRICS), "", ""])
    if spread:
        title += f"; {len(summary['folds'])} folds, ± std of their means"
    print_table(title, ["organ", "Dice", "NSD", "HD95 mm", "cases", "without"], rows)
    spurious = [
        f"{row['case']} ({organ})"
        for row in summary["metric_per_case"]
        for organ, label in summary["organs"].items()
        if row["reasons"].get(str(label)) == ABSENT and row["metrics"][str(label)]["n_pred"]
    ]
    if spurious:
        print(  # noqa: T201
            f"Predicted although the reference lacks it; Dice 0, as nnU-Net counts it: "
            f"{listed(spurious, _NAMED)}."
        )


def _score(
    config: EvaluateConfig, registry: Registry, predictions: Path, case: CaseFiles
) -> _Scored:
    entry = registry.datasets[case.dataset]
    path = prediction_file(predictions, case.name)
    if is_absent(path):
        raise GeometryError(
            "there is no prediction.", where=f"{case.name}, {path}", fix="Run `pipeline predict`."
        )
    where = f"{case.name}, {path}"
    beside = json_beside(path)
    said = json_with(beside) or {}
    if config.folds and said.get("trained_on"):
        raise GeometryError(
            "the student that predicted it was trained on it.",
            where=where,
            fix=f"Predict it with the student of its fold: `pipeline predict --fold {case.fold}`.",
        )
    image_sha256, notes = _checked_image(said, case, where)
    predicted, reference = read_label(path), read_label(case.label)
    _check_grid(reference.volume.grid, predicted.volume.grid, where)
    labels, read_as = predicted_labels(predicted, registry.organs, entry.annotated, where=where)
    ids = {organ: registry.organs[organ] for organ in entry.annotated}
    truth = organ_labels(registry, case, reference)
    found = score_case(
        labels, truth, ids, reference.volume.grid,
        tolerance_mm=config.tolerance_mm, surface=config.surface,
    )  # fmt: skip
    by_organ = {score.organ: score for score in found}
    scores = tuple(
        by_organ.get(organ) or OrganScore.missing(organ, NOT_ANNOTATED)
        for organ in registry.label_space.organs
    )
    files = {
        "reference_file": str(case.label),
        "prediction_file": str(path),
        "reference_sha256": reference.sha256,
        "prediction_sha256": predicted.sha256,
        "prediction_json_sha256": sha256_if_there(beside),
    }
    if "student_sha256" in said:
        files["student_sha256"] = str(said["student_sha256"])
    if image_sha256:
        files["image_sha256"] = image_sha256
    notes += [f"{one.path}: {one.note}" for one in (reference, predicted) if one.note]
    return _Scored(scores, files, _maker(said), read_as, notes)


def _checked_image(
    said: Mapping[str, Any], case: CaseFiles, where: str
) -> tuple[str | None, list[str]]:
    """SHA-256 of the case's image where the JSON names the one that was predicted, and notes."""
    known = said.get("image_sha256")
    if known is None:
        return None, []
    try:
        now = file_sha256(case.image)
    except OSError as error:
        unread = f"{case.image} cannot be read ({error.strerror or error})"
        return None, [f"nobody knows whether the prediction is of this image: {unread}."]
    if now != known:
        raise GeometryError(
            f"it was predicted from another image: the SHA-256 of that one begins with "
            f"{str(known)[:12]}, that of {case.image} with {now[:12]}.",
            where=where,
            fix="Predict the case again.",
        )
    return now, []


def _maker(said: Mapping[str, Any]) -> str:
    """Who predicted a case, in words."""
    if "student_sha256" not in said:
        return "a student that no JSON names"
    settings = said.get("settings", {})
    how = ", ".join(f"{key} {value}" for key, value in settings.items())
    return f"the student whose SHA-256 begins with {str(said['student_sha256'])[:12]} ({how})"


def _mixed(makers: Mapping[str, str], folds: Mapping[str, int | None]) -> str:
    """A sentence where cases, in folds those of one, were predicted by several students or
    settings; else empty."""
    groups: dict[str, list[str]] = {}
    for name, maker in makers.items():
        groups.setdefault(maker, []).append(name)
    if len(groups) <= max(1, len(set(folds.values()))):
        return ""
    each = "; ".join(f"{len(n)} by {maker}: {listed(n)}" for maker, n in groups.items())
    return (
        f"the scores are of predictions by several students or settings, and so are their means: "
        f"{each}. Predict all cases with one, unless this is meant."
    )


def _check_folder(predictions: Path, cases: Sequence[CaseFiles]) -> None:
    if not predictions.is_dir():
        what = "it is a file, not a folder." if predictions.exists() else "there is no such folder."
        raise ConfigError(
            what,
            where=predictions,
            fix="Name the folder that `pipeline predict --registry` filled.",
        )
    if any((predictions / f"{case.name}{s}").exists() for case in cases for s in SUFFIXES):
        return
    loose = sorted(f.name for f in predictions.iterdir() if f.name.endswith(SUFFIXES))
    if not loose:
        return
    if predictions.resolve().name in {case.dataset for case in cases}:
        fix = f"Name the folder above, {predictions.resolve().parent}."
    else:
        datasets = {c.dataset for c in cases if {f"{c.case}{s}" for s in SUFFIXES} & {*loose}}
        into = predictions / (datasets.pop() if len(datasets) == 1 else "<dataset>")
        fix = f"Move them to {into}, with the JSON beside each, or predict with --registry."
    raise ConfigError(
        f"label maps lie in the folder itself ({len(loose)}, such as {loose[0]}), but they are "
        f"looked for as <dataset>/<case>.nii.gz, such as {cases[0].name}.nii.gz.",
        where=predictions,
        fix=fix,
    )


def _say_organs(found: Mapping[str, ReadAs], log: Log) -> None:
    """Once for all cases."""
    mapped = [name for name, read_as in found.items() if read_as.mapped]
    if mapped:
        log.warn(
            f"ids of the predictions differ from the registry's; mapped by name "
            f"({len(mapped)} of {len(found)} cases, such as {mapped[0]})"
        )
    others = {organ for read_as in found.values() for organ in read_as.others}
    if others:
        log.warn(
            f"organs of the predictions that the registry does not have count as background: "
            f"{', '.join(sorted(others))}"
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


def _number(value: float | None, metric: str, spread: Mapping[str, Any] | None = None) -> str:
    digits = ".1f" if metric == "HD95_mm" else ".3f"
    std = spread[metric] if spread else None
    return number(value, digits) + ("" if std is None else f" ± {number(std, digits)}")
