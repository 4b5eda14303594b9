"""A bounded pool of decoded chunks, one per process: decoding costs more than any reading.

Measured (docs/decisions/0004): a patch of image, label and several log-odds decodes whole chunks
again and again while training stays on few cases; keeping them pays more than any codec.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from functools import partial
from itertools import product
from typing import Any

import numpy as np
import numpy.typing as npt
import zarr

from pipeline.patches import Slices3

_Chunk = npt.NDArray[Any]


class ChunkPool:
    """Least recently used chunks go first. A pool of 0 bytes keeps nothing."""

    def __init__(self, max_bytes: int = 0) -> None:
        self.max_bytes = max_bytes
        self._chunks: OrderedDict[tuple[Any, ...], _Chunk] = OrderedDict()
        self._bytes = 0

    def resize(self, max_bytes: int) -> None:
        """Sets the limit and drops what is over it."""
        self.max_bytes = max_bytes
        self._shrink()

    def read(self, array: zarr.Array[Any], key: tuple[str, ...], inside: Slices3) -> _Chunk:
        """`array[..., *inside]`, chunk by chunk through the pool.

        Args:
            array: its leading axes are in one chunk.
            key: names the array in this process: the unit's path and the array's name.
            inside: within the array's shape.
        """
        sizes = array.chunks[-3:]
        lead = array.shape[:-3]
        out = np.empty((*lead, *(s.stop - s.start for s in inside)), dtype=array.dtype)
        ranges = [
            range(s.start // n, -(-s.stop // n)) if s.stop > s.start else range(0)
            for s, n in zip(inside, sizes, strict=True)
        ]
        for index in product(*ranges):
            origin = [i * n for i, n in zip(index, sizes, strict=True)]
            ends = [min(o + n, m) for o, n, m in zip(origin, sizes, array.shape[-3:], strict=True)]
            box = tuple(slice(o, e) for o, e in zip(origin, ends, strict=True))
            chunk = self._get((*key, index), partial(_read, array, box))
            low = [max(o, s.start) for o, s in zip(origin, inside, strict=True)]
            high = [min(e, s.stop) for e, s in zip(ends, inside, strict=True)]
            there = tuple(
                slice(a - s.start, b - s.start) for a, b, s in zip(low, high, inside, strict=True)
            )
            here = tuple(slice(a - o, b - o) for a, b, o in zip(low, high, origin, strict=True))
            _at(out, there)[...] = _at(chunk, here)
        return out

    def _get(self, key: tuple[Any, ...], load: Callable[[], _Chunk]) -> _Chunk:
        found = self._chunks.get(key)
        if found is not None:
            self._chunks.move_to_end(key)
            return found
        chunk = load()
        if chunk.nbytes <= self.max_bytes:
            self._chunks[key] = chunk
            self._bytes += chunk.nbytes
            self._shrink()
        return chunk

    def _shrink(self) -> None:
        while self._bytes > self.max_bytes and self._chunks:
            _, dropped = self._chunks.popitem(last=False)
            self._bytes -= dropped.nbytes


def _read(array: zarr.Array[Any], box: tuple[slice, ...]) -> _Chunk:
    index: Any = (..., *box)
    return np.asarray(array[index])


def _at(chunk: _Chunk, box: tuple[slice, ...]) -> _Chunk:
    index: Any = (..., *box)
    view: _Chunk = chunk[index]
    return view


POOL = ChunkPool()
