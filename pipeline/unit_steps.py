"""The steps of stage one, as the engine takes them: read ahead, work, store behind."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from pipeline.cache.index import IndexedCase, unit_digest, unit_path
from pipeline.cache.receipt import read_receipt
from pipeline.cache.schema import StorageConfig
from pipeline.data.files import CaseFiles
from pipeline.data.nifti import read_image
from pipeline.data.registry import Registry
from pipeline.errors import CacheError, RegistryError
from pipeline.folder import Folder
from pipeline.prepare import FittedCase, FoundCase, find_case, fit_case, store_case
from pipeline.units import LoadedTeacher, Outputs, Seen, compute_unit, see, store_unit
from pipeline.volume import Volume


@dataclass(frozen=True)
class CaseSteps:
    """A case onto the student grid."""

    registry: Registry
    work: Folder
    storage: StorageConfig
    dry_run: bool

    def read(self, source: CaseFiles) -> FoundCase:
        """See `find_case`."""
        return find_case(
            self.registry, self.work, source,
            spacing_mm=self.registry.grid.spacing_mm, storage=self.storage, dry_run=self.dry_run,
        )  # fmt: skip

    def fit(self, source: CaseFiles, found: FoundCase) -> FittedCase:
        """See `fit_case`."""
        return fit_case(self.registry, source, found, self.registry.grid.spacing_mm)

    def store(
        self, source: CaseFiles, fitted: FittedCase
    ) -> tuple[IndexedCase, int | None, tuple[str, ...]]:
        """See `store_case`; and what is improbable in the case."""
        return *store_case(self.work, fitted, self.storage), fitted.warnings


@dataclass(frozen=True)
class Unit:
    """One case x one teacher that the cache lacks."""

    name: str
    loaded: LoadedTeacher
    case: IndexedCase
    source: CaseFiles
    path: Folder


@dataclass(frozen=True)
class CaseJob:
    """A case and the teachers whose units of it are wanted."""

    case: IndexedCase
    source: CaseFiles
    teachers: tuple[str, ...]


def missing_units(
    work: Folder,
    teachers: Mapping[str, LoadedTeacher],
    jobs: Iterable[CaseJob],
    *,
    there: Callable[[Unit], object],
    damaged: Callable[[Unit, CacheError], object],
) -> Iterator[Unit]:
    """Case by case, so that a CT is read once. Whether a unit is there is looked at shortly before
    its turn, since another process may be making it.

    Args:
        work: the work folder.
        teachers: by name.
        jobs: cases, their files and the teachers wanted.
        there: told of each unit that is there already.
        damaged: told of each that cannot stay and is made again.
    """
    for job in jobs:
        for name in job.teachers:
            loaded = teachers[name]
            path = unit_path(work, loaded.indexed, job.case)
            unit = Unit(f"{name} x {job.case.name}", loaded, job.case, job.source, path)
            try:
                read_receipt(path, expect=unit_digest(loaded.indexed, job.case))
            except CacheError as error:
                if path.exists():
                    damaged(unit, error)
                yield unit
            else:
                there(unit)


class UnitSteps:
    """A unit: units of one case come one after the other, and its CT is read once for all.

    Args:
        registry: as in `compute_unit`.
        storage: how arrays are stored.
        notes: teacher -> what its receipts note.
    """

    def __init__(
        self,
        registry: Registry,
        storage: StorageConfig,
        notes: Mapping[str, Mapping[str, Any]],
    ) -> None:
        self._registry, self._storage, self._notes = registry, storage, notes
        self._case: IndexedCase | None = None
        self._native: Volume | None = None

    def read(self, unit: Unit) -> Seen:
        """The CT at the teacher's spacing.

        Raises:
            RegistryError: the image is no longer the one that was digested.
            GeometryError: it cannot be read.
        """
        if unit.case != self._case:
            self._native = None  # before the next one is read: not two of them in memory
            self._case = unit.case
        self._native = self._native or _read_again(unit.source, unit.case)
        return see(unit.loaded, self._native, unit.name)

    def compute(self, unit: Unit, seen: Seen) -> Outputs:
        """See `compute_unit`."""
        return compute_unit(self._registry, unit.loaded, seen, unit.case)

    def store(self, unit: Unit, said: Outputs) -> int:
        """See `store_unit`."""
        notes = self._notes.get(unit.loaded.indexed.teacher)
        return store_unit(
            unit.loaded, said, unit.case, unit.path, storage=self._storage, notes=notes
        )


def _read_again(source: CaseFiles, case: IndexedCase) -> Volume:
    image = read_image(source.image)
    if image.sha256 != case.image_sha256:
        raise RegistryError(
            "the image changed while this stage was running.",
            where=f"{source.name}, {source.image}",
            fix="Let nothing write to the dataset, then run the stage again.",
        )
    return image.volume
