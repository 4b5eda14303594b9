"""Stage two: cache -> patches -> losses -> student. It reads no teacher, no weights, no raw CT."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import Field

from pipeline.admission.evidence import temperatures
from pipeline.cache.reader import CachedCase
from pipeline.cache.store import prepare_work_folder, write_json
from pipeline.cohort import Cohort, open_cohort
from pipeline.config import Config
from pipeline.data.registry import Registry
from pipeline.errors import CacheMissing, ConfigError, Stopped
from pipeline.folder import Folder, read_text
from pipeline.labels import LabelSpace
from pipeline.log import Log
from pipeline.mirror import mirrored
from pipeline.network import pick_device
from pipeline.student.checkpoint import StudentRecord, save_student
from pipeline.student.launch import joined
from pipeline.student.network import CachedTap, TapKey
from pipeline.student.processes import Processes
from pipeline.student.settings import TrainingConfig, run_digest
from pipeline.student.training import train
from stages.report import StageReport


class TrainStudentConfig(Config):
    """How stage two trains; see train_student.yaml."""

    run: str = Field(default="student", pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$")
    allow_missing: bool = False
    training: TrainingConfig = Field(default_factory=TrainingConfig)


@dataclass(frozen=True)
class OpenRun:
    """What a training reads, opened.

    Attributes:
        space: the organs.
        cases: to train on.
        validation: labelled cases to validate on.
        taps: cached taps for the feature term.
        inputs: digests of all of it.
        temperatures: (teacher, organ) -> T; empty if not calibrated.
    """

    space: LabelSpace
    cases: Sequence[CachedCase]
    validation: Sequence[CachedCase]
    taps: Mapping[TapKey, CachedTap]
    inputs: Mapping[str, Any]
    temperatures: Mapping[tuple[str, str], float]


def run(
    config: TrainStudentConfig,
    registry: Registry,
    work: Folder,
    *,
    log: Log,
    device: str = "auto",
    workers: int = 0,
    checkpoint_minutes: float = 10.0,
    dry_run: bool = False,
) -> StageReport:
    """Trains the student, or goes on training it; a finished run does nothing.

    A run that a signal stopped is in the report as failed: not all steps are made. Started by
    torchrun or srun, the processes share each batch; the first writes.

    Args:
        config: what changes numbers, and the run's name.
        registry: read without its files.
        work: the work folder that stage one filled.
        log: where progress goes.
        device: auto, cpu, cuda, cuda:1.
        workers: loader processes.
        checkpoint_minutes: at most so much work is lost to a kill.
        dry_run: say what would be done, write nothing.

    Raises:
        CacheStale, CacheMissing: the cache lacks what this supervision needs: units, or the
            temperatures of a calibrated one.
        ConfigError: no case to train on, taps that do not fit.
        CheckpointError: the run was started with other settings.
    """
    began = time.monotonic()
    with joined() as processes:
        report = _run(
            config, registry, work,
            log=processes.log(log), device=device, workers=workers,
            checkpoint_minutes=checkpoint_minutes, dry_run=dry_run, processes=processes,
        )  # fmt: skip
    report.seconds = time.monotonic() - began
    return report


def open_run(config: TrainStudentConfig, registry: Registry, work: Folder, *, log: Log) -> OpenRun:
    """Reads from the cache what a training needs; writes nothing. Errors as in `run`."""
    supervision = config.training.supervision
    teachers = list(registry.teachers) if supervision.uses_teachers else []
    if supervision.uses_teachers and not teachers:
        raise ConfigError(
            f"supervision {supervision.kind} needs teachers and the registry has none.",
            where=registry.path,
            fix="Add teachers, or choose kind marginal.",
        )
    cohort = open_cohort(work, registry, teachers=teachers, splits=("train", "validation"))
    _check_complete(cohort, config.allow_missing, log)
    space = registry.label_space
    training = [c for c in cohort.cases if c.split == "train"]
    if supervision.kind == "full":
        training = [c for c in training if set(space.organs) <= set(c.annotated)]
        if not training:
            raise ConfigError(
                "supervision full needs training cases in which every organ is annotated.",
                where=registry.path,
                fix="Choose ms_kd or marginal, which are made for partial labels.",
            )
    validation = [c for c in cohort.cases if c.split == "validation"]
    taps = cached_taps(training, space) if supervision.uses_features else {}
    inputs: dict[str, Any] = {
        "cases": {c.name: c.case.receipt.digest for c in training},
        "validation": {c.name: c.case.receipt.digest for c in validation},
        "teachers": {name: teacher.digest for name, teacher in cohort.teachers.items()},
        "organs": dict(space.ids),
    }
    heat = _temperatures(work, registry, teachers, log) if supervision.uses_temperatures else {}
    if heat:
        inputs["temperatures"] = {f"{teacher}: {organ}": t for (teacher, organ), t in heat.items()}
    return OpenRun(space, training, validation, taps, inputs, heat)


def _run(
    config: TrainStudentConfig,
    registry: Registry,
    work: Folder,
    *,
    log: Log,
    device: str,
    workers: int,
    checkpoint_minutes: float,
    dry_run: bool,
    processes: Processes,
) -> StageReport:
    """In each process; the first alone writes."""
    report = StageReport("train-student")
    opened = processes.together(lambda: open_run(config, registry, work, log=log))
    inputs = processes.same(opened.inputs, "the cache")
    folder = work / "students" / config.run
    digest = run_digest(config.training, inputs)
    if processes.from_first(lambda: is_finished(folder, digest)):
        report.skipped.append(config.run)
        log.info(f"{folder} is finished already")
        return report
    log.info(
        f"{config.run}: {config.training.supervision.kind}, {len(opened.cases)} training and "
        f"{len(opened.validation)} validation cases, {config.training.steps} steps"
        f"{f' in {processes.size} processes' if processes.size > 1 else ''} -> {folder}"
    )
    if dry_run:
        report.done.append(config.run)
        return report
    processes.from_first(lambda: prepare_work_folder(work))

    def student(step: int, scores: Mapping[str, float | None]) -> StudentRecord:
        return _record(config, registry, inputs, digest, step, scores)

    # The others write nothing, and name the folder in errors alone.
    place = mirrored(folder) if processes.is_first else nullcontext((Path(str(folder)), None))
    with place as (local, keep):
        trained = train(
            config.training,
            opened.space,
            opened.cases,
            opened.validation,
            local,
            taps=opened.taps,
            inputs=inputs,
            log=log,
            device=processes.device(pick_device(device)),
            temperatures=opened.temperatures,
            workers=workers,
            checkpoint_minutes=checkpoint_minutes,
            processes=processes,
            saved=keep,
            keep_best=lambda network, step, scores: save_student(
                local / "best.pt", student(step, scores), network
            ),
        )

        def finish() -> None:
            record = student(trained.step, trained.validation_dice)
            save_student(local / "student.pt", record, trained.network.network)
            write_json(local / "finished.json", {"run_digest": digest, "steps": trained.step})
            if keep is not None:
                keep()

        if trained.finished:
            processes.from_first(finish)
    if trained.finished:
        report.done.append(config.run)
    else:
        report.failed[config.run] = Stopped(
            f"stopped at step {trained.step} of {config.training.steps}.",
            where=folder,
            fix="Run the same command again: it goes on from there.",
        )
    report.details = {
        "run": config.run,
        "steps": trained.step,
        "finished": trained.finished,
        "validation_dice": dict(trained.validation_dice),
    }
    return report


def is_finished(folder: Folder, digest: str) -> bool:
    """ "Finished" is a marker on disk, written last; exit codes lie."""
    marker = folder / "finished.json"
    try:
        return digest in read_text(marker)
    except FileNotFoundError:
        return False


def cached_taps(cases: Sequence[CachedCase], space: LabelSpace) -> Mapping[TapKey, CachedTap]:
    """What the units of these cases say of their taps.

    Raises:
        ConfigError: no tap is cached, or one has another shape in another case.
    """
    found: dict[TapKey, CachedTap] = {}
    for case in cases:
        for teacher, unit in case.teachers.items():
            organs = tuple(
                k for k, organ in enumerate(space.organs) if teacher in case.experts[organ]
            )
            for tap, entry in unit.attributes["taps"].items():
                z, y, x = entry["stride"]
                cached = CachedTap(entry["channels"], (z, y, x), organs)
                if found.setdefault((teacher, tap), cached) != cached:
                    raise ConfigError(
                        f"tap {tap!r} of teacher {teacher} has other cells or channels in "
                        f"{case.name} than in the cases before it.",
                        where="supervision.features",
                        fix="Set features.weight to 0, or give the teacher a fixed spacing_mm.",
                    )
    if not found:
        raise ConfigError(
            "the feature term needs cached features and the cache holds none.",
            where="supervision.features",
            fix="Name `taps` in the registry and run cache-teachers, or set features.weight to 0.",
        )
    return found


def _temperatures(
    work: Folder, registry: Registry, teachers: Sequence[str], log: Log
) -> dict[tuple[str, str], float]:
    """What stage one measured; 1, said aloud, where no label could tell."""
    found = temperatures(work, registry, teachers)
    for (teacher, organ), value in found.items():
        if value is None:
            log.warn(
                f"teacher {teacher}: no case in the registry has a label of {organ} to calibrate "
                "it by; its log-odds stay as they are."
            )
    return {who: 1.0 if value is None else value for who, value in found.items()}


def _check_complete(cohort: Cohort, allow_missing: bool, log: Log) -> None:
    if not cohort.problems:
        return
    names = list(cohort.problems)
    some = ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")
    if allow_missing:
        log.warn(f"{len(names)} units are not usable and are left out: {some}")
        return
    raise CacheMissing(
        f"{len(names)} units are missing or damaged: {some}. "
        f"First reason: {next(iter(cohort.problems.values()))}",
        fix="Run `pipeline cache-teachers`, or set allow_missing: true to train without them.",
    )


def _record(
    config: TrainStudentConfig,
    registry: Registry,
    inputs: Mapping[str, Any],
    digest: str,
    step: int,
    scores: Mapping[str, float | None],
) -> StudentRecord:
    training = config.training
    return StudentRecord(
        network=training.network,
        organs=dict(registry.label_space.ids),
        spacing_mm=registry.grid.spacing_mm,
        intensity=training.intensity,
        patch=training.patch,
        steps=step,
        seed=training.seed,
        supervision=training.supervision.model_dump(mode="json"),
        validation_dice=dict(scores),
        teachers=dict(inputs["teachers"]),
        trained_on=tuple(inputs["cases"]),
        run_digest=digest,
    )
