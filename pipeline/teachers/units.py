"""Units: what one teacher says of one case, from the CT to the cache, and the steps and work of
stage one around it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt

from pipeline.cache.cases import FittedCase, FoundCase, centres, find_case, fit_case, store_case
from pipeline.cache.index import IndexedCase, IndexedTeacher, unit_digest, unit_path
from pipeline.cache.receipt import read_receipt
from pipeline.cache.schema import (
    ArraySpec,
    StorageConfig,
    features_spec,
    log_odds_spec,
    teacher_inputs,
    unit_inputs,
)
from pipeline.cache.store import write_unit
from pipeline.config import digest
from pipeline.data.entries import CaseFiles, TeacherEntry
from pipeline.data.nifti import read_image
from pipeline.data.patches import Index3
from pipeline.data.registry import Registry
from pipeline.data.resample import SlabResampler, resample
from pipeline.data.volume import Grid, Volume, coarse, large_components
from pipeline.data.weights import digest_of, stamp_weights
from pipeline.engine.here import Tell, in_turn, once_per_process, overlapped, sendable
from pipeline.errors import CacheError, CacheStale, RegistryError, TeacherError
from pipeline.folder import Folder
from pipeline.networks.by_name import pick_device
from pipeline.networks.windows import Sink, WindowConfig, check_precision, is_out_of_memory
from pipeline.teachers.load import load_teacher
from pipeline.teachers.outputs import OutputsOfCase
from pipeline.teachers.teacher import StreamingTeacher, Teacher, check_finite, slab_log_odds

# What a teacher says, slab by slab on its own grid -> the same on the student grid.

FloatArray = npt.NDArray[np.float32]
_VALUES_AT_ONCE = 4_000_000


class Placement:
    """Takes the logits and features of one case and resamples them, once, as they arrive.

    Of the teacher's channels and of its grid no more than a slab is held: log-odds are formed slab
    by slab and only their rows on the student grid are kept. Voxels outside the teacher's grid are
    NaN.

    Args:
        grid: the student grid of the case.
        entry: which channels mean which organ.
        logits: grid that the logits arrive on.
        features: tap -> grid that its cells arrive on.
        where: teacher and case, named in errors.
    """

    def __init__(
        self,
        grid: Grid,
        entry: TeacherEntry,
        logits: Grid,
        features: Mapping[str, Grid],
        *,
        where: str,
    ) -> None:
        self._entry, self._where = entry, where
        self._outputs = OutputsOfCase(entry, where=where)
        self._odds = {organ: SlabResampler(logits, grid, outside=np.nan) for organ in entry.organs}
        self.strides: Mapping[str, Index3] = {
            tap: feature_stride(cells.spacing_mm, grid.spacing_mm)
            for tap, cells in features.items()
        }
        self._features = {
            tap: SlabResampler(cells, grid.coarsen(self.strides[tap]), outside=np.nan)
            for tap, cells in features.items()
        }

    def put_logits(self, slab: FloatArray) -> None:
        """The next rows, (C, n, H, W).

        Raises:
            TeacherError: NaN or infinite outputs, or channels that disagree with the registry.
        """
        # A few rows at a time: logsumexp takes several times the memory of its input.
        rows = max(1, _VALUES_AT_ONCE // (slab.shape[0] * slab.shape[2] * slab.shape[3]))
        for begin in range(0, slab.shape[1], rows):
            part = slab[:, begin : begin + rows]
            for organ, odds in slab_log_odds(part, self._entry, where=self._where).items():
                self._odds[organ].put(odds)
            self._outputs.put(part)

    @property
    def feature_sinks(self) -> Mapping[str, Sink]:
        """Per tap, what takes the next rows (F, n, h, w); raises as `put_logits` does."""
        return {tap: partial(self._put_feature, tap) for tap in self._features}

    def _put_feature(self, tap: str, slab: FloatArray) -> None:
        check_finite(slab, f"features of {tap}", self._where)
        self._features[tap].put(slab)

    @property
    def log_odds(self) -> Mapping[str, FloatArray]:
        """Organ -> (D, H, W) on the student grid, when all has arrived.

        Raises:
            TeacherError: what has arrived are no logits.
        """
        self._outputs.judge()
        return {organ: slabs.finish().array for organ, slabs in self._odds.items()}

    @property
    def features(self) -> Mapping[str, FloatArray]:
        """Tap -> (F, d, h, w) on the student grid's cells, when all has arrived."""
        return {tap: slabs.finish().array for tap, slabs in self._features.items()}


