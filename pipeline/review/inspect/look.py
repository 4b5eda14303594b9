"""Regions and disagreements of one case as lazy arrays, under the settings of a training.

Three kinds of disagreement are told apart, m being the margin:

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

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import dask.array as da
import numpy as np

from pipeline.blocks import count_blocks, in_blocks
from pipeline.cache.reader import CachedCase
from pipeline.cohort import Temperatures, Votes, lazy_votes
from pipeline.consensus import (
    DEFAULT_CONFIDENCE,
    Consensus,
    excluded_by_label,
    pair_conflicts,
    stack_organs,
)
from pipeline.errors import CacheMissing
from pipeline.inspection import voxels
from pipeline.labels import LabelSpace
from pipeline.trust import ReliabilityConfig


@dataclass(frozen=True)
class View:
    """How regions are formed; as in `supervision` of a student's configuration.

    Attributes:
        margin: m, in log-odds.
        labels_win: whether labels correct the teachers first.
        confidence: c of labels that win.
        temperatures: (teacher, organ) -> T; empty for log-odds as they are.
        reliability: when the word of a teacher counts; None: always.
    """

    margin: float = 0.0
    labels_win: bool = True
    confidence: float = DEFAULT_CONFIDENCE
    temperatures: Temperatures = field(default_factory=dict)
    reliability: ReliabilityConfig | None = None


@dataclass(frozen=True)
class CaseLook:
    """Lazy arrays of one case; nothing is read before they are computed.

    Attributes:
        votes: of the teachers and of the label.
        organs: names of the known organs, in the order of axis K.
        ids: their ids in label maps.
        view: how regions are formed.
        is_doubted: whether some teacher is not fully believed here.
    """

    votes: Votes
    organs: Sequence[str]
    ids: Sequence[int]
    view: View
    is_doubted: bool = False

    @cached_property
    def alone(self) -> Consensus:
        """Regions by the teachers alone; where an organ has no expert it is NaN."""
        return Consensus(self.votes.log_odds, self.view.margin)

    @cached_property
    def regions(self) -> Consensus:
        """Regions as a student is taught them."""
        if not (self.view.labels_win and self.votes.annotated):
            return self.alone
        return self.votes.consensus(margin=self.view.margin, confidence=self.view.confidence)

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
            voxels.claims,
            "czyx",
            np.bool_,
            (self.log_odds, "czyx"),
            (self.excluded, "kzyx"),
            organs=tuple(k for _, k in self.channels),
            margin=self.view.margin,
            labels_win=self.view.labels_win,
        )
        teachers, organs = zip(*self.channels, strict=True)
        return pair_conflicts(claims, teachers, organs)

    def counts(self) -> tuple[list[voxels.Count], da.Array]:
        """What there is to count, and its voxels, int64 (M,)."""
        options: dict[str, Any] = {
            "organs": tuple(self.organs),
            "channels": tuple(self.channels),
            "annotated": tuple(self.votes.annotated),
            "margin": self.view.margin,
        }
        arrays = [
            (self.votes.classes, "zyx"),
            (self.log_odds, "czyx"),
            (self.alone.log_odds, "kzyx"),
            (self.excluded, "kzyx"),
            (self.regions.organ, "kzyx"),
            (self.regions.background, "zyx"),
            (self.regions.unclaimed, "zyx"),
            (self.regions.conflict, "zyx"),
            (self.regions.abstained, "zyx"),
        ]
        # The function itself says in which order it counts.
        empty = [np.zeros((a.shape[0],) * (a.ndim - 3) + (0, 0, 0), a.dtype) for a, _ in arrays]
        names = list(voxels.masks_of(*empty, **options))
        return names, count_blocks(voxels.count_masks, len(names), *arrays, **options)

    def region_ids(self) -> da.Array:
        """uint8 (D, H, W): id of the organ whose region it is, of the surer one in a conflict."""
        arrays = (self.regions.organ, "kzyx"), (self.regions.log_odds, "kzyx")
        return in_blocks(voxels.surest, "zyx", np.uint8, *arrays, ids=tuple(self.ids))

    def num_claims(self) -> da.Array:
        """uint8 (D, H, W): in how many organ regions, where that is two or more; else 0."""
        return in_blocks(voxels.num_claims, "zyx", np.uint8, (self.regions.organ, "kzyx"))

    def against_label(self) -> da.Array:
        """uint8 (D, H, W): `voxels.FALSE_POSITIVE`, `MISS`, or `BOTH`: the label's organ is missed
        and another one is claimed."""
        return in_blocks(
            voxels.against_label,
            "zyx",
            np.uint8,
            (self.votes.classes, "zyx"),
            (self.alone.organ, "kzyx"),
            (self.excluded, "kzyx"),
            judged=tuple(k for k in self.votes.annotated if self.votes.experts[k]),
        )

    @property
    def has_rivals(self) -> bool:
        """Whether any organ has more than one expert here."""
        return any(len(who) > 1 for who in self.votes.experts)

    def num_split(self) -> da.Array:
        """uint8 (D, H, W): of how many organs the experts are split."""
        options: dict[str, Any] = {"channels": tuple(self.channels), "margin": self.view.margin}
        return in_blocks(voxels.num_split, "zyx", np.uint8, (self.log_odds, "czyx"), **options)

    def spread(self) -> da.Array:
        """float32 (D, H, W): the largest spread of any organ's experts, in log-odds."""
        channels = tuple(self.channels)
        return in_blocks(
            voxels.spread, "zyx", np.float32, (self.log_odds, "czyx"), channels=channels
        )


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
    votes = lazy_votes(
        case, space, use_labels=view.labels_win, temperatures=view.temperatures or None
    )
    organs = [space.organs[k] for k in votes.known]
    ids = [space.ids[organ] for organ in organs]
    return CaseLook(votes, organs, ids, view, is_doubted=bool(case.trust))
