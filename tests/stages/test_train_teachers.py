from __future__ import annotations

import errno
import os
import shutil
import signal
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from pipeline.data.labels import Intensity
from pipeline.data.registry import load_registry
from pipeline.errors import ConfigError, RegistryError, Stopped, TeacherError
from pipeline.log import Log
from pipeline.student.speed import TrainingExecution
from pipeline.teachers.checkpoint import read_teacher
from stages import train_teachers
from stages.report import Scope, StageReport
from tests.stages.stage_contract import StageContract, snapshot
from tests.tiny import (
    NETWORK,
    at_step,
    change_registry,
    shrink_organ,
    training_settings,
    work_of,
)


def config(**changes: Any) -> train_teachers.TrainTeachersConfig:
    training = training_settings(**changes)
    return train_teachers.TrainTeachersConfig.model_validate({"training": training})


def run(registry: Path, *, dry_run: bool = False, **changes: Any) -> StageReport:
    only = changes.pop("only", None)
    return train_teachers.run(
        config(**changes),
        Scope(load_registry(registry), work_of(registry), Log(quiet=True)),
        TrainingExecution(device="cpu"),
        only=only,
        dry_run=dry_run,
    )


@pytest.fixture
def untrained(tiny_registry: Path) -> Path:
    shutil.rmtree(tiny_registry.parent / "teachers")
    return tiny_registry


def weights(registry: Path, teacher: str = "liver") -> Path:
    return registry.parent / "teachers" / f"{teacher}.pt"


class TestTrainTeachers(StageContract):
    kill_at = "pipeline.student.checkpoint:save_atomically"
    kill_nth = 3

    @pytest.fixture
    def registry(self, untrained: Path) -> Path:
        return untrained

    def run(self, registry: Path, *, dry_run: bool = False) -> StageReport:
        return run(registry, dry_run=dry_run)

    def command(self, registry: Path) -> list[str]:
        path = registry.parent / "train.yaml"
        path.write_text(yaml.safe_dump({"training": training_settings()}))
        return [
            "train-teachers", "-q", "--device", "cpu", "--checkpoint-minutes", "0",
            "-r", str(registry), "-w", str(work_of(registry)), "-c", str(path),
        ]  # fmt: skip

    def output(self, registry: Path) -> Path:
        return registry.parent / "teachers"

    def units(self, registry: Path) -> set[str]:
        return {"liver", "spleen"}

    def remove_one(self, registry: Path) -> str:
        weights(registry).unlink()
        return "liver"

    def break_one(self, registry: Path) -> Mapping[str, str]:
        image = registry.parent / "data" / "liver-ct" / "images" / "case_001.nii.gz"
        image.write_bytes(image.read_bytes()[:2000])
        return {"liver-ct/case_001": "not a readable NIfTI"}


