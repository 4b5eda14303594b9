from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from torch import Tensor, nn

from pipeline.labels import IGNORE
from pipeline.student import losses
from pipeline.student.augment import AugmentConfig
from pipeline.student.network import StudentNetwork, TapKey
from pipeline.student.settings import TrainingConfig
from pipeline.student.supervision import (
    Batch,
    FeaturesConfig,
    Kind,
    LogitsConfig,
    SupervisionConfig,
    WeightConfig,
    batch_loss,
    pseudo_labels,
)

SHAPE = (2, 2, 2)
K = 2
NAN = math.nan


class Fixed(StudentNetwork):
    """A network whose logits and feature are given, and may be asked for gradients."""

    def __init__(self, logits: Tensor, feature: Tensor | None = None) -> None:
        nn.Module.__init__(self)
        self.logits = nn.Parameter(logits)
        self.feature = feature
        self.tap_stride = (2, 2, 2)
        self.calls = 0

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor | None]:
        self.calls += 1
        return self.logits, self.feature

    def adapt(self, key: TapKey, feature: Tensor) -> Tensor:
        return feature

    def organs_of(self, key: TapKey) -> list[int]:
        return {"one": [0], "two": [1], "both": [0, 1]}[key[0]]


def grid(*values: float, dtype: torch.dtype = torch.float64) -> Tensor:
    """Eight values, voxel by voxel: (1, 2, 2, 2)."""
    return torch.tensor(values, dtype=dtype).reshape(1, *SHAPE)


def make_batch(**changes: Any) -> Batch:
    """One case that annotates organ 0 alone; both teachers have spoken.

    voxel        0     1     2     3     4     5     6     7
    label        1     1     0     0     0  ignored  0     0
    d_0          7     6    -6    -6    -6    2     -6    -6
    d_1         -7    -6     3     1    -2  unseen  -9   unseen
    """
    log_odds = torch.stack(
        [grid(7, 6, -6, -6, -6, 2, -6, -6), grid(-7, -6, 3, 1, -2, NAN, -9, NAN)], dim=1
    )
    values: dict[str, Any] = {
        "image": torch.zeros(1, 1, *SHAPE),
        "classes": grid(1, 1, 0, 0, 0, IGNORE, 0, 0, dtype=torch.int64),
        "annotated": torch.tensor([[True, False]]),
        "known": torch.tensor([[True, True]]),
        "log_odds": log_odds,
        "organ": log_odds > 0,
        "background": (log_odds < 0).all(dim=1),
    }
    return Batch(**(values | changes))


