"""Labels and log-odds against formulas written out slowly."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import pytest

from pipeline.data.labels import IGNORE, LabelSpace, log_odds, map_labels
from pipeline.errors import GeometryError, TeacherError

IDS = {"liver": 7, "spleen": 2}


def array(*values: int, dtype: Any = np.uint16) -> npt.NDArray[Any]:
    return np.array(values, dtype=dtype).reshape(1, 1, -1)


def test_several_values_may_mean_an_organ() -> None:
    label = array(0, 1, 2, 3, 1)
    mapped = map_labels(label, {"liver": (1, 2), "spleen": (3,)}, IDS)
    assert mapped.dtype == np.uint8
    assert mapped.shape == label.shape
    assert mapped.ravel().tolist() == [0, 7, 7, 2, 7]


def test_ignored_and_background_values() -> None:
    mapped = map_labels(array(0, 1, 8, 9, 300), {"liver": (1,)}, IDS, (8, 300), (9,))
    assert mapped.ravel().tolist() == [0, 7, IGNORE, 0, IGNORE]


def test_values_that_the_map_does_not_hold_are_harmless() -> None:
    mapped = map_labels(array(0, 0), {"liver": (1, 65535)}, IDS, (200,), (201,))
    assert mapped.ravel().tolist() == [0, 0]


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.int16, np.int64])
def test_unknown_values_are_named(dtype: Any) -> None:
    label = array(0, 5, 1, 4, 5, dtype=dtype)
    with pytest.raises(GeometryError) as caught:
        map_labels(label, {"liver": (1,)}, IDS, (3,), where="a/b")
    assert str(caught.value).startswith("a/b: label values [4, 5] are not named")
    assert "annotated" in caught.value.fix
    assert "ignore_values" in caught.value.fix


def test_of_an_image_a_few_values_are_named() -> None:
    with pytest.raises(GeometryError) as caught:
        map_labels(np.arange(3, 900).reshape(-1, 1, 1), {"liver": (1,)}, IDS)
    assert (
        "label values [3, 4, 5, 6, 7, 8, 9, 10] and 889 more (is it an image, not a label"
        in str(caught.value)
    )
    with pytest.raises(GeometryError, match="253, 254, 255, 256"):
        map_labels(np.arange(3, 257).reshape(-1, 1, 1), {"liver": (1,)}, IDS)


def test_negative_values_are_unknown_and_do_not_wrap_round() -> None:
    with pytest.raises(GeometryError, match=r"\[-2, -1\]"):
        map_labels(array(-1, -2, 0, 1, 2, dtype=np.int16), {"liver": (1, 2)}, IDS)


def test_label_space_round_trip() -> None:
    space = LabelSpace({"liver": 7, "spleen": 2, "pancreas": 254})
    stored = np.array([[0, 2, 7, 254]], dtype=np.uint8)
    classes = space.to_classes(stored)
    assert classes.tolist() == [[0, 1, 2, 3]]
    assert classes.dtype == np.uint8
    np.testing.assert_array_equal(space.to_ids(classes), stored)


def test_classes_keep_ignore_and_drop_other_organs() -> None:
    assert LabelSpace({"liver": 7}).to_classes(array(7, 2, 255, 0, dtype=np.uint8)).tolist() == [
        [[1, 0, IGNORE, 0]]
    ]


def slow_log_odds(
    logits: Sequence[float], ours: Sequence[int], activation: Literal["softmax", "sigmoid"]
) -> float:
    """log(p / (1 - p)) in extended precision, voxel by voxel."""
    x = [np.longdouble(value) for value in logits]
    if activation == "softmax":
        total = sum(np.exp(value) for value in x)
        p = sum(np.exp(x[c]) / total for c in ours)
        rest = sum(np.exp(x[c]) / total for c in range(len(x)) if c not in ours)
    else:
        rest = np.longdouble(1)
        for c in ours:
            rest *= 1 / (1 + np.exp(x[c]))
        p = 1 - rest
    return float(np.log(p / rest))


@pytest.mark.parametrize("activation", ["softmax", "sigmoid"])
@pytest.mark.parametrize("ours", [[1], [0], [1, 3], [3, 1], [0, 2, 4], [0, 1, 2, 3]])
def test_log_odds_against_the_slow_formula(
    activation: Literal["softmax", "sigmoid"], ours: list[int]
) -> None:
    logits = np.random.default_rng(0).normal(0, 4, (5, 2, 3, 4)).astype(np.float32)
    found = log_odds(logits, ours, activation)
    assert found.shape == (2, 3, 4)
    assert found.dtype == np.float32
    expected = np.array(
        [slow_log_odds(voxel, ours, activation) for voxel in logits.reshape(5, -1).T.tolist()]
    )
    np.testing.assert_allclose(found.ravel(), expected, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("activation", ["softmax", "sigmoid"])
def test_a_channel_named_twice_counts_once(activation: Literal["softmax", "sigmoid"]) -> None:
    logits = np.random.default_rng(3).normal(0, 3, (3, 2, 2, 2)).astype(np.float32)
    np.testing.assert_array_equal(
        log_odds(logits, [1, 1], activation), log_odds(logits, [1], activation)
    )


@pytest.mark.parametrize("activation", ["softmax", "sigmoid"])
@pytest.mark.parametrize("size", [90.0, 1e3, 1e5])
def test_big_logits_stay_finite_and_keep_their_sign(
    activation: Literal["softmax", "sigmoid"], size: float
) -> None:
    sure = np.array([-size, size, size / 2], dtype=np.float32).reshape(3, 1, 1, 1)
    for logits, sign in ((sure, 1), (-sure, -1)):
        found = log_odds(logits, [1, 2], activation)
        assert np.isfinite(found).all()
        assert np.sign(found).item() == sign


@pytest.mark.parametrize("channels", [[2], [0, 5], [-1]])
@pytest.mark.parametrize("activation", ["softmax", "sigmoid"])
def test_a_channel_that_the_network_lacks(
    channels: list[int], activation: Literal["softmax", "sigmoid"]
) -> None:
    logits = np.zeros((2, 1, 1, 1), dtype=np.float32)
    with pytest.raises(TeacherError, match=r"teacher t: .*out of range.* emits 2 channels"):
        log_odds(logits, channels, activation, where="teacher t")


def test_all_channels_leave_no_background_for_a_softmax_but_do_for_a_sigmoid() -> None:
    logits = np.zeros((2, 1, 1, 1), dtype=np.float32)
    with pytest.raises(TeacherError, match="no background"):
        log_odds(logits, [0, 1], "softmax")
    assert log_odds(logits, [0, 1], "sigmoid").item() == pytest.approx(np.log(3))
