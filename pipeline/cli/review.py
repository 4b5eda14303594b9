"""The commands after a run: `pipeline inspect`, `report`, `compare`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pipeline.cli import options as opt
from pipeline.cli.options import Panel, open_log, open_registry, open_settings, show
from pipeline.cli.record import recorded
from pipeline.errors import ConfigError

if TYPE_CHECKING:
    from pipeline.data.registry import Registry
    from pipeline.folder import Folder
    from pipeline.review.inspect.look import View
    from pipeline.review.inspect.numbers import CohortNumbers


@recorded
def inspect(
    case: Annotated[
        str | None,
        typer.Argument(
            help="dataset/case; without it, a table of all cases.", autocompletion=opt.case_names
        ),
    ] = None,
    registry: opt.RegistryOption = opt.REGISTRY,
    config: Annotated[
        Path | None,
        Panel.INPUT.option(
            "--config", "-c", help="A student's YAML: regions as that training sees them."
        ),
    ] = None,
    work: opt.WorkOption = opt.WORK,
    output: Annotated[
        Path, Panel.RESULT.option("--output", "-o", help="Folder to write into.")
    ] = Path("inspection"),
    margin: Annotated[
        float | None, Panel.RESULT.option(help="Log-odds; instead of the YAML's.", min=0)
    ] = None,
    labels_win: Annotated[
        bool | None,
        Panel.RESULT.option("--labels-win/--no-labels-win", help="Instead of the YAML's."),
    ] = None,
    calibrated: Annotated[
        bool | None,
        Panel.RESULT.option("--calibrated/--no-calibrated", help="Instead of the YAML's."),
    ] = None,
    reliability: Annotated[
        bool,
        Panel.RESULT.option(
            "--reliability/--no-reliability",
            help="Whether teachers may be ignored where they are unreliable.",
        ),
    ] = True,
    allow_missing: Annotated[
        bool, Panel.SAFETY.option("--allow-missing", help="Leave out teachers that a case lacks.")
    ] = False,
    workers: opt.WorkersOption = 0,
    as_json: opt.JsonOption = False,
    quiet: opt.QuietOption = False,
) -> None:
    """What a student would be taught: regions and conflicts.

    With a case: NIfTI files and a figure. Without: a table of all cases, improbable ones first.
    """
    from pipeline.review.inspect.run import inspect_case, inspect_cohort

    known = open_registry(registry, files=False)
    changes = {"margin": margin, "labels_win": labels_win, "calibrated": calibrated}
    view, allowed = _view(config, known, work, changes)
    if not reliability:
        view = replace(view, reliability=None)
    allowed = allowed or allow_missing
    if case is not None:
        numbers, written = inspect_case(known, work, case, view, output, allow_missing=allowed)
        if as_json:
            opt.print_json(numbers.model_dump(mode="json"))
            return
        for path in written:
            typer.echo(str(path))
        for flag in numbers.flags:
            typer.echo(f"improbable: {flag}", err=True)
        return
    log = open_log(quiet)
    found = inspect_cohort(
        known, work, view, output, allow_missing=allowed, workers=workers, log=log
    )
    _tell(found, output, as_json)


def _view(
    config: Path | None, registry: Registry, work: Folder, changes: Mapping[str, Any]
) -> tuple[View, bool]:
    """Regions as the student's YAML asks for them, and whether it allows missing units."""
    from pipeline.consensus.evidence import temperatures
    from pipeline.review.inspect.look import View
    from stages.train_student import TrainStudentConfig

    settings = open_settings(config, TrainStudentConfig)
    supervision = settings.training.supervision
    given = {name: value for name, value in changes.items() if value is not None}
    chosen = supervision.model_copy(update=given)
    temperature_of = {}
    if chosen.calibrated:
        measured = temperatures(work, registry, list(registry.teachers))
        temperature_of = {who: t for who, t in measured.items() if t is not None}
    reliability = chosen.reliability if chosen.uses_reliability else None
    view = View(chosen.margin, chosen.labels_win, chosen.confidence, temperature_of, reliability)
    return view, settings.allow_missing


def _tell(found: CohortNumbers, output: Path, as_json: bool) -> None:
    from pipeline.review.inspect.numbers import print_cohort
    from stages.report import StageReport

    show(found, print_cohort, as_json)
    typer.echo(
        f"inspect: {len(found.cases)} cases, {found.num_improbable} improbable; "
        f"{output / 'cohort.csv'}, {output / 'cohort.json'}",
        err=True,
    )
    for unit, error in found.failed.items():
        typer.echo(f"not inspected: {unit}: {error}", err=True)
    if found.failed:
        raise typer.Exit(StageReport("inspect", failed=dict(found.failed)).exit_code)