def test_a_full_disk_is_the_error_of_one_teacher_whose_training_is_kept(
    untrained: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = Path.open

    def full(path: Path, mode: str = "r", **more: Any) -> Any:
        if "w" in mode and path.name.startswith(".liver.pt"):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(path, mode, **more)

    with monkeypatch.context() as context:
        context.setattr(Path, "open", full)
        report = run(untrained)
    assert (report.done, set(report.failed), report.exit_code) == (["spleen"], {"liver"}, 2)
    assert str(report.failed["liver"]) == (
        f"{weights(untrained)}: it cannot be written (No space left on device). Check free space, "
        "quota and permissions, then run the same command again."
    )
    assert [path.name for path in weights(untrained).parent.iterdir()] == ["spleen.pt"]
    assert run(untrained).done == ["liver"]


def test_the_file_holds_all_that_is_needed(untrained: Path) -> None:
    own = {"spacing_mm": [14, 12, 12], "intensity": {"window_hu": [-100, 200]}}
    change_registry(untrained, lambda data: data["teachers"]["liver"].update(own))
    assert run(untrained).exit_code == 0
    record, state = read_teacher(weights(untrained))
    assert record.network == NETWORK
    assert record.num_channels == 2
    assert record.channels == {"liver": (1,)}
    assert record.spacing_mm == (14, 12, 12)
    assert record.intensity == Intensity(window_hu=(-100, 200))
    assert record.trained_on == "liver-ct"
    assert record.trained_on_cases == ("liver-ct/case_001", "liver-ct/case_002")
    assert record.num_validation_cases == 1
    assert set(record.validation_dice) == {"liver"}
    assert 0 <= float(record.validation_dice["liver"] or 0) <= 1
    assert len(record.training_digest) == 64
    assert all(torch.isfinite(tensor).all() for tensor in state.values())
    assert read_teacher(weights(untrained, "spleen"))[0].training_digest != record.training_digest


def test_a_case_whose_organ_the_grid_swallows_is_left_out(
    untrained: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    own = {"spacing_mm": [24, 24, 24]}
    change_registry(untrained, lambda data: data["teachers"]["liver"].update(own))
    shrink_organ(untrained.parent / "data/liver-ct/labels/case_001.nii.gz", 1, 24)
    assert run(untrained, only="liver").exit_code == 0
    record, _ = read_teacher(weights(untrained))
    assert record.trained_on_cases == ("liver-ct/case_002",)
    said = capsys.readouterr().err
    assert "liver-ct/case_001 is left out: its grid has no voxel of liver" in said
    assert "liver-ct/case_001: liver has 1 voxel in the label's file" in said


def test_training_moves_the_weights_and_the_seed_moves_them_elsewhere(untrained: Path) -> None:
    def trained(**changes: Any) -> torch.Tensor:
        weights(untrained).unlink(missing_ok=True)
        shutil.rmtree(work_of(untrained) / "teachers-in-training", ignore_errors=True)
        run(untrained, only="liver", **changes)
        _, state = read_teacher(weights(untrained))
        return torch.cat([tensor.flatten() for tensor in state.values()])

    first = trained()
    assert torch.equal(trained(), first)
    assert not torch.equal(trained(steps=5), first)
    assert not torch.equal(trained(seed=1), first)


def test_a_signal_in_a_teachers_last_step_begins_no_other(untrained: Path) -> None:
    with at_step(4, lambda: os.kill(os.getpid(), signal.SIGTERM)):
        report = run(untrained)
    assert report.done == ["liver"]
    assert isinstance(report.failed["spleen"], Stopped)
    assert "not begun" in str(report.failed["spleen"])
    assert report.exit_code == 1
    assert not (work_of(untrained) / "teachers-in-training" / "spleen").exists()
    again = run(untrained)
    assert (again.skipped, again.done) == (["liver"], ["spleen"])


def test_one_teacher_alone(untrained: Path) -> None:
    assert run(untrained, only="spleen").done == ["spleen"]
    assert not weights(untrained).exists()
    with pytest.raises(ConfigError, match="no teacher to train named heart"):
        run(untrained, only="heart")


@pytest.mark.parametrize("changed", ["settings", "data", "intensity"])
def test_a_teacher_of_other_settings_is_not_overwritten(untrained: Path, changed: str) -> None:
    run(untrained, only="liver")
    before = weights(untrained).read_bytes()
    steps = 5 if changed == "settings" else 4
    if changed == "data":
        for part in ("images", "labels"):
            folder = untrained.parent / "data" / "liver-ct" / part
            shutil.copy(folder / "case_001.nii.gz", folder / "case_002.nii.gz")
    if changed == "intensity":
        change_registry(
            untrained,
            lambda data: data["teachers"]["liver"].update(intensity={"window_hu": [-1, 1]}),
        )
    report = run(untrained, only="liver", steps=steps)
    assert isinstance(report.failed["liver"], TeacherError)
    assert "not overwritten" in str(report.failed["liver"])
    assert report.exit_code == 2
    assert weights(untrained).read_bytes() == before


def test_weights_from_elsewhere_are_not_overwritten(tiny_registry: Path) -> None:
    before = snapshot(tiny_registry.parent / "teachers")
    report = run(tiny_registry)
    assert set(report.failed) == {"liver", "spleen"}
    assert snapshot(tiny_registry.parent / "teachers") == before


@pytest.mark.parametrize(
    "change",
    [
        {"organs": {"liver": 0}},
        {"num_channels": 4},
        {"activation": "sigmoid"},
        {"outputs": "probabilities"},
    ],
)
def test_what_would_be_refused_later_is_refused_before_training(
    untrained: Path, change: dict[str, Any]
) -> None:
    change_registry(untrained, lambda data: data["teachers"]["liver"].update(change))
    report = run(untrained)
    assert isinstance(report.failed["liver"], RegistryError)
    assert "organs: {liver: 1}, num_channels: 2" in str(report.failed["liver"])
    assert report.done == ["spleen"]
    assert not (work_of(untrained) / "teachers-in-training" / "liver").exists()


def test_teachers_have_no_choice_of_supervision() -> None:
    with pytest.raises(ValueError, match=r"remove training\.supervision"):
        config(supervision={"kind": "ms_kd"})
    assert config().training.supervision.kind == "full"


def test_channels_follow_the_ids(untrained: Path) -> None:
    def change(data: dict[str, Any]) -> None:
        data["organs"] = {"liver": 2, "spleen": 1}
        data["teachers"]["both"] = {
            **data["teachers"].pop("liver"),
            "weights": "teachers/both.pt",
            "organs": {"liver": 2, "spleen": 1},
            "num_channels": 3,
            "trained_on": "multi-ct",
        }
        data["datasets"]["multi-ct"]["split"] = {
            "train": ["case_000"],
            "validation": [],
            "test": [],
        }

    change_registry(untrained, change)
    assert run(untrained, only="both").done == ["both"]
    record, _ = read_teacher(weights(untrained, "both"))
    assert record.channels == {"spleen": (1,), "liver": (2,)}
    assert record.num_channels == 3
    assert record.validation_dice == {"spleen": None, "liver": None}


def test_no_validation_case_is_told(untrained: Path, capfd: pytest.CaptureFixture[str]) -> None:
    change_registry(
        untrained, lambda d: d["datasets"]["liver-ct"].update(split={"validation": 0.1})
    )
    assert run(untrained, only="liver").done == ["liver"]
    said = " ".join(capfd.readouterr().err.split())
    assert "liver-ct: none of its 3 cases falls into validation (0.1). Choose another" in said
