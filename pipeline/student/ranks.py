"""Sums over all processes of a training, so that a loss is that of the whole batch.

A Dice or a mean over regions is a ratio of sums. Averaged over processes, ratios of parts are not
the ratio of the whole; summed before the division, they are.
"""

from __future__ import annotations

import torch.distributed as dist
from torch import Tensor
from torch.distributed.nn.functional import all_reduce


def over_ranks(total: Tensor) -> Tensor:
    """The sum of a tensor over all processes, differentiable; the tensor itself in one process.

    Its backward pass sums the gradients of all processes, of which DDP takes the mean: together
    that is the gradient of the loss of the whole batch, once.
    """
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return total
    summed: Tensor = all_reduce(total)  # type: ignore[no-untyped-call]
    return summed
