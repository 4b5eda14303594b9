"""The cases of a registry as the cache holds them, and the lazy consensus over each of them.

This is the only place where cache, consensus and registry meet; stage two starts here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import dask
import dask.array as da
import numpy as np
import numpy.typing as npt
from dask.highlevelgraph import HighLevelGraph

from pipeline.cache.identity import read_dataset, read_teacher
from pipeline.cache.index import IndexedTeacher, case_path, unit_digest, unit_path
from pipeline.cache.lazy import as_stored, lazy_array
from pipeline.cache.reader import FULL, CachedCase, Unit
from pipeline.cache.schema import LABEL, log_odds_name
from pipeline.consensus.regions import (
    DEFAULT_CONFIDENCE,
    Consensus,
    average_experts,
    consensus,
    region_voxels,
    stack_organs,
    trusted_log_odds,
)
from pipeline.data.labels import IGNORE, LabelSpace
from pipeline.data.patches import Patch
from pipeline.data.registry import Registry
from pipeline.errors import CacheError, CacheMissing, RegistryError
from pipeline.folder import Folder
from pipeline.log import print_table

# (teacher, organ) -> T
Temperatures = Mapping[tuple[str, str], float]


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
        work: the work folder.
        registry: says which datasets and teachers; read without its files.
        teachers: those whose units are wanted; none for supervision by labels alone.
        datasets: None for all.
        splits: cases of other splits are left out.
        as_indexed: take the index as it is, whatever its files and weights are now: for stage one,
            which has just written it, and whose other parts may not have seen what changed.

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
        work: the work folder.
        registry: read without its files.
        name: `dataset/case`.
        teachers: those whose units are wanted.
        allow_missing: leave out units that are missing or damaged.

    Raises:
        RegistryError: no such dataset.
        CacheStale, CacheMissing: the registry, the case or a unit is not in the cache.
        CacheError: a unit is damaged.
    """
    dataset, _, _ = name.partition("/")
    if dataset not in registry.datasets:
        known = ", ".join(registry.datasets)
        fix = f"A case is named dataset/case; datasets: {known}."
        raise RegistryError(f"there is no dataset {dataset!r}.", where=registry.path, fix=fix)
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


def known_organs(case: CachedCase, space: LabelSpace, *, use_labels: bool = True) -> list[int]:
    """Numbers of the organs that a teacher, or the label, speaks of in this case."""
    return [
        k
        for k, organ in enumerate(space.organs)
        if case.experts.get(organ) or (use_labels and organ in case.annotated)
    ]


@dataclass(frozen=True)
class Votes:
    """What teachers and label say of one case, or of one patch of it; nothing is read yet.

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
        return stack_organs(
            [_average(list(who.values())) if who else nobody for who in self.experts]
        )

    def consensus(
        self,
        *,
        margin: float = 0.0,
        use_labels: bool = True,
        confidence: float = DEFAULT_CONFIDENCE,
    ) -> Consensus:
        """Its regions; see `pipeline.consensus.regions.consensus`."""
        classes = self.classes if use_labels and self.annotated else None
        return consensus(
            self.log_odds, classes, self.annotated, margin=margin, confidence=confidence
        )


def lazy_votes(
    case: CachedCase,
    space: LabelSpace,
    *,
    patch: Patch | None = None,
    use_labels: bool = True,
    temperatures: Temperatures | None = None,
) -> Votes:
    """Every teacher's log-odds and the label, lazily; see `lazy_consensus` for the arguments."""
    known = known_organs(case, space, use_labels=use_labels)
    names = [space.organs[k] for k in known]
    classes = LabelSpace({name: space.ids[name] for name in names}).to_classes
    return Votes(
        known=known,
        experts=[_experts(case, name, patch, temperatures or {}) for name in names],
        annotated=[k for k, name in enumerate(names) if name in case.annotated],
        classes=lazy_array(case.case, LABEL, patch, IGNORE, classes),
    )