def feature_stride(cell_mm: Sequence[float], spacing_mm: Sequence[float]) -> Index3:
    """Student-grid voxels per cell: the power of two nearest to the feature's own cell size, so
    that patches of usual sizes lie on whole cells."""
    ratio = np.array(cell_mm) / np.array(spacing_mm)
    z, y, x = (int(2 ** max(0, round(float(np.log2(r))))) for r in ratio)
    return z, y, x


# One unit: what one teacher says of one case, from the CT to the cache.


@dataclass(frozen=True)
class LoadedTeacher:
    """A teacher in memory, and the digest that its units are stored under."""

    teacher: Teacher
    indexed: IndexedTeacher


@dataclass(frozen=True)
class Outputs:
    """What a teacher says of a case on the student grid, as float32 before any rounding.

    Attributes:
        grid: the student grid of the case.
        log_odds: organ -> (D, H, W), NaN where not seen.
        features: tap -> (F, d, h, w), NaN where not seen.
        strides: tap -> student-grid voxels per feature cell.
        seconds: what computing took.
    """

    grid: Grid
    log_odds: Mapping[str, FloatArray]
    features: Mapping[str, FloatArray]
    strides: Mapping[str, Index3]
    seconds: float = 0.0


def open_teacher(
    name: str,
    registry: Registry,
    *,
    window: WindowConfig,
    storage: StorageConfig,
    device: str,
    window_batch: int,
) -> LoadedTeacher:
    """Loads a teacher of the registry and digests all that its numbers depend on.

    Raises:
        TeacherError: see `load_teacher`.
    """
    entry = registry.teachers[name]
    weights = registry.resolve(entry.weights)
    teacher = load_teacher(
        name,
        entry,
        weights,
        window=window,
        batch_size=window_batch,
        device=pick_device(device),
    )
    stamps = stamp_weights(entry, weights)
    inputs = teacher_inputs(
        weights_sha256=digest_of(entry, stamps),
        description=teacher.describe(),
        organs=entry.organs,
        activation=entry.activation,
        outputs=entry.outputs,
        spacing_mm=registry.grid.spacing_mm,
        storage=storage,
    )
    indexed = IndexedTeacher(
        name, digest(inputs), tuple(entry.organs), entry.taps, dict(inputs), stamps
    )
    return LoadedTeacher(teacher, indexed)


@dataclass(frozen=True)
class Seen:
    """A case as a teacher sees it.

    Attributes:
        native: the CT's own grid.
        image: int16 HU at the spacing that the teacher wants.
        seconds: what resampling took.
    """

    native: Grid
    image: Volume
    seconds: float = 0.0


def cache_unit(
    registry: Registry,
    loaded: LoadedTeacher,
    native: Volume,
    case: IndexedCase,
    path: Folder,
    *,
    storage: StorageConfig,
    notes: Mapping[str, Any] | None = None,
) -> int:
    """Runs a teacher on a case and writes what it says on the student grid.

    Args:
        registry: says what its channels mean, and the student grid.
        loaded: the teacher.
        native: the CT on its own grid.
        case: names it.
        path: of the unit.
        storage: how arrays are stored.
        notes: for the receipt.

    Returns:
        Bytes written.

    Raises:
        TeacherError: outputs that cannot be used; nothing is written.
    """
    said = compute_unit(registry, loaded, see(loaded, native, case.name), case)
    return store_unit(loaded, said, case, path, storage=storage, notes=notes)


def see(loaded: LoadedTeacher, native: Volume, where: str) -> Seen:
    """Resamples a CT to the spacing that a teacher wants.

    Raises:
        TeacherError: out of memory.
    """
    began = time.monotonic()
    wanted = loaded.teacher.spacing_mm
    image = native
    if wanted is not None:
        with _memory_errors_named(where):
            image = resample(native, native.grid.with_spacing(wanted), order=1)
    return Seen(native.grid, image, time.monotonic() - began)


def compute_unit(
    registry: Registry, loaded: LoadedTeacher, seen: Seen, case: IndexedCase
) -> Outputs:
    """The network's part of a unit: what a teacher says of a case, on the student grid.

    Raises:
        TeacherError: outputs that cannot be used, or out of memory.
    """
    return _run(registry, loaded, seen, where=f"{loaded.indexed.teacher} x {case.name}")


