"""Organ regions, agreed background, conflicts: pure functions of lazy Dask arrays.

Source: our reconstruction of the regions of MS-KD (Feng et al., arXiv 2108.02559), whose equations
were not available to us; see docs/method.md. Nothing here is stored: a teacher that is added,
swapped or dropped changes every region at once.

Axes: K organs, then D, H, W. The functions do not care how their arrays are chunked.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any
from uuid import uuid4

import dask.array as da
import numpy as np
import numpy.typing as npt

from pipeline.labels import IGNORE

DEFAULT_CONFIDENCE = 6.0
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
        return _blocks(_above, "kzyx", np.bool_, (self.log_odds, "kzyx"), margin=self.margin)

    @cached_property
    def background(self) -> da.Array:
        """bool (D, H, W), the agreed background B."""
        return _blocks(_all_below, "zyx", np.bool_, (self.log_odds, "kzyx"), margin=self.margin)

    @cached_property
    def conflict(self) -> da.Array:
        """bool (D, H, W), voxels in two or more organ regions."""
        return _blocks(_in_several, "zyx", np.bool_, (self.organ, "kzyx"))

    @cached_property
    def abstained(self) -> da.Array:
        """bool (D, H, W), voxels in no region at all."""
        regions = (self.organ, "kzyx"), (self.background, "zyx")
        return _blocks(_in_none, "zyx", np.bool_, *regions)


def stack_organs(log_odds: Sequence[da.Array]) -> da.Array:
    """One (D, H, W) array per organ -> float32 (K, D, H, W), all organs of a voxel in one chunk."""
    arrays = [(d, "zyx") for d in log_odds]
    return _blocks(_stack, "kzyx", np.float32, *arrays, new_axes={"k": len(log_odds)})


def average_experts(
    experts: Sequence[da.Array], temperatures: Sequence[float] | None = None
) -> da.Array:
    """Mean log-odds of the teachers that claim one organ, over those that saw the voxel.

    Args:
        experts: one (D, H, W) array per teacher, NaN where it did not see.
        temperatures: one T > 0 per teacher, by which its log-odds are divided first (see
            `pipeline.calibration`); None divides none. Of one teacher no region changes by it at
            margin 0, of several those may where they disagree.

    Returns:
        float32 (D, H, W).
    """
    odds = [expert.astype("float32") for expert in experts]
    if temperatures is not None:
        odds = [d / np.float32(t) for d, t in zip(odds, temperatures, strict=True)]
    if len(odds) == 1:
        return odds[0]
    stacked = da.stack(odds)
    seen = ~da.isnan(stacked)
    total = da.where(seen, stacked, 0).sum(axis=0)
    count = seen.sum(axis=0)
    return da.where(count > 0, total / da.maximum(count, 1), float("nan")).astype("float32")


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
    return _blocks(
        _correct,
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
        log_odds: float (K, D, H, W) over the organs that somebody knows in this case.
        classes: label (D, H, W) for `labels_win`; None leaves the teachers as they are.
        annotated: numbers of the annotated organs.
        margin: m >= 0, in log-odds.
        confidence: c of `labels_win`.
    """
    d = log_odds.astype("float32")
    if classes is not None:
        d = labels_win(d, classes, annotated, confidence)
    return Consensus(d, margin)


def region_voxels(regions: Consensus, organs: Sequence[str]) -> Mapping[str, da.Array]:
    """Voxels in each region, lazily: one 0-d array per organ, `agreed background`, `conflict` and
    `abstained`."""
    sizes = {organ: regions.organ[k].sum() for k, organ in enumerate(organs)}
    return {
        **sizes,
        "agreed background": regions.background.sum(),
        "conflict": regions.conflict.sum(),
        "abstained": regions.abstained.sum(),
    }


def _blocks(
    function: Callable[..., npt.NDArray[Any]],
    axes: str,
    dtype: type[np.generic],
    *arrays: tuple[da.Array, str],
    new_axes: Mapping[str, int] | None = None,
    **options: Any,
) -> da.Array:
    """One layer that calls a numpy function block by block, however the arrays are chunked.

    Blocks are matched by their place, and along an axis that the result lacks they are joined
    first. Name and meta are given, since hashing the arguments and probing the function take
    longer than a patch's arithmetic.
    """
    pairs = [part for pair in arrays for part in pair]
    return da.blockwise(
        function,
        axes,
        *pairs,
        name=f"{function.__name__.strip('_')}-{uuid4().hex}",
        new_axes=new_axes,
        concatenate=True,
        meta=np.empty((0,) * len(axes), dtype=dtype),
        dtype=dtype,
        **options,
    )


def _stack(*organs: npt.NDArray[Any]) -> FloatArray:
    out = np.empty((len(organs), *organs[0].shape), dtype=np.float32)
    for k, d in enumerate(organs):
        out[k] = d
    return out


def _above(d: FloatArray, margin: float) -> BoolArray:
    return np.asarray(d > margin)


def _all_below(d: FloatArray, margin: float) -> BoolArray:
    return np.asarray((d < -margin).all(axis=0))


def _in_several(organ: BoolArray) -> BoolArray:
    return np.asarray(np.count_nonzero(organ, axis=0) >= 2)


def _in_none(organ: BoolArray, background: BoolArray) -> BoolArray:
    return np.asarray(~(organ.any(axis=0) | background))


def _correct(
    d: FloatArray, label: npt.NDArray[np.uint8], annotated: tuple[int, ...], confidence: float
) -> FloatArray:
    """`labels_win` on one block that holds all K organs."""
    known = label != IGNORE
    any_organ = np.isin(label, [j + 1 for j in annotated])
    strong = np.fmax(np.abs(d), np.float32(confidence))
    out = np.array(d, dtype=np.float32)
    for k in range(d.shape[0]):
        if k in annotated:
            np.negative(strong[k], out=out[k], where=known)
            np.copyto(out[k], strong[k], where=label == k + 1)
        else:
            np.negative(strong[k], out=out[k], where=any_organ)
    return out
