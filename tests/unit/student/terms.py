"""Every term of the loss as a function of the student's logits, over random tensors."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from pipeline.data.labels import IGNORE
from pipeline.student import losses
from tests.unit.student import slow_losses as slow

N, K, SHAPE = 2, 3, (3, 2, 4)
Term = Callable[[Tensor], Tensor]


class RandomBatch:
    """Random tensors of one batch in float64; what is drawn follows from the arguments alone.

    Args:
        seed: of all that is drawn.
        silent: share of log-odds that are NaN.
    """

    def __init__(self, seed: int, *, silent: float = 0.0) -> None:
        rng = np.random.default_rng(seed)
        self.logits = torch.tensor(rng.normal(0, 2, (N, K + 1, *SHAPE)))
        self.log_odds = torch.tensor(rng.normal(0, 3, (N, K, *SHAPE)))
        self.organs = torch.tensor(rng.random((N, K)) < 0.6)
        # Labels name only what a case annotates, as in the cache.
        drawn = torch.tensor(rng.integers(0, K + 1, (N, *SHAPE)))
        annotated = torch.cat([torch.ones(N, 1, dtype=torch.bool), self.organs], dim=1)
        taken = torch.stack([annotated[n][drawn[n]] for n in range(N)])
        self.classes = torch.where(taken, drawn, 0)
        self.classes[torch.tensor(rng.random((N, *SHAPE)) < 0.2)] = IGNORE
        self.log_odds[torch.tensor(rng.random((N, K, *SHAPE)) < silent)] = torch.nan

    @property
    def log_p(self) -> Tensor:
        return torch.log_softmax(self.logits, dim=1)

    @property
    def p(self) -> Tensor:
        return torch.softmax(self.logits, dim=1)


def all_terms(batch: RandomBatch) -> dict[str, Term]:
    def merged(s: Tensor) -> Tensor:
        return losses.merge_into_background(torch.log_softmax(s, 1), batch.organs)

    def of_p(term: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Term:
        return lambda s: term(torch.softmax(s, 1)[:, 1:], batch.classes, batch.organs)

    return {
        "cross_entropy": lambda s: losses.cross_entropy(merged(s), batch.classes),
        "dice": of_p(losses.dice),
        "exclusion_dice": of_p(losses.exclusion_dice),
        "exclusion_cross_entropy": of_p(losses.exclusion_cross_entropy),
        "masked_bce": lambda s: losses.masked_bce(s[:, 1:], batch.classes, batch.organs),
        "dice of sigmoid": lambda s: losses.dice(
            torch.sigmoid(s[:, 1:]), batch.classes, batch.organs
        ),
        "one target, cross-entropy": lambda s: one_target(s, batch.log_odds)[0],
        "one target, Dice": lambda s: one_target(s, batch.log_odds, temperature=0.5)[1],
    }


def one_target(logits: Tensor, log_odds: Tensor, **options: float) -> tuple[Tensor, Tensor]:
    """Both terms, from logits."""
    log_p, p = losses.softmax_both(logits)
    return losses.one_target(log_p, p[:, 1:], log_odds, **options)


def slow_terms(batch: RandomBatch) -> dict[str, Callable[[], float]]:
    """The same by loops over voxels."""
    classes, organs = batch.classes.numpy(), batch.organs.numpy()
    d = batch.log_odds.numpy()
    p, s = slow.softmax(batch.logits.numpy()), batch.logits.numpy()
    sigmoid = slow.sigmoid(s[:, 1:])
    return {
        "cross_entropy": lambda: slow.cross_entropy(p, classes, organs),
        "dice": lambda: slow.dice(p[:, 1:], classes, organs),
        "exclusion_dice": lambda: slow.exclusion_dice(p[:, 1:], classes, organs),
        "exclusion_cross_entropy": lambda: slow.exclusion_cross_entropy(p[:, 1:], classes, organs),
        "masked_bce": lambda: slow.masked_bce(sigmoid, classes, organs),
        "dice of sigmoid": lambda: slow.dice(sigmoid, classes, organs),
        "one target, cross-entropy": lambda: slow.one_target(s, d)[0],
        "one target, Dice": lambda: slow.one_target(s, d, t=0.5)[1],
    }


TERMS = tuple(all_terms(RandomBatch(0)))


def gradient(term: Term, at: Tensor) -> Tensor:
    point = at.clone().requires_grad_()
    (found,) = torch.autograd.grad(term(point), point)
    return found
