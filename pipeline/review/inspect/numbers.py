"""The numbers of one case and of a cohort: volumes, conflicts, what teachers miss, which cases
are improbable."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any, Final

import dask.array as da
import numpy as np
import numpy.typing as npt
from pydantic import Field

from pipeline.cache.reader import CachedCase
from pipeline.config import Config
from pipeline.consensus.cohort import compute, in_ml
from pipeline.consensus.gate import is_odd_volume
from pipeline.consensus.reliability import MOST_PARTS, QUANTILES, is_slice
from pipeline.data.labels import LabelSpace
from pipeline.data.volume import coarse, large_components
from pipeline.engine.processes import in_processes
from pipeline.errors import PipelineError, counted
from pipeline.log import Log, csv_text, print_table
from pipeline.review.inspect.look import CaseLook, Count, View, look_at


class TeacherNumbers(Config):
    """One teacher in one organ of a case, before any label wins: where its log-odds are above the
    margin, and the share of voxels that it did not see (NaN)."""

    teacher: str
    organ: str
    claimed_ml: float
    unseen: float


class IgnoredClaims(Config):
    """Which of a teacher's claims about an organ count in a case that does not annotate it."""

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
        agreed_background: share of the case.
        unclaimed: share of the case that is background as far as anybody speaks: the agreed
            background, and what lies beside an organ whose teachers are ignored.
        conflict_ml: in two or more organ regions.
        abstained_ml: in no region at all.
        unseen: share of voxels that some organ's experts all did not see (NaN).
        doubts: each teacher and organ of which a claim is ignored here.
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
    doubts: tuple[IgnoredClaims, ...] = Field(default=())
    flags: tuple[str, ...] = Field(default=())
    one_slice: bool = Field(default=False, exclude_if=lambda value: not value)


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
    """What the numbers of a case are made of. `arrays` are voxels of each name; voxels of each
    pair; organ regions (K, ..) and label, both coarse."""

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
    teachers = [
        TeacherNumbers(
            teacher=teacher,
            organ=look.organs[k],
            claimed_ml=ml("claimed", f"{teacher}: {look.organs[k]}") or 0.0,
            unseen=share("unseen", f"{teacher}: {look.organs[k]}"),
        )
        for teacher, k in look.channels
    ]
    return CaseNumbers(
        case=case.name,
        split=case.split,
        volume_ml=round(total * voxel_ml, 3),
        one_slice=is_slice(case),
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
            IgnoredClaims(teacher=who, organ=organ, **trust._asdict())
            for (who, organ), trust in case.trust.items()
        ),
    )


# Which cases are improbable, and why, in words: pure functions of their numbers.
#
# Nobody can say that a region is wrong where no label speaks of it: an organ may be cut off,
# removed or ill. So a flag says what is odd and asks for a look; it stops nothing. The limits are
# coarse on purpose: a warning that comes often is not heard.

# The share of a labelled organ that teachers may miss, and that their agreed background may hold.
MOST_MISSED: Final = 0.5
MOST_SWALLOWED: Final = 1 / 3


@dataclass(frozen=True)
class Usual:
    """What an organ's labels in training and validation cases look like: 5 % and 95 % quantile of
    its size, empty labels left out, the most large components, and how many labels say so."""

    label_ml: tuple[float, float] | None
    components: int
    num_cases: int


def usual_of(cases: Sequence[CaseNumbers]) -> Mapping[str, Usual]:
    """Organ -> what its labels look like, those of volumes where there are any; test cases are not
    looked at."""
    found = {}
    known = [case for case in cases if case.split in ("train", "validation")]
    for organ in dict.fromkeys(name for case in cases for name in case.organs):
        seen = [c for c in known if organ in c.organs and c.organs[organ].label_ml]
        volumes = [case for case in seen if not case.one_slice]
        labelled = [case.organs[organ] for case in volumes or seen]
        sizes = [numbers.label_ml or 0.0 for numbers in labelled]
        ends = None
        if sizes:
            low, high = np.quantile(sizes, QUANTILES)
            ends = (round(float(low), 3), round(float(high), 3))
        most = max((n.label_components or 0 for n in labelled), default=MOST_PARTS)
        found[organ] = Usual(ends, most, len(sizes))
    return found


def flagged(case: CaseNumbers, usual: Mapping[str, Usual]) -> CaseNumbers:
    """The same numbers with the reasons why they are improbable; an organ of which the cohort says
    nothing `usual` is judged by the case alone."""
    flags: list[str] = []
    for organ, numbers in case.organs.items():
        flags += _own_label(organ, numbers)
        if not case.one_slice:  # which shows anything of an organ, see `is_slice`
            flags += _region(organ, numbers, usual.get(organ))
    return case.model_copy(update={"flags": tuple(flags)})


