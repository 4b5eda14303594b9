"""The demo's cohort with its cache, to measure training steps on: made once per folder."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import yaml

from pipeline.cli.demo import generate_phantoms, write_settings
from pipeline.config import load_config
from pipeline.data.registry import Registry, load_registry
from pipeline.engine.here import Execution
from pipeline.log import Log
from pipeline.student.speed import TrainingExecution
from stages import cache_teachers, train_teachers
from stages.report import Scope

DEMO_MM = (6.0, 6.0, 6.0)


def cached_cohort(folder: Path, spacing_mm: Sequence[float] = DEMO_MM) -> Registry:
    """Phantoms, four trained teachers and their cache in `folder / "work"`; what is there is kept.

    Trained, not random, teachers: their log-odds decide how well chunks compress and how often an
    exponential underflows, and so what a step costs.

    Args:
        folder: one per spacing.
        spacing_mm: of the student grid and of the teachers.
    """
    log = Log()
    path = folder / "data_registry.yaml"
    if not path.exists():
        write_settings(folder, quick=False)
        data = yaml.safe_load(path.read_text(encoding="utf-8"))
        data["grid"]["spacing_mm"] = list(spacing_mm)
        data["admission"]["dice"] = 0.0
        for entry in data["teachers"].values():
            entry["spacing_mm"] = list(spacing_mm)
        path.write_text(yaml.safe_dump(data, sort_keys=False), encoding="utf-8")
    assert not generate_phantoms(load_registry(path, files=False), log).failed
    registry = load_registry(path)
    assert tuple(registry.grid.spacing_mm) == tuple(spacing_mm), "name another folder"
    teachers = train_teachers.run(
        load_config(folder / "train_teachers.yaml", train_teachers.TrainTeachersConfig),
        Scope(registry, folder / "work", log), TrainingExecution(device="cpu"),
    )  # fmt: skip
    assert teachers.exit_code == 0, teachers.failed
    cached = cache_teachers.run(
        load_config(folder / "cache_teachers.yaml", cache_teachers.CacheTeachersConfig),
        Scope(registry, folder / "work", log, tables=False),
        Execution(device="cpu", window_batch=4, force=True),
    )
    assert cached.exit_code == 0, cached.failed
    return registry
