"""Means, paired differences and their intervals: pure functions of arrays.

Letters: S seeds, N cases, K organs. A seed draws the whole cohort anew, so seeds are what is
repeated, and the cases of one seed have nothing to do with those of another. A Dice is NaN where a
case has none for that organ; where, depends on the reference alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]

CONFIDENCE = 0.95
MIN_SEEDS = 3


@dataclass(frozen=True)
class Interval:
    """A mean with its percentile interval; no interval for fewer than `MIN_SEEDS` seeds."""

    mean: float
    low: float | None
    high: float | None


def seed_means(scores: Floats) -> Floats:
    """(S, N, K) -> (S, K + 1): per seed the mean over cases of each organ, and over organs."""
    return _with_mean(_mean(scores, axis=1))


def over_seeds(scores: Floats) -> Floats:
    """(S, N, K) -> (K + 1): `seed_means`, then the mean over seeds."""
    return _mean(seed_means(scores), axis=0)


def spread(scores: Floats) -> Floats:
    """(S, N, K) -> (K + 1): standard deviation of `seed_means` over seeds (divided by S - 1)."""
    means = seed_means(scores)
    if means.shape[0] < 2:
        return np.full(means.shape[1], np.nan)
    return np.asarray(means.std(axis=0, ddof=1))


def draws(apart: Floats, rng: np.random.Generator, num: int) -> Floats:
    """Bootstrap of `over_seeds`: seeds are drawn with replacement, and within each drawn seed its
    cases.

    Args:
        apart: (S, N, K) differences, paired by seed and case.
        rng: of the draws.
        num: how many.

    Returns:
        (num, K + 1), NaN where a draw holds no score of an organ.
    """
    seeds, cases, _ = apart.shape
    known = ~np.isnan(apart)
    values = np.where(known, apart, 0.0)
    drawn = rng.integers(seeds, size=(num, seeds))
    counts = rng.multinomial(cases, np.full(cases, 1 / cases), size=(num, seeds))
    total = np.zeros((num, seeds, apart.shape[2]))
    weight = np.zeros_like(total)
    for seed in range(seeds):  # matrix products, which are quick
        slots = drawn == seed
        total[slots] = counts[slots] @ values[seed]
        weight[slots] = counts[slots] @ known[seed].astype(np.float64)
    means = np.where(weight > 0, total / np.maximum(weight, 1), np.nan)
    return _mean(_with_mean(means), axis=1)


def interval(mean: float, drawn: Floats, num_seeds: int) -> Interval:
    """The percentile interval of draws (num,) around a mean that was computed without them."""
    if num_seeds < MIN_SEEDS or np.isnan(drawn).all():
        return Interval(mean, None, None)
    tail = 100 * (1 - CONFIDENCE) / 2
    low, high = np.nanpercentile(drawn, [tail, 100 - tail])
    return Interval(mean, float(low), float(high))


def stratified(parts: Sequence[tuple[Floats, Floats]]) -> tuple[Floats, Floats]:
    """Means (K + 1) and draws (num, K + 1) of several regimes -> those of their plain mean: each
    regime is drawn by itself and counts the same."""
    means = _mean(np.stack([mean for mean, _ in parts]), axis=0)
    return means, _mean(np.stack([drawn for _, drawn in parts]), axis=0)


def better(first: Floats, second: Floats) -> int:
    """0 or 1: whose mean over organs, seeds and cases is higher; both (S, N, K)."""
    return int(over_seeds(second)[-1] > over_seeds(first)[-1])


def gap_closed(method: Floats, baseline: Floats, upper: Floats) -> float | None:
    """(method - baseline) / (upper - baseline) of the means over organs; None where the upper
    bound is less than .01 above the baseline."""
    low, high = over_seeds(baseline)[-1], over_seeds(upper)[-1]
    if not high - low >= 0.01:
        return None
    return float((over_seeds(method)[-1] - low) / (high - low))


def _with_mean(means: Floats) -> Floats:
    """(..., K) -> (..., K + 1)."""
    return np.concatenate([means, _mean(means, axis=-1)[..., None]], axis=-1)


def _mean(values: Floats, axis: int) -> Floats:
    """The mean without NaN; NaN where nothing is left, and no warning then."""
    known = ~np.isnan(values)
    number = known.sum(axis=axis)
    total = np.where(known, values, 0.0).sum(axis=axis)
    return np.asarray(np.where(number > 0, total / np.maximum(number, 1), np.nan))
