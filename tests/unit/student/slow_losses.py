"""The terms of the loss, voxel by voxel, as docs/method.md writes them. numpy alone."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from itertools import product
from typing import Any

import numpy as np
import numpy.typing as npt

IGNORE = 255
SMOOTH = 1e-5
Floats = npt.NDArray[np.float64]
Array = npt.NDArray[Any]


def softmax(s: Floats) -> Floats:
    """Over axis 1."""
    exps = np.exp(s - s.max(axis=1, keepdims=True))
    return np.asarray(exps / exps.sum(axis=1, keepdims=True))


def sigmoid(s: Floats) -> Floats:
    return np.asarray(1 / (1 + np.exp(-s)))


def voxels_of(classes: Array) -> Iterator[tuple[int, tuple[int, ...], int]]:
    """Sample, place and class of every voxel that is not ignored."""
    for n, *place in product(*(range(size) for size in classes.shape)):
        number = int(classes[(n, *place)])
        if number != IGNORE:
            yield n, tuple(place), number


def mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else 0.0


def cross_entropy(p: Floats, classes: Array, organs: Array) -> float:
    """Marginal: unannotated classes count as background."""
    values = []
    for n, v, number in voxels_of(classes):
        free = sum(p[(n, k + 1, *v)] for k in range(organs.shape[1]) if not organs[n, k])
        values.append(-math.log(p[(n, number, *v)] + (0 if number else free)))
    return mean(values)


def dice(p: Floats, classes: Array, organs: Array) -> float:
    scores = []
    for k in range(organs.shape[1]):
        if not organs[:, k].any():
            continue
        both = size = 0.0
        for n, v, number in voxels_of(classes):
            if organs[n, k]:
                own, y = p[(n, k, *v)], float(number == k + 1)
                both, size = both + own * y, size + own**2 + y
        scores.append(1 - (2 * both + SMOOTH) / (size + SMOOTH))
    return mean(scores)


def exclusion_dice(p: Floats, classes: Array, organs: Array) -> float:
    scores = []
    for k in range(organs.shape[1]):
        if organs[:, k].all():
            continue
        both = size = 0.0
        for n, v, number in voxels_of(classes):
            if not organs[n, k]:
                own, taken = p[(n, k, *v)], float(number > 0)
                both, size = both + own * taken, size + own + taken
        scores.append(2 * both / (size + SMOOTH))
    return mean(scores)


def exclusion_cross_entropy(p: Floats, classes: Array, organs: Array) -> float:
    values = []
    for n, v, number in voxels_of(classes):
        free = [k for k in range(organs.shape[1]) if not organs[n, k]]
        values.append(sum(math.log(1 + p[(n, k, *v)]) for k in free) if number else 0.0)
    return mean(values)


def masked_bce(p: Floats, classes: Array, organs: Array) -> float:
    values = []
    for n, v, number in voxels_of(classes):
        for k in range(organs.shape[1]):
            if organs[n, k]:
                own = p[(n, k, *v)]
                values.append(-math.log(own if number == k + 1 else 1 - own))
    return mean(values)


def one_target(s: Floats, d: Floats, *, t: float = 1.0) -> tuple[float, float]:
    """Cross-entropy and Dice; per voxel the softmaxes over background and who is spoken of."""
    p = softmax(s)
    entropies, both, size = [], dict[int, float](), dict[int, float]()
    for n, *v in product(*(range(size_) for size_ in (d.shape[0], *d.shape[2:]))):
        own = [k for k in range(d.shape[1]) if not math.isnan(d[(n, k, *v)])]
        if not own:
            continue
        theirs = softmax(np.array([[0.0, *(d[(n, k, *v)] / t for k in own)]]))[0]
        known = [p[(n, k + 1, *v)] for k in own]
        ours = [1 - sum(known), *known]
        entropies.append(-sum(q * math.log(o) for q, o in zip(theirs, ours, strict=True)))
        for k, q, o in zip(own, theirs[1:], known, strict=True):
            both[k] = both.get(k, 0.0) + o * q
            size[k] = size.get(k, 0.0) + o * o + q * q
    return mean(entropies), mean([1 - (2 * both[k] + SMOOTH) / (size[k] + SMOOTH) for k in both])
