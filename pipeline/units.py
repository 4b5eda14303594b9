"""One unit: what one teacher says of one case, from the CT to the cache."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from pipeline.cache.index import IndexedCase, IndexedTeacher
from pipeline.cache.provenance import teacher_inputs, unit_inputs
from pipeline.cache.schema import ArraySpec, StorageConfig, features_spec, log_odds_spec
from pipeline.cache.store import write_unit
from pipeline.config import digest
from pipeline.data.registry import Registry
from pipeline.data.resample import resample
from pipeline.network import pick_device
from pipeline.patches import Index3
from pipeline.prepare import centres
from pipeline.teachers.load import load_teacher
from pipeline.teachers.sliding_window import WindowConfig
from pipeline.teachers.teacher import Teacher, organ_log_odds
from pipeline.teachers.weights import weights_digest
from pipeline.volume import Grid, Volume

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
    """

    grid: Grid
    log_odds: Mapping[str, FloatArray]
    features: Mapping[str, FloatArray]
    strides: Mapping[str, Index3]


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
    inputs = teacher_inputs(
        weights_sha256=weights_digest(entry, weights),
        description=teacher.describe(),
        organs=entry.organs,
        activation=entry.activation,
        spacing_mm=registry.grid.spacing_mm,
        storage=storage,
    )
    indexed = IndexedTeacher(name, digest(inputs), tuple(entry.organs), entry.taps, dict(inputs))
    return LoadedTeacher(teacher, indexed)


def cache_unit(
    registry: Registry,
    loaded: LoadedTeacher,
    native: Volume,
    case: IndexedCase,
    path: Path,
    *,
    storage: StorageConfig,
) -> int:
    """Runs a teacher on a case and writes what it says on the student grid.

    Args:
        registry: says what its channels mean, and the student grid.
        loaded: the teacher.
        native: the CT on its own grid.
        case: names it.
        path: of the unit.
        storage: how arrays are stored.

    Returns:
        Bytes written.

    Raises:
        TeacherError: outputs that cannot be used; nothing is written.
    """
    began = time.monotonic()
    name = loaded.indexed.teacher
    said = run_teacher(registry, loaded, native, where=f"{name} x {case.name}")
    specs = unit_arrays(said, storage)
    found = {
        organ: centres(values > 0, seed=case.image_sha256)
        for organ, values in said.log_odds.items()
    }
    taps = {
        tap: {"stride": list(said.strides[tap]), "channels": int(values.shape[0])}
        for tap, values in said.features.items()
    }
    attributes = {
        "case": case.name,
        "teacher": name,
        "grid": said.grid.to_json(),
        "centres": found,
        "taps": taps,
    }
    inputs = unit_inputs(teacher_digest=loaded.indexed.digest, image_sha256=case.image_sha256)
    seconds = time.monotonic() - began
    receipt = write_unit(
        path,
        specs,
        attributes,
        inputs,
        storage=storage,
        seconds=seconds,
        teacher_inputs=loaded.indexed.inputs,
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
        TeacherError: outputs that cannot be used.
    """
    grid = native.grid.with_spacing(registry.grid.spacing_mm)
    wanted = loaded.teacher.spacing_mm
    image = native
    if wanted is not None:
        image = resample(native, native.grid.with_spacing(wanted), order=1)
    prediction = loaded.teacher.predict(image)
    entry = registry.teachers[loaded.indexed.teacher]
    log_odds = {
        organ: resample(odds, grid, order=1, outside=np.nan).array
        for organ, odds in organ_log_odds(prediction, entry, where=where).items()
    }
    strides = {
        tap: feature_stride(feature.spacing_mm, grid.spacing_mm)
        for tap, feature in prediction.features.items()
    }
    features = {
        tap: resample(feature, grid.coarsen(strides[tap]), order=1, outside=np.nan).array
        for tap, feature in prediction.features.items()
    }
    return Outputs(grid, log_odds, features, strides)


def unit_arrays(said: Outputs, storage: StorageConfig) -> list[ArraySpec]:
    """The arrays of a unit, rounded as they are stored."""
    log_odds = [log_odds_spec(organ, v, storage) for organ, v in said.log_odds.items()]
    return log_odds + [features_spec(tap, v, storage) for tap, v in said.features.items()]


def feature_stride(cell_mm: Sequence[float], spacing_mm: Sequence[float]) -> tuple[int, int, int]:
    """Student-grid voxels per cell: the power of two nearest to the feature's own cell size, so
    that patches of usual sizes lie on whole cells."""
    ratio = np.array(cell_mm) / np.array(spacing_mm)
    z, y, x = (int(2 ** max(0, round(float(np.log2(r))))) for r in ratio)
    return z, y, x
