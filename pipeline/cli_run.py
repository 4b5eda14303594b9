"""`@recorded`: gives a command `--report` and `--verbose`, and keeps a record of its call."""

from __future__ import annotations

import functools
import inspect
import signal
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, ParamSpec

import typer

from pipeline.errors import ConfigError, PipelineError
from pipeline.run_record import RunRecord

P = ParamSpec("P")

ReportOption = Annotated[
    Path | None,
    typer.Option(
        "--report",
        metavar="FILE",
        help="JSON: what was asked, done, skipped, failed, and what it took; also on failure.",
    ),
]
VerboseOption = Annotated[
    bool, typer.Option("--verbose", "-v", help="Each unit, and where an error comes from.")
]
_OWN = {"report": (ReportOption, None), "verbose": (VerboseOption, False)}


def recorded(command: Callable[P, None], *, group: str = "") -> Callable[..., None]:
    """A command with the two options more. Its body needs to know of neither.

    `open_log`, `open_settings` and `end` of `cli_options` tell the record what there is to tell.
    """
    signature = inspect.signature(command, eval_str=True)
    name = f"{group} {command.__name__.replace('_', '-')}".strip()

    @functools.wraps(command)
    def run(*args: P.args, **kwargs: P.kwargs) -> None:
        path, verbose = kwargs.pop("report", None), bool(kwargs.pop("verbose", False))
        bound = signature.bind(*args, **kwargs)
        bound.apply_defaults()
        if verbose and bound.arguments.get("quiet"):
            raise ConfigError("--quiet and --verbose are opposites.", fix="Give one of them.")
        report = path if isinstance(path, Path) else None
        given = {k: v for k, v in bound.arguments.items() if not isinstance(v, typer.Context)}
        record = RunRecord(name, given, report, verbose)
        record.begin()
        if record.path is not None and signal.getsignal(signal.SIGTERM) is signal.SIG_DFL:
            signal.signal(signal.SIGTERM, _terminated)
        try:
            command(*args, **kwargs)
        except BaseException as error:
            _ended(record, error)
            raise
        record.end(0)

    parameters = [*signature.parameters.values(), *_parameters()]
    run.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
    run.__annotations__ = {p.name: p.annotation for p in parameters} | {"return": None}
    return run


def _parameters() -> list[inspect.Parameter]:
    return [
        inspect.Parameter(
            name, inspect.Parameter.POSITIONAL_OR_KEYWORD, default=default, annotation=option
        )
        for name, (option, default) in _OWN.items()
    ]


def _ended(record: RunRecord, error: BaseException) -> None:
    """By an error, or by an exit code. A report that cannot be written must not hide the error."""
    if record.verbose and isinstance(error, PipelineError):
        traceback.print_exception(error, file=sys.stderr)
    told = None if isinstance(error, typer.Exit) else error
    try:
        record.end(exit_code_of(error), told)
    except PipelineError as lost:
        typer.echo(f"error: {lost}", err=True)


def _terminated(number: int, frame: object) -> None:
    """A batch system ends a job by this signal: there is time for a report. A training, which also
    writes a checkpoint then, has a handler of its own."""
    raise SystemExit(128 + number)


def exit_code_of(error: Any) -> int:
    """What the process ends with. An interrupted one, as shells count: 128 + SIGINT."""
    if isinstance(error, (PipelineError, typer.Exit)):
        return int(error.exit_code)
    if isinstance(error, SystemExit):
        return error.code if isinstance(error.code, int) else 1
    return 130 if isinstance(error, KeyboardInterrupt) else 1
