"""What every term of the loss must keep, whatever it teaches."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.data.labels import IGNORE
from pipeline.student import losses
from tests.unit.student.terms import TERMS, RandomBatch, all_terms, gradient, slow_terms

every_term = pytest.mark.parametrize("name", TERMS)


@every_term
@given(seed=st.integers(0, 10_000), silent=st.sampled_from([0.0, 0.3]))
@settings(max_examples=10, deadline=None)
def test_against_loops_over_voxels(name: str, seed: int, silent: float) -> None:
    batch = RandomBatch(seed, silent=silent)
    found = float(all_terms(batch)[name](batch.logits))
    assert found == pytest.approx(slow_terms(batch)[name](), rel=1e-7, abs=1e-9)


@every_term
def test_gradcheck(name: str) -> None:
    batch = RandomBatch(20)
    point = batch.logits.clone().requires_grad_()
    assert torch.autograd.gradcheck(all_terms(batch)[name], (point,))


@every_term
def test_a_voxel_of_which_nobody_speaks_has_no_gradient(name: str) -> None:
    batch = RandomBatch(21)
    batch.organs[1, 0], batch.organs[1, 2] = True, False
    here = (1, slice(None), 2, 0, 3)
    batch.classes[1, 2, 0, 3] = IGNORE
    batch.log_odds[here] = math.nan
    found = gradient(all_terms(batch)[name], batch.logits)
    assert not found[here].any()
    assert found.any()


@every_term
def test_the_order_of_organs_does_not_matter(name: str) -> None:
    batch, other = RandomBatch(22), RandomBatch(22)
    order = [2, 0, 1]
    old_to_new = torch.full((IGNORE + 1,), IGNORE)
    old_to_new[0] = 0
    for new, old in enumerate(order):
        old_to_new[old + 1] = new + 1
    other.log_odds, other.organs = batch.log_odds[:, order], batch.organs[:, order]
    other.classes = old_to_new[batch.classes]
    channels = [0, *(k + 1 for k in order)]
    here = all_terms(batch)[name](batch.logits)
    there = all_terms(other)[name](batch.logits[:, channels])
    assert float(here) == pytest.approx(float(there), rel=1e-10)
    assert torch.allclose(
        gradient(all_terms(batch)[name], batch.logits)[:, channels],
        gradient(all_terms(other)[name], batch.logits[:, channels]),
        atol=1e-12,
    )


@every_term
@pytest.mark.parametrize("size", [1e4, 65504.0, 1e30, math.inf])
def test_sure_and_unseen_teachers_and_a_sure_student_give_no_nan(name: str, size: float) -> None:
    batch = RandomBatch(23)
    batch.logits = (100 * batch.logits).float()
    batch.log_odds = (size * torch.sign(batch.log_odds)).float()
    batch.log_odds[0, 1] = math.nan
    batch.log_odds[1, :, 0] = math.nan
    term = all_terms(batch)[name]
    assert torch.isfinite(term(batch.logits))
    assert torch.isfinite(gradient(term, batch.logits)).all()


@every_term
def test_nothing_to_learn_from_is_zero_and_still_has_a_gradient(name: str) -> None:
    """A process without anything to learn goes back through the sums with the others."""
    batch = RandomBatch(24)
    batch.classes[:] = IGNORE
    batch.organs[:] = False
    batch.log_odds[:] = math.nan
    term = all_terms(batch)[name]
    assert float(term(batch.logits)) == 0
    assert not gradient(term, batch.logits).any()


@every_term
def test_half_precision_logits_are_summed_in_float32(name: str) -> None:
    batch = RandomBatch(25)
    half = batch.logits.half()
    term = all_terms(batch)[name]
    assert float(term(losses.softmax_both(half)[0])) == pytest.approx(
        float(term(torch.log_softmax(half.double(), 1))), rel=1e-4
    )
