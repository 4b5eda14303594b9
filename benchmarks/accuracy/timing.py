"""Seconds per step of the method and its baselines, measured once per folder."""

from __future__ import annotations

import json
import platform
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

import torch

from benchmarks.accuracy.configurations import BASELINES, METHOD, Configuration, identity, named
from benchmarks.accuracy.size import Size
from pipeline.cache.store import write_json
from pipeline.data.registry import load_registry
from pipeline.log import Log
from pipeline.student.inputs import open_inputs
from pipeline.student.resume import RunFolder
from pipeline.student.speed import TrainingExecution
from pipeline.student.training import train
from stages.compare.budget import StepClock

ROUNDS = 5
STEPS = 24
_WARM_UP = 4
RECORD = "seconds_per_step.json"


def seconds_per_step(folder: Path, job: Path, size: Size, log: Log) -> dict[str, float]:
    """Kind -> seconds; what is on record is not measured again.

    The kinds train in turns, a few steps each, over several rounds; the median counts. Validation,
    checkpoints and start-up are not in it, and neither is stage one, which only kinds with teachers
    need.

    Args:
        folder: holds the record.
        job: the folder of one whose cohort is made.
        size: of everything.
        log: where progress goes.
    """
    kinds = named(size, (*BASELINES, METHOD))
    path = folder / RECORD
    found: dict[str, Any] = {}
    if path.exists():
        found = json.loads(path.read_text(encoding="utf-8"))["seconds_per_step"]
    if any(identity(kind.training) not in found for kind in kinds):
        rounds = _measure(kinds, job, log)
        found |= {identity(k.training): median(rounds[k.name]) for k in kinds}
        content = {"machine": platform.platform(), "rounds": rounds, "seconds_per_step": found}
        write_json(path, content)
    return {kind.name: float(found[identity(kind.training)]) for kind in kinds}


def _measure(kinds: Sequence[Configuration], job: Path, log: Log) -> Mapping[str, Sequence[float]]:
    torch.set_num_threads(1)
    registry = load_registry(job / "student_registry.yaml", files=False)
    rounds: dict[str, list[float]] = {kind.name: [] for kind in kinds}
    with log.progress("seconds per step", ROUNDS * len(kinds)) as advance:
        for _ in range(ROUNDS):
            for kind in kinds:
                inputs = open_inputs(
                    kind.training.supervision, registry, job / "work", allow_missing=False, log=log
                )
                clock = StepClock(Log(quiet=True))
                with tempfile.TemporaryDirectory() as temporary:
                    train(
                        kind.training.model_copy(update={"steps": _WARM_UP + STEPS}),
                        replace(inputs, validation=()),
                        RunFolder(Path(temporary), pictures=False),
                        TrainingExecution(device="cpu"),
                        clock,
                    )  # fmt: skip
                times = clock.times[_WARM_UP - 1 :]
                rounds[kind.name].append((times[-1] - times[0]) / (len(times) - 1))
                advance(kind.name)
    return rounds
