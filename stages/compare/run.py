"""Trains every configuration with every seed, scores what is finished, and puts it side by side."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch

from pipeline.cache.store import write_json
from pipeline.errors import PipelineError, Stopped
from pipeline.folder import json_with, matching
from pipeline.log import Advance, Log
from pipeline.student.speed import TrainingExecution
from stages import train_student
from stages.compare.budget import StepClock
from stages.compare.plan import Comparison, Run
from stages.compare.results import Results
from stages.compare.scoring import RunResult, ScoringSettings, score_student, scored_before
from stages.report import Scope


def compare(
    plan: Comparison, scope: Scope, execution: TrainingExecution, *, window_batch: int = 1
) -> Results:
    """Makes what a plan lacks and returns all results; a second call trains and scores nothing.

    A run that fails is in the results with its error, and does not stop the others.

    Raises:
        Stopped: a signal ended a training; the same call goes on from there.
        PipelineError: no run at all is finished.
    """
    failed: dict[str, Exception] = {}
    log = scope.log
    left = sum(_steps_left(run) for run in plan.runs)
    with log.progress("steps of all runs", left) as advance:
        for number, run in enumerate(plan.runs, start=1):
            if run.finished:
                continue
            at = f"run {number} of {len(plan.runs)}, {run.folder.name}"
            clock = StepClock(log, _noting(advance, at))
            known = scope.registry if run.fold is None else scope.registry.on_fold(run.fold)
            own = replace(scope, registry=known, log=clock)
            try:
                report = train_student.run(run.config, own, execution)
            except (PipelineError, torch.OutOfMemoryError) as error:
                failed[run.folder.name] = error
                log.warn(f"{run.folder.name} failed, the others go on: {error}")
                continue
            stopped = next(iter(report.failed.values()), None)
            speed = clock.median_seconds()
            if stopped is None and speed is not None:
                write_json(run.folder / "speed.json", {"seconds_per_step": round(speed, 6)})
            if stopped is not None or report.signalled:
                raise Stopped(
                    f"stopped in {at}: {stopped or 'a signal came in its last step.'}",
                    where=run.folder.parent,
                    fix="The same command goes on from there.",
                ) from stopped
    if len(failed) == len(plan.runs):
        first = next(iter(failed.values()))
        raise PipelineError(
            f"all {len(failed)} runs failed. The first: {first}",
            where=f"comparison {plan.settings.name}",
            fix="Correct that, then run the same command again.",
        )
    results = _score(plan, failed, log, execution.device, window_batch)
    group = scope.work / "students" / plan.settings.name
    organs = scope.registry.label_space.organs
    return Results(plan, organs, results, scored_before(group, "test"))


def _score(
    plan: Comparison, failed: Mapping[str, Exception], log: Log, device: str, window_batch: int
) -> list[RunResult]:
    settings = ScoringSettings(split=plan.settings.split, surface=plan.settings.surface)
    results = []
    left = sum(len(plan.scored[run.fold]) for run in plan.runs if run.folder.name not in failed)
    with log.progress("scoring", left) as advance:
        for run in plan.runs:
            error = failed.get(run.folder.name)
            rows: Sequence[Mapping[str, Any]] = ()
            if error is None:
                rows = score_student(
                    run.folder, plan.scored[run.fold], settings, device=device,
                    window_batch=window_batch, advance=advance,
                )  # fmt: skip
            said = None if error is None else str(error)
            results.append(
                RunResult(run.name, run.seed, run.fold, run.folder, rows, _speed(run), said)
            )
    return results


def _speed(run: Run) -> float | None:
    found = json_with(run.folder / "speed.json", "seconds_per_step")
    return None if found is None else float(found["seconds_per_step"])


def _noting(advance: Advance, at: str) -> Advance:
    def hand_on(note: str = "", steps: int = 1) -> None:
        advance(f"{at}, {note}", steps)

    return hand_on


def _steps_left(run: Run) -> int:
    if run.finished:
        return 0
    made = [path.name for path in matching(run.folder / "checkpoints", "step_*.pt")]
    last = max((int(re.sub(r"\D", "", name)) for name in made), default=0)
    return max(0, run.config.training.steps - last)
