"""One unit: what one teacher says of one case, from the CT to the cache."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from pipeline.cache.index import IndexedCase, IndexedTeacher
from pipeline.cache.provenance import teacher_inputs, unit_inputs
from pipeline.cache.schema import ArraySpec, StorageConfig, features_spec, log_odds_spec
from pipeline.cache.store import write_unit
from pipeline.config import digest, file_sha256
from pipeline.data.registry import Registry
from pipeline.data.resample import resample
from pipeline.network import pick_device
from pipeline.prepare import centres
from pipeline.teachers.load import load_teacher
from pipeline.teachers.sliding_window import WindowConfig
from pipeline.teachers.teacher import Teacher, organ_log_odds
from pipeline.volume import Volume


@dataclass(frozen=True)
class LoadedTeacher:
    """A teacher in memory, and the digest that its units are stored under."""

    teacher: Teacher
    indexed: IndexedTeacher


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
        weights_sha256=file_sha256(weights),
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
    num_centres: int,
) -> int:
    """Runs a teacher on a case and writes what it says on the student grid.

    Args:
        registry: says what its channels mean, and the student grid.
        loaded: the teacher.
        native: the CT on its own grid.
        case: names it.
        path: of the unit.
        storage: how arrays are stored.
        num_centres: voxels stored per organ region, to centre patches on.

    Returns:
        Bytes written.

    Raises:
        TeacherError: outputs that cannot be used; nothing is written.
    """
    began = time.monotonic()
    name = loaded.indexed.teacher
    unit = f"{name} x {case.name}"
    grid = native.grid.with_spacing(registry.grid.spacing_mm)
    wanted = loaded.teacher.spacing_mm
    image = native
    if wanted is not None:
        image = resample(native, native.grid.with_spacing(wanted), order=1)
    prediction = loaded.teacher.predict(image)
    specs: list[ArraySpec] = []
    found = {}
    for organ, odds in organ_log_odds(prediction, registry.teachers[name], where=unit).items():
        values = resample(odds, grid, order=1, outside=np.nan).array
        specs.append(log_odds_spec(organ, values, storage))
        found[organ] = centres(values > 0, num_centres, seed=case.image_sha256)
    taps = {}
    for tap, feature in prediction.features.items():
        stride = feature_stride(feature.spacing_mm, grid.spacing_mm)
        values = resample(feature, grid.coarsen(stride), order=1, outside=np.nan).array
        specs.append(features_spec(tap, values, storage))
        taps[tap] = {"stride": list(stride), "channels": int(values.shape[0])}
    attributes = {
        "case": case.name,
        "teacher": name,
        "grid": grid.to_json(),
        "centres": found,
        "taps": taps,
    }
    inputs = unit_inputs(teacher_digest=loaded.indexed.digest, image_sha256=case.image_sha256)
    seconds = time.monotonic() - began
    receipt = write_unit(path, specs, attributes, inputs, storage=storage, seconds=seconds)
    return receipt.num_bytes


def feature_stride(cell_mm: Sequence[float], spacing_mm: Sequence[float]) -> tuple[int, int, int]:
    """Student-grid voxels per cell: the power of two nearest to the feature's own cell size, so
    that patches of usual sizes lie on whole cells."""
    ratio = np.array(cell_mm) / np.array(spacing_mm)
    z, y, x = (int(2 ** max(0, round(float(np.log2(r))))) for r in ratio)
    return z, y, x
