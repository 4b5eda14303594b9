"""Stage one's work on cases, as every engine does it: the same functions in this process over all
cases, and in a worker over one. They write to disk and tell in a few words what became of each."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import closing
from dataclasses import dataclass, field, replace
from typing import Any

from pipeline.cache.index import IndexedCase, IndexedTeacher, unit_digest, unit_path
from pipeline.cache.receipt import read_receipt
from pipeline.cache.schema import StorageConfig
from pipeline.data.files import CaseFiles
from pipeline.data.registry import Registry
from pipeline.engine.here import Tell, once_per_process, sendable
from pipeline.engine.overlap import in_turn, overlapped
from pipeline.errors import CacheError, CacheStale
from pipeline.folder import Folder
from pipeline.network import pick_device
from pipeline.teachers.sliding_window import WindowConfig
from pipeline.teachers.window_passes import check_precision
from pipeline.unit_steps import CaseJob, CaseSteps, Unit, UnitSteps, missing_units
from pipeline.units import LoadedTeacher, open_teacher

Teachers = Mapping[str, LoadedTeacher]


@dataclass(frozen=True)
class Told:
    """What became of a unit.

    Attributes:
        unit: its name.
        case: `dataset/case`.
        made: now; False: it was there already, or it failed.
        num_bytes: written.
        path: where it is.
        error: what stopped it.
        damage: what was wrong with the one that it replaces.
        indexed: of a case that is now on the student grid.
        warnings: what is improbable in such a case.
    """

    unit: str
    case: str
    made: bool = False
    num_bytes: int = 0
    path: str = ""
    error: Exception | None = None
    damage: str = ""
    indexed: IndexedCase | None = None
    warnings: tuple[str, ...] = ()

    def __getstate__(self) -> dict[str, Any]:
        """As another process can read it."""
        error = None if self.error is None else sendable(self.error)
        return {**self.__dict__, "error": error}


@dataclass(frozen=True)
class OpenTeachers:
    """Opens the teachers of a registry.

    Attributes:
        run: of which a process keeps the teachers in memory; empty: they are opened each time.
    """

    registry: Registry
    window: WindowConfig
    storage: StorageConfig
    device: str
    window_batch: int
    run: str = ""

    def __call__(self) -> Teachers:
        """Teacher -> loaded.

        Raises:
            TeacherError: one does not load.
            ConfigError: a precision that the device does not have.
        """
        return once_per_process(self.run, self._open) if self.run else self._open()

    def _open(self) -> Teachers:
        check_precision(self.window.precision, pick_device(self.device))
        return {
            name: open_teacher(
                name, self.registry, window=self.window, storage=self.storage,
                device=self.device, window_batch=self.window_batch,
            )
            for name in self.registry.teachers
        }  # fmt: skip


@dataclass(frozen=True)
class DescribeTeachers:
    """Tells, once, what the index says of each teacher: only who loads one can digest it."""

    open: Callable[[], Teachers]

    def __call__(self, items: Iterable[None], tell: Tell[Mapping[str, IndexedTeacher]]) -> None:
        """Raises what `OpenTeachers` raises."""
        for _ in items:
            tell({name: loaded.indexed for name, loaded in self.open().items()})


@dataclass(frozen=True)
class PrepareCases:
    """Cases onto the student grid."""

    registry: Registry
    work: Folder
    storage: StorageConfig
    dry_run: bool = False
    overlap: bool = True

    def __call__(self, sources: Iterable[CaseFiles], tell: Tell[Told]) -> None:
        """A failing case is told of and stops no other."""
        steps = CaseSteps(self.registry, self.work, self.storage, self.dry_run)
        order = overlapped if self.overlap else in_turn
        with closing(
            order(sources, ahead=steps.read, work=steps.fit, behind=steps.store)
        ) as outcomes:
            for outcome in outcomes:
                name = outcome.item.name
                if outcome.result is None:
                    tell(Told(name, name, error=outcome.error))
                else:
                    indexed, wrote, warnings = outcome.result
                    made = wrote is not None
                    tell(Told(name, name, made, wrote or 0, indexed=indexed, warnings=warnings))


@dataclass(frozen=True)
class MakeUnits:
    """Units that the cache lacks: case by case, teacher by teacher.

    Attributes:
        registry: what exists.
        work: the work folder.
        storage: how units are stored.
        open: gives the teachers.
        digests: teacher -> the digest that it must have.
        notes: teacher -> what its receipts note.
        overlap: read the next case and write the last one while a network runs.
        dry_run: tell of what is missing as if it were made.
    """

    registry: Registry
    work: Folder
    storage: StorageConfig
    open: Callable[[], Teachers]
    digests: Mapping[str, str]
    notes: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    overlap: bool = True
    dry_run: bool = False

    def __call__(self, jobs: Iterable[CaseJob], tell: Tell[Told]) -> None:
        """A failing unit is told of and stops no other.

        Raises:
            CacheStale: the teachers that were opened are not those that the run began with.
        """
        teachers = self.open()
        self._check(teachers)
        damage: dict[str, str] = {}
        missing = missing_units(
            self.work, teachers, jobs,
            there=lambda unit: tell(_told(unit)),
            damaged=lambda unit, error: damage.update({unit.name: str(error)}),
        )  # fmt: skip
        if self.dry_run:
            for unit in missing:
                tell(replace(_told(unit, damage.pop(unit.name, "")), made=True))
            return
        steps = UnitSteps(self.registry, self.storage, self.notes)
        order = overlapped if self.overlap else in_turn
        with closing(
            order(missing, ahead=steps.read, work=steps.compute, behind=steps.store)
        ) as outcomes:
            for outcome in outcomes:
                told = _told(outcome.item, damage.pop(outcome.item.name, ""))
                if outcome.error is not None:
                    tell(replace(told, error=outcome.error))
                else:
                    tell(replace(told, made=True, num_bytes=outcome.result or 0))

    def _check(self, teachers: Teachers) -> None:
        for name, expected in self.digests.items():
            if teachers[name].indexed.digest != expected:
                raise CacheStale(
                    f"teacher {name} is not the one that this run began with.",
                    where=self.registry.resolve(self.registry.teachers[name].weights),
                    fix="Every machine must see the same weights and packages; nothing may change "
                    "them while a run goes on.",
                )


def _told(unit: Unit, damage: str = "") -> Told:
    return Told(unit.name, unit.case.name, path=str(unit.path), damage=damage)


def is_there(work: Folder, teacher: IndexedTeacher, case: IndexedCase) -> bool:
    """Whether the unit of a teacher for a case is in the cache, by its receipt."""
    try:
        read_receipt(unit_path(work, teacher, case), expect=unit_digest(teacher, case))
    except CacheError:
        return False
    return True
