"""What a student is taught by: configuration, and the loss of one batch.

Every kind sees the same cache, network and budget; what is read and the loss differ.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from pydantic import Field, field_validator, model_validator
from torch import Tensor

from pipeline.cache.reader import ReliabilityConfig
from pipeline.config import Config
from pipeline.data.labels import IGNORE
from pipeline.student import losses
from pipeline.student.network import Head, StudentNetwork, TapKey, over_outputs

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
    """The logits-wise term."""

    schedule: Literal["constant", "ramp_up", "decay"] = Field(
        default="decay", description="how the weight runs over time"
    )
    target: Literal["joint", "per_teacher", "marginal"] = Field(
        default="joint",
        description="of the KL: all experts together, each organ by itself, or each teacher's "
        "organs together",
    )
    mean: Literal["voxel", "region"] = Field(
        default="voxel", description="over all regions together, or per region and then over them"
    )
    soft_dice: bool = Field(default=True, description="added to the KL")
    hard: bool = Field(default=False, description="targets of 0 and 1 instead of probabilities")
    temperature: float = Field(default=1.0, gt=0, description="T of the KL, which is times T^2")
    agreed_background: bool = Field(default=True, description="False: organ regions alone")


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

    @property
    def uses_features(self) -> bool:
        """Whether features are read at all."""
        return (
            self.kind == "ms_kd" and self.features.weight > 0 and bool(self.features.student_taps)
        )

    @property
    def uses_experts(self) -> bool:
        """Whether it matters which teacher speaks of which organs."""
        return self.kind == "ms_kd" and self.logits.target == "marginal"


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
        background: bool (N, D, H, W), background as far as anybody speaks: the agreed background,
            and what lies beside an organ whose teachers are silent.
        experts: bool (N, I, K), whether teacher i speaks of organ k in a sample, where
            `uses_experts`; organs that the label alone speaks of have a teacher of their own.
        body: bool (N, D, H, W), what is not air, where features are read.
        features: (teacher, tap) -> (N, F, d, h, w), standardised per channel; NaN where not seen.
    """

    image: Tensor
    classes: Tensor
    annotated: Tensor
    known: Tensor
    log_odds: Tensor | None = None
    organ: Tensor | None = None
    background: Tensor | None = None
    experts: Tensor | None = None
    body: Tensor | None = None
    features: Mapping[TapKey, Tensor] = field(default_factory=dict)

    @property
    def targets(self) -> losses.Targets:
        """What teachers say, where they are read."""
        assert self.log_odds is not None
        assert self.organ is not None
        assert self.background is not None
        return losses.Targets(self.log_odds, self.organ, self.background)


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
    terms = over_outputs(outputs, lambda logits: terms_of_logits(config, logits, batch, fraction))
    weight = config.features.at(fraction) if config.uses_features else 0.0
    if weight > 0:
        background = config.features.background
        terms["features"] = weight * _features_term(network, features, batch, background)
    loss = torch.stack(list(terms.values())).sum()
    return loss, {name: float(value.detach()) for name, value in terms.items()}


def terms_of_logits(
    config: SupervisionConfig, logits: Tensor, batch: Batch, fraction: float
) -> dict[str, Tensor]:
    """Each weighted term of one output of a network, (N, C, D, H, W).

    All processes make the same terms: which there are depends on settings and time alone.
    """
    classes, organs = batch.classes, batch.annotated
    match config.kind:
        case "masked_bce":
            s = logits[:, 1:]  # before them is the background's 0, see `OneVsRest`
            return {
                "binary_cross_entropy": losses.masked_bce(s, classes, organs),
                "dice": losses.dice(losses.at_least_float32(s).sigmoid(), classes, organs),
            }
        case "naive":
            organs = torch.ones_like(organs)
        case "pseudo_label":
            classes, organs = pseudo_labels(batch), batch.known
        case "marginal" | "marginal_exclusion" | "ms_kd" | "full":
            pass
    log_p, p = losses.softmax_both(logits)
    merged = losses.merge_into_background(log_p, organs)
    terms = {
        "cross_entropy": losses.cross_entropy(merged, classes),
        "dice": losses.dice(p[:, 1:], classes, organs),
    }
    if config.kind == "marginal_exclusion" and (weight := config.exclusion.at(fraction)) > 0:
        overlap = losses.exclusion_dice(p[:, 1:], classes, organs)
        terms["exclusion_dice"] = weight * overlap
        entropy = losses.exclusion_cross_entropy(p[:, 1:], classes, organs)
        terms["exclusion_cross_entropy"] = weight * entropy
    if config.kind == "ms_kd" and (weight := config.logits.at(fraction)) > 0:
        if config.reliability is not None and config.reliability.doubt is not None:
            batch = with_doubt(batch, p, config.reliability.doubt)
        terms["logits"] = weight * logits_term(config.logits, log_p, p, batch)
    return terms


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
    targets = batch.targets
    if config.hard:
        targets = replace(targets, log_odds=losses.hard(targets.log_odds))
    if not config.agreed_background:
        targets = replace(targets, background=torch.zeros_like(targets.background))
    # The KL of all experts together is of the very target that soft Dice has: made once for both.
    same = config.soft_dice and config.target == "joint" and config.temperature == 1
    joint = losses.joint_log_q_and_q(targets.log_odds) if same else None
    term = losses.kl(
        log_p,
        targets,
        _experts(config, batch),
        temperature=config.temperature,
        per_region=config.mean == "region",
        joint=joint,
    )
    if config.soft_dice:
        inside = targets.organ.any(dim=1) | targets.background
        term = term + losses.soft_dice(p[:, 1:], targets.log_odds, inside, batch.known, joint=joint)
    return term


def with_doubt(batch: Batch, p: Tensor, doubt: float) -> Batch:
    """Teachers are silent where the student is surer of their organ than `doubt` and they say that
    it is not here, unless a label says so.

    Args:
        batch: see there.
        p: student's softmax (N, C, D, H, W).
        doubt: in 0 .. 1.
    """
    assert batch.log_odds is not None
    d, classes = batch.log_odds, batch.classes[:, None]
    annotated = batch.annotated[:, :, None, None, None]
    labelled = (annotated | (classes > 0)) & (classes != IGNORE)
    overruled = (p.detach()[:, 1:] > doubt) & (d < 0) & ~labelled
    return replace(batch, log_odds=d.masked_fill(overruled, torch.nan))


def _experts(config: LogitsConfig, batch: Batch) -> Tensor:
    """Who speaks of which organs: bool (N, I, K)."""
    match config.target:
        case "joint":
            return batch.known[:, None]
        case "per_teacher":
            return torch.diag_embed(batch.known)
        case "marginal":
            assert batch.experts is not None
            return batch.experts


def _features_term(
    network: StudentNetwork, student: Mapping[str, Tensor], batch: Batch, weight: float
) -> Tensor:
    """Per teacher and tap: cosine over the teacher's organ regions, plus `weight` times that over B
    without air; mean over them."""
    targets, terms = batch.targets, []
    assert batch.body is not None
    for key, cached in batch.features.items():
        stride = network.cached[key].stride
        organs = list(network.cached[key].organs)
        region = losses.share_of_cells(targets.organ[:, organs].any(dim=1), stride)
        # Beside its organ a teacher may be silent: its features say nothing of the others there.
        speaks = ~torch.isnan(targets.log_odds[:, organs]).all(dim=1)
        background = losses.share_of_cells(targets.background & speaks & batch.body, stride)
        adapted = network.adapt(key, student)
        inside, outside = losses.feature_cosine(adapted, cached, region, background)
        terms.append(inside + weight * outside)
    return torch.stack(terms).mean()
