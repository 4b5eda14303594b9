"""`@recorded`: gives a command `--report` and `--verbose`, and keeps a record of its call."""

from __future__ import annotations

import functools
import inspect
import json
import os
import platform
import resource
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable, Mapping
from contextlib import suppress
from contextvars import ContextVar
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, ParamSpec

import typer

from pipeline.errors import ConfigError, PipelineError, WorkFolderError, named
from pipeline.folder import check_writable, json_with, refuse_foreign, replace_file

if TYPE_CHECKING:
    from pipeline.log import Log
    from stages.report import StageReport

P = ParamSpec("P")


def recorded(command: Callable[P, None], *, group: str = "") -> Callable[..., None]:
    """A command with the two options more. Its body needs to know of neither.

    `open_log`, `open_settings` and `end` of `cli.options` tell the record what there is to tell.
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
        record = CallRecord(name, given, report, verbose)
        record.begin()
        if record.path is not None and signal.getsignal(signal.SIGTERM) is signal.SIG_DFL:
            # A batch system ends a job by it: there is time for a report. A training, which also
            # writes a checkpoint then, has a handler of its own.
            signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
        try:
            command(*args, **kwargs)
        except BaseException as error:
            _ended(record, error)
            raise
        record.end(0)

    from pipeline.cli.options import ReportOption, VerboseOption  # which import this module

    more = {"report": (None, ReportOption), "verbose": (False, VerboseOption)}
    kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
    parameters = [*signature.parameters.values()]
    parameters += [
        inspect.Parameter(option, kind, default=default, annotation=annotation)
        for option, (default, annotation) in more.items()
    ]
    run.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
    run.__annotations__ = {p.name: p.annotation for p in parameters} | {"return": None}
    return run


def _ended(record: CallRecord, error: BaseException) -> None:
    """By an error, or by an exit code. A report that cannot be written must not hide the error."""
    if record.verbose and isinstance(error, PipelineError):
        traceback.print_exception(error, file=sys.stderr)
    reported = None if isinstance(error, typer.Exit) else error
    try:
        record.end(exit_code_of(error), reported)
    except PipelineError as problem:
        typer.echo(f"error: {problem}", err=True)


def exit_code_of(error: Any) -> int:
    """What the process ends with. An interrupted one, as shells count: 128 + SIGINT."""
    if isinstance(error, (PipelineError, typer.Exit)):
        return int(error.exit_code)
    if isinstance(error, SystemExit):
        return error.code if isinstance(error.code, int) else 1
    return 130 if isinstance(error, KeyboardInterrupt) else 1


# What one call of a command was asked, did and took: the file that `--report` names.
#
# It is written when the command ends, also when it fails; docs/commands.md describes its keys.

FORMAT_VERSION = 1

# Parameters of commands that name what is read and what is written, in their own words.
INPUTS = (
    "registry", "registries", "config", "configs", "slurm_config", "student", "images", "a", "b",
    "run", "check_on", "against",
)  # fmt: skip
OUTPUTS = ("work", "output", "predictions", "folder", "stage_to")
_ONLY_READ = {"report": ("predictions",)}

# Folders that a command fills after long work: whether they can be written is asked first. Other
# commands ask so soon themselves that nothing was done before.
WRITES = {
    "cache export": ("output",),
    "cache-teachers": ("work",),
    "compare": ("output", "work"),
    "demo": ("folder",),
    "export": ("output",),
    "inspect": ("output",),
    "predict": ("output",),
    "train-student": ("work",),
    "train-teachers": ("work",),
}

_CURRENT: ContextVar[CallRecord | None] = ContextVar("run record", default=None)


@dataclass
class CallRecord:
    """One call of a command: as it is typed, `cache-teachers`, with all its arguments, defaults
    among them; where the report goes, if anywhere; and of which settings, defaults among them."""

    command: str
    arguments: Mapping[str, Any]
    path: Path | None = None
    verbose: bool = False
    config_digest: str | None = None
    reports: list[StageReport] = field(default_factory=list)
    log: Log | None = None
    _began: float = field(default_factory=time.monotonic)
    _at: str = field(default_factory=lambda: _now())
    _inputs: dict[str, Any] = field(default_factory=dict)

    @property
    def is_dry_run(self) -> bool:
        """Whether nothing else is to be written."""
        return bool(self.arguments.get("dry_run") or self.arguments.get("print_"))

    def begin(self) -> None:
        """From here on the record is `current()`; files that are read are digested as they are now.

        Raises:
            ConfigError: it would replace a file that is no report.
            WorkFolderError: the report, or the folder that the command fills, could not be written
                in the end: said before hours of work.
        """
        for name in () if self.is_dry_run else WRITES.get(self.command, ()):
            if isinstance(folder := self.arguments.get(name), Path):
                check_writable(folder)
        if self.path is not None:
            _check_place(self.path, self.command)
            read = (*INPUTS, *_ONLY_READ.get(self.command, ()))
            self._inputs = {name: _described(self.arguments.get(name)) for name in read}
        _CURRENT.set(self)

    def attach(self, log: Log) -> None:
        """The log that the command opened learns what runs; it keeps that for its first event."""
        from pipeline.config import versions

        self.log = log
        known = {name: text for name, text in versions().items() if text is not None}
        log.begin(command=self.command, arguments=dict(self.arguments), versions=known)
        log.detail(", ".join(f"{name} {text}" for name, text in known.items()))
        if self.config_digest is not None:
            log.detail(f"digest of the settings: {self.config_digest}")

    def end(self, exit_code: int, error: BaseException | None = None) -> None:
        """Writes the report, and a last event."""
        _CURRENT.set(None)
        seconds = round(time.monotonic() - self._began, 3)
        if self.log is not None:
            counts = self._units(short=True)
            self.log.end(command=self.command, exit_code=exit_code, seconds=seconds, **counts)
        if self.path is None:
            return
        text = json.dumps(self._to_json(exit_code, error, seconds), indent=1, default=str)
        try:
            replace_file(self.path, f"{text}\n".encode())
        except OSError as problem:
            raise WorkFolderError(
                f"the report cannot be written ({problem.strerror or problem}).",
                where=self.path,
                fix="What the command did stays done: name another file with --report.",
            ) from problem

    def _to_json(
        self, exit_code: int, error: BaseException | None, seconds: float
    ) -> dict[str, Any]:
        from pipeline.config import versions

        read = _ONLY_READ.get(self.command, ())
        outputs = {name: self.arguments.get(name) for name in OUTPUTS if name not in read}
        return {
            "format_version": FORMAT_VERSION,
            "command": self.command,
            "arguments": dict(self.arguments),
            "dry_run": self.is_dry_run,
            "began": self._at,
            "ended": _now(),
            "seconds": seconds,
            "exit_code": exit_code,
            "error": None if error is None else _said(error),
            "units": self._units(),
            "stages": [dict(report.to_json()) for report in self.reports],
            "config_digest": self.config_digest,
            "inputs": {name: found for name, found in self._inputs.items() if found is not None},
            "outputs": {name: value for name, value in outputs.items() if value is not None},
            "device": _device(self.arguments),
            "memory": _memory(),
            "machine": {
                "host": socket.gethostname(),
                "system": platform.platform(),
                "cores": os.cpu_count(),
            },
            "versions": versions(),
        }

    def _units(self, *, short: bool = False) -> dict[str, Any]:
        """Done, skipped and failed, of all stages; `short`: numbers instead of names."""
        done = [unit for report in self.reports for unit in report.done]
        skipped = [unit for report in self.reports for unit in report.skipped]
        failed = {
            unit: str(error) if short else _said(error)
            for report in self.reports
            for unit, error in report.failed.items()
        }
        if short:
            return {"done": len(done), "skipped": len(skipped), "failed": failed}
        return {"done": done, "skipped": skipped, "failed": failed}


def current() -> CallRecord | None:
    """The record of the command that runs; None where functions are called from elsewhere."""
    return _CURRENT.get()


def note_silence() -> None:
    """Of several processes of one command only the first reports; the others call this."""
    if (record := current()) is not None:
        record.path = None


def _check_place(path: Path, command: str) -> None:
    """Nothing is written here: a dry run, too, may have a report."""
    if path.is_dir():
        raise WorkFolderError(
            "the report cannot be written: it is a folder.",
            where=f"--report {path}",
            fix="Name a file, for example run.json.",
        )
    with named(f"--report {path}"):
        check_writable(path.parent)
    is_ours = json_with(path, "format_version", "command", "exit_code") is not None
    refuse_foreign(command, [(path, is_ours)], fix="Name another file with --report.")


def _described(value: Any) -> Any:
    """A path with the SHA-256 of the file it leads to, None for a folder; lists one by one."""
    from pipeline.config import file_sha256

    if isinstance(value, (list, tuple)):
        return [_described(one) for one in value]
    if not isinstance(value, Path):
        return None if value is None else {"path": str(value), "sha256": None}
    sha256 = None
    with suppress(OSError):
        sha256 = file_sha256(value) if value.is_file() else None
    return {"path": str(value), "sha256": sha256}


def _said(error: BaseException) -> dict[str, Any]:
    parts: dict[str, Any] = {"what": str(error), "where": None, "fix": None}
    if isinstance(error, PipelineError):
        parts = {"what": error.what, "where": error.where, "fix": error.fix or None}
    code = getattr(error, "exit_code", 1)
    return {"kind": type(error).__name__, **parts, "message": str(error), "exit_code": code}


def _device(arguments: Mapping[str, Any]) -> dict[str, Any] | None:
    """What was asked for and what that meant here; with workers elsewhere only they know."""
    asked = arguments.get("device")
    if asked is None:
        return None
    found: dict[str, Any] = {"asked": asked, "used": None, "name": None}
    if "torch" in sys.modules and arguments.get("executor") is None:
        import torch

        from pipeline.networks.by_name import pick_device

        with suppress(PipelineError, RuntimeError):
            used = [pick_device(name.strip()) for name in str(asked).split(",")]
            found["used"] = ",".join(map(str, used))
            names = [torch.cuda.get_device_name(one) for one in used if one.type == "cuda"]
            found["name"] = ", ".join(dict.fromkeys(names)) or None
    return found


def _memory() -> dict[str, int | None]:
    """Peaks, in bytes: resident memory of this process, and of the largest of those it started and
    that have ended; what torch held on the GPU that held most, None if it used none."""
    own, others = (
        resource.getrusage(who).ru_maxrss * 1024
        for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
    )
    gpu = None
    if "torch" in sys.modules:
        import torch

        if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
            gpu = max(torch.cuda.max_memory_reserved(n) for n in range(torch.cuda.device_count()))
    return {"peak_rss_bytes": own, "peak_rss_of_a_child_bytes": others, "peak_gpu_bytes": gpu}


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
