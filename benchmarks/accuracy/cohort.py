"""Phantoms, teachers and cache of one job; what is there is kept, so a kill costs little."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml

from benchmarks.accuracy.recall import measure_teachers
from benchmarks.accuracy.regimes import Regime, drawn_seed
from benchmarks.accuracy.registries import phantoms, registries
from benchmarks.accuracy.size import Size
from pipeline.cache.store import write_json
from pipeline.data.phantom.case import write_dataset
from pipeline.data.registry import Registry, load_registry
from pipeline.engine.here import Execution, Here
from pipeline.errors import ConfigError, PipelineError, Stopped
from pipeline.log import Log
from pipeline.student.speed import TrainingExecution
from stages import cache_teachers, train_teachers
from stages.report import Scope, StageReport

COHORT = "cohort.json"  # written last
_TAUGHT = "teachers.json"
_SECONDS = "seconds.json"
_OF_STUDENTS = ("short_steps", "long_steps", "draws")


def network_settings(size: Size, wider: int = 1) -> dict[str, Any]:
    """The demo's network, for teachers and students; `wider`: times its channels."""
    strides = [2] * (len(size.channels) - 1)
    args = {"channels": [wider * n for n in size.channels], "strides": strides, "num_res_units": 0}
    return {"name": "UNet", "args": {**args, "norm": "instance"}}


def make_cohort(folder: Path, regime: Regime, size: Size, seed: int, log: Log) -> None:
    """Fills a job's folder up to the cache, and measures the teachers.

    Raises:
        ConfigError: the folder holds a job of other numbers.
        PipelineError: a stage failed; the message says what.
    """
    _settle(folder, regime, size, seed)
    made = phantoms(regime, size, seed)
    with _timed(folder, "phantoms"), log.progress("phantoms", len(made)) as advance:
        for name, spec in made.items():
            write_dataset(folder / "phantom" / name, spec)
            advance(name)
    with _timed(folder, "teachers"):
        _train_teachers(folder, regime, size, seed, log)
    with _timed(folder, "cache"):
        for name in ("student", "full", "test"):
            _cached(folder / f"{name}_registry.yaml", size, log)
    write_json(folder / COHORT, {"teachers": measure_teachers(folder), "seconds": _seconds(folder)})


def next_generation(folder: Path, student: Path, size: Size, log: Log) -> Registry:
    """The student's registry with one teacher more, a student of all organs; its words are cached.

    Args:
        folder: of a job.
        student: a student.pt in it.
        size: of everything.
        log: where progress goes.
    """
    content = yaml.safe_load((folder / "student_registry.yaml").read_text(encoding="utf-8"))
    content["teachers"]["student"] = {
        "kind": "student",
        "weights": student.relative_to(folder).as_posix(),
        "organs": dict(content["organs"]),
    }
    place = folder / f"next_{student.parent.name}_registry.yaml"
    place.write_text(yaml.safe_dump(content, sort_keys=False), encoding="utf-8")
    return _cached(place, size, log)


def _cached(place: Path, size: Size, log: Log) -> Registry:
    """Runs stage one on what a registry says."""
    window = {"shape": list(size.patch), "overlap": 0.5}
    store = cache_teachers.CacheTeachersConfig.model_validate({"window": window})
    registry = load_registry(place)
    raise_failed(
        cache_teachers.run(
            store, Scope(registry, place.parent / "work", log, tables=False),
            Execution(engine=Here(overlap=False), device="cpu", window_batch=4),
        )
    )  # fmt: skip
    return registry


@contextmanager
def _timed(folder: Path, part: str) -> Iterator[None]:
    """Adds CPU seconds to those of the part in earlier calls that were stopped, not to those of a
    cohort that is whole."""
    began = time.process_time()
    try:
        yield
    finally:
        if read_cohort(folder) is None:
            spent = _seconds(folder)
            spent[part] = round(spent.get(part, 0.0) + time.process_time() - began, 2)
            write_json(folder / _SECONDS, spent)


def _seconds(folder: Path) -> dict[str, float]:
    try:
        found: dict[str, float] = json.loads((folder / _SECONDS).read_text(encoding="utf-8"))
    except FileNotFoundError:  # a cohort of an earlier version has them in its record
        return dict((read_cohort(folder) or {"seconds": {}})["seconds"])
    return found


def read_cohort(folder: Path) -> dict[str, Any] | None:
    """What `make_cohort` found; None if it has not finished."""
    try:
        found: dict[str, Any] = json.loads((folder / COHORT).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    return found


def _settle(folder: Path, regime: Regime, size: Size, seed: int) -> None:
    """Writes registries and what the job is; refuses a folder of another job."""
    identity = {
        "regime": regime.to_json(),
        "size": size.to_json(),
        "seed": seed,
        "phantoms": {n: s.model_dump(mode="json") for n, s in phantoms(regime, size, seed).items()},
    }
    plain = json.loads(json.dumps(identity))
    path = folder / "job.json"
    if path.exists() and _of_cohort(json.loads(path.read_text(encoding="utf-8"))) != _of_cohort(
        plain
    ):
        raise ConfigError(
            "this folder was made with other numbers of the regime or of sizes.",
            where=path,
            fix="Name another FOLDER, or remove this job's.",
        )
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in registries(regime, size).items():
        text = yaml.safe_dump(content, sort_keys=False)
        (folder / f"{name}_registry.yaml").write_text(text, encoding="utf-8")
    write_json(path, plain)


def _of_cohort(identity: Mapping[str, Any]) -> dict[str, Any]:
    """Without what no phantom, teacher or unit depends on."""
    size = {k: v for k, v in identity["size"].items() if k not in _OF_STUDENTS}
    regime = {"wider": 1} | {k: v for k, v in identity["regime"].items() if k != "title"}
    return {**identity, "size": size, "regime": regime}


def _train_teachers(folder: Path, regime: Regime, size: Size, seed: int, log: Log) -> None:
    """Once: settings of the student stage that are new to a teacher's training change nothing."""
    if (folder / _TAUGHT).exists():
        return
    training: Mapping[str, Any] = {
        "network": network_settings(size, regime.wider),
        "patch": list(size.patch),
        "batch_size": size.batch_size,
        "steps": size.teacher_steps,
        "seed": drawn_seed(regime, seed, "teachers"),
        "optimiser": {"lr": size.lr},
        "validate_every": size.teacher_steps,
    }
    config = train_teachers.TrainTeachersConfig.model_validate({"training": training})
    name = "outside" if regime.outside_cases else "student"
    registry = load_registry(folder / f"{name}_registry.yaml")
    # Apart from the student's cache, where no outside case has a place.
    work = folder / ("outside" if regime.outside_cases else "work")
    report = train_teachers.run(config, Scope(registry, work, log), TrainingExecution(device="cpu"))
    raise_failed(report)
    write_json(folder / _TAUGHT, report.to_json())


def raise_failed(report: StageReport) -> None:
    """Raises: PipelineError: the first failure of a stage; Stopped: if that is what it was."""
    if not report.failed:
        return
    unit, error = next(iter(report.failed.items()))
    if isinstance(error, Stopped):
        raise error
    raise PipelineError(f"{report.stage} failed ({error}).", where=unit) from error
