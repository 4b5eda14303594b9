"""Means, spreads and paired differences of scores: pure functions of arrays.

Letters: S seeds, N cases, K organs. A score is NaN where a case has none for that organ (it is not
annotated there, or absent) and where a seed has no finished run. Differences are of scores whose
places depend on the reference alone, so that they are the same for every configuration and seed.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]

MIN_SEEDS = 3
MIN_CASES = 5
NUM_DRAWS = 10_000
CONFIDENCE = 0.95
OVER_ORGANS = "mean"


@dataclass(frozen=True)
class Estimate:
    """A configuration's score.

    Attributes:
        mean: over seeds of the mean over cases; None if there is no score.
        std: between seeds (divided by S - 1); None for fewer than two.
        per_seed: mean over cases, in the order of the seeds; None where none is finished.
    """

    mean: float | None
    std: float | None
    per_seed: tuple[float | None, ...]


@dataclass(frozen=True)
class Difference:
    """A configuration minus the baseline, paired by seed and case.

    Attributes:
        mean: over seeds and cases; None if no pair has a score.
        low: 2.5 % of the paired bootstrap; None where there are too few seeds or cases.
        high: 97.5 % of it.
        num_seeds: seeds with a finished run of both.
        num_cases: cases with a score; of the mean over organs: of the organ with fewest.
        note: why there is no interval, or no difference.
    """

    mean: float | None
    low: float | None
    high: float | None
    num_seeds: int
    num_cases: int
    note: str


def estimates(scores: Floats) -> list[Estimate]:
    """One estimate per organ, and one of their mean.

    Args:
        scores: (S, N, K).

    Returns:
        K + 1 estimates; the last is of the mean over the organs that have a score.
    """
    per_seed = _mean(scores, axis=1)
    columns = [*per_seed.T, _mean(per_seed, axis=1)]
    return [_estimate(values) for values in columns]


def differences(
    scores: Floats, baseline: Floats, *, seed: int = 0, min_seeds: int | None = None
) -> list[Difference]:
    """One paired difference per organ, and one of their mean.

    The interval is a percentile interval of a bootstrap in which cases and seeds are drawn
    independently of each other, with replacement, and every pair (case, seed) counts as often as
    its case times its seed was drawn (the crossed bootstrap of Owen 2007, Annals of Applied
    Statistics 1:386). Pairs of one case are alike, and so are pairs of one seed: drawing pairs as
    if they were independent would give intervals that are too narrow. All organs share the draws.

    Args:
        scores: (S, N, K).
        baseline: (S, N, K), the same seeds, cases and organs.
        seed: of the draws.
        min_seeds: seeds without which there is no interval, `MIN_SEEDS` by default; with 1, for
            what has no seeds, cases alone are drawn.

    Returns:
        K + 1 differences; the last is of the mean over the organs that have a score.
    """
    apart = scores - baseline
    both = ~np.isnan(apart).all(axis=(1, 2))
    apart = apart[both]
    num_seeds, _, num_organs = apart.shape
    if num_seeds == 0:
        missing = Difference(None, None, None, 0, 0, "no seed is finished in both")
        return [missing] * (num_organs + 1)
    counts = [int((~np.isnan(apart[0, :, k])).sum()) for k in range(num_organs)]
    by_organ = _mean(_mean(apart, axis=1), axis=0)
    drawn = crossed_draws(apart, np.random.default_rng(seed), NUM_DRAWS)
    present = [k for k in range(num_organs) if counts[k]]
    means = [*by_organ, _mean(by_organ, axis=0)]
    # A draw that holds no case of some organ has no mean over organs, and is left out there.
    draws = [*drawn.T, drawn[:, present].mean(axis=1)]
    num = [*counts, min((counts[k] for k in present), default=0)]
    return [
        _difference(float(m), d, num_seeds, n, MIN_SEEDS if min_seeds is None else min_seeds)
        for m, d, n in zip(means, draws, num, strict=True)
    ]


def crossed_draws(apart: Floats, rng: np.random.Generator, num_draws: int) -> Floats:
    """Means over drawn seeds and cases: (S, N, K) -> (draws, K), NaN where no drawn case has a
    score."""
    num_seeds, num_cases, num_organs = apart.shape
    seeds = rng.multinomial(num_seeds, np.full(num_seeds, 1 / num_seeds), size=num_draws)
    cases = rng.multinomial(num_cases, np.full(num_cases, 1 / num_cases), size=num_draws)
    drawn = np.full((num_draws, num_organs), np.nan)
    for k in range(num_organs):
        scored = ~np.isnan(apart[0, :, k])
        weight = cases[:, scored].sum(axis=1)
        total = ((seeds @ apart[:, scored, k]) * cases[:, scored]).sum(axis=1)
        np.divide(total, num_seeds * weight, out=drawn[:, k], where=weight > 0)
    return drawn


def _difference(
    mean: float, drawn: Floats, num_seeds: int, num_cases: int, min_seeds: int
) -> Difference:
    if np.isnan(mean):
        return Difference(None, None, None, num_seeds, num_cases, "no case has a score")
    few = []
    if num_seeds < min_seeds:
        few.append(f"{num_seeds} of {min_seeds} seeds")
    if num_cases < MIN_CASES:
        few.append(f"{num_cases} of {MIN_CASES} cases")
    if few:
        return Difference(
            mean, None, None, num_seeds, num_cases, f"too few for an interval: {' and '.join(few)}"
        )
    tail = 100 * (1 - CONFIDENCE) / 2
    low, high = np.nanpercentile(drawn, [tail, 100 - tail])
    return Difference(mean, float(low), float(high), num_seeds, num_cases, "")


def _estimate(values: Floats) -> Estimate:
    known = values[~np.isnan(values)]
    per_seed = tuple(None if np.isnan(v) else float(v) for v in values)
    if not known.size:
        return Estimate(None, None, per_seed)
    std = float(known.std(ddof=1)) if known.size > 1 else None
    return Estimate(float(known.mean()), std, per_seed)


def _mean(values: Floats, axis: int) -> Floats:
    """The mean without NaN; NaN where nothing is left, and no warning then."""
    known = ~np.isnan(values)
    number = known.sum(axis=axis)
    total = np.where(known, values, 0.0).sum(axis=axis)
    return np.asarray(np.where(number > 0, total / np.maximum(number, 1), np.nan))
