"""The cases of a registry as the cache holds them, and the lazy consensus over each of them.

This is the only place where cache, consensus and registry meet; stage two starts here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any
from uuid import uuid4

import dask
import dask.array as da
import numpy as np
import numpy.typing as npt
from dask.delayed import Delayed

from pipeline.cache.identity import read_dataset, read_teacher
from pipeline.cache.index import IndexedTeacher, case_path, unit_digest, unit_path
from pipeline.cache.lazy import Convert, lazy_array
from pipeline.cache.reader import FULL, CachedCase, Unit
from pipeline.cache.schema import LABEL, log_odds_name
from pipeline.consensus import regions
from pipeline.data.labels import LabelSpace
from pipeline.data.patches import Patch
from pipeline.data.registry import Registry
from pipeline.errors import CacheError, CacheMissing
from pipeline.folder import Folder
from pipeline.log import print_table

# (teacher, organ) -> T
Temperatures = Mapping[tuple[str, str], float]


@dataclass(frozen=True)
class RegionRules:
    """How regions follow from what teachers and labels say.

    Attributes:
        margin: m of the regions, in log-odds.
        labels_win: the case's own labels correct the teachers first.
        confidence: c of labels that win, in calibrated log-odds.
        temperatures: T that a teacher's log-odds of an organ are divided by before anything else;
            those that are absent stay as they are.
    """

    margin: float = 0.0
    labels_win: bool = True
    confidence: float = regions.DEFAULT_CONFIDENCE
    temperatures: Temperatures = field(default_factory=dict)

    def word(self, case: CachedCase, teacher: str, organ: str) -> Convert:
        """What a teacher's log-odds of an organ count for in a case; see `trusted`."""
        trust = case.trust.get((teacher, organ), FULL)
        temperature = self.temperatures.get((teacher, organ))
        return partial(
            regions.trusted, here=trust.here, not_here=trust.not_here, temperature=temperature
        )


@dataclass(frozen=True)
class Cohort:
    """All cases that stage two may read.

    Attributes:
        cases: those whose receipts are in order.
        teachers: teacher -> what the index says of it.
        problems: unit -> why it cannot be used; also cases that the registry calls for and that
            stage one could not take, or has not come to.
    """

    cases: Sequence[CachedCase]
    teachers: Mapping[str, IndexedTeacher]
    problems: Mapping[str, CacheError]


def open_cohort(
    work: Folder,
    registry: Registry,
    *,
    teachers: Sequence[str] = (),
    datasets: Sequence[str] | None = None,
    splits: Sequence[str] = ("train", "validation", "test"),
    as_indexed: bool = False,
) -> Cohort:
    """Opens what the cache holds for a registry; no raw CT and no weights are needed, but where
    they are they must be those that it was made from.

    Args:
        registry: says which datasets and teachers; read without its files.
        teachers: those whose units are wanted; none for supervision by labels alone.
        splits: cases of other splits are left out.
        as_indexed: take the index as it is, whatever its files and weights are now: for stage one,
            which has just written it.

    Raises:
        CacheStale: stage one has not seen the registry, or its files, as they are now.
    """
    look = not as_indexed
    indexed = {name: read_teacher(work, registry, name, compare=look) for name in teachers}
    cases: list[CachedCase] = []
    problems: dict[str, CacheError] = {}
    for dataset in datasets if datasets is not None else list(registry.datasets):
        annotated = tuple(registry.datasets[dataset].annotated)
        entries, absent = read_dataset(work, registry, dataset, splits=splits, compare=look)
        problems |= absent
        for entry in entries:
            units: dict[str, Unit] = {}
            for name, teacher in indexed.items():
                path = unit_path(work, teacher, entry)
                try:
                    units[name] = Unit.open(path, expect=unit_digest(teacher, entry))
                except CacheError as error:
                    problems[f"{name} x {entry.name}"] = error
            try:
                unit = Unit.open(case_path(work, entry), expect=entry.digest)
            except CacheError as error:
                problems[entry.name] = error
                continue
            experts = {
                organ: [t for t in who if t in units] for organ, who in registry.experts().items()
            }
            cases.append(CachedCase(entry.name, entry.split, annotated, unit, units, experts))
    return Cohort(cases, indexed, problems)


