"""Stored arrays as lazy Dask arrays, which are read through their unit's checks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any
from uuid import uuid4

import dask.array as da
import numpy as np
import numpy.typing as npt

from pipeline.cache.reader import Unit
from pipeline.data.patches import Patch

Convert = Callable[[npt.NDArray[Any]], npt.NDArray[Any]]


def lazy_array(unit: Unit, name: str, convert: Convert) -> da.Array:
    """A stored array (D, H, W) in the chunks that it is stored in.

    Args:
        convert: is applied to what was read, voxel by voxel: in the reader it costs no layer.
    """
    stored = unit.array(name)
    meta = convert(np.empty((0, 0, 0), dtype=stored.dtype))
    view = _View(unit, name, convert, stored.shape, meta.dtype)
    return da.from_array(
        view,
        chunks=stored.chunks,
        name=f"{name}-{uuid4().hex}",
        meta=meta,
        inline_array=True,
        asarray=False,
    )


@dataclass(frozen=True)
class _View:
    """A stored array that is read when Dask asks for a part of it, through the unit's checks, and
    converted voxel by voxel."""

    unit: Unit
    name: str
    convert: Convert
    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    ndim: int = 3

    def __getitem__(self, index: tuple[slice, ...]) -> npt.NDArray[Any]:
        spans = [s.indices(n) for s, n in zip(index, self.shape, strict=True)]
        z, y, x = (start for start, _, _ in spans)
        d, h, w = (stop - start for start, stop, _ in spans)
        return self.convert(self.unit.read(self.name, Patch((z, y, x), (d, h, w))))
