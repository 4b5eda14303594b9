"""Teachers for those who have none: one network per organ, from its own dataset.

A teacher is trained as a student of one organ with full labels: the same loop, sampler, losses
(cross-entropy + Dice), checkpoints and resume.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import Field, model_validator

from pipeline.cache.cases import CaseToGrid, prepare_case
from pipeline.cache.index import IndexedCase, case_path
from pipeline.cache.reader import CachedCase, Unit
from pipeline.cache.receipt import read_receipt
from pipeline.cache.schema import StorageConfig
from pipeline.cache.store import prepare_work_folder
from pipeline.config import Config
from pipeline.data.entries import TeacherEntry
from pipeline.data.labels import LabelSpace
from pipeline.data.registry import Registry
from pipeline.errors import (
    CacheError,
    ConfigError,
    PipelineError,
    RegistryError,
    Stopped,
    TeacherError,
    named,
)
from pipeline.folder import Folder, mirrored
from pipeline.log import Log
from pipeline.networks.by_name import pick_device
from pipeline.student.augment import check_sides
from pipeline.student.loggers import RunLogger, open_loggers
from pipeline.student.processes import refuse_several
from pipeline.student.progress import tell_validations
from pipeline.student.settings import SupervisionConfig, TrainingConfig, run_digest
from pipeline.student.speed import SpeedFlags, check_device
from pipeline.student.training import Trained, train
from pipeline.teachers.checkpoint import TeacherRecord, read_teacher, save_teacher
from stages.report import StageReport


def _full() -> TrainingConfig:
    return TrainingConfig(supervision=SupervisionConfig(kind="full"))


class TrainTeachersConfig(Config):
    """How teachers are trained; see train_teachers.yaml."""

    training: TrainingConfig = Field(default_factory=_full)
    storage: StorageConfig = Field(default_factory=StorageConfig)

    @model_validator(mode="before")
    @classmethod
    def _by_labels(cls, data: Any) -> Any:
        """Teachers learn from labels; the student's other choices do not exist for them."""
        training = data.get("training") if isinstance(data, dict) else None
        if isinstance(training, dict):
            if "supervision" in training:
                raise ValueError("teachers are trained on labels: remove training.supervision")
            return {**data, "training": {**training, "supervision": {"kind": "full"}}}
        return data


def run(
    config: TrainTeachersConfig,
    registry: Registry,
    work: Folder,
    *,
    log: Log,
    device: str = "auto",
    workers: int = 0,
    checkpoint_minutes: float = 10.0,
    loggers: Sequence[str] = (),
    flags: SpeedFlags | None = None,
    only: str | None = None,
    dry_run: bool = False,
) -> StageReport:
    """Trains every teacher of kind `checkpoint` with `trained_on` whose file is not there yet.

    Args:
        config: what changes numbers.
        registry: read with its files.
        work: cases on the teachers' grids and checkpoints go there; the finished teacher goes to
            `weights` of its registry entry.
        log: where progress goes.
        device: auto, cpu, cuda, cuda:1.
        workers: loader processes.
        checkpoint_minutes: at most so much work is lost to a kill.
        loggers: names of loggers that are told beside metrics.jsonl.
        flags: precision, memory format, compiling.
        only: one teacher by name.
        dry_run: say what would be done, write nothing.

    Raises:
        ConfigError: no such teacher, or none to train; a logger that is not installed; or several
            processes were started.
    """
    refuse_several("train-teachers")
    began = time.monotonic()
    report = StageReport("train-teachers")
    names = [n for n, e in registry.teachers.items() if e.kind == "checkpoint" and e.trained_on]
    if only is not None:
        names = [n for n in names if n == only]
    if not names:
        raise ConfigError(
            f"no teacher to train{f' named {only}' if only else ''}.",
            where=registry.path,
            fix="A teacher to train has kind `checkpoint` and names a dataset in `trained_on`.",
        )
    check_device(flags, pick_device(device))
    open_loggers(loggers)  # what is missing is said before hours of training
    if not dry_run:
        prepare_work_folder(work)
    for name in names:
        if report.signalled:
            report.failed[name] = Stopped(
                "not begun: a signal to stop came while the teacher before it was finished.",
                where=f"teacher {name}",
                fix="Run the same command again: it goes on from there.",
            )
            break
        try:
            if _train_one(
                name, config, registry, work,
                log=log, device=device, workers=workers,
                checkpoint_minutes=checkpoint_minutes, loggers=open_loggers(loggers),
                flags=flags, report=report, dry_run=dry_run,
            ):  # fmt: skip
                report.done.append(name)
            else:
                report.skipped.append(name)
        except Stopped as error:
            report.failed[name] = error
            break
        except PipelineError as error:
            report.failed[name] = error
            log.warn(f"teacher {name} failed: {error}")
    report.seconds = time.monotonic() - began
    return report


