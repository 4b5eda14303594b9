"""Teachers for those who have none: one network per organ, from its own dataset.

A teacher is trained as a student of one organ with full labels: the same loop, sampler, losses
(cross-entropy + Dice), checkpoints and resume.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import Field, model_validator

from pipeline.cache.cases import CaseToGrid, prepare_case
from pipeline.cache.index import IndexedCase, case_path
from pipeline.cache.reader import CachedCase, Unit
from pipeline.cache.receipt import read_receipt
from pipeline.cache.schema import StorageConfig
from pipeline.cache.store import prepare_work_folder
from pipeline.config import Config
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
from pipeline.student.augment import check_sides
from pipeline.student.distributed import refuse_several
from pipeline.student.inputs import TrainingInputs
from pipeline.student.progress import show_validations
from pipeline.student.resume import open_run
from pipeline.student.settings import SupervisionConfig, TrainingConfig, run_digest
from pipeline.student.speed import TrainingExecution
from pipeline.student.training import Trained, train
from pipeline.teachers.checkpoint import TeacherRecord, read_teacher, save_teacher
from stages.report import Scope, StageReport

_SPLITS = ("train", "validation")


class TrainTeachersConfig(Config):
    """How teachers are trained; see train_teachers.yaml."""

    training: TrainingConfig = Field(
        default_factory=lambda: TrainingConfig(supervision=SupervisionConfig(kind="full"))
    )
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
    scope: Scope,
    execution: TrainingExecution,
    *,
    only: str | None = None,
    dry_run: bool = False,
) -> StageReport:
    """Trains every teacher of kind `checkpoint` with `trained_on` whose file is not there yet.

    Args:
        scope: cases on the teachers' grids and checkpoints go to the work folder; the finished
            teacher goes to `weights` of its registry entry.

    Raises:
        ConfigError: no such teacher, or none to train; a logger that is not installed; or several
            processes were started.
    """
    refuse_several("train-teachers")
    names = _to_train(scope.registry, only)
    execution.check()
    if not dry_run:
        prepare_work_folder(scope.work)
    with StageReport("train-teachers").timed() as report:
        for name in names:
            if report.signalled:
                report.failed[name] = Stopped(
                    "not begun: a signal to stop came while the teacher before it was finished.",
                    where=f"teacher {name}",
                    fix="Run the same command again: it goes on from there.",
                )
                break
            teacher = _Teacher(name, config, scope)
            try:
                made = _train_one(teacher, execution, report, dry_run=dry_run)
                (report.done if made else report.skipped).append(name)
            except Stopped as error:
                report.failed[name] = error
                break
            except PipelineError as error:
                report.failed[name] = error
                scope.log.warn(f"teacher {name} failed: {error}")
    return report


def _to_train(registry: Registry, only: str | None) -> list[str]:
    names = [n for n, e in registry.teachers.items() if e.kind == "checkpoint" and e.trained_on]
    if only is not None:
        names = [name for name in names if name == only]
    if not names:
        raise ConfigError(
            f"no teacher to train{f' named {only}' if only else ''}.",
            where=registry.path,
            fix="A teacher to train has kind `checkpoint` and names a dataset in `trained_on`.",
        )
    return names


class _Teacher:
    """A teacher to be trained: what the registry and the settings say of it."""

    def __init__(self, name: str, config: TrainTeachersConfig, scope: Scope) -> None:
        self.name, self.work, self.log, self.registry = name, scope.work, scope.log, scope.registry
        self.entry = entry = scope.registry.teachers[name]
        self.dataset = entry.trained_on or ""
        self.weights = scope.registry.resolve(entry.weights)
        self.spacing_mm = entry.spacing_mm or scope.registry.grid.spacing_mm
        self.space = LabelSpace({organ: scope.registry.organs[organ] for organ in entry.organs})
        self.storage = config.storage
        self.training = config.training.model_copy(update={"intensity": entry.intensity})


def _train_one(
    teacher: _Teacher, execution: TrainingExecution, report: StageReport, *, dry_run: bool
) -> bool:
    """Trains one teacher; False if its file is there already."""
    name, log, training = teacher.name, teacher.log, teacher.training
    _check_channels(teacher)
    check_sides(training.augment, teacher.space, training.patch)
    files = _prepare(teacher, report, dry_run=dry_run)
    identity = {
        "cases": {c.name: c.digest for c in files},
        "organs": dict(teacher.space.ids),
        "spacing_mm": list(teacher.spacing_mm),
    }
    digest = run_digest(training, identity)
    if _is_there(teacher, digest):
        return False
    if dry_run:
        log.info(f"teacher {name} would be trained on {teacher.dataset}")
        return True
    log.info(f"teacher {name}: {len(files)} cases of {teacher.dataset}, {training.steps} steps")
    if note := teacher.registry.empty_split(teacher.dataset):
        log.remark(f"dataset {teacher.dataset}: {' '.join(note)}")
    inputs = _open(teacher, files, identity)
    folder = teacher.work / "teachers-in-training" / name
    with open_run(folder, name=name) as run_folder:
        trained = train(training, inputs, run_folder, execution, log)
        if trained.finished:
            show_validations(log, run_folder.path / "metrics.jsonl", folder)
    report.signalled = trained.signalled
    if not trained.finished:
        raise trained.stopped(f"teacher {name}")
    record = _record(teacher, inputs, trained, digest)
    save_teacher(teacher.weights, record, trained.network.network.state_dict())
    log.info(f"teacher {name} -> {teacher.weights}")
    return True


def _is_there(teacher: _Teacher, digest: str) -> bool:
    if not teacher.weights.exists():
        return False
    with named(f"teacher {teacher.name}"):
        record, _ = read_teacher(teacher.weights)
    if record.training_digest != digest:
        raise TeacherError(
            "there is a teacher already, trained with other settings or on other data.",
            where=f"teacher {teacher.name}, {teacher.weights}",
            fix="It is not overwritten: remove it, or name another file in `weights`.",
        )
    return True


def _record(
    teacher: _Teacher, inputs: TrainingInputs, trained: Trained, digest: str
) -> TeacherRecord:
    return TeacherRecord(
        network=teacher.training.network,
        num_channels=len(teacher.space.organs) + 1,
        channels=_channels(teacher.space),
        spacing_mm=teacher.spacing_mm,
        intensity=teacher.entry.intensity,
        validation_dice=dict(trained.validation_dice),
        num_validation_cases=len(inputs.validation),
        trained_on=teacher.dataset,
        trained_on_cases=tuple(c.name for c in inputs.training),
        training_digest=digest,
    )


def _channels(space: LabelSpace) -> dict[str, tuple[int, ...]]:
    """Background is channel 0, then the organs in the order of their ids."""
    return {organ: (k + 1,) for k, organ in enumerate(space.organs)}


def _check_channels(teacher: _Teacher) -> None:
    """Before hours of training: `cache-teachers` would refuse a teacher that says otherwise."""
    entry, wanted = teacher.entry, _channels(teacher.space)
    fits = entry.organs == wanted and entry.activation == "softmax" and entry.outputs == "logits"
    if not fits or entry.num_channels not in (None, len(wanted) + 1):
        plain = ", ".join(f"{organ}: {channels[0]}" for organ, channels in wanted.items())
        raise RegistryError(
            "a teacher trained here has a softmax over background and one channel per organ.",
            where=f"{teacher.registry.path}, teachers.{teacher.name}",
            fix=f"Write organs: {{{plain}}}, num_channels: {len(wanted) + 1}, activation: softmax; "
            "its outputs are logits.",
        )


def _open(
    teacher: _Teacher, files: Sequence[IndexedCase], identity: Mapping[str, Any]
) -> TrainingInputs:
    annotated = tuple(teacher.registry.datasets[teacher.dataset].annotated)
    cases = []
    for file in files:
        unit = Unit.open(case_path(teacher.work, file), expect=file.digest)
        cases.append(CachedCase(file.name, file.split, annotated, unit, {}, {}))
    return TrainingInputs(
        training=[case for case in cases if case.split == "train"],
        validation=[case for case in cases if case.split == "validation"],
        space=teacher.space,
        identity=identity,
    )


def _prepare(teacher: _Teacher, report: StageReport, *, dry_run: bool) -> list[IndexedCase]:
    """The dataset's cases at the teacher's spacing; at the student's they are the cache's own."""
    log, found = teacher.log, list[IndexedCase]()
    files = [c for c in teacher.registry.cases(teacher.dataset) if c.split in _SPLITS]
    to_grid = CaseToGrid(
        teacher.registry, teacher.work, teacher.storage, teacher.spacing_mm, dry_run
    )
    with log.progress(f"{teacher.dataset} on the teacher's grid", len(files)) as advance:
        for source in files:
            try:
                found.append(prepare_case(to_grid, source, warn=log.remark).indexed)
            except PipelineError as error:
                report.failed[source.name] = error
                log.warn(f"{source.name} is left out of training: {error}")
            advance(source.name)
    return [case for case in found if not _is_swallowed(teacher, case)]


def _is_swallowed(teacher: _Teacher, case: IndexedCase) -> bool:
    """Whether the teacher's grid leaves nothing of an organ that the label shows: the case would
    teach that it is absent. A case that a dry run does not make is not known to."""
    try:
        path = case_path(teacher.work, case)
        receipt = read_receipt(path, expect=case.digest, objects=False)
    except CacheError:
        return False
    lost = [organ for organ in teacher.space.organs if organ in receipt.swallowed]
    if lost:
        teacher.log.remark(f"{case.name} is left out: its grid has no voxel of {', '.join(lost)}.")
    return bool(lost)
