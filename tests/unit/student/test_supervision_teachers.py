"""What the log-odds and features of teachers teach."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from pipeline.student import losses
from pipeline.student.supervision import Batch, with_doubt
from tests.unit.student.fixed import (
    NAN,
    SHAPE,
    K,
    config,
    gradient,
    grid,
    make_batch,
    p_of,
    some_logits,
    terms_of,
)


class TestLogitsTerm:
    # At voxels 5 and 7 the expert of organ 1 is silent: there the other one alone teaches.
    INSIDE = grid(1, 1, 1, 1, 1, 1, 1, 1).bool()
    SILENT = grid(0, 0, 0, 0, 0, 1, 0, 1).bool()

    def _target(self) -> Tensor:
        d = make_batch().log_odds
        assert d is not None
        return torch.softmax(torch.cat([torch.zeros_like(d[:, :1]), d.nan_to_num()], dim=1), dim=1)

    def _kl(self) -> Tensor:
        q, p = self._target(), p_of(some_logits())
        return torch.where(self.SILENT, self._bernoulli()[:, 0], (q * (q / p).log()).sum(dim=1))

    def _term(self, **changes: Any) -> float:
        logits = {"soft_dice": False, "schedule": "constant", **changes}
        return terms_of(config(logits=logits))["logits"]

    def test_supervised_terms_are_those_of_marginal(self) -> None:
        found = dict(terms_of(config()))
        found.pop("logits")
        assert found == terms_of(config("marginal"))

    def test_joint_by_voxel_is_the_mean_over_all_regions_together(self) -> None:
        assert self._term() == pytest.approx(float(self._kl()[self.INSIDE].mean()))

    def test_joint_by_region_is_the_mean_of_the_regions_means(self) -> None:
        kl = self._kl()
        regions = (
            grid(1, 1, 0, 0, 0, 1, 0, 0).bool(),
            grid(0, 0, 1, 1, 0, 0, 0, 0).bool(),
            grid(0, 0, 0, 0, 1, 0, 1, 1).bool(),
        )
        expected = np.mean([float(kl[region].mean()) for region in regions])
        assert self._term(mean="region") == pytest.approx(expected)

    def test_without_the_agreed_background_only_organs_teach(self) -> None:
        organs = grid(1, 1, 1, 1, 0, 1, 0, 0).bool()
        expected = float(self._kl()[organs].mean())
        assert self._term(agreed_background=False) == pytest.approx(expected)
        settings = config(logits={"agreed_background": False})
        without = gradient(settings) - gradient(config("marginal"))
        assert without.abs()[0, :, 1, 1, 0].max() < 1e-12
        assert without.abs()[0, :, 0, 0, 0].max() > 1e-4

    def _bernoulli(self) -> Tensor:
        d, p = make_batch().log_odds, p_of(some_logits())
        assert d is not None
        q, own = torch.sigmoid(d), p[:, 1:]
        return q * (q / own).log() + (1 - q) * ((1 - q) / (1 - own)).log()

    def test_per_teacher_by_voxel(self) -> None:
        kl, batch = self._bernoulli(), make_batch()
        assert batch.organ is not None
        assert batch.background is not None
        expected = np.mean(
            [
                float(kl[:, k][(batch.organ[:, k] | batch.background) & ~kl[:, k].isnan()].mean())
                for k in range(K)
            ]
        )
        assert self._term(target="per_teacher") == pytest.approx(expected)

    def test_per_teacher_by_region(self) -> None:
        kl, batch = self._bernoulli(), make_batch()
        assert batch.organ is not None
        assert batch.background is not None
        expected = np.mean(
            [
                (
                    float(kl[:, k][batch.organ[:, k]].mean())
                    + float(kl[:, k][batch.background & ~kl[:, k].isnan()].mean())
                )
                / 2
                for k in range(K)
            ]
        )
        assert self._term(target="per_teacher", mean="region") == pytest.approx(expected)

    @pytest.mark.parametrize("mean", ["voxel", "region"])
    def test_marginal_is_by_the_teachers_of_the_batch(self, mean: str) -> None:
        settings = config(logits={"target": "marginal", "mean": mean})
        together = make_batch(experts=torch.tensor([[[True, True]]]))
        joint, per_teacher = (
            terms_of(config(logits={"target": target, "mean": mean}))["logits"]
            for target in ("joint", "per_teacher")
        )
        assert terms_of(settings, together)["logits"] == pytest.approx(joint)
        assert terms_of(settings)["logits"] == pytest.approx(per_teacher)
        assert joint != pytest.approx(per_teacher)

    def test_soft_dice_is_added(self) -> None:
        batch, p = make_batch(), p_of(some_logits())
        assert batch.log_odds is not None
        dice = losses.soft_dice(p[:, 1:], batch.log_odds, self.INSIDE, batch.known)
        assert self._term(soft_dice=True) == pytest.approx(self._term() + float(dice))

    @pytest.mark.parametrize(
        ("changes", "times"),
        [({}, 1), ({"hard": True}, 1), ({"temperature": 2.0}, 2), ({"target": "per_teacher"}, 3)],
    )
    def test_a_target_that_both_terms_share_is_made_once(
        self, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any], times: int
    ) -> None:
        made: list[Tensor] = []
        target = losses.joint_target

        def counted(log_odds: Tensor, temperature: float) -> Tensor:
            made.append(log_odds)
            return target(log_odds, temperature)

        expected = self._term(soft_dice=True, **changes)
        monkeypatch.setattr(losses, "joint_target", counted)
        assert self._term(soft_dice=True, **changes) == expected
        assert len(made) == times

    def test_hard_targets_are_those_of_hard_log_odds(self) -> None:
        odds = make_batch().log_odds
        assert odds is not None
        found = terms_of(config(logits={"hard": True, "soft_dice": True}))["logits"]
        batch = make_batch(log_odds=losses.hard(odds))
        assert found == pytest.approx(terms_of(config(logits={"soft_dice": True}), batch)["logits"])
        assert found != pytest.approx(self._term(soft_dice=True))

    def test_the_weight_multiplies(self) -> None:
        assert self._term(weight=0.25) == pytest.approx(self._term() / 4)

    def test_an_unknown_organ_is_merged_into_background(self) -> None:
        batch = make_batch(known=torch.tensor([[True, False]]))
        assert batch.log_odds is not None
        batch.log_odds[:, 1] = NAN
        assert batch.organ is not None
        batch.organ[:, 1] = False
        q = torch.sigmoid(batch.log_odds[:, 0])
        own = p_of(some_logits())[:, 1]
        kl = q * (q / own).log() + (1 - q) * ((1 - q) / (1 - own)).log()
        inside = batch.organ[:, 0] | (batch.background if batch.background is not None else q < 0)
        settings = config(logits={"soft_dice": False})
        assert terms_of(settings, batch)["logits"] == pytest.approx(float(kl[inside].mean()))

    def test_nothing_inside_is_zero_and_no_nan(self) -> None:
        nowhere = make_batch(
            organ=torch.zeros(1, K, *SHAPE, dtype=torch.bool),
            background=torch.zeros(1, *SHAPE, dtype=torch.bool),
        )
        for target in ("joint", "per_teacher", "marginal"):
            for mean in ("voxel", "region"):
                settings = config(logits={"target": target, "mean": mean})
                assert terms_of(settings, nowhere)["logits"] == pytest.approx(0, abs=1e-9)
                assert torch.isfinite(gradient(settings, nowhere)).all()


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
            "organ": organ,
            "background": ~organ.any(dim=1),
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


class TestDoubt:
    """Where the student is sure of an organ, a teacher that says no is silent."""

    def test_teachers_are_overruled_but_labels_are_not(self) -> None:
        batch = make_batch()
        p = torch.full((1, K + 1, *SHAPE), 0.05, dtype=torch.float64)
        p[:, 2] = 0.9  # organ 1 everywhere
        found = with_doubt(batch, p, 0.8).log_odds
        assert found is not None
        assert batch.log_odds is not None
        changed = (found.isnan() & ~batch.log_odds.isnan())[0]
        # Voxels 0 and 1 are organ 0 by the label; at 2 and 3 the teacher says yes; 5 is not seen.
        assert changed[1].flatten().tolist() == [False] * 4 + [True, False, True, False]
        assert not changed[0].any()
        kept = with_doubt(batch, p, 0.95).log_odds
        assert kept is not None
        assert torch.equal(kept.isnan(), batch.log_odds.isnan())

    def test_the_terms_see_it(self) -> None:
        logits = {"soft_dice": False}
        without = terms_of(config(logits=logits))["logits"]
        sure = config(logits=logits, reliability={"doubt": 0.2})
        assert terms_of(sure)["logits"] != pytest.approx(without)
        never = config(logits=logits, reliability={"doubt": 0.999})
        assert terms_of(never)["logits"] == pytest.approx(without)