def _own_label(organ: str, numbers: OrganNumbers) -> list[str]:
    if not numbers.label_ml or numbers.missed_ml is None or numbers.swallowed_ml is None:
        return []
    missed, swallowed = (ml / numbers.label_ml for ml in (numbers.missed_ml, numbers.swallowed_ml))
    reasons = []
    if missed > MOST_MISSED:
        reasons.append(f"teachers miss {missed:.0%} of the labelled organ")
    if swallowed > MOST_SWALLOWED:
        reasons.append(f"agreed background of the teachers holds {swallowed:.0%} of the label")
    return [f"{organ}: {', '.join(reasons)}"] if reasons else []


def _region(organ: str, numbers: OrganNumbers, usual: Usual | None) -> list[str]:
    """An empty label is right about an empty region."""
    if not numbers.region_ml:
        empty = numbers.label_ml is None
        return [f"{organ}: the region is empty, and no label speaks of it"] if empty else []
    reasons = []
    if usual is not None and usual.label_ml and is_odd_volume(numbers.region_ml, usual.label_ml):
        low, high = usual.label_ml
        reasons.append(
            f"{organ}: {in_ml(numbers.region_ml)} ml, while {counted(usual.num_cases, 'label')} "
            f"show {in_ml(low)} to {in_ml(high)} ml"
        )
    most = MOST_PARTS if usual is None else usual.components
    if numbers.components > most:
        where = "than any label has" if usual is not None and usual.num_cases else "than expected"
        reasons.append(f"{organ}: {numbers.components} large separate parts, more {where} ({most})")
    return reasons


# All cases of a cohort: measured in processes by Dask, judged together, told as a table.

_MOST_ROWS = 60
_MOST_PAIRS = 20
_NOBODY = OrganNumbers(region_ml=0.0, components=0)


@dataclass(frozen=True)
class CohortNumbers:
    """What came of all cases.

    Attributes:
        cases: with flags; improbable ones first, those with most reasons before others.
        failed: case -> why it could not be measured.
    """

    cases: Sequence[CaseNumbers]
    usual: Mapping[str, Usual]
    failed: Mapping[str, PipelineError]

    @property
    def num_improbable(self) -> int:
        """Cases with at least one reason."""
        return sum(bool(case.flags) for case in self.cases)

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return {
            "cases": [case.model_dump(mode="json") for case in self.cases],
            "usual": {organ: asdict(usual) for organ, usual in self.usual.items()},
            "pairs": pair_rows(self.cases),
            "doubts": ignored_rows(self.cases),
            "failed": {name: str(error) for name, error in self.failed.items()},
        }


def measure_cohort(
    cases: Sequence[CachedCase], space: LabelSpace, view: View, *, workers: int, log: Log
) -> CohortNumbers:
    """Measures every case, one case in memory per process, and flags them."""
    with log.progress("cases", len(cases)) as advance:
        made = in_processes(
            partial(measure_case, space=space, view=view), cases, number=workers,
            name=lambda case: case.name, advance=advance,
        )  # fmt: skip
    failed: dict[str, PipelineError] = {}
    found = []
    for case, numbers in zip(cases, made, strict=True):
        if isinstance(numbers, PipelineError):
            failed[case.name] = numbers
        elif isinstance(numbers, Exception):
            raise numbers
        else:
            found.append(numbers)
    usual = usual_of(found)
    rows = [flagged(case, usual) for case in found]
    return CohortNumbers(sorted(rows, key=lambda r: (-len(r.flags), r.case)), usual, failed)


def pair_rows(cases: Sequence[CaseNumbers]) -> list[dict[str, Any]]:
    """Each pair of teachers over all cases, most conflict first: in all, cases, the worst."""
    found: dict[tuple[str, str], list[tuple[float, str]]] = {}
    for case in cases:
        for pair in case.pairs:
            found.setdefault(pair.teachers, []).append((pair.conflict_ml, case.case))
    rows = [
        {
            "teachers": list(teachers),
            "conflict_ml": round(sum(ml for ml, _ in seen), 3),
            "num_cases": sum(ml > 0 for ml, _ in seen),
            "worst_ml": max(seen)[0],
            "worst_case": max(seen)[1] if max(seen)[0] else None,
        }
        for teachers, seen in found.items()
    ]
    return sorted(rows, key=lambda row: (-row["conflict_ml"], row["teachers"]))


