from __future__ import annotations

import pickle
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pipeline.cache.reader import CachedCase, Unit
from pipeline.cache.schema import (
    StorageConfig,
    features_spec,
    image_spec,
    label_spec,
    log_odds_spec,
)
from pipeline.cache.store import write_unit
from pipeline.data.patches import Patch
from pipeline.data.volume import Grid

SHAPE = (12, 10, 9)
STORAGE = StorageConfig(chunk=8)
GRID = Grid.axis_aligned(SHAPE, (3, 2, 2))
RNG = np.random.default_rng(0)
IMAGE = RNG.integers(-1024, 2000, SHAPE).astype(np.int16)
LABEL = RNG.integers(0, 3, SHAPE).astype(np.uint8)
ODDS = RNG.normal(size=SHAPE).astype(np.float32)
FEATURES = RNG.normal(size=(4, 6, 5, 5)).astype(np.float32)

patches = st.builds(
    Patch,
    st.tuples(*(st.integers(-15, 15) for _ in range(3))),
    st.tuples(*(st.integers(1, 14) for _ in range(3))),
)


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> CachedCase:
    folder = tmp_path_factory.mktemp("units")
    attributes = {"grid": GRID.to_json()}
    own = [image_spec(IMAGE), label_spec(LABEL)]
    teachers = [log_odds_spec("liver", ODDS, STORAGE), features_spec("tap", FEATURES, STORAGE)]
    for name, specs in (("case", own), ("teacher", teachers)):
        path = folder / f"{name}.zarr"
        write_unit(path, specs, attributes, {"of": name}, storage=STORAGE)
    teacher = Unit.open(folder / "teacher.zarr")
    unit = Unit.open(folder / "case.zarr")
    return CachedCase("d/c", "train", ("liver",), unit, {"t": teacher}, {"liver": ("t",)})


def slow_patch(whole: npt.NDArray[Any], patch: Patch, fill: float) -> npt.NDArray[Any]:
    out = np.full((*whole.shape[:-3], *patch.shape), fill, dtype=whole.dtype)
    for index in np.ndindex(*patch.shape):
        at = tuple(a + i for a, i in zip(patch.start, index, strict=True))
        if all(0 <= a < n for a, n in zip(at, whole.shape[-3:], strict=True)):
            out[(..., *index)] = whole[(..., *at)]
    return out


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=40)
@given(patch=patches)
def test_a_patch_is_the_volume_with_its_outside_filled(case: CachedCase, patch: Patch) -> None:
    assert np.array_equal(case.image(patch), slow_patch(IMAGE, patch, -1024))
    assert np.array_equal(case.label(patch), slow_patch(LABEL, patch, 255))
    odds = case.log_odds("t", "liver")
    wanted = slow_patch(odds, patch, np.nan)
    assert np.array_equal(case.log_odds("t", "liver", patch), wanted, equal_nan=True)
    features = case.features("t", "tap")
    wanted = slow_patch(features, patch, np.nan)
    assert np.array_equal(case.features("t", "tap", patch), wanted, equal_nan=True)


def test_dtypes_and_grid(case: CachedCase) -> None:
    assert case.image().dtype == np.int16
    assert case.label().dtype == np.uint8
    assert case.log_odds("t", "liver").dtype == np.float16
    assert case.grid == GRID
    assert case.case.attributes["grid"] == GRID.to_json()


def test_opening_a_unit_decodes_nothing(case: CachedCase, tmp_path: Path) -> None:
    copy = shutil.copytree(case.case.path, tmp_path / "case.zarr")
    unit = Unit.open(copy)
    for name in ("image", "label"):
        shutil.rmtree(copy / name / "c")
    assert unit.array("image").shape == SHAPE
    assert unit.attributes["grid"] == GRID.to_json()


def test_a_unit_travels_to_a_worker_closed(case: CachedCase) -> None:
    case.image()
    travelled: CachedCase = pickle.loads(pickle.dumps(case))
    assert "group" not in vars(travelled.case)
    assert "_arrays" not in vars(travelled.case)
    assert np.array_equal(travelled.image(), IMAGE)
    assert travelled.case.receipt == case.case.receipt
