"""Terms by labels: what each of them is for. What all must keep: test_losses_every_term.py."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.data.labels import IGNORE
from pipeline.student import losses
from tests.unit.student import slow_losses as slow
from tests.unit.student.terms import SHAPE, K, N, RandomBatch, all_terms, descend, gradient


class TestMergeIntoBackground:
    @given(st.integers(0, 10_000))
    @settings(max_examples=20, deadline=None)
    def test_is_summing_probabilities(self, seed: int) -> None:
        batch = RandomBatch(seed)
        merged = torch.softmax(losses.merge_into_background(batch.logits, batch.organs), dim=1)
        p = slow.softmax(batch.logits.numpy())
        spoken_of = batch.organs.numpy()[:, :, None, None, None]
        free = (p[:, 1:] * ~spoken_of).sum(axis=1)
        assert merged[:, 0].numpy() == pytest.approx(p[:, 0] + free, abs=1e-12)
        assert merged[:, 1:].numpy() == pytest.approx(p[:, 1:] * spoken_of, abs=1e-12)

    def test_log_probabilities_stay_log_probabilities(self) -> None:
        batch = RandomBatch(1)
        merged = losses.merge_into_background(batch.log_p, batch.organs)
        assert torch.allclose(merged.exp().sum(1), torch.ones(N, *SHAPE, dtype=torch.float64))

    def test_all_organs_leave_the_logits_as_they_are(self) -> None:
        batch = RandomBatch(2)
        everything = torch.ones(N, K, dtype=torch.bool)
        assert torch.equal(losses.merge_into_background(batch.logits, everything), batch.logits)

    def test_half_precision_is_raised_to_float32_and_float64_stays(self) -> None:
        batch = RandomBatch(3)
        for half in (torch.float16, torch.bfloat16):
            found = losses.merge_into_background(batch.logits.to(half), batch.organs)
            assert found.dtype == torch.float32
        for whole in (torch.float32, torch.float64):
            found = losses.merge_into_background(batch.logits.to(whole), batch.organs)
            assert found.dtype == whole


def full_labels(seed: int) -> RandomBatch:
    """Every organ is annotated and in the image; a plane is ignored."""
    batch = RandomBatch(seed)
    batch.organs[:] = True
    batch.classes = torch.arange(batch.classes.numel()).reshape(batch.classes.shape) % (K + 1)
    batch.classes[0, 0] = IGNORE
    return batch


class TestCrossEntropy:
    def test_the_optimum_is_the_label(self) -> None:
        batch = full_labels(4)
        reached = descend(all_terms(batch)["cross_entropy"], batch.logits)
        known = batch.classes != IGNORE
        assert torch.equal(reached.argmax(1)[known], batch.classes[known])

    def test_how_background_and_unannotated_organs_share_is_free(self) -> None:
        batch = RandomBatch(5)
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
    def test_an_absent_organ_is_pushed_to_zero(self) -> None:
        batch = RandomBatch(6)
        batch.classes[:] = 0
        batch.organs[:] = torch.tensor([True, False, False])
        found = gradient(all_terms(batch)["dice"], batch.logits)
        assert (found[:, 1] > 0).all()

    def test_perfect_is_zero_and_the_gradient_leads_there(self) -> None:
        batch = full_labels(7)
        term = all_terms(batch)["dice"]
        known = batch.classes != IGNORE
        perfect = torch.nn.functional.one_hot(batch.classes * known, K + 1).permute(0, 4, 1, 2, 3)
        assert float(term(40.0 * perfect)) == pytest.approx(0, abs=1e-9)
        reached = descend(term, batch.logits / 10)
        assert torch.equal(reached.argmax(1)[known], batch.classes[known])


EXCLUSION = ("exclusion_dice", "exclusion_cross_entropy")


@pytest.mark.parametrize("name", EXCLUSION)
class TestExclusion:
    def _batch(self) -> RandomBatch:
        """Organ 1 alone is annotated, in sample 0; organ 2 alone in sample 1."""
        batch = RandomBatch(8)
        batch.organs[:] = torch.tensor([[True, False, False], [False, True, False]])
        batch.classes[:] = 0
        batch.classes[0, 0], batch.classes[1, 1:] = 1, 2
        batch.classes[:, :, 0, 0] = IGNORE
        return batch

    def test_zero_just_where_no_unannotated_organ_overlaps_a_label(self, name: str) -> None:
        batch = self._batch()
        term = all_terms(batch)[name]
        taken = ((batch.classes > 0) & (batch.classes != IGNORE))[:, None]
        free = ~batch.organs[:, :, None, None, None]
        apart = batch.logits.clone()
        apart[:, 1:] = torch.where(free & taken, -60.0, apart[:, 1:])
        assert float(term(apart)) == pytest.approx(0, abs=1e-12)
        assert gradient(term, apart).abs().max() < 1e-12
        assert float(term(batch.logits)) > 0.01

    def test_it_pushes_unannotated_organs_out_of_labels(self, name: str) -> None:
        batch = self._batch()
        found = gradient(all_terms(batch)[name], batch.logits)
        inside = batch.classes[0] == 1
        # Organ 1 is there by label; 2 and 3 cannot be.
        assert (found[0, 2][inside] > 0).any()
        assert (found[0, 2:].sum(0)[inside] > 0).all()
        assert (found[0, :2].sum(0)[inside] < 0).all()

    def test_descent_empties_the_overlap(self, name: str) -> None:
        batch = self._batch()
        term = all_terms(batch)[name]
        assert float(term(descend(term, batch.logits))) < 1e-3 * float(term(batch.logits))

    def test_full_labels_and_empty_labels_leave_nothing_to_exclude(self, name: str) -> None:
        batch = full_labels(9)
        assert float(all_terms(batch)[name](batch.logits)) == 0
        batch = self._batch()
        batch.classes[batch.classes != IGNORE] = 0
        assert float(all_terms(batch)[name](batch.logits)) == 0
        assert not gradient(all_terms(batch)[name], batch.logits).any()

    def test_an_organ_that_a_sample_annotates_is_not_excluded_in_it(self, name: str) -> None:
        batch = self._batch()
        found = gradient(all_terms(batch)[name], batch.logits)
        batch.organs[0, 2] = True  # organ 3 is annotated in sample 0 as well, and nowhere in it
        changed = gradient(all_terms(batch)[name], batch.logits)
        inside = batch.classes[0] == 1
        assert (found[0, 3][inside] > changed[0, 3][inside]).all()
        assert (changed[0, 3][inside] < 0).all()


class TestMaskedBce:
    def test_the_optimum_is_the_label_of_annotated_organs(self) -> None:
        batch = RandomBatch(10)
        batch.organs[:] = torch.tensor([[True, False, True], [False, True, True]])
        batch.classes[0][batch.classes[0] == 2] = 0
        batch.classes[1][batch.classes[1] == 1] = 0
        reached = descend(all_terms(batch)["masked_bce"], batch.logits)
        known = batch.classes != IGNORE
        for n, k in ((0, 0), (0, 2), (1, 1), (1, 2)):
            found = reached[n, k + 1] > 0
            assert torch.equal(found[known[n]], (batch.classes[n] == k + 1)[known[n]])

    def test_an_unannotated_organ_is_let_alone(self) -> None:
        batch = RandomBatch(11)
        batch.organs[:] = torch.tensor([[True, False, True], [True, True, True]])
        for name in ("masked_bce", "dice of sigmoid"):
            found = gradient(all_terms(batch)[name], batch.logits)
            assert not found[0, 2].any()
            assert found[1, 2].any()

    def test_infinite_logits_of_what_is_not_asked_spread_nothing(self) -> None:
        batch = RandomBatch(12)
        batch.organs[:] = torch.tensor([True, False, True])
        batch.logits[:, 2] = torch.inf
        term = all_terms(batch)["masked_bce"]
        assert torch.isfinite(term(batch.logits))
        assert torch.isfinite(gradient(term, batch.logits)).all()
