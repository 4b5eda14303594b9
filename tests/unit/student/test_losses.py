"""Terms by labels: what each of them is for. What all must keep: test_losses_every_term.py."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.student import losses
from tests.unit.student import slow_losses as slow
from tests.unit.student.terms import K, N, RandomBatch, all_terms, gradient


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


class TestMaskedBce:
    def test_infinite_logits_of_what_is_not_asked_spread_nothing(self) -> None:
        batch = RandomBatch(12)
        batch.organs[:] = torch.tensor([True, False, True])
        batch.logits[:, 2] = torch.inf
        term = all_terms(batch)["masked_bce"]
        assert torch.isfinite(term(batch.logits))
        assert torch.isfinite(gradient(term, batch.logits)).all()
