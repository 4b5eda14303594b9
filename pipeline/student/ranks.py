"""Sums over all processes of a training, so that a loss is that of the whole batch.

A Dice or a mean over regions is a ratio of sums. Averaged over processes, ratios of parts are not
the ratio of the whole; summed before the division, they are.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def over_ranks(total: Tensor) -> Tensor:
    """The sum of a tensor over all processes, differentiable; the tensor itself in one process.

    Its backward pass sums the gradients of all processes, and those of the weights are averaged
    over them: together that is the gradient of the loss of the whole batch, once.
    """
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return total
    summed: Tensor = _Sum.apply(total)  # type: ignore[no-untyped-call]
    return summed


class _Sum(torch.autograd.Function):
    """All-reduce, there and back."""

    @staticmethod
    def forward(ctx: Any, total: Tensor) -> Tensor:
        return _summed(total)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return _summed(gradient)


def _summed(tensor: Tensor) -> Tensor:
    summed = tensor.detach().clone(memory_format=torch.contiguous_format)
    dist.all_reduce(summed)
    return summed
