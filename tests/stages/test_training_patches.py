"""Where patches and what is done to them meet the rest of a training."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest

from pipeline.data.registry import load_registry
from pipeline.errors import ConfigError
from pipeline.log import Log
from pipeline.student.speed import TrainingExecution
from stages import train_student, train_teachers
from stages.report import Scope, StageReport
from stages.train_student import TrainStudentConfig
from stages.train_teachers import TrainTeachersConfig
from tests.stages.stage_contract import snapshot
from tests.tiny import change_registry, training_settings, work_of

MIRRORED = {"flip_axes": [0, 2]}


def train(registry: Path, **changes: Any) -> StageReport:
    training = training_settings(**{"steps": 2} | changes)
    return train_student.run(
        TrainStudentConfig.model_validate({"training": training}),
        Scope(load_registry(registry, files=False), work_of(registry), Log(quiet=True)),
        TrainingExecution(device="cpu"),
    )


def with_a_side(registry: Path) -> Path:
    """The spleen is renamed, wherever it is an organ or a teacher."""

    def renamed(value: Any) -> Any:
        if isinstance(value, dict):
            return {("spleen_left" if k == "spleen" else k): renamed(v) for k, v in value.items()}
        return value

    def change(data: dict[str, Any]) -> None:
        data.update(renamed(data))
        for part in data.values():
            if isinstance(part, dict):
                part.pop("spleen", None)

    return change_registry(registry, change)


class TestMirroredSides:
    def test_a_student_is_refused_before_the_cache_is_looked_at(self, tiny_registry: Path) -> None:
        registry = with_a_side(tiny_registry)
        with pytest.raises(ConfigError, match="left and right") as caught:
            train(registry, augment=MIRRORED)
        assert "spleen_left" in str(caught.value)
        assert caught.value.exit_code == 2
        assert not work_of(registry).exists()

    def test_a_teacher_is_refused_before_its_cases_are_prepared(self, tiny_registry: Path) -> None:
        registry = with_a_side(tiny_registry)
        (registry.parent / "teachers" / "spleen.pt").unlink()
        before = snapshot(registry.parent)
        training = training_settings(augment=MIRRORED)
        report = train_teachers.run(
            TrainTeachersConfig.model_validate({"training": training}),
            Scope(load_registry(registry), work_of(registry), Log(quiet=True)),
            TrainingExecution(device="cpu"),
            only="spleen_left",
        )
        assert isinstance(report.failed["spleen_left"], ConfigError)
        assert "left and right" in str(report.failed["spleen_left"])
        after = snapshot(registry.parent)
        assert not [name for name in after if name not in before and name.endswith("zarr.json")]


@pytest.mark.parametrize(
    "augment", [{}, {"affine": {"probability": 1}}], ids=["as it is", "affine"]
)
def test_a_patch_larger_than_every_case_trains_and_says_so(
    tiny_cached: Path, capsys: pytest.CaptureFixture[str], augment: dict[str, Any]
) -> None:
    report = train(tiny_cached, patch=[36, 40, 44], augment=augment)
    assert report.exit_code == 0
    warnings = [line for line in capsys.readouterr().err.splitlines() if "far larger than" in line]
    assert len(warnings) == 1
    assert "4 of 4 cases" in warnings[0]
    scores = report.details["validation_dice"]
    assert all(score is None or math.isfinite(score) for score in scores.values())
