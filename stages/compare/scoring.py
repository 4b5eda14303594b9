"""What a finished student is worth: whole cases of the cache against their labels."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pipeline.cache.reader import CachedCase
from pipeline.cache.store import write_json
from pipeline.config import digest
from pipeline.consensus.cohort import open_cohort
from pipeline.data.labels import LabelSpace
from pipeline.errors import CacheMissing, CheckpointError, ConfigError
from pipeline.folder import Folder, json_with, matching
from pipeline.log import Advance
from pipeline.review.metrics import RULES
from pipeline.review.report.scores import Student
from pipeline.student.inputs import swallowed_organs
from stages.report import Scope


@dataclass(frozen=True)
class ScoringSettings:
    """How students are scored: by the same windows and rules as `predict` and `evaluate`.
    `surface`: whether NSD and HD95 are measured, the slower part."""

    split: str
    surface: bool = True
    tolerance_mm: float = 3.0
    overlap: float = 0.5


@dataclass(frozen=True)
class RunResult:
    """One configuration with one seed.

    Attributes:
        rows: see `score_student`; none if the run failed.
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
    """And what a reader of the table has to know of cases that are left out."""
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
    device: str,
    window_batch: int = 1,
    advance: Advance,
) -> list[dict[str, Any]]:
    """Scores of a finished run, read back if they are of this very student and these cases.

    They are kept in `scores_<split>.json` of the run.

    Returns:
        One row per case and annotated organ: `case`, `organ`, and what `metrics.score_json` gives.

    Raises:
        CheckpointError: the run is not finished, or its student cannot be read.
    """
    key = _key(folder, cases, settings)
    path = folder / f"scores_{settings.split}.json"
    kept = json_with(path, "key", "rows")
    if kept is not None and kept["key"] == key:
        advance(folder.name, len(cases))
        return list(kept["rows"])
    student = Student(folder / "student.pt", device)
    rows: list[dict[str, Any]] = []
    for case in cases:
        rows += student.scores(
            case, surface=settings.surface, tolerance_mm=settings.tolerance_mm,
            overlap=settings.overlap, window_batch=window_batch,
        )  # fmt: skip
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


def _key(folder: Folder, cases: Sequence[CachedCase], settings: ScoringSettings) -> str:
    finished = json_with(folder / "finished.json", "run_digest")
    if finished is None:
        raise CheckpointError(
            "the run is not finished.",
            where=folder,
            fix="Run `pipeline compare` again: it goes on with it.",
        )
    return digest(
        {
            "run": finished["run_digest"],
            "cases": {case.name: case.case.receipt.digest for case in cases},
            "settings": vars(settings),
            "rules": RULES,
            **swallowed_organs(cases),
        }
    )
