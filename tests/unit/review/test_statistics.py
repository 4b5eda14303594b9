from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import pytest

from pipeline.review import statistics
from pipeline.review.statistics import crossed_draws, differences, estimates

NAN = math.nan
Floats = npt.NDArray[np.float64]


def planted(seeds: int, cases: int, organs: int, seed: int = 0) -> Floats:
    return np.random.default_rng(seed).random((seeds, cases, organs))


def slow_mean(values: Sequence[float]) -> float:
    known = [v for v in values if not math.isnan(v)]
    return math.fsum(known) / len(known) if known else NAN


def all_draws(apart: Floats, organ: int) -> list[float]:
    """The mean of every way to draw seeds and cases, each as likely as the others."""
    found = []
    num_seeds, num_cases, _ = apart.shape
    for seeds in itertools.product(range(num_seeds), repeat=num_seeds):
        for cases in itertools.product(range(num_cases), repeat=num_cases):
            values = [apart[s, n, organ] for s in seeds for n in cases]
            found.append(slow_mean(values))
    return found


class TestEstimates:
    def test_a_mean_over_seeds_of_means_over_cases(self) -> None:
        scores = planted(3, 5, 2)
        scores[:, 1:3, 1] = NAN  # not annotated there
        found = estimates(scores)
        for organ in range(2):
            per_seed = [slow_mean(scores[s, :, organ].tolist()) for s in range(3)]
            mean = sum(per_seed) / 3
            assert found[organ].per_seed == pytest.approx(per_seed)
            assert found[organ].mean == pytest.approx(mean)
            spread = math.sqrt(sum((v - mean) ** 2 for v in per_seed) / 2)
            assert found[organ].std == pytest.approx(spread)

    def test_the_last_is_of_organs_weighed_alike(self) -> None:
        scores = np.full((1, 3, 3), NAN)
        scores[0, :, 0] = 0.9, 0.8, 0.7  # three cases of one organ
        scores[0, 0, 1] = 0.4  # one of another, none of the third
        *_, mean = estimates(scores)
        assert mean.mean == pytest.approx((0.8 + 0.4) / 2)
        assert mean.std is None

    def test_a_failed_seed_and_an_organ_without_cases_are_no_zeros(self) -> None:
        scores = planted(3, 4, 2)
        scores[1] = NAN
        scores[:, :, 1] = NAN
        first, second, _ = estimates(scores)
        assert first.per_seed[1] is None
        assert first.mean == pytest.approx((scores[0, :, 0].mean() + scores[2, :, 0].mean()) / 2)
        assert (second.mean, second.std, second.per_seed) == (None, None, (None,) * 3)


class TestDifferences:
    def test_the_interval_is_that_of_all_draws(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(statistics, "MIN_CASES", 3)
        scores, baseline = planted(3, 4, 2, seed=1), planted(3, 4, 2, seed=2)
        scores[:, 0, 1] = baseline[:, 0, 1] = NAN
        found = differences(scores, baseline)
        for organ in range(2):
            exact = np.array(all_draws(scores - baseline, organ))
            low, high = np.nanpercentile(exact, [2.5, 97.5])
            assert found[organ].mean == pytest.approx(np.nanmean((scores - baseline)[..., organ]))
            assert found[organ].low == pytest.approx(low, abs=0.03)
            assert found[organ].high == pytest.approx(high, abs=0.03)

    def test_seeds_are_drawn_as_seeds_and_cases_as_cases(self) -> None:
        """Where seeds alone differ, more cases do not narrow the interval; nor the other way."""
        by_seed = np.broadcast_to(np.array([-1.0, 0.0, 1.0])[:, None, None], (3, 200, 1))
        by_case = np.broadcast_to(np.linspace(-1, 1, 5)[None, :, None], (200, 5, 1))
        for apart, exact in ((by_seed, 2 / 3 / 3), (by_case, 0.5 / 5)):
            drawn = crossed_draws(np.array(apart), np.random.default_rng(0), 20_000)
            assert drawn.mean() == pytest.approx(0.0, abs=0.01)
            assert drawn.var() == pytest.approx(exact, rel=0.05)

    def test_a_shift_that_all_share_has_no_width(self) -> None:
        baseline = planted(3, 6, 2)
        for found in differences(baseline + 0.125, baseline):
            assert (found.mean, found.low, found.high) == pytest.approx((0.125, 0.125, 0.125))
            assert (found.num_seeds, found.num_cases, found.note) == (3, 6, "")

    def test_pairs_need_both(self) -> None:
        scores, baseline = planted(4, 6, 1), planted(4, 6, 1, seed=5)
        expected = (scores - baseline)[1:3].mean()
        scores[0] = NAN
        baseline[3] = NAN
        found = differences(scores, baseline)[0]
        assert found.num_seeds == 2
        assert found.mean == pytest.approx(expected)
        assert found.low is None
        assert found.note == "too few for an interval: 2 of 3 seeds"

    def test_too_few_cases_of_one_organ_leave_the_others_alone(self) -> None:
        scores, baseline = planted(3, 6, 2), planted(3, 6, 2, seed=1)
        scores[:, 2:, 1] = NAN
        rich, poor, mean = differences(scores, baseline)
        assert rich.low is not None
        assert poor.note == mean.note == "too few for an interval: 2 of 5 cases"
        assert mean.mean == pytest.approx((rich.mean or 0) / 2 + (poor.mean or 0) / 2)

    def test_nothing_in_common_is_no_difference(self) -> None:
        scores, baseline = planted(2, 3, 2), np.full((2, 3, 2), NAN)
        assert all(d.mean is None and d.note for d in differences(scores, baseline))
        scores[:, :, 1] = NAN
        assert differences(scores, scores)[1].note == "no case has a score"

    def test_the_same_numbers_give_the_same_interval(self) -> None:
        scores, baseline = planted(3, 6, 2), planted(3, 6, 2, seed=1)
        assert differences(scores, baseline) == differences(scores, baseline)
