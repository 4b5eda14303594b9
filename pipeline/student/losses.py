"""The terms of the loss: pure functions of tensors, each with its formula.

The region-based terms are this project's reconstruction of MS-KD (Feng et al., arXiv 2108.02559),
whose equations were not available to us; see docs/method.md. Half precision is raised to float32
before anything is computed or summed.

Letters: N batch, K organs, C = K + 1 classes (0 background), F feature channels, D H W voxels,
d h w feature cells. Terms that share a softmax take log p or p, made once by `log_softmax`.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from pipeline.labels import IGNORE

_NEVER = -1e4  # a logit that softmax turns into 0 without the NaN that -inf would bring
_SMOOTH = 1e-5


def softmax_both(logits: Tensor) -> tuple[Tensor, Tensor]:
    """log p and p of (N, C, D, H, W) logits, in at least float32.

    Both from the logits: exp(log p) is several times slower where it underflows.
    """
    s = _full(logits)
    return torch.log_softmax(s, dim=1), torch.softmax(s, dim=1)


def merge_into_background(logits: Tensor, organs: Tensor) -> Tensor:
    """Merges the classes nobody speaks of into background: s_0 := logsumexp(s_0, s_k not in A).

    Source: the marginal loss of Shi et al. 2021 (Medical Image Analysis 70, 101979).

    Args:
        logits: (N, C, D, H, W); of log-probabilities the result is log-probabilities again.
        organs: bool (N, K), the organs of A, per sample.

    Returns:
        (N, C, D, H, W) in which merged classes have probability 0.
    """
    s = _full(logits)
    if bool(organs.all()):
        return s
    kept = organs[:, :, None, None, None]
    background = _logsumexp(torch.cat([s[:, :1], s[:, 1:].masked_fill(kept, _NEVER)], dim=1))
    return torch.cat([background, s[:, 1:].masked_fill(~kept, _NEVER)], dim=1)


def cross_entropy(log_p: Tensor, classes: Tensor) -> Tensor:
    """Mean of -log p[class] over the voxels that are not ignored; 0 if all are.

    Args:
        log_p: (N, C, D, H, W), after `merge_into_background` for partial labels.
        classes: int64 (N, D, H, W), 255 ignore.
    """
    total = F.nll_loss(_full(log_p), classes, ignore_index=IGNORE, reduction="sum")
    return total / (classes != IGNORE).sum().clamp(min=1)


def dice(p: Tensor, classes: Tensor, organs: Tensor) -> Tensor:
    """1 - mean over annotated organs of 2 sum(p y) / (sum(p) + sum(y)), sums over the batch.

    Source: soft Dice of Milletari et al. 2016 (V-Net) in nnU-Net's batch form. A sample takes part
    in an organ only if it annotates it. An organ that no sample annotates is left out. Of one that
    is annotated but absent the score stays near 0, with hardly a gradient, until p is almost 0
    everywhere: that an organ is absent is for cross-entropy to teach.

    Args:
        p: softmax (N, C, D, H, W); merging would not change the channels that are read.
        classes: int64 (N, D, H, W), 255 ignore.
        organs: bool (N, K), annotated organs per sample.
    """
    p = _full(p)[:, 1:].flatten(2)
    seen = (classes != IGNORE).flatten(1)
    numbers = torch.arange(1, p.shape[1] + 1, device=p.device)
    y = (classes.flatten(1)[:, None] == numbers[None, :, None]).to(p.dtype)
    counted = organs.to(p.dtype)
    both = ((p * y).sum(dim=2) * counted).sum(dim=0)
    size = ((_over_voxels(p, seen) + y.sum(dim=2)) * counted).sum(dim=0)
    return _one_minus_mean(2 * both, size, organs)


def joint_target(log_odds: Tensor, temperature: float) -> Tensor:
    """Logits of q_T = softmax([0, d_1 .. d_K] / T): what all experts say together.

    Args:
        log_odds: (N, K, D, H, W); NaN, an organ that nobody knows here, gets q = 0.
        temperature: T > 0.

    Returns:
        (N, C, D, H, W).
    """
    d = torch.nan_to_num(_full(log_odds) / temperature, nan=_NEVER)
    return torch.cat([torch.zeros_like(d[:, :1]), d], dim=1)


def kl_joint(log_p: Tensor, log_odds: Tensor, weight: Tensor, temperature: float) -> Tensor:
    """T^2 sum(w KL(q_T || p_T)) / sum(w), where p_T = softmax(log p / T).

    With w = 1 on R_1 .. R_K and B and 0 elsewhere this is the mean over these voxels together;
    with w = 1 / size of a voxel's region, the mean per region. Source of T^2: Hinton et al. 2015.

    Args:
        log_p: student (N, C, D, H, W), organs that nobody knows merged into background.
        log_odds: (N, K, D, H, W), see `joint_target`.
        weight: float (N, D, H, W), 0 where the voxel teaches nothing.
        temperature: T > 0.
    """
    log_p = _full(log_p)
    if temperature != 1:
        log_p = torch.log_softmax(log_p / temperature, dim=1)
    target = joint_target(log_odds, temperature)
    log_q, wq = torch.log_softmax(target, dim=1), torch.softmax(target, dim=1) * weight[:, None]
    # One product with log p: all else is constant and needs no gradient.
    total = (wq * log_q).sum() - (wq * log_p).sum()
    return temperature**2 * total / weight.sum().clamp(min=_SMOOTH)


def kl_per_teacher(log_p: Tensor, log_odds: Tensor, weights: Tensor, temperature: float) -> Tensor:
    """Mean over organs k of T^2 sum(w_k KL(Bern(d_k / T) || Bern(e_k / T))) / sum(w_k).

    e_k = log p_k - logsumexp(all other log p) is the student's own log-odds of organ k.

    Args:
        log_p: student (N, C, D, H, W), organs that nobody knows merged into background.
        log_odds: (N, K, D, H, W), NaN where nobody knows.
        weights: float (N, K, D, H, W): 1 on R_k and B, say; 0 where d_k teaches nothing.
        temperature: T > 0.
    """
    s = _full(log_p)
    terms = []
    for k in range(log_odds.shape[1]):
        w = weights[:, k]
        if not bool((w > 0).any()):
            continue
        rest = torch.cat([s[:, : k + 1], s[:, k + 2 :]], dim=1)
        e = (s[:, k + 1] - _logsumexp(rest)[:, 0]) / temperature
        d = torch.nan_to_num(_full(log_odds[:, k]) / temperature)
        yes = torch.sigmoid(d) * (F.logsigmoid(d) - F.logsigmoid(e))
        no = torch.sigmoid(-d) * (F.logsigmoid(-d) - F.logsigmoid(-e))
        terms.append(temperature**2 * ((yes + no) * w).sum() / w.sum())
    return torch.stack(terms).mean() if terms else s.new_zeros(())


def soft_dice(p: Tensor, log_odds: Tensor, inside: Tensor, known: Tensor) -> Tensor:
    """1 - mean over known organs of 2 sum(p q) / (sum(p^2) + sum(q^2)), sums over the regions.

    The squares make p = q the optimum for soft targets (Milletari et al. 2016); with plain sums it
    would be a hard one.

    Args:
        p: student's softmax (N, C, D, H, W); merging would not change the channels that are read.
        log_odds: (N, K, D, H, W).
        inside: bool (N, D, H, W), the regions together.
        known: bool (N, K).
    """
    p = _full(p)[:, 1:].flatten(2)
    q = torch.softmax(joint_target(log_odds, 1.0), dim=1)[:, 1:].flatten(2)
    inside = inside.flatten(1)
    counted = known.to(p.dtype)
    q = q * inside[:, None]
    both = ((p * q).sum(dim=2) * counted).sum(dim=0)
    size = ((_over_voxels(p.square(), inside) + q.square().sum(dim=2)) * counted).sum(dim=0)
    return _one_minus_mean(2 * both, size, known)


def feature_cosine(adapted: Tensor, teacher: Tensor, *regions: Tensor) -> Tensor:
    """Per region the mean over its cells of 1 - cos(adapter(student feature), teacher's feature),
    added up; a region without cells adds 0.

    Only the student's side is projected: with a learnable projection on both sides the trivial
    optimum is 0.

    Args:
        adapted: (N, F, d, h, w), after the 1 x 1 x 1 adapter.
        teacher: (N, F, d, h, w), from the cache; NaN where not seen, such cells are left out.
        regions: bool (N, d, h, w) each, on the feature grid.
    """
    t = _full(teacher)
    seen = torch.isfinite(t).all(dim=1)
    t = torch.where(seen[:, None], t, torch.zeros_like(t))
    distance = 1 - F.cosine_similarity(_full(adapted), t, dim=1, eps=1e-6)
    total = distance.new_zeros(())
    for region in regions:
        cells = region & seen
        total = total + (distance * cells).sum() / cells.sum().clamp(min=1)
    return total


def touched_cells(region: Tensor, stride: tuple[int, int, int]) -> Tensor:
    """Feature cells with at least one voxel of a region: bool (N, D, H, W) -> (N, d, h, w)."""
    return F.max_pool3d(region[:, None].float(), stride, stride)[:, 0] > 0


def filled_cells(region: Tensor, stride: tuple[int, int, int]) -> Tensor:
    """Feature cells wholly inside a region: bool (N, D, H, W) -> (N, d, h, w)."""
    return ~touched_cells(~region, stride)


def _full(x: Tensor) -> Tensor:
    """float16 and bfloat16 -> float32; wider types stay."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def _logsumexp(s: Tensor) -> Tensor:
    """(N, C, ...) -> (N, 1, ...), as s_0 - log_softmax(s)_0.

    torch.logsumexp calls an exp that is 30 times slower where it underflows, which is everywhere.
    """
    return s[:, :1] - torch.log_softmax(s, dim=1)[:, :1]


def _over_voxels(values: Tensor, where: Tensor) -> Tensor:
    """Sums of (N, K, V) over the voxels of a bool (N, V): (N, K)."""
    return (values * where[:, None]).sum(dim=2)


def _one_minus_mean(doubled: Tensor, size: Tensor, organs: Tensor) -> Tensor:
    """1 - mean of doubled / size, both (K,) and smoothed, over the organs of any sample."""
    taught = organs.any(dim=0)
    score = (doubled + _SMOOTH) / (size + _SMOOTH)
    return torch.where(taught, 1 - score, torch.zeros_like(score)).sum() / taught.sum().clamp(min=1)
