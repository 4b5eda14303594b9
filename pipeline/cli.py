"""The command line. Every command imports its stage inside the function: --help loads no torch."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from pipeline.errors import PipelineError

if TYPE_CHECKING:
    from pipeline.data.registry import Registry
    from pipeline.log import Log
    from stages.report import StageReport

app = typer.Typer(
    name="pipeline",
    help="Single-organ CT datasets and networks in, one multi-organ network out.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

RegistryOption = Annotated[Path, typer.Option("--registry", "-r", help="What exists.")]
ConfigOption = Annotated[
    Path | None, typer.Option("--config", "-c", help="How the stage computes; default: built in.")
]
WorkOption = Annotated[Path, typer.Option("--work", "-w", help="Work folder: cache and runs.")]
DeviceOption = Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:1. Speed only.")]
WorkersOption = Annotated[int, typer.Option(help="Loader processes. Speed only.", min=0)]
WindowBatchOption = Annotated[int, typer.Option(help="Windows per pass. Speed only.", min=1)]
QuietOption = Annotated[bool, typer.Option("--quiet", "-q", help="Only warnings and errors.")]
DryRunOption = Annotated[bool, typer.Option("--dry-run", help="Say what would be done.")]
MinutesOption = Annotated[
    float, typer.Option(help="Minutes between checkpoints: what a kill can cost.", min=0)
]
REGISTRY = Path("data_registry.yaml")
WORK = Path("work")


@app.command()
def phantom(registry: RegistryOption = REGISTRY, quiet: QuietOption = False) -> None:
    """Generate the made-up CT datasets that a registry describes."""
    from pipeline.demo import generate_phantoms

    generate_phantoms(_registry(registry, files=False), _log(quiet))


@app.command("train-teachers")
def train_teachers(
    registry: RegistryOption = REGISTRY,
    config: ConfigOption = None,
    work: WorkOption = WORK,
    only: Annotated[str | None, typer.Option(help="One teacher by name.")] = None,
    device: DeviceOption = "auto",
    workers: WorkersOption = 0,
    checkpoint_minutes: MinutesOption = 10.0,
    dry_run: DryRunOption = False,
    quiet: QuietOption = False,
) -> None:
    """Train one network per organ from its own dataset, for those who have none."""
    from pipeline.config import load_config
    from stages import train_teachers as stage

    settings = load_config(config, stage.TrainTeachersConfig) if config else None
    report = stage.run(
        settings or stage.TrainTeachersConfig(),
        _registry(registry),
        work,
        log=_log(quiet, work, dry_run),
        device=device,
        workers=workers,
        checkpoint_minutes=checkpoint_minutes,
        only=only,
        dry_run=dry_run,
    )
    _end(report)


@app.command("cache-teachers")
def cache_teachers(
    registry: RegistryOption = REGISTRY,
    config: ConfigOption = None,
    work: WorkOption = WORK,
    device: DeviceOption = "auto",
    window_batch: WindowBatchOption = 1,
    dry_run: DryRunOption = False,
    quiet: QuietOption = False,
) -> None:
    """Stage one: run every teacher over every case once, and cache what they say."""
    from pipeline.config import load_config
    from stages import cache_teachers as stage

    settings = load_config(config, stage.CacheTeachersConfig) if config else None
    report = stage.run(
        settings or stage.CacheTeachersConfig(),
        _registry(registry),
        work,
        log=_log(quiet, work, dry_run),
        device=device,
        window_batch=window_batch,
        dry_run=dry_run,
        tables=not quiet,
    )
    _end(report)


@app.command("train-student")
def train_student(
    registry: RegistryOption = REGISTRY,
    config: ConfigOption = None,
    work: WorkOption = WORK,
    device: DeviceOption = "auto",
    workers: WorkersOption = 0,
    checkpoint_minutes: MinutesOption = 10.0,
    dry_run: DryRunOption = False,
    quiet: QuietOption = False,
) -> None:
    """Stage two: train the multi-organ student from the cache alone."""
    from pipeline.config import load_config
    from stages import train_student as stage

    settings = load_config(config, stage.TrainStudentConfig) if config else None
    report = stage.run(
        settings or stage.TrainStudentConfig(),
        _registry(registry, files=False),
        work,
        log=_log(quiet, work, dry_run),
        device=device,
        workers=workers,
        checkpoint_minutes=checkpoint_minutes,
        dry_run=dry_run,
    )
    _end(report)


@app.command()
def predict(
    student: Annotated[Path, typer.Argument(help="student.pt of a finished run.")],
    images: Annotated[Path, typer.Argument(help="A NIfTI file or a folder of them.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder of label maps.")],
    config: ConfigOption = None,
    device: DeviceOption = "auto",
    window_batch: WindowBatchOption = 1,
    dry_run: DryRunOption = False,
    quiet: QuietOption = False,
) -> None:
    """NIfTI in, multi-organ label map out, in the geometry of the input."""
    from pipeline.config import load_config
    from stages import predict as stage

    settings = load_config(config, stage.PredictConfig) if config else None
    report = stage.run(
        settings or stage.PredictConfig(),
        student,
        stage.find_inputs(images),
        output,
        log=_log(quiet),
        device=device,
        window_batch=window_batch,
        dry_run=dry_run,
    )
    _end(report)


@app.command()
def evaluate(
    predictions: Annotated[Path, typer.Argument(help="Folder with <dataset>/<case>.nii.gz.")],
    registry: RegistryOption = REGISTRY,
    config: ConfigOption = None,
    dry_run: DryRunOption = False,
    quiet: QuietOption = False,
) -> None:
    """Dice, NSD and HD95 per case and organ, as summary.json and a table."""
    from pipeline.config import load_config
    from stages import evaluate as stage

    settings = load_config(config, stage.EvaluateConfig) if config else None
    report = stage.run(
        settings or stage.EvaluateConfig(),
        _registry(registry),
        predictions,
        log=_log(quiet),
        table=not quiet,
        dry_run=dry_run,
    )
    _end(report)


@app.command()
def status(
    registry: RegistryOption = REGISTRY,
    work: WorkOption = WORK,
    as_json: Annotated[bool, typer.Option("--json", help="For machines.")] = False,
) -> None:
    """What is done, missing, stale or damaged, per dataset and teacher."""
    from pipeline.status import print_status
    from pipeline.status import status as look

    found = look(_registry(registry, files=False), work)
    if as_json:
        typer.echo(json.dumps(found.to_json(), indent=1))
    else:
        print_status(found)


@app.command()
def demo(
    folder: Annotated[Path, typer.Argument(help="Where everything goes.")] = Path("demo"),
    quick: Annotated[bool, typer.Option("--quick", help="Tiny: under a minute.")] = False,
    quiet: QuietOption = False,
) -> None:
    """The whole road on a made-up cohort: teachers, cache, student, baselines, table, picture."""
    from pipeline.demo import run_demo

    run_demo(folder, quick=quick, log=_log(quiet, folder))


def main() -> None:
    """Entry point: a `PipelineError` is one paragraph, anything else keeps its traceback."""
    try:
        app()
    except PipelineError as error:
        typer.echo(f"error: {error}", err=True)
        sys.exit(error.exit_code)


def _registry(path: Path, *, files: bool = True) -> Registry:
    from pipeline.data.registry import load_registry

    return load_registry(path, files=files)


def _log(quiet: bool, work: Path | None = None, dry_run: bool = False) -> Log:
    from pipeline.log import Log

    return Log(quiet=quiet, events=work / "events.jsonl" if work and not dry_run else None)


def _end(report: StageReport) -> None:
    typer.echo(report.summary(), err=True)
    for unit, error in report.failed.items():
        typer.echo(f"failed: {unit}: {error}", err=True)
    if report.exit_code:
        raise typer.Exit(report.exit_code)


if __name__ == "__main__":
    main()
