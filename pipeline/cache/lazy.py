"""Stored arrays as lazy Dask arrays, which are read through their unit's checks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any
from uuid import uuid4

import dask.array as da
import numpy as np
import numpy.typing as npt

from pipeline.cache.reader import Unit
from pipeline.data.patches import Patch

Convert = Callable[[npt.NDArray[Any]], npt.NDArray[Any]]


def as_stored(values: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """No conversion."""
    return values


def lazy_array(
    unit: Unit,
    name: str,
    patch: Patch | None,
    fill: float,
    convert: Convert,
) -> da.Array:
    """One chunk for a patch; for a whole volume the chunks that it is stored in.

    Args:
        unit: that holds the array.
        name: of a (D, H, W) array.
        patch: the part of it; None for all.
        fill: outside the volume.
        convert: is applied to what was read, voxel by voxel: in the reader it costs no layer.
    """
    stored = unit.array(name)
    meta = convert(np.empty((0, 0, 0), dtype=stored.dtype))
    label = f"{name}-{uuid4().hex}"
    if patch is not None:
        # What `from_array` would make of a view in one chunk, at a fifth of its price.
        read = partial(_read, unit, name, patch, fill, convert)
        return da.Array({(label, 0, 0, 0): (read,)}, label, [(n,) for n in patch.shape], meta=meta)
    view = _View(unit, name, convert, stored.shape, meta.dtype)
    return da.from_array(
        view, chunks=stored.chunks, name=label, meta=meta, inline_array=True, asarray=False
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


def _read(unit: Unit, name: str, patch: Patch, fill: float, convert: Convert) -> npt.NDArray[Any]:
    return convert(unit.read_padded(name, patch, fill))
