"""Teachers in the training loop say of a patch what their networks say, and labels still win."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from benchmarks.accuracy.online import teachers_in_the_loop
from pipeline.consensus.cohort import open_cohort
from pipeline.data.registry import load_registry
from pipeline.networks.by_name import build_network
from pipeline.student import training
from pipeline.student.dataset import PatchDataset, collate, to_batch
from pipeline.student.inputs import TrainingInputs
from pipeline.student.settings import TrainingConfig
from pipeline.student.supervision import Batch
from pipeline.teachers.checkpoint import read_teacher
from tests.tiny import ORGANS, training_settings, work_of


def collated_of(registry_path: Path) -> dict[str, Any]:
    config = TrainingConfig.model_validate(training_settings(batch_size=4, steps=1, seed=0))
    registry = load_registry(registry_path, files=False)
    cohort = open_cohort(
        work_of(registry_path), registry, teachers=list(registry.teachers), splits=("train",)
    )
    data = PatchDataset(config, TrainingInputs(cohort.cases, [], registry.label_space, {}))
    found = collate([data[i] for i in range(4)])
    assert isinstance(found, dict)
    return found


def test_log_odds_are_those_of_the_networks_on_the_augmented_patch(built_cache: Path) -> None:
    registry = load_registry(built_cache, files=False)
    collated, device = collated_of(built_cache), torch.device("cpu")
    cached = to_batch(collated, [], device)
    with teachers_in_the_loop(registry):
        # As the loop calls it.
        batch: Batch = vars(training)["to_batch"](collated, [], device)
    assert vars(training)["to_batch"] is to_batch
    assert batch.log_odds is not None
    assert cached.log_odds is not None
    seen = ~cached.log_odds.isnan().all(dim=1)
    assert torch.equal(seen, ~batch.log_odds.isnan().all(dim=1))
    for k, organ in enumerate(ORGANS):
        record, state = read_teacher(registry.resolve(registry.teachers[organ].weights))
        network = build_network(record.network, in_channels=1, out_channels=2)
        network.load_state_dict(state)
        with torch.no_grad():
            s = network.eval()(batch.image)
        known = batch.classes != 255
        labelled = (batch.annotated[:, k, None, None, None] | (batch.classes > 0)) & known
        free = seen & ~labelled
        assert free.any()
        assert torch.allclose(batch.log_odds[:, k][free], (s[:, 1] - s[:, 0])[free], atol=1e-5)
        says = batch.log_odds[:, k][labelled & seen]
        is_organ = (batch.classes == k + 1)[labelled & seen]
        assert torch.equal(says >= 6, is_organ)
        assert torch.equal(says <= -6, ~is_organ)
