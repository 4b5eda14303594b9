from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pipeline.cache.reader import ChunkPool, Unit
from pipeline.cache.schema import ArraySpec, StorageConfig
from pipeline.cache.shards import StoredArray
from pipeline.cache.store import write_unit
from pipeline.data.patches import Slices3

SHAPE = (19, 16, 9)
VALUES = np.random.default_rng(0).normal(size=(2, *SHAPE)).astype(np.float32)
CHUNK_BYTES = 2 * 7 * 8 * 5 * 4
KEEP_ALL = 10 * VALUES.nbytes


def spans(size: int) -> st.SearchStrategy[slice]:
    ends = st.tuples(st.integers(0, size), st.integers(0, size))
    return ends.map(lambda pair: slice(min(pair), max(pair)))


boxes = st.tuples(*(spans(n) for n in SHAPE))


@pytest.fixture(scope="module")
def array(tmp_path_factory: pytest.TempPathFactory) -> StoredArray:
    path = tmp_path_factory.mktemp("pool") / "unit.zarr"
    spec = ArraySpec("features/tap", VALUES, ("feature", "z", "y", "x"), float("nan"))
    storage = StorageConfig(chunk=8)
    stored = Unit(path, write_unit(path, [spec], {}, {}, storage=storage)).array("features/tap")
    assert stored.chunks == (2, 7, 8, 5)
    return stored


class Counted:
    """An array that notes which chunks are read of it, in order."""

    def __init__(self, array: StoredArray) -> None:
        self.array, self.reads = array, list[Any]()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.array, name)

    def chunk(self, index: Any) -> Any:
        self.reads.append(index)
        return self.array.chunk(index)


@pytest.fixture
def counted(array: StoredArray) -> Any:
    return Counted(array)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=60)
@given(wanted=st.lists(boxes, min_size=1, max_size=4), chunks=st.sampled_from([0, 1, 3, 1000]))
def test_reads_are_direct_slices_whatever_the_pool_holds(
    array: StoredArray, wanted: list[Slices3], chunks: int
) -> None:
    pool = ChunkPool(chunks * CHUNK_BYTES)
    for box in wanted:
        assert np.array_equal(pool.read(array, ("a",), box), VALUES[(..., *box)])
        held = sum(chunk.nbytes for chunk in pool._chunks.values())
        assert held == pool._bytes <= pool.max_bytes


def test_a_kept_chunk_is_decoded_once(counted: Any) -> None:
    pool = ChunkPool(KEEP_ALL)
    box = (slice(0, 19), slice(0, 16), slice(0, 9))
    pool.read(counted, ("a",), box)
    assert len(counted.reads) == 3 * 2 * 2
    pool.read(counted, ("a",), box)
    assert len(counted.reads) == 3 * 2 * 2


def test_only_touched_chunks_are_decoded(counted: Any) -> None:
    ChunkPool().read(counted, ("a",), (slice(7, 14), slice(0, 8), slice(1, 2)))
    assert counted.reads == [(1, 0, 0)]
    ChunkPool().read(counted, ("a",), (slice(7, 7), slice(0, 8), slice(1, 2)))
    assert len(counted.reads) == 1


def test_a_pool_of_nothing_keeps_nothing(counted: Any) -> None:
    pool, box = ChunkPool(), (slice(0, 2), slice(0, 2), slice(0, 2))
    pool.read(counted, ("a",), box)
    pool.read(counted, ("a",), box)
    assert len(counted.reads) == 2


def test_arrays_of_other_names_are_not_mixed_up(array: StoredArray) -> None:
    pool, box = ChunkPool(KEEP_ALL), (slice(0, 2), slice(0, 2), slice(0, 2))
    pool.read(array, ("a", "image"), box)
    assert len(pool._chunks) == 1
    assert np.array_equal(pool.read(array, ("b", "image"), box), VALUES[(..., *box)])
    assert len(pool._chunks) == 2


def test_the_least_recently_used_chunk_goes_first(counted: Any) -> None:
    pool = ChunkPool(2 * CHUNK_BYTES)
    first, second, third = ((slice(z, z + 1), slice(0, 1), slice(0, 1)) for z in (0, 7, 14))
    for box in (first, second, first, third, first):
        pool.read(counted, ("a",), box)
    assert len(counted.reads) == 3
    pool.read(counted, ("a",), second)
    assert len(counted.reads) == 4


def test_a_smaller_limit_drops_at_once(array: StoredArray) -> None:
    pool = ChunkPool(KEEP_ALL)
    pool.read(array, ("a",), (slice(0, 19), slice(0, 16), slice(0, 9)))
    pool.resize(CHUNK_BYTES)
    assert len(pool._chunks) == 1
    pool.resize(0)
    assert (len(pool._chunks), pool._bytes) == (0, 0)


def test_what_is_returned_can_be_changed_without_harm(array: StoredArray) -> None:
    pool, box = ChunkPool(KEEP_ALL), (slice(0, 7), slice(0, 8), slice(0, 5))
    pool.read(array, ("a",), box)[...] = 0
    assert np.array_equal(pool.read(array, ("a",), box), VALUES[(..., *box)])
