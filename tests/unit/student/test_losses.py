from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import product

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from pipeline.labels import IGNORE
from pipeline.student import losses

N, K, SHAPE = 2, 3, (3, 2, 4)
VOXELS = tuple(product(range(N), *(range(n) for n in SHAPE)))
SMOOTH = 1e-5
Floats = npt.NDArray[np.float64]
Term = Callable[[Tensor], Tensor]

seeds = st.integers(0, 10_000)


class Batch:
    """Random tensors of one batch in float64; what is drawn follows from the seed alone."""

    def __init__(self, seed: int) -> None:
        rng = np.random.default_rng(seed)
        self.logits = torch.tensor(rng.normal(0, 2, (N, K + 1, *SHAPE)))
        self.log_odds = torch.tensor(rng.normal(0, 3, (N, K, *SHAPE)))
        self.organs = torch.tensor(rng.random((N, K)) < 0.6)
        # Labels name only what a case annotates, as in the cache.
        drawn = torch.tensor(rng.integers(0, K + 1, (N, *SHAPE)))
        annotated = torch.cat([torch.ones(N, 1, dtype=torch.bool), self.organs], dim=1)
        taken = torch.stack([annotated[n][drawn[n]] for n in range(N)])
        self.classes = torch.where(taken, drawn, 0)
        self.classes[torch.tensor(rng.random((N, *SHAPE)) < 0.2)] = IGNORE
        self.inside = torch.tensor(rng.random((N, *SHAPE)) < 0.7)
        self.weight = torch.tensor(rng.random((N, *SHAPE))) * self.inside
        self.weights = torch.tensor(rng.random((N, K, *SHAPE))) * self.organs[..., None, None, None]

    @property
    def log_p(self) -> Tensor:
        return torch.log_softmax(self.logits, dim=1)

    @property
    def p(self) -> Tensor:
        return torch.softmax(self.logits, dim=1)


def softmax(values: Sequence[float]) -> list[float]:
    exps = [math.exp(v - max(values)) for v in values]
    return [e / sum(exps) for e in exps]


def column(tensor: Tensor, voxel: tuple[int, ...]) -> list[float]:
    n, z, y, x = voxel
    return [float(v) for v in tensor[n, :, z, y, x]]


def kl(q: Sequence[float], p: Sequence[float]) -> float:
    return sum(a * math.log(a / b) for a, b in zip(q, p, strict=True) if a > 0)


def sigmoid(value: float) -> float:
    return 1 / (1 + math.exp(-value))


def gradient(term: Term, at: Tensor) -> Tensor:
    point = at.clone().requires_grad_()
    (found,) = torch.autograd.grad(term(point), point)
    return found


def descend(term: Term, start: Tensor) -> Tensor:
    point = start.clone().requires_grad_()
    optimiser = torch.optim.LBFGS(
        [point],
        max_iter=500,
        tolerance_grad=1e-12,
        tolerance_change=0,
        line_search_fn="strong_wolfe",
    )

    def again() -> Tensor:
        optimiser.zero_grad()
        loss = term(point)
        loss.backward()  # type: ignore[no-untyped-call]
        return loss

    optimiser.step(again)  # type: ignore[no-untyped-call]
    return point.detach()


def kl_of(
    batch: Batch,
    *,
    log_odds: Tensor | None = None,
    weight: Tensor | None = None,
    temperature: float = 1.0,
) -> Term:
    d = batch.log_odds if log_odds is None else log_odds
    w = batch.weight if weight is None else weight
    return lambda s: losses.kl_joint(torch.log_softmax(s, 1), d, w, temperature)


