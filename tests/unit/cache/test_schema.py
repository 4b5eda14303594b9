from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import zarr
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from zarr.codecs import ZstdCodec
from zarr.storage import MemoryStore

from pipeline.cache.schema import (
    FLOAT16_MAX,
    ArraySpec,
    StorageConfig,
    feature_moments,
    features_spec,
    image_spec,
    label_spec,
    log_odds_spec,
    round_bits,
)
from pipeline.cache.shards import encode_array, encode_group
from pipeline.cache.store import write_unit

STORAGE = StorageConfig(chunk=8)
CORE_CODECS = {"sharding_indexed", "bytes", "zstd", "crc32c"}
any_floats = hnp.arrays(
    np.float32, st.integers(1, 40), elements=st.floats(width=32, allow_nan=True)
)


def written(
    tmp_path: Path, spec: ArraySpec, storage: StorageConfig | None = None
) -> tuple[zarr.Array[Any], dict[str, Any]]:
    storage = storage or StorageConfig(chunk=8)
    write_unit(tmp_path / "group.zarr", [spec], {}, {}, storage=storage)
    array = zarr.open_group(tmp_path / "group.zarr", mode="r")[spec.name]
    assert isinstance(array, zarr.Array)
    path = tmp_path / "group.zarr" / spec.name / "zarr.json"
    return array, json.loads(path.read_text())


def chunk_files(tmp_path: Path, name: str) -> list[Path]:
    return [p for p in (tmp_path / "group.zarr" / name / "c").rglob("*") if p.is_file()]


# --- rounding -----------------------------------------------------------------------------------


@given(any_floats, st.integers(1, 10))
def test_no_voxel_changes_its_region_by_rounding(
    values: npt.NDArray[np.float32], bits: int
) -> None:
    rounded = round_bits(values, bits)
    assert rounded.dtype == np.float16
    assert np.array_equal(np.isnan(rounded), np.isnan(values))
    seen = ~np.isnan(values)
    assert np.array_equal(np.sign(rounded[seen]), np.sign(values[seen]))
    assert np.all(np.isfinite(rounded[seen]))


@given(
    hnp.arrays(np.float32, 20, elements=st.floats(2**-14, 60000, width=32)),
    st.integers(1, 10),
    st.booleans(),
)
def test_the_relative_error_is_bounded_by_the_bits(
    values: npt.NDArray[np.float32], bits: int, negative: bool
) -> None:
    signed = -values if negative else values
    rounded = round_bits(signed, bits).astype(np.float64)
    # To float16 first (half a unit of 10 bits), then to `bits`.
    bound = 2.0 ** -(bits + 1) + (2.0**-11 if bits < 10 else 0)
    assert np.all(np.abs(rounded - signed) <= np.abs(signed) * bound * 1.001)


@given(any_floats, st.integers(1, 10))
def test_rounding_again_changes_nothing(values: npt.NDArray[np.float32], bits: int) -> None:
    once = round_bits(values, bits)
    assert np.array_equal(round_bits(once.astype(np.float32), bits), once, equal_nan=True)


@pytest.mark.parametrize("bits", [1, 5, 10])
def test_values_beyond_float16_are_clipped(bits: int) -> None:
    huge = np.array([1e30, -1e30, np.inf, -np.inf, 65504, -65504], dtype=np.float32)
    rounded = round_bits(huge, bits).astype(np.float64)
    assert np.all(np.isfinite(rounded))
    assert np.all(np.abs(rounded) <= FLOAT16_MAX)
    assert np.all(np.abs(rounded) >= FLOAT16_MAX * (1 - 2.0**-bits))
    assert np.array_equal(np.sign(rounded), [1, -1, 1, -1, 1, -1])


@pytest.mark.parametrize("bits", [1, 5, 10])
def test_the_smallest_values_keep_their_sign(bits: int) -> None:
    tiny = np.array([1e-30, -1e-30, 6e-8, -6e-8, 0.0], dtype=np.float32)
    assert np.array_equal(np.sign(round_bits(tiny, bits)), [1, -1, 1, -1, 0])


@pytest.mark.parametrize("bits", [3, 5])
def test_the_dropped_bits_are_zero_and_so_compress(bits: int) -> None:
    values = np.linspace(-20, 20, 1001, dtype=np.float32)
    stored = round_bits(values, bits).view(np.uint16)
    assert not np.any(stored & ((1 << (10 - bits)) - 1))
    assert np.any(stored & (1 << (10 - bits)))


