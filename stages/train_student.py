"""Stage two: cache -> patches -> losses -> student. It reads no teacher, no weights, no raw CT."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import Field

from pipeline.cache.store import prepare_work_folder, write_json
from pipeline.config import Config
from pipeline.config import digest as digest_of
from pipeline.data.registry import Registry
from pipeline.errors import CheckpointError, Stopped
from pipeline.folder import (
    Folder,
    contains,
    json_with,
    matching,
    mirrored,
    read_text,
    refuse_foreign,
)
from pipeline.log import Log
from pipeline.networks.by_name import pick_device
from pipeline.student.augment import check_sides
from pipeline.student.checkpoint import StudentRecord, read_record, save_student
from pipeline.student.inputs import check_same_units, open_inputs
from pipeline.student.loggers import RunLogger, open_loggers
from pipeline.student.progress import tell_validations
from pipeline.student.settings import TrainingConfig, run_digest
from stages.report import StageReport

if TYPE_CHECKING:
    from pipeline.student.processes import Processes
    from pipeline.student.speed import SpeedFlags

# Students first.
_WRITTEN = (
    "student.pt",
    "best.pt",
    "finished.json",
    "config.json",
    "metrics.jsonl",
    "progress.png",
)
RUN_NAME = r"[A-Za-z0-9][A-Za-z0-9_.-]*"


class TrainStudentConfig(Config):
    """How stage two trains; see train_student.yaml."""

    run: str = Field(
        default="student",
        pattern=rf"^{RUN_NAME}(/{RUN_NAME})?$",
        description="folder below WORK/students",
    )
    allow_missing: bool = Field(
        default=False, description="train with the cases and units that exist"
    )
    training: TrainingConfig = Field(default_factory=TrainingConfig)


def run(
    config: TrainStudentConfig,
    registry: Registry,
    work: Folder,
    *,
    log: Log,
    device: str = "auto",
    workers: int = 0,
    checkpoint_minutes: float = 10.0,
    loggers: Sequence[str] = (),
    allow_missing: bool = False,
    flags: SpeedFlags | None = None,
    stage_to: Path | None = None,
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
        loggers: names of loggers that are told beside metrics.jsonl.
        allow_missing: train with the cases and units that exist, as `config.allow_missing` does.
        flags: precision, memory format, compiling.
        stage_to: folder on the machine's own disk that is read from instead of the cache; see
            `pipeline.student.staging`.
        dry_run: say what would be done, write nothing.

    Raises:
        CacheStale, CacheMissing: the cache lacks what this supervision needs: units, or the
            temperatures of a calibrated one; see `open_inputs`.
        ConfigError: no case to train on, taps that do not fit, a logger that is not installed,
            augmentation that mixes up left and right organs, files that no training wrote.
        CheckpointError: the run was started with other settings, or with other units, or its
            folder holds another student.
    """
    from pipeline.student.processes import joined
    from pipeline.student.speed import check_device

    began = time.monotonic()
    others = open_loggers(loggers)
    check_sides(config.training.augment, registry.label_space)
    check_device(flags, pick_device(device))
    with joined() as processes:
        report = _run(
            config, registry, work,
            log=processes.log(log), device=device, workers=workers,
            checkpoint_minutes=checkpoint_minutes, loggers=others,
            allow_missing=allow_missing or config.allow_missing, flags=flags, stage_to=stage_to,
            dry_run=dry_run, processes=processes,
        )  # fmt: skip
    report.seconds = time.monotonic() - began
    return report


