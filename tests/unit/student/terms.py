"""Every term of the loss as a function of the student's logits, over random tensors."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import numpy as np
import torch
from torch import Tensor

from pipeline.data.labels import IGNORE
from pipeline.student import losses
from tests.unit.student import slow_losses as slow

N, K, NUM_TEACHERS, SHAPE = 2, 3, 3, (3, 2, 4)
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
        self.organ = torch.tensor(rng.random((N, K, *SHAPE)) < 0.4)
        self.background = torch.tensor(rng.random((N, *SHAPE)) < 0.4) & ~self.organ.any(dim=1)
        self.experts = torch.tensor(rng.random((N, NUM_TEACHERS, K)) < 0.5)
        nobody = torch.tensor(rng.random((N, K, *SHAPE)) < silent)
        self.log_odds[nobody] = torch.nan
        self.organ &= ~nobody

    @property
    def log_p(self) -> Tensor:
        return torch.log_softmax(self.logits, dim=1)

    @property
    def p(self) -> Tensor:
        return torch.softmax(self.logits, dim=1)

    @property
    def inside(self) -> Tensor:
        return self.organ.any(dim=1) | self.background

    @property
    def everyone(self) -> Tensor:
        """One teacher who speaks of all known organs."""
        return self.organs[:, None]

    @property
    def targets(self) -> losses.Targets:
        return losses.Targets(self.log_odds, self.organ, self.background)

    @property
    def one_each(self) -> Tensor:
        """One teacher for each known organ."""
        return torch.diag_embed(self.organs)


def kl_of(batch: RandomBatch, experts: Tensor, *, t: float = 1.0, per_region: bool = False) -> Term:
    def term(s: Tensor) -> Tensor:
        return losses.kl(
            torch.log_softmax(s, 1),
            batch.targets,
            experts,
            temperature=t,
            per_region=per_region,
        )

    return term


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
        "kl joint": kl_of(batch, batch.everyone, t=2.0),
        "kl joint per region": kl_of(batch, batch.everyone, per_region=True),
        "kl per_teacher": kl_of(batch, batch.one_each, t=1.5),
        "kl per_teacher per region": kl_of(batch, batch.one_each, per_region=True),
        "kl marginal": kl_of(batch, batch.experts, t=0.5),
        "kl marginal per region": kl_of(batch, batch.experts, t=2.0, per_region=True),
        "soft_dice": lambda s: losses.soft_dice(
            torch.softmax(s, 1)[:, 1:], batch.log_odds, batch.inside, batch.organs
        ),
    }


def slow_terms(batch: RandomBatch) -> dict[str, Callable[[], float]]:
    """The same by loops over voxels."""
    classes, organs = batch.classes.numpy(), batch.organs.numpy()
    d, inside = batch.log_odds.numpy(), batch.inside.numpy()
    p, s = slow.softmax(batch.logits.numpy()), batch.logits.numpy()
    sigmoid = slow.sigmoid(s[:, 1:])
    kl = partial(slow.kl, s, d, batch.organ.numpy(), batch.background.numpy())
    everyone, one_each = batch.everyone.numpy(), batch.one_each.numpy()
    return {
        "cross_entropy": lambda: slow.cross_entropy(p, classes, organs),
        "dice": lambda: slow.dice(p[:, 1:], classes, organs),
        "exclusion_dice": lambda: slow.exclusion_dice(p[:, 1:], classes, organs),
        "exclusion_cross_entropy": lambda: slow.exclusion_cross_entropy(p[:, 1:], classes, organs),
        "masked_bce": lambda: slow.masked_bce(sigmoid, classes, organs),
        "dice of sigmoid": lambda: slow.dice(sigmoid, classes, organs),
        "kl joint": lambda: kl(everyone, t=2.0),
        "kl joint per region": lambda: kl(everyone, per_region=True),
        "kl per_teacher": lambda: kl(one_each, t=1.5),
        "kl per_teacher per region": lambda: kl(one_each, per_region=True),
        "kl marginal": lambda: kl(batch.experts.numpy(), t=0.5),
        "kl marginal per region": lambda: kl(batch.experts.numpy(), t=2.0, per_region=True),
        "soft_dice": lambda: slow.soft_dice(p[:, 1:], d, inside, organs),
    }


TERMS = tuple(all_terms(RandomBatch(0)))


def gradient(term: Term, at: Tensor) -> Tensor:
    point = at.clone().requires_grad_()
    (found,) = torch.autograd.grad(term(point), point)
    return found


def descend(term: Term, start: Tensor) -> Tensor:
    point = start.clone().requires_grad_()
    optimiser = torch.optim.LBFGS(
        [point],
        max_iter=500,
        tolerance_grad=1e-12,
        tolerance_change=0,
        line_search_fn="strong_wolfe",
    )

    def again() -> Tensor:
        optimiser.zero_grad()
        loss = term(point)
        loss.backward()  # type: ignore[no-untyped-call]
        return loss

    optimiser.step(again)  # type: ignore[no-untyped-call]
    return point.detach()
