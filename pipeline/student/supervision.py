"""What a student is taught by: the loss of one batch; its configuration is in `settings`.

Every kind sees the same cache, network and budget; what is read and the loss differ.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from pipeline.data.labels import IGNORE
from pipeline.student import losses
from pipeline.student.network import StudentNetwork, TapKey, over_outputs
from pipeline.student.settings import SupervisionConfig


@dataclass(frozen=True)
class Batch:
    """What the loss needs of one batch.

    Attributes:
        image: float32 (N, 1, D, H, W).
        classes: int64 (N, D, H, W), 255 ignore.
        annotated: bool (N, K).
        known: bool (N, K), organs that a teacher or the label speaks of.
        log_odds: float32 (N, K, D, H, W), NaN where nobody knows; absent for labels alone.
        body: bool (N, D, H, W), what is not air, where features are read.
        features: (teacher, tap) -> (N, F, d, h, w), standardised per channel; NaN where not seen.
    """

    image: Tensor
    classes: Tensor
    annotated: Tensor
    known: Tensor
    log_odds: Tensor | None = None
    body: Tensor | None = None
    features: Mapping[TapKey, Tensor] = field(default_factory=dict)


def batch_loss(
    config: SupervisionConfig,
    network: StudentNetwork,
    batch: Batch,
    fraction: float,
    told: dict[str, Any] | None = None,
) -> tuple[Tensor, dict[str, float]]:
    """The loss of a batch, and each weighted term for the log.

    Args:
        config: which terms.
        network: called once; its features are tapped where a term wants them.
        batch: on the network's device.
        fraction: t = step / steps, for the schedules.
        told: gets what else is worth a line in metrics.jsonl.
    """
    outputs, features = network(batch.image)
    if told is not None and config.compares_words(fraction):
        final = outputs[0] if isinstance(outputs, tuple) else outputs
        told["believed"] = believed(final, batch)
    terms = over_outputs(outputs, lambda logits: terms_of_logits(config, logits, batch, fraction))
    weight = config.features.at(fraction) if config.uses_features else 0.0
    if weight > 0:
        terms["features"] = weight * _features_term(config, network, features, batch)
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
        case "ms_kd":
            return _one_target_terms(config, logits, batch, fraction)
        case "marginal" | "marginal_exclusion" | "full":
            pass
    log_p, p = _of_organs(logits)
    terms = _label_terms(log_p, p, classes, organs)
    if config.kind == "marginal_exclusion" and (weight := config.exclusion.at(fraction)) > 0:
        overlap = losses.exclusion_dice(p, classes, organs)
        terms["exclusion_dice"] = weight * overlap
        entropy = losses.exclusion_cross_entropy(p, classes, organs)
        terms["exclusion_cross_entropy"] = weight * entropy
    return terms


def _label_terms(log_p: Tensor, p: Tensor, classes: Tensor, organs: Tensor) -> dict[str, Tensor]:
    """Cross-entropy and Dice of labels; organs that they do not speak of are merged."""
    merged = losses.merge_into_background(log_p, organs)
    return {
        "cross_entropy": losses.cross_entropy(merged, classes),
        "dice": losses.dice(p, classes, organs),
    }


def _of_organs(logits: Tensor) -> tuple[Tensor, Tensor]:
    """log p of all classes, p of the organs."""
    log_p, p = losses.softmax_both(logits)
    return log_p, p[:, 1:]


def _one_target_terms(
    config: SupervisionConfig, logits: Tensor, batch: Batch, fraction: float
) -> dict[str, Tensor]:
    """w times the terms of one target per voxel, 1 - w times those of labels alone."""
    weight = config.logits.at(fraction)
    log_p, p = _of_organs(logits)
    terms: dict[str, Tensor] = {}
    if weight > 0:
        d = counting_log_odds(config, logits, batch, fraction)
        entropy, dice = losses.one_target(log_p, p, d, temperature=config.logits.temperature)
        terms = {"cross_entropy": weight * entropy, "dice": weight * dice}
    if weight < 1:
        by_labels = _label_terms(log_p, p, batch.classes, batch.annotated)
        for name, term in by_labels.items():
            terms[name] = terms.get(name, 0.0) + (1 - weight) * term
    return terms


def pseudo_labels(batch: Batch) -> Tensor:
    """Hard targets: argmax over [0, d_1 .. d_K] after the labels have won; 255 where unseen."""
    assert batch.log_odds is not None
    d = batch.log_odds
    best, organ = torch.nan_to_num(d, nan=-1e4).max(dim=1)
    classes = torch.where(best > 0, organ + 1, torch.zeros_like(organ))
    unseen = (torch.isnan(d) & batch.known[:, :, None, None, None]).any(dim=1)
    return torch.where(unseen, IGNORE, classes)


def counting_log_odds(
    config: SupervisionConfig, logits: Tensor, batch: Batch, fraction: float
) -> Tensor:
    """d of the one target, NaN where nobody's word counts: within the margin, and where a teacher
    and the student contradict each other; hard where that is asked for."""
    assert batch.log_odds is not None
    d = batch.log_odds
    if config.margin > 0:
        d = d.masked_fill(d.abs() <= config.margin, torch.nan)
    if config.compares_words(fraction):
        d = d.masked_fill(contradicted(logits, batch), torch.nan)
    return losses.hard(d) if config.logits.hard else d


def contradicted(logits: Tensor, batch: Batch) -> Tensor:
    """Where a teacher says "here" (d > 0) and the student does not (p <= 1/2), or the other way
    round, and no label says who is right: bool (N, K, D, H, W).

    Args:
        logits: of the student, (N, C, D, H, W).
        batch: with log-odds.
    """
    assert batch.log_odds is not None
    p = torch.softmax(losses.at_least_float32(logits.detach()), dim=1)[:, 1:]
    return ((p > 0.5) != (batch.log_odds > 0)) & _teachers_alone(batch)


def believed(logits: Tensor, batch: Batch) -> list[float | None]:
    """Per organ the share of voxels in which a teacher's word counts, of those where no label
    speaks of it; None where there is none."""
    alone = _teachers_alone(batch)
    kept = (alone & ~contradicted(logits, batch)).flatten(2).sum(dim=2).sum(dim=0)
    sizes = alone.flatten(2).sum(dim=2).sum(dim=0)
    pairs = zip(kept.tolist(), sizes.tolist(), strict=True)
    return [round(part / size, 4) if size else None for part, size in pairs]


def _teachers_alone(batch: Batch) -> Tensor:
    """Where a teacher speaks and no label does: bool (N, K, D, H, W)."""
    assert batch.log_odds is not None
    classes = batch.classes[:, None]
    annotated = batch.annotated[:, :, None, None, None]
    labelled = (annotated | (classes > 0)) & (classes != IGNORE)
    return ~labelled & ~torch.isnan(batch.log_odds)


def _features_term(
    config: SupervisionConfig, network: StudentNetwork, student: Mapping[str, Tensor], batch: Batch
) -> Tensor:
    """Per teacher and tap: cosine over the teacher's organ regions, plus a weight times that over B
    without air; mean over them."""
    assert batch.log_odds is not None
    assert batch.body is not None
    regions, terms = losses.regions_of(batch.log_odds, config.margin), []
    for key, cached in batch.features.items():
        stride = network.cached[key].stride
        organs = list(network.cached[key].organs)
        region = losses.share_of_cells(regions.organ[:, organs].any(dim=1), stride)
        # Beside its organ a teacher may be silent: its features say nothing of the others there.
        speaks = ~torch.isnan(batch.log_odds[:, organs]).all(dim=1)
        background = losses.share_of_cells(regions.background & speaks & batch.body, stride)
        adapted = network.adapt(key, student)
        inside, outside = losses.feature_cosine(adapted, cached, region, background)
        terms.append(inside + config.features.background * outside)
    return torch.stack(terms).mean()
