"""One step of the optimiser."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch

from pipeline.student.network import StudentNetwork
from pipeline.student.processes import Processes
from pipeline.student.resume import random_state, set_random_state
from pipeline.student.settings import TrainingConfig
from pipeline.student.speed import Speed
from pipeline.student.supervision import Batch, batch_loss, terms_of_batch


def make_step(
    config: TrainingConfig,
    network: StudentNetwork,
    optimiser: torch.optim.Optimizer,
    batch: Batch,
    speed: Speed,
    processes: Processes,
    step: int,
) -> dict[str, Any]:
    """One step of the optimiser; returns what is worth a line in metrics.jsonl.

    Raises:
        FloatingPointError: loss or gradient is not finite, with the terms of which that is true;
            the weights are as they were before. In several processes it is raised in all.
    """
    random = random_state(speed.device)
    lr = config.optimiser.lr_at(step, config.steps)
    for group in optimiser.param_groups:
        group["lr"] = lr
    fraction = step / config.steps
    with speed.autocast():
        loss, terms = batch_loss(config.supervision, network, batch, fraction)
    value = float(loss.detach())
    if any(processes.any(not math.isfinite(value))):
        bad = [name for name, term in terms.items() if not math.isfinite(term)]
        raise FloatingPointError(f"the loss became NaN in {', '.join(bad) or 'the sum'}.")
    optimiser.zero_grad(set_to_none=True)
    speed.scaler.scale(loss).backward()  # type: ignore[no-untyped-call]
    # Before they are unscaled: so an overflow in one process makes all leave the step out.
    processes.average_gradients(network)
    speed.scaler.unscale_(optimiser)
    norm = float(torch.nn.utils.clip_grad_norm_(network.parameters(), config.optimiser.clip_norm))
    if speed.is_lost(norm):
        optimiser.zero_grad(set_to_none=True)
        steep = _terms_of_bad_gradient(config, network, batch, speed, fraction, random, terms)
        bad = [name for name, flag in zip(terms, processes.any(*steep), strict=True) if flag]
        where = ", ".join(bad) or "the sum"
        raise FloatingPointError(
            f"the gradient became NaN in {where}, although the loss is finite."
        )
    taken = speed.step(optimiser, norm)
    found = {"loss": value, "terms": terms, "lr": lr}
    return found | {"gradient_norm": norm if taken else None}


def _terms_of_bad_gradient(
    config: TrainingConfig,
    network: StudentNetwork,
    batch: Batch,
    speed: Speed,
    fraction: float,
    random: Mapping[str, Any],
    terms: Iterable[str],
) -> list[bool]:
    """For each term, whether its own gradient in this process is not finite.

    Each has a pass of its own, there and back, over the same batch with the same random numbers: a
    compiled network cannot go back twice. Sums over processes are made in the same order in all.

    Args:
        config: supervision.
        network: with the weights of the step that failed.
        batch: of that step.
        speed: its precision and scale.
        fraction: t of that step.
        random: `random_state` before that step.
        terms: names, of `terms_of_batch`.
    """
    weights = [weight for weight in network.parameters() if weight.requires_grad]
    found = []
    for name in terms:
        set_random_state(random, speed.device)
        with speed.autocast():
            term = terms_of_batch(config.supervision, network, batch, fraction)[name]
        scaled = speed.scaler.scale(term)
        gradients = torch.autograd.grad(scaled, weights, allow_unused=True)
        found.append(not all(torch.isfinite(g).all() for g in gradients if g is not None))
    return found
