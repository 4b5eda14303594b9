"""Terms by teachers: what each of them is for. What all must keep: test_losses_every_term.py."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from pipeline.student import losses

NAN = math.nan


def row(*voxels: list[float]) -> Tensor:
    """Log-odds, voxel by voxel: (1, K, voxels, 1, 1)."""
    return torch.tensor(voxels, dtype=torch.float64).T.reshape(1, -1, len(voxels), 1, 1)


def q_of(log_odds: Tensor, temperature: float = 1.0) -> Tensor:
    return torch.softmax(losses.joint_target(log_odds, temperature), dim=1)


class TestJointTarget:
    def test_nan_is_no_organ(self) -> None:
        q = q_of(row([3.0, NAN])).flatten()
        assert q.tolist() == pytest.approx([1 - 1 / (1 + math.exp(-3)), 1 / (1 + math.exp(-3)), 0])

    def test_two_infinitely_sure_teachers_share(self) -> None:
        assert q_of(row([math.inf, math.inf])).flatten().tolist() == pytest.approx([0, 0.5, 0.5])


class TestHard:
    def test_the_best_organ_or_none_for_sure(self) -> None:
        d = row([3.0, 1.0], [-1.0, -2.0], [NAN, 2.0], [NAN, -2.0])
        found = losses.hard(d)
        q = q_of(found).reshape(3, 4).T
        assert q.tolist() == [[0, 1, 0], [1, 0, 0], [0, 0, 1], [1, 0, 0]]
        assert torch.equal(found.isnan(), d.isnan())


class TestRegions:
    def test_those_of_the_consensus_where_nobody_is_silent_and_beside_silence(self) -> None:
        d = row([3.0, -3.0], [-3.0, -3.0], [-3.0, NAN], [NAN, NAN], [-0.5, -3.0], [0.5, 3.0])
        found = losses.regions_of(d, 1.0)
        organ, background = found.organ[0, :, :, 0, 0].T, found.background[0, :, 0, 0]
        assert organ.tolist() == [[True, False], *[[False, False]] * 4, [False, True]]
        assert background.tolist() == [False, True, True, False, False, False]


class TestOneTarget:
    def test_who_is_silent_is_merged_into_background(self) -> None:
        """p_0 + p_2 against 1 - sigmoid(d_1), whatever the share of organ 2 in it."""
        d = row([2.0, NAN])
        q = 1 / (1 + math.exp(-2))
        entropy = -(q * math.log(0.6) + (1 - q) * math.log(0.4))
        dice = 1 - 2 * 0.6 * q / (0.6**2 + q**2)
        for share in (0.1, 0.9):
            p = row([0.4 * (1 - share), 0.6, 0.4 * share])
            found = [float(term) for term in losses.one_target(p.log(), p[:, 1:], d)]
            assert found == pytest.approx([entropy, dice], rel=1e-4)
