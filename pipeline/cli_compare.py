"""`pipeline compare`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from pipeline.cli_options import (
    REGISTRY,
    WORK,
    AllowMissingOption,
    ChannelsLastOption,
    CompileOption,
    DeviceOption,
    DryRunOption,
    MinutesOption,
    PrecisionOption,
    QuietOption,
    RegistryOption,
    StageToOption,
    WindowBatchOption,
    WorkersOption,
    WorkOption,
    open_log,
    open_registry,
)
from pipeline.cli_run import recorded
from pipeline.errors import ConfigError


@recorded
def compare(
    configs: Annotated[
        list[Path], typer.Argument(help="Settings of train-student, one file each.")
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for tables and figure.")],
    registry: RegistryOption = REGISTRY,
    work: WorkOption = WORK,
    seeds: Annotated[str, typer.Option(help="Each is trained with each: 0,1,2.")] = "0,1,2",
    steps: Annotated[int | None, typer.Option(help="Of every run.", min=1)] = None,
    seconds: Annotated[
        float | None, typer.Option(help="Of training, of every run; measured first.", min=0)
    ] = None,
    baseline: Annotated[
        str | None, typer.Option(help="What others are compared with; default: the first.")
    ] = None,
    name: Annotated[
        str | None, typer.Option(help="Folder below WORK/students; default: as --output's.")
    ] = None,
    test: Annotated[
        bool, typer.Option("--test", help="Score the test cases: once, when choices are made.")
    ] = False,
    allow_missing: AllowMissingOption = False,
    stage_to: StageToOption = None,
    device: DeviceOption = "auto",
    workers: WorkersOption = 0,
    window_batch: WindowBatchOption = 1,
    checkpoint_minutes: MinutesOption = 10.0,
    precision: PrecisionOption = "fp32",
    channels_last: ChannelsLastOption = False,
    compile_: CompileOption = False,
    dry_run: DryRunOption = False,
    quiet: QuietOption = False,
) -> None:
    """Train several students from one cache on equal terms; one table and one figure."""
    from pipeline.comparison.compare import compare as run
    from pipeline.comparison.configurations import load_configurations
    from pipeline.comparison.plan import plan_comparison
    from pipeline.comparison.settings import Settings
    from pipeline.comparison.tables import check_place, print_results, write_results
    from pipeline.student.launch import refuse_several
    from pipeline.student.speed import SpeedFlags

    refuse_several("compare")
    check_place(output, "test" if test else "validation")
    flags = SpeedFlags(precision, channels_last, compile_)
    log = open_log(quiet, work, dry_run)
    opened = open_registry(registry, files=False)
    settings = Settings(
        name=name or output.resolve().name,
        seeds=_numbers(seeds),
        steps=steps,
        seconds=seconds,
        baseline=baseline,
        test=test,
        allow_missing=allow_missing,
    )
    plan = plan_comparison(
        load_configurations(configs), opened, work, settings,
        log=log, device=device, workers=workers, flags=flags, measure=not dry_run,
        stage_to=stage_to,
    )  # fmt: skip
    if dry_run:
        for one in plan.runs:
            typer.echo(f"{'finished' if one.finished else 'to train'}  {one.folder}")
        return
    results = run(
        plan, opened, work, log=log, device=device, workers=workers, window_batch=window_batch,
        checkpoint_minutes=checkpoint_minutes, flags=flags, stage_to=stage_to,
    )  # fmt: skip
    written = write_results(results, output)
    if not quiet:
        print_results(results)
    log.info(f"written: {', '.join(str(path) for path in written)}")
    if results.exit_code:
        raise typer.Exit(results.exit_code)


def _numbers(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError as error:
        raise ConfigError(
            f"{text!r} are no whole numbers.", where="--seeds", fix="Write them as 0,1,2."
        ) from error