# Every term as a function of the student's logits, for what all of them must keep.
def all_terms(batch: Batch) -> dict[str, Term]:
    def merged(s: Tensor) -> Tensor:
        return losses.merge_into_background(torch.log_softmax(s, 1), batch.organs)

    return {
        "cross_entropy": lambda s: losses.cross_entropy(merged(s), batch.classes),
        "dice": lambda s: losses.dice(torch.softmax(s, 1), batch.classes, batch.organs),
        "kl_joint": kl_of(batch, temperature=2.0),
        "kl_joint merged": lambda s: losses.kl_joint(
            merged(s),
            torch.where(batch.organs[..., None, None, None], batch.log_odds, math.nan),
            batch.weight,
            1.0,
        ),
        "kl_per_teacher": lambda s: losses.kl_per_teacher(
            torch.log_softmax(s, 1), batch.log_odds, batch.weights, 1.5
        ),
        "soft_dice": lambda s: losses.soft_dice(
            torch.softmax(s, 1), batch.log_odds, batch.inside, batch.organs
        ),
    }


TERMS = tuple(all_terms(Batch(0)))


class TestMergeIntoBackground:
    @given(seeds)
    @settings(max_examples=20, deadline=None)
    def test_is_summing_probabilities(self, seed: int) -> None:
        batch = Batch(seed)
        merged = torch.softmax(losses.merge_into_background(batch.logits, batch.organs), dim=1)
        for voxel in VOXELS:
            p = softmax(column(batch.logits, voxel))
            spoken_of = batch.organs[voxel[0]].tolist()
            expected = [p[0] + sum(v for v, a in zip(p[1:], spoken_of, strict=True) if not a)]
            expected += [v if a else 0.0 for v, a in zip(p[1:], spoken_of, strict=True)]
            assert column(merged, voxel) == pytest.approx(expected, abs=1e-12)

    def test_log_probabilities_stay_log_probabilities(self) -> None:
        batch = Batch(1)
        merged = losses.merge_into_background(batch.log_p, batch.organs)
        assert torch.allclose(merged.exp().sum(1), torch.ones(N, *SHAPE, dtype=torch.float64))

    def test_all_organs_leave_the_logits_as_they_are(self) -> None:
        batch = Batch(2)
        everything = torch.ones(N, K, dtype=torch.bool)
        assert torch.equal(losses.merge_into_background(batch.logits, everything), batch.logits)

    def test_half_precision_is_raised_to_float32_and_float64_stays(self) -> None:
        batch = Batch(3)
        for half in (torch.float16, torch.bfloat16):
            found = losses.merge_into_background(batch.logits.to(half), batch.organs)
            assert found.dtype == torch.float32
        for whole in (torch.float32, torch.float64):
            found = losses.merge_into_background(batch.logits.to(whole), batch.organs)
            assert found.dtype == whole


class TestCrossEntropy:
    @given(seeds)
    @settings(max_examples=20, deadline=None)
    def test_against_a_sum_by_hand(self, seed: int) -> None:
        batch = Batch(seed)
        found = all_terms(batch)["cross_entropy"](batch.logits)
        terms = []
        for voxel in VOXELS:
            number = int(batch.classes[voxel])
            if number == IGNORE:
                continue
            p = softmax(column(batch.logits, voxel))
            spoken_of = batch.organs[voxel[0]].tolist()
            rest = sum(v for v, a in zip(p[1:], spoken_of, strict=True) if not a)
            terms.append(-math.log(p[number] if number else p[0] + rest))
        assert float(found) == pytest.approx(sum(terms) / max(1, len(terms)), rel=1e-10)

    def test_the_optimum_is_the_label(self) -> None:
        batch = Batch(4)
        batch.organs[:] = True
        reached = descend(all_terms(batch)["cross_entropy"], batch.logits)
        known = batch.classes != IGNORE
        assert torch.equal(reached.argmax(1)[known], batch.classes[known])

    def test_how_background_and_unannotated_organs_share_is_free(self) -> None:
        batch = Batch(5)
        batch.organs[:] = torch.tensor([True, False, False])
        batch.classes[batch.classes == 2] = 0
        batch.classes[batch.classes == 3] = 0
        term = all_terms(batch)["cross_entropy"]
        found = gradient(term, batch.logits)
        # Only moves that keep p_0 + p_2 + p_3 leave the loss alone: their gradients go as their p.
        share = batch.p[:, [0, 2, 3]] / batch.p[:, [0, 2, 3]].sum(1, keepdim=True)
        whole = found[:, [0, 2, 3]].sum(1, keepdim=True)
        assert torch.allclose(found[:, [0, 2, 3]], share * whole, atol=1e-12)
        moved = batch.logits.clone()
        total = torch.logsumexp(moved[:, [0, 2, 3]], dim=1, keepdim=True)
        moved[:, [0, 2, 3]] = total + torch.log(torch.tensor([0.7, 0.1, 0.2]))[:, None, None, None]
        assert float(term(moved)) == pytest.approx(float(term(batch.logits)), rel=1e-7)


