"""Regions and disagreements of one case as lazy arrays, under the settings of a training.

Three kinds of disagreement are distinguished, m being the margin:

- **conflict**: two organ regions, or two teachers with different organs, claim one voxel
  (`pipeline.consensus`). After labels have won, if they do.
- **split experts** of organ k: of the teachers that claim k and saw the voxel, one says yes
  (d > m) and another no (d < -m). Their **spread** is the largest of their log-odds less the
  smallest, 0 where fewer than two saw. By teachers alone, divided by their temperatures.
- **against the label**, by teachers alone, experts averaged, before any label wins:
  a **false positive** is a voxel of R_k that the label excludes (k is annotated and the label is
  another value, or the label names another annotated organ); a **miss** is a voxel that the label
  calls k and that is not in R_k, seen or not. **Swallowed** are misses in the teachers' own agreed
  background: what a student would be taught to call background, did the label not win. Ignored
  voxels count for nothing, nor do organs without an expert.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import dask.array as da
import numpy as np
import numpy.typing as npt

from pipeline.cache.reader import CachedCase, ReliabilityConfig
from pipeline.consensus.cohort import RegionRules, Votes, lazy_votes
from pipeline.consensus.regions import (
    Consensus,
    count_blocks,
    excluded_by_label,
    in_blocks,
    pair_conflicts,
    stack_organs,
)
from pipeline.data.labels import LabelSpace
from pipeline.errors import CacheMissing


@dataclass(frozen=True)
class View(RegionRules):
    """How regions are formed; as in `supervision` of a student's configuration.

    Attributes:
        reliability: when the word of a teacher counts; None: always.
    """

    reliability: ReliabilityConfig | None = None


@dataclass(frozen=True)
class CaseLook:
    """Lazy arrays of one case; nothing is read before they are computed. `organs`, and their `ids`
    in label maps, are in the order of axis K.

    Attributes:
        has_ignored_claims: whether some claim of a teacher is ignored here.
    """

    votes: Votes
    organs: Sequence[str]
    ids: Sequence[int]
    view: View
    has_ignored_claims: bool = False

    @cached_property
    def alone(self) -> Consensus:
        """Regions by the teachers alone; where an organ has no expert it is NaN."""
        return Consensus(self.votes.log_odds, self.view.margin)

    @cached_property
    def regions(self) -> Consensus:
        """Regions as a student is taught them."""
        if not (self.view.labels_win and self.votes.annotated):
            return self.alone
        return self.votes.consensus(self.view)

    @cached_property
    def channels(self) -> Sequence[tuple[str, int]]:
        """(teacher, k) of each channel of `log_odds`."""
        return [(teacher, k) for k, who in enumerate(self.votes.experts) for teacher in who]

    @cached_property
    def log_odds(self) -> da.Array:
        """float32 (C, D, H, W), each teacher's own."""
        return stack_organs([self.votes.experts[k][teacher] for teacher, k in self.channels])

    @cached_property
    def excluded(self) -> da.Array:
        """bool (K, D, H, W), where the label says that it is not organ k."""
        votes = self.votes
        return excluded_by_label(votes.classes, votes.annotated, len(self.organs))

    def pairs(self) -> tuple[list[tuple[str, str]], da.Array]:
        """Voxels in conflict for each pair of teachers, after labels have won if they do."""
        claims = in_blocks(
            block_claims, "czyx", np.bool_, (self.log_odds, "czyx"), (self.excluded, "kzyx"),
            organs=tuple(k for _, k in self.channels),
            margin=self.view.margin, labels_win=self.view.labels_win,
        )  # fmt: skip
        teachers, organs = zip(*self.channels, strict=True)
        return pair_conflicts(claims, teachers, organs)

    def counts(self) -> tuple[list[Count], da.Array]:
        """What there is to count, and its voxels, int64 (M,)."""
        votes, regions = self.votes, self.regions
        knowledge = Knowledge(
            tuple(self.organs), tuple(self.channels), tuple(votes.annotated), self.view.margin
        )
        arrays = [  # in the order of `Counted`
            (votes.classes, "zyx"),
            (self.log_odds, "czyx"),
            (self.alone.log_odds, "kzyx"),
            (self.excluded, "kzyx"),
            (regions.organ, "kzyx"),
            (regions.background, "zyx"),
            (regions.unclaimed, "zyx"),
            (regions.conflict, "zyx"),
            (regions.abstained, "zyx"),
        ]
        # The function itself says in which order it counts.
        empty = [np.zeros((a.shape[0],) * (a.ndim - 3) + (0, 0, 0), a.dtype) for a, _ in arrays]
        names = list(masks_of(Counted(*empty), knowledge))
        return names, count_blocks(count_masks, len(names), *arrays, knowledge=knowledge)

    def region_ids(self) -> da.Array:
        """uint8 (D, H, W): id of the organ whose region it is, of the surer one in a conflict."""
        arrays = (self.regions.organ, "kzyx"), (self.regions.log_odds, "kzyx")
        return in_blocks(surest, "zyx", np.uint8, *arrays, ids=tuple(self.ids))

    def num_claims(self) -> da.Array:
        """uint8 (D, H, W): in how many organ regions, where that is two or more; else 0."""
        return in_blocks(block_num_claims, "zyx", np.uint8, (self.regions.organ, "kzyx"))

    def against_label(self) -> da.Array:
        """uint8 (D, H, W): `FALSE_POSITIVE`, `MISS`, or `BOTH`: the label's organ is missed
        and another one is claimed."""
        judged = tuple(k for k in self.votes.annotated if self.votes.experts[k])
        arrays = (self.votes.classes, "zyx"), (self.alone.organ, "kzyx"), (self.excluded, "kzyx")
        return in_blocks(block_against_label, "zyx", np.uint8, *arrays, judged=judged)

    @property
    def has_rivals(self) -> bool:
        """Whether any organ has more than one expert here."""
        return any(len(who) > 1 for who in self.votes.experts)

    def num_split(self) -> da.Array:
        """uint8 (D, H, W): of how many organs the experts are split."""
        options: dict[str, Any] = {"channels": tuple(self.channels), "margin": self.view.margin}
        return in_blocks(block_num_split, "zyx", np.uint8, (self.log_odds, "czyx"), **options)

    def spread(self) -> da.Array:
        """float32 (D, H, W): the largest spread of any organ's experts, in log-odds."""
        options: dict[str, Any] = {"channels": tuple(self.channels)}
        return in_blocks(block_spread, "zyx", np.float32, (self.log_odds, "czyx"), **options)


