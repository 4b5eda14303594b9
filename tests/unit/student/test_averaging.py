from __future__ import annotations

import torch

from pipeline.student.averaging import Averaged
from pipeline.student.network import StudentNetwork, seeded_network
from tests.tiny import NETWORK


def network_of(seed: int) -> StudentNetwork:
    return seeded_network(
        NETWORK, 2, seed=seed, patch=(8, 8, 8), head="softmax", taps=(), cached={}
    )


def filled(network: StudentNetwork, value: float) -> StudentNetwork:
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.fill_(value)
    return network


def test_the_mean_follows_closely_first_and_slowly_later() -> None:
    network = filled(network_of(0), 0.0)
    averaged = Averaged(network, 0.9)
    expected = 0.0
    for step in range(200):
        value = float(step % 7)
        averaged.update(filled(network, value), step)
        keep = min(0.9, (1 + step) / (10 + step))
        expected = keep * expected + (1 - keep) * value
        if step == 0:
            assert expected == 0.9 * value
    for weight in averaged.network.parameters():
        assert torch.allclose(weight, torch.full_like(weight, expected), rtol=1e-5)


def test_it_is_a_copy_without_gradients_and_its_state_comes_back() -> None:
    network = network_of(1)
    averaged = Averaged(network, 0.5)
    averaged.update(filled(network, 3.0), 5)
    assert not any(p.requires_grad for p in averaged.network.parameters())
    assert all(p.requires_grad for p in network.parameters())
    other = Averaged(network_of(2), 0.5)
    other.load_state_dict(averaged.state_dict())
    for ours, theirs in zip(other.network.parameters(), averaged.network.parameters(), strict=True):
        assert torch.equal(ours, theirs)
