from __future__ import annotations

from pathlib import Path

import pytest

from pipeline.data.entries import CaseFiles
from pipeline.data.sizes import CaseSize
from pipeline.data.volume import Grid
from pipeline.setup.needs import (
    CASES,
    FEATURES,
    IMAGES,
    LOG_ODDS,
    METADATA,
    Sample,
    Todo,
    estimate,
    estimate_all,
    least,
)


def case(name: str, side: int, native: int | None = None) -> CaseSize:
    source = CaseFiles("a", name, Path("image"), Path("label"), "train")
    grid = Grid.axis_aligned((side, side, side), (1, 1, 1))
    return CaseSize(source, Grid.axis_aligned((native or side,) * 3, (1, 1, 1)), grid)


def sample(voxels: int, what: str = "liver", **changes: object) -> Sample:
    values: dict[str, object] = {
        "what": what, "case": "a/b", "voxels": voxels, "native_voxels": voxels, "files": 8,
        "folders": 20, "seconds": 1.0,
        "num_bytes": {IMAGES: 0, LOG_ODDS: voxels, FEATURES: 2 * voxels, METADATA: 5000},
    }  # fmt: skip
    return Sample.model_validate(values | changes)


def test_bytes_scale_with_voxels_and_metadata_with_units() -> None:
    found = estimate([case("a", 10), case("b", 20)], [sample(1000)])
    assert found.num_bytes[LOG_ODDS] == pytest.approx(9000)
    assert found.num_bytes[FEATURES] == pytest.approx(18000)
    assert found.num_bytes[METADATA] == pytest.approx(10000)
    assert (found.units, found.files, found.inodes) == (2, 16, 56)
    assert found.total_bytes == 37000
    assert found.seconds == pytest.approx(9.0)


def test_rates_are_interpolated_between_the_two_sizes_and_held_beyond() -> None:
    small = sample(1000, num_bytes={LOG_ODDS: 1000, METADATA: 0})
    large = sample(27000, num_bytes={LOG_ODDS: 54000, METADATA: 0})

    def rate(side: int) -> float:
        return estimate([case("a", side)], [large, small]).num_bytes[LOG_ODDS] / side**3

    assert rate(5) == pytest.approx(1.0)
    assert rate(40) == pytest.approx(2.0)
    assert rate(24) == pytest.approx(1 + (24**3 - 1000) / 26000)


def test_cases_take_time_by_the_voxels_of_the_ct_as_stored() -> None:
    measured = sample(1000, what=CASES, native_voxels=8000, seconds=8.0)
    assert estimate([case("a", 10, native=40)], [measured]).seconds == pytest.approx(64.0)


def test_each_teacher_has_its_own_rates() -> None:
    todo = Todo({CASES: [], "liver": [case("a", 10)], "spleen": [case("a", 10)]}, 0, 0)
    twice = sample(1000, what="spleen", num_bytes={LOG_ODDS: 2000, METADATA: 0})
    found = estimate_all(todo, [sample(1000), twice])
    assert found["liver"].num_bytes[LOG_ODDS] == pytest.approx(1000)
    assert found["spleen"].num_bytes[LOG_ODDS] == pytest.approx(2000)
    assert found[CASES].total_bytes == 0


def test_the_least_without_any_measurement_grows_with_voxels_and_organs() -> None:
    todo = Todo({CASES: [case("a", 100)], "liver": [case("a", 100)]}, 0, 0)
    one, two = least(todo, {"liver": 1}), least(todo, {"liver": 2})
    assert one[CASES].num_bytes[IMAGES] > 0.3e6
    assert one["liver"].num_bytes[LOG_ODDS] > 0.05e6
    assert two["liver"].num_bytes[LOG_ODDS] == 2 * one["liver"].num_bytes[LOG_ODDS]
