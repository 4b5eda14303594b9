"""The numbers of one case: volumes, conflicts, what teachers miss. One pass, chunk by chunk."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import dask.array as da
import numpy as np
import numpy.typing as npt
from pydantic import Field

from pipeline.cache.reader import CachedCase
from pipeline.cohort import compute
from pipeline.components import coarse, large_components
from pipeline.config import Config
from pipeline.inspection.looks import CaseLook, View, look_at
from pipeline.inspection.voxels import Count
from pipeline.labels import LabelSpace


class TeacherNumbers(Config):
    """One teacher in one organ of a case, before any label wins.

    Attributes:
        teacher: its name.
        organ: that it claims.
        claimed_ml: where its log-odds are above the margin.
        unseen: share of voxels that it did not see (NaN).
    """

    teacher: str
    organ: str
    claimed_ml: float
    unseen: float


class DoubtNumbers(Config):
    """A teacher that is not fully believed about an organ in a case that does not annotate it.

    Attributes:
        teacher: its name.
        organ: in which.
        here: whether its "here" counts.
        not_here: whether its "not here" counts.
        why: in words.
    """

    teacher: str
    organ: str
    here: bool
    not_here: bool
    why: str


class PairNumbers(Config):
    """Two teachers that claim the same voxels for different organs; after labels have won."""

    teachers: tuple[str, str]
    conflict_ml: float


class OrganNumbers(Config):
    """One organ of a case; what has no meaning for it is None.

    Attributes:
        region_ml: its organ region as a student is taught it.
        components: large components of that region.
        label_ml: by the case's own label; None if that does not speak of it.
        label_components: large components of the label.
        missed_ml: labelled, and not in the teachers' own region.
        swallowed_ml: labelled, and in the agreed background of the teachers alone.
        false_positive_ml: in the teachers' own region, and the label says that it is not the organ.
        split_ml: where several experts of the organ decide differently.
    """

    region_ml: float
    components: int
    label_ml: float | None = None
    label_components: int | None = None
    missed_ml: float | None = None
    swallowed_ml: float | None = None
    false_positive_ml: float | None = None
    split_ml: float | None = None


class CaseNumbers(Config):
    """One case.

    Attributes:
        case: `dataset/case`.
        split: train, validation or test.
        volume_ml: of the whole case.
        organs: organ -> its numbers, of organs that somebody speaks of.
        agreed_background: share of the case.
        unclaimed: share of the case that is background as far as anybody speaks: the agreed
            background, and what lies beside an organ whose teachers are silent.
        conflict_ml: in two or more organ regions.
        abstained_ml: in no region at all.
        unseen: share of voxels that some organ's experts all did not see (NaN).
        teachers: each teacher and organ.
        pairs: each pair of teachers.
        doubts: each teacher and organ that is not fully believed here.
        flags: why the case is improbable, in words.
    """

    case: str
    split: str
    volume_ml: float
    organs: dict[str, OrganNumbers]
    agreed_background: float
    unclaimed: float
    conflict_ml: float
    abstained_ml: float
    unseen: float
    teachers: tuple[TeacherNumbers, ...]
    pairs: tuple[PairNumbers, ...]
    doubts: tuple[DoubtNumbers, ...] = Field(default=())
    flags: tuple[str, ...] = Field(default=())


def measure_case(case: CachedCase, space: LabelSpace, view: View) -> CaseNumbers:
    """Reads a case once and counts; without flags, which need the other cases.

    Raises:
        CacheError: a unit is absent, or damaged in a way that only reading finds.
    """
    look = look_at(case, space, view)
    lazy = lazy_numbers(case, look)
    return numbers_of(case, look, lazy, compute(*lazy.arrays))


@dataclass(frozen=True)
class LazyNumbers:
    """What the numbers of a case are made of.

    Attributes:
        names: of what is counted.
        pairs: of teachers.
        arrays: lazily, voxels of each name; voxels of each pair; organ regions (K, ..) and label,
            both coarse.
    """

    names: Sequence[Count]
    pairs: Sequence[tuple[str, str]]
    arrays: tuple[da.Array, da.Array, da.Array, da.Array]


def lazy_numbers(case: CachedCase, look: CaseLook) -> LazyNumbers:
    """To be computed together, and with whatever else is made of the same look."""
    names, counts = look.counts()
    pairs, conflicts = look.pairs()
    few = coarse(case.grid.spacing_mm)
    organ, classes = look.regions.organ[(slice(None), *few)], look.votes.classes[few]
    return LazyNumbers(names, pairs, (counts, conflicts, organ, classes))


def numbers_of(
    case: CachedCase, look: CaseLook, lazy: LazyNumbers, computed: Sequence[npt.NDArray[Any]]
) -> CaseNumbers:
    """What was counted, in ml and shares; `computed` are the arrays of `lazy`."""
    counts, conflicts, organ, classes = computed
    voxels = dict(zip(lazy.names, counts, strict=True))
    voxel_ml = case.grid.voxel_ml
    total = int(np.prod(case.grid.shape))

    def ml(what: str, organ_name: str = "") -> float | None:
        count = voxels.get((what, organ_name))
        return None if count is None else round(float(count) * voxel_ml, 3)

    def share(what: str, of: str = "") -> float:
        return round(float(voxels[what, of]) / total, 6)

    organs = {}
    for k, name in enumerate(look.organs):
        labelled = k in look.votes.annotated
        organs[name] = OrganNumbers(
            region_ml=ml("region", name) or 0.0,
            components=large_components(organ[k]),
            label_ml=ml("label", name),
            label_components=large_components(classes == k + 1) if labelled else None,
            missed_ml=ml("miss", name),
            swallowed_ml=ml("swallowed", name),
            false_positive_ml=ml("false positive", name) if look.votes.annotated else None,
            split_ml=ml("split", name),
        )
    teachers = []
    for teacher, k in look.channels:
        key = f"{teacher}: {look.organs[k]}"
        teachers.append(
            TeacherNumbers(
                teacher=teacher,
                organ=look.organs[k],
                claimed_ml=ml("claimed", key) or 0.0,
                unseen=share("unseen", key),
            )
        )
    return CaseNumbers(
        case=case.name,
        split=case.split,
        volume_ml=round(total * voxel_ml, 3),
        organs=organs,
        agreed_background=share("background"),
        unclaimed=share("unclaimed"),
        conflict_ml=ml("conflict") or 0.0,
        abstained_ml=ml("abstained") or 0.0,
        unseen=share("unseen"),
        teachers=tuple(teachers),
        pairs=tuple(
            PairNumbers(teachers=pair, conflict_ml=round(float(count) * voxel_ml, 3))
            for pair, count in zip(lazy.pairs, conflicts, strict=True)
        ),
        doubts=tuple(
            DoubtNumbers(teacher=who, organ=organ, **trust._asdict())
            for (who, organ), trust in case.trust.items()
        ),
    )
