"""One unit: what one teacher says of one case, from the CT to the cache."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from pipeline.cache.index import IndexedCase, IndexedTeacher
from pipeline.cache.provenance import teacher_inputs, unit_inputs
from pipeline.cache.schema import ArraySpec, StorageConfig, features_spec, log_odds_spec
from pipeline.cache.store import write_unit
from pipeline.components import coarse, large_components
from pipeline.config import digest
from pipeline.data.registry import Registry
from pipeline.data.resample import resample
from pipeline.errors import TeacherError
from pipeline.folder import Folder
from pipeline.network import pick_device
from pipeline.patches import Index3
from pipeline.placement import Placement
from pipeline.prepare import centres
from pipeline.teacher_entry import TeacherEntry
from pipeline.teachers.load import load_teacher
from pipeline.teachers.sliding_window import WindowConfig
from pipeline.teachers.teacher import StreamingTeacher, Teacher
from pipeline.teachers.window_passes import is_out_of_memory
from pipeline.volume import Grid, Volume
from pipeline.weights import digest_of, stamp_weights

FloatArray = npt.NDArray[np.float32]


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
