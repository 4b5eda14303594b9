"""What inputs leave out, and how differences are named; what changes a digest: tests/properties."""

from __future__ import annotations

from typing import Any

from pipeline.cache.schema import StorageConfig, differing
from pipeline.config import digest
from tests.tiny import case_digested, teacher_digested

CASE: dict[str, Any] = {
    "image_sha256": "a",
    "label_sha256": "b",
    "annotated": {"liver": (1,), "spleen": (2, 3)},
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


def test_logits_are_what_they_were_before_one_could_say_so() -> None:
    assert teacher_digested(**TEACHER, outputs="logits") == teacher_digested(**TEACHER)
    assert "outputs" not in teacher_digested(**TEACHER)


def test_features_have_a_version_and_units_without_them_know_nothing_of_it() -> None:
    for description in ({**TEACHER["description"], "taps": []}, TEACHER["description"]):
        assert "features_version" not in teacher_digested(**{**TEACHER, "description": description})
    tapped = {**TEACHER["description"], "taps": {"deep": [2, 2, 2]}}
    assert teacher_digested(**{**TEACHER, "description": tapped})["features_version"] == 2


def test_organs_that_a_dataset_does_not_annotate_leave_its_cases_alone() -> None:
    more = {**CASE, "ids": {**CASE["ids"], "pancreas": 7}}
    assert digest(case_digested(**more)) == digest(case_digested(**CASE))


def test_differences_are_named_with_old_and_new() -> None:
    old = teacher_digested(**TEACHER)
    new = teacher_digested(
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