class TestDice:
    @given(seeds)
    @settings(max_examples=20, deadline=None)
    def test_against_a_sum_by_hand(self, seed: int) -> None:
        batch = Batch(seed)
        found = losses.dice(batch.p, batch.classes, batch.organs)
        scores = []
        for k in range(K):
            if not batch.organs[:, k].any():
                continue
            both = size = 0.0
            for voxel in VOXELS:
                number = int(batch.classes[voxel])
                if number == IGNORE or not batch.organs[voxel[0], k]:
                    continue
                p, y = float(batch.p[voxel[0], k + 1, *voxel[1:]]), float(number == k + 1)
                both, size = both + p * y, size + p + y
            scores.append((2 * both + SMOOTH) / (size + SMOOTH))
        expected = sum(1 - s for s in scores) / max(1, len(scores))
        assert float(found) == pytest.approx(expected, rel=1e-9)

    def test_an_absent_organ_is_pushed_to_zero(self) -> None:
        batch = Batch(6)
        batch.classes[:] = 0
        batch.organs[:] = torch.tensor([True, False, False])
        found = gradient(all_terms(batch)["dice"], batch.logits)
        assert (found[:, 1] > 0).all()

    def test_perfect_is_zero_and_the_gradient_leads_there(self) -> None:
        batch = Batch(7)
        batch.organs[:] = True
        batch.classes = torch.arange(batch.classes.numel()).reshape(batch.classes.shape) % (K + 1)
        term = all_terms(batch)["dice"]
        batch.classes[0, 0] = IGNORE
        known = batch.classes != IGNORE
        perfect = torch.nn.functional.one_hot(batch.classes * known, K + 1).permute(0, 4, 1, 2, 3)
        assert float(term(40.0 * perfect)) == pytest.approx(0, abs=1e-9)
        reached = descend(term, batch.logits / 10)
        assert torch.equal(reached.argmax(1)[known], batch.classes[known])


class TestKlJoint:
    @given(seeds, st.sampled_from([0.5, 1.0, 2.0, 4.0]))
    @settings(max_examples=20, deadline=None)
    def test_against_a_sum_by_hand(self, seed: int, temperature: float) -> None:
        batch = Batch(seed)
        batch.log_odds[0, 1] = math.nan
        found = kl_of(batch, temperature=temperature)(batch.logits)
        total = 0.0
        for voxel in VOXELS:
            d = [v / temperature for v in column(batch.log_odds, voxel)]
            q = softmax([0.0, *(-1e9 if math.isnan(v) else v for v in d)])
            p = softmax([v / temperature for v in column(batch.logits, voxel)])
            total += float(batch.weight[voxel]) * kl(q, p)
        expected = temperature**2 * total / float(batch.weight.sum())
        assert float(found) == pytest.approx(expected, rel=1e-7)

    @pytest.mark.parametrize("temperature", [1.0, 3.0])
    def test_zero_with_zero_gradient_at_its_target(self, temperature: float) -> None:
        batch = Batch(8)
        term = kl_of(batch, temperature=temperature)
        target = torch.cat([torch.zeros(N, 1, *SHAPE), batch.log_odds], dim=1) + 1.7
        assert float(term(target)) == pytest.approx(0, abs=1e-12)
        assert gradient(term, target).abs().max() < 1e-12
        assert gradient(term, target + torch.randn_like(target)).abs().max() > 1e-4

    def test_descent_reaches_the_joint_target(self) -> None:
        batch = Batch(9)
        batch.weight[:] = 1.0
        reached = torch.softmax(descend(kl_of(batch), batch.logits), dim=1)
        target = torch.softmax(losses.joint_target(batch.log_odds, 1.0), dim=1)
        assert torch.allclose(reached, target, atol=2e-3)

    def test_no_weight_is_zero(self) -> None:
        batch = Batch(10)
        term = kl_of(batch, weight=torch.zeros(N, *SHAPE))
        assert float(term(batch.logits)) == 0
        assert not gradient(term, batch.logits).any()


