from __future__ import annotations

from typing import Any

import pytest

from pipeline.cache import schema
from pipeline.cache.schema import StorageConfig, case_inputs, differing, teacher_inputs, unit_inputs
from pipeline.config import digest

CASE: dict[str, Any] = {
    "image_sha256": "a",
    "label_sha256": "b",
    "values": {"liver": (1,), "spleen": (2, 3)},
    "ids": {"liver": 1, "spleen": 2},
    "ignore_values": (9,),
    "background_values": (8,),
    "spacing_mm": (3.0, 2.0, 2.0),
    "storage": StorageConfig(),
}
TEACHER: dict[str, Any] = {
    "weights_sha256": "w",
    "description": {"kind": "checkpoint", "window": {"shape": [8, 8, 8], "overlap": 0.5}},
    "organs": {"liver": (1,)},
    "activation": "softmax",
    "spacing_mm": (3.0, 2.0, 2.0),
    "storage": StorageConfig(),
}


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("image_sha256", "x"),
        ("label_sha256", "x"),
        ("values", {"liver": (1,), "spleen": (2,)}),
        ("values", {"liver": (2, 3), "spleen": (1,)}),
        ("values", {"liver": (1,)}),
        ("ids", {"liver": 1, "spleen": 3}),
        ("ignore_values", ()),
        ("background_values", ()),
        ("spacing_mm", (2.0, 3.0, 2.0)),
        ("storage", StorageConfig(chunk=32)),
        ("storage", StorageConfig(zstd_level=3)),
    ],
)
def test_each_input_of_a_case_alone_changes_its_digest(field: str, value: object) -> None:
    assert digest(case_inputs(**{**CASE, field: value})) != digest(case_inputs(**CASE))


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("weights_sha256", "x"),
        ("description", {**TEACHER["description"], "kind": "factory"}),
        ("description", {**TEACHER["description"], "window": {"shape": [8, 8, 8], "overlap": 0}}),
        ("organs", {"spleen": (1,)}),
        ("organs", {"liver": (0,)}),
        ("organs", {"liver": (1, 2)}),
        ("activation", "sigmoid"),
        ("outputs", "probabilities"),
        ("spacing_mm", (3.0, 2.0, 2.5)),
        ("storage", StorageConfig(log_odds_bits=4)),
        ("storage", StorageConfig(feature_bits=4)),
    ],
)
def test_each_input_of_a_teacher_alone_changes_its_digest(field: str, value: object) -> None:
    assert digest(teacher_inputs(**{**TEACHER, field: value})) != digest(teacher_inputs(**TEACHER))


def test_logits_are_what_they_were_before_one_could_say_so() -> None:
    assert teacher_inputs(**TEACHER, outputs="logits") == teacher_inputs(**TEACHER)
    assert "outputs" not in teacher_inputs(**TEACHER)


def test_features_have_a_version_and_units_without_them_know_nothing_of_it() -> None:
    for description in ({**TEACHER["description"], "taps": []}, TEACHER["description"]):
        assert "features_version" not in teacher_inputs(**{**TEACHER, "description": description})
    tapped = {**TEACHER["description"], "taps": {"deep": [2, 2, 2]}}
    assert teacher_inputs(**{**TEACHER, "description": tapped})["features_version"] == 2


def test_a_unit_depends_on_its_teacher_and_its_image() -> None:
    unit = digest(unit_inputs(teacher_digest="t", image_sha256="i"))
    assert unit != digest(unit_inputs(teacher_digest="u", image_sha256="i"))
    assert unit != digest(unit_inputs(teacher_digest="t", image_sha256="j"))
    assert unit != digest(unit_inputs(teacher_digest="i", image_sha256="t"))


def test_the_format_version_enters_every_array_digest(monkeypatch: pytest.MonkeyPatch) -> None:
    before = digest(case_inputs(**CASE)), digest(teacher_inputs(**TEACHER))
    monkeypatch.setattr(schema, "FORMAT_VERSION", schema.FORMAT_VERSION + 1)
    after = digest(case_inputs(**CASE)), digest(teacher_inputs(**TEACHER))
    assert before[0] != after[0]
    assert before[1] != after[1]


def test_the_order_in_which_things_are_named_does_not_matter() -> None:
    turned = {
        **CASE,
        "values": {"spleen": (3, 2), "liver": (1,)},
        "ids": {"spleen": 2, "liver": 1},
    }
    assert digest(case_inputs(**turned)) == digest(case_inputs(**CASE))
    description = {"window": {"overlap": 0.5, "shape": [8, 8, 8]}, "kind": "checkpoint"}
    teacher = teacher_inputs(**{**TEACHER, "description": description})
    assert digest(teacher) == digest(teacher_inputs(**TEACHER))


def test_organs_that_a_dataset_does_not_annotate_leave_its_cases_alone() -> None:
    more = {**CASE, "ids": {**CASE["ids"], "pancreas": 7}}
    assert digest(case_inputs(**more)) == digest(case_inputs(**CASE))


def test_a_whole_number_is_one_setting_however_it_is_written() -> None:
    written = teacher_inputs(**{**TEACHER, "spacing_mm": (3, 2, 2)})
    assert digest(written) == digest(teacher_inputs(**TEACHER))


def test_differences_are_named_with_old_and_new() -> None:
    old = teacher_inputs(**TEACHER)
    new = teacher_inputs(
        **{**TEACHER, "activation": "sigmoid", "storage": StorageConfig(log_odds_bits=4)}
    )
    assert differing(old, new) == [
        "activation: softmax -> sigmoid",
        "storage.log_odds_bits: 5 -> 4",
    ]
    assert differing(old, old) == []


def test_a_field_that_one_side_lacks_is_a_difference() -> None:
    assert differing({"a": 1}, {"a": 1, "b": 2}) == ["b: absent -> 2"]
    assert differing({"a": 1}, {"a": 1, "b": None}) == ["b: absent -> None"]
    assert differing({"a": 1, "b": None}, {"a": 1}) == ["b: None -> absent"]
    assert differing({"a": {"x": 1}}, {"a": 3}) == ["a: {'x': 1} -> 3"]
