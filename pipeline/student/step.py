"""One step of the optimiser."""

from __future__ import annotations

import math
from typing import Any

import torch

from pipeline.student.network import StudentNetwork
from pipeline.student.processes import Processes
from pipeline.student.settings import TrainingConfig
from pipeline.student.speed import Speed
from pipeline.student.supervision import Batch, batch_loss


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
        FloatingPointError: loss or gradient is not finite; the weights are as they were before. In
            several processes it is raised in all.
    """
    lr = config.optimiser.lr_at(step, config.steps)
    for group in optimiser.param_groups:
        group["lr"] = lr
    with speed.autocast():
        loss, terms = batch_loss(config.supervision, network, batch, step / config.steps)
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
    taken = speed.step(optimiser, norm)
    found = {"loss": value, "terms": terms, "lr": lr}
    return found | {"gradient_norm": norm if taken else None}