def open_case(
    work: Folder,
    registry: Registry,
    name: str,
    teachers: Sequence[str],
    *,
    allow_missing: bool = False,
) -> CachedCase:
    """One case with the units of these teachers.

    Args:
        name: `dataset/case`.

    Raises:
        RegistryError: no such dataset.
        CacheStale, CacheMissing: the registry, the case or a unit is not in the cache.
        CacheError: a unit is damaged.
    """
    dataset, _, _ = name.partition("/")
    registry.check_dataset(dataset)
    cohort = open_cohort(work, registry, teachers=teachers, datasets=[dataset])
    for unit in (name, *(() if allow_missing else [f"{t} x {name}" for t in teachers])):
        if unit in cohort.problems:
            raise cohort.problems[unit]
    cases = {found.name: found for found in cohort.cases}
    if name not in cases:
        raise CacheMissing(
            f"there is no case {name!r} in the cache.",
            where=work,
            fix=f"Cases of {dataset}: {', '.join(list(cases)[:8])}. One that is new in the dataset "
            "is cached by `pipeline cache-teachers`.",
        )
    return cases[name]


def known_organs(case: CachedCase, space: LabelSpace, *, labels_win: bool = True) -> list[int]:
    """Numbers of the organs that a teacher, or the label, speaks of in this case."""
    return [
        k
        for k, organ in enumerate(space.organs)
        if case.experts.get(organ) or (labels_win and organ in case.annotated)
    ]


@dataclass(frozen=True)
class Votes:
    """What teachers and label say of one case; nothing is read yet.

    Attributes:
        known: numbers of the known organs; below, k counts these.
        experts: per known organ, teacher -> its log-odds (D, H, W), divided by its T if it has one;
            NaN where it did not see.
        annotated: those k that the label speaks of.
        classes: uint8 (D, H, W), 0 background, k + 1, 255 ignore.
    """

    known: Sequence[int]
    experts: Sequence[Mapping[str, da.Array]]
    annotated: Sequence[int]
    classes: da.Array

    @property
    def log_odds(self) -> da.Array:
        """float32 (K, D, H, W), experts averaged, before any label; NaN where nobody saw."""
        shape = self.classes.shape
        nobody = da.full(shape, np.nan, np.float32) if not all(self.experts) else None
        return regions.stack_organs(
            [regions.average_experts(list(who.values())) if who else nobody for who in self.experts]
        )

    def consensus(self, rules: RegionRules) -> regions.Consensus:
        """Its regions; see `pipeline.consensus.regions.consensus`."""
        classes = self.classes if rules.labels_win and self.annotated else None
        return regions.consensus(
            self.log_odds, classes, self.annotated, margin=rules.margin, confidence=rules.confidence
        )


def lazy_votes(case: CachedCase, space: LabelSpace, rules: RegionRules = RegionRules()) -> Votes:
    """Every teacher's log-odds and the label, lazily, in the chunks they are stored in."""
    known = known_organs(case, space, labels_win=rules.labels_win)
    names = [space.organs[k] for k in known]
    classes = LabelSpace({name: space.ids[name] for name in names}).to_classes
    return Votes(
        known=known,
        experts=[_experts(case, name, rules) for name in names],
        annotated=[k for k, name in enumerate(names) if name in case.annotated],
        classes=lazy_array(case.case, LABEL, classes),
    )


def lazy_consensus(
    case: CachedCase, space: LabelSpace, rules: RegionRules = RegionRules()
) -> tuple[regions.Consensus, list[int]]:
    """The consensus over one case, without reading anything yet.

    Returns:
        Regions over the known organs, and those organs' numbers; axis K follows that order.
    """
    votes = lazy_votes(case, space, rules)
    return votes.consensus(rules), list(votes.known)


