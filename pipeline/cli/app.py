"""The command line. Every command imports its stage inside the function: --help loads no torch."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from io import TextIOWrapper
from pathlib import Path
from typing import Annotated, NoReturn

import typer

from pipeline.cli import options as opt
from pipeline.cli.cache import cache_app
from pipeline.cli.options import Panel, end, open_log, open_registry, open_settings, show
from pipeline.cli.plan import plan
from pipeline.cli.record import recorded
from pipeline.cli.review import compare, inspect, report
from pipeline.cli.setup import check, info, init, submit
from pipeline.cli.stages import cache_teachers, evaluate, export, predict
from pipeline.errors import ConfigError, PipelineError

app = typer.Typer(
    name="pipeline",
    help=(
        "Single-organ CT datasets and networks in, one multi-organ network out.\n\n"
        "New here? `pipeline demo --quick` goes the whole road in under a minute. With your own "
        "data: init, check, plan, cache-teachers, train-student, predict, evaluate, in this order. "
        "Each explains itself: `pipeline COMMAND --help`."
    ),
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


@recorded
def phantom(
    registry: opt.RegistryOption = opt.REGISTRY,
    dry_run: opt.DryRunOption = False,
    quiet: opt.QuietOption = False,
) -> None:
    """Generate the synthetic CTs that a registry describes."""
    from pipeline.cli.demo import generate_phantoms

    known = open_registry(registry, files=False)
    end(generate_phantoms(known, open_log(quiet), dry_run=dry_run))


@recorded
def train_teachers(
    registry: opt.RegistryOption = opt.REGISTRY,
    config: opt.ConfigOption = None,
    work: opt.WorkOption = opt.WORK,
    only: Annotated[
        str | None,
        Panel.INPUT.option(help="One teacher by name.", autocompletion=opt.teacher_names),
    ] = None,
    device: opt.DeviceOption = "auto",
    workers: opt.WorkersOption = 0,
    checkpoint_minutes: opt.MinutesOption = 10.0,
    logger: opt.LoggerOption = None,
    precision: opt.PrecisionOption = "fp32",
    channels_last: opt.ChannelsLastOption = False,
    compile_: opt.CompileOption = False,
    dry_run: opt.DryRunOption = False,
    quiet: opt.QuietOption = False,
) -> None:
    """Train one teacher per organ, for those who have none.

    Each is trained on its own dataset.
    """
    from pipeline.student.speed import SpeedFlags, TrainingExecution
    from stages import train_teachers as stage
    from stages.report import Scope

    settings = open_settings(config, stage.TrainTeachersConfig)
    scope = Scope(open_registry(registry), work, open_log(quiet, work, dry_run))
    flags = SpeedFlags(precision, channels_last, compile_)
    execution = TrainingExecution(device, workers, flags, logger or (), checkpoint_minutes)
    end(stage.run(settings, scope, execution, only=only, dry_run=dry_run))


@recorded
def train_student(
    registry: opt.RegistryOption = opt.REGISTRY,
    config: opt.ConfigOption = None,
    work: opt.WorkOption = opt.WORK,
    fold: opt.FoldOption = None,
    device: opt.DeviceOption = "auto",
    workers: opt.WorkersOption = 0,
    checkpoint_minutes: opt.MinutesOption = 10.0,
    logger: opt.LoggerOption = None,
    allow_missing: opt.AllowMissingOption = False,
    stage_to: opt.StageToOption = None,
    precision: opt.PrecisionOption = "fp32",
    channels_last: opt.ChannelsLastOption = False,
    compile_: opt.CompileOption = False,
    self_test: opt.SelfTestOption = False,
    steps: Annotated[
        int | None, Panel.SAFETY.option(help="Of the self-test; default: 10.", min=3)
    ] = None,
    seed: Annotated[
        int | None, Panel.SAFETY.option(help="Of the self-test's kills; default: drawn.")
    ] = None,
    dry_run: opt.DryRunOption = False,
    quiet: opt.QuietOption = False,
) -> None:
    """Train the multi-organ student from the cache alone."""
    from pipeline.cli.record import note_silence
    from pipeline.cli.self_test import refuse_without_self_test, run_self_test
    from pipeline.student.distributed import launched
    from pipeline.student.speed import SpeedFlags, TrainingExecution
    from stages import train_student as stage
    from stages.report import Scope

    if not (is_first := launched().is_first):
        note_silence()
    flags = SpeedFlags(precision, channels_last, compile_)
    execution = TrainingExecution(
        device, workers, flags, logger or (), checkpoint_minutes, stage_to
    )
    if self_test:
        if fold is not None:
            fix = "Leave one of them out."
            raise ConfigError("a self-test is of no fold.", where="--self-test --fold", fix=fix)
        run_self_test(
            registry, config, work, execution,
            allow_missing=allow_missing, steps=steps, seed=seed, log=open_log(quiet),
        )  # fmt: skip
        return
    refuse_without_self_test(steps, seed)
    settings = open_settings(config, stage.TrainStudentConfig)
    if allow_missing:
        settings = settings.model_copy(update={"allow_missing": True})
    known = open_registry(registry, files=False, fold=fold)
    scope = Scope(known, work, open_log(quiet, work, dry_run))
    report = stage.run(settings, scope, execution, dry_run=dry_run)
    if not is_first:
        raise typer.Exit(report.exit_code)
    end(report)


def status(
    registry: opt.RegistryOption = opt.REGISTRY,
    work: opt.WorkOption = opt.WORK,
    as_json: opt.JsonOption = False,
) -> None:
    """What is done, missing, stale or damaged.

    Per dataset and teacher.
    """
    from pipeline.review.status import print_status
    from pipeline.review.status import status as look
    from pipeline.setup.submit import with_states

    found = look(open_registry(registry, files=False), work)
    show(replace(found, jobs=with_states(work)), print_status, as_json)


@recorded
def demo(
    folder: Annotated[Path, typer.Argument(help="Where everything goes.")] = Path("demo"),
    quick: Annotated[bool, Panel.RESULT.option("--quick", help="Tiny: under a minute.")] = False,
    quiet: opt.QuietOption = False,
) -> None:
    """The whole road on synthetic CTs: try this first.

    Teachers, cache, student, baselines; a table and a picture at the end.
    """
    from pipeline.cli.demo import run_demo

    run_demo(folder, quick=quick, log=open_log(quiet, folder))


_COMMANDS: dict[str, tuple[Callable[..., None] | typer.Typer, ...]] = {
    "Begin here": (demo, info),
    "Prepare": (init, check, plan, phantom),
    "Stage one: what teachers find in every case, into the cache": (
        train_teachers,
        cache_teachers,
        cache_app,
    ),
    "Stage two: one student for all organs, from the cache": (
        train_student,
        predict,
        evaluate,
        export,
        compare,
    ),
    "Look": (status, inspect, report),
    "On a cluster": (submit,),
}
for _title, _group in _COMMANDS.items():
    for _one in _group:
        if isinstance(_one, typer.Typer):
            app.add_typer(_one, name="cache", rich_help_panel=_title)
        else:
            _name = _one.__name__.replace("_", "-")
            app.command(_name, cls=opt.Command, rich_help_panel=_title)(_one)


def main() -> None:
    """Entry point: a `PipelineError` is one paragraph, anything else keeps its traceback.

    What a terminal cannot spell is escaped. That standard output cannot be written is told, unless
    nobody reads on (`| head`).
    """
    _open_streams()
    try:
        try:
            app()
        except PipelineError as error:
            typer.echo(f"error: {error}", err=True)
            sys.exit(error.exit_code)
        finally:
            sys.stdout.flush()
    except UnicodeEncodeError as error:
        if (spelling := sys.getfilesystemencoding().lower()) == "utf-8":
            raise
        _end(f"{error.object!r} cannot be a file's name in {spelling}. Set PYTHONUTF8=1.")
    except OSError as error:
        try:
            print(flush=True)  # noqa: T201 - is it standard output that fails?
        except OSError:
            with suppress(OSError):  # Python tries once more when it ends
                os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            unread = isinstance(error, BrokenPipeError)
            _end("" if unread else f"standard output cannot be written ({error.strerror}).")
        raise


def _end(what: str) -> NoReturn:
    if what:
        typer.echo(f"error: {what}", err=True)
    sys.exit(1)


def _open_streams() -> None:
    """Closed ones are opened, so that no file gets their numbers; standard output for reading, so
    that what is written to it is an error."""
    if sys.stdin is None:
        sys.stdin = os.fdopen(os.open(os.devnull, os.O_RDONLY))
    if sys.stdout is None:
        sys.stdout = os.fdopen(os.open(os.devnull, os.O_RDONLY), "w")
    if sys.stderr is None:
        sys.stderr = os.fdopen(os.open(os.devnull, os.O_WRONLY), "w")
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):
            with suppress(OSError):  # a pipe that was written to knows no place to go on from
                stream.reconfigure(errors="backslashreplace")
