"""Organ regions, agreed background, conflicts: pure functions of lazy Dask arrays.

Source: our reconstruction of the regions of MS-KD (Feng et al., arXiv 2108.02559), whose equations
were not available to us; see docs/method.md. Nothing here is stored: a teacher that is added,
swapped or dropped changes every region at once.

Axes: K organs, then D, H, W. The functions do not care how their arrays are chunked.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import combinations
from typing import Any
from uuid import uuid4

import dask.array as da
import numpy as np
import numpy.typing as npt

from pipeline.data.labels import IGNORE

DEFAULT_CONFIDENCE = 6.0
OTHER_REGIONS = ("agreed background", "conflict", "abstained")
_FLOAT32 = np.arange(1 << 16, dtype=np.uint16).view(np.float16).astype(np.float32)
FloatArray = npt.NDArray[np.float32]
BoolArray = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class Consensus:
    """What teachers and labels say together.

    A region becomes a layer of the graph when it is asked for: per patch of a training, building
    layers that nobody computes would cost more than the arithmetic.

    Attributes:
        log_odds: float32 (K, D, H, W), after the labels have won; NaN where nobody saw.
        margin: m of the regions, in log-odds.
    """

    log_odds: da.Array
    margin: float = 0.0

    @cached_property
    def organ(self) -> da.Array:
        """bool (K, D, H, W), the organ regions R_k."""
        return in_blocks(above, "kzyx", np.bool_, (self.log_odds, "kzyx"), margin=self.margin)

    @cached_property
    def background(self) -> da.Array:
        """bool (D, H, W), the agreed background B."""
        return in_blocks(_all_below, "zyx", np.bool_, (self.log_odds, "kzyx"), margin=self.margin)

    @cached_property
    def unclaimed(self) -> da.Array:
        """bool (D, H, W), background as far as anybody speaks: some d_k < -m, and every other d_k
        < -m or NaN. Where no teacher is ignored it is the agreed background; elsewhere it may be an
        organ whose teachers are ignored.
        """
        return in_blocks(spoken_below, "zyx", np.bool_, (self.log_odds, "kzyx"), margin=self.margin)

    @cached_property
    def conflict(self) -> da.Array:
        """bool (D, H, W), voxels in two or more organ regions."""
        return in_blocks(_in_several, "zyx", np.bool_, (self.organ, "kzyx"))

    @cached_property
    def abstained(self) -> da.Array:
        """bool (D, H, W), voxels in no region at all."""
        regions = (self.organ, "kzyx"), (self.background, "zyx")
        return in_blocks(_in_none, "zyx", np.bool_, *regions)


def stack_organs(log_odds: Sequence[da.Array]) -> da.Array:
    """One (D, H, W) array per organ -> float32 (K, D, H, W), all organs of a voxel in one chunk."""
    arrays = [(d, "zyx") for d in log_odds]
    return in_blocks(stacked, "kzyx", np.float32, *arrays, new_axes={"k": len(log_odds)})


def average_experts(experts: Sequence[da.Array]) -> da.Array:
    """Mean log-odds of the teachers that claim one organ, over those that saw the voxel.

    Args:
        experts: one (D, H, W) array per teacher, NaN where it did not see.

    Returns:
        float32 (D, H, W).
    """
    return in_blocks(averaged, "zyx", np.float32, *((expert, "zyx") for expert in experts))


def labels_win(
    log_odds: da.Array,
    classes: da.Array,
    annotated: Sequence[int],
    confidence: float = DEFAULT_CONFIDENCE,
) -> da.Array:
    """Corrects teachers by the labels of the case.

    Where the label says organ j: d_j := max(|d_j|, c), every other d_k := -max(|d_k|, c).
    Where it says not j: d_j := -max(|d_j|, c). An unseen d counts as 0; ignored voxels stay.

    Args:
        log_odds: (K, D, H, W).
        classes: (D, H, W), 0 background, k + 1 for organ number k, 255 ignore.
        annotated: numbers k of the organs that the label speaks of.
        confidence: c > 0.

    Returns:
        float32 (K, D, H, W).
    """
    if not annotated:
        return log_odds
    # All organs of a voxel have to be in one block: where one is annotated, the others follow.
    whole = log_odds.rechunk({0: -1}) if len(log_odds.chunks[0]) > 1 else log_odds
    return in_blocks(
        corrected,
        "kzyx",
        np.float32,
        (whole, "kzyx"),
        (classes, "zyx"),
        annotated=tuple(annotated),
        confidence=confidence,
    )


def consensus(
    log_odds: da.Array,
    classes: da.Array | None = None,
    annotated: Sequence[int] = (),
    *,
    margin: float = 0.0,
    confidence: float = DEFAULT_CONFIDENCE,
) -> Consensus:
    """Regions of one case, or of one patch of it.

    R_k = {d_k > m}; B = {d_k < -m for every k}; conflict: in two or more R_k; abstained: in none
    of R_1 .. R_K, B. An unseen voxel is in no region of that organ, and never agreed background.

    Args:
        log_odds: float (K, D, H, W) over the organs that are known in this case.
        classes: label (D, H, W) for `labels_win`; None leaves the teachers as they are.
        annotated: numbers of the annotated organs.
        margin: m >= 0, in log-odds.
    """
    d = log_odds.astype("float32")
    if classes is not None:
        d = labels_win(d, classes, annotated, confidence)
    return Consensus(d, margin)


def region_counts(d: FloatArray, margin: float = 0.0) -> npt.NDArray[np.int64]:
    """Voxels in each region of a block, float32 (K, D, H, W): int64 (K + 3,), the organs, then
    `OTHER_REGIONS`."""
    organ, background = above(d, margin), _all_below(d, margin)
    others = background, _in_several(organ), _in_none(organ, background)
    return np.array([np.count_nonzero(mask) for mask in (*organ, *others)], dtype=np.int64)


def excluded_by_label(classes: da.Array, annotated: Sequence[int], num_organs: int) -> da.Array:
    """Where the label says that a voxel is not organ k: it is annotated and the label is another
    value, or the label names another annotated organ. Ignored voxels exclude nothing.

    Args:
        classes: (D, H, W), 0 background, k + 1 for organ number k, 255 ignore.
        annotated: numbers k of the organs that the label speaks of.
        num_organs: K.

    Returns:
        bool (K, D, H, W).
    """
    return in_blocks(
        _excluded,
        "kzyx",
        np.bool_,
        (classes, "zyx"),
        new_axes={"k": num_organs},
        annotated=tuple(annotated),
        num_organs=num_organs,
    )


def pair_conflicts(
    claims: da.Array, teachers: Sequence[str], organs: Sequence[int]
) -> tuple[list[tuple[str, str]], da.Array]:
    """Voxels that two teachers claim for two different organs, for each pair of teachers.

    Teachers a and b are in conflict at a voxel if a claims an organ i there, b claims an organ j,
    and i is not j. Two experts of one organ agree where both claim it.

    Args:
        claims: bool (C, D, H, W): channel c is where `teachers[c]` claims organ `organs[c]`.
        teachers: one name per channel; a teacher of several organs has several channels.
        organs: one organ number per channel.

    Returns:
        The pairs, in the order in which the teachers appear, and int64 (P,), their voxels.
    """
    names = list(dict.fromkeys(teachers))
    pairs = list(combinations(names, 2))
    if not pairs:
        return [], da.zeros(0, dtype=np.int64)
    counts = count_blocks(
        _pair_counts, len(pairs), (claims, "kzyx"), teachers=tuple(teachers), organs=tuple(organs)
    )
    return pairs, counts


# The arithmetic in numpy, over one block. A training patch is one block and calls it directly.


def trusted(
    d: npt.NDArray[Any], here: bool, not_here: bool, temperature: float | None
) -> npt.NDArray[Any]:
    """One teacher's log-odds of one organ as they count; NaN where its word does not: a silent
    teacher.

    Args:
        d: of any shape, NaN where it did not see.
        here: whether "the organ is here" (d > 0) counts.
        not_here: whether "it is not here" (d <= 0) counts.
        temperature: T > 0 that they are divided by (see `pipeline.consensus.evidence`); of one
            teacher no region changes by it at margin 0, of several those may where they disagree.

    Returns:
        As stored if nothing changes, else float32.
    """
    if not (here and not_here):
        d = np.where(np.where(d > 0, here, not_here), d, np.nan).astype(np.float32)
    return d if temperature is None else d.astype(np.float32) / np.float32(temperature)


def averaged(*experts: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """`average_experts` on one block; of one expert as it is, since whoever stacks organs makes
    float32 of them."""
    if len(experts) == 1:
        return experts[0]
    odds = stacked(*experts)
    seen = ~np.isnan(odds)
    count = seen.sum(axis=0, dtype=np.float32)
    total = np.where(seen, odds, np.float32(0)).sum(axis=0)
    return np.where(count > 0, total / np.maximum(count, np.float32(1)), np.float32(np.nan))


def stacked(*organs: npt.NDArray[Any]) -> FloatArray:
    """`stack_organs` on one block."""
    out = np.empty((len(organs), *organs[0].shape), dtype=np.float32)
    for k, d in enumerate(organs):
        if d.dtype == np.float16:  # twice as fast as numpy's own cast, and the same bits
            np.take(_FLOAT32, d.view(np.uint16), out=out[k], mode="clip")
        else:
            out[k] = d
    return out


def above(d: FloatArray, margin: float) -> BoolArray:
    """`Consensus.organ` on one block."""
    return np.asarray(d > margin)


def _all_below(d: FloatArray, margin: float) -> BoolArray:
    return np.asarray((d < -margin).all(axis=0))


def spoken_below(d: FloatArray, margin: float) -> BoolArray:
    """`Consensus.unclaimed` on one block: the largest that anybody says is below -m."""
    return np.asarray(np.fmax.reduce(d, axis=0) < -margin)


def _in_several(organ: BoolArray) -> BoolArray:
    return np.asarray(np.count_nonzero(organ, axis=0) >= 2)


def _in_none(organ: BoolArray, background: BoolArray) -> BoolArray:
    return np.asarray(~(organ.any(axis=0) | background))


def corrected(
    d: FloatArray, label: npt.NDArray[np.uint8], annotated: tuple[int, ...], confidence: float
) -> FloatArray:
    """`labels_win` on one block that holds all K organs."""
    known = label != IGNORE
    any_organ = np.isin(np.arange(256), [j + 1 for j in annotated])[label]
    strong = np.abs(d)
    np.fmax(strong, np.float32(confidence), out=strong)
    out = np.array(d, dtype=np.float32)
    for k in range(d.shape[0]):
        if k in annotated:
            np.negative(strong[k], out=out[k], where=known)
            np.copyto(out[k], strong[k], where=label == k + 1)
        else:
            np.negative(strong[k], out=out[k], where=any_organ)
    return out


def _excluded(
    label: npt.NDArray[np.uint8], annotated: tuple[int, ...], num_organs: int
) -> BoolArray:
    known = label != IGNORE
    any_organ = np.isin(np.arange(256), [j + 1 for j in annotated])[label]
    out = np.empty((num_organs, *label.shape), dtype=np.bool_)
    for k in range(num_organs):
        out[k] = known & (label != k + 1) if k in annotated else any_organ
    return out


def _pair_counts(
    claims: BoolArray, teachers: tuple[str, ...], organs: tuple[int, ...]
) -> npt.NDArray[np.int64]:
    of_teacher: dict[str, dict[int, BoolArray]] = {}
    for claim, teacher, organ in zip(claims, teachers, organs, strict=True):
        of_teacher.setdefault(teacher, {})[organ] = claim
    counts = []
    for one, other in combinations(of_teacher.values(), 2):
        apart = np.zeros(claims.shape[1:], dtype=np.bool_)
        for organ, claim in one.items():
            for another, counterclaim in other.items():
                if organ != another:
                    apart |= claim & counterclaim
        counts.append(np.count_nonzero(apart))
    return np.array(counts, dtype=np.int64)


# Numpy functions over the blocks of lazy Dask arrays, one layer of the graph for each.
#
# Axes are named by letters: k (or any other) first, then z, y, x.


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
        arrays: each with its axes.
        new_axes: axes that no array has -> their size.
        adjust_chunks: axis -> size of a block along it -> size of its result.
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
