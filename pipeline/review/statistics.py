"""Means, spreads, paired differences, intervals and tests of scores: pure functions of arrays."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy.stats import wilcoxon

# Letters: S seeds, N cases, K organs. A score is NaN where a case has none for that organ (it is
# not annotated there, or absent) and where a seed has no finished run. Differences are of scores
# whose places depend on the reference alone, so that they are the same for every configuration and
# seed.

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

    def in_words(self) -> str:
        """`0.812 ± 0.004`; a dash where there is none."""
        if self.mean is None:
            return "–"
        return f"{self.mean:.3f}" + ("" if self.std is None else f" ± {self.std:.3f}")


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

    def in_words(self, digits: int = 3, apart: str = " ") -> str:
        """`+0.012 [-0.001, +0.030]`; a dash where there is none."""
        if self.mean is None:
            return "–"
        if self.low is None:
            return f"{self.mean:+.{digits}f}"
        return f"{self.mean:+.{digits}f}{apart}[{self.low:+.{digits}f}, {self.high:+.{digits}f}]"


def bootstrap(drawn: str, *, seeds: bool) -> dict[str, Any]:
    """How intervals are made, for the JSON beside them."""
    return {
        "drawn": drawn,
        "draws": NUM_DRAWS,
        "confidence": CONFIDENCE,
        **({"min_seeds": MIN_SEEDS} if seeds else {}),
        "min_cases": MIN_CASES,
    }


def estimates(scores: Floats) -> list[Estimate]:
    """One estimate per organ of scores (S, N, K), and one of their mean.

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
    few = [f"{num_seeds} of {min_seeds} seeds"] if num_seeds < min_seeds else []
    few += [f"{num_cases} of {MIN_CASES} cases"] if num_cases < MIN_CASES else []
    if few:
        note = f"too few for an interval: {' and '.join(few)}"
        return Difference(mean, None, None, num_seeds, num_cases, note)
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


# Two sets of scores of the same cases: paired differences, intervals, tests.

# With five pairs no two-sided p of a signed-rank test is below 2 / 2^5 = 0.06.
MIN_PAIRS = 6
# Scores that differ by less are equal: what is left of rounding.
_EQUAL = 1e-9


@dataclass(frozen=True)
class Paired:
    """One metric of one organ, or of the mean over organs, in two sets.

    Attributes:
        difference: first minus other, with its interval.
        higher: cases in which the first set's score is higher.
        equal: ties, which the test leaves out.
        lower: cases in which it is lower.
        p: of the test, two-sided; None if there is none.
        note: why there is none.
    """

    first: float | None
    other: float | None
    difference: Difference
    higher: int
    equal: int
    lower: int
    p: float | None
    note: str

    @property
    def num_cases(self) -> int:
        """Cases that have a score."""
        return self.higher + self.equal + self.lower


def paired(first: Floats, other: Floats) -> list[Paired]:
    """Each organ, and last the mean over organs.

    The interval is a percentile bootstrap over cases (`statistics.differences` with one seed). The
    test is Wilcoxon's signed-rank test (1945, Biometrics Bulletin 1:80) of the differences that are
    not 0: exact for few cases, else by the normal approximation, as scipy chooses. Of the mean over
    organs it takes, per case, the mean over the organs that the case has; the difference itself is,
    as elsewhere, the mean of the organs' differences.

    Args:
        first: (N, K).
        other: (N, K), the same cases and organs, NaN in the same places.
    """
    if not np.array_equal(np.isnan(first), np.isnan(other)):
        raise ValueError("a score without its pair")
    apart = first - other
    gaps = differences(first[None], other[None], min_seeds=1)
    means = [[e.mean for e in estimates(scores[None])] for scores in (first, other)]
    columns = [*apart.T, _mean(apart, axis=1)]
    return [
        _paired(column[~np.isnan(column)], gap, one, two)
        for column, gap, one, two in zip(columns, gaps, *means, strict=True)
    ]


def holm(p_values: Sequence[float | None]) -> list[float | None]:
    """Adjusted p of a family (Holm 1979, Scandinavian Journal of Statistics 6:65): the k-th
    smallest of m times m - k + 1, never below the one before, at most 1. None is no member."""
    order = sorted((p, n) for n, p in enumerate(p_values) if p is not None)
    adjusted: list[float | None] = [None] * len(p_values)
    largest = 0.0
    for rank, (p, n) in enumerate(order):
        largest = max(largest, min(1.0, p * (len(order) - rank)))
        adjusted[n] = largest
    return adjusted


def _paired(apart: Floats, gap: Difference, first: float | None, other: float | None) -> Paired:
    differing = apart[np.abs(apart) > _EQUAL]
    higher = int((differing > 0).sum())
    equal = len(apart) - len(differing)
    p, note = None, f"no test: {len(differing)} of {MIN_PAIRS} cases differ"
    if len(differing) >= MIN_PAIRS:
        # Equal sizes are ties, whatever the last bits say.
        p, note = float(wilcoxon(differing.round(9)).pvalue), ""
    return Paired(first, other, gap, higher, equal, len(differing) - higher, p, note)
