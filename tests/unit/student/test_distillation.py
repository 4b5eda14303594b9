"""Terms by teachers: what each of them is for. What all must keep: test_losses_every_term.py."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from pipeline.student import losses
from tests.unit.student.terms import SHAPE, K, N, RandomBatch, Term, descend, gradient

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
    @staticmethod
    def _term(batch: RandomBatch, temperature: float = 1.0) -> Term:
        return lambda s: sum(losses.one_target(s, batch.log_odds, temperature=temperature))  # type: ignore[return-value]

    @pytest.mark.parametrize("temperature", [1.0, 3.0])
    def test_its_optimum_is_the_soft_target_and_descent_reaches_it(
        self, temperature: float
    ) -> None:
        batch = RandomBatch(8)
        term, target = self._term(batch, temperature), batch.log_odds / temperature
        at_optimum = torch.cat([torch.zeros(N, 1, *SHAPE), target], dim=1) + 1.7
        assert gradient(term, at_optimum).abs().max() < 1e-12
        assert gradient(term, at_optimum + torch.randn_like(at_optimum)).abs().max() > 1e-4
        # Nothing about softness: a hard prediction is no optimum.
        assert float(term(100 * at_optimum)) > float(term(at_optimum)) + 0.01
        reached = torch.softmax(descend(term, batch.logits), dim=1)
        assert torch.allclose(reached, q_of(target), atol=5e-3)

    def test_two_organs_that_claim_a_voxel_share_it(self) -> None:
        d, logits = row([2.0, 2.0]), torch.zeros(1, 3, 1, 1, 1, dtype=torch.float64)
        reached = torch.softmax(descend(lambda s: losses.one_target(s, d)[0], logits), dim=1)
        assert reached.flatten().tolist() == pytest.approx(q_of(d).flatten().tolist(), abs=1e-4)
        assert reached[0, 1] == pytest.approx(reached[0, 2])

    def test_who_is_silent_is_merged_into_background(self) -> None:
        """p_0 + p_2 against 1 - sigmoid(d_1), whatever the share of organ 2 in it."""
        d = row([2.0, NAN])
        q = 1 / (1 + math.exp(-2))
        entropy = -(q * math.log(0.6) + (1 - q) * math.log(0.4))
        dice = 1 - 2 * 0.6 * q / (0.6**2 + q**2)
        for share in (0.1, 0.9):
            p = row([0.4 * (1 - share), 0.6, 0.4 * share])
            found = [float(term) for term in losses.one_target(p.log(), d)]
            assert found == pytest.approx([entropy, dice], rel=1e-4)

    def test_a_voxel_where_nobody_speaks_counts_nowhere(self) -> None:
        batch = RandomBatch(9)
        batch.log_odds[:, :, 0] = NAN
        whole = self._term(batch)(batch.logits)
        spoken = RandomBatch(9)
        spoken.log_odds, logits = spoken.log_odds[:, :, 1:], spoken.logits[:, :, 1:]
        assert float(whole) == pytest.approx(float(self._term(spoken)(logits)), rel=1e-12)

    def test_an_organ_of_which_nobody_speaks_has_no_dice(self) -> None:
        batch = RandomBatch(10)
        batch.log_odds[:, 0] = NAN
        dice = losses.one_target(batch.logits, batch.log_odds)[1]
        logits = torch.cat(
            [torch.logsumexp(batch.logits[:, :2], dim=1, keepdim=True), batch.logits[:, 2:]], dim=1
        )
        assert float(dice) == pytest.approx(
            float(losses.one_target(logits, batch.log_odds[:, 1:])[1]), rel=1e-12
        )
        assert K == 3