def lazy_consensus(
    case: CachedCase,
    space: LabelSpace,
    *,
    patch: Patch | None = None,
    margin: float = 0.0,
    use_labels: bool = True,
    confidence: float = DEFAULT_CONFIDENCE,
    temperatures: Temperatures | None = None,
) -> tuple[Consensus, list[int]]:
    """The consensus over one case, or one patch of it, without reading anything yet.

    A patch is given to the consensus as one-chunk arrays over lazy views of exactly that slice
    (measured: 1.2 times reading and plain numpy; sliced afterwards it is 2 to 20 times); a whole
    case keeps the chunks it is stored in.

    Args:
        case: open for reading.
        space: the organs.
        patch: the part of it; None for all.
        margin: m of the regions.
        use_labels: labels win.
        confidence: c of labels that win, in calibrated log-odds.
        temperatures: (teacher, organ) -> T that its log-odds are divided by before anything else;
            those that are absent stay as they are.

    Returns:
        Regions over the known organs, and those organs' numbers; axis K follows that order.
    """
    votes = lazy_votes(case, space, patch=patch, use_labels=use_labels, temperatures=temperatures)
    found = votes.consensus(margin=margin, use_labels=use_labels, confidence=confidence)
    return found, list(votes.known)


def compute(*lazy: da.Array) -> tuple[npt.NDArray[Any], ...]:
    """Arrays of one graph, together and in this thread: safe in a worker, nothing is read twice.

    By Dask's synchronous scheduler itself. `dask.compute` would first make an expression of the
    arrays, name it by a hash and look for what can be fused: of a patch's handful of tasks that
    takes as long as running them.
    """
    graph = HighLevelGraph.merge(*(array.dask for array in lazy)).to_dict()
    blocks = dask.get(graph, [array.__dask_keys__() for array in lazy])
    results = []
    for array, found in zip(lazy, blocks, strict=True):
        finish, arguments = array.__dask_postcompute__()
        results.append(finish(found, *arguments))
    return tuple(results)


def _experts(
    case: CachedCase, organ: str, patch: Patch | None, temperatures: Temperatures
) -> dict[str, da.Array]:
    found = {}
    for teacher in case.experts.get(organ, ()):
        odds = lazy_array(case.teachers[teacher], log_odds_name(organ), patch, np.nan, as_stored)
        trust = case.trust.get((teacher, organ), FULL)
        odds = trusted_log_odds(odds, here=trust.here, not_here=trust.not_here)
        if (teacher, organ) in temperatures:
            odds = odds.astype("float32") / np.float32(temperatures[teacher, organ])
        found[teacher] = odds
    return found


def _average(experts: Sequence[da.Array]) -> da.Array:
    """One expert needs no layer: what stacks organs makes float32 of them anyway."""
    return average_experts(experts) if len(experts) > 1 else experts[0]


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
        regions, known = lazy_consensus(case, space)
        names = [space.organs[k] for k in known]
        sizes = region_voxels(regions, names)
        voxel_ml = case.grid.voxel_ml
        counts = zip(sizes, compute(*sizes.values()), strict=True)
        ml = {name: round(float(count) * voxel_ml, 1) for name, count in counts}
        rows.append({"case": case.name, "split": case.split, "ml": ml})
    return rows


def print_regions(regions: Sequence[Mapping[str, Any]]) -> None:
    """The table, for people."""
    if not regions:
        return
    names = list(dict.fromkeys(name for row in regions for name in row["ml"]))
    shown = regions[:_MOST_ROWS]
    more = f", first {_MOST_ROWS} of {len(regions)} cases" if len(regions) > _MOST_ROWS else ""
    rows = [[r["case"], *(in_ml(r["ml"].get(name)) for name in names)] for r in shown]
    print_table(f"Regions in ml{more}", ["case", *names], rows)


def in_ml(value: float | None) -> str:
    """A volume for people: whole ml from 10 on, a dash for none."""
    return "–" if value is None else f"{value:.0f}" if value >= 10 else f"{value:.1f}"
