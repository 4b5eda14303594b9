"""`cache verify --recompute`: run teachers again on a few units and compare the numbers."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from pipeline.cache.places import find_units
from pipeline.cache.reader import Unit
from pipeline.cache.schema import StorageConfig, differing
from pipeline.data.nifti import read_image
from pipeline.data.patches import WindowConfig
from pipeline.data.registry import Registry
from pipeline.errors import CacheStale, ConfigError, GeometryError, PipelineError
from pipeline.folder import Folder
from pipeline.log import Log, print_table
from pipeline.review.units import Reached, registry_reach
from pipeline.teachers.load import LoadedTeacher, Teachers
from pipeline.teachers.units import run_teacher, unit_arrays

FEATURE_TOLERANCE = 0.05
"""Of the largest magnitude in a tap."""


@dataclass(frozen=True)
class Recomputed:
    """One unit against the same unit made again.

    Attributes:
        log_odds: organ -> largest difference in log-odds.
        features: tap -> largest difference, as a fraction of the largest magnitude in it.
        seen: number of values that one of the two has and the other has not.
        error: why it could not be compared; None if it was.
    """

    unit: str
    log_odds: Mapping[str, float]
    features: Mapping[str, float]
    seen: int = 0
    error: PipelineError | None = None

    def agrees(self, tolerance: float) -> bool:
        """Whether it is the same within a tolerance in log-odds."""
        return (
            self.error is None
            and self.seen == 0
            and max(self.log_odds.values(), default=0.0) <= tolerance
            and max(self.features.values(), default=0.0) <= FEATURE_TOLERANCE
        )

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return {
            "unit": self.unit,
            "log_odds": self.log_odds,
            "features": self.features,
            "seen_differs": self.seen,
            "error": None if self.error is None else str(self.error),
        }


def recompute(
    work: Folder,
    registry: Registry,
    *,
    sample: int,
    seed: int,
    device: str,
    window_batch: int,
    log: Log,
) -> list[Recomputed]:
    """Runs teachers again, through the code of stage one and with the settings that the units were
    made with, and compares after the same rounding. Nothing is written.

    Args:
        registry: read with its files: images and weights must be here.
        sample: how many teacher units, drawn from those that the registry leads to.
        device: auto, cpu, cuda, cuda:1; only on the device that made a unit are all bits the same.

    Raises:
        CacheStale: a teacher that is no longer what made its units.
        ConfigError: there is no unit to draw from.
    """
    there = {place.path for place in find_units(work)}
    units = [
        (path, unit)
        for path, unit in registry_reach(work, registry).units.items()
        if unit.teacher is not None and path in there
    ]
    if not units:
        raise ConfigError(
            "the registry leads to no teacher unit that could be made again.",
            where=work,
            fix="Run `pipeline cache-teachers` with this registry first.",
        )
    drawn = random.Random(seed).sample(units, min(sample, len(units)))
    found: list[Recomputed] = []
    loaded: LoadedTeacher | None = None
    with log.progress("units made again", len(drawn)) as advance:
        # Teacher by teacher, so that each is loaded once.
        for path, unit in sorted(drawn, key=lambda item: str(item[0])):
            assert unit.teacher is not None
            if loaded is None or loaded.indexed.teacher != unit.teacher.teacher:
                loaded = _load(registry, unit, device, window_batch)
            try:
                found.append(_compare(registry, loaded, path, unit))
            except PipelineError as error:
                found.append(Recomputed(unit.name, {}, {}, error=error))
            advance(unit.name)
    return found


def print_recomputed(found: Sequence[Recomputed], tolerance: float) -> None:
    """One row per unit, for people."""
    rows = []
    for one in found:
        odds = max(one.log_odds.values(), default=0.0)
        features = max(one.features.values(), default=0.0)
        numbers = ["–", "–"] if one.error else [f"{odds:g}", f"{features:g}"]
        verdict = "agrees" if one.agrees(tolerance) else str(one.error or "DIFFERS")
        rows.append([one.unit, *numbers, str(one.seen), verdict])
    columns = ["unit", "log-odds", "features", "seen by one", f"tolerance {tolerance:g}"]
    print_table("Made again: largest differences", columns, rows)


def _load(registry: Registry, unit: Reached, device: str, window_batch: int) -> LoadedTeacher:
    """The teacher, run as the index says it was."""
    assert unit.teacher is not None
    name, inputs = unit.teacher.teacher, unit.teacher.inputs
    window = WindowConfig.model_validate(inputs["teacher"].get("window") or {})
    storage = StorageConfig.model_validate(inputs["storage"])
    loaded = Teachers(registry, window, storage, device, window_batch).open(name)
    if loaded.indexed.digest != unit.teacher.digest:
        lines = differing(inputs, loaded.indexed.inputs)
        raise CacheStale(
            f"it is no longer the teacher that its units were made by: {'; '.join(lines)}.",
            where=f"teacher {name}",
            fix="Run `pipeline cache-teachers`: it makes the units of the new one.",
        )
    return loaded


def _compare(registry: Registry, loaded: LoadedTeacher, path: Folder, unit: Reached) -> Recomputed:
    stored = Unit.open(path, expect=unit.digest)
    sources = {source.case: source for source in registry.cases(unit.case.dataset)}
    if unit.case.case not in sources:
        raise GeometryError(
            "its files are no longer there.",
            where=f"{unit.case.name}, {registry.path}",
            fix="Put them back, or run `pipeline cache-teachers`, which goes by what is there.",
        )
    image = read_image(sources[unit.case.case].image)
    if image.sha256 != unit.case.image_sha256:
        raise GeometryError(
            "the image is another one than the unit was made from.",
            where=f"{unit.case.name}, {image.path}",
            fix="Run `pipeline cache-teachers`: it makes the unit of this one.",
        )
    said = run_teacher(registry, loaded, image.volume, where=unit.name)
    storage = StorageConfig.model_validate(loaded.indexed.inputs["storage"])
    log_odds, features, seen = {}, {}, 0
    for spec in unit_arrays(said, storage):
        kind, name = spec.name.split("/", 1)
        difference, largest, unlike = _difference(stored.read(spec.name), spec.values)
        seen += unlike
        if kind == "log_odds":
            log_odds[name] = difference
        else:
            features[name] = difference / largest if largest else difference
    return Recomputed(unit.name, log_odds, features, seen)


def _difference(old: npt.NDArray[Any], new: npt.NDArray[Any]) -> tuple[float, float, int]:
    """Largest difference, largest magnitude, and how many values only one of the two has."""
    if old.shape != new.shape:
        return float("inf"), 1.0, int(old.size)
    seen_old, seen_new = ~np.isnan(old), ~np.isnan(new)
    both = seen_old & seen_new
    a, b = old[both].astype(np.float64), new[both].astype(np.float64)
    difference = float(np.abs(a - b).max(initial=0.0))
    return difference, float(np.abs(a).max(initial=0.0)), int(np.sum(seen_old != seen_new))