@recorded
def report(
    run: Annotated[
        str,
        typer.Argument(
            help="A student's run: a folder of WORK/students.", autocompletion=opt.run_names
        ),
    ],
    registry: opt.RegistryOption = opt.REGISTRY,
    work: opt.WorkOption = opt.WORK,
    output: Annotated[
        Path | None,
        Panel.RESULT.option(
            "--output", "-o", help="The page; default: report.html in the run's folder."
        ),
    ] = None,
    predictions: Annotated[
        Path | None,
        Panel.INPUT.option(
            "--predictions",
            "-p",
            help="Folder that `predict` and `evaluate` filled. Without it: validation cases.",
        ),
    ] = None,
    worst: Annotated[
        int, Panel.RESULT.option(help="Worst cases to show, beside the median one.", min=1, max=6)
    ] = 2,
    regions: Annotated[
        bool,
        Panel.RESULT.option(
            "--regions/--no-regions",
            help="Volumes and conflicts: every case of the run is read for them.",
        ),
    ] = True,
    device: opt.DeviceOption = "auto",
    workers: opt.WorkersOption = 0,
    quiet: opt.QuietOption = False,
) -> None:
    """One HTML page about a run.

    Lineage, teachers, regions, curves, scores, cases in pictures. It asks no network for anything.
    """
    from pipeline.review.report.page import PageSettings, write_report
    from stages.predict import PredictConfig

    written = write_report(
        open_registry(registry, files=False),
        work,
        run,
        PageSettings(PredictConfig().digested(), predictions, worst, regions, workers),
        output,
        device=device,
        log=open_log(quiet),
    )
    typer.echo(str(written))


@recorded
def compare(
    configs: Annotated[
        list[Path], typer.Argument(help="Settings of train-student, one file each.")
    ],
    output: Annotated[
        Path, Panel.RESULT.option("--output", "-o", help="Folder for tables and figure.")
    ],
    registry: opt.RegistryOption = opt.REGISTRY,
    work: opt.WorkOption = opt.WORK,
    seeds: Annotated[str, Panel.RESULT.option(help="Each is trained with each: 0,1,2.")] = "0,1,2",
    steps: Annotated[int | None, Panel.RESULT.option(help="Of every run.", min=1)] = None,
    seconds: Annotated[
        float | None, Panel.RESULT.option(help="Of training, of every run; measured first.", min=0)
    ] = None,
    baseline: Annotated[
        str | None, Panel.RESULT.option(help="What others are compared with; default: the first.")
    ] = None,
    name: Annotated[
        str | None, Panel.RESULT.option(help="Folder below WORK/students; default: as --output's.")
    ] = None,
    test: Annotated[
        bool,
        Panel.RESULT.option("--test", help="Score the test cases: once, when choices are made."),
    ] = False,
    allow_missing: opt.AllowMissingOption = False,
    stage_to: opt.StageToOption = None,
    device: opt.DeviceOption = "auto",
    workers: opt.WorkersOption = 0,
    window_batch: opt.WindowBatchOption = 1,
    checkpoint_minutes: opt.MinutesOption = 10.0,
    precision: opt.PrecisionOption = "fp32",
    channels_last: opt.ChannelsLastOption = False,
    compile_: opt.CompileOption = False,
    dry_run: opt.DryRunOption = False,
    quiet: opt.QuietOption = False,
) -> None:
    """Train several students on equal terms, in one table.

    From one cache; a figure, too.
    """
    from pipeline.student.distributed import refuse_several
    from pipeline.student.speed import SpeedFlags, TrainingExecution
    from stages.compare.page import write_results
    from stages.compare.plan import ComparisonSettings, load_configurations, plan_comparison
    from stages.compare.results import check_place, print_results
    from stages.compare.run import compare as run
    from stages.report import Scope

    refuse_several("compare")
    check_place(output, "test" if test else "validation")
    log = open_log(quiet, work, dry_run)
    scope = Scope(open_registry(registry, files=False), work, log)
    execution = TrainingExecution(
        device, workers, SpeedFlags(precision, channels_last, compile_),
        checkpoint_minutes=checkpoint_minutes, stage_to=stage_to,
    )  # fmt: skip
    settings = ComparisonSettings(
        name=name or output.resolve().name, seeds=_numbers(seeds), steps=steps, seconds=seconds,
        baseline=baseline, test=test, allow_missing=allow_missing,
    )  # fmt: skip
    plan = plan_comparison(
        load_configurations(configs), settings, scope, None if dry_run else execution
    )
    if dry_run:
        for one in plan.runs:
            typer.echo(f"{'finished' if one.finished else 'to train'}  {one.folder}")
        return
    results = run(plan, scope, execution, window_batch=window_batch)
    written = write_results(results, output, device=device)
    if not quiet:
        print_results(results)
    log.info(f"written: {', '.join(str(path) for path in written)}")
    if results.failed:
        raise typer.Exit(1)


def _numbers(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError as error:
        raise ConfigError(
            f"{text!r} are no whole numbers.", where="--seeds", fix="Write them as 0,1,2."
        ) from error