def some_logits(seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn((1, K + 1, *SHAPE), generator=generator, dtype=torch.float64)


def config(kind: Kind = "ms_kd", **changes: Any) -> SupervisionConfig:
    return SupervisionConfig.model_validate({"kind": kind, **changes})


def terms_of(
    settings: SupervisionConfig,
    batch: Batch | None = None,
    logits: Tensor | None = None,
    *,
    fraction: float = 0.0,
    feature: Tensor | None = None,
) -> Mapping[str, float]:
    network = Fixed(some_logits() if logits is None else logits, feature)
    loss, terms = batch_loss(settings, network, batch or make_batch(), fraction)
    assert network.calls == 1
    assert float(loss.detach()) == pytest.approx(sum(terms.values()))
    return terms


def gradient(settings: SupervisionConfig, batch: Batch | None = None) -> Tensor:
    network = Fixed(some_logits())
    batch_loss(settings, network, batch or make_batch(), 0.0)[0].backward()  # type: ignore[no-untyped-call]
    assert network.logits.grad is not None
    return network.logits.grad


def p_of(logits: Tensor) -> Tensor:
    return torch.softmax(logits, dim=1)


def dice_of(p: Tensor, y: Tensor, seen: Tensor) -> float:
    both, size = (p * y)[seen].sum(), (p + y)[seen].sum()
    return float(1 - (2 * both + 1e-5) / (size + 1e-5))


SEEN = grid(1, 1, 1, 1, 1, 0, 1, 1).bool()


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

    @pytest.mark.parametrize("kind", ["naive", "marginal", "full"])
    def test_teachers_are_not_looked_at(self, kind: Kind) -> None:
        batch = make_batch(log_odds=None, organ=None, background=None)
        assert terms_of(config(kind), batch) == terms_of(config(kind))
        assert not config(kind).uses_teachers

    def test_an_ignored_voxel_teaches_nothing(self) -> None:
        for kind in ("naive", "marginal"):
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


class TestLogitsTerm:
    # Voxels 5 and 7 are unseen by an expert: what all say together is unknown there, although the
    # other one has a region at 5.
    INSIDE = grid(1, 1, 1, 1, 1, 0, 1, 0).bool()

    def _target(self) -> Tensor:
        d = make_batch().log_odds
        assert d is not None
        return torch.softmax(torch.cat([torch.zeros_like(d[:, :1]), d.nan_to_num()], dim=1), dim=1)

    def _kl(self) -> Tensor:
        q, p = self._target(), p_of(some_logits())
        return (q * (q / p).log()).sum(dim=1)

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
            grid(1, 1, 0, 0, 0, 0, 0, 0).bool(),
            grid(0, 0, 1, 1, 0, 0, 0, 0).bool(),
            grid(0, 0, 0, 0, 1, 0, 1, 0).bool(),
        )
        expected = np.mean([float(kl[region].mean()) for region in regions])
        assert self._term(mean="region") == pytest.approx(expected)

    def test_without_the_agreed_background_only_organs_teach(self) -> None:
        organs = grid(1, 1, 1, 1, 0, 0, 0, 0).bool()
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
                float(kl[:, k][(batch.organ[:, k] | batch.background) & self.INSIDE].mean())
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
                    float(kl[:, k][batch.organ[:, k] & self.INSIDE].mean())
                    + float(kl[:, k][batch.background & self.INSIDE].mean())
                )
                / 2
                for k in range(K)
            ]
        )
        assert self._term(target="per_teacher", mean="region") == pytest.approx(expected)

    def test_soft_dice_is_added(self) -> None:
        batch, p = make_batch(), p_of(some_logits())
        assert batch.log_odds is not None
        dice = losses.soft_dice(p, batch.log_odds, self.INSIDE, batch.known)
        assert self._term(soft_dice=True) == pytest.approx(self._term() + float(dice))

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
        for target in ("joint", "per_teacher"):
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
            "features": {("one", "a"): torch.eye(2).flip(0)[..., None, None, None]},
        }
        return Batch(**(values | changes))

    STUDENT = torch.tensor([[1.0, 1.0], [1.0, 1.0]], dtype=torch.float64)[..., None, None, None]
    SETTINGS = config(features={"student_tap": "x", "weight": 1.0, "schedule": "constant"})
    LOGITS = torch.zeros(2, K + 1, *SHAPE, dtype=torch.float64)

    def _term(self, batch: Batch) -> float:
        return terms_of(self.SETTINGS, batch, self.LOGITS, feature=self.STUDENT)["features"]

    def test_organ_cells_and_background_cells_are_averaged_apart_and_added(self) -> None:
        # Cell 0 is touched by organ 0, cell 1 is wholly background; both are at 45 degrees.
        apart = 1 - math.sqrt(0.5)
        assert self._term(self._batch()) == pytest.approx(2 * apart, rel=1e-6)

    def test_a_cell_that_is_partly_background_is_none(self) -> None:
        background = torch.ones(2, *SHAPE, dtype=torch.bool)
        background[1, 0, 0, 0] = False
        background[0, 0, 0, 0] = False
        apart = 1 - math.sqrt(0.5)
        batch = self._batch(background=background)
        assert self._term(batch) == pytest.approx(apart, rel=1e-6)

    def test_only_the_teachers_own_organs_count(self) -> None:
        features = self._batch().features[("one", "a")]
        batch = self._batch(features={("two", "a"): features})
        apart = 1 - math.sqrt(0.5)
        assert self._term(batch) == pytest.approx(apart, rel=1e-6)

    def test_it_is_the_mean_over_taps(self) -> None:
        feature = self._batch().features[("one", "a")]
        batch = self._batch(features={("one", "a"): feature, ("both", "b"): -feature})
        apart = (1 - math.sqrt(0.5)) + (1 + math.sqrt(0.5))
        assert self._term(batch) == pytest.approx(2 * apart / 2, rel=1e-6)

    def test_unseen_cells_are_left_out(self) -> None:
        features = self._batch().features[("one", "a")].clone()
        features[0] = NAN
        batch = self._batch(features={("one", "a"): features})
        assert self._term(batch) == pytest.approx(1 - math.sqrt(0.5), rel=1e-6)


