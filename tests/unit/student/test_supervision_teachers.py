"""What the log-odds and features of teachers teach."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from pipeline.student import losses
from pipeline.student.supervision import Batch, batch_loss, believed, contradicted
from tests.unit.student.fixed import (
    NAN,
    SHAPE,
    Fixed,
    K,
    config,
    gradient,
    grid,
    make_batch,
    some_logits,
    terms_of,
)
from tests.unit.student.terms import one_target


class TestOneTarget:
    """At voxels 5 and 7 the expert of organ 1 is silent: there the other one alone speaks."""

    @staticmethod
    def _of(log_odds: Tensor) -> list[float]:
        return [float(x) for x in one_target(some_logits(), log_odds)]

    def test_the_two_terms_are_those_of_the_log_odds_in_which_labels_have_won(self) -> None:
        d = make_batch().log_odds
        assert d is not None
        assert list(terms_of(config()).values()) == pytest.approx(self._of(d))

    def test_the_label_speaks_where_it_is_and_the_expert_beside_it(self) -> None:
        """Voxel 0 is organ 0 by the label, voxel 2 organ 1 by its expert, voxel 4 background."""
        found = gradient(config()).flatten(2)[0]
        assert [int(found[:, voxel].argmin()) for voxel in (0, 2, 4)] == [1, 2, 0]

    def test_weight_shares_between_the_target_and_labels_alone(self) -> None:
        one, labels = terms_of(config()), terms_of(config("marginal"))
        decaying = config(logits={"schedule": "decay"})
        for fraction in (0.0, 0.25, 1.0):
            found = terms_of(decaying, fraction=fraction)
            for name in ("cross_entropy", "dice"):
                between = (1 - fraction) * one[name] + fraction * labels[name]
                assert found[name] == pytest.approx(between), (name, fraction)

    def test_within_the_margin_a_word_does_not_count(self) -> None:
        d = make_batch().log_odds
        assert d is not None
        found = list(terms_of(config(margin=2.5)).values())
        assert found == pytest.approx(self._of(d.masked_fill(d.abs() <= 2.5, NAN)))
        assert found != pytest.approx(self._of(d))

    def test_hard_targets_are_those_of_hard_log_odds(self) -> None:
        d = make_batch().log_odds
        assert d is not None
        found = list(terms_of(config(logits={"hard": True})).values())
        assert found == pytest.approx(self._of(losses.hard(d)))
        assert found != pytest.approx(self._of(d))

    def test_with_hard_targets_cross_entropy_is_that_of_pseudo_labels(self) -> None:
        d = make_batch().log_odds
        assert d is not None
        everybody = make_batch(log_odds=d.nan_to_num(nan=-3.0))
        hard = terms_of(config(logits={"hard": True}), everybody)["cross_entropy"]
        pseudo = terms_of(config("pseudo_label"), everybody)["cross_entropy"]
        assert hard == pytest.approx(pseudo)

    def test_nobody_speaks_is_zero_and_no_nan(self) -> None:
        d = make_batch().log_odds
        assert d is not None
        nowhere = make_batch(log_odds=torch.full_like(d, NAN))
        assert list(terms_of(config(), nowhere).values()) == pytest.approx([0, 0], abs=1e-9)
        assert torch.isfinite(gradient(config(), nowhere)).all()


class TestFeaturesTerm:
    # One cell of 2 x 2 x 2 voxels in two samples.
    def _batch(self, **changes: Any) -> Batch:
        organ = torch.zeros(2, K, *SHAPE, dtype=torch.bool)
        organ[0, 0, 0, 0, 0] = True
        values: dict[str, Any] = {
            "image": torch.zeros(2, 1, *SHAPE),
            "classes": torch.zeros((2, *SHAPE), dtype=torch.int64),
            "annotated": torch.ones((2, K), dtype=torch.bool),
            "known": torch.ones((2, K), dtype=torch.bool),
            "log_odds": torch.where(organ, 1.0, -1.0).double(),
            "body": torch.ones((2, *SHAPE), dtype=torch.bool),
            "features": {("one", "a"): torch.eye(2).flip(0)[..., None, None, None]},
        }
        return Batch(**(values | changes))

    STUDENT = torch.tensor([[1.0, 1.0], [1.0, 1.0]], dtype=torch.float64)[..., None, None, None]
    SETTINGS = config(features={"student_taps": "x", "weight": 1.0, "ramp": 0, "background": 0.5})
    LOGITS = torch.zeros(2, K + 1, *SHAPE, dtype=torch.float64)

    def _term(self, batch: Batch) -> float:
        return terms_of(self.SETTINGS, batch, self.LOGITS, feature=self.STUDENT)["features"]

    APART = 1 - math.sqrt(0.5)

    def test_organ_and_background_are_averaged_apart_each_with_its_weight(self) -> None:
        # Cell 0 is touched by organ 0, all else is background; both cells are at 45 degrees.
        assert self._term(self._batch()) == pytest.approx(1.5 * self.APART, rel=1e-6)

    def test_a_cell_counts_by_its_share_of_a_region(self) -> None:
        target = self._batch().features[("one", "a")].clone()
        target[0] = 1  # as the student's: what is left is cell 1, of 8 background voxels in 15
        batch = self._batch(features={("one", "a"): target})
        assert self._term(batch) == pytest.approx(0.5 * 8 / 15 * self.APART, rel=1e-6)

    def test_air_is_no_background(self) -> None:
        target = self._batch().features[("one", "a")].clone()
        target[0] = 1
        body = torch.zeros((2, *SHAPE), dtype=torch.bool)
        body[:, 0] = True
        batch = self._batch(features={("one", "a"): target}, body=body)
        assert self._term(batch) == pytest.approx(0.5 * 4 / 7 * self.APART, rel=1e-6)
        none = self._batch(body=torch.zeros_like(body))
        assert self._term(none) == pytest.approx(self.APART, rel=1e-6)

    def test_only_the_teachers_own_organs_count(self) -> None:
        features = self._batch().features[("one", "a")]
        batch = self._batch(features={("two", "a"): features})
        assert self._term(batch) == pytest.approx(0.5 * self.APART, rel=1e-6)

    def test_it_is_the_mean_over_taps(self) -> None:
        feature = self._batch().features[("one", "a")]
        batch = self._batch(features={("one", "a"): feature, ("both", "b"): -feature})
        apart = self.APART + (2 - self.APART)
        assert self._term(batch) == pytest.approx(1.5 * apart / 2, rel=1e-6)

    def test_unseen_cells_are_left_out(self) -> None:
        features = self._batch().features[("one", "a")].clone()
        features[0] = NAN
        batch = self._batch(features={("one", "a"): features})
        assert self._term(batch) == pytest.approx(0.5 * self.APART, rel=1e-6)


class TestAgreement:
    """From some step on a teacher's word counts only where the student says the same."""

    AFTER = config(reliability={"agree_after": 0.2}, logits={"schedule": "constant"})

    @staticmethod
    def _sure_of(organ: int) -> Tensor:
        logits = torch.zeros((1, K + 1, *SHAPE), dtype=torch.float64)
        logits[:, organ + 1] = 4
        return logits

    def test_both_words_of_teachers_are_overruled_but_labels_are_not(self) -> None:
        # Voxels 0 and 1 are organ 0 by the label, 5 is ignored and unseen by the second teacher.
        everywhere = contradicted(self._sure_of(1), make_batch())[0]
        assert everywhere[1].flatten().tolist() == [False] * 4 + [True, False, True, False]
        nowhere = contradicted(self._sure_of(0), make_batch())[0]
        assert nowhere[1].flatten().tolist() == [False, False, True, True, *[False] * 4]
        # Organ 0 is annotated: its teacher is asked at the ignored voxel alone, where it says yes.
        assert everywhere[0].flatten().tolist() == [*[False] * 5, True, False, False]
        assert not nowhere[0].any()

    def test_who_contradicts_is_silent_from_then_on(self) -> None:
        logits, batch = self._sure_of(1), make_batch()
        before = terms_of(self.AFTER, logits=logits, fraction=0.19)
        constant = config(logits={"schedule": "constant"})
        assert before == terms_of(constant, logits=logits, fraction=0.19)
        assert batch.log_odds is not None
        silent = batch.log_odds.masked_fill(contradicted(logits, batch), NAN)
        found = list(terms_of(self.AFTER, logits=logits, fraction=0.2).values())
        assert found == pytest.approx([float(x) for x in one_target(logits, silent)])

    def test_the_share_that_is_believed_is_told(self) -> None:
        logits, told = self._sure_of(1), dict[str, Any]()
        batch_loss(self.AFTER, Fixed(logits), make_batch(), 0.5, told)
        # Organ 0 at voxel 5 alone; organ 1 at 2, 3, 4 and 6.
        assert told == {"believed": [0.0, 0.5]}
        told.clear()
        batch_loss(self.AFTER, Fixed(logits), make_batch(), 0.1, told)
        batch_loss(config(), Fixed(logits), make_batch(), 0.5, told)
        assert not told
        known = make_batch(classes=grid(1, 1, 0, 0, 0, 0, 0, 0).long())
        assert believed(logits, known)[0] is None
