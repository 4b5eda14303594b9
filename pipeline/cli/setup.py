"""`pipeline submit`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from pipeline.cli_complete import one_of
from pipeline.cli_options import (
    REGISTRY,
    WORK,
    QuietOption,
    RegistryOption,
    WorkOption,
    open_log,
    open_registry,
)
from pipeline.cli_run import recorded
from pipeline.errors import ConfigError
from pipeline.folder import Folder, is_local

STAGES = ("train-teachers", "cache-teachers", "train-student", "predict", "evaluate")

if TYPE_CHECKING:
    from pipeline.submission.script import Target
    from pipeline.submission.settings import Stage


@recorded
def submit(
    stages: Annotated[
        list[str] | None,
        typer.Argument(
            help=f"One or several of {', '.join(STAGES)}.",
            autocompletion=one_of(*STAGES),
        ),
    ] = None,
    registry: RegistryOption = REGISTRY,
    config: Annotated[
        list[str] | None,
        typer.Option(
            "--config",
            "-c",
            metavar="STAGE=FILE",
            help="How a stage computes; give it once for each. train-student's also names the run "
            "that is predicted and evaluated.",
        ),
    ] = None,
    work: WorkOption = WORK,
    slurm_config: Annotated[
        Path | None, typer.Option(help="YAML: what the jobs ask for, per stage.")
    ] = None,
    num_parts: Annotated[
        int | None, typer.Option(help="Elements of cache-teachers' array.", min=1)
    ] = None,
    after: Annotated[
        list[str] | None, typer.Option(help="A job that the first one waits for.")
    ] = None,
    templates: Annotated[
        Path | None, typer.Option(help="Folder with changed templates, <stage>.sh.")
    ] = None,
    copy_templates: Annotated[
        Path | None,
        typer.Option(help="Only copy the built-in templates to this folder, to change them."),
    ] = None,
    print_: Annotated[
        bool,
        typer.Option(
            "--print", "--dry-run", help="Only show the scripts; write and submit nothing."
        ),
    ] = False,
    quiet: QuietOption = False,
) -> None:
    """Make Slurm jobs of stages and submit them, each to wait for the one before."""
    from pipeline.config import load_config
    from pipeline.submission import script
    from pipeline.submission import submit as submission
    from pipeline.submission.settings import SubmitSettings

    log = open_log(quiet)
    if copy_templates is not None:
        for path in script.copy_templates(copy_templates):
            log.info(str(path))
        return
    names = submission.in_order(stages or [])
    if not names:
        raise ConfigError(
            "no stage is named.",
            where="pipeline submit",
            fix="For example: `pipeline submit train-student --print`.",
        )
    settings = load_config(slurm_config, SubmitSettings) if slurm_config else SubmitSettings()
    if num_parts is not None:
        settings = settings.with_parts(num_parts)
    target = _target(registry, work, config or [])
    texts = submission.scripts(names, settings, target, templates)
    if print_:
        typer.echo("\n".join(texts.values()), nl=False)
        return
    submission.submit(texts, settings, target, after=after or [], log=log)


def _target(registry: Path, work: Folder, configs: list[str]) -> Target:
    """What the jobs work on. Settings of stages are read, so that no job fails on them later."""
    from pipeline.config import Config, load_config
    from pipeline.submission.script import Target
    from stages.cache_teachers import CacheTeachersConfig
    from stages.evaluate import EvaluateConfig
    from stages.predict import PredictConfig
    from stages.train_student import TrainStudentConfig
    from stages.train_teachers import TrainTeachersConfig

    if not is_local(work):
        raise ConfigError(
            "jobs of Slurm need a work folder on a disk that the nodes share.",
            where=work,
            fix="Give a path; for a cache in an object store write the batch script yourself.",
        )
    files = _files(configs)
    models: dict[Stage, type[Config]] = {
        "train-teachers": TrainTeachersConfig,
        "cache-teachers": CacheTeachersConfig,
        "train-student": TrainStudentConfig,
        "predict": PredictConfig,
        "evaluate": EvaluateConfig,
    }
    read = {stage: load_config(path, models[stage]) for stage, path in files.items()}
    student, judged = read.get("train-student"), read.get("evaluate")
    loaded = open_registry(registry, files=False)
    return Target(
        registry.absolute(),
        work.absolute(),
        run=student.run if isinstance(student, TrainStudentConfig) else TrainStudentConfig().run,
        teachers=tuple(
            name
            for name, entry in loaded.teachers.items()
            if entry.kind == "checkpoint" and entry.trained_on
        ),
        splits=(judged if isinstance(judged, EvaluateConfig) else EvaluateConfig()).splits,
        configs=files,
    )


def _files(configs: list[str]) -> dict[Stage, Path]:
    from pipeline.submission.submit import in_order

    pairs = {name: path for name, _, path in (text.partition("=") for text in configs)}
    if "" in pairs.values() or len(pairs) < len(configs):
        raise ConfigError(
            "--config takes STAGE=FILE, once for each stage.",
            where=" ".join(configs),
            fix="For example: `--config train-student=train_student.yaml`.",
        )
    return {stage: Path(pairs[stage]).absolute() for stage in in_order(list(pairs))}
