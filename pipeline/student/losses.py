"""The terms of the loss, by labels and by teachers: pure functions of tensors, each with its
formula.

Half precision is raised to float32 before anything is computed or summed. Sums that form a ratio
are summed over all processes first, and no branch that depends on data stands before such a sum:
every process makes the same ones in the same order.

Letters: N batch, K organs, C = K + 1 classes (0 background), D H W voxels. Terms that share a
softmax take log p or p, made once by `softmax_both`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional as F

from pipeline.data.labels import IGNORE

# Terms by labels.

NEVER = -1e4  # a logit that softmax turns into 0 without the NaN that -inf would bring
_SMOOTH = 1e-5


def softmax_both(logits: Tensor) -> tuple[Tensor, Tensor]:
    """log p and p of (N, C, D, H, W) logits, in at least float32.

    Both from the logits: exp(log p) is several times slower where it underflows.
    """
    s = at_least_float32(logits)
    return torch.log_softmax(s, dim=1), torch.softmax(s, dim=1)


def merge_into_background(logits: Tensor, organs: Tensor) -> Tensor:
    """Merges the classes nobody speaks of into background: s_0 := logsumexp(s_0, s_k not in A).

    Source: the marginal loss of Shi et al. 2021 (Medical Image Analysis 70, 101979).

    Args:
        logits: (N, C, D, H, W); of log-probabilities the result is log-probabilities again.
        organs: bool, the organs of A, per sample (N, K) or per voxel (N, K, D, H, W).

    Returns:
        (N, C, D, H, W) in which merged classes have probability 0.
    """
    s = at_least_float32(logits)
    if bool(organs.all()):
        return s
    kept = organs if organs.ndim == s.ndim else organs[:, :, None, None, None]
    background = logsumexp(torch.cat([s[:, :1], s[:, 1:].masked_fill(kept, NEVER)], dim=1))
    return torch.cat([background, s[:, 1:].masked_fill(~kept, NEVER)], dim=1)


def cross_entropy(log_p: Tensor, classes: Tensor) -> Tensor:
    """Mean of -log p[class] over the voxels that are not ignored; 0 if all are.

    Args:
        log_p: (N, C, D, H, W), after `merge_into_background` for partial labels.
        classes: int64 (N, D, H, W), 255 ignore.
    """
    log_p = at_least_float32(log_p)
    total = F.nll_loss(log_p, classes, ignore_index=IGNORE, reduction="sum")
    return mean_of_means(total, (classes != IGNORE).sum())


def dice(p: Tensor, classes: Tensor, organs: Tensor) -> Tensor:
    """1 - mean over annotated organs of 2 sum(p y) / (sum(p) + sum(y)), sums over the batch.

    Source: soft Dice of Milletari et al. 2016 (V-Net) in nnU-Net's batch form. A sample takes part
    in an organ only if it annotates it. An organ that no sample annotates is left out. Of one that
    is annotated but absent the score stays near 0, with hardly a gradient, until p is almost 0
    everywhere: that an organ is absent is for cross-entropy to teach.

    Args:
        p: probabilities of the organs (N, K, D, H, W), by softmax or by sigmoid; merging into
            background would not change them.
        classes: int64 (N, D, H, W), 255 ignore.
        organs: bool (N, K), annotated organs per sample.
    """
    p = at_least_float32(p).flatten(2)
    y = _one_hot(classes, p)
    counted = organs.to(p.dtype)
    both = ((p * y).sum(dim=2) * counted).sum(dim=0)
    size = ((over_voxels(p, classes != IGNORE) + y.sum(dim=2)) * counted).sum(dim=0)
    return one_minus_mean(2 * both, size, organs)


def exclusion_dice(p: Tensor, classes: Tensor, organs: Tensor) -> Tensor:
    """Mean over unannotated organs k of 2 sum(p_k e) / (sum(p_k) + sum(e)), sums over the batch.

    e is 1 where the label shows any annotated organ: there organ k cannot be, since organs do not
    overlap. A sample takes part in k only if it does not annotate k.

    Source of the idea, and of there being a Dice and a cross-entropy of it: the exclusion loss of
    Shi et al. 2021 (Medical Image Analysis 70, 101979). Its equations were not available to us: the
    exact form is ours. As in any Dice, the sum(p_k) below the line makes more p_k elsewhere a way
    to a smaller value, so that voxels outside e have a (small, negative) gradient.

    Args:
        p: softmax of the organs (N, K, D, H, W).
        classes: int64 (N, D, H, W), 255 ignore.
        organs: bool (N, K), annotated organs per sample.
    """
    p = at_least_float32(p).flatten(2)
    taken = _taken(classes).flatten(1)
    counted = (~organs).to(p.dtype)
    both = (over_voxels(p, taken) * counted).sum(dim=0)
    size = over_voxels(p, classes != IGNORE) + taken.sum(dim=1, keepdim=True)
    sums = over_ranks(torch.stack([2 * both, (size * counted).sum(dim=0), counted.sum(dim=0)]))
    overlap = sums[0] / (sums[1] + _SMOOTH)
    return overlap.sum() / (sums[2] > 0).sum().clamp(min=1)


def exclusion_cross_entropy(p: Tensor, classes: Tensor, organs: Tensor) -> Tensor:
    """Mean over the voxels that are not ignored of e sum over unannotated k of log(1 + p_k).

    e as in `exclusion_dice`, and so are source and arguments: the exact form is ours. The 1 keeps
    it finite and its minimum, 0, at p_k = 0.
    """
    p = at_least_float32(p).flatten(2)
    each = over_voxels(torch.log1p(p), _taken(classes))
    return mean_of_means((each * ~organs).sum(), (classes != IGNORE).sum())


def masked_bce(logits: Tensor, classes: Tensor, organs: Tensor) -> Tensor:
    """Mean of the binary cross-entropy of sigmoid(s_k) over all pairs of an annotated organ k of a
    sample and a voxel of it that is not ignored; 0 if there are none.

    The target is 1 where the label says k, and 0 where it says background or another organ.

    Source: losses for annotated classes alone, one sigmoid per class, as in MultiTalent (Ulrich et
    al. 2023, arXiv 2303.14444) and the CLIP-driven universal model (Liu et al. 2023, arXiv
    2301.00785). The mean over pairs is ours.

    Args:
        logits: of the organs, (N, K, D, H, W).
        classes: int64 (N, D, H, W), 255 ignore.
        organs: bool (N, K), annotated organs per sample.
    """
    s = at_least_float32(logits).flatten(2)
    pairs = organs[:, :, None] & (classes != IGNORE).flatten(1)[:, None]
    each = F.binary_cross_entropy_with_logits(s, _one_hot(classes, s), reduction="none")
    return mean_of_means(torch.where(pairs, each, torch.zeros_like(each)).sum(), pairs.sum())


def at_least_float32(x: Tensor) -> Tensor:
    """float16 and bfloat16 -> float32; wider types stay."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def logsumexp(s: Tensor) -> Tensor:
    """(N, C, ...) -> (N, 1, ...), as s_0 - log_softmax(s)_0.

    torch.logsumexp calls an exp that is 30 times slower where it underflows, which is everywhere.
    """
    return s[:, :1] - torch.log_softmax(s, dim=1)[:, :1]


