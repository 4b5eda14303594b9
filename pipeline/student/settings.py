"""Everything about a training that changes its numbers, its digest, and the optimiser it asks
for.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Literal

import torch
from pydantic import Field
from torch import nn

from pipeline.config import Config, digest
from pipeline.data.labels import Intensity
from pipeline.networks.by_name import NetworkConfig
from pipeline.student.augment import AugmentConfig
from pipeline.student.sampling import SamplingConfig
from pipeline.student.supervision import SupervisionConfig

# How weights move: the optimiser and its learning rate at each step.


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


# Everything about a training that changes its numbers, and its digest.


class TrainingConfig(Config):
    """Everything about a training that changes its numbers."""

    supervision: SupervisionConfig = Field(default_factory=SupervisionConfig)
    network: NetworkConfig = Field(default_factory=NetworkConfig)
    intensity: Intensity = Field(default_factory=Intensity)
    patch: tuple[int, int, int] = Field(default=(96, 96, 96), description="voxels z, y, x")
    batch_size: int = Field(default=2, ge=1, description="patches a step, of all processes")
    steps: int = Field(default=20_000, ge=1, description="of the whole training")
    seed: int = Field(default=0, ge=0, description="of weights, patches and augmentation")
    sampling: SamplingConfig = Field(default_factory=SamplingConfig)
    augment: AugmentConfig = Field(default_factory=AugmentConfig)
    deep_supervision: bool | None = Field(
        default=None,
        description="train all outputs of the network; null: where it has several; true: it must",
    )
    optimiser: OptimiserConfig = Field(default_factory=OptimiserConfig)
    validate_every: int = Field(default=1000, ge=1, description="steps between validations")


def run_digest(config: TrainingConfig, inputs: Mapping[str, Any]) -> str:
    """Digest of all that determines a training's outcome."""
    return digest({"config": config.model_dump(mode="json"), "inputs": dict(inputs)})
