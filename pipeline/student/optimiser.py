"""How weights move: the optimiser and its learning rate at each step."""

from __future__ import annotations

import math
from typing import Literal

import torch
from pydantic import Field
from torch import nn

from pipeline.config import Config


class OptimiserConfig(Config):
    """Which optimiser. lr(step) depends on the absolute step alone, so resuming cannot bend it."""

    name: Literal["adamw", "sgd"] = Field(default="adamw", description="AdamW, or SGD")
    lr: float = Field(default=2e-3, gt=0, description="largest learning rate")
    weight_decay: float = Field(default=1e-2, ge=0, description="of the optimiser")
    momentum: float = Field(default=0.99, ge=0, lt=1, description="sgd, with Nesterov")
    schedule: Literal["cosine", "poly"] = Field(
        default="cosine", description="half a cosine, or (1 - t)^0.9 as nnU-Net's poly"
    )
    warmup: float = Field(
        default=0.02, ge=0, lt=1, description="share of the steps with a rising rate"
    )
    clip_norm: float = Field(default=12.0, gt=0, description="largest gradient norm")

    def lr_at(self, step: int, steps: int) -> float:
        """Learning rate: linear warm-up, then half a cosine, or (1 - t)^0.9 as nnU-Net's poly."""
        warm = self.warmup * steps
        if step < warm:
            return self.lr * (step + 1) / (warm + 1)
        t = (step - warm) / max(1.0, steps - warm)
        if self.schedule == "poly":
            return float(self.lr * (1 - t) ** 0.9)
        return self.lr * 0.5 * (1 + math.cos(math.pi * t))


def build_optimiser(config: OptimiserConfig, network: nn.Module) -> torch.optim.Optimizer:
    """The optimiser of a configuration over all weights of a network."""
    if config.name == "sgd":
        return torch.optim.SGD(
            network.parameters(),
            lr=config.lr,
            momentum=config.momentum,
            nesterov=config.momentum > 0,
            weight_decay=config.weight_decay,
        )
    return torch.optim.AdamW(network.parameters(), lr=config.lr, weight_decay=config.weight_decay)