def _train_one(
    name: str,
    config: TrainTeachersConfig,
    registry: Registry,
    work: Folder,
    *,
    log: Log,
    device: str,
    workers: int,
    checkpoint_minutes: float,
    loggers: Sequence[RunLogger],
    flags: SpeedFlags | None,
    report: StageReport,
    dry_run: bool,
) -> bool:
    """Trains one teacher; False if its file is there already."""
    entry = registry.teachers[name]
    assert entry.trained_on is not None
    weights = registry.resolve(entry.weights)
    spacing = entry.spacing_mm or registry.grid.spacing_mm
    space = LabelSpace({organ: registry.organs[organ] for organ in entry.organs})
    _check_channels(name, registry, space)
    check_sides(config.training.augment, space)
    training = config.training.model_copy(update={"intensity": entry.intensity})
    files = _prepare(config, registry, work, entry.trained_on, spacing, log, report, dry_run)
    files = [case for case in files if not _is_swallowed(work, case, space, log)]
    inputs = {
        "cases": {c.name: c.digest for c in files},
        "organs": dict(space.ids),
        "spacing_mm": list(spacing),
    }
    digest = run_digest(training, inputs)
    if _is_there(name, weights, digest):
        return False
    if dry_run:
        log.info(f"teacher {name} would be trained on {entry.trained_on}")
        return True
    annotated = tuple(registry.datasets[entry.trained_on].annotated)
    cases = [_open(work, indexed, annotated) for indexed in files]
    log.info(f"teacher {name}: {len(cases)} cases of {entry.trained_on}, {training.steps} steps")
    if note := registry.empty_split(entry.trained_on):
        log.remark(f"dataset {entry.trained_on}: {' '.join(note)}")
    with mirrored(work / "teachers-in-training" / name) as (local, keep):
        trained = train(
            training,
            space,
            [c for c in cases if c.split == "train"],
            [c for c in cases if c.split == "validation"],
            local,
            taps={},
            inputs=inputs,
            log=log,
            device=pick_device(device),
            workers=workers,
            checkpoint_minutes=checkpoint_minutes,
            saved=keep,
            name=name,
            loggers=loggers,
            flags=flags,
        )
        if trained.finished:
            tell_validations(log, local / "metrics.jsonl", work / "teachers-in-training" / name)
    report.signalled = trained.signalled
    if not trained.finished:
        raise Stopped(
            f"stopped at step {trained.step} of {training.steps}.",
            where=f"teacher {name}",
            fix="Run the same command again: it goes on from there.",
        )
    record = _record(entry, training, space, cases, spacing, trained, digest)
    save_teacher(weights, record, trained.network.network.state_dict())
    log.info(f"teacher {name} -> {weights}")
    return True


def _is_there(name: str, weights: Path, digest: str) -> bool:
    if not weights.exists():
        return False
    with named(f"teacher {name}"):
        record, _ = read_teacher(weights)
    if record.training_digest != digest:
        raise TeacherError(
            "there is a teacher already, trained with other settings or on other data.",
            where=f"teacher {name}, {weights}",
            fix="It is not overwritten: remove it, or name another file in `weights`.",
        )
    return True


def _record(
    entry: TeacherEntry,
    training: TrainingConfig,
    space: LabelSpace,
    cases: Sequence[CachedCase],
    spacing_mm: tuple[float, float, float],
    trained: Trained,
    digest: str,
) -> TeacherRecord:
    assert entry.trained_on is not None
    return TeacherRecord(
        network=training.network,
        num_channels=len(space.organs) + 1,
        channels=_channels(space),
        spacing_mm=spacing_mm,
        intensity=entry.intensity,
        validation_dice=dict(trained.validation_dice),
        num_validation_cases=sum(c.split == "validation" for c in cases),
        trained_on=entry.trained_on,
        trained_on_cases=tuple(c.name for c in cases if c.split == "train"),
        training_digest=digest,
    )


def _channels(space: LabelSpace) -> dict[str, tuple[int, ...]]:
    """Background is channel 0, then the organs in the order of their ids."""
    return {organ: (k + 1,) for k, organ in enumerate(space.organs)}


def _check_channels(name: str, registry: Registry, space: LabelSpace) -> None:
    """Before hours of training: `cache-teachers` would refuse a teacher that says otherwise."""
    entry, wanted = registry.teachers[name], _channels(space)
    fits = entry.organs == wanted and entry.activation == "softmax" and entry.outputs == "logits"
    if not fits or entry.num_channels not in (None, len(space.organs) + 1):
        plain = ", ".join(f"{organ}: {channels[0]}" for organ, channels in wanted.items())
        raise RegistryError(
            "a teacher trained here has a softmax over background and one channel per organ.",
            where=f"{registry.path}, teachers.{name}",
            fix=f"Write organs: {{{plain}}}, num_channels: {len(wanted) + 1}, activation: softmax; "
            "its outputs are logits.",
        )


def _open(work: Folder, indexed: IndexedCase, annotated: tuple[str, ...]) -> CachedCase:
    unit = Unit.open(case_path(work, indexed), expect=indexed.digest)
    return CachedCase(indexed.name, indexed.split, annotated, unit, {}, {})


def _is_swallowed(work: Folder, case: IndexedCase, space: LabelSpace, log: Log) -> bool:
    """Whether the teacher's grid leaves nothing of an organ that the label shows: the case would
    teach that it is absent. A case that a dry run does not make is not known to."""
    try:
        receipt = read_receipt(case_path(work, case), expect=case.digest, objects=False)
    except CacheError:
        return False
    lost = [organ for organ in space.organs if organ in receipt.swallowed]
    if lost:
        log.remark(f"{case.name} is left out: its grid has no voxel of {', '.join(lost)}.")
    return bool(lost)


def _prepare(
    config: TrainTeachersConfig,
    registry: Registry,
    work: Folder,
    dataset: str,
    spacing_mm: tuple[float, float, float],
    log: Log,
    report: StageReport,
    dry_run: bool,
) -> list[IndexedCase]:
    """The dataset's cases at the teacher's spacing; at the student's they are the cache's own."""
    files = [c for c in registry.cases(dataset) if c.split in ("train", "validation")]
    found: list[IndexedCase] = []
    to_grid = CaseToGrid(registry, work, config.storage, spacing_mm, dry_run)
    with log.progress(f"{dataset} on the teacher's grid", len(files)) as advance:
        for source in files:
            try:
                found.append(prepare_case(to_grid, source, warn=log.remark).indexed)
            except PipelineError as error:
                report.failed[source.name] = error
                log.warn(f"{source.name} is left out of training: {error}")
            advance(source.name)
    return found