def _run(
    config: TrainStudentConfig,
    registry: Registry,
    work: Folder,
    *,
    log: Log,
    device: str,
    workers: int,
    checkpoint_minutes: float,
    loggers: Sequence[RunLogger],
    allow_missing: bool,
    flags: SpeedFlags | None,
    stage_to: Path | None,
    dry_run: bool,
    processes: Processes,
) -> StageReport:
    """In each process; the first alone writes."""
    from pipeline.student.speed import SpeedFlags
    from pipeline.student.staging import staged_inputs
    from pipeline.student.training import train

    report = StageReport("train-student")
    supervision = config.training.supervision
    found = processes.together(
        lambda: open_inputs(supervision, registry, work, allow_missing=allow_missing, log=log)
    )
    inputs = processes.same(found.identity, "the cache")
    processes.same([config.model_dump(mode="json"), asdict(flags or SpeedFlags())], "the settings")
    folder = work / "students" / config.run
    digest = run_digest(config.training, inputs)
    for name in inputs.get("missing_cases", ()):
        report.warnings[name] = ["it is not in the cache, and was left out."]
    if processes.from_first(lambda: is_finished(folder, digest)):
        report.skipped.append(config.run)
        log.info(f"{folder} is finished already")
        return report
    processes.from_first(lambda: check_same_units(folder, inputs))
    processes.from_first(lambda: check_own_files(folder, digest))
    log.info(
        f"{config.run}: {supervision.kind}, {len(found.training)} training and "
        f"{len(found.validation)} validation cases, {config.training.steps} steps"
        f"{f' in {processes.size} processes' if processes.size > 1 else ''} -> {folder}"
    )
    if dry_run:
        report.done.append(config.run)
        return report
    processes.from_first(lambda: prepare_work_folder(work))
    found = staged_inputs(found, stage_to, log=log, processes=processes)

    def student(step: int, scores: Mapping[str, float | None]) -> StudentRecord:
        return _record(config, registry, inputs, digest, step, scores)

    # The others write nothing, and name the folder in errors alone.
    place = mirrored(folder) if processes.is_first else nullcontext((Path(str(folder)), None))
    with place as (local, keep):
        trained = train(
            config.training,
            registry.label_space,
            found.training,
            found.validation,
            local,
            taps=found.taps,
            inputs=inputs,
            log=log,
            device=processes.device(pick_device(device)),
            temperatures=found.temperatures,
            workers=workers,
            checkpoint_minutes=checkpoint_minutes,
            processes=processes,
            saved=keep,
            keep_best=lambda network, step, scores: save_student(
                local / "best.pt", student(step, scores), network
            ),
            name=config.run,
            loggers=loggers,
            flags=flags,
        )

        def finish() -> None:
            record = student(trained.step, trained.validation_dice)
            save_student(local / "student.pt", record, trained.network.network)
            write_json(local / "finished.json", {"run_digest": digest, "steps": trained.step})
            if keep is not None:
                keep()
            tell_validations(log, local / "metrics.jsonl", folder)

        if trained.finished:
            processes.from_first(finish)
    report.signalled = trained.signalled
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
    """ "Finished" is a marker on disk, written last; exit codes lie. A student that somebody took
    away is made again."""
    try:
        said = read_text(folder / "finished.json")
    except FileNotFoundError:
        return False
    return digest in said and (folder / "student.pt").exists()


def check_own_files(folder: Folder, digest: str) -> None:
    """Refuses to train where files would be replaced that this run did not write. Checkpoints of
    other settings are for resuming to refuse.

    Raises:
        ConfigError: the folder holds files, and nothing says that a training wrote them.
        CheckpointError: it holds what is of a student of other settings or data.
    """
    before = json_with(folder / "config.json", "config", "inputs")
    resumes = bool(matching(folder / "checkpoints", "step_*.pt"))
    fix = "Name another `run` in the settings, or move away what is there."
    files = [folder / name for name in _WRITTEN]
    is_ours = before is not None or resumes
    refuse_foreign("train-student", [(path, is_ours) for path in files], fix=fix)
    if resumes and before is not None and digest_of(before) != digest:
        return
    for path in files[:3]:
        if path.exists() and not _is_of_run(path, digest):
            raise CheckpointError(
                "it is of a student that was trained with other settings or on other data, or it "
                "was changed since.",
                where=path,
                fix=f"It is not replaced. {fix}",
            )


def _is_of_run(path: Folder, digest: str) -> bool:
    if path.name == "finished.json":
        return contains(path, digest)
    try:
        return read_record(path).run_digest == digest
    except CheckpointError:
        return False


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
        head=training.supervision.head,
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
