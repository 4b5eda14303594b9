"""How far a teacher's log-odds can be believed: one temperature per teacher and organ.

    p(v) = sigmoid(d(v) / T)
    T = argmin of the mean of  -log p(v)        where the label says the organ,
                               -log(1 - p(v))   where it says not,

over all voxels that the teacher saw and the label knows. T > 1: the teacher is over-confident.
Source: temperature scaling and the expected calibration error (ECE) of Guo et al. 2017, arXiv
1706.04599, for one organ against all else; that far background counts too is a choice, measured in
docs/decisions.

Cached values are float16, so a histogram with one bin per bit pattern is exact and as small for a
thousand cases as for one.
"""

from __future__ import annotations

from typing import Final

import numpy as np
import numpy.typing as npt
from scipy.optimize import minimize_scalar

from pipeline.config import Config

Counts = npt.NDArray[np.int64]
BoolArray = npt.NDArray[np.bool_]
FloatArray = npt.NDArray[np.float64]

# A few cases on which a teacher makes no mistake would let it be as sure as one likes.
BOUNDS: Final = (0.25, 16.0)
NUM_ECE_BINS: Final = 15
_NUM_PATTERNS: Final = 1 << 16


class Calibration(Config):
    """The best temperature, and what it changes.

    Attributes:
        temperature: T > 0; 1 if the label shows one class only, since then nothing can be told.
        at_bound: whether T is one of `BOUNDS`, so that the best one lies beyond.
        num_voxels: that it was measured on.
        num_inside: of them, those whose label is the organ.
        nll_before: mean negative log-likelihood in nats at T = 1.
        nll_after: at T.
        ece_before: expected calibration error at T = 1, 0 to 1.
        ece_after: at T.
    """

    temperature: float
    at_bound: bool
    num_voxels: int
    num_inside: int
    nll_before: float
    nll_after: float
    ece_before: float
    ece_after: float


def no_counts() -> Counts:
    """int64 (2, 65536) of zeros: label says not, label says so; one column per float16 pattern."""
    return np.zeros((2, _NUM_PATTERNS), dtype=np.int64)


def count_log_odds(odds: npt.NDArray[np.float16], inside: BoolArray, chosen: BoolArray) -> Counts:
    """How often each value occurs inside and outside the organ.

    Args:
        odds: float16 log-odds (D, H, W), NaN where not seen; such voxels are left out.
        inside: (D, H, W), where the label is the organ.
        chosen: (D, H, W), voxels to count: those that the label knows.

    Returns:
        int64 (2, 65536), as `no_counts`.
    """
    counts = no_counts()
    chosen = chosen & ~np.isnan(odds)
    patterns = np.ascontiguousarray(odds).view(np.uint16)
    for row, where in enumerate((chosen & ~inside, chosen & inside)):
        counts[row] = np.bincount(patterns[where], minlength=_NUM_PATTERNS)
    return counts


def calibrate(counts: Counts) -> Calibration | None:
    """The temperature that best explains the counts; None if nothing was counted.

    The likelihood is convex in 1 / T, so it has one minimum in log T, which a bounded search finds.

    Args:
        counts: int64 (2, 65536) of `count_log_odds`, summed over cases.
    """
    used = np.flatnonzero(counts.sum(axis=0))
    if used.size == 0:
        return None
    values = used.astype(np.uint16).view(np.float16).astype(np.float64)
    outside, inside = counts[:, used].astype(np.float64)
    temperature = _search(values, outside, inside)
    return Calibration(
        temperature=temperature,
        at_bound=temperature in BOUNDS,
        num_voxels=int(outside.sum() + inside.sum()),
        num_inside=int(inside.sum()),
        nll_before=_rounded(_nll(values, outside, inside)),
        nll_after=_rounded(_nll(values / temperature, outside, inside)),
        ece_before=_rounded(_ece(values, outside, inside)),
        ece_after=_rounded(_ece(values / temperature, outside, inside)),
    )


def _search(values: FloatArray, outside: FloatArray, inside: FloatArray) -> float:
    if not (outside.any() and inside.any()):
        return 1.0

    def loss(log_temperature: float) -> float:
        return _nll(values / np.exp(log_temperature), outside, inside)

    low, high = np.log(BOUNDS)
    found = float(minimize_scalar(loss, bounds=(low, high), method="bounded").x)
    # The search never looks at its ends, which is where the minimum is if a teacher never errs.
    best = min((found, low, high), key=loss)
    return _rounded(float(np.exp(best)))


def _nll(values: FloatArray, outside: FloatArray, inside: FloatArray) -> float:
    """Mean of -log sigmoid(+-d), in nats: log(1 + exp(-d)) inside, log(1 + exp(d)) outside."""
    total = inside @ np.logaddexp(0, -values) + outside @ np.logaddexp(0, values)
    return float(total / (inside.sum() + outside.sum()))


def _ece(values: FloatArray, outside: FloatArray, inside: FloatArray) -> float:
    """Mean over voxels of |mean p - share inside| of the voxel's bin; bins of equal width in p."""
    p = np.exp(-np.logaddexp(0, -values))
    bins = np.minimum((p * NUM_ECE_BINS).astype(np.int64), NUM_ECE_BINS - 1)
    count = inside + outside
    gap = np.bincount(bins, weights=p * count - inside, minlength=NUM_ECE_BINS)
    return float(np.abs(gap).sum() / count.sum())


def _rounded(value: float) -> float:
    """Six significant digits: the last ones of a sum differ between machines."""
    return float(f"{value:.6g}")
