from __future__ import annotations

from typing import Any

import dask.array as da
import numpy as np
import pytest

from pipeline.consensus.regions import (
    OTHER_REGIONS,
    average_experts,
    consensus,
    labels_win,
    region_counts,
    trusted,
)
from tests.unit.consensus.slow_consensus import slow_average

NAN = float("nan")


def column(*votes: float) -> da.Array:
    """One voxel, one organ per vote."""
    return da.from_array(np.array(votes, np.float16).reshape(-1, 1, 1, 1))


def at(array: da.Array) -> Any:
    """The values of the one voxel."""
    values = np.asarray(array)[..., 0, 0, 0]
    return values.item() if values.ndim == 0 else values.tolist()


def label(value: int) -> da.Array:
    return da.from_array(np.full((1, 1, 1), value, np.uint8))


@pytest.mark.parametrize(
    ("votes", "margin", "region"),
    [
        ((3, -3), 0, "organ 0"),
        ((-3, 0.1), 0, "organ 1"),
        ((3, 2), 0, "conflict"),
        ((-3, -0.1), 0, "background"),
        ((0, -3), 0, "abstained"),
        ((-1, -3), 1, "abstained"),
        ((1, -3), 1, "abstained"),
        ((1.5, -3), 1, "organ 0"),
        ((NAN, -3), 0, "abstained"),
        ((NAN, 3), 0, "organ 1"),
        ((NAN, NAN), 0, "abstained"),
    ],
)
def test_regions_of_one_voxel(votes: tuple[float, ...], margin: float, region: str) -> None:
    found = consensus(column(*votes), margin=margin)
    wanted = [region in ("conflict", f"organ {k}") for k in range(2)]
    assert at(found.organ) == wanted
    assert at(found.background) == (region == "background")
    assert at(found.conflict) == (region == "conflict")
    assert at(found.abstained) == (region == "abstained")


@pytest.mark.parametrize(
    ("value", "votes", "wanted"),
    [
        (1, (-2, 9), (6, -9)),  # organ 0 by label: the miss and the other's false positive go
        (1, (8, -1), (8, -6)),  # a surer teacher stays surer
        (0, (4, 5), (-6, 5)),  # not organ 0; nothing is said of organ 1
        (255, (4, 5), (4, 5)),  # ignored
        (0, (NAN, NAN), (-6, NAN)),  # unseen counts as 0 where the label speaks
        (1, (NAN, NAN), (6, -6)),
        (255, (NAN, 1), (NAN, 1)),
        (2, (3, 5), (-6, 5)),  # organ 1 is not annotated here, so its label value says nothing
    ],
)
def test_labels_win_in_one_voxel(
    value: int, votes: tuple[float, ...], wanted: tuple[float, ...]
) -> None:
    corrected = labels_win(column(*votes), label(value), [0], 6.0)
    assert corrected.dtype == np.float32
    np.testing.assert_array_equal(at(corrected), wanted)


def test_a_label_of_several_organs_speaks_of_each() -> None:
    corrected = at(labels_win(column(1, 2, 3), label(2), [0, 1], 6.0))
    assert corrected == [-6, 6, -6]


def test_without_labels_the_teachers_stay() -> None:
    votes = column(1, -2)
    assert at(consensus(votes, None, [0]).log_odds) == [1, -2]
    assert at(consensus(votes, label(1), []).log_odds) == [1, -2]


def test_labels_win_before_any_region_is_formed() -> None:
    found = consensus(column(-9, 4), label(1), [0], margin=5)
    assert at(found.organ) == [True, False]
    assert not at(found.abstained)


@pytest.mark.parametrize(
    ("here", "not_here", "wanted"),
    [(True, True, [3, 0, -2]), (True, False, [3, NAN, NAN]), (False, True, [NAN, 0, -2]),
     (False, False, [NAN, NAN, NAN])],
)  # fmt: skip
def test_a_teacher_is_believed_on_one_side(here: bool, not_here: bool, wanted: list[float]) -> None:
    said = np.array([3, 0, -2, NAN], np.float16)
    for temperature in (None, 2.0):
        found = trusted(said, here, not_here, temperature)
        assert (found.dtype == np.float16) is (here and not_here and temperature is None)
        expected = [d / (temperature or 1) for d in [*wanted, NAN]]
        assert found.tolist() == pytest.approx(expected, nan_ok=True)


def test_several_experts_are_averaged_over_those_that_saw() -> None:
    rng = np.random.default_rng(4)
    experts = [rng.normal(size=(4, 5, 6)).astype(np.float16) for _ in range(3)]
    for expert in experts:
        expert[rng.random(expert.shape) < 0.4] = np.nan
    average = average_experts([da.from_array(e) for e in experts])
    assert average.dtype == np.float32
    np.testing.assert_allclose(np.asarray(average), slow_average(experts), rtol=1e-6)
    assert np.isnan(np.asarray(average)).any()


def test_the_average_of_large_values_is_not_that_of_float16() -> None:
    experts = [da.from_array(np.full((1, 1, 1), 60000, np.float16)) for _ in range(2)]
    assert at(average_experts(experts)) == pytest.approx(60000, rel=1e-3)


@pytest.mark.parametrize("temperature", [0.25, 1.7, 16.0])
def test_no_region_of_one_expert_changes_with_its_temperature_at_margin_0(
    temperature: float,
) -> None:
    rng = np.random.default_rng(7)
    odds = rng.normal(0, 5, (2, 4, 5, 6)).astype(np.float16)
    plain = consensus(da.from_array(odds))
    hot = consensus(da.from_array(trusted(odds, True, True, temperature)))
    for name in ("organ", "background", "conflict", "abstained"):
        np.testing.assert_array_equal(
            np.asarray(getattr(plain, name)), np.asarray(getattr(hot, name))
        )


def test_one_expert_is_taken_as_it_is() -> None:
    only = np.array([[[1.5, NAN]]], np.float16)
    np.testing.assert_array_equal(np.asarray(average_experts([da.from_array(only)])), only)


def test_sizes_of_regions_are_counts_of_voxels() -> None:
    odds = np.zeros((2, 1, 1, 4), np.float32)
    odds[:, 0, 0] = [[3, 3, -3, 0], [-3, 3, -3, -3]]
    counts = region_counts(odds)
    assert OTHER_REGIONS == ("agreed background", "conflict", "abstained")
    assert counts.tolist() == [2, 1, 1, 1, 1]
