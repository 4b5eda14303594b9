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

from pipeline.errors import PipelineError
from pipeline.patches import Index3, Slices3

_Chunk = npt.NDArray[Any]


class UnreadableChunk(Exception):
    """A chunk that cannot be decoded, or that nobody wrote; `index` counts chunks along each axis.

    `lost`: it reads as fill value, and the check of its objects failed.
    """

    def __init__(self, index: Index3, cause: Exception, *, lost: bool = False) -> None:
        super().__init__(index, cause)
        self.index, self.cause, self.lost = index, cause, lost


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

    def read(
        self,
        array: zarr.Array[Any],
        key: tuple[str, ...],
        inside: Slices3,
        *,
        check_fill: Callable[[], object] | None = None,
    ) -> _Chunk:
        """`array[..., *inside]`, chunk by chunk through the pool.

        Args:
            array: its leading axes are in one chunk.
            key: names the array in this process: the unit's path and the array's name.
            inside: within the array's shape.
            check_fill: called after reading a chunk that holds nothing but the fill value, since
                Zarr returns that for a lost chunk too; raises if its objects are not there.

        Raises:
            UnreadableChunk: one that cannot be decoded, or that `check_fill` does not vouch for.
        """
        sizes = array.chunks[-3:]
        lead = array.shape[:-3]
        out = np.empty((*lead, *(s.stop - s.start for s in inside)), dtype=array.dtype)
        ranges = [
            range(s.start // n, -(-s.stop // n)) if s.stop > s.start else range(0)
            for s, n in zip(inside, sizes, strict=True)
        ]
        for z, y, x in product(*ranges):
            index = z, y, x
            origin = [i * n for i, n in zip(index, sizes, strict=True)]
            ends = [min(o + n, m) for o, n, m in zip(origin, sizes, array.shape[-3:], strict=True)]
            box = tuple(slice(o, e) for o, e in zip(origin, ends, strict=True))
            load = partial(_load, array, box, index, check_fill)
            chunk = self._get((*key, index), load)
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


# What zarr and its codecs raise on bytes that they cannot decode, or cannot get.
_DECODING = (RuntimeError, ValueError, OSError, MemoryError, OverflowError)


def _load(
    array: zarr.Array[Any],
    box: tuple[slice, ...],
    index: Index3,
    check_fill: Callable[[], object] | None,
) -> _Chunk:
    try:
        chunk = _read(array, box)
    except _DECODING as error:
        raise UnreadableChunk(index, error) from error
    if check_fill is not None and _is_fill(chunk, array.fill_value):
        try:
            check_fill()
        except PipelineError as error:
            raise UnreadableChunk(index, error, lost=True) from error
    return chunk


def _is_fill(chunk: _Chunk, fill: Any) -> bool:
    """Whether nothing else is in it; the first value mostly settles it."""
    if chunk.size == 0:
        return False
    if fill != fill:  # NaN
        return bool(np.isnan(chunk.flat[0])) and bool(np.isnan(chunk).all())
    return bool(chunk.flat[0] == fill) and bool((chunk == fill).all())


def _read(array: zarr.Array[Any], box: tuple[slice, ...]) -> _Chunk:
    index: Any = (..., *box)
    return np.asarray(array[index])


def _at(chunk: _Chunk, box: tuple[slice, ...]) -> _Chunk:
    index: Any = (..., *box)
    view: _Chunk = chunk[index]
    return view


POOL = ChunkPool()
