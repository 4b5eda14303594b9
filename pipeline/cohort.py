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

from pipeline.cache.index import (
    IndexedTeacher,
    case_path,
    read_dataset_index,
    read_teacher_index,
    unit_digest,
    unit_path,
)
from pipeline.cache.reader import CachedCase, Unit
from pipeline.cache.schema import log_odds_name
from pipeline.consensus import DEFAULT_CONFIDENCE, Consensus, average_experts, consensus
from pipeline.data.registry import Registry
from pipeline.errors import CacheError
from pipeline.folder import Folder
from pipeline.labels import LabelSpace
from pipeline.patches import Patch

# (teacher, organ) -> T
Temperatures = Mapping[tuple[str, str], float]


@dataclass(frozen=True)
class Cohort:
    """All cases that stage two may read.

    Attributes:
        cases: those whose receipts are in order.
        teachers: teacher -> what the index says of it.
        problems: unit -> why it cannot be used.
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
) -> Cohort:
    """Opens what the cache holds for a registry; no raw CT and no weights are needed.

    Args:
        work: the work folder.
        registry: says which datasets and teachers; read without its files.
        teachers: those whose units are wanted; none for supervision by labels alone.
        datasets: None for all.
        splits: cases of other splits are left out.

    Raises:
        CacheStale: stage one has not seen the registry as it is now.
    """
    indexed = {t: read_teacher_index(work, t, registry.teacher_key(t)) for t in teachers}
    cases: list[CachedCase] = []
    problems: dict[str, CacheError] = {}
    for dataset in datasets if datasets is not None else list(registry.datasets):
        annotated = tuple(registry.datasets[dataset].annotated)
        for entry in read_dataset_index(work, dataset, registry.dataset_key(dataset)):
            if entry.split not in splits:
                continue
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


def known_organs(case: CachedCase, space: LabelSpace, *, use_labels: bool = True) -> list[int]:
    """Numbers of the organs that a teacher, or the label, speaks of in this case."""
    return [
        k
        for k, organ in enumerate(space.organs)
        if case.experts.get(organ) or (use_labels and organ in case.annotated)
    ]


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
    known = known_organs(case, space, use_labels=use_labels)
    stack = [_organ(case, space.organs[k], patch, temperatures) for k in known]
    annotated = [n for n, k in enumerate(known) if space.organs[k] in case.annotated]
    classes = None
    if use_labels and annotated:
        label = _lazy(case.case, "label", patch, 255)
        classes = label.map_blocks(_known_classes, space, known, dtype=np.uint8)
    regions = consensus(da.stack(stack), classes, annotated, margin=margin, confidence=confidence)
    return regions, known


def compute(*lazy: Any) -> tuple[Any, ...]:
    """One compute call on the synchronous scheduler: safe in a worker, nothing is read twice.

    Given by name, Dask would import `distributed`, where that is installed, to look for a client.
    """
    results: tuple[Any, ...] = dask.compute(*lazy, scheduler=dask.get)
    return results


def _known_classes(
    label: npt.NDArray[np.uint8], space: LabelSpace, known: Sequence[int]
) -> npt.NDArray[np.uint8]:
    """Organ ids -> 1 + position among the known organs."""
    organs = space.organs
    return LabelSpace({organs[k]: space.ids[organs[k]] for k in known}).to_classes(label)


def _organ(
    case: CachedCase, organ: str, patch: Patch | None, temperatures: Temperatures | None
) -> da.Array:
    experts = case.experts.get(organ, ())
    if not experts:
        shape = case.case.array("label").shape if patch is None else patch.shape
        return da.full(shape, np.nan, dtype=np.float32)
    name = log_odds_name(organ)
    odds = [_lazy(case.teachers[t], name, patch, np.nan) for t in experts]
    if not temperatures:
        return average_experts(odds)
    return average_experts(odds, [temperatures.get((t, organ), 1.0) for t in experts])


class _View:
    """A stored array that is read when Dask asks for a part of it, through the unit's checks."""

    ndim = 3

    def __init__(self, unit: Unit, name: str) -> None:
        self._unit, self._name = unit, name
        array = unit.array(name)
        self.shape, self.chunks, self.dtype = array.shape, array.chunks, array.dtype

    def __getitem__(self, index: tuple[slice, ...]) -> npt.NDArray[Any]:
        spans = [s.indices(n) for s, n in zip(index, self.shape, strict=True)]
        z, y, x = (start for start, _, _ in spans)
        d, h, w = (stop - start for start, stop, _ in spans)
        return self._unit.read(self._name, Patch((z, y, x), (d, h, w)))


class _PatchView:
    """A patch of a stored array that is read, with padding, when Dask asks for it."""

    ndim = 3

    def __init__(self, unit: Unit, name: str, patch: Patch, fill: float) -> None:
        self._unit, self._name, self._patch, self._fill = unit, name, patch, fill
        self.shape = patch.shape
        self.dtype = unit.array(name).dtype

    def __getitem__(self, index: Any) -> npt.NDArray[Any]:
        values = self._unit.read_padded(self._name, self._patch, self._fill)
        return np.asarray(values[index])


def _lazy(unit: Unit, name: str, patch: Patch | None, fill: float) -> da.Array:
    if patch is None:
        whole = _View(unit, name)
        meta = np.empty((0, 0, 0), dtype=whole.dtype)
        return da.from_array(
            whole, chunks=whole.chunks, name=False, meta=meta, inline_array=True, asarray=False
        )
    view = _PatchView(unit, name, patch, fill)
    # A random name and a given meta: hashing and probing the view would cost more than reading it.
    meta = np.empty((0, 0, 0), dtype=view.dtype)
    return da.from_array(
        view, chunks=patch.shape, name=False, meta=meta, inline_array=True, asarray=False
    )
