"""`pipeline cache-teachers`."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from pipeline.cli_complete import one_of, teacher_names
from pipeline.cli_options import (
    REGISTRY,
    WORK,
    ConfigOption,
    DeviceOption,
    DryRunOption,
    QuietOption,
    RegistryOption,
    TrustOption,
    WindowBatchOption,
    WorkOption,
    end,
    open_log,
    open_registry,
    open_settings,
)
from pipeline.cli_run import recorded

_WHERE, _ARRAY = "Several workers", "Parts, for job arrays"


@recorded
def cache_teachers(
    registry: RegistryOption = REGISTRY,
    config: ConfigOption = None,
    work: WorkOption = WORK,
    device: DeviceOption = "auto",
    window_batch: WindowBatchOption = 1,
    force: Annotated[
        bool, typer.Option("--force", help="Start even if it will not fit on the disk.")
    ] = False,
    accept: Annotated[
        list[str] | None,
        typer.Option(
            "--accept",
            help="Go on with this teacher although its Dice is too low.",
            autocompletion=teacher_names,
        ),
    ] = None,
    trust: TrustOption = None,
    executor: Annotated[
        str | None,
        typer.Option(
            help="local, slurm, or a Dask scheduler's tcp://HOST:PORT; default: this process.",
            autocompletion=one_of("local", "slurm", "tcp://"),
            rich_help_panel=_WHERE,
        ),
    ] = None,
    workers: Annotated[
        int | None,
        typer.Option(
            help="How many to start; default: one per GPU, or per 4 cores.",
            min=1,
            rich_help_panel=_WHERE,
        ),
    ] = None,
    slurm_config: Annotated[
        Path | None,
        typer.Option(help="YAML: what each worker's job asks for.", rich_help_panel=_WHERE),
    ] = None,
    num_parts: Annotated[
        int | None,
        typer.Option(help="Do one of so many parts of the cases.", min=1, rich_help_panel=_ARRAY),
    ] = None,
    part_id: Annotated[
        int | None,
        typer.Option(
            help="Which one, from 0; default: this job's place in its Slurm array.",
            rich_help_panel=_ARRAY,
        ),
    ] = None,
    dry_run: DryRunOption = False,
    quiet: QuietOption = False,
) -> None:
    """Stage one: run every teacher over every case once, and cache what they say."""
    from pipeline.engine.choose import open_engine
    from pipeline.engine.parts import chosen_part
    from pipeline.folder import is_local
    from stages import cache_teachers as stage

    settings = open_settings(config, stage.CacheTeachersConfig)
    part = chosen_part(num_parts, part_id, os.environ)
    if executor is not None:  # workers may stand in other folders
        registry, work = registry.absolute(), work.absolute() if is_local(work) else work
    loaded = open_registry(registry, trust=trust)
    log = open_log(quiet, work, dry_run, writer="" if part is None else part.tag)
    with open_engine(
        None if dry_run else executor,
        workers=None if dry_run else workers,
        slurm_config=None if dry_run else slurm_config,
        device=device,
        work=work,
        log=log,
    ) as engine:
        report = stage.run(
            settings,
            loaded,
            work,
            log=log,
            engine=engine,
            part=part,
            device=device,
            window_batch=window_batch,
            force=force,
            accept=accept or [],
            dry_run=dry_run,
            tables=not quiet,
        )
    end(report)