def ignored_rows(cases: Sequence[CaseNumbers]) -> list[dict[str, Any]]:
    """Each teacher and organ of which a claim is ignored anywhere: in how many of the cases that do
    not annotate the organ, on which side, and why in one of them."""
    rows: dict[tuple[str, str], dict[str, Any]] = {}
    for case in cases:
        for doubt in case.doubts:
            row = rows.setdefault(
                (doubt.teacher, doubt.organ),
                {"teacher": doubt.teacher, "organ": doubt.organ, "num_cases": 0, "no_here": 0,
                 "no_not_here": 0, "silent": 0, "why": doubt.why},
            )  # fmt: skip
            side = "no_not_here" if doubt.here else "no_here" if doubt.not_here else "silent"
            row[side] += 1
    for row in rows.values():
        row["num_cases"] = sum(
            case.organs.get(row["organ"], _NOBODY).label_ml is None for case in cases
        )
    return list(rows.values())


def print_cohort(found: CohortNumbers) -> None:
    """Cases, pairs of teachers, and the reasons, for people."""
    cases = found.cases[:_MOST_ROWS]
    organs = list(dict.fromkeys(name for case in cases for name in case.organs))
    rows = [[case.case, *_cells(case, organs), str(len(case.flags) or "")] for case in cases]
    more = f", first {_MOST_ROWS} of {len(found.cases)}" if len(found.cases) > _MOST_ROWS else ""
    columns = ["case", *organs, "agreed", "conflict", "abstained", "not seen", "improbable"]
    print_table(
        f"Regions in ml, agreed background in %, improbable cases first{more}", columns, rows
    )
    doubts = ignored_rows(found.cases)
    if doubts:
        sides = ("no_here", "no_not_here", "silent")
        cells = [
            [row["teacher"], row["organ"], str(row["num_cases"]),
             *(str(row[side] or "") for side in sides), row["why"]]
            for row in doubts
        ]  # fmt: skip
        title = "Teachers that are not believed everywhere: cases in which"
        columns = ["teacher", "organ", "asked", 'no "here"', 'no "not here"', "silent", "such as"]
        print_table(title, columns, cells)
    pairs = [row for row in pair_rows(found.cases) if row["conflict_ml"]]
    if pairs:
        cells = [
            [" and ".join(row["teachers"]), in_ml(row["conflict_ml"]), str(row["num_cases"]),
             f"{row['worst_case']} ({in_ml(row['worst_ml'])})"]
            for row in pairs[:_MOST_PAIRS]
        ]  # fmt: skip
        title = "Teachers that claim the same voxels for different organs, in ml"
        print_table(title, ["teachers", "all cases", "in cases", "worst case"], cells)
    reasons = [[case.case, reason] for case in cases for reason in case.flags]
    if reasons:
        print_table("Improbable: look at these before you train", ["case", "why"], reasons)


def to_csv(found: CohortNumbers) -> str:
    """One row per case, one column per number; ml, and shares from 0 to 1."""
    rows = [_flat(case) for case in found.cases]
    columns = dict.fromkeys(key for row in rows for key in row if key != "improbable")
    return csv_text(rows, [*columns, "improbable"])


def _flat(case: CaseNumbers) -> dict[str, Any]:
    whole = ("case", "split", "agreed_background", "unclaimed", "conflict_ml", "abstained_ml",
             "unseen")  # fmt: skip
    row: dict[str, Any] = {name: getattr(case, name) for name in whole}
    for organ, numbers in case.organs.items():
        known = numbers.model_dump(exclude_none=True)
        row |= {f"{organ}: {name}": value for name, value in known.items()}
    for one in case.teachers:
        row[f"{one.teacher} on {one.organ}: claimed_ml"] = one.claimed_ml
        row[f"{one.teacher} on {one.organ}: unseen"] = one.unseen
    for doubt in case.doubts:
        row[f"{doubt.teacher} on {doubt.organ}: doubted"] = doubt.why
    for pair in case.pairs:
        row[f"{' and '.join(pair.teachers)}: conflict_ml"] = pair.conflict_ml
    return row | {"improbable": "; ".join(case.flags)}


def _cells(case: CaseNumbers, organs: Sequence[str]) -> list[str]:
    sizes = [case.organs[name].region_ml if name in case.organs else None for name in organs]
    rest = [in_ml(case.conflict_ml), in_ml(case.abstained_ml), f"{case.unseen:.1%}"]
    return [*(in_ml(ml) for ml in sizes), f"{case.agreed_background:.1%}", *rest]
