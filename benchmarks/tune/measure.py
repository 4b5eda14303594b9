"""Bytes against error and speed, for the storage settings on offer."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import zarr
from zarr.core.buffer.cpu import Buffer
from zarr.storage import MemoryStore

from benchmarks.tune.encodings import (
    Encoding,
    FloatArray,
    feature_encodings,
    log_odds_encodings,
    rounded,
)
from benchmarks.tune.loss import KL, TEMPERATURES, FeatureError, flips
from pipeline.cache.schema import SPATIAL, ArraySpec, StorageConfig
from pipeline.cache.shards import encode_array
from pipeline.data.nifti import read_image
from pipeline.data.patches import WindowConfig
from pipeline.data.registry import Registry
from pipeline.data.sizes import case_sizes, two_cases
from pipeline.errors import RegistryError
from pipeline.log import Log
from pipeline.teachers.load import Teachers
from pipeline.teachers.units import Outputs, run_teacher

_CHUNKS = (32, 64, 128)
_LEVELS = (1, 3)
ByTeacher = Mapping[str, Outputs]


@dataclass(frozen=True)
class Setting:
    """One way to store, on offer or to compare with."""

    encoding: Encoding
    chunk: int
    zstd_level: int
    shipped: bool

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return {
            "stored_as": self.encoding.name,
            "bits": self.encoding.bits,
            "chunk": self.chunk,
            "zstd_level": self.zstd_level,
            "configured": self.shipped,
        }


@dataclass
class Cost:
    """Bytes and CPU seconds of writing and reading back, summed over arrays."""

    num_values: int = 0
    num_voxels: int = 0
    num_bytes: int = 0
    encode_s: float = 0.0
    decode_s: float = 0.0

    def to_json(self) -> dict[str, Any]:
        """Bytes per value and per voxel of the student grid; millions of values per CPU second."""
        return {
            "bytes_per_value": round(self.num_bytes / max(1, self.num_values), 4),
            "bytes_per_voxel": round(self.num_bytes / max(1, self.num_voxels), 4),
            "encode_mvalues_per_cpu_s": round(self.num_values / 1e6 / max(1e-9, self.encode_s), 1),
            "decode_mvalues_per_cpu_s": round(self.num_values / 1e6 / max(1e-9, self.decode_s), 1),
        }


@dataclass(frozen=True)
class Tuning:
    """The tables.

    Attributes:
        cases: name -> shape on the student grid.
        log_odds: one row per setting; bytes and error are per organ of a teacher.
        features: likewise, per tap.
    """

    cases: Mapping[str, Sequence[int]]
    log_odds: Sequence[Mapping[str, Any]]
    features: Sequence[Mapping[str, Any]]

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return {
            "cases": {name: list(shape) for name, shape in self.cases.items()},
            "log_odds": list(self.log_odds),
            "features": list(self.features),
        }


@dataclass
class _Totals:
    """What one setting costs and loses, summed over cases and teachers."""

    setting: Setting
    cost: Cost = field(default_factory=Cost)
    kl: KL = field(default_factory=KL)
    error: FeatureError = field(default_factory=FeatureError)
    argmax_flips: int = 0
    region_flips: int = 0

    def add_log_odds(self, said: ByTeacher) -> None:
        """All teachers' log-odds of one case."""
        exact: dict[str, list[FloatArray]] = {}
        stored: dict[str, list[FloatArray]] = {}
        for outputs in said.values():
            for organ, values in outputs.log_odds.items():
                back = _store_and_read(self.cost, self.setting, values, SPATIAL, values.size)
                self.kl.add(values, back)
                exact.setdefault(organ, []).append(values)
                stored.setdefault(organ, []).append(back)
        argmax, regions = flips(exact, stored)
        self.argmax_flips += argmax
        self.region_flips += regions

    def add_features(self, said: ByTeacher) -> None:
        """All teachers' features of one case."""
        axes = ("feature", *SPATIAL)
        for outputs in said.values():
            voxels = math.prod(outputs.grid.shape)
            for values in outputs.features.values():
                back = _store_and_read(self.cost, self.setting, values, axes, voxels)
                self.error.add(values, back)

    def log_odds_row(self) -> dict[str, Any]:
        """One row of the table."""
        return {
            **self.setting.to_json(),
            **self.cost.to_json(),
            "seen": round(self.kl.num_voxels / max(1, self.cost.num_values), 3),
            "mean_kl": {str(t): self.kl.mean(t) for t in TEMPERATURES},
            "largest_kl": self.kl.largest,
            "argmax_flips": self.argmax_flips,
            "region_flips": self.region_flips,
        }

    def features_row(self) -> dict[str, Any]:
        """One row of the table."""
        errors = {
            "rms_error": self.error.rms,
            "largest_error": self.error.largest,
            "mean_cosine_distance": self.error.mean_cosine,
        }
        return {**self.setting.to_json(), **self.cost.to_json(), **errors}


