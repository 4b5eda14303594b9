"""Bytes that change or vanish, also after a unit was opened: no reader is given a wrong number."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from numpy.testing import assert_array_equal

from pipeline.cache.reader import POOL, Unit
from pipeline.cache.schema import StorageConfig, image_spec, log_odds_spec
from pipeline.cache.store import write_unit
from pipeline.data.patches import Patch
from pipeline.errors import CacheCorrupt

SHAPE = (20, 16, 9)
STORAGE = StorageConfig(chunk=8)
RNG = np.random.default_rng(0)
IMAGE = RNG.integers(-1024, 2000, SHAPE).astype(np.int16)
IMAGE[:8] = -1024
ODDS = RNG.normal(size=SHAPE).astype(np.float32)
ODDS[:, :8] = np.nan
PATCH = Patch((8, 8, 0), (6, 6, 6))


@pytest.fixture
def path(tmp_path: Path) -> Path:
    place = tmp_path / "teachers" / f"liver@{'0' * 16}" / "multi-ct" / f"case_7@{'1' * 16}.zarr"
    specs = [image_spec(IMAGE), log_odds_spec("liver", ODDS, STORAGE)]
    write_unit(place, specs, {"case": "x"}, {"a": 1}, storage=STORAGE)
    return place


def shard(path: Path, name: str) -> Path:
    return path / name / "c" / "0" / "0" / "0"


def test_the_chunk_that_is_named_is_the_one_that_is_damaged(path: Path) -> None:
    array = Unit.open(path).array("image")
    assert array.chunks == (7, 8, 5)
    file = shard(path, "image")
    data = bytearray(file.read_bytes())
    # Chunks lie in C order; the index at the end holds offset and length of each, then a CRC.
    index = np.frombuffer(data[-(3 * 2 * 2 * 16 + 4) : -4], dtype="<u8").reshape(3, 2, 2, 2)
    offset, length = index[2, 1, 0]
    data[int(offset + length // 2)] ^= 0xFF
    file.write_bytes(data)
    said = r"liver x multi-ct/case_7: chunk \(2, 1, 0\) of array image cannot be decoded"
    with pytest.raises(CacheCorrupt, match=said) as caught:
        Unit.open(path).read("image")
    assert str(path) in str(caught.value)
    assert "pipeline cache verify --deep --repair" in str(caught.value)
    with pytest.raises(CacheCorrupt, match=r"chunk \(2, 1, 0\) of array image"):
        Unit.open(path).read("image", Patch((12, 10, 2), (6, 6, 6)))
    assert_array_equal(
        Unit.open(path).read("image", Patch((0, 0, 0), (7, 8, 5))), IMAGE[:7, :8, :5]
    )


def test_chunks_that_hold_nothing_but_fill_values_are_read(path: Path) -> None:
    unit = Unit.open(path)
    assert (unit.read("image", Patch((0, 0, 0), (7, 16, 9))) == -1024).all()
    assert np.isnan(unit.read("log_odds/liver", Patch((0, 0, 0), (20, 8, 9)))).all()


def test_what_the_pool_kept_is_not_asked_for_again(path: Path) -> None:
    POOL.resize(10**6)
    unit = Unit.open(path)
    before = unit.read("image", PATCH)
    shard(path, "image").unlink()
    assert_array_equal(unit.read("image", PATCH), before)
