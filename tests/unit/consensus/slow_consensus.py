"""The regions of docs/method.md, voxel by voxel in plain numpy: slow, and obvious."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]


def slow_labels_win(
    log_odds: Array, classes: Array, annotated: Sequence[int], confidence: float
) -> Array:
    """Classes: 0 background, k + 1 for organ number k, 255 ignore."""
    out = log_odds.astype(np.float32).copy()
    for voxel in np.ndindex(*classes.shape):
        label = int(classes[voxel])
        if label == 255:
            continue
        for k in range(out.shape[0]):
            seen = 0.0 if np.isnan(log_odds[(k, *voxel)]) else abs(float(log_odds[(k, *voxel)]))
            strong = max(seen, confidence)
            if label - 1 in annotated:
                out[(k, *voxel)] = strong if k == label - 1 else -strong
            elif k in annotated:
                out[(k, *voxel)] = -strong
    return out


def slow_regions(log_odds: Array, margin: float) -> dict[str, Array]:
    """Boolean arrays by name; `organ` has the axis of organs first."""
    num_organs, *shape = log_odds.shape
    organ = np.zeros(log_odds.shape, bool)
    background, unclaimed, conflict, abstained = (np.zeros(shape, bool) for _ in range(4))
    for voxel in np.ndindex(*shape):
        votes = [float(log_odds[(k, *voxel)]) for k in range(num_organs)]
        inside = [vote > margin for vote in votes]
        organ[(slice(None), *voxel)] = inside
        background[voxel] = all(vote < -margin for vote in votes)
        spoken = [vote for vote in votes if not np.isnan(vote)]
        unclaimed[voxel] = bool(spoken) and all(vote < -margin for vote in spoken)
        conflict[voxel] = sum(inside) >= 2
        abstained[voxel] = not any(inside) and not background[voxel]
    return {
        "organ": organ,
        "background": background,
        "unclaimed": unclaimed,
        "conflict": conflict,
        "abstained": abstained,
    }


def slow_average(experts: Sequence[Array]) -> Array:
    """Mean over the experts that saw the voxel."""
    out = np.full(experts[0].shape, np.nan, np.float32)
    for voxel in np.ndindex(*out.shape):
        seen = [float(e[voxel]) for e in experts if not np.isnan(e[voxel])]
        if seen:
            out[voxel] = sum(seen) / len(seen)
    return out


def slow_excluded(classes: Array, annotated: Sequence[int], num_organs: int) -> Array:
    """Where the label says that a voxel is not organ k."""
    out = np.zeros((num_organs, *classes.shape), bool)
    for voxel in np.ndindex(*classes.shape):
        label = int(classes[voxel])
        for k in range(num_organs):
            named = label - 1 in annotated
            says_not = (k in annotated or named) and label != k + 1
            out[(k, *voxel)] = label != 255 and says_not
    return out


def slow_pair_conflicts(
    claims: Array, teachers: Sequence[str], organs: Sequence[int]
) -> dict[frozenset[str], int]:
    """Voxels that both teachers of a pair claim, for two different organs."""
    found = {frozenset((a, b)): 0 for a in teachers for b in teachers if a != b}
    for voxel in np.ndindex(*claims.shape[1:]):
        said = [
            (teacher, organ)
            for c, (teacher, organ) in enumerate(zip(teachers, organs, strict=True))
            if claims[(c, *voxel)]
        ]
        clashing = {
            frozenset((one, other))
            for one, organ in said
            for other, another in said
            if one != other and organ != another
        }
        for pair in clashing:
            found[pair] += 1
    return found
