"""Units: what one teacher says of one case, from the CT to the cache; and the steps of stage one
that make them.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from pipeline.cache.cases import centres
from pipeline.cache.index import IndexedCase, IndexedTeacher, unit_digest, unit_path
from pipeline.cache.receipt import read_receipt
from pipeline.cache.schema import (
    ArraySpec,
    StorageConfig,
    feature_moments,
    features_spec,
    log_odds_spec,
    unit_inputs,
)
from pipeline.cache.store import Made, write_unit
from pipeline.data.entries import CaseFiles, TeacherEntry
from pipeline.data.nifti import read_image
from pipeline.data.patches import Index3
from pipeline.data.registry import Registry
from pipeline.data.resample import SlabResampler, resample
from pipeline.data.volume import Grid, Volume, coarse, large_components
from pipeline.errors import CacheError, CacheStale, RegistryError, TeacherError, named
from pipeline.folder import Folder
from pipeline.teachers.load import LoadedTeacher, Teachers
from pipeline.teachers.outputs import OutputsOfCase
from pipeline.teachers.teacher import StreamingTeacher, check_finite, slab_log_odds, tap_agreement

if TYPE_CHECKING:
    from pipeline.networks.windows import Sink

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
        logits: grid that the logits arrive on.
        features: tap -> grid that its cells arrive on.
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
class Outputs:
    """What a teacher says of a case on the student grid, as float32 before any rounding.

    Attributes:
        grid: the student grid of the case.
        log_odds: organ -> (D, H, W), NaN where not seen.
        features: tap -> (F, d, h, w), NaN where not seen.
        strides: tap -> student-grid voxels per feature cell.
        agreement: tap -> see `tap_agreement`, where it was measured.
    """

    grid: Grid
    log_odds: Mapping[str, FloatArray]
    features: Mapping[str, FloatArray]
    strides: Mapping[str, Index3]
    seconds: float = 0.0
    agreement: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class TeacherImage:
    """A case as a teacher sees it.

    Attributes:
        native: the CT's own grid.
        image: int16 HU at the spacing that the teacher wants.
    """

    native: Grid
    image: Volume
    seconds: float = 0.0


def run_teacher(
    registry: Registry, loaded: LoadedTeacher, native: Volume, *, where: str
) -> Outputs:
    """Runs a teacher on a CT, on its own grid, and brings its outputs onto the student grid.

    Raises:
        TeacherError: outputs that cannot be used, or out of memory.
    """
    return compute_unit(registry, loaded, teacher_image(loaded, native, where), where)


def teacher_image(loaded: LoadedTeacher, native: Volume, where: str) -> TeacherImage:
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
    return TeacherImage(native.grid, image, time.monotonic() - began)


def compute_unit(
    registry: Registry, loaded: LoadedTeacher, seen: TeacherImage, where: str
) -> Outputs:
    """The network's part of a unit: a teacher's outputs for a case, on the student grid; errors
    name `where`.

    Raises:
        TeacherError: outputs that cannot be used, or out of memory.
    """
    began = time.monotonic()
    teacher, image = loaded.teacher, seen.image
    entry = registry.teachers[loaded.indexed.teacher]
    grid = seen.native.with_spacing(registry.grid.spacing_mm)
    with named(where), _memory_errors_named(where):
        if isinstance(teacher, StreamingTeacher):
            cells = {tap: image.grid.coarsen(stride) for tap, stride in teacher.strides.items()}
            placed = Placement(grid, entry, image.grid, cells, where=where)
            teacher.stream(image, logits=placed.put_logits, features=placed.feature_sinks)
        else:
            prediction = teacher.predict(image)
            cells = {tap: feature.grid for tap, feature in prediction.features.items()}
            placed = Placement(grid, entry, prediction.logits.grid, cells, where=where)
            placed.put_logits(prediction.logits.array)
            for tap in cells:
                placed.feature_sinks[tap](prediction.features[tap].array)
            del prediction  # before the outputs on the student grid are put together
    log_odds, features = placed.log_odds, placed.features
    seconds = seen.seconds + time.monotonic() - began
    return Outputs(grid, log_odds, features, placed.strides, seconds)


@contextmanager
def _memory_errors_named(where: str) -> Iterator[None]:
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        from pipeline.networks.windows import is_out_of_memory

        if not is_out_of_memory(error):
            raise
        raise TeacherError(
            f"out of memory, with one window at a time too ({type(error).__name__}).",
            where=where,
            fix="Set a smaller `window.shape`, or free memory of the device; `--device cpu` takes "
            "the machine's memory instead of the GPU's. Taps with many fine cells cost most.",
        ) from error


def store_unit(
    loaded: LoadedTeacher,
    outputs: Outputs,
    case: IndexedCase,
    path: Folder,
    *,
    storage: StorageConfig,
    notes: Mapping[str, Any] | None = None,
) -> int:
    """Rounds, compresses and writes a teacher's outputs; returns the bytes written.

    Raises:
        WorkFolderError: the unit cannot be written.
    """
    began = time.monotonic()
    specs = unit_arrays(outputs, storage)
    claimed = {organ: values > 0 for organ, values in outputs.log_odds.items()}
    few = coarse(outputs.grid.spacing_mm)
    taps = {
        tap: {
            "stride": list(outputs.strides[tap]), "channels": len(values),
            **feature_moments(values),
            **({"agreement": outputs.agreement[tap]} if tap in outputs.agreement else {}),
        }
        for tap, values in outputs.features.items()
    }  # fmt: skip
    attributes = {
        "case": case.name,
        "teacher": loaded.indexed.teacher,
        "grid": outputs.grid.to_json(),
        "centres": {o: centres(mask, seed=case.image_sha256) for o, mask in claimed.items()},
        "regions": {
            organ: {"voxels": int(np.count_nonzero(m)), "parts": large_components(m[few])}
            for organ, m in claimed.items()
        },
        "taps": taps,
    }
    inputs = unit_inputs(teacher_digest=loaded.indexed.digest, image_sha256=case.image_sha256)
    seconds = outputs.seconds + time.monotonic() - began
    made = Made(seconds, loaded.indexed.inputs, notes or {})
    return write_unit(path, specs, attributes, inputs, storage=storage, made=made).num_bytes


def unit_arrays(outputs: Outputs, storage: StorageConfig) -> list[ArraySpec]:
    """The arrays of a unit, rounded as they are stored."""
    log_odds = [log_odds_spec(organ, v, storage) for organ, v in outputs.log_odds.items()]
    return log_odds + [features_spec(tap, v, storage) for tap, v in outputs.features.items()]


# Stage one's steps, as every engine takes them.


@dataclass(frozen=True)
class TeacherUnit:
    """One teacher on one case."""

    teacher: str
    case: IndexedCase
    source: CaseFiles

    @property
    def name(self) -> str:
        """As reports and messages name it."""
        return f"{self.teacher} x {self.case.name}"


@dataclass(frozen=True)
class StoredUnit:
    """A unit that is in the cache.

    Attributes:
        num_bytes: written; None: it was there already.
        damage: what was wrong with the one that it replaces.
    """

    num_bytes: int | None
    damage: str = ""


@dataclass
class TeacherOnCase:
    """The steps (`engine.Steps`) of a unit. Units of one case come one after the other, and its CT
    is read once for all. Whether a unit is there is looked at shortly before its turn, since
    another process may be making it.

    Attributes:
        teachers: that are run; with what they are run on and how their outputs are stored.
        known: the same teachers, as the run that these steps are of began with them.
        notes: teacher -> what its receipts note.
        dry_run: write nothing; what is missing counts as made.
    """

    work: Folder
    teachers: Teachers
    known: Mapping[str, IndexedTeacher]
    notes: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    dry_run: bool = False
    _case: IndexedCase | None = field(default=None, init=False)
    _native: Volume | None = field(default=None, init=False)
    _damage: dict[str, str] = field(default_factory=dict, init=False)

    def group(self, unit: TeacherUnit) -> str:
        """`dataset/case`."""
        return unit.case.name

    def read(self, unit: TeacherUnit) -> TeacherImage | StoredUnit:
        """The CT at the teacher's spacing, unless there is nothing to do.

        Raises:
            RegistryError: the image is no longer the one that was digested.
            GeometryError: it cannot be read.
            CacheStale: the teacher is not the one that the run began with.
        """
        try:
            read_receipt(self._path(unit), expect=unit_digest(self.known[unit.teacher], unit.case))
            return StoredUnit(None)
        except CacheError as error:
            if self._path(unit).exists():
                self._damage[unit.name] = str(error)
        if self.dry_run:
            return StoredUnit(0, self._damage.pop(unit.name, ""))
        if unit.case != self._case:
            self._native = None  # before the next one is read: not two of them in memory
            self._case = unit.case
        self._native = self._native or _read_again(unit.source, unit.case)
        return teacher_image(self._loaded(unit.teacher), self._native, unit.name)

    def compute(self, unit: TeacherUnit, seen: TeacherImage | StoredUnit) -> Outputs | StoredUnit:
        """See `compute_unit`; of a teacher with taps, one patch more tells how far they agree with
        themselves."""
        if isinstance(seen, StoredUnit):
            return seen
        loaded = self._loaded(unit.teacher)
        outputs = compute_unit(self.teachers.registry, loaded, seen, unit.name)
        cells = {
            tap: Volume(values, outputs.grid.coarsen(outputs.strides[tap]))
            for tap, values in outputs.features.items()
        }
        seed, window = int(unit.case.image_sha256[:8], 16), self.teachers.window.shape
        agreement = tap_agreement(loaded.teacher, seen.image, cells, window, seed=seed)
        return replace(outputs, agreement=agreement)

    def store(self, unit: TeacherUnit, outputs: Outputs | StoredUnit) -> StoredUnit:
        """See `store_unit`."""
        if isinstance(outputs, StoredUnit):
            return outputs
        num_bytes = store_unit(
            self._loaded(unit.teacher), outputs, unit.case, self._path(unit),
            storage=self.teachers.storage, notes=self.notes.get(unit.teacher),
        )  # fmt: skip
        return StoredUnit(num_bytes, self._damage.pop(unit.name, ""))

    def _path(self, unit: TeacherUnit) -> Folder:
        return unit_path(self.work, self.known[unit.teacher], unit.case)

    def _loaded(self, name: str) -> LoadedTeacher:
        loaded = self.teachers.loaded[name]
        if loaded.indexed.digest != self.known[name].digest:
            registry = self.teachers.registry
            raise CacheStale(
                f"teacher {name} is not the one that this run began with.",
                where=registry.resolve(registry.teachers[name].weights),
                fix="Every machine must see the same weights and packages; nothing may change "
                "them while a run goes on.",
            )
        return loaded


def _read_again(source: CaseFiles, case: IndexedCase) -> Volume:
    image = read_image(source.image)
    if image.sha256 != case.image_sha256:
        raise RegistryError(
            "the image changed while this stage was running.",
            where=f"{source.name}, {source.image}",
            fix="Let nothing write to the dataset, then run the stage again.",
        )
    return image.volume


def is_there(work: Folder, teacher: IndexedTeacher, case: IndexedCase) -> bool:
    """Whether the unit of a teacher for a case is in the cache, by its receipt."""
    try:
        read_receipt(unit_path(work, teacher, case), expect=unit_digest(teacher, case))
    except CacheError:
        return False
    return True
