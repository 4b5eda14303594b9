from __future__ import annotations

from typing import Any

import dask.array as da
import numpy as np
import pytest

from pipeline.consensus.regions import (
    OTHER_REGIONS,
    average_experts,
    consensus,
    region_counts,
    trusted,
)

NAN = float("nan")


def at(array: da.Array) -> Any:
    """The values of the one voxel."""
    values = np.asarray(array)[..., 0, 0, 0]
    return values.item() if values.ndim == 0 else values.tolist()


@pytest.mark.parametrize(
    ("here", "not_here", "wanted"),
    [(True, True, [3, 0, -2]), (True, False, [3, NAN, NAN]), (False, True, [NAN, 0, -2]),
     (False, False, [NAN, NAN, NAN])],
)  # fmt: skip
def test_a_teacher_is_believed_on_one_side(here: bool, not_here: bool, wanted: list[float]) -> None:
    said = np.array([3, 0, -2, NAN], np.float16)
    for temperature in (None, 2.0):
        found = trusted(said, here, not_here, temperature)
        assert (found.dtype == np.float16) is (here and not_here and temperature is None)
        expected = [d / (temperature or 1) for d in [*wanted, NAN]]
        assert found.tolist() == pytest.approx(expected, nan_ok=True)


def test_the_average_of_large_values_is_not_that_of_float16() -> None:
    experts = [da.from_array(np.full((1, 1, 1), 60000, np.float16)) for _ in range(2)]
    assert at(average_experts(experts)) == pytest.approx(60000, rel=1e-3)


@pytest.mark.parametrize("temperature", [0.25, 1.7, 16.0])
def test_no_region_of_one_expert_changes_with_its_temperature_at_margin_0(
    temperature: float,
) -> None:
    rng = np.random.default_rng(7)
    odds = rng.normal(0, 5, (2, 4, 5, 6)).astype(np.float16)
    plain = consensus(da.from_array(odds))
    hot = consensus(da.from_array(trusted(odds, True, True, temperature)))
    for name in ("organ", "background", "conflict", "abstained"):
        np.testing.assert_array_equal(
            np.asarray(getattr(plain, name)), np.asarray(getattr(hot, name))
        )


def test_sizes_of_regions_are_counts_of_voxels() -> None:
    odds = np.zeros((2, 1, 1, 4), np.float32)
    odds[:, 0, 0] = [[3, 3, -3, 0], [-3, 3, -3, -3]]
    counts = region_counts(odds)
    assert OTHER_REGIONS == ("agreed background", "conflict", "abstained")
    assert counts.tolist() == [2, 1, 1, 1, 1]
