"""A finished run on the tiny cohort, made once per session."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipeline.data.registry import load_registry
from pipeline.log import Log
from pipeline.student.speed import TrainingExecution
from stages import train_student
from stages.report import Scope
from tests.tiny import copy_cohort, training_settings, work_of
from tests.unit.review.report.pages import RUN


def _train(registry: Path, run: str, kind: str) -> None:
    config = train_student.TrainStudentConfig.model_validate(
        {
            "run": run,
            "training": training_settings(
                steps=3,
                supervision={"kind": kind, "features": {"weight": 0.0}},
            ),
        }
    )
    report = train_student.run(
        config, Scope(load_registry(registry, files=False), work_of(registry), Log(quiet=True)),
        TrainingExecution(device="cpu"),
    )  # fmt: skip
    assert not report.failed, report.failed


@pytest.fixture(scope="session")
def built_runs(built_cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The registry of a filled cache with the runs `taught` (ms_kd) and `labels/only` (marginal);
    not to be changed."""
    registry = copy_cohort(built_cache, tmp_path_factory.mktemp("runs") / "cohort")
    _train(registry, RUN, "ms_kd")
    _train(registry, "labels/only", "marginal")
    return registry


@pytest.fixture
def runs(built_runs: Path, tmp_path: Path) -> Path:
    """A fresh copy, to be damaged."""
    return copy_cohort(built_runs, tmp_path / "cohort")