class TestKlPerTeacher:
    @given(seeds, st.sampled_from([1.0, 2.5]))
    @settings(max_examples=20, deadline=None)
    def test_against_a_sum_by_hand(self, seed: int, temperature: float) -> None:
        batch = Batch(seed)
        found = losses.kl_per_teacher(batch.log_p, batch.log_odds, batch.weights, temperature)
        terms = []
        for k in range(K):
            if not batch.weights[:, k].any():
                continue
            total = 0.0
            for voxel in VOXELS:
                p = softmax(column(batch.logits, voxel))
                e = math.log(p[k + 1]) - math.log(sum(p) - p[k + 1])
                q = sigmoid(column(batch.log_odds, voxel)[k] / temperature)
                own = sigmoid(e / temperature)
                weight = float(batch.weights[voxel[0], k, *voxel[1:]])
                total += weight * kl([q, 1 - q], [own, 1 - own])
            terms.append(temperature**2 * total / float(batch.weights[:, k].sum()))
        expected = sum(terms) / max(1, len(terms))
        assert float(found) == pytest.approx(expected, rel=1e-7)

    def test_zero_with_zero_gradient_where_one_teacher_is_matched(self) -> None:
        batch = Batch(11)
        only = torch.zeros(N, K, *SHAPE)
        only[:, 1] = 1.0
        # s_2 = d_2 + logsumexp(all others): the student's own log-odds are the teacher's.
        matched = batch.logits.clone()
        matched[:, 2] = batch.log_odds[:, 1] + torch.logsumexp(matched[:, [0, 1, 3]], dim=1)

        def term(s: Tensor) -> Tensor:
            return losses.kl_per_teacher(torch.log_softmax(s, 1), batch.log_odds, only, 2.0)

        assert float(term(matched)) == pytest.approx(0, abs=1e-12)
        assert gradient(term, matched).abs().max() < 1e-10
        assert gradient(term, batch.logits).abs().max() > 1e-4

    def test_sure_teachers_lose_no_digits(self) -> None:
        log_odds = torch.full((1, 1, 1, 1, 1), 1e4)
        logits = torch.tensor([0.0, 3.0]).reshape(1, 2, 1, 1, 1)
        weights = torch.ones_like(log_odds)
        found = losses.kl_per_teacher(torch.log_softmax(logits, 1), log_odds, weights, 1.0)
        assert float(found) == pytest.approx(-math.log(sigmoid(3.0)), rel=1e-5)


class TestSoftDice:
    @given(seeds)
    @settings(max_examples=20, deadline=None)
    def test_against_a_sum_by_hand(self, seed: int) -> None:
        batch = Batch(seed)
        found = losses.soft_dice(batch.p, batch.log_odds, batch.inside, batch.organs)
        scores = []
        for k in range(K):
            if not batch.organs[:, k].any():
                continue
            both = size = 0.0
            for voxel in VOXELS:
                if not batch.inside[voxel] or not batch.organs[voxel[0], k]:
                    continue
                p = float(batch.p[voxel[0], k + 1, *voxel[1:]])
                q = softmax([0.0, *column(batch.log_odds, voxel)])[k + 1]
                both, size = both + p * q, size + p * p + q * q
            scores.append((2 * both + SMOOTH) / (size + SMOOTH))
        expected = sum(1 - s for s in scores) / max(1, len(scores))
        assert float(found) == pytest.approx(expected, rel=1e-9)

    def test_zero_with_zero_gradient_at_its_soft_target_and_descent_reaches_it(self) -> None:
        batch = Batch(12)
        batch.organs[:] = True
        batch.inside[:] = True
        term = all_terms(batch)["soft_dice"]
        target = losses.joint_target(batch.log_odds, 1.0)
        assert float(term(target)) == pytest.approx(0, abs=1e-12)
        assert gradient(term, target).abs().max() < 1e-12
        # Nothing about softness: a hard prediction is no optimum.
        assert float(term(100 * target)) > 0.01
        reached = torch.softmax(descend(term, batch.logits), dim=1)
        assert torch.allclose(reached, torch.softmax(target, dim=1), atol=5e-3)