def store_unit(
    loaded: LoadedTeacher,
    said: Outputs,
    case: IndexedCase,
    path: Folder,
    *,
    storage: StorageConfig,
    notes: Mapping[str, Any] | None = None,
) -> int:
    """Rounds, compresses and writes what a teacher said; returns the bytes written.

    Raises:
        WorkFolderError: the unit cannot be written.
    """
    began = time.monotonic()
    specs = unit_arrays(said, storage)
    claimed = {organ: values > 0 for organ, values in said.log_odds.items()}
    few = coarse(said.grid.spacing_mm)
    taps = {
        tap: {"stride": list(said.strides[tap]), "channels": int(values.shape[0])}
        for tap, values in said.features.items()
    }
    attributes = {
        "case": case.name,
        "teacher": loaded.indexed.teacher,
        "grid": said.grid.to_json(),
        "centres": {o: centres(mask, seed=case.image_sha256) for o, mask in claimed.items()},
        "regions": {
            organ: {"voxels": int(np.count_nonzero(m)), "parts": large_components(m[few])}
            for organ, m in claimed.items()
        },
        "taps": taps,
    }
    inputs = unit_inputs(teacher_digest=loaded.indexed.digest, image_sha256=case.image_sha256)
    receipt = write_unit(
        path,
        specs,
        attributes,
        inputs,
        storage=storage,
        seconds=said.seconds + time.monotonic() - began,
        teacher_inputs=loaded.indexed.inputs,
        notes=notes,
    )
    return receipt.num_bytes


def run_teacher(
    registry: Registry, loaded: LoadedTeacher, native: Volume, *, where: str
) -> Outputs:
    """Runs a teacher on a CT and brings what it says onto the student grid.

    Args:
        registry: says what its channels mean, and the student grid.
        loaded: the teacher.
        native: the CT on its own grid.
        where: teacher and case, named in errors.

    Raises:
        TeacherError: outputs that cannot be used, or out of memory.
    """
    return _run(registry, loaded, see(loaded, native, where), where=where)


def _run(registry: Registry, loaded: LoadedTeacher, seen: Seen, *, where: str) -> Outputs:
    began = time.monotonic()
    grid = seen.native.with_spacing(registry.grid.spacing_mm)
    entry = registry.teachers[loaded.indexed.teacher]
    with _memory_errors_named(where):
        placed = _place(loaded.teacher, seen.image, entry, grid, where)
    seconds = seen.seconds + time.monotonic() - began
    return Outputs(grid, placed.log_odds, placed.features, placed.strides, seconds)


@contextmanager
def _memory_errors_named(where: str) -> Iterator[None]:
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        raise TeacherError(
            f"out of memory, with one window at a time too ({type(error).__name__}).",
            where=where,
            fix="Set a smaller `window.shape`, or free memory of the device; `--device cpu` takes "
            "the machine's memory instead of the GPU's. Taps with many fine cells cost most.",
        ) from error


def _place(
    teacher: Teacher, image: Volume, entry: TeacherEntry, grid: Grid, where: str
) -> Placement:
    if isinstance(teacher, StreamingTeacher):
        cells = {tap: image.grid.coarsen(stride) for tap, stride in teacher.strides.items()}
        placed = Placement(grid, entry, image.grid, cells, where=where)
        teacher.stream(image, logits=placed.put_logits, features=placed.feature_sinks)
        return placed
    prediction = teacher.predict(image)
    cells = {tap: feature.grid for tap, feature in prediction.features.items()}
    placed = Placement(grid, entry, prediction.logits.grid, cells, where=where)
    placed.put_logits(prediction.logits.array)
    for tap, feature in prediction.features.items():
        placed.feature_sinks[tap](feature.array)
    return placed


def unit_arrays(said: Outputs, storage: StorageConfig) -> list[ArraySpec]:
    """The arrays of a unit, rounded as they are stored."""
    log_odds = [log_odds_spec(organ, v, storage) for organ, v in said.log_odds.items()]
    return log_odds + [features_spec(tap, v, storage) for tap, v in said.features.items()]


# The steps of stage one, as the engine takes them: read ahead, work, store behind.


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


# Stage one's work on cases, as every engine does it: the same functions in this process over all
# cases, and in a worker over one. They write to disk and tell in a few words what became of each.

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
