"""Samples of coded cases."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from pipeline.cache.reader import CachedCase
from pipeline.consensus.cohort import Temperatures
from pipeline.data.labels import LabelSpace
from pipeline.student.augment import AugmentConfig
from pipeline.student.dataset import PatchDataset
from pipeline.student.distributed import ALONE, Processes
from pipeline.student.inputs import TrainingInputs
from pipeline.student.network import CachedTap, StudentNetwork, TapKey
from pipeline.student.resume import TrainingState
from pipeline.student.settings import SupervisionConfig, TrainingConfig
from pipeline.student.speed import Speed
from tests.unit.student.coded import (
    CHANNELS,
    RAW,
    SHAPE,
    SPACE,
    STRIDE,
    expected_label,
    expected_odds,
    place,
)

PATCH = (8, 10, 10)
NUM_STEPS, BATCH_SIZE = 5, 2
CACHED = CachedTap(CHANNELS, STRIDE, (0,))
# The log-odds as they were written, not as labels would correct them.
TEACHERS = SupervisionConfig(labels_win=False)
STILL = AugmentConfig(intensity=0)
MOVING = AugmentConfig(intensity=0, flip_axes=(0, 1, 2), rotate_axes=(0, 1, 2))


def dataset(
    cases: Sequence[CachedCase],
    *,
    space: LabelSpace = SPACE,
    taps: Mapping[TapKey, CachedTap] | None = None,
    temperatures: Temperatures | None = None,
    processes: Processes = ALONE,
    pool_bytes: int = 50_000_000,
    **changes: Any,
) -> PatchDataset:
    settings: dict[str, Any] = {
        "supervision": TEACHERS,
        "patch": PATCH,
        "intensity": RAW,
        "augment": STILL,
        "batch_size": BATCH_SIZE,
        "steps": NUM_STEPS,
        "seed": 3,
    }
    config = TrainingConfig(**(settings | changes))
    inputs = TrainingInputs(cases, [], space, {}, taps or {}, temperatures or {})
    return PatchDataset(config, inputs, processes, pool_bytes)


def state_of(
    config: TrainingConfig,
    network: StudentNetwork,
    optimiser: torch.optim.Optimizer,
    speed: Speed | None = None,
) -> TrainingState:
    inputs = TrainingInputs([], [], SPACE, {})
    return TrainingState(config, inputs, network, optimiser, speed or Speed())


def fingerprint(sample: dict[str, Any]) -> str:
    h = hashlib.sha256(sample["case"].encode())
    for name, value in sorted(sample.items()):
        if isinstance(value, torch.Tensor):
            h.update(name.encode() + str(value.dtype).encode() + value.numpy().tobytes())
    return h.hexdigest()


def fingerprints(data: PatchDataset) -> list[str]:
    return [fingerprint(data[item]) for item in range(len(data))]


def arrays(sample: dict[str, Any]) -> dict[str, npt.NDArray[Any]]:
    return {n: v.numpy() for n, v in sample.items() if isinstance(v, torch.Tensor)}


def check_places(sample: dict[str, Any], shape: tuple[int, int, int] = SHAPE) -> npt.NDArray[Any]:
    """Asserts that every voxel's label and log-odds are those of where its image value
    lies; returns these places (V, 3)."""
    found = arrays(sample)
    inside, voxels = place(found["image"][0], shape)
    assert np.array_equal(found["classes"][inside], expected_label(voxels))
    odds = expected_odds(voxels)
    assert np.array_equal(found["log_odds"][:, inside], odds)
    return voxels