class TestFeatureCosine:
    SIZE = (2, 5, 2, 3, 2)

    def _features(self, seed: int) -> tuple[Tensor, Tensor, Tensor]:
        generator = torch.Generator().manual_seed(seed)
        a, t = (torch.randn(self.SIZE, generator=generator, dtype=torch.float64) for _ in range(2))
        cells = torch.rand((2, 2, 3, 2), generator=generator) < 0.5
        return a, t, cells

    @given(seeds)
    @settings(max_examples=20, deadline=None)
    def test_against_a_sum_by_hand(self, seed: int) -> None:
        a, t, cells = self._features(seed)
        t[1, 2, 0, 1, 0] = math.nan
        other = torch.zeros_like(cells)
        other[:, 0] = True
        expected = 0.0
        for region in (cells, other):
            terms = []
            for n, z, y, x in product(range(2), range(2), range(3), range(2)):
                u, v = a[n, :, z, y, x].numpy(), t[n, :, z, y, x].numpy()
                if region[n, z, y, x] and np.isfinite(v).all():
                    terms.append(1 - u @ v / np.linalg.norm(u) / np.linalg.norm(v))
            expected += sum(terms) / max(1, len(terms))
        found = losses.feature_cosine(a, t, cells, other)
        assert float(found) == pytest.approx(expected, rel=1e-9)

    @pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
    def test_cells_that_nobody_saw_teach_nothing_and_spread_nothing(self, bad: float) -> None:
        a, t, cells = self._features(1)
        cells[:] = True
        t[0, :, 1, 2, 1] = bad
        found = gradient(lambda x: losses.feature_cosine(x, t, cells), a)
        assert torch.isfinite(found).all()
        assert not found[0, :, 1, 2, 1].any()
        assert found[0, :, 0, 0, 0].any()

    def test_the_optimum_is_the_teachers_direction(self) -> None:
        a, t, cells = self._features(2)
        cells[:] = True

        def term(x: Tensor) -> Tensor:
            return losses.feature_cosine(x, t, cells)

        assert float(term(3 * t)) == pytest.approx(0, abs=1e-12)
        assert gradient(term, 3 * t).abs().max() < 1e-12
        reached = descend(term, a)
        assert float(term(reached)) < 1e-3

    def test_no_cells_is_zero_and_a_zero_feature_is_no_nan(self) -> None:
        a, t, cells = self._features(3)
        assert float(losses.feature_cosine(a, t, torch.zeros_like(cells))) == 0
        assert float(losses.feature_cosine(a, t)) == 0
        found = gradient(
            lambda x: losses.feature_cosine(x, t, torch.ones_like(cells)), torch.zeros_like(a)
        )
        assert torch.isfinite(found).all()


class TestCells:
    @given(seeds, st.sampled_from([(1, 1, 1), (2, 2, 2), (1, 2, 4), (3, 2, 1)]))
    @settings(max_examples=30, deadline=None)
    def test_against_brute_force(self, seed: int, stride: tuple[int, int, int]) -> None:
        size = tuple(2 * s for s in stride)
        generator = torch.Generator().manual_seed(seed)
        region = torch.rand((2, *size), generator=generator) < 0.7
        touched, filled = losses.touched_cells(region, stride), losses.filled_cells(region, stride)
        assert touched.shape == filled.shape == (2, 2, 2, 2)
        for n, z, y, x in product(range(2), repeat=4):
            corner = [i * s for i, s in zip((z, y, x), stride, strict=True)]
            box = tuple(slice(c, c + s) for c, s in zip(corner, stride, strict=True))
            assert touched[n, z, y, x] == region[n][box].any()
            assert filled[n, z, y, x] == region[n][box].all()


