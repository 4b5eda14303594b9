"""What the kinds of supervision by labels, true or pseudo, teach."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from pipeline.data.labels import IGNORE
from pipeline.student.settings import LABELS_ALONE, Kind
from pipeline.student.supervision import pseudo_labels
from tests.unit.student.fixed import (
    NAN,
    SEEN,
    SHAPE,
    config,
    dice_of,
    gradient,
    grid,
    make_batch,
    p_of,
    some_logits,
    terms_of,
)


class TestLabelsAlone:
    def test_naive_takes_the_missing_organ_for_background(self) -> None:
        p = p_of(some_logits())
        found = terms_of(config("naive"))
        picked = torch.where(make_batch().classes == 1, p[:, 1], p[:, 0])
        assert found["cross_entropy"] == pytest.approx(float(-picked[SEEN].log().mean()))
        liver = dice_of(p[:, 1], (make_batch().classes == 1).double(), SEEN)
        absent = dice_of(p[:, 2], torch.zeros(1, *SHAPE), SEEN)
        assert found["dice"] == pytest.approx((liver + absent) / 2)

    def test_marginal_leaves_the_missing_organ_free(self) -> None:
        p = p_of(some_logits())
        found = terms_of(config("marginal"))
        picked = torch.where(make_batch().classes == 1, p[:, 1], p[:, 0] + p[:, 2])
        assert found["cross_entropy"] == pytest.approx(float(-picked[SEEN].log().mean()))
        liver = dice_of(p[:, 1], (make_batch().classes == 1).double(), SEEN)
        assert found["dice"] == pytest.approx(liver)

    def test_they_differ_by_the_push_on_the_missing_organ(self) -> None:
        # Along a move from background to the organ that nobody labelled, marginal is flat.
        p = p_of(some_logits())
        naive, marginal = gradient(config("naive")), gradient(config("marginal"))
        share = p[:, 0] / (p[:, 0] + p[:, 2])
        along = marginal[:, 2] * share - marginal[:, 0] * (1 - share)
        assert along.abs().max() < 1e-12
        assert (naive[:, 2][make_batch().classes == 0] > 0).all()

    def test_full_is_plain_cross_entropy_and_dice(self) -> None:
        batch = make_batch(
            annotated=torch.tensor([[True, True]]),
            classes=grid(1, 1, 2, 2, 0, 0, 0, 0, dtype=torch.int64),
        )
        found = terms_of(config("full"), batch)
        expected = nn.functional.cross_entropy(some_logits(), batch.classes)
        assert found["cross_entropy"] == pytest.approx(float(expected))

    @pytest.mark.parametrize("kind", LABELS_ALONE)
    def test_teachers_are_not_looked_at(self, kind: Kind) -> None:
        batch = make_batch(log_odds=None)
        assert terms_of(config(kind), batch) == terms_of(config(kind))
        assert not config(kind).uses_teachers

    def test_an_ignored_voxel_teaches_nothing(self) -> None:
        for kind in LABELS_ALONE:
            found = gradient(config(kind))
            assert not found[0, :, 1, 0, 1].any()
            assert found[0, :, 1, 0, 0].any()


class TestPseudoLabels:
    def test_labels_win_by_what_was_done_to_the_log_odds_and_unseen_is_ignored(self) -> None:
        found = pseudo_labels(make_batch())
        assert found.flatten().tolist() == [1, 1, 2, 2, 0, IGNORE, 0, IGNORE]
        assert found.dtype == torch.int64

    def test_an_organ_that_nobody_knows_is_not_waited_for(self) -> None:
        log_odds = make_batch().log_odds
        assert log_odds is not None
        log_odds[:, 1] = NAN
        batch = make_batch(log_odds=log_odds, known=torch.tensor([[True, False]]))
        assert pseudo_labels(batch).flatten().tolist() == [1, 1, 0, 0, 0, 1, 0, 0]

    def test_the_larger_log_odds_takes_a_conflict(self) -> None:
        log_odds = torch.stack([grid(*[1.0] * 8), grid(*[2.0] * 4, *[0.5] * 4)], dim=1)
        found = pseudo_labels(make_batch(log_odds=log_odds))
        assert found.flatten().tolist() == [2] * 4 + [1] * 4

    def test_the_loss_is_that_of_full_labels(self) -> None:
        batch = make_batch()
        hard = make_batch(classes=pseudo_labels(batch), annotated=batch.known)
        assert terms_of(config("pseudo_label"), batch) == terms_of(config("full"), hard)


class TestMarginalExclusion:
    def test_is_marginal_and_both_exclusion_terms_times_their_weight(self) -> None:
        settings = config("marginal_exclusion", exclusion={"weight": 0.5})
        found = dict(terms_of(settings))
        # The missing organ against the two voxels of the annotated one, of seven that are seen.
        p, taken = p_of(some_logits())[:, 2], make_batch().classes == 1
        overlap = 2 * p[taken].sum() / (p[SEEN].sum() + 2)
        assert found.pop("exclusion_dice") == pytest.approx(0.5 * float(overlap), rel=1e-4)
        entropy = torch.log(1 + p[taken]).sum() / 7
        assert found.pop("exclusion_cross_entropy") == pytest.approx(0.5 * float(entropy))
        assert found == terms_of(config("marginal"))

    def test_it_follows_its_schedule_to_marginal(self) -> None:
        ramp = config("marginal_exclusion", exclusion={"schedule": "ramp_up", "until": 0.5})
        assert terms_of(ramp, fraction=0.0) == terms_of(config("marginal"))
        constant = terms_of(config("marginal_exclusion"))
        half = terms_of(ramp, fraction=0.25)
        assert half["exclusion_dice"] == pytest.approx(constant["exclusion_dice"] / 2)
        assert terms_of(ramp, fraction=0.5) == constant


class TestMaskedBce:
    def test_is_one_sigmoid_per_annotated_organ(self) -> None:
        s = some_logits()[:, 1]
        y = (make_batch().classes == 1).double()
        found = terms_of(config("masked_bce"))
        expected = nn.functional.binary_cross_entropy_with_logits(s[SEEN], y[SEEN])
        assert found["binary_cross_entropy"] == pytest.approx(float(expected))
        assert found["dice"] == pytest.approx(dice_of(torch.sigmoid(s), y, SEEN))
        assert set(found) == {"binary_cross_entropy", "dice"}

    def test_neither_background_nor_the_missing_organ_is_taught(self) -> None:
        found = gradient(config("masked_bce"))
        assert not found[:, [0, 2]].any()
        assert found[:, 1][SEEN].all()