class TestSchedules:
    @pytest.mark.parametrize(
        ("schedule", "until", "expected"),
        [
            ("constant", 1.0, [2, 2, 2, 2, 2]),
            ("ramp_up", 1.0, [0, 0.5, 1, 1.5, 2]),
            ("ramp_up", 0.5, [0, 1, 2, 2, 2]),
            ("decay", 1.0, [2, 1.5, 1, 0.5, 0]),
            ("decay", 0.5, [2, 1, 0, 0, 0]),
        ],
    )
    def test_at_start_middle_and_end(
        self, schedule: str, until: float, expected: list[float]
    ) -> None:
        weight = WeightConfig.model_validate({"weight": 2, "schedule": schedule, "until": until})
        found = [weight.at(fraction) for fraction in (0, 0.25, 0.5, 0.75, 1)]
        assert found == pytest.approx(expected)

    def test_a_term_of_weight_zero_is_not_computed(self) -> None:
        decayed = config(logits={"schedule": "decay", "until": 0.5})
        assert set(terms_of(decayed, fraction=0.5)) == {"cross_entropy", "dice"}
        assert set(terms_of(decayed, fraction=0.49)) == {"cross_entropy", "dice", "logits"}

    def test_the_loss_follows_the_schedule(self) -> None:
        settings = config(logits={"schedule": "decay"})
        start, middle = (terms_of(settings, fraction=t)["logits"] for t in (0.0, 0.5))
        assert middle == pytest.approx(start / 2)


class TestConfig:
    def test_ms_kd_without_terms_is_refused(self) -> None:
        with pytest.raises(ValidationError, match="choose kind `marginal`"):
            config(logits={"weight": 0})
        with pytest.raises(ValidationError, match="choose kind `marginal`"):
            config(logits={"weight": 0}, features={"student_tap": "x", "weight": 0})

    def test_features_alone_are_a_distillation_term(self) -> None:
        settings = config(logits={"weight": 0}, features={"student_tap": "x"})
        assert settings.uses_features

    @pytest.mark.parametrize(
        ("kind", "features", "uses"),
        [
            ("ms_kd", FeaturesConfig(student_tap="x"), True),
            ("ms_kd", FeaturesConfig(), False),
            ("ms_kd", FeaturesConfig(student_tap="x", weight=0), False),
            ("pseudo_label", FeaturesConfig(student_tap="x"), False),
        ],
    )
    def test_uses_features(self, kind: Kind, features: FeaturesConfig, uses: bool) -> None:
        assert SupervisionConfig(kind=kind, features=features).uses_features is uses

    @pytest.mark.parametrize(
        "augment", [{"flip_axes": (2,)}, {"rotate_axes": (0,)}, {"affine": {"probability": 0.1}}]
    )
    def test_moved_voxels_with_features_are_refused(self, augment: dict[str, Any]) -> None:
        with_features = SupervisionConfig(features=FeaturesConfig(student_tap="x"))
        with pytest.raises(ValidationError, match="not legal with cached features"):
            TrainingConfig(supervision=with_features, augment=AugmentConfig.model_validate(augment))
        TrainingConfig(
            supervision=SupervisionConfig(), augment=AugmentConfig.model_validate(augment)
        )

    @pytest.mark.parametrize(
        "wrong",
        [
            {"kind": "kd"},
            {"margin": -0.1},
            {"confidence": 0},
            {"logits": {"temperature": 0}},
            {"logits": {"target": "each"}},
            {"logits": {"until": 0}},
            {"features": {"weight": -1}},
            {"logit": {}},
        ],
    )
    def test_values_out_of_range_are_refused(self, wrong: dict[str, Any]) -> None:
        with pytest.raises(ValidationError):
            SupervisionConfig.model_validate(wrong)

    def test_defaults_are_those_of_the_method(self) -> None:
        settings = SupervisionConfig()
        assert settings.kind == "ms_kd"
        assert settings.labels_win
        assert settings.margin == 0
        assert settings.logits == LogitsConfig(schedule="decay", target="joint", mean="voxel")
