"""Arrays as bytes: one Zarr v3 shard of Zstd chunks with checksums, and the metadata beside it.

What is written is, byte by byte, what zarr-python writes, and it reads it (tests/unit/cache/
test_schema.py). It is done here since a unit may be a slice of a few kilobytes: to that zarr-python
adds an event loop in another thread, with a round trip for every group, array and chunk.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import product
from pathlib import PurePosixPath
from typing import Any

import google_crc32c
import numpy as np
import numpy.typing as npt
from numcodecs import zstd

from pipeline.cache.schema import ArraySpec, StorageConfig
from pipeline.data.patches import Index3, Patch
from pipeline.folder import Folder, read_range

_ENTRY_BYTES, _CHECKSUM_BYTES = 16, 4


def encode_group(attributes: Mapping[str, Any]) -> bytes:
    """The metadata of a group."""
    group = {"attributes": dict(attributes), "zarr_format": 3, "node_type": "group"}
    return json.dumps(group, indent=2).encode()


def encode_array(spec: ArraySpec, storage: StorageConfig) -> dict[str, bytes]:
    """Name in the unit -> bytes of an array's metadata, of its one shard, and of the groups that
    its name is below."""
    shape, values = spec.values.shape, np.ascontiguousarray(spec.values)
    # Chunks of at most `chunk` voxels a side; a volume a little larger is cut evenly.
    spatial = (-(-n // -(-n // storage.chunk)) for n in shape[-3:])
    chunks = (*shape[:-3], *spatial)
    counts = tuple(-(-n // c) for n, c in zip(shape, chunks, strict=True))
    index = np.empty((*counts, 2), dtype="<u8")
    encoded: list[bytes] = []
    end = 0
    for place in _morton_order(counts):
        part = values[tuple(slice(i * c, i * c + c) for i, c in zip(place, chunks, strict=True))]
        if part.shape != chunks:
            missing = [(0, c - n) for c, n in zip(chunks, part.shape, strict=True)]
            part = np.pad(part, missing, constant_values=spec.fill_value)
        # Those of nothing but fill values too: one that is not written looks like a lost one.
        data = zstd.compress(np.ascontiguousarray(part), storage.zstd_level, True)
        encoded.append(data)
        index[place] = end, len(data)
        end += len(data)
    encoded += [index.tobytes(), google_crc32c.value(index.tobytes()).to_bytes(4, "little")]
    metadata = _metadata(spec, storage, chunks, counts)
    above = [str(p) for p in PurePosixPath(spec.name).parents if p.name]
    return {
        **{f"{group}/zarr.json": encode_group({}) for group in above},
        f"{spec.name}/zarr.json": json.dumps(metadata, indent=2).encode(),
        shard_name(spec.name, len(shape)): b"".join(encoded),
    }


def shard_name(array: str, ndim: int) -> str:
    """The file of an array's values."""
    return f"{array}/c/{'/'.join('0' * ndim)}"


def _metadata(
    spec: ArraySpec, storage: StorageConfig, chunks: tuple[int, ...], counts: tuple[int, ...]
) -> dict[str, Any]:
    dtype, fill = spec.values.dtype, spec.values.dtype.type(spec.fill_value).item()
    little = {"name": "bytes", "configuration": {"endian": "little"}}
    compress = {"level": storage.zstd_level, "checksum": True}
    shards = [n * c for n, c in zip(counts, chunks, strict=True)]
    sharding = {
        "chunk_shape": chunks,
        "codecs": [
            little if dtype.itemsize > 1 else {"name": "bytes"},
            {"name": "zstd", "configuration": compress},
        ],
        "index_codecs": [little, {"name": "crc32c"}],
        "index_location": "end",
    }
    return {
        "shape": spec.values.shape,
        "data_type": str(dtype),
        "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": shards}},
        "chunk_key_encoding": {"name": "default", "configuration": {"separator": "/"}},
        "fill_value": "NaN" if fill != fill else fill,
        "codecs": [{"name": "sharding_indexed", "configuration": sharding}],
        "attributes": {},
        "dimension_names": spec.axes,
        "zarr_format": 3,
        "node_type": "array",
        "storage_transformers": [],
    }


@lru_cache(maxsize=16)
def _morton_order(counts: tuple[int, ...]) -> tuple[tuple[int, ...], ...]:
    """All indices below `counts` along a Z-order curve, in which zarr-python writes chunks: bits of
    the axes in turn, the first axis lowest, each axis with as many as it needs."""
    bits = [(n - 1).bit_length() for n in counts]

    def code(place: tuple[int, ...]) -> int:
        out = position = 0
        for bit in range(max(bits, default=0)):
            for axis, number in enumerate(place):
                if bit < bits[axis]:
                    out |= (number >> bit & 1) << position
                    position += 1
        return out

    return tuple(sorted(product(*map(range, counts)), key=code))


@dataclass(frozen=True)
class StoredArray:
    """An array of a unit; nothing of it is read yet.

    Attributes:
        chunks: their shape; all but the last three axes are in one.
    """

    file: Folder
    num_bytes: int
    shape: tuple[int, ...]
    chunks: tuple[int, ...]
    dtype: np.dtype[Any]

    @classmethod
    def of(cls, metadata: Mapping[str, Any], file: Folder, num_bytes: int) -> StoredArray:
        """By the metadata that `encode_array` wrote."""
        (sharding,) = metadata["codecs"]
        chunks = tuple(sharding["configuration"]["chunk_shape"])
        dtype = np.dtype(metadata["data_type"])
        return cls(file, num_bytes, tuple(metadata["shape"]), chunks, dtype)

    @cached_property
    def _index(self) -> npt.NDArray[np.uint64]:
        """Offset and bytes of each chunk."""
        counts = [-(-n // c) for n, c in zip(self.shape, self.chunks, strict=True)]
        size = math.prod(counts) * _ENTRY_BYTES + _CHECKSUM_BYTES
        data = read_range(self.file, self.num_bytes - size, self.num_bytes)
        entries, checksum = data[:-_CHECKSUM_BYTES], data[-_CHECKSUM_BYTES:]
        if google_crc32c.value(entries).to_bytes(4, "little") != checksum:
            raise ValueError("the index of its chunks fails its checksum")
        return np.frombuffer(entries, dtype="<u8").reshape(*counts, 2)

    @property
    def boxes(self) -> Iterator[Patch]:
        """What each chunk covers of the last three axes."""
        shape, chunks = self.shape[-3:], self.chunks[-3:]
        for place in product(*(range(0, n, c) for n, c in zip(shape, chunks, strict=True))):
            z, y, x = place
            d, h, w = (min(c, n - a) for n, c, a in zip(shape, chunks, place, strict=True))
            yield Patch((z, y, x), (d, h, w))

    def chunk(self, index: Index3) -> npt.NDArray[Any]:
        """A chunk, decoded, as far as it is within the array; `index` counts chunks.

        Raises:
            OSError: it cannot be read.
            RuntimeError, ValueError: it fails its checksum, or has another size.
        """
        place = (*(0,) * (len(self.shape) - 3), *index)
        begin, size = (int(n) for n in self._index[place])
        data = zstd.decompress(read_range(self.file, begin, begin + size))
        values = np.frombuffer(data, self.dtype).reshape(self.chunks)
        ends = (n - i * c for n, i, c in zip(self.shape, place, self.chunks, strict=True))
        return values[tuple(slice(end) for end in ends)]
