"""The temperature is the one that would undo a known mistake, and never runs away."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest

from pipeline.consensus.evidence import BOUNDS, Calibration, calibrate, count_log_odds, no_counts

SHAPE = (40, 50, 50)


def drawn(scale: float, *, shift: float = -2.0, seed: int = 0) -> Calibration:
    """Log-odds that tell the truth, multiplied: labels are drawn from the log-odds themselves."""
    rng = np.random.default_rng(seed)
    true = rng.normal(shift, 2.5, SHAPE)
    inside = rng.random(SHAPE) < 1 / (1 + np.exp(-true))
    found = calibrate(counted(scale * true, inside))
    assert found is not None
    return found


def counted(
    odds: npt.NDArray[np.float64], inside: npt.NDArray[np.bool_], **options: npt.NDArray[np.bool_]
) -> npt.NDArray[np.int64]:
    chosen = options.get("chosen", np.ones(inside.shape, dtype=np.bool_))
    return count_log_odds(odds.astype(np.float16), inside, chosen)


@pytest.mark.parametrize("scale", [0.5, 1.0, 3.0, 6.0])
def test_it_undoes_a_factor_on_the_log_odds(scale: float) -> None:
    found = drawn(scale)
    assert found.temperature == pytest.approx(scale, rel=0.03)
    assert not found.at_bound
    assert found.ece_after < 0.01
    assert found.nll_after <= found.nll_before
    assert found.nll_after == pytest.approx(drawn(1.0).nll_after, rel=0.02)
    if scale != 1.0:
        assert found.ece_after < found.ece_before / 3


def test_it_is_the_minimum_of_the_plainly_written_loss() -> None:
    rng = np.random.default_rng(1)
    odds = rng.normal(-3, 6, SHAPE).astype(np.float16)
    inside = rng.random(SHAPE) < 0.1
    found = calibrate(counted(odds.astype(np.float64), inside))
    assert found is not None

    def plain(t: float) -> float:
        p = 1 / (1 + np.exp(-odds.astype(np.float64) / t))
        p = np.clip(p, 1e-300, 1 - 1e-16)
        return float(-np.mean(np.where(inside, np.log(p), np.log1p(-p))))

    assert found.nll_before == pytest.approx(plain(1.0), rel=1e-5)
    assert found.nll_after == pytest.approx(plain(found.temperature), rel=1e-5)
    for t in np.geomspace(*BOUNDS, 60):
        assert found.nll_after <= plain(float(t)) + 1e-6


def test_unseen_and_unknown_voxels_are_not_counted() -> None:
    odds = np.array([[[1.0, np.nan, -2.0, 3.0]]])
    inside = np.array([[[True, True, False, True]]])
    chosen = np.array([[[True, True, True, False]]])
    counts = counted(odds, inside, chosen=chosen)
    assert counts.sum() == 2
    pattern = int(np.float16(1.0).view(np.uint16))
    assert (counts[0, pattern], counts[1, pattern]) == (0, 1)
    assert calibrate(no_counts()) is None


def test_counts_add_up_over_cases() -> None:
    rng = np.random.default_rng(2)
    odds, inside = rng.normal(0, 4, SHAPE), rng.random(SHAPE) < 0.3
    half = SHAPE[0] // 2
    apart = counted(odds[:half], inside[:half]) + counted(odds[half:], inside[half:])
    np.testing.assert_array_equal(apart, counted(odds, inside))


@pytest.mark.parametrize("label", [True, False])
def test_a_label_of_one_class_tells_nothing(label: bool) -> None:
    odds = np.random.default_rng(3).normal(0, 4, SHAPE)
    found = calibrate(counted(odds, np.full(SHAPE, label)))
    assert found is not None
    assert (found.temperature, found.at_bound) == (1.0, False)
    assert found.nll_after == found.nll_before


def test_a_teacher_that_never_errs_stops_at_the_bound() -> None:
    odds = np.random.default_rng(4).normal(0, 4, SHAPE)
    found = calibrate(counted(odds, odds > 0))
    assert found is not None
    assert (found.temperature, found.at_bound) == (BOUNDS[0], True)


def test_a_teacher_that_always_errs_stops_at_the_other_bound() -> None:
    odds = np.random.default_rng(5).normal(0, 4, SHAPE)
    found = calibrate(counted(odds, odds < 0))
    assert found is not None
    assert (found.temperature, found.at_bound) == (BOUNDS[1], True)


def test_the_largest_values_of_the_cache_stay_finite() -> None:
    odds = np.array([[[65504.0, -65504.0, 65504.0, -65504.0]]])
    inside = np.array([[[True, False, False, True]]])
    found = calibrate(counted(odds, inside))
    assert found is not None
    assert np.isfinite(found.nll_before)
    assert found.temperature == BOUNDS[1]