def look_at(case: CachedCase, space: LabelSpace, view: View) -> CaseLook:
    """A case under these settings. Organs that nobody speaks of are left out.

    Raises:
        CacheMissing: no teacher at all has a unit of it.
    """
    if not case.teachers:
        raise CacheMissing(
            "no teacher's log-odds of this case are in the cache.",
            where=case.name,
            fix="Run `pipeline cache-teachers`, then this again.",
        )
    votes = lazy_votes(case, space, view)
    organs = [space.organs[k] for k in votes.known]
    ids = [space.ids[organ] for organ in organs]
    return CaseLook(votes, organs, ids, view, has_ignored_claims=bool(case.trust))


# The same in numpy, over one block.
#
# d, h, w are a block's voxels; channels C are the pairs (teacher, k) that there are log-odds of.

FALSE_POSITIVE, MISS, BOTH = 1, 2, 3
# What is counted: ("region", "liver"), ("miss", "liver"), ("background", "") ..
Count = tuple[str, str]
Array = npt.NDArray[Any]


def block_claims(
    d: Array, excluded: Array, organs: tuple[int, ...], margin: float, labels_win: bool
) -> npt.NDArray[np.bool_]:
    """bool (C, d, h, w), what each teacher claims; if labels win, not where they exclude it."""
    claims: npt.NDArray[np.bool_] = d > margin
    if labels_win:
        for claim, organ in zip(claims, organs, strict=True):
            claim &= ~excluded[organ]
    return claims


class Knowledge(NamedTuple):
    """Who says what in a case; `channels` are (teacher, k), `annotated` are k."""

    organs: tuple[str, ...]
    channels: tuple[tuple[str, int], ...]
    annotated: tuple[int, ...]
    margin: float


class Counted(NamedTuple):
    """One block of what is counted: classes of the label; log-odds (C, d, h, w) of `votes`, and
    (K, d, h, w) of the teachers `alone`; the others are masks."""

    label: Array
    votes: Array
    alone: Array
    excluded: Array
    organ: Array
    background: Array
    unclaimed: Array
    conflict: Array
    abstained: Array


