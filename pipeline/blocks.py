"""Numpy functions over the blocks of lazy Dask arrays, one layer of the graph for each.

Axes are named by letters: k (or any other) first, then z, y, x.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any
from uuid import uuid4

import dask.array as da
import numpy as np
import numpy.typing as npt


def in_blocks(
    function: Callable[..., npt.NDArray[Any]],
    axes: str,
    dtype: type[np.generic],
    *arrays: tuple[da.Array, str],
    new_axes: Mapping[str, int] | None = None,
    adjust_chunks: Mapping[str, Callable[[int], int]] | None = None,
    **options: Any,
) -> da.Array:
    """One layer that calls a numpy function block by block, however the arrays are chunked.

    Blocks are matched by their place, and along an axis that the result lacks they are joined
    first. Name and meta are given, since hashing the arguments and probing the function take
    longer than a patch's arithmetic.

    Args:
        function: of numpy blocks, in the order of `arrays`.
        axes: of the result, of `kzyx`.
        dtype: of the result.
        arrays: each with its axes.
        new_axes: axes that no array has -> their size.
        adjust_chunks: axis -> size of a block along it -> size of its result.
        options: handed to the function.
    """
    pairs = [part for pair in arrays for part in pair]
    return da.blockwise(
        function,
        axes,
        *pairs,
        name=f"blocks-{uuid4().hex}",
        new_axes=new_axes,
        adjust_chunks=adjust_chunks,
        concatenate=True,
        meta=np.empty((0,) * len(axes), dtype=dtype),
        dtype=dtype,
        **options,
    )


def count_blocks(
    function: Callable[..., npt.NDArray[np.int64]],
    num_counts: int,
    *arrays: tuple[da.Array, str],
    **options: Any,
) -> da.Array:
    """Sums what a function counts in each block: one layer for any number of counts.

    Args:
        function: of numpy blocks, to int64 (M,).
        num_counts: M.
        arrays: each with its axes, of `kzyx`.
        options: handed to the function.

    Returns:
        int64 (M,), lazily.
    """
    per_block = in_blocks(
        partial(_as_voxel, function),
        "zyxm",
        np.int64,
        *arrays,
        new_axes={"m": num_counts},
        adjust_chunks={axis: lambda _: 1 for axis in "zyx"},
        **options,
    )
    total: da.Array = per_block.sum(axis=(0, 1, 2))
    return total


def _as_voxel(
    function: Callable[..., npt.NDArray[np.int64]], *blocks: npt.NDArray[Any], **options: Any
) -> npt.NDArray[np.int64]:
    return function(*blocks, **options)[None, None, None]
