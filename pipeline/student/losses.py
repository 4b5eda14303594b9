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
    # Split, not sliced: the gradient of a slice fills the rest of its tensor with zeros.
    s_0, s_k = torch.split(s, [1, s.shape[1] - 1], dim=1)
    merged = torch.cat([s_0, s_k.masked_fill(kept, NEVER)], dim=1)
    # As logsumexp, but torch's own calls an exp that is 30 times slower where it underflows, which
    # is everywhere.
    background = s_0 - torch.log_softmax(merged, dim=1)[:, :1]
    return torch.cat([background, s_k.masked_fill(~kept, NEVER)], dim=1)


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
    """1 - mean over annotated organs of 2 sum(p y) / (sum(p^2) + sum(y)), sums over the batch.

    Source: soft Dice of Milletari et al. 2016 (V-Net), squares as there, over the batch as in
    nnU-Net. Without the squares small organs are learnt much later. A sample takes part in an organ
    only if it annotates it. An organ that no sample annotates is left out. Of one that
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
    size = ((over_voxels(p.square(), classes != IGNORE) + y.sum(dim=2)) * counted).sum(dim=0)
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
# were not available to us; see docs/method.md. Letters besides: F feature channels, d h w feature
# cells.

# Beyond all that float16 can hold, and 0 times the difference of two such is still 0, not NaN.
_SURE = 1e30


@dataclass(frozen=True)
class RegionMasks:
    """Where teachers, and labels that win, see what.

    Attributes:
        organ: bool (N, K, D, H, W), R_k.
        background: bool (N, D, H, W), as `Consensus.unclaimed`: the agreed background B, and what
            is background as far as anybody speaks.
    """

    organ: Tensor
    background: Tensor


def regions_of(log_odds: Tensor, margin: float = 0.0) -> RegionMasks:
    """R_k = {d_k > m}, and background as far as anybody speaks: some d_k < -m, and every other one
    < -m or NaN. As in `pipeline.consensus.regions`, but on the device.

    Args:
        log_odds: d, (N, K, D, H, W).
        margin: m >= 0.
    """
    below = log_odds < -margin
    background = (below | torch.isnan(log_odds)).all(dim=1) & below.any(dim=1)
    return RegionMasks(log_odds > margin, background)


def one_target(
    log_p: Tensor, p: Tensor, log_odds: Tensor, *, temperature: float = 1.0
) -> tuple[Tensor, Tensor]:
    """Cross-entropy and soft Dice against one target per voxel, q = softmax([0, d_1 .. d_K] / T).

    Where labels have won d is theirs, elsewhere the experts'. An organ of which nobody speaks at a
    voxel is merged into background there, in the student and in the target; a voxel where nobody
    speaks at all teaches nothing. So no two terms pull a voxel in two directions.

        cross-entropy = mean over voxels of - sum over classes of q log p
        Dice          = 1 - mean over organs of 2 sum(p q) / (sum(p^2) + sum(q^2))

    The first is KL(q || p) but for the target's own entropy. The squares make p = q the optimum of
    the second (Milletari et al. 2016); an organ of which nobody speaks in the batch is left out.

    Args:
        log_p: (N, C, D, H, W).
        p: of the organs, (N, K, D, H, W).
        log_odds: d, (N, K, D, H, W), NaN where nobody speaks.
        temperature: T > 0, of the target alone; below 1 it is harder.
    """
    spoken = ~torch.isnan(log_odds)
    q = torch.softmax(joint_target(log_odds, temperature), dim=1)
    if not bool(spoken.all()):
        log_p, p = merge_into_background(log_p, spoken), p * spoken
    heard = spoken.any(dim=1)
    entropy = mean_of_means(-((q * log_p).sum(dim=1) * heard).sum(), heard.sum())
    q, p = q[:, 1:].flatten(2), p.flatten(2)
    both, size = (x.sum(dim=2).sum(dim=0) for x in (p * q, p.square() + q.square()))
    return entropy, one_minus_mean(2 * both, size, spoken.flatten(2).any(dim=2))


def joint_target(log_odds: Tensor, temperature: float) -> Tensor:
    """Logits of q = softmax([0, d_1 .. d_K] / T): what labels and experts say together.

    Args:
        log_odds: (N, K, D, H, W); NaN, an organ that nobody knows here, gets q = 0.
        temperature: T > 0.

    Returns:
        (N, C, D, H, W).
    """
    d = (at_least_float32(log_odds) / temperature).clamp(-_SURE, _SURE)
    d = torch.nan_to_num(d, nan=NEVER)
    return torch.cat([torch.zeros_like(d[:, :1]), d], dim=1)


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
