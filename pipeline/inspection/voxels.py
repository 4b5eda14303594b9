"""The arithmetic behind `looks`, in numpy over one block.

d, h, w are a block's voxels; channels C are the pairs (teacher, k) that there are log-odds of.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

FALSE_POSITIVE, MISS, BOTH = 1, 2, 3
# What is counted: ("region", "liver"), ("miss", "liver"), ("background", "") ..
Count = tuple[str, str]
Array = npt.NDArray[Any]


def claims(
    d: Array, excluded: Array, organs: tuple[int, ...], margin: float, labels_win: bool
) -> npt.NDArray[np.bool_]:
    """bool (C, d, h, w), what each teacher claims; if labels win, not where they exclude it."""
    claims: npt.NDArray[np.bool_] = d > margin
    if labels_win:
        for claim, organ in zip(claims, organs, strict=True):
            claim &= ~excluded[organ]
    return claims


def masks_of(
    label: Array,
    votes: Array,
    alone: Array,
    excluded: Array,
    organ: Array,
    background: Array,
    unclaimed: Array,
    conflict: Array,
    abstained: Array,
    *,
    organs: tuple[str, ...],
    channels: tuple[tuple[str, int], ...],
    annotated: tuple[int, ...],
    margin: float,
) -> dict[Count, Any]:
    """All that is counted, as masks over one block."""
    experts = [[c for c, (_, k) in enumerate(channels) if k == n] for n in range(len(organs))]
    judged = [k for k, who in enumerate(experts) if who]
    masks: dict[Count, Any] = {
        ("background", ""): background,
        ("unclaimed", ""): unclaimed,
        ("conflict", ""): conflict,
        ("abstained", ""): abstained,
        ("unseen", ""): np.isnan(alone[judged]).any(axis=0),
    }
    for c, (teacher, k) in enumerate(channels):
        masks["claimed", f"{teacher}: {organs[k]}"] = votes[c] > margin
        masks["unseen", f"{teacher}: {organs[k]}"] = np.isnan(votes[c])
    background_alone = (alone[judged] < -margin).all(axis=0)
    for k, name in enumerate(organs):
        masks["region", name] = organ[k]
        if len(experts[k]) > 1:
            masks["split", name] = _is_split(votes[experts[k]], margin)
        if k in annotated:
            inside = label == k + 1
            masks["label", name] = inside
            if experts[k]:
                masks["miss", name] = inside & ~(alone[k] > margin)
                masks["swallowed", name] = inside & background_alone
        if experts[k]:
            masks["false positive", name] = (alone[k] > margin) & excluded[k]
    return masks


def count_masks(*blocks: Array, **options: Any) -> npt.NDArray[np.int64]:
    """int64 (M,), voxels in each of `masks_of`, in that order."""
    masks = masks_of(*blocks, **options).values()
    return np.array([np.count_nonzero(mask) for mask in masks], dtype=np.int64)


def surest(organ: Array, d: Array, ids: tuple[int, ...]) -> npt.NDArray[np.uint8]:
    """The id of the organ with the largest log-odds of those that claim the voxel; else 0."""
    best = np.where(organ, d, -np.inf).argmax(axis=0)
    found = np.array(ids, dtype=np.uint8)[best]
    return np.asarray(np.where(organ.any(axis=0), found, np.uint8(0)))


def num_claims(organ: Array) -> npt.NDArray[np.uint8]:
    """In how many organ regions, where that is two or more; else 0."""
    count = organ.sum(axis=0, dtype=np.uint8)
    return np.asarray(np.where(count >= 2, count, np.uint8(0)))


def against_label(
    label: Array, organ: Array, excluded: Array, judged: tuple[int, ...]
) -> npt.NDArray[np.uint8]:
    """`FALSE_POSITIVE`, `MISS` or `BOTH`; misses of the organs `judged` alone."""
    false = (organ & excluded).any(axis=0)
    missed = np.zeros(label.shape, dtype=np.bool_)
    for k in judged:
        missed |= (label == k + 1) & ~organ[k]
    return (FALSE_POSITIVE * false + MISS * missed).astype(np.uint8)


def _by_organ(channels: tuple[tuple[str, int], ...]) -> Mapping[int, list[int]]:
    """Organs with two or more experts -> their channels."""
    found: dict[int, list[int]] = {}
    for c, (_, k) in enumerate(channels):
        found.setdefault(k, []).append(c)
    return {k: who for k, who in found.items() if len(who) > 1}


def _is_split(d: Array, margin: float) -> npt.NDArray[np.bool_]:
    return np.asarray((d > margin).any(axis=0) & (d < -margin).any(axis=0))


def num_split(
    d: Array, channels: tuple[tuple[str, int], ...], margin: float
) -> npt.NDArray[np.uint8]:
    """Of how many organs the experts are split."""
    split = [_is_split(d[who], margin) for who in _by_organ(channels).values()]
    return np.asarray(np.sum(split, axis=0, dtype=np.uint8))


def spread(d: Array, channels: tuple[tuple[str, int], ...]) -> npt.NDArray[np.float32]:
    """The largest spread of any organ's experts; 0 where fewer than two saw."""
    out = np.zeros(d.shape[1:], dtype=np.float32)
    for who in _by_organ(channels).values():
        # fmax and fmin pass over NaN; where nobody saw both are NaN, which fmax passes over too.
        ends = np.fmax.reduce(d[who], axis=0) - np.fmin.reduce(d[who], axis=0)
        np.fmax(out, ends, out=out)
    return out
