"""Organ regions, agreed background, conflicts: pure functions of lazy Dask arrays.

Source: our reconstruction of the regions of MS-KD (Feng et al., arXiv 2108.02559), whose equations
were not available to us; see docs/method.md. Nothing here is stored: a teacher that is added,
swapped or dropped changes every region at once.

Axes: K organs, then D, H, W. The functions do not care how their arrays are chunked.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import dask.array as da
import numpy as np
import numpy.typing as npt

from pipeline.labels import IGNORE

DEFAULT_CONFIDENCE = 6.0
FloatArray = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Consensus:
    """What teachers and labels say together.

    Attributes:
        log_odds: float32 (K, D, H, W), after the labels have won; NaN where nobody saw.
        organ: bool (K, D, H, W), the organ regions R_k.
        background: bool (D, H, W), the agreed background B.
        conflict: bool (D, H, W), voxels in two or more organ regions.
        abstained: bool (D, H, W), voxels in no region at all.
    """

    log_odds: da.Array
    organ: da.Array
    background: da.Array
    conflict: da.Array
    abstained: da.Array


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
    whole = log_odds.rechunk({0: -1}) if len(log_odds.chunks[0]) > 1 else log_odds
    # map_blocks pairs blocks by number: unlike chunks would be paired wrongly, without an error.
    label = classes.rechunk(whole.chunks[1:])
    corrected: da.Array = da.map_blocks(
        _correct_block, whole, label[None], tuple(annotated), confidence, dtype="float32"
    )
    return corrected


def _correct_block(
    d: FloatArray, classes: npt.NDArray[np.uint8], annotated: tuple[int, ...], confidence: float
) -> FloatArray:
    """`labels_win` on one chunk that holds all K organs; classes (1, D, H, W)."""
    label = classes[0]
    known = label != IGNORE
    any_organ = np.isin(label, [j + 1 for j in annotated])
    strong = np.fmax(np.abs(d), np.float32(confidence))
    out = np.array(d, dtype=np.float32)
    for k in range(d.shape[0]):
        if k in annotated:
            np.copyto(out[k], -strong[k], where=known)
            np.copyto(out[k], strong[k], where=label == k + 1)
        else:
            np.copyto(out[k], -strong[k], where=any_organ)
    return out


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
    organ = d > margin
    background = (d < -margin).all(axis=0)
    count = organ.sum(axis=0)
    return Consensus(
        log_odds=d,
        organ=organ,
        background=background,
        conflict=count >= 2,
        abstained=(count == 0) & ~background,
    )


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
