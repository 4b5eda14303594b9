"""What a step is counted to hold, without values, is what a real pass saves."""

from __future__ import annotations

import pytest
import torch

from pipeline.networks.by_name import NetworkConfig, build_network
from pipeline.student import memory
from pipeline.student.memory import step_memory
from pipeline.student.settings import TrainingConfig
from tests.unit.student.test_networks_by_name import NAMES, NETWORKS


def training(name: str, batch: int = 2) -> TrainingConfig:
    _, args, edge, _ = NETWORKS[NAMES.index(name)]
    config = NetworkConfig(name=name, args=args)
    return TrainingConfig(network=config, patch=(edge, edge, edge), batch_size=batch)


@pytest.mark.parametrize("name", ["DynUNet", "PlainConvUNet"])
def test_activations_are_those_of_a_real_pass(name: str) -> None:
    config = training(name)
    network = build_network(config.network, in_channels=1, out_channels=3).train()
    with memory._saved(network) as saved:
        network(torch.zeros(2, 1, *config.patch))
    counted = step_memory(config, 2, torch.float32)
    assert counted.activations == pytest.approx(sum(saved.values()), rel=1e-3)
    weights = sum(weight.numel() for weight in network.parameters())
    assert counted.weights == 16 * weights  # AdamW


def test_all_but_the_weights_grows_with_the_batch_and_half_precision_halves_activations() -> None:
    random = torch.get_rng_state()
    one, four = (step_memory(training("DynUNet", n), 2, torch.float32) for n in (1, 4))
    assert four.weights == one.weights
    assert four.total - four.weights == pytest.approx(4 * (one.total - one.weights), rel=1e-3)
    half = step_memory(training("DynUNet", 4), 2, torch.bfloat16)
    assert half.activations == pytest.approx(four.activations / 2, rel=0.01)
    assert half.loss == four.loss
    assert torch.equal(torch.get_rng_state(), random)