def over_voxels(values: Tensor, where: Tensor) -> Tensor:
    """Sums of (N, K, V) over the voxels of a bool (N, V) or (N, D, H, W): (N, K)."""
    return (values * where.flatten(1)[:, None]).sum(dim=2)


def mean_of_means(totals: Tensor, sizes: Tensor) -> Tensor:
    """Mean of totals / sizes, () or (I,) each, where sizes > 0; 0 if nowhere. Over all processes:
    both are summed over them first.
    """
    totals, sizes = over_ranks(torch.stack([totals, sizes.to(totals.dtype)]))
    taught = sizes > 0
    means = totals / torch.where(taught, sizes, torch.ones_like(sizes))
    return torch.where(taught, means, torch.zeros_like(means)).sum() / taught.sum().clamp(min=1)


def one_minus_mean(doubled: Tensor, size: Tensor, organs: Tensor) -> Tensor:
    """1 - mean of doubled / size, both (K,), summed over all processes and smoothed, over the
    organs, bool (N, K), of any sample of any process.
    """
    sums = over_ranks(torch.stack([doubled, size, organs.sum(dim=0).to(size.dtype)]))
    taught = sums[2] > 0
    score = (sums[0] + _SMOOTH) / (sums[1] + _SMOOTH)
    return torch.where(taught, 1 - score, torch.zeros_like(score)).sum() / taught.sum().clamp(min=1)


