"""Terms by teachers: pure functions of tensors, each with its formula.

They are this project's reconstruction of MS-KD (Feng et al., arXiv 2108.02559), whose equations
were not available to us; see docs/method.md. Precision, sums over processes and letters are those
of `losses`; besides, I teachers, F feature channels, d h w feature cells.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from pipeline.student.losses import (
    NEVER,
    at_least_float32,
    logsumexp,
    mean_of_means,
    merge_into_background,
    one_minus_mean,
    softmax_both,
)
from pipeline.student.ranks import over_ranks

# Beyond all that float16 can hold, and 0 times the difference of two such is still 0, not NaN.
_SURE = 1e30


def joint_target(log_odds: Tensor, temperature: float) -> Tensor:
    """Logits of q_T = softmax([0, d_1 .. d_K] / T): what experts say together.

    Args:
        log_odds: (N, K, D, H, W); NaN, an organ that nobody knows here, gets q = 0.
        temperature: T > 0.

    Returns:
        (N, C, D, H, W).
    """
    d = (at_least_float32(log_odds) / temperature).clamp(-_SURE, _SURE)
    d = torch.nan_to_num(d, nan=NEVER)
    return torch.cat([torch.zeros_like(d[:, :1]), d], dim=1)


def joint_log_q_and_q(log_odds: Tensor) -> tuple[Tensor, Tensor]:
    """log q and q of the joint target at T = 1, (N, C, D, H, W) each, for the terms that share it.

    Args:
        log_odds: (N, K, D, H, W), NaN where nobody knows.
    """
    return softmax_both(joint_target(log_odds, 1.0))


def hard(log_odds: Tensor) -> Tensor:
    """The organ that a voxel is most likely, or none, for sure: argmax over [0, d_1 .. d_K] as
    log-odds. NaN stays.

    Args:
        log_odds: (N, K, D, H, W).
    """
    d = torch.nan_to_num(log_odds, nan=NEVER)
    best = (d > 0) & (d == d.max(dim=1, keepdim=True).values)
    sure = torch.where(best, _SURE, -_SURE)
    return torch.where(torch.isnan(log_odds), log_odds, sure.to(log_odds.dtype))


def kl(
    log_p: Tensor,
    log_odds: Tensor,
    organ: Tensor,
    background: Tensor,
    experts: Tensor,
    *,
    temperature: float = 1.0,
    per_region: bool = False,
    joint: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """Mean over teachers i of T^2 sum(w_i KL(q_i || p_i)) / sum(w_i).

    O_i are the organs of which teacher i speaks, and
        q_i = softmax([0, d_k for k in O_i] / T),
        p_i = softmax([log(p_0 + sum of p_k not in O_i), log p_k for k in O_i] / T),
    the student's prediction with all organs of others merged into background. w_i is 1 on the R_k
    of O_i and on B, else 0: the mean over these voxels together. `per_region`: w_i is the sum of
    1 / |R_k| on each R_k of O_i and 1 / |B| on B: the mean of the regions' means.

    So who speaks decides which target it is: one teacher for all known organs gives the joint
    target; one for each organ compares sigmoid(d_k / T) with the student's own log-odds
    log p_k - log(1 - p_k); the registry's teachers lie between, and are the same as one or the
    other where a teacher speaks of all organs, or of one each. Source of T^2: Hinton et al. 2015.

    Args:
        log_p: student's log softmax (N, C, D, H, W).
        log_odds: (N, K, D, H, W); where it is NaN, whoever speaks of k is silent: there k is not
            in O_i, and w_i is 0 where all of O_i are silent.
        organ: bool (N, K, D, H, W), R_k.
        background: bool (N, D, H, W), B, and what is B as far as anybody speaks.
        experts: bool (N, I, K), whether teacher i speaks of organ k in a sample. A sample in which
            it speaks of no organ takes no part in its mean; a teacher without any voxel is left
            out.
        temperature: T > 0.
        per_region: see above.
        joint: log q and q of `joint_log_q_and_q`, where they are at hand; only for T = 1 and one
            teacher who speaks of all organs that have log-odds.
    """
    log_p = at_least_float32(log_p)
    some = experts.any(dim=0).tolist()
    assert joint is None or (len(some) == 1 and temperature == 1)
    spoken = ~torch.isnan(log_odds)
    regions = None
    if per_region:
        regions = _region_sizes(organ, background, spoken, experts).to(log_p.dtype)
    # Part of the graph though empty: every process goes back through the same sums.
    totals, sizes = [log_p[:0].sum()] * len(some), [log_p.new_zeros(())] * len(some)
    for i, flags in enumerate(some):
        organs = [k for k, speaks in enumerate(flags) if speaks]
        if not organs:
            continue
        here = experts[:, i, organs][:, :, None, None, None] & spoken[:, organs]
        student, d = _merged(log_p, organs), log_odds[:, organs]
        d = d.masked_fill(~here, torch.nan)
        # Not the same organs in every sample, or somebody is silent. Where all are (as outside of a
        # case, so in many patches) nothing has a weight, and nothing has to be merged.
        if bool((here.any(dim=1, keepdim=True) & ~here).any()):
            student = merge_into_background(student, here)
        if temperature != 1:
            student = torch.log_softmax(student / temperature, dim=1)
        own = organ[:, organs] & here
        agreed = background & here.any(dim=1)
        if regions is None:
            weight = (own.any(dim=1) | agreed).to(log_p.dtype)
        else:
            shares = 1 / regions[i].clamp(min=1)
            weight = (own * shares[organs][:, None, None, None]).sum(dim=1) + agreed * shares[-1]
        if joint is None:
            log_q, q = softmax_both(joint_target(d, temperature))
        else:
            log_q, q = (_without_silent(x, organs) for x in joint)
        wq = q * weight[:, None]
        # One product with log p: all else is constant and needs no gradient.
        totals[i] = (wq * log_q).sum() - (wq * student).sum()
        sizes[i] = weight.sum()
    return temperature**2 * mean_of_means(torch.stack(totals), torch.stack(sizes))


def soft_dice(
    p: Tensor,
    log_odds: Tensor,
    inside: Tensor,
    known: Tensor,
    *,
    joint: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """1 - mean over known organs of 2 sum(p q) / (sum(p^2) + sum(q^2)), sums over the voxels of the
    regions where somebody speaks of the organ.

    q is the joint target at T = 1. The squares make p = q the optimum for soft targets (Milletari
    et al. 2016); with plain sums it would be a hard one.

    Args:
        p: student's softmax of the organs (N, K, D, H, W).
        log_odds: (N, K, D, H, W).
        inside: bool (N, D, H, W), the regions together.
        known: bool (N, K).
        joint: log q and q of `joint_log_q_and_q`, where they are at hand.
    """
    p = at_least_float32(p).flatten(2)
    q = torch.softmax(joint_target(log_odds, 1.0), dim=1) if joint is None else joint[1]
    q = q[:, 1:].flatten(2)
    spoken = ~torch.isnan(log_odds).flatten(2) & inside.flatten(1)[:, None]
    known = known & spoken.any(dim=2)
    counted = known.to(p.dtype)
    q = q * spoken
    both = ((p * q).sum(dim=2) * counted).sum(dim=0)
    size = (((p.square() * spoken).sum(dim=2) + q.square().sum(dim=2)) * counted).sum(dim=0)
    return one_minus_mean(2 * both, size, known)


def feature_cosine(adapted: Tensor, teacher: Tensor, *regions: Tensor) -> Tensor:
    """Per region the mean over its cells of 1 - cos(adapter(student feature), teacher's feature),
    added up; a region without cells adds 0.

    Only the student's side is projected: with a learnable projection on both sides the trivial
    optimum is 0.

    Args:
        adapted: (N, F, d, h, w), after the 1 x 1 x 1 adapter.
        teacher: (N, F, d, h, w), from the cache; NaN where not seen, such cells are left out.
        regions: bool (N, d, h, w) each, on the feature grid; at least one.
    """
    t = at_least_float32(teacher)
    seen = torch.isfinite(t).all(dim=1)
    t = torch.where(seen[:, None], t, torch.zeros_like(t))
    distance = 1 - F.cosine_similarity(at_least_float32(adapted), t, dim=1, eps=1e-6)
    cells = torch.stack([region & seen for region in regions]).flatten(1)
    total, size = (cells * distance.flatten()).sum(dim=1), cells.sum(dim=1).to(distance.dtype)
    totals, sizes = over_ranks(torch.stack([total, size]))
    means: Tensor = totals / sizes.clamp(min=1)
    return means.sum()


def touched_cells(region: Tensor, stride: tuple[int, int, int]) -> Tensor:
    """Feature cells with at least one voxel of a region: bool (N, D, H, W) -> (N, d, h, w)."""
    return F.max_pool3d(region[:, None].float(), stride, stride)[:, 0] > 0


def filled_cells(region: Tensor, stride: tuple[int, int, int]) -> Tensor:
    """Feature cells wholly inside a region: bool (N, D, H, W) -> (N, d, h, w)."""
    return ~touched_cells(~region, stride)


def _merged(log_p: Tensor, organs: list[int]) -> Tensor:
    """[log of all that is not in organs, log p of organs]: (N, 1 + organs, D, H, W)."""
    rest = [c for c in range(log_p.shape[1]) if c - 1 not in organs]
    if len(rest) == 1:
        return log_p
    return torch.cat([logsumexp(log_p[:, rest]), log_p[:, [k + 1 for k in organs]]], dim=1)


def _without_silent(x: Tensor, organs: list[int]) -> Tensor:
    """Background and `organs` of (N, C, D, H, W): nobody speaks of the others, so their q is 0."""
    return x if len(organs) == x.shape[1] - 1 else x[:, [0, *(k + 1 for k in organs)]]


def _region_sizes(organ: Tensor, background: Tensor, spoken: Tensor, experts: Tensor) -> Tensor:
    """Voxels of R_1 .. R_K and B where teacher i speaks, over all processes: float32 (I, C)."""
    own = (organ & spoken).flatten(2).sum(dim=2)[:, None] * experts
    agreed = [
        (background & (speaks[:, :, None, None, None] & spoken).any(dim=1)).flatten(1).sum(dim=1)
        for speaks in experts.unbind(dim=1)
    ]
    return over_ranks(torch.cat([own, torch.stack(agreed, dim=1)[:, :, None]], 2).sum(0).float())