def tune(
    registry: Registry,
    *,
    splits: Sequence[str],
    window: WindowConfig,
    storage: StorageConfig,
    log: Log,
    device: str = "auto",
    window_batch: int = 1,
) -> Tuning:
    """Runs every teacher on two cases and stores what they say in every way on offer, in memory.

    Args:
        registry: read with its files.
        splits: cases of other splits are left out.
        window: how teachers run.
        storage: the configured setting; one thing at a time is varied around it.
        log: where progress goes.
        device: auto, cpu, cuda, cuda:1.
        window_batch: windows per forward pass.

    Raises:
        PipelineError: no case or teacher, or one that cannot be read, loaded or run.
    """
    if not registry.teachers:
        raise RegistryError(
            "no teacher is named, so there is nothing to store.",
            where=registry.path,
            fix="Name teachers in the registry first.",
        )
    teachers = Teachers(registry, window, storage, device, window_batch).loaded
    log_odds = _settings(log_odds_encodings(), storage, storage.log_odds_bits)
    features = _settings(feature_encodings(), storage, storage.feature_bits)
    chosen = two_cases(case_sizes(registry, splits)[0])
    steps = len(chosen) * (len(teachers) + len(log_odds) + len(features))
    with log.progress("tune", steps) as advance:
        for case in chosen:
            said = {}
            native = read_image(case.source.image).volume
            for name, loaded in teachers.items():
                unit = f"{name} x {case.source.name}"
                said[name] = run_teacher(registry, loaded, native, where=unit)
                advance(unit)
            for totals in log_odds:
                totals.add_log_odds(said)
                advance(totals.setting.encoding.name)
            for totals in features:
                totals.add_features(said)
                advance(totals.setting.encoding.name)
    return Tuning(
        {case.source.name: case.grid.shape for case in chosen},
        [totals.log_odds_row() for totals in log_odds],
        [totals.features_row() for totals in features if totals.cost.num_values],
    )


def _settings(encodings: Sequence[Encoding], storage: StorageConfig, bits: int) -> list[_Totals]:
    """Every encoding at the configured chunk and level; then the configured one at the others."""
    shipped = next((e for e in encodings if e.bits == bits), rounded(bits))
    chosen = list(encodings) if shipped in encodings else [*encodings, shipped]
    around = [(chunk, storage.zstd_level) for chunk in _CHUNKS if chunk != storage.chunk]
    around += [(storage.chunk, level) for level in _LEVELS if level != storage.zstd_level]
    settings = [Setting(e, storage.chunk, storage.zstd_level, e is shipped) for e in chosen]
    settings += [Setting(shipped, chunk, level, False) for chunk, level in around]
    return [_Totals(setting) for setting in settings]


def _store_and_read(
    cost: Cost, setting: Setting, values: FloatArray, axes: tuple[str, ...], voxels: int
) -> FloatArray:
    storage = StorageConfig(chunk=setting.chunk, zstd_level=setting.zstd_level)
    began = time.process_time()  # of all threads: other users of a shared machine do not count
    encoded, scale = setting.encoding.encode(values)
    fill = float("nan") if encoded.dtype.kind == "f" else 0
    files = encode_array(ArraySpec("values", encoded, axes, fill), storage)
    written = time.process_time()
    stored = MemoryStore({n: Buffer.from_bytes(data) for n, data in files.items()})
    array: Any = zarr.open_array(stored, path="values", mode="r")
    back = setting.encoding.decode(np.asarray(array[...]), scale)
    cost.encode_s += written - began
    cost.decode_s += time.process_time() - written
    cost.num_bytes += sum(len(data) for name, data in files.items() if "/c/" in name)
    cost.num_values += values.size
    cost.num_voxels += voxels
    return back
