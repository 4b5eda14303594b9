"""Everything about a training that changes its numbers, its digest, and the optimiser it asks
for.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field, field_validator, model_validator

from pipeline.cache.reader import ReliabilityConfig
from pipeline.config import Config, digest
from pipeline.data.labels import Intensity
from pipeline.networks.by_name import NetworkConfig
from pipeline.student.augment import AugmentConfig
from pipeline.student.sampling import SamplingConfig

if TYPE_CHECKING:
    import torch
    from torch import nn

    from pipeline.student.network import Head

# What a student is taught by.

Kind = Literal[
    "naive", "marginal", "marginal_exclusion", "pseudo_label", "masked_bce", "ms_kd", "full"
]
LABELS_ALONE: tuple[Kind, ...] = ("naive", "marginal", "marginal_exclusion", "masked_bce", "full")


class WeightConfig(Config):
    """A term's weight and how it runs over training time t = step / steps.

    constant: w. ramp_up: w * min(1, t / until). decay: w * max(0, 1 - t / until).
    """

    weight: float = Field(default=1.0, ge=0, description="w, beside the other terms")
    schedule: Literal["constant", "ramp_up", "decay"] = Field(
        default="constant", description="how the weight runs over time"
    )
    until: float = Field(
        default=1.0, gt=0, le=1, description="share of the training at which the schedule ends"
    )

    def at(self, fraction: float) -> float:
        """The weight at t in 0 .. 1."""
        match self.schedule:
            case "constant":
                return self.weight
            case "ramp_up":
                return self.weight * min(1.0, fraction / self.until)
            case "decay":
                return self.weight * max(0.0, 1.0 - fraction / self.until)


class LogitsConfig(WeightConfig):
    """One target per voxel: labels where there are any, else what experts say."""

    weight: float = Field(
        default=1.0,
        ge=0,
        le=1,
        description="w of the one target; the labels alone, all else merged, weigh 1 - w",
    )
    schedule: Literal["constant", "ramp_up", "decay"] = Field(
        default="decay",
        description="how the weight runs over time; decaying, labels have the last word",
    )
    hard: bool = Field(default=False, description="targets of 0 and 1 instead of probabilities")
    temperature: float = Field(
        default=1.0, gt=0, description="log-odds are divided by it; below 1: a harder target"
    )

    gone: ClassVar[Mapping[str, str]] = dict.fromkeys(
        ("target", "mean", "soft_dice", "agreed_background"),
        "every voxel has one target now, that of labels and experts together: remove them",
    )


class FeaturesConfig(Config):
    """The feature-wise term: cached taps against layers of the student.

    Its weight at t = step / steps is w * min(1, t / ramp), and from there on decays to 0 at until.
    """

    weight: float = Field(default=0.5, ge=0, description="w, beside the other terms")
    ramp: float = Field(
        default=0.1, ge=0, lt=1, description="share of the training at which the weight is w"
    )
    until: float = Field(
        default=1.0, gt=0, le=1, description="share of the training at which it has decayed to 0"
    )
    background: float = Field(
        default=0.25, ge=0, description="of the agreed background, where the organs weigh 1"
    )
    student_taps: dict[str, str] | tuple[str, ...] = Field(
        default=(),
        description="layers of the student, each for all cached taps of its stride, or {cached "
        "tap: layer}; one name alone is a list of one; empty: no such term",
    )

    @model_validator(mode="before")
    @classmethod
    def _one_schedule(cls, values: Any) -> Any:
        if isinstance(values, Mapping) and "schedule" in values:
            raise ValueError(
                "`schedule` is gone: the weight ramps up until `ramp` and decays until `until`. "
                "Remove it; `ramp: 0` is what `decay` was"
            )
        return values

    @model_validator(mode="after")
    def _up_before_down(self) -> FeaturesConfig:
        if self.ramp >= self.until:
            raise ValueError(f"ramp {self.ramp:g} must be below until {self.until:g}")
        return self

    def at(self, fraction: float) -> float:
        """The weight at t in 0 .. 1."""
        if fraction < self.ramp:
            return self.weight * fraction / self.ramp
        return self.weight * max(0.0, (self.until - fraction) / (self.until - self.ramp))

    @field_validator("student_taps", mode="before")
    @classmethod
    def _one_name(cls, value: Any) -> Any:
        if isinstance(value, str):
            return (value,) if value else ()
        return value


class SupervisionConfig(Config):
    """Which supervision, and each of its choices."""

    kind: Kind = Field(default="ms_kd", description="what the student is taught by")
    margin: float = Field(
        default=0.0, ge=0,
        description="log-odds m; organ region where d > m, agreed background where all d < -m",
    )  # fmt: skip
    labels_win: bool = Field(
        default=True, description="the case's own labels correct the teachers first"
    )
    confidence: float = Field(
        default=6.0, gt=0, description="log-odds that a label that wins is given at least"
    )
    calibrated: bool = Field(
        default=False, description="divide log-odds by the temperatures that stage one measured"
    )
    logits: LogitsConfig = Field(default_factory=LogitsConfig)
    features: FeaturesConfig = Field(default_factory=FeaturesConfig)
    reliability: ReliabilityConfig | None = Field(
        default_factory=ReliabilityConfig,
        description="when a teacher's word counts in ms_kd; null: always",
    )
    exclusion: WeightConfig = Field(
        default_factory=WeightConfig, description="both exclusion terms of marginal_exclusion"
    )

    @model_validator(mode="after")
    def _labels_in_regions(self) -> SupervisionConfig:
        if self.labels_win and self.margin >= self.confidence:
            raise ValueError(
                f"margin {self.margin:g} must be below confidence {self.confidence:g}: what a "
                "label says would be in no region"
            )
        return self

    @model_validator(mode="after")
    def _weights(self) -> SupervisionConfig:
        if self.kind == "ms_kd" and self.logits.weight == 0 and not self.uses_features:
            raise ValueError("ms_kd without any distillation term; choose kind `marginal`")
        if self.kind == "marginal_exclusion" and self.exclusion.weight == 0:
            raise ValueError("marginal_exclusion of weight 0; choose kind `marginal`")
        return self

    @property
    def head(self) -> Head:
        """What the student ends in."""
        return "sigmoid" if self.kind == "masked_bce" else "softmax"

    @property
    def uses_teachers(self) -> bool:
        """Whether log-odds are read at all."""
        return self.kind not in LABELS_ALONE

    @property
    def uses_temperatures(self) -> bool:
        """Whether log-odds are read and divided by a temperature."""
        return self.uses_teachers and self.calibrated

    @property
    def uses_reliability(self) -> bool:
        """Whether what teachers say is weighed at all."""
        return self.kind == "ms_kd" and self.reliability is not None

    def compares_words(self, fraction: float) -> bool:
        """Whether what a teacher says at a voxel is compared with what the student says there, at
        t = fraction of the training."""
        if self.reliability is None or not self.uses_reliability:
            return False
        after = self.reliability.agree_after
        return after is not None and fraction >= after

    @property
    def uses_features(self) -> bool:
        """Whether features are read at all."""
        return (
            self.kind == "ms_kd" and self.features.weight > 0 and bool(self.features.student_taps)
        )


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
    import torch

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
