"""Terms by teachers: what each of them is for. What all must keep: test_losses_every_term.py."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import partial

import pytest
import torch
from torch import Tensor

from pipeline.student import losses
from tests.unit.student import slow_losses as slow
from tests.unit.student.terms import (
    SHAPE,
    K,
    N,
    RandomBatch,
    all_terms,
    descend,
    gradient,
    kl_of,
)


def everywhere(seed: int) -> RandomBatch:
    """Every voxel is in a region, and every organ known."""
    batch = RandomBatch(seed)
    batch.background |= ~batch.organ.any(dim=1)
    batch.organs[:] = True
    return batch


class TestJointTarget:
    def test_nan_is_no_organ(self) -> None:
        d = torch.tensor([3.0, math.nan]).reshape(1, 2, 1, 1, 1)
        q = torch.softmax(losses.joint_target(d, 1.0), dim=1).flatten()
        assert q.tolist() == pytest.approx([1 - 1 / (1 + math.exp(-3)), 1 / (1 + math.exp(-3)), 0])

    def test_two_infinitely_sure_teachers_share(self) -> None:
        d = torch.full((1, 2, 1, 1, 1), math.inf)
        q = torch.softmax(losses.joint_target(d, 1.0), dim=1).flatten()
        assert q.tolist() == pytest.approx([0, 0.5, 0.5])


class TestHard:
    def test_the_best_organ_or_none_for_sure(self) -> None:
        d = torch.tensor([[3.0, 1.0], [-1.0, -2.0], [math.nan, 2.0], [math.nan, -2.0]])
        found = losses.hard(d.T.reshape(1, 2, 4, 1, 1))
        q = torch.softmax(losses.joint_target(found, 1.0), dim=1).reshape(3, 4).T
        assert q.tolist() == [[0, 1, 0], [1, 0, 0], [0, 0, 1], [1, 0, 0]]
        assert found.isnan().flatten().tolist() == d.T.isnan().flatten().tolist()

    def test_a_network_that_agrees_has_no_loss(self) -> None:
        batch = everywhere(16)
        batch.log_odds = losses.hard(batch.log_odds)
        sure = 200 * losses.joint_target(batch.log_odds, 1e30)
        assert float(kl_of(batch, batch.everyone)(sure)) == pytest.approx(0, abs=1e-9)
        assert float(kl_of(batch, batch.everyone)(batch.logits)) > 0.1


class TestKlJoint:
    @pytest.mark.parametrize("temperature", [1.0, 3.0])
    def test_zero_with_zero_gradient_at_its_target(self, temperature: float) -> None:
        batch = everywhere(8)
        term = kl_of(batch, batch.everyone, t=temperature)
        target = torch.cat([torch.zeros(N, 1, *SHAPE), batch.log_odds], dim=1) + 1.7
        assert float(term(target)) == pytest.approx(0, abs=1e-12)
        assert gradient(term, target).abs().max() < 1e-12
        assert gradient(term, target + torch.randn_like(target)).abs().max() > 1e-4

    def test_descent_reaches_the_joint_target(self) -> None:
        batch = everywhere(9)
        reached = torch.softmax(descend(kl_of(batch, batch.everyone), batch.logits), dim=1)
        target = torch.softmax(losses.joint_target(batch.log_odds, 1.0), dim=1)
        assert torch.allclose(reached, target, atol=2e-3)


class TestKlPerTeacher:
    def test_zero_with_zero_gradient_where_one_teacher_is_matched(self) -> None:
        batch = everywhere(11)
        batch.organs[:] = torch.tensor([False, True, False])
        # s_2 = d_2 + logsumexp(all others): the student's own log-odds are the teacher's.
        matched = batch.logits.clone()
        matched[:, 2] = batch.log_odds[:, 1] + torch.logsumexp(matched[:, [0, 1, 3]], dim=1)
        term = kl_of(batch, batch.one_each, t=2.0)
        assert float(term(matched)) == pytest.approx(0, abs=1e-12)
        assert gradient(term, matched).abs().max() < 1e-10
        assert gradient(term, batch.logits).abs().max() > 1e-4

    def test_is_the_divergence_of_the_students_own_log_odds(self) -> None:
        batch = everywhere(12)
        batch.organ[:], batch.background[:] = True, True
        p = batch.p[:, 1:]
        e, d = (p / (1 - p)).log() / 2, batch.log_odds / 2
        yes, no = torch.sigmoid(d), torch.sigmoid(-d)
        each = yes * (yes / torch.sigmoid(e)).log() + no * (no / torch.sigmoid(-e)).log()
        found = kl_of(batch, batch.one_each, t=2.0)(batch.logits)
        assert float(found) == pytest.approx(4 * float(each.mean()), rel=1e-9)

    def test_sure_teachers_lose_no_digits(self) -> None:
        one = torch.ones((1, 1, 1, 1, 1), dtype=torch.bool)
        logits = torch.tensor([0.0, 3.0]).reshape(1, 2, 1, 1, 1)
        targets = losses.Targets(1e4 * one.float(), one, ~one[:, 0])
        found = losses.kl(torch.log_softmax(logits, 1), targets, one[:, :, 0, 0])
        assert float(found) == pytest.approx(math.log(1 + math.exp(-3.0)), rel=1e-5)


def speaking(*teachers: list[int]) -> Tensor:
    """The organs of each teacher, in every sample: bool (N, I, K)."""
    flags = torch.tensor([[k in organs for k in range(K)] for organs in teachers])
    return flags.expand(N, -1, -1)


class TestKlMarginal:
    @pytest.mark.parametrize("per_region", [False, True])
    def test_teachers_of_one_organ_each_are_per_teacher(self, per_region: bool) -> None:
        batch = everywhere(13)
        one_each = kl_of(batch, batch.one_each, t=2.0, per_region=per_region)(batch.logits)
        found = kl_of(batch, speaking([2], [0], [1]), t=2.0, per_region=per_region)(batch.logits)
        assert float(found) == pytest.approx(float(one_each), rel=1e-12)

    @pytest.mark.parametrize("per_region", [False, True])
    def test_one_teacher_of_all_organs_is_joint(self, per_region: bool) -> None:
        batch = everywhere(14)
        joint = kl_of(batch, batch.everyone, t=2.0, per_region=per_region)(batch.logits)
        found = kl_of(batch, speaking([0, 1, 2]), t=2.0, per_region=per_region)(batch.logits)
        assert float(found) == float(joint)

    def test_the_three_differ_for_teachers_of_some_organs(self) -> None:
        batch = everywhere(15)
        found = {
            float(kl_of(batch, experts)(batch.logits))
            for experts in (batch.everyone, batch.one_each, speaking([0, 1], [2]))
        }
        assert len(found) == 3

    def test_of_one_voxel_by_hand(self) -> None:
        # A teacher of liver and spleen on a voxel of the spleen; the student also knows kidneys.
        p = torch.tensor([0.1, 0.2, 0.3, 0.4], dtype=torch.float64).reshape(1, 4, 1, 1, 1)
        d = torch.tensor([math.log(2), math.log(5), 9.0], dtype=torch.float64).reshape(
            1, 3, 1, 1, 1
        )
        organ = torch.tensor([False, True, False]).reshape(1, 3, 1, 1, 1)
        nowhere = torch.zeros((1, 1, 1, 1), dtype=torch.bool)
        experts = torch.tensor([[[True, True, False]]])
        q, merged = (1 / 8, 2 / 8, 5 / 8), (0.5, 0.2, 0.3)
        expected = sum(a * math.log(a / b) for a, b in zip(q, merged, strict=True))
        found = losses.kl(p.log(), losses.Targets(d, organ, nowhere), experts)
        assert float(found) == pytest.approx(expected)

    def test_zero_with_zero_gradient_at_its_target_and_descent_reaches_it(self) -> None:
        batch = everywhere(16)
        term = kl_of(batch, speaking([0, 1]))
        target = batch.logits.clone()
        rest = torch.logsumexp(target[:, [0, 3]], dim=1, keepdim=True)
        target[:, 1:3] = rest + batch.log_odds[:, :2]
        inside = batch.organ[:, :2].any(dim=1) | batch.background
        assert float(term(target)) == pytest.approx(0, abs=1e-12)
        assert gradient(term, target).abs().max() < 1e-12
        reached = torch.softmax(descend(term, batch.logits), dim=1)[:, 1:3]
        wanted = torch.softmax(target, dim=1)[:, 1:3]
        reached, wanted = (x.movedim(1, -1)[inside] for x in (reached, wanted))
        assert torch.allclose(reached, wanted, atol=5e-3)

    def test_a_teacher_that_is_not_there_takes_no_part(self) -> None:
        batch = everywhere(17)
        here = speaking([0, 1], [2]).clone()
        here[1, 0] = False
        alone = RandomBatch(17)
        alone.background = batch.background.clone()
        term = kl_of(batch, here[:, :1])
        assert not gradient(term, batch.logits)[1].any()
        batch.log_odds[1, :2] = math.nan  # as it is where nobody speaks
        assert float(term(batch.logits)) == float(kl_of(alone, here[:, :1])(batch.logits))


class TestSoftDice:
    def test_zero_with_zero_gradient_at_its_soft_target_and_descent_reaches_it(self) -> None:
        batch = everywhere(12)
        term = all_terms(batch)["soft_dice"]
        target = losses.joint_target(batch.log_odds, 1.0)
        assert float(term(target)) == pytest.approx(0, abs=1e-12)
        assert gradient(term, target).abs().max() < 1e-12
        # Nothing about softness: a hard prediction is no optimum.
        assert float(term(100 * target)) > 0.01
        reached = torch.softmax(descend(term, batch.logits), dim=1)
        assert torch.allclose(reached, torch.softmax(target, dim=1), atol=5e-3)


class TestJointMadeOnce:
    """log q and q handed on, against each term making its own and against loops over voxels."""

    def _batch(self, seed: int, silent: float, known: list[bool] | None = None) -> RandomBatch:
        batch = RandomBatch(seed, silent=silent)
        if known is not None:
            batch.organs[:] = torch.tensor(known)
        # As in every batch: what nobody knows of has no log-odds and no region.
        unknown = ~batch.organs[:, :, None, None, None].expand_as(batch.log_odds)
        batch.log_odds[unknown] = math.nan
        batch.organ &= ~unknown
        return batch

    @pytest.mark.parametrize("known", [[True, True, True], [True, False, True], [False] * 3, None])
    @pytest.mark.parametrize("silent", [0.0, 0.3])
    @pytest.mark.parametrize("per_region", [False, True])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    def test_bit_for_bit_what_each_makes_itself(
        self, known: list[bool] | None, silent: float, per_region: bool, dtype: torch.dtype
    ) -> None:
        batch = self._batch(31, silent, known)
        odds, logits = batch.log_odds.to(dtype), batch.logits.to(dtype)
        joint = losses.joint_log_q_and_q(odds)

        def kl(s: Tensor, made: tuple[Tensor, Tensor] | None) -> Tensor:
            log_p, targets = torch.log_softmax(s, 1), replace(batch.targets, log_odds=odds)
            return losses.kl(log_p, targets, batch.everyone, per_region=per_region, joint=made)

        def dice(s: Tensor, made: tuple[Tensor, Tensor] | None) -> Tensor:
            p = torch.softmax(s, 1)[:, 1:]
            return losses.soft_dice(p, odds, batch.inside, batch.organs, joint=made)

        for term in (kl, dice):
            own, handed = partial(term, made=None), partial(term, made=joint)
            assert float(handed(logits)) == float(own(logits))
            assert torch.equal(gradient(handed, logits), gradient(own, logits))

    @pytest.mark.parametrize("per_region", [False, True])
    @pytest.mark.parametrize("seed", range(4))
    def test_against_loops_over_voxels(self, seed: int, per_region: bool) -> None:
        batch = self._batch(seed, 0.3)
        joint = losses.joint_log_q_and_q(batch.log_odds)
        found = losses.kl(
            batch.log_p, batch.targets, batch.everyone, per_region=per_region, joint=joint
        )
        arrays = (batch.logits, batch.log_odds, batch.organ, batch.background, batch.everyone)
        plain = slow.kl(*(x.numpy() for x in arrays), per_region=per_region)
        assert float(found) == pytest.approx(plain, rel=1e-9)
        dice = losses.soft_dice(
            batch.p[:, 1:], batch.log_odds, batch.inside, batch.organs, joint=joint
        )
        others = batch.p[:, 1:], batch.log_odds, batch.inside, batch.organs
        assert float(dice) == pytest.approx(slow.soft_dice(*(x.numpy() for x in others)), rel=1e-9)
