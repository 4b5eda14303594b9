"""The terms of the loss: pure functions of tensors, each with its formula.

The region-based terms are this project's reconstruction of MS-KD (Feng et al., arXiv 2108.02559),
whose equations were not available to us; see docs/method.md. All reductions run in float32.

Letters: N batch, K organs, C = K + 1 classes (0 background), F feature channels, D H W voxels,
d h w feature cells.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from pipeline.labels import IGNORE

_NEVER = -1e4  # a logit that softmax turns into 0 without the NaN that -inf would bring
_SMOOTH = 1e-5


def merge_into_background(logits: Tensor, organs: Tensor) -> Tensor:
    """Merges the classes nobody speaks of into background: s_0 := logsumexp(s_0, s_k not in A).

    Source: the marginal loss of Shi et al. 2021 (Medical Image Analysis 70, 101979).

    Args:
        logits: (N, C, D, H, W).
        organs: bool (N, K), the organs of A, per sample.

    Returns:
        (N, C, D, H, W) float32 in which merged classes have probability 0.
    """
    s = logits.float()
    merged = ~organs[:, :, None, None, None]
    others = torch.where(merged, s[:, 1:], torch.full_like(s[:, 1:], _NEVER))
    background = torch.logsumexp(torch.cat([s[:, :1], others], dim=1), dim=1, keepdim=True)
    kept = torch.where(merged, torch.full_like(s[:, 1:], _NEVER), s[:, 1:])
    return torch.cat([background, kept], dim=1)


def cross_entropy(logits: Tensor, classes: Tensor) -> Tensor:
    """Mean of -log p[class] over the voxels that are not ignored; 0 if all are.

    Args:
        logits: (N, C, D, H, W), after `merge_into_background` for partial labels.
        classes: int64 (N, D, H, W), 255 ignore.
    """
    total = F.cross_entropy(logits.float(), classes, ignore_index=IGNORE, reduction="sum")
    return total / (classes != IGNORE).sum().clamp(min=1)


def dice(logits: Tensor, classes: Tensor, organs: Tensor) -> Tensor:
    """1 - mean over annotated organs of 2 sum(p y) / (sum(p) + sum(y)), sums over the batch.

    Source: soft Dice of Milletari et al. 2016 (V-Net) in nnU-Net's batch form. A sample takes part
    in an organ only if it annotates it. An organ that no sample annotates is left out; of one that
    is annotated but absent everywhere the term is smoothed, so that it still pushes p to 0.

    Args:
        logits: (N, C, D, H, W), after `merge_into_background`.
        classes: int64 (N, D, H, W), 255 ignore.
        organs: bool (N, K), annotated organs per sample.
    """
    p = torch.softmax(logits.float(), dim=1)[:, 1:]
    seen = (classes != IGNORE)[:, None] & organs[:, :, None, None, None]
    numbers = torch.arange(1, p.shape[1] + 1, device=p.device)[None, :, None, None, None]
    y = (classes[:, None] == numbers) & seen
    axes = (0, 2, 3, 4)
    both = torch.where(y, p, torch.zeros_like(p)).sum(axes)
    size = torch.where(seen, p, torch.zeros_like(p)).sum(axes) + y.sum(axes)
    taught = organs.any(dim=0)
    score = (2 * both + _SMOOTH) / (size + _SMOOTH)
    return torch.where(taught, 1 - score, torch.zeros_like(score)).sum() / taught.sum().clamp(min=1)


def joint_target(log_odds: Tensor, temperature: float) -> Tensor:
    """q_T = softmax([0, d_1 .. d_K] / T): what all experts say together.

    Args:
        log_odds: float32 (N, K, D, H, W); NaN, an organ that nobody knows here, has q = 0.
        temperature: T > 0.

    Returns:
        (N, C, D, H, W).
    """
    d = torch.nan_to_num(log_odds.float() / temperature, nan=_NEVER)
    return torch.softmax(torch.cat([torch.zeros_like(d[:, :1]), d], dim=1), dim=1)


def kl_joint(logits: Tensor, log_odds: Tensor, weight: Tensor, temperature: float) -> Tensor:
    """T^2 sum(w KL(q_T || softmax(s / T))) / sum(w).

    With w = 1 on R_1 .. R_K and B and 0 elsewhere this is the mean over these voxels together;
    with w = 1 / size of a voxel's region, the mean per region. Source of T^2: Hinton et al. 2015.

    Args:
        logits: student (N, C, D, H, W), organs that nobody knows merged into background.
        log_odds: (N, K, D, H, W), see `joint_target`.
        weight: float (N, D, H, W), 0 where the voxel teaches nothing.
        temperature: T > 0.
    """
    q = joint_target(log_odds, temperature)
    log_p = torch.log_softmax(logits.float() / temperature, dim=1)
    kl = (torch.special.xlogy(q, q) - q * log_p).sum(dim=1)
    mean: Tensor = (kl * weight).sum() / weight.sum().clamp(min=_SMOOTH)
    return temperature**2 * mean


def kl_per_teacher(logits: Tensor, log_odds: Tensor, weights: Tensor, temperature: float) -> Tensor:
    """Mean over organs k of T^2 sum(w_k KL(Bern(d_k / T) || Bern(e_k / T))) / sum(w_k).

    e_k = s_k - logsumexp(all other s) is the student's own log-odds of organ k.

    Args:
        logits: student (N, C, D, H, W), organs that nobody knows merged into background.
        log_odds: (N, K, D, H, W), NaN where nobody knows.
        weights: float (N, K, D, H, W): 1 on R_k and B, say; 0 where d_k teaches nothing.
        temperature: T > 0.
    """
    s = logits.float()
    terms, count = s.new_zeros(()), 0
    for k in range(log_odds.shape[1]):
        w = weights[:, k]
        if not bool((w > 0).any()):
            continue
        rest = torch.cat([s[:, : k + 1], s[:, k + 2 :]], dim=1)
        e = (s[:, k + 1] - torch.logsumexp(rest, dim=1)) / temperature
        d = torch.nan_to_num(log_odds[:, k].float() / temperature)
        kl = torch.sigmoid(d) * (d - e) + F.logsigmoid(-d) - F.logsigmoid(-e)
        terms = terms + temperature**2 * (kl * w).sum() / w.sum()
        count += 1
    return terms / max(count, 1)


def soft_dice(logits: Tensor, log_odds: Tensor, inside: Tensor, known: Tensor) -> Tensor:
    """1 - mean over known organs of 2 sum(p q) / (sum(p^2) + sum(q^2)), sums over the regions.

    The squares make p = q the optimum for soft targets (Milletari et al. 2016); with plain sums it
    would be a hard one.

    Args:
        logits: student (N, C, D, H, W), organs that nobody knows merged into background.
        log_odds: (N, K, D, H, W).
        inside: bool (N, D, H, W), the regions together.
        known: bool (N, K).
    """
    mask = (inside[:, None] & known[:, :, None, None, None]).float()
    p = torch.softmax(logits.float(), dim=1)[:, 1:] * mask
    q = joint_target(log_odds, 1.0)[:, 1:] * mask
    axes = (0, 2, 3, 4)
    taught = known.any(dim=0)
    score = (2 * (p * q).sum(axes) + _SMOOTH) / ((p * p).sum(axes) + (q * q).sum(axes) + _SMOOTH)
    return torch.where(taught, 1 - score, torch.zeros_like(score)).sum() / taught.sum().clamp(min=1)


def feature_cosine(adapted: Tensor, teacher: Tensor, cells: Tensor) -> Tensor:
    """Mean over cells of 1 - cos(adapter(student feature), teacher's feature); 0 without cells.

    Only the student's side is projected: with a learnable projection on both sides the trivial
    optimum is 0.

    Args:
        adapted: (N, F, d, h, w), after the 1 x 1 x 1 adapter.
        teacher: (N, F, d, h, w), from the cache; NaN where not seen, such cells are left out.
        cells: bool (N, d, h, w), the region on the feature grid.
    """
    t = teacher.float()
    seen = cells & torch.isfinite(t).all(dim=1)
    distance = 1 - F.cosine_similarity(adapted.float(), torch.nan_to_num(t), dim=1, eps=1e-6)
    return (distance * seen).sum() / seen.sum().clamp(min=1)


def touched_cells(region: Tensor, stride: tuple[int, int, int]) -> Tensor:
    """Feature cells with at least one voxel of a region: bool (N, D, H, W) -> (N, d, h, w)."""
    return F.max_pool3d(region[:, None].float(), stride, stride)[:, 0] > 0


def filled_cells(region: Tensor, stride: tuple[int, int, int]) -> Tensor:
    """Feature cells wholly inside a region: bool (N, D, H, W) -> (N, d, h, w)."""
    return ~touched_cells(~region, stride)