def lazy_patch(
    case: CachedCase,
    space: LabelSpace,
    rules: RegionRules,
    box: Patch,
    classes: npt.NDArray[np.uint8],
    resample: Convert | None = None,
) -> Delayed:
    """What teachers and labels say on a training patch, over all organs; nothing is read yet.

    One task, which calls the very functions that the graph of a whole case calls block by block:
    for so little, layers and a scheduler would cost more than reading and arithmetic.

    Args:
        space: the student's organs.
        box: what is read of the log-odds.
        classes: uint8 (D, H, W), the label of the patch, in classes of `space`.
        resample: of an affine, float32 (K, *box.shape) -> (K, D, H, W): log-odds first, then the
            label wins, so that regions are those of the log-odds beside them.

    Returns:
        Of log-odds, float32 (K, D, H, W), NaN where nobody knows; regions follow from them alone.
    """
    key = f"patch-{uuid4().hex}"
    return Delayed(key, {key: (partial(_patch, case, space, rules, box, classes, resample),)})


def _patch(
    case: CachedCase,
    space: LabelSpace,
    rules: RegionRules,
    box: Patch,
    classes: npt.NDArray[np.uint8],
    resample: Convert | None,
) -> npt.NDArray[np.float32]:
    """See `lazy_patch`."""
    said = {
        k: regions.averaged(
            *(
                rules.word(case, teacher, organ)(case.log_odds(teacher, organ, box))
                for teacher in case.experts[organ]
            )
        )
        for k, organ in enumerate(space.organs)
        if case.experts.get(organ)
    }
    spoken = list(said)
    d = regions.stacked(*said.values()) if said else np.empty((0, *box.shape), dtype=np.float32)
    if resample is not None and spoken:
        d = resample(d)
    known = known_organs(case, space, labels_win=rules.labels_win)
    annotated = tuple(n for n, k in enumerate(known) if space.organs[k] in case.annotated)
    if rules.labels_win and annotated:
        if len(known) < len(space.organs):
            classes = LabelSpace({space.organs[k]: k + 1 for k in known}).to_classes(classes)
        d = _among(d, [known.index(k) for k in spoken], len(known), classes.shape)
        d = regions.corrected(d, classes, annotated, rules.confidence)
        spoken = known
    return _among(d, spoken, len(space.organs), classes.shape)


def _among(
    d: npt.NDArray[np.float32], numbers: Sequence[int], num_organs: int, shape: tuple[int, ...]
) -> npt.NDArray[np.float32]:
    """Log-odds of some organs among those of all, NaN for the others."""
    if len(numbers) == num_organs:
        return d
    out = np.full((num_organs, *shape), np.nan, dtype=np.float32)
    out[numbers] = d.reshape(-1, *shape)
    return out


def compute(*lazy: da.Array | Delayed) -> tuple[Any, ...]:
    """What one graph says, together and in this thread: safe in a worker, nothing is read twice.

    By Dask's synchronous scheduler itself. `dask.compute` would first make an expression of the
    arrays, name it by a hash and look for what can be fused: of a patch's task that takes as long
    as running it.
    """
    graph: dict[Any, Any] = {}
    for part in lazy:
        graph.update(part.__dask_graph__())
    blocks = dask.get(graph, [part.__dask_keys__() for part in lazy])
    results = []
    for part, found in zip(lazy, blocks, strict=True):
        finish, arguments = part.__dask_postcompute__()
        results.append(finish(found, *arguments))
    return tuple(results)


def _experts(case: CachedCase, organ: str, rules: RegionRules) -> dict[str, da.Array]:
    return {
        teacher: lazy_array(
            case.teachers[teacher], log_odds_name(organ), rules.word(case, teacher, organ)
        )
        for teacher in case.experts.get(organ, ())
    }


# What stage one tells about its cache, read back from it: region sizes per case.

_MOST_ROWS = 60


