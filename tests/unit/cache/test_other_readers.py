"""The files are Zarr v3 with core codecs: an implementation that shares no code reads the same."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import tensorstore
import zarr

from tests.tiny import TAP, work_of

ARRAYS = {
    "cases/multi-ct/case_001@*.zarr": ["image", "label"],
    "teachers/liver@*/multi-ct/case_001@*.zarr": ["log_odds/liver", f"features/{TAP}"],
}


def opened(path: Path) -> Any:
    kvstore = {"driver": "file", "path": f"{path.resolve()}/"}
    return tensorstore.open({"driver": "zarr3", "kvstore": kvstore}, read=True).result()


@pytest.fixture(params=[(p, name) for p, names in ARRAYS.items() for name in names], ids=str)
def array(request: pytest.FixtureRequest, built_cache: Path) -> Path:
    pattern, name = request.param
    (unit,) = work_of(built_cache).glob(pattern)
    return Path(unit, name)


def test_tensorstore_reads_what_zarr_python_reads(array: Path) -> None:
    ours: Any = zarr.open_array(array, mode="r", zarr_format=3)
    theirs = opened(array)
    expected: npt.NDArray[Any] = np.asarray(ours[...])
    found = np.asarray(theirs.read().result())
    assert found.dtype == expected.dtype
    np.testing.assert_array_equal(found, expected)
    assert np.unique(expected).size > 1
    assert theirs.domain.labels == ours.metadata.dimension_names
    inside = (..., slice(2, 5), slice(1, 6), slice(3, 9))
    part = np.asarray(theirs[inside].read().result())
    np.testing.assert_array_equal(part, expected[inside])


def test_tensorstore_notices_a_flipped_byte(tiny_cached: Path) -> None:
    (unit,) = work_of(tiny_cached).glob("teachers/liver@*/multi-ct/case_001@*.zarr")
    array = unit / "log_odds/liver"
    (chunk,) = (p for p in (array / "c").rglob("*") if p.is_file())
    data = bytearray(chunk.read_bytes())
    data[len(data) // 2] ^= 1
    chunk.write_bytes(data)
    with pytest.raises(ValueError, match=r"(?i)zstd|checksum|crc|corrupt|decod"):
        opened(array).read().result()
