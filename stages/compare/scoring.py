"""What a finished student is worth: whole cases of the cache against their labels."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from pipeline.cache.reader import CachedCase
from pipeline.cache.store import write_json
from pipeline.config import digest
from pipeline.consensus.cohort import open_cohort
from pipeline.data.labels import IGNORE, LabelSpace
from pipeline.errors import CacheMissing, CheckpointError, ConfigError
from pipeline.folder import Folder, matching, read_text
from pipeline.log import Advance
from pipeline.review.metrics import RULES, OrganScore, score_case, score_json
from pipeline.student.checkpoint import load_student
from pipeline.student.inference import StudentWindows, running_argmax
from pipeline.student.inputs import swallowed_organs
from stages.report import Scope


@dataclass(frozen=True)
class ScoringSettings:
    """How students are scored: by the same windows and rules as `predict` and `evaluate`.

    Attributes:
        split: of the cases.
        surface: whether NSD and HD95 are measured, the slower part.
        tolerance_mm: of NSD.
        overlap: of the windows.
    """

    split: str
    surface: bool = True
    tolerance_mm: float = 3.0
    overlap: float = 0.5


@dataclass(frozen=True)
class RunResult:
    """One configuration with one seed.

    Attributes:
        config: its name.
        seed: of the training.
        fold: that was held out, if there are any.
        folder: of the run.
        rows: one per case and annotated organ: `case`, `organ`, `Dice`, `NSD`, `HD95_mm`, ...;
            none if the run failed.
        seconds_per_step: median, as this machine trained it; None if it was not seen.
        error: why it failed; None if it is finished.
    """

    config: str
    seed: int
    fold: int | None
    folder: Folder
    rows: Sequence[Mapping[str, Any]]
    seconds_per_step: float | None
    error: str | None


def cases_to_score(
    scope: Scope, split: str, *, allow_missing: bool
) -> tuple[Sequence[CachedCase], list[str]]:
    """And what a reader of the table has to know of cases that are left out.

    Raises:
        CacheMissing: the cache lacks some, which is not allowed.
        ConfigError: there is none.
    """
    registry, work = scope.registry, scope.work
    cohort = open_cohort(work, registry, splits=(split,))
    if cohort.problems and not allow_missing:
        first, error = next(iter(cohort.problems.items()))
        raise CacheMissing(
            f"{len(cohort.problems)} {split} cases are not in the cache, {first} among them. "
            f"{error}",
            where=work,
            fix="Run `pipeline cache-teachers`, or give --allow-missing.",
        )
    if not cohort.cases or not any(case.annotated for case in cohort.cases):
        raise ConfigError(
            f"there is no {split} case to compare on.",
            where=registry.path,
            fix="Set `split` in the registry and run `pipeline cache-teachers`.",
        )
    if not cohort.problems:
        return cohort.cases, []
    notice = f"{split} cases that are left out, as the cache lacks them: "
    notice += f"{', '.join(cohort.problems)}."
    scope.log.warn(notice)
    return cohort.cases, [notice]


def score_student(
    folder: Folder,
    cases: Sequence[CachedCase],
    settings: ScoringSettings,
    *,
    device: torch.device,
    window_batch: int = 1,
    advance: Advance,
) -> list[dict[str, Any]]:
    """Scores of a finished run, read back if they are of this very student and these cases.

    Args:
        folder: of the run; `scores_<split>.json` is written there.
        cases: labelled; each is judged on the organs that it annotates.
        settings: see there.
        device: where to predict.
        window_batch: windows per forward pass.
        advance: hears of every case.

    Returns:
        One row per case and annotated organ: `case`, `organ`, and what `metrics.score_json` gives.

    Raises:
        CheckpointError: the run is not finished, or its student cannot be read.
    """
    key = _key(folder, cases, settings)
    path = folder / f"scores_{settings.split}.json"
    kept = _kept(path, key)
    if kept is not None:
        advance(folder.name, len(cases))
        return kept
    record, network = load_student(folder / "student.pt")
    windows = StudentWindows(
        network.to(device), record.intensity, record.patch, device, settings.overlap, window_batch
    )
    rows: list[dict[str, Any]] = []
    for case in cases:
        space = record.label_space
        predicted = space.to_ids(running_argmax(iter(windows.logits(case.image()))))
        ids = {o: i for o, i in space.ids.items() if o in case.annotated}
        scores = score_case(
            predicted,
            case.label(),
            ids,
            case.grid,
            tolerance_mm=settings.tolerance_mm,
            ignore_value=IGNORE,
            surface=settings.surface,
        )
        rows += _rows(case.name, scores)
        advance(f"{folder.name}: {case.name}")
    write_json(path, {"key": key, "rules": RULES, "rows": rows})
    return rows


def scored_before(comparison: Folder, split: str) -> list[str]:
    """Runs of a comparison that were ever scored on a split."""
    return [path.parent.name for path in matching(comparison, f"*/scores_{split}.json")]


def organs_without_cases(cases: Sequence[CachedCase], space: LabelSpace) -> list[str]:
    """Organs that no case annotates."""
    annotated = {organ for case in cases for organ in case.annotated}
    return [organ for organ in space.organs if organ not in annotated]


def _rows(case: str, scores: Sequence[OrganScore]) -> list[dict[str, Any]]:
    return [{"case": case, "organ": score.organ, **score_json(score)} for score in scores]


def _key(folder: Folder, cases: Sequence[CachedCase], settings: ScoringSettings) -> str:
    try:
        run = json.loads(read_text(folder / "finished.json"))["run_digest"]
    except (OSError, ValueError, KeyError) as error:
        raise CheckpointError(
            "the run is not finished.",
            where=folder,
            fix="Run `pipeline compare` again: it goes on with it.",
        ) from error
    return digest(
        {
            "run": run,
            "cases": {case.name: case.case.receipt.digest for case in cases},
            "settings": vars(settings),
            "rules": RULES,
            **swallowed_organs(cases),
        }
    )


def _kept(path: Folder, key: str) -> list[dict[str, Any]] | None:
    try:
        content: Mapping[str, Any] = json.loads(read_text(path))
        rows: list[dict[str, Any]] = content["rows"]
        return rows if content["key"] == key else None
    except (OSError, ValueError, KeyError, TypeError):
        return None
