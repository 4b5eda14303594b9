from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import entropy

from benchmarks.tune.loss import KL, FeatureError, binary_kl, flips

F = npt.NDArray[np.float32]


def odds(*values: float) -> F:
    return np.array(values, dtype=np.float32).reshape(1, 1, -1)


@given(st.floats(-20, 20), st.floats(-20, 20))
def test_kl_is_that_of_two_coins(a: float, b: float) -> None:
    p, q = 1 / (1 + np.exp(-a)), 1 / (1 + np.exp(-b))
    expected = entropy([p, 1 - p], [q, 1 - q])
    found = float(binary_kl(np.array(a), np.array(b)))
    assert found == pytest.approx(expected, rel=1e-6, abs=1e-12)


def test_kl_of_sure_voxels_neither_overflows_nor_vanishes() -> None:
    extreme = np.array([1000.0, -1000.0, 1000.0])
    assert binary_kl(extreme, extreme).tolist() == [0, 0, 0]
    assert binary_kl(np.array(1000.0), np.array(-1000.0)) == pytest.approx(2000 / 2)


def test_means_count_seen_voxels_at_each_temperature() -> None:
    kl = KL()
    exact, stored = odds(2.0, np.nan, -4.0, 8.0), odds(2.1, np.nan, -4.0, 8.0)
    kl.add(exact, stored)
    kl.add(odds(np.nan), odds(np.nan))
    assert kl.num_voxels == 3
    for temperature in (1, 2, 4):
        stored_as = float(np.float32(2.1)) / temperature
        one = float(binary_kl(np.array(2.0 / temperature), np.array(stored_as)))
        assert kl.mean(temperature) == pytest.approx(one / 3, rel=1e-4)
    assert kl.largest == pytest.approx(3 * max(kl.mean(t) for t in (1, 2, 4)))


def test_a_change_of_sign_is_a_region_flip() -> None:
    exact = {"liver": [odds(1, -1, -1)], "spleen": [odds(-1, -1, -1)]}
    assert flips(exact, exact) == (0, 0)
    left = {"liver": [odds(1, -1, -1)], "spleen": [odds(-1, 0.5, -1)]}
    assert flips(exact, left) == (1, 1)
    undecided = {"liver": [odds(1, -1, 0)], "spleen": [odds(-1, -1, -1)]}
    assert flips(exact, undecided) == (0, 1)  # no longer agreed background


def test_two_organs_that_change_places_are_an_argmax_flip_alone() -> None:
    exact = {"liver": [odds(3.0)], "spleen": [odds(3.1)]}
    tied = {"liver": [odds(3.0)], "spleen": [odds(3.0)]}
    assert flips(exact, tied) == (1, 0)


def test_teachers_of_one_organ_are_averaged_as_in_the_consensus() -> None:
    exact = {"liver": [odds(3.0), odds(-2.0)]}
    assert flips(exact, {"liver": [odds(1.0), odds(-2.0)]}) == (1, 1)
    assert flips(exact, {"liver": [odds(2.5), odds(-2.0)]}) == (0, 0)


def test_unseen_voxels_flip_nothing() -> None:
    exact = {"liver": [odds(np.nan, 1.0)]}
    assert flips(exact, exact) == (0, 0)
    assert flips(exact, {"liver": [odds(-1.0, 1.0)]})[1] == 1


def test_feature_errors_are_relative_to_each_channel() -> None:
    error = FeatureError()
    exact = np.ones((3, 2, 2, 2), dtype=np.float32)
    exact[0], exact[2] = 1000, 0
    stored = exact.copy()
    stored[0] *= 1.01
    stored[1] *= 1.03
    error.add(exact, stored)
    assert error.num_channels == 2
    assert error.rms == pytest.approx(np.sqrt((0.01**2 + 0.03**2) / 2), rel=1e-3)
    assert error.largest == pytest.approx(0.03, rel=1e-3)


def test_cosine_is_that_of_the_cells() -> None:
    error = FeatureError()
    exact = np.zeros((2, 1, 1, 3), dtype=np.float32)
    exact[:, 0, 0] = [[1, 1, np.nan], [0, 0, np.nan]]
    stored = exact.copy()
    stored[:, 0, 0, 1] = [1, 1]
    error.add(exact, stored)
    assert error.num_cells == 2
    assert error.mean_cosine == pytest.approx((1 - 1 / np.sqrt(2)) / 2)


def test_nothing_seen_is_no_error() -> None:
    error = FeatureError()
    unseen = np.full((2, 1, 1, 1), np.nan, dtype=np.float32)
    error.add(unseen, unseen)
    assert (error.rms, error.mean_cosine, error.largest) == (0, 0, 0)