def masks_of(block: Counted, knowledge: Knowledge) -> dict[Count, Any]:
    """All that is counted, as masks over one block."""
    organs, channels, annotated, margin = knowledge
    votes, alone = block.votes, block.alone
    experts = [[c for c, (_, k) in enumerate(channels) if k == n] for n in range(len(organs))]
    judged = [k for k, who in enumerate(experts) if who]
    masks: dict[Count, Any] = {
        ("background", ""): block.background,
        ("unclaimed", ""): block.unclaimed,
        ("conflict", ""): block.conflict,
        ("abstained", ""): block.abstained,
        ("unseen", ""): np.isnan(alone[judged]).any(axis=0),
    }
    for c, (teacher, k) in enumerate(channels):
        masks["claimed", f"{teacher}: {organs[k]}"] = votes[c] > margin
        masks["unseen", f"{teacher}: {organs[k]}"] = np.isnan(votes[c])
    background_alone = (alone[judged] < -margin).all(axis=0)
    for k, name in enumerate(organs):
        masks["region", name] = block.organ[k]
        if len(experts[k]) > 1:
            masks["split", name] = _is_split(votes[experts[k]], margin)
        if k in annotated:
            inside = block.label == k + 1
            masks["label", name] = inside
            if experts[k]:
                masks["miss", name] = inside & ~(alone[k] > margin)
                masks["swallowed", name] = inside & background_alone
        if experts[k]:
            masks["false positive", name] = (alone[k] > margin) & block.excluded[k]
    return masks


def count_masks(*blocks: Array, knowledge: Knowledge) -> npt.NDArray[np.int64]:
    """int64 (M,), voxels in each of `masks_of`, in that order."""
    masks = masks_of(Counted(*blocks), knowledge).values()
    return np.array([np.count_nonzero(mask) for mask in masks], dtype=np.int64)


def surest(organ: Array, d: Array, ids: tuple[int, ...]) -> npt.NDArray[np.uint8]:
    """The id of the organ with the largest log-odds of those that claim the voxel; else 0."""
    best = np.where(organ, d, -np.inf).argmax(axis=0)
    found = np.array(ids, dtype=np.uint8)[best]
    return np.asarray(np.where(organ.any(axis=0), found, np.uint8(0)))


def block_num_claims(organ: Array) -> npt.NDArray[np.uint8]:
    """In how many organ regions, where that is two or more; else 0."""
    count = organ.sum(axis=0, dtype=np.uint8)
    return np.asarray(np.where(count >= 2, count, np.uint8(0)))


def block_against_label(
    label: Array, organ: Array, excluded: Array, judged: tuple[int, ...]
) -> npt.NDArray[np.uint8]:
    """`FALSE_POSITIVE`, `MISS` or `BOTH`; misses of the organs `judged` alone."""
    false = (organ & excluded).any(axis=0)
    missed = np.zeros(label.shape, dtype=np.bool_)
    for k in judged:
        missed |= (label == k + 1) & ~organ[k]
    return (FALSE_POSITIVE * false + MISS * missed).astype(np.uint8)


def _by_organ(channels: tuple[tuple[str, int], ...]) -> Mapping[int, list[int]]:
    """Organs with two or more experts -> their channels."""
    found: dict[int, list[int]] = {}
    for c, (_, k) in enumerate(channels):
        found.setdefault(k, []).append(c)
    return {k: who for k, who in found.items() if len(who) > 1}


def _is_split(d: Array, margin: float) -> npt.NDArray[np.bool_]:
    return np.asarray((d > margin).any(axis=0) & (d < -margin).any(axis=0))


def block_num_split(
    d: Array, channels: tuple[tuple[str, int], ...], margin: float
) -> npt.NDArray[np.uint8]:
    """Of how many organs the experts are split."""
    split = [_is_split(d[who], margin) for who in _by_organ(channels).values()]
    return np.asarray(np.sum(split, axis=0, dtype=np.uint8))


def block_spread(d: Array, channels: tuple[tuple[str, int], ...]) -> npt.NDArray[np.float32]:
    """The largest spread of any organ's experts; 0 where fewer than two saw."""
    out = np.zeros(d.shape[1:], dtype=np.float32)
    for who in _by_organ(channels).values():
        # fmax and fmin pass over NaN; where nobody saw both are NaN, which fmax passes over too.
        ends = np.fmax.reduce(d[who], axis=0) - np.fmin.reduce(d[who], axis=0)
        np.fmax(out, ends, out=out)
    return out
