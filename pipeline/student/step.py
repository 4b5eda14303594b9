"""One step of the optimiser."""

from __future__ import annotations

import math
from typing import Any

import torch

from pipeline.student.network import StudentNetwork
from pipeline.student.processes import Processes
from pipeline.student.settings import TrainingConfig
from pipeline.student.supervision import Batch, batch_loss


def make_step(
    config: TrainingConfig,
    network: StudentNetwork,
    optimiser: torch.optim.Optimizer,
    batch: Batch,
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
    loss, terms = batch_loss(config.supervision, network, batch, step / config.steps)
    value = float(loss.detach())
    if any(processes.any(not math.isfinite(value))):
        bad = [name for name, term in terms.items() if not math.isfinite(term)]
        raise FloatingPointError(f"the loss became NaN in {', '.join(bad) or 'the sum'}.")
    optimiser.zero_grad(set_to_none=True)
    loss.backward()  # type: ignore[no-untyped-call]
    processes.average_gradients(network)
    norm = float(torch.nn.utils.clip_grad_norm_(network.parameters(), config.optimiser.clip_norm))
    if not math.isfinite(norm):
        raise FloatingPointError("the gradient became NaN, although the loss is finite.")
    optimiser.step()
    return {"loss": value, "terms": terms, "lr": lr, "gradient_norm": norm}
