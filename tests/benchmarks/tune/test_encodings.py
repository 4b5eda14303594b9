from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from benchmarks.tune.encodings import (
    Encoding,
    arcsine_code,
    arcsine_value,
    feature_encodings,
    int8_code,
    int8_value,
    log_odds_encodings,
)

log_odds = hnp.arrays(
    np.float32, st.integers(1, 50), elements=st.floats(-60, 60, width=32, allow_subnormal=False)
)


def both_ways(encoding: Encoding, values: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    return encoding.decode(*encoding.encode(values))


@pytest.mark.parametrize("encoding", log_odds_encodings(), ids=lambda e: e.name)
@given(values=log_odds)
def test_no_encoding_on_offer_moves_a_voxel_to_another_region(
    encoding: Encoding, values: npt.NDArray[np.float32]
) -> None:
    back = both_ways(encoding, values)
    assert back.dtype == np.float32
    assert np.array_equal(np.sign(back), np.sign(values))


@pytest.mark.parametrize("encoding", log_odds_encodings(), ids=lambda e: e.name)
def test_voxels_not_seen_stay_so(encoding: Encoding) -> None:
    values = np.array([np.nan, 1.0, -1.0, np.nan], dtype=np.float32)
    assert np.array_equal(np.isnan(both_ways(encoding, values)), np.isnan(values))


@pytest.mark.parametrize("encoding", feature_encodings(), ids=lambda e: e.name)
def test_features_come_back_nearly_and_unseen_cells_stay_so(encoding: Encoding) -> None:
    values = np.random.default_rng(0).normal(size=(4, 6, 6, 6)).astype(np.float32)
    values[:, 0] = np.nan
    values[2] = 0
    back = both_ways(encoding, values)
    assert np.array_equal(np.isnan(back), np.isnan(values))
    assert np.nanmax(np.abs(back - values)) < 0.5


def test_the_arcsine_code_uses_all_of_its_range() -> None:
    ends = np.array([-100, -1e-6, 0, 1e-6, 100], dtype=np.float32)
    assert arcsine_code(ends).tolist() == [1, 127, 128, 129, 255]
    codes = np.arange(256, dtype=np.uint8)
    assert np.array_equal(arcsine_code(arcsine_value(codes)), codes)


def test_int8_steps_are_the_channels_own() -> None:
    values = np.stack([np.full((2, 2, 2), 127.0), np.full((2, 2, 2), 1.27)]).astype(np.float32)
    values[:, 0, 0, 0] /= -127
    code, steps = int8_code(values)
    assert code.dtype == np.int8
    assert steps.ravel() == pytest.approx([1.0, 0.01])
    assert code[:, 0, 0, 0].tolist() == [-1, -1]
    assert int8_value(code, steps) == pytest.approx(values)
