"""`pipeline check`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from pipeline.cli_options import (
    REGISTRY,
    ConfigOption,
    DeviceOption,
    JsonOption,
    QuietOption,
    RegistryOption,
    TrustOption,
    WindowBatchOption,
    open_log,
    open_registry,
    open_settings,
)
from pipeline.cli_run import recorded


@recorded
def check(
    registry: RegistryOption = REGISTRY,
    config: ConfigOption = None,
    dataset: Annotated[str | None, typer.Option(help="One alone; default: all.")] = None,
    student: Annotated[
        Path | None,
        typer.Option(help="Settings of train-student, for the patch; default: built in."),
    ] = None,
    jobs: Annotated[
        int | None, typer.Option(help="Processes that read; default: one per core.", min=1)
    ] = None,
    no_teachers: Annotated[
        bool, typer.Option("--no-teachers", help="Look at datasets alone.")
    ] = False,
    case: Annotated[
        str | None,
        typer.Option(help="dataset/case for the teachers; default: the first that can be read."),
    ] = None,
    side_mm: Annotated[
        float, typer.Option(help="Side of the teachers' crop in mm.", min=1)
    ] = 120.0,
    device: DeviceOption = "auto",
    window_batch: WindowBatchOption = 1,
    trust: TrustOption = None,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Everything that can be known before a GPU is used: files, labels, HU, doubles, teachers."""
    from pipeline.checking.datasets import check_datasets
    from pipeline.checking.report import Report, print_report
    from pipeline.checking.teachers import check_teachers
    from pipeline.config import load_config
    from stages.cache_teachers import CacheTeachersConfig
    from stages.train_student import TrainStudentConfig

    settings = open_settings(config, CacheTeachersConfig)
    trained = load_config(student, TrainStudentConfig) if student else TrainStudentConfig()
    opened = open_registry(registry, files=False, trust=trust)
    log = open_log(quiet or as_json)
    data = check_datasets(opened, patch=trained.training.patch, log=log, dataset=dataset, jobs=jobs)
    teachers = None
    if opened.teachers and not no_teachers and any(found.shape for found in data.cases):
        teachers = check_teachers(
            opened,
            window=settings.window,
            storage=settings.storage,
            log=log,
            case=case,
            dataset=dataset,
            side_mm=side_mm,
            device=device,
            window_batch=window_batch,
        )
    report = Report(opened, data, teachers)
    if as_json:
        typer.echo(json.dumps(report.to_json(), indent=1))
    else:
        print_report(report)
    if report.exit_code:
        raise typer.Exit(report.exit_code)