def _one_hot(classes: Tensor, like: Tensor) -> Tensor:
    """(N, D, H, W) -> (N, K, V), 1 where the class is organ k, in the type of (N, K, ...)."""
    numbers = torch.arange(1, like.shape[1] + 1, device=like.device)
    return (classes.flatten(1)[:, None] == numbers[None, :, None]).to(like.dtype)


def _taken(classes: Tensor) -> Tensor:
    """Where the label shows an organ: labels name none but annotated ones."""
    return (classes > 0) & (classes != IGNORE)


# Terms by teachers.
#
# They are this project's reconstruction of MS-KD (Feng et al., arXiv 2108.02559), whose equations
# were not available to us; see docs/method.md. Letters besides: I teachers, F feature channels,
# d h w feature cells.

# Beyond all that float16 can hold, and 0 times the difference of two such is still 0, not NaN.
_SURE = 1e30


@dataclass(frozen=True)
class Targets:
    """What teachers, and labels that win, say of a batch.

    Attributes:
        log_odds: d, (N, K, D, H, W); NaN where nobody speaks.
        organ: bool (N, K, D, H, W), R_k.
        background: bool (N, D, H, W), B, and what is B as far as anybody speaks.
    """

    log_odds: Tensor
    organ: Tensor
    background: Tensor


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
    targets: Targets,
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
        targets: d, R_k and B. Where d is NaN, whoever speaks of k is silent: there k is not in O_i,
            and w_i is 0 where all of O_i are silent.
        experts: bool (N, I, K), whether teacher i speaks of organ k in a sample. A sample in which
            it speaks of no organ takes no part in its mean; a teacher without any voxel is left
            out.
        temperature: T > 0.
        per_region: see above.
        joint: log q and q of `joint_log_q_and_q`, where they are at hand; only for T = 1 and one
            teacher who speaks of all organs that have log-odds.
    """
    log_p = at_least_float32(log_p)
    assert joint is None or (experts.shape[1] == 1 and temperature == 1)
    spoken = ~torch.isnan(targets.log_odds)
    regions = _region_sizes(targets, spoken, experts).to(log_p.dtype) if per_region else None
    totals, sizes = [], []
    for i, flags in enumerate(experts.any(dim=0).tolist()):
        organs = [k for k, speaks in enumerate(flags) if speaks]
        here = experts[:, i, organs][:, :, None, None, None] & spoken[:, organs]
        student = _student_for(log_p, organs, here, temperature)
        if joint is None:
            d = targets.log_odds[:, organs].masked_fill(~here, torch.nan)
            log_q, q = softmax_both(joint_target(d, temperature))
        else:
            log_q, q = (_without_silent(x, organs) for x in joint)
        weight = _weight(
            targets.organ[:, organs] & here,
            targets.background & here.any(dim=1),
            None if regions is None else regions[i, [*organs, -1]],
        ).to(log_p.dtype)
        wq = q * weight[:, None]
        # One product with log p: all else is constant and needs no gradient.
        totals.append((wq * log_q).sum() - (wq * student).sum())
        sizes.append(weight.sum())
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


def feature_cosine(adapted: Tensor, teacher: Tensor, *shares: Tensor) -> Tensor:
    """Per region r: sum(share_r (1 - cos(adapter(student feature), teacher's feature))) /
    sum(share_r) over cells; 0 of a region without any: (R,).

    Only the student's side is projected: with a learnable projection on both sides the trivial
    optimum is 0.

    Args:
        adapted: (N, F, d, h, w), after the 1 x 1 x 1 adapter.
        teacher: (N, F, d, h, w), standardised per channel; NaN where not seen, such cells are left
            out.
        shares: (N, d, h, w) each, how much of a cell is in a region; see `share_of_cells`.
    """
    t = at_least_float32(teacher)
    seen = torch.isfinite(t).all(dim=1)
    t = torch.where(seen[:, None], t, torch.zeros_like(t))
    distance = 1 - F.cosine_similarity(at_least_float32(adapted), t, dim=1, eps=1e-6)
    weights = torch.stack([share * seen for share in shares]).flatten(1).to(distance.dtype)
    total, size = (weights * distance.flatten()).sum(dim=1), weights.sum(dim=1)
    totals, sizes = over_ranks(torch.stack([total, size]))
    # A share is a voxel of a cell at least, so no sum of them is nearly 0.
    means: Tensor = totals / torch.where(sizes > 0, sizes, torch.ones_like(sizes))
    return means


def share_of_cells(region: Tensor, stride: tuple[int, int, int]) -> Tensor:
    """How much of each cell a region fills: bool (N, D, H, W) -> float32 (N, d, h, w)."""
    return F.avg_pool3d(region[:, None].float(), stride, stride)[:, 0]


def _student_for(log_p: Tensor, organs: list[int], here: Tensor, temperature: float) -> Tensor:
    """log p_i for a teacher of these organs: (N, 1 + organs, D, H, W), all others in background.

    Args:
        log_p: (N, C, D, H, W).
        organs: O_i.
        here: bool (N, organs, D, H, W), where the teacher speaks of them.
        temperature: T.
    """
    rest = [c for c in range(log_p.shape[1]) if c - 1 not in organs]
    student = log_p
    if len(rest) > 1:
        student = torch.cat([logsumexp(log_p[:, rest]), log_p[:, [k + 1 for k in organs]]], dim=1)
    # Not the same organs in every sample, or somebody is silent. Where all are (as outside of a
    # case, so in many patches) nothing has a weight, and nothing has to be merged.
    if bool((here.any(dim=1, keepdim=True) & ~here).any()):
        student = merge_into_background(student, here)
    return student if temperature == 1 else torch.log_softmax(student / temperature, dim=1)


def _weight(own: Tensor, agreed: Tensor, sizes: Tensor | None) -> Tensor:
    """w_i, (N, D, H, W).

    Args:
        own: bool (N, organs, D, H, W), R_k where the teacher speaks.
        agreed: bool (N, D, H, W), B there.
        sizes: (organs + 1,), voxels of each of them in all processes; None: all together count.
    """
    if sizes is None:
        return own.any(dim=1) | agreed
    shares = 1 / sizes.clamp(min=1)
    return (own * shares[:-1, None, None, None]).sum(dim=1) + agreed * shares[-1]


def _without_silent(x: Tensor, organs: list[int]) -> Tensor:
    """Background and `organs` of (N, C, D, H, W): nobody speaks of the others, so their q is 0."""
    return x if len(organs) == x.shape[1] - 1 else x[:, [0, *(k + 1 for k in organs)]]


def _region_sizes(targets: Targets, spoken: Tensor, experts: Tensor) -> Tensor:
    """Voxels of R_1 .. R_K and B where teacher i speaks, over all processes: float32 (I, C)."""
    own = (targets.organ & spoken).flatten(2).sum(dim=2)[:, None] * experts
    where = [
        targets.background & (speaks[:, :, None, None, None] & spoken).any(dim=1)
        for speaks in experts.unbind(dim=1)
    ]
    agreed = torch.stack([voxels.flatten(1).sum(dim=1) for voxels in where], dim=1)
    return over_ranks(torch.cat([own, agreed[:, :, None]], dim=2).sum(dim=0).float())


# Sums over all processes of a training, so that a loss is that of the whole batch.
#
# A Dice or a mean over regions is a ratio of sums. Averaged over processes, ratios of parts are
# not the ratio of the whole; summed before the division, they are.


def over_ranks(total: Tensor) -> Tensor:
    """The sum of a tensor over all processes, differentiable; the tensor itself in one process.

    Its backward pass sums the gradients of all processes, and those of the weights are averaged
    over them: together that is the gradient of the loss of the whole batch, once.
    """
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return total
    summed: Tensor = _Sum.apply(total)  # type: ignore[no-untyped-call]
    return summed


class _Sum(torch.autograd.Function):
    """All-reduce, there and back."""

    @staticmethod
    def forward(ctx: Any, total: Tensor) -> Tensor:
        return _summed(total)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return _summed(gradient)


def _summed(tensor: Tensor) -> Tensor:
    summed = tensor.detach().clone(memory_format=torch.contiguous_format)
    dist.all_reduce(summed)
    return summed
