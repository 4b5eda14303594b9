"""What a student is taught by: the loss of one batch; its configuration is in `settings`.

Every kind sees the same cache, network and budget; what is read and the loss differ.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from pipeline.data.labels import IGNORE
from pipeline.student import losses
from pipeline.student.network import StudentNetwork, TapKey, over_outputs
from pipeline.student.settings import LogitsConfig, SupervisionConfig


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
        features: (teacher, tap) -> (N, F, d, h, w).
    """

    image: Tensor
    classes: Tensor
    annotated: Tensor
    known: Tensor
    log_odds: Tensor | None = None
    organ: Tensor | None = None
    background: Tensor | None = None
    experts: Tensor | None = None
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
    terms = terms_of_batch(config, network, batch, fraction)
    loss = torch.stack(list(terms.values())).sum()
    return loss, {name: float(value.detach()) for name, value in terms.items()}


def terms_of_batch(
    config: SupervisionConfig, network: StudentNetwork, batch: Batch, fraction: float
) -> dict[str, Tensor]:
    """Each weighted term of the loss of a batch; see `batch_loss`, which is their sum."""
    outputs, features = network(batch.image)
    terms = over_outputs(outputs, lambda logits: terms_of_logits(config, logits, batch, fraction))
    weight = config.features.at(fraction) if config.uses_features else 0.0
    if weight > 0:
        terms["features"] = weight * _features_term(network, features, batch)
    return terms


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
    assert batch.log_odds is not None
    assert batch.organ is not None
    assert batch.background is not None
    organ, background, odds = batch.organ, batch.background, batch.log_odds
    if config.hard:
        odds = losses.hard(odds)
    if not config.agreed_background:
        background = torch.zeros_like(background)
    # The KL of all experts together is of the very target that soft Dice has: made once for both.
    same = config.soft_dice and config.target == "joint" and config.temperature == 1
    joint = losses.joint_log_q_and_q(odds) if same else None
    term = losses.kl(
        log_p,
        odds,
        organ,
        background,
        _experts(config, batch),
        temperature=config.temperature,
        per_region=config.mean == "region",
        joint=joint,
    )
    if config.soft_dice:
        inside = organ.any(dim=1) | background
        term = term + losses.soft_dice(p[:, 1:], odds, inside, batch.known, joint=joint)
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


def _features_term(network: StudentNetwork, student: Mapping[str, Tensor], batch: Batch) -> Tensor:
    """Per teacher and tap: cosine over the teacher's organ regions plus over B; mean over them."""
    assert batch.log_odds is not None
    assert batch.organ is not None
    assert batch.background is not None
    terms = []
    for key, cached in batch.features.items():
        stride = network.cached[key].stride
        organs = list(network.cached[key].organs)
        region = losses.touched_cells(batch.organ[:, organs].any(dim=1), stride)
        # Beside its organ a teacher may be silent: its features say nothing of the others there.
        speaks = ~torch.isnan(batch.log_odds[:, organs]).all(dim=1)
        background = losses.filled_cells(batch.background & speaks, stride)
        adapted = network.adapt(key, student)
        terms.append(losses.feature_cosine(adapted, cached, region, background))
    return torch.stack(terms).mean()
