"""Paired statistics against slow versions of themselves, and Holm's against his own example."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest

from pipeline.review.statistics import MIN_PAIRS, crossed_draws, holm, paired

NAN = math.nan


def exact_p(apart: list[float]) -> float:
    """Of all signs that the ranks could have, the share at least as far from the middle."""
    ranks = np.argsort(np.argsort(np.abs(apart))) + 1
    seen = sum(r for r, d in zip(ranks, apart, strict=True) if d > 0)
    middle = ranks.sum() / 2
    signs = itertools.product((0, 1), repeat=len(apart))
    far = [abs(np.dot(s, ranks) - middle) >= abs(seen - middle) for s in signs]
    return float(np.mean(far))


def test_the_test_is_that_of_all_signs() -> None:
    rng = np.random.default_rng(3)
    other = rng.random((9, 1))
    first = other + rng.normal(0.05, 0.05, other.shape)
    organ, mean = paired(first, other)
    assert organ.p == pytest.approx(exact_p((first - other)[:, 0].tolist()))
    assert mean.p == organ.p
    assert (organ.higher + organ.lower, organ.equal, organ.note) == (9, 0, "")


def test_ties_are_counted_and_left_out() -> None:
    rng = np.random.default_rng(4)
    other = rng.random((10, 1))
    first = other + rng.normal(0.05, 0.05, other.shape)
    first[7:] = other[7:] + 1e-13
    organ, _ = paired(first, other)
    assert (organ.equal, organ.higher + organ.lower) == (3, 7)
    assert organ.p == pytest.approx(exact_p((first - other)[:7, 0].tolist()))


def test_too_few_that_differ_have_no_p() -> None:
    other = np.linspace(0.1, 0.9, 9)[:, None]
    first = other.copy()
    first[: MIN_PAIRS - 1] += 0.1
    organ, _ = paired(first, other)
    assert organ.p is None
    assert organ.note == "no test: 5 of 6 cases differ"
    first[MIN_PAIRS - 1] += 0.1
    assert paired(first, other)[0].p == pytest.approx(2 / 2**6)


def test_the_interval_draws_cases_alone() -> None:
    rng = np.random.default_rng(5)
    first, other = rng.random((2, 8, 2))
    first[:3, 1] = other[:3, 1] = NAN
    organ, poor, mean = paired(first, other)
    drawn = crossed_draws((first - other)[None], np.random.default_rng(0), 10_000)
    assert organ.difference.low == pytest.approx(np.percentile(drawn[:, 0], 2.5))
    assert organ.difference.high == pytest.approx(np.percentile(drawn[:, 0], 97.5))
    # A bootstrap of a mean is as wide as its standard error says.
    spread = (first - other)[:, 0].std() / math.sqrt(8)
    assert drawn[:, 0].std() == pytest.approx(spread, rel=0.05)
    assert poor.difference.num_cases == 5
    assert poor.difference.low is not None
    gaps = [np.nanmean((first - other)[:, k]) for k in range(2)]
    assert mean.difference.mean == pytest.approx(np.mean(gaps))
    assert (mean.first, mean.other) == (
        pytest.approx(np.mean([np.nanmean(first[:, k]) for k in range(2)])),
        pytest.approx(np.mean([np.nanmean(other[:, k]) for k in range(2)])),
    )
    few = paired(first[:4, :1], other[:4, :1])[0]
    assert (few.difference.low, few.difference.note) == (
        None, "too few for an interval: 4 of 5 cases",
    )  # fmt: skip


def test_a_score_without_its_pair_is_refused() -> None:
    with pytest.raises(ValueError, match="without its pair"):
        paired(np.array([[0.1], [NAN]]), np.array([[0.1], [0.2]]))


def test_holm() -> None:
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.5, None, 0.9]) == [1.0, None, 1.0]
    assert holm([None]) == [None]
