"""`pipeline report`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from pipeline.cli_complete import run_names
from pipeline.cli_options import (
    REGISTRY,
    WORK,
    DeviceOption,
    QuietOption,
    RegistryOption,
    WorkersOption,
    WorkOption,
    open_log,
    open_registry,
)
from pipeline.cli_run import recorded


@recorded
def report(
    run: Annotated[
        str,
        typer.Argument(
            help="A student's run: a folder of WORK/students.", autocompletion=run_names
        ),
    ],
    registry: RegistryOption = REGISTRY,
    work: WorkOption = WORK,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="The page; default: report.html in the run's folder."),
    ] = None,
    predictions: Annotated[
        Path | None,
        typer.Option(
            "--predictions",
            "-p",
            help="Folder that `predict` and `evaluate` filled. Without it: validation cases.",
        ),
    ] = None,
    worst: Annotated[
        int, typer.Option(help="Worst cases to show, beside the median one.", min=1, max=6)
    ] = 2,
    regions: Annotated[
        bool,
        typer.Option(
            "--regions/--no-regions",
            help="Volumes and conflicts: every case of the run is read for them.",
        ),
    ] = True,
    device: DeviceOption = "auto",
    workers: WorkersOption = 0,
    quiet: QuietOption = False,
) -> None:
    """One HTML page about a run: lineage, teachers, regions, curves, scores, cases in pictures.

    The page holds all it needs and asks no network for anything.
    """
    from pipeline.html_report.make import PageSettings, write_report
    from pipeline.network import pick_device

    written = write_report(
        open_registry(registry, files=False),
        work,
        run,
        PageSettings(predictions, worst, regions, workers),
        output,
        device=pick_device(device),
        log=open_log(quiet),
    )
    typer.echo(str(written))
