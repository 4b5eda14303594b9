"""Two sets of scores of the same cases: paired differences, intervals, tests. Pure functions.

Letters: N cases, K organs. A score is NaN where a case has none for that organ, in both sets alike.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.stats import wilcoxon

from pipeline.comparison.statistics import Difference, Floats, differences, estimates

# With five pairs no two-sided p of a signed-rank test is below 2 / 2^5 = 0.06.
MIN_PAIRS = 6
# Scores that differ by less are equal: what is left of rounding.
_EQUAL = 1e-9


@dataclass(frozen=True)
class Paired:
    """One metric of one organ, or of the mean over organs, in two sets.

    Attributes:
        first: mean of the first set over cases; None without a case.
        other: of the other set.
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

    Raises:
        ValueError: NaN is not in the same places.
    """
    if not np.array_equal(np.isnan(first), np.isnan(other)):
        raise ValueError("a score without its pair")
    apart = first - other
    known = ~np.isnan(apart)
    total = np.where(known, apart, 0.0).sum(axis=1)
    number = known.sum(axis=1)
    over_organs = np.where(number > 0, total / np.maximum(number, 1), np.nan)
    gaps = differences(first[None], other[None], min_seeds=1)
    means = [[e.mean for e in estimates(scores[None])] for scores in (first, other)]
    columns = [*apart.T, over_organs]
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
    p: float | None = None
    note = ""
    if len(differing) < MIN_PAIRS:
        note = f"no test: {len(differing)} of {MIN_PAIRS} cases differ"
    else:
        # Equal sizes are ties, whatever the last bits say.
        p = float(wilcoxon(differing.round(9)).pvalue)
    equal = len(apart) - len(differing)
    return Paired(first, other, gap, higher, equal, len(differing) - higher, p, note)