class TestEveryTerm:
    @pytest.mark.parametrize("name", TERMS)
    def test_gradcheck(self, name: str) -> None:
        batch = Batch(20)
        point = batch.logits.clone().requires_grad_()
        assert torch.autograd.gradcheck(all_terms(batch)[name], (point,))

    def test_gradcheck_of_features(self) -> None:
        generator = torch.Generator().manual_seed(0)
        a, t = (
            torch.randn((2, 3, 2, 1, 2), generator=generator, dtype=torch.float64) for _ in range(2)
        )
        t[0, 0, 0, 0, 0] = math.nan
        cells = torch.ones((2, 2, 1, 2), dtype=torch.bool)
        point = a.requires_grad_()
        assert torch.autograd.gradcheck(lambda x: losses.feature_cosine(x, t, cells), (point,))

    @pytest.mark.parametrize("name", TERMS)
    def test_a_voxel_outside_every_region_has_no_gradient(self, name: str) -> None:
        batch = Batch(21)
        here = (1, slice(None), 2, 0, 3)
        batch.classes[1, 2, 0, 3] = IGNORE
        batch.inside[1, 2, 0, 3] = False
        batch.weight[1, 2, 0, 3] = 0
        batch.weights[here] = 0
        found = gradient(all_terms(batch)[name], batch.logits)
        assert not found[here].any()
        assert found.any()

    @pytest.mark.parametrize("name", TERMS)
    def test_the_order_of_organs_does_not_matter(self, name: str) -> None:
        batch, other = Batch(22), Batch(22)
        order = [2, 0, 1]
        old_to_new = torch.full((IGNORE + 1,), IGNORE)
        old_to_new[0] = 0
        for new, old in enumerate(order):
            old_to_new[old + 1] = new + 1
        other.log_odds, other.organs = batch.log_odds[:, order], batch.organs[:, order]
        other.weights, other.classes = batch.weights[:, order], old_to_new[batch.classes]
        channels = [0, *(k + 1 for k in order)]
        here = all_terms(batch)[name](batch.logits)
        there = all_terms(other)[name](batch.logits[:, channels])
        assert float(here) == pytest.approx(float(there), rel=1e-10)
        assert torch.allclose(
            gradient(all_terms(batch)[name], batch.logits)[:, channels],
            gradient(all_terms(other)[name], batch.logits[:, channels]),
            atol=1e-12,
        )

    @pytest.mark.parametrize("name", TERMS)
    @pytest.mark.parametrize("scale", [1e4, 65504.0])
    def test_sure_and_unseen_teachers_give_no_nan(self, name: str, scale: float) -> None:
        batch = Batch(23)
        batch.logits = (100 * batch.logits).float()
        batch.log_odds = (scale * torch.sign(batch.log_odds)).float()
        batch.log_odds[0, 1] = math.nan
        batch.log_odds[1, :, 0] = math.nan
        term = all_terms(batch)[name]
        assert torch.isfinite(term(batch.logits))
        assert torch.isfinite(gradient(term, batch.logits)).all()

    @pytest.mark.parametrize("name", TERMS)
    def test_nothing_to_learn_from_is_zero(self, name: str) -> None:
        batch = Batch(24)
        batch.classes[:] = IGNORE
        batch.organs[:] = False
        batch.inside[:] = False
        batch.weight[:] = 0
        batch.weights[:] = 0
        term = all_terms(batch)[name]
        assert float(term(batch.logits)) == 0

    def test_half_precision_logits_are_summed_in_float32(self) -> None:
        batch = Batch(25)
        for term in all_terms(batch).values():
            half = batch.logits.half()
            assert float(term(losses.softmax_both(half)[0])) == pytest.approx(
                float(term(half.double())), rel=1e-4
            )