def region_rows(
    registry: Registry, work: Folder, datasets: Sequence[str] | None = None
) -> list[dict[str, Any]]:
    """Per case, the size of each region in ml: labels win, margin 0. `datasets`: None for all."""
    if not registry.teachers:
        return []
    space = registry.label_space
    rows = []
    teachers = list(registry.teachers)
    cohort = open_cohort(work, registry, teachers=teachers, datasets=datasets, as_indexed=True)
    for case in cohort.cases:
        known = known_organs(case, space)
        names = (*(space.organs[k] for k in known), *regions.OTHER_REGIONS)
        counts = np.zeros(len(names), dtype=np.int64)
        for box in case.case.array(LABEL).boxes:  # block by block, without the price of a graph
            classes = space.to_classes(case.label(box))
            log_odds = _patch(case, space, RegionRules(), box, classes, None)
            counts += regions.region_counts(log_odds[known])
        voxel_ml = case.grid.voxel_ml
        ml = {n: round(float(c) * voxel_ml, 1) for n, c in zip(names, counts, strict=True)}
        rows.append({"case": case.name, "split": case.split, "ml": ml})
    return rows


def print_regions(sizes: Sequence[Mapping[str, Any]]) -> None:
    """The table, for people."""
    if not sizes:
        return
    names = list(dict.fromkeys(name for row in sizes for name in row["ml"]))
    shown = sizes[:_MOST_ROWS]
    more = f", first {_MOST_ROWS} of {len(sizes)} cases" if len(sizes) > _MOST_ROWS else ""
    rows = [[r["case"], *(in_ml(r["ml"].get(name)) for name in names)] for r in shown]
    print_table(f"Regions in ml{more}", ["case", *names], rows)


def in_ml(value: float | None) -> str:
    """A volume for people: whole ml from 10 on, a dash for none."""
    return "–" if value is None else f"{value:.0f}" if value >= 10 else f"{value:.1f}"


# Below it a tap says another thing of every place that a patch may begin at.
LEAST_AGREEMENT = 0.6


def tap_rows(
    registry: Registry, work: Folder, datasets: Sequence[str] | None = None
) -> list[dict[str, Any]]:
    """Per teacher and tap its channels, stride, and how far it agrees with itself: the median over
    the units that say so, None without any. `datasets`: None for all."""
    teachers = [name for name, entry in registry.teachers.items() if entry.taps]
    if not teachers:
        return []
    cohort = open_cohort(work, registry, teachers=teachers, datasets=datasets, as_indexed=True)
    found: dict[tuple[str, str], list[Mapping[str, Any]]] = {}
    for case in cohort.cases:
        for teacher, unit in sorted(case.teachers.items()):
            for tap, entry in unit.noted["taps"].items():
                found.setdefault((teacher, tap), []).append(entry)
    rows = []
    for (teacher, tap), entries in found.items():
        said = [entry["agreement"] for entry in entries if "agreement" in entry]
        agreement = round(float(np.median(said)), 3) if said else None
        shape = {name: entries[0][name] for name in ("channels", "stride")}
        rows.append({"teacher": teacher, "tap": tap, **shape, "agreement": agreement})
    return rows


def print_taps(taps: Sequence[Mapping[str, Any]]) -> None:
    """The table, for people."""
    if not taps:
        return
    rows = [
        [
            row["teacher"], row["tap"], str(row["channels"]), " x ".join(map(str, row["stride"])),
            "–" if row["agreement"] is None else f"{row['agreement']:.2f}",
        ]
        for row in taps
    ]  # fmt: skip
    print_table("Taps", ["teacher", "tap", "channels", "stride", "agrees with itself"], rows)


def doubtful_tap(tap: str, agreement: float | None) -> str | None:
    """What to tell of a tap that a student cannot learn; None of one that it can."""
    if agreement is None or agreement >= LEAST_AGREEMENT:
        return None
    return (
        f"tap {tap!r} agrees with itself by {agreement:.2f} only (Pearson's r, median over "
        f"channels; {LEAST_AGREEMENT:g} is wanted): of a patch that begins elsewhere the teacher "
        "says something else, which no student can learn. Tap a layer that ends in a convolution "
        "which follows no upsampling directly: a stage of the encoder, or a decoder's block after "
        "its first convolution."
    )