# --- arrays -------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(5, 6, 7), (8, 8, 8), (17, 20, 9), (33, 8, 64)])
def test_one_shard_of_inner_chunks(tmp_path: Path, shape: tuple[int, int, int]) -> None:
    values = np.arange(np.prod(shape), dtype=np.int16).reshape(shape)
    array, metadata = written(tmp_path, image_spec(values))
    assert np.array_equal(array[...], values)
    assert len(chunk_files(tmp_path, "image")) == 1
    inner = array.chunks
    assert max(inner) <= 8
    # Cut evenly: no axis has more chunks than it must.
    assert [-(-n // c) for n, c in zip(shape, inner, strict=True)] == [-(-n // 8) for n in shape]
    shard = metadata["chunk_grid"]["configuration"]["chunk_shape"]
    assert all(s >= n and s % c == 0 for s, n, c in zip(shard, shape, inner, strict=True))


@pytest.mark.parametrize(
    "shape", [(1, 20, 9), (5, 6, 7), (17, 33, 9), (3, 33, 8, 64), (2, 1, 1, 1)]
)
@pytest.mark.parametrize("dtype", [np.float16, np.int16, np.uint8])
def test_bytes_are_those_that_zarr_writes(shape: tuple[int, ...], dtype: type) -> None:
    values = np.random.default_rng(0).integers(0, 9, shape).astype(dtype)
    axes = ("feature", "z", "y", "x")[-len(shape) :]
    spec = ArraySpec("a/b.c", values, axes, float("nan") if dtype == np.float16 else 7)
    ours = {"zarr.json": encode_group({"centres": [[0, 1]]}), **encode_array(spec, STORAGE)}
    theirs: dict[str, Any] = {}
    attributes = {"centres": [[0, 1]]}
    group = zarr.create_group(MemoryStore(theirs), zarr_format=3, attributes=attributes)
    chunks = zarr_chunks(ours)
    group.create_array(
        "a/b.c", shape=shape, dtype=dtype, chunks=chunks,
        shards=tuple(-(-n // c) * c for n, c in zip(shape, chunks, strict=True)),
        compressors=ZstdCodec(level=1, checksum=True), fill_value=spec.fill_value,
        dimension_names=axes, config={"write_empty_chunks": True},
    )[...] = values  # fmt: skip
    assert ours == {name: data.to_bytes() for name, data in theirs.items()}


def zarr_chunks(files: dict[str, bytes]) -> tuple[int, ...]:
    (sharding,) = json.loads(files["a/b.c/zarr.json"])["codecs"]
    return tuple(sharding["configuration"]["chunk_shape"])


def test_moments_of_a_tap_are_over_the_cells_that_are_seen() -> None:
    values = np.random.default_rng(0).normal(3, 2, (2, 3, 4, 5)).astype(np.float32)
    values[:, 0] = np.nan
    found = feature_moments(values)
    assert found["cells"] == 40
    np.testing.assert_allclose(found["mean"], values[:, 1:].mean(axis=(1, 2, 3)), rtol=1e-5)
    np.testing.assert_allclose(found["std"], values[:, 1:].std(axis=(1, 2, 3)), rtol=1e-5)
    nothing = feature_moments(np.full((2, 1, 1, 1), np.nan, np.float32))
    assert nothing == {"cells": 0, "mean": [0, 0], "std": [0, 0]}


def test_core_codecs_only_with_a_checksum(tmp_path: Path) -> None:
    spec = log_odds_spec("liver", np.ones((9, 9, 9), np.float32), StorageConfig())
    _, metadata = written(tmp_path, spec)
    assert metadata["zarr_format"] == 3
    (sharding,) = metadata["codecs"]
    inner, index = (sharding["configuration"][key] for key in ("codecs", "index_codecs"))
    names = {c["name"] for c in [sharding, *inner, *index]}
    assert names <= CORE_CODECS
    (zstd,) = (c for c in inner if c["name"] == "zstd")
    assert zstd["configuration"] == {"level": 1, "checksum": True}
    assert "crc32c" in {c["name"] for c in index}


@pytest.mark.parametrize(
    ("spec", "axes", "fill"),
    [
        (image_spec(np.zeros((4, 4, 4), np.int16)), ["z", "y", "x"], -1024),
        (label_spec(np.zeros((4, 4, 4), np.uint8)), ["z", "y", "x"], 255),
        (
            log_odds_spec("liver", np.zeros((4, 4, 4), np.float32), StorageConfig()),
            ["z", "y", "x"],
            "NaN",
        ),
        (
            features_spec("tap", np.zeros((3, 4, 4, 4), np.float32), StorageConfig()),
            ["feature", "z", "y", "x"],
            "NaN",
        ),
    ],
)
def test_axes_and_fill_values(
    tmp_path: Path, spec: ArraySpec, axes: list[str], fill: object
) -> None:
    _, metadata = written(tmp_path, spec)
    assert metadata["dimension_names"] == axes
    assert metadata["fill_value"] == fill


def test_chunks_that_hold_only_fill_are_written(tmp_path: Path) -> None:
    unseen = np.full((16, 16, 16), np.nan, np.float32)
    array, _ = written(tmp_path, log_odds_spec("liver", unseen, StorageConfig()))
    (file,) = chunk_files(tmp_path, "log_odds/liver")
    assert np.isnan(array[...]).all()
    # A shard index entry of an absent chunk is all ones.
    index = np.frombuffer(file.read_bytes()[-(8 * 16 + 4) : -4], dtype="<u8")
    assert not np.any(index == np.iinfo(np.uint64).max)


def test_what_is_read_is_what_was_rounded(tmp_path: Path) -> None:
    values = np.random.default_rng(0).normal(size=(9, 9, 9)).astype(np.float32)
    spec = log_odds_spec("liver", values, StorageConfig(log_odds_bits=4))
    array, _ = written(tmp_path, spec)
    assert array.dtype == np.float16
    assert np.array_equal(array[...], round_bits(values, 4))
