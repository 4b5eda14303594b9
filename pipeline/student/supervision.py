"""What a student is taught by: configuration, and the loss of one batch.

Every kind sees the same cache, sampler, network and budget; only the loss differs.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from pipeline.config import Config
from pipeline.labels import IGNORE
from pipeline.student import losses
from pipeline.student.deep_supervision import over_outputs
from pipeline.student.network import StudentNetwork, TapKey

Kind = Literal["naive", "marginal", "pseudo_label", "ms_kd", "full"]
LABELS_ALONE: tuple[Kind, ...] = ("naive", "marginal", "full")


class WeightConfig(Config):
    """A term's weight and how it runs over training time t = step / steps.

    constant: w. ramp_up: w * min(1, t / until). decay: w * max(0, 1 - t / until).
    """

    weight: float = Field(default=1.0, ge=0)
    schedule: Literal["constant", "ramp_up", "decay"] = "constant"
    until: float = Field(default=1.0, gt=0, le=1)

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
    """The logits-wise term."""

    schedule: Literal["constant", "ramp_up", "decay"] = "decay"
    target: Literal["joint", "per_teacher"] = "joint"
    mean: Literal["voxel", "region"] = Field(
        default="voxel", description="over all regions together, or per region and then over them"
    )
    soft_dice: bool = True
    temperature: float = Field(default=1.0, gt=0)
    agreed_background: bool = Field(default=True, description="False: organ regions alone")


class FeaturesConfig(WeightConfig):
    """The feature-wise term: every cached tap against one layer of the student."""

    weight: float = Field(default=0.1, ge=0)
    schedule: Literal["constant", "ramp_up", "decay"] = "decay"
    student_tap: str = Field(default="", description="layer of the student; empty: no such term")


class SupervisionConfig(Config):
    """Which supervision, and each of its choices."""

    kind: Kind = "ms_kd"
    margin: float = Field(default=0.0, ge=0, description="log-odds")
    labels_win: bool = True
    confidence: float = Field(default=6.0, gt=0, description="log-odds of a label that wins")
    calibrated: bool = Field(
        default=False, description="divide log-odds by the temperatures that stage one measured"
    )
    logits: LogitsConfig = Field(default_factory=LogitsConfig)
    features: FeaturesConfig = Field(default_factory=FeaturesConfig)

    @model_validator(mode="after")
    def _weights(self) -> SupervisionConfig:
        if self.kind == "ms_kd" and self.logits.weight == 0 and not self.uses_features:
            raise ValueError("ms_kd without any distillation term; choose kind `marginal`")
        return self

    @property
    def uses_teachers(self) -> bool:
        """Whether log-odds are read at all."""
        return self.kind not in LABELS_ALONE

    @property
    def uses_temperatures(self) -> bool:
        """Whether log-odds are read and divided by a temperature."""
        return self.uses_teachers and self.calibrated

    @property
    def uses_features(self) -> bool:
        """Whether features are read at all."""
        return self.kind == "ms_kd" and self.features.weight > 0 and self.features.student_tap != ""


@dataclass(frozen=True)
class Batch:
    """What the loss needs of one batch.

    Attributes:
        image: float32 (N, 1, D, H, W).
        classes: int64 (N, D, H, W), 255 ignore.
        annotated: bool (N, K).
        known: bool (N, K), organs that a teacher or the label speaks of.
        log_odds: float32 (N, K, D, H, W), NaN where nobody knows; absent for labels alone.
        organ: bool (N, K, D, H, W), organ regions.
        background: bool (N, D, H, W), agreed background.
        features: (teacher, tap) -> (N, F, d, h, w).
    """

    image: Tensor
    classes: Tensor
    annotated: Tensor
    known: Tensor
    log_odds: Tensor | None = None
    organ: Tensor | None = None
    background: Tensor | None = None
    features: Mapping[TapKey, Tensor] = field(default_factory=dict)


def batch_loss(
    config: SupervisionConfig,
    network: StudentNetwork,
    batch: Batch,
    fraction: float,
) -> tuple[Tensor, dict[str, float]]:
    """The loss of a batch, and each weighted term for the log.

    Args:
        config: which terms.
        network: called once; its features are tapped where a term wants them.
        batch: on the network's device.
        fraction: t = step / steps, for the schedules.
    """
    outputs, features = network(batch.image)
    terms = over_outputs(outputs, lambda logits: _output_terms(config, logits, batch, fraction))
    if config.kind == "ms_kd":
        weight = config.features.at(fraction) if config.uses_features else 0.0
        if weight > 0:
            terms["features"] = weight * _features_term(network, features, batch)
    loss = torch.stack(list(terms.values())).sum()
    return loss, {name: float(value.detach()) for name, value in terms.items()}


def _output_terms(
    config: SupervisionConfig, logits: Tensor, batch: Batch, fraction: float
) -> dict[str, Tensor]:
    """Weighted terms of one output of the network."""
    log_p, p = losses.softmax_both(logits)
    terms = _supervised(config, log_p, p, batch)
    weight = config.logits.at(fraction) if config.kind == "ms_kd" else 0.0
    if weight > 0:
        terms["logits"] = weight * logits_term(config.logits, log_p, p, batch)
    return terms


def _supervised(
    config: SupervisionConfig, log_p: Tensor, p: Tensor, batch: Batch
) -> dict[str, Tensor]:
    classes, organs = batch.classes, batch.annotated
    match config.kind:
        case "naive":
            organs = torch.ones_like(organs)
        case "pseudo_label":
            classes, organs = pseudo_labels(batch), batch.known
        case "marginal" | "ms_kd" | "full":
            pass
    merged = losses.merge_into_background(log_p, organs)
    return {
        "cross_entropy": losses.cross_entropy(merged, classes),
        "dice": losses.dice(p, classes, organs),
    }


def pseudo_labels(batch: Batch) -> Tensor:
    """Hard targets: argmax over [0, d_1 .. d_K] after the labels have won; 255 where unseen."""
    assert batch.log_odds is not None
    d = batch.log_odds
    best, organ = torch.nan_to_num(d, nan=-1e4).max(dim=1)
    classes = torch.where(best > 0, organ + 1, torch.zeros_like(organ))
    unseen = (torch.isnan(d) & batch.known[:, :, None, None, None]).any(dim=1)
    return torch.where(unseen, IGNORE, classes)


def logits_term(config: LogitsConfig, log_p: Tensor, p: Tensor, batch: Batch) -> Tensor:
    """KL and soft Dice over R_1 .. R_K and B; see method.md and `losses`."""
    assert batch.log_odds is not None
    assert batch.organ is not None
    assert batch.background is not None
    merged = losses.merge_into_background(log_p, batch.known)
    # Where an expert did not see, what all of them say together is unknown.
    unseen = (torch.isnan(batch.log_odds) & batch.known[:, :, None, None, None]).any(dim=1)
    organ = batch.organ & ~unseen[:, None]
    background = batch.background & ~unseen
    if not config.agreed_background:
        background = torch.zeros_like(background)
    inside = organ.any(dim=1) | background
    if config.target == "joint":
        weight = _region_weight(organ, background) if config.mean == "region" else inside.float()
        term = losses.kl_joint(merged, batch.log_odds, weight, config.temperature)
    else:
        weights = (organ | background[:, None]).float()
        if config.mean == "region":
            weights = _normalised(organ) + _normalised(background[:, None].expand_as(organ))
        known = batch.known[:, :, None, None, None]
        term = losses.kl_per_teacher(merged, batch.log_odds, weights * known, config.temperature)
    if config.soft_dice:
        term = term + losses.soft_dice(p, batch.log_odds, inside, batch.known)
    return term


def _normalised(region: Tensor) -> Tensor:
    """1 / size on a region of the batch, per channel; 0 elsewhere."""
    size = region.sum(dim=(0, 2, 3, 4), keepdim=True).clamp(min=1)
    return region.float() / size


def _region_weight(organ: Tensor, background: Tensor) -> Tensor:
    return _normalised(organ).sum(dim=1) + _normalised(background[:, None])[:, 0]


def _features_term(network: StudentNetwork, student: Tensor | None, batch: Batch) -> Tensor:
    """Per teacher and tap: cosine over the teacher's organ regions plus over B; mean over them."""
    assert student is not None
    assert batch.organ is not None
    assert batch.background is not None
    stride = network.tap_stride
    background = losses.filled_cells(batch.background, stride)
    total = student.new_zeros(())
    for key, cached in batch.features.items():
        region = losses.touched_cells(batch.organ[:, network.organs_of(key)].any(dim=1), stride)
        adapted = network.adapt(key, student)
        total = total + losses.feature_cosine(adapted, cached, region, background)
    return total / max(1, len(batch.features))
