"""A running mean of a student's weights: what is validated and kept, if a training asks for it."""

from __future__ import annotations

from collections.abc import Mapping
from copy import deepcopy
from typing import Any

import torch
from torch import nn

from pipeline.student.network import StudentNetwork


class Averaged:
    """w := a w + (1 - a) w_step after every step, with a = min(decay, (1 + step) / (10 + step)).

    The exponential moving average of weights of Tarvainen and Valpola 2017 (arXiv 1703.01780), with
    the warm-up that follows the first steps closely. Integer buffers are copied.

    Args:
        network: whose weights are averaged.
        decay: 0 follows the network exactly.
    """

    def __init__(self, network: StudentNetwork, decay: float) -> None:
        self.network: StudentNetwork = deepcopy(network)
        self.network.eval().requires_grad_(False)
        self._decay = decay

    @torch.no_grad()
    def update(self, network: nn.Module, step: int) -> None:
        """After a step of the optimiser; `step` counts from 0."""
        keep = min(self._decay, (1 + step) / (10 + step))
        new = network.state_dict()
        for name, old in self.network.state_dict().items():
            if old.is_floating_point():
                old.lerp_(new[name].to(old.dtype), 1 - keep)
            else:
                old.copy_(new[name])

    def state_dict(self) -> Mapping[str, Any]:
        """The averaged weights."""
        return self.network.state_dict()

    def load_state_dict(self, state: Mapping[str, Any], /) -> None:
        """Replaces them."""
        self.network.load_state_dict(state)
