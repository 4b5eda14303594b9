"""Schedules, and what settings are refused."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from pipeline.student.settings import (
    FeaturesConfig,
    Kind,
    SupervisionConfig,
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

    def test_a_target_that_has_decayed_leaves_the_labels_alone(self) -> None:
        decayed = config(logits={"schedule": "decay", "until": 0.5})
        assert terms_of(decayed, fraction=0.5) == terms_of(config("marginal"))
        assert terms_of(decayed, fraction=0.49) != terms_of(config("marginal"))


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

    @pytest.mark.parametrize("gone", ["target", "mean", "soft_dice", "agreed_background"])
    def test_settings_of_the_terms_that_are_gone_are_named(self, gone: str) -> None:
        with pytest.raises(ValidationError, match=f"no longer there: {gone}; every voxel has one"):
            config(logits={gone: "joint", "hard": True})
        with pytest.raises(ValidationError, match="no longer there: doubt; agree_after compares"):
            config(reliability={"doubt": None})

    def test_the_weight_of_features_ramps_up_and_decays(self) -> None:
        features = FeaturesConfig(weight=2, ramp=0.2, until=0.6)
        found = [features.at(t) for t in (0, 0.1, 0.2, 0.4, 0.6, 1)]
        assert found == pytest.approx([0, 1, 2, 1, 0, 0])
        assert FeaturesConfig(weight=2, ramp=0).at(0) == 2

    def test_a_schedule_of_features_is_refused_saying_what_to_write(self) -> None:
        with pytest.raises(ValidationError, match=r"schedule.*is gone.*Remove it; `ramp: 0`"):
            config(features={"schedule": "decay", "student_taps": "x"})
        with pytest.raises(ValidationError, match=r"ramp 0.5 must be below until 0.5"):
            config(features={"ramp": 0.5, "until": 0.5})

    @pytest.mark.parametrize(
        "wrong",
        [
            {"kind": "kd"},
            {"margin": -0.1},
            {"confidence": 0},
            {"logits": {"temperature": 0}},
            {"logits": {"weight": 1.5}},
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
