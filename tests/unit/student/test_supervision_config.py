"""Schedules, and what settings are refused."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from pipeline.student.augment import AugmentConfig
from pipeline.student.settings import (
    FeaturesConfig,
    Kind,
    LogitsConfig,
    SupervisionConfig,
    TrainingConfig,
    WeightConfig,
)
from tests.unit.student.fixed import config, terms_of


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
            config(logits={"weight": 0}, features={"student_taps": "x", "weight": 0})

    def test_what_a_label_says_is_in_a_region(self) -> None:
        with pytest.raises(ValidationError, match="margin 6 must be below confidence 6"):
            config(margin=6.0, confidence=6.0)
        assert config(margin=6.0, confidence=6.0, labels_win=False).margin == 6.0
        assert config(margin=5.9, confidence=6.0).margin == 5.9

    def test_features_alone_are_a_distillation_term(self) -> None:
        settings = config(logits={"weight": 0}, features={"student_taps": "x"})
        assert settings.uses_features

    @pytest.mark.parametrize(
        ("kind", "features", "uses"),
        [
            ("ms_kd", FeaturesConfig(student_taps=("x",)), True),
            ("ms_kd", FeaturesConfig(), False),
            ("ms_kd", FeaturesConfig(student_taps=("x",), weight=0), False),
            ("pseudo_label", FeaturesConfig(student_taps=("x",)), False),
        ],
    )
    def test_uses_features(self, kind: Kind, features: FeaturesConfig, uses: bool) -> None:
        assert SupervisionConfig(kind=kind, features=features).uses_features is uses

    def test_exclusion_without_weight_is_refused(self) -> None:
        with pytest.raises(ValidationError, match="choose kind `marginal`"):
            config("marginal_exclusion", exclusion={"weight": 0})

    @pytest.mark.parametrize(
        ("written", "read"),
        [("", ()), ([], ()), ("x", ("x",)), (["x", "y"], ("x", "y")), ({"a": "x"}, {"a": "x"})],
    )
    def test_taps_are_a_name_names_or_pairs(self, written: Any, read: Any) -> None:
        settings = config(features={"student_taps": written})
        assert settings.features.student_taps == read
        assert settings.uses_features is bool(read)
        again = SupervisionConfig.model_validate_json(settings.model_dump_json())
        assert again == settings

    @pytest.mark.parametrize("target", ["joint", "per_teacher", "marginal"])
    def test_who_speaks_matters_to_the_marginal_target_alone(self, target: str) -> None:
        assert config(logits={"target": target}).uses_experts is (target == "marginal")
        assert not config("pseudo_label", logits={"target": target}).uses_experts

    @pytest.mark.parametrize(
        "augment", [{"flip_axes": (2,)}, {"rotate_axes": (0,)}, {"affine": {"probability": 0.1}}]
    )
    def test_moved_voxels_with_features_are_refused(self, augment: dict[str, Any]) -> None:
        with_features = SupervisionConfig(features=FeaturesConfig(student_taps=("x",)))
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
            {"features": {"student_taps": 3}},
            {"exclusion": {"weight": -1}},
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
