"""The settings for a CPU and for GPUs of two sizes, as far as they can be tried without a GPU."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import stages
from pipeline.config import load_config
from pipeline.networks.by_name import build_network, output_shapes, tap_shapes
from pipeline.student.network import check_outputs
from pipeline.student.settings import TrainingConfig
from stages.train_student import TrainStudentConfig

FOLDER = Path(stages.__file__).parent
NUM_ORGANS = 4


@pytest.mark.parametrize(
    ("hardware", "tap", "cells"),
    [
        ("cpu", "model.1.submodule.0", 4),
        ("24gb", "upsamples.1", 8),
        ("24gb", "upsamples.0", 16),
        ("80gb", "upsamples.1", 8),
        ("80gb", "upsamples.0", 16),
    ],
)
def test_the_network_takes_the_patch_and_has_the_named_layers(
    hardware: str, tap: str, cells: int
) -> None:
    path = FOLDER / f"train_student.{hardware}.yaml"
    training = load_config(path, TrainStudentConfig).training
    with torch.device("meta"):  # shapes alone: a pass over these patches is terabytes of sums
        network = build_network(training.network, in_channels=1, out_channels=NUM_ORGANS + 1)
    shapes = output_shapes(network, training.patch)
    check_outputs(training, shapes, NUM_ORGANS)
    assert len(shapes) == (3 if training.deep_supervision else 1)
    assert tap_shapes(network, [tap], training.patch)[tap][1] == (cells,) * 3
    assert f"{tap} " in path.read_text(encoding="utf-8") or cells == 16


@pytest.mark.parametrize("hardware", ["cpu", "24gb", "80gb"])
def test_they_say_nothing_of_how_to_supervise(hardware: str) -> None:
    """So that an ablation by hardware is none by method."""
    training = load_config(FOLDER / f"train_student.{hardware}.yaml", TrainStudentConfig).training
    for field in ("supervision", "sampling", "augment", "intensity", "seed"):
        assert getattr(training, field) == getattr(TrainingConfig(), field)
