"""Stage two: cache -> patches -> losses -> student. It reads no teacher, no weights, no raw CT."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from functools import partial
from typing import TYPE_CHECKING, Any

from pydantic import Field

from pipeline.cache.store import prepare_work_folder, write_json
from pipeline.config import Config
from pipeline.config import digest as digest_of
from pipeline.data.registry import Registry
from pipeline.errors import CheckpointError, ConfigError
from pipeline.folder import Folder, contains, json_with, matching, read_text, refuse_foreign
from pipeline.student.augment import check_sides
from pipeline.student.checkpoint import StudentRecord, read_record
from pipeline.student.inputs import TrainingInputs, check_same_units, open_inputs
from pipeline.student.progress import show_validations
from pipeline.student.settings import TrainingConfig, run_digest
from stages.report import Scope, StageReport

if TYPE_CHECKING:
    from pipeline.student.distributed import Processes
    from pipeline.student.resume import RunFolder
    from pipeline.student.speed import TrainingExecution
    from pipeline.student.training import Trained

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
    config: TrainStudentConfig, scope: Scope, execution: TrainingExecution, *, dry_run: bool = False
) -> StageReport:
    """Trains the student, or goes on training it; a finished run does nothing.

    Of a registry in folds the chosen one validates, and its name is part of the run's. A run that a
    signal stopped is in the report as failed: not all steps are made. Started by
    torchrun or srun, the processes share each batch; the first writes.

    Args:
        scope: the registry may be read without its files; stage one filled the work folder.

    Raises:
        CacheStale, CacheMissing: the cache lacks what this supervision needs: units, or the
            temperatures of a calibrated one; see `open_inputs`.
        ConfigError: folds and none chosen, no case to train on, taps that do not fit, a logger that
            is not installed, augmentation that mixes up left and right organs, files that no
            training wrote.
        CheckpointError: the run was started with other settings, or with other units, or its
            folder holds another student.
    """
    from pipeline.student.distributed import joined
    from pipeline.student.resume import open_run
    from pipeline.student.staging import staged_inputs
    from pipeline.student.training import train

    execution.check()
    config = _of_fold(config, scope.registry)
    check_sides(config.training.augment, scope.registry.label_space, config.training.patch)
    with StageReport("train-student").timed() as report, joined() as processes:
        log = processes.log(scope.log)
        inputs = _open(config, scope, execution, processes)
        folder = scope.work / "students" / config.run
        digest = run_digest(config.training, inputs.identity)
        for name in inputs.identity.get("missing_cases", ()):
            report.warnings[name] = ["it is not in the cache, and was left out."]
        if processes.from_first(lambda: is_finished(folder, digest)):
            log.info(f"{folder} is finished already")
            report.skipped.append(config.run)
            return report
        processes.from_first(lambda: _check_folder(folder, inputs, digest))
        log.info(f"{config.run}: {_in_words(config, inputs, processes)} -> {folder}")
        if dry_run:
            report.done.append(config.run)
            return report
        processes.from_first(lambda: prepare_work_folder(scope.work))
        inputs = staged_inputs(inputs, execution.stage_to, log=log, processes=processes)
        record = partial(_record, config, scope.registry, inputs.identity)
        with open_run(folder, processes, name=config.run, record=record) as files:
            trained = train(config.training, inputs, files, execution, log, processes)
            if trained.finished:
                processes.from_first(lambda: _finish(files, trained, digest))
                show_validations(log, files.path / "metrics.jsonl", folder)
        _tell(report, config, trained, folder)
        return report


def _open(
    config: TrainStudentConfig, scope: Scope, execution: TrainingExecution, processes: Processes
) -> TrainingInputs:
    """What is trained on. Refuses processes that have not the same, or other settings."""
    inputs = processes.together(
        lambda: open_inputs(
            config.training.supervision, scope.registry, scope.work,
            allow_missing=config.allow_missing, log=processes.log(scope.log),
        )
    )  # fmt: skip
    processes.same(inputs.identity, "the cache")
    settings = [config.model_dump(mode="json"), asdict(execution.flags)]
    processes.same(settings, "the settings")
    return inputs


def _check_folder(folder: Folder, inputs: TrainingInputs, digest: str) -> None:
    check_same_units(folder, inputs.identity)
    check_own_files(folder, digest)


def _of_fold(config: TrainStudentConfig, registry: Registry) -> TrainStudentConfig:
    """Refuses folds of which none is chosen; the chosen one is part of the run's name."""
    if registry.num_folds and registry.fold is None:
        raise ConfigError(
            f"its cases are in {registry.num_folds} folds, and which one validates is not said.",
            where=registry.path,
            fix=f"Give --fold, 0 to {registry.num_folds - 1}: a student for each.",
        )
    return config.model_copy(update={"run": run_name(config.run, registry.fold)})


def run_name(run: str, fold: int | None) -> str:
    """Of the student of a fold."""
    return run if fold is None else f"{run}-fold{fold}"


def _in_words(config: TrainStudentConfig, inputs: TrainingInputs, processes: Processes) -> str:
    several = f" in {processes.size} processes" if processes.size > 1 else ""
    fold = inputs.identity.get("fold")
    which = "" if fold is None else f"fold {fold} validates, "
    return (
        f"{config.training.supervision.kind}, {which}{len(inputs.training)} training and "
        f"{len(inputs.validation)} validation cases, {config.training.steps} steps{several}"
    )


def _finish(files: RunFolder, trained: Trained, digest: str) -> None:
    """The marker is written last."""
    network, scores = trained.network.network, trained.validation_dice
    rules = dict(trained.rules)
    files.save_student("student.pt", network, trained.step, scores, postprocessing=rules)
    write_json(files.path / "finished.json", {"run_digest": digest, "steps": trained.step})
    files.saved()


def _tell(
    report: StageReport, config: TrainStudentConfig, trained: Trained, folder: Folder
) -> None:
    if trained.finished:
        report.done.append(config.run)
    else:
        report.failed[config.run] = trained.stopped(folder)
    report.signalled = trained.signalled
    report.details = {
        "run": config.run,
        "steps": trained.step,
        "finished": trained.finished,
        "validation_dice": dict(trained.validation_dice),
    }


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
    identity: Mapping[str, Any],
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
        teachers=dict(identity["teachers"]),
        trained_on=tuple(identity["cases"]),
        run_digest=run_digest(training, identity),
        mirrored=training.augment.flip_axes,
    )
