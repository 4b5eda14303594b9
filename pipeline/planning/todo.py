"""Which units stage one has to make, by headers and receipts; no voxel and no file is hashed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from pipeline.cache.index import IndexedTeacher
from pipeline.cache.places import Place, find_units
from pipeline.cache.receipt import Receipt, read_receipt
from pipeline.cache.schema import StorageConfig
from pipeline.case_sizes import CaseSize
from pipeline.data.registry import Registry
from pipeline.errors import CacheError
from pipeline.folder import Folder
from pipeline.prepare import case_of_hashes

CASES = "cases"


@dataclass(frozen=True)
class Todo:
    """What is left of a run of stage one.

    Attributes:
        missing: `cases`, and each teacher -> the cases whose unit is still to be made.
        num_cached: units that are there already.
        cached_bytes: what those take.
    """

    missing: Mapping[str, Sequence[CaseSize]]
    num_cached: int
    cached_bytes: int

    @property
    def num_missing(self) -> int:
        """Units to make."""
        return sum(len(cases) for cases in self.missing.values())

    @property
    def cases(self) -> list[CaseSize]:
        """The cases of which anything is missing."""
        found = {case.source.name: case for cases in self.missing.values() for case in cases}
        return list(found.values())


def find_todo(
    work: Folder,
    registry: Registry,
    sizes: Sequence[CaseSize],
    teachers: Mapping[str, IndexedTeacher],
    storage: StorageConfig,
) -> Todo:
    """Takes a unit as cached if its receipt is in order and names the settings of now.

    The files of datasets are not hashed here, which would read all of them: a CT that changed
    since it was cached counts as cached, though stage one will notice and do it again.
    """
    there = _receipts(work)
    missing: dict[str, list[CaseSize]] = {CASES: [], **{name: [] for name in teachers}}
    cached: list[Receipt] = []
    for size in sizes:
        case, dataset = size.source.case, size.source.dataset
        unit = _case_unit(registry, size, there.get((CASES, dataset, case), ()), storage)
        found = {CASES: unit}
        for name, teacher in teachers.items():
            receipts = there.get((name, dataset, case), ())
            found[name] = _teacher_unit(teacher, receipts, unit)
        for what, receipt in found.items():
            if receipt is None:
                missing[what].append(size)
            else:
                cached.append(receipt)
    return Todo(missing, len(cached), sum(receipt.num_bytes for receipt in cached))


def _receipts(work: Folder) -> dict[tuple[str, str, str], list[Receipt]]:
    """(`cases` or teacher, dataset, case) -> the receipts that are in order."""
    found: dict[tuple[str, str, str], list[Receipt]] = {}
    for place in find_units(work):
        try:
            receipt = read_receipt(place.path)
        except CacheError:
            continue
        found.setdefault(_key(place), []).append(receipt)
    return found


def _key(place: Place) -> tuple[str, str, str]:
    return place.teacher or CASES, place.dataset, place.case


def _case_unit(
    registry: Registry, size: CaseSize, receipts: Sequence[Receipt], storage: StorageConfig
) -> Receipt | None:
    for receipt in receipts:
        hashes = str(receipt.inputs["image_sha256"]), str(receipt.inputs["label_sha256"])
        spacing = registry.grid.spacing_mm
        case, _ = case_of_hashes(registry, size.source, hashes, spacing_mm=spacing, storage=storage)
        if case.digest == receipt.digest:
            return receipt
    return None


def _teacher_unit(
    teacher: IndexedTeacher, receipts: Sequence[Receipt], case: Receipt | None
) -> Receipt | None:
    for receipt in receipts:
        same_image = case is None or (receipt.inputs["image_sha256"] == case.inputs["image_sha256"])
        if receipt.inputs["teacher_digest"] == teacher.digest and same_image:
            return receipt
    return None
