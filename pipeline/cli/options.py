"""Options that several commands share, what the tab key offers for them, and how a command opens
its registry and its log."""

from __future__ import annotations

import json
import re
import traceback
from collections.abc import Callable, Sequence
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from typer.core import TyperCommand

from pipeline.cli.record import current
from pipeline.errors import ConfigError
from pipeline.folder import Folder, parse_folder

if TYPE_CHECKING:
    from pipeline.config import ConfigT
    from pipeline.data.registry import Registry
    from pipeline.log import Log
    from stages.report import StageReport


class Panel(StrEnum):
    """Groups of options in the help of every command, in this order."""

    INPUT = "What to work on"
    RESULT = "What to do"
    MACHINE = "Machine: speed, not results"
    JOBS = "Several jobs"
    SAFETY = "Safety"
    MESSAGES = "What it tells"

    def option(self, *names: str, **settings: Any) -> Any:
        """`typer.Option`, in this group."""
        return typer.Option(*names, rich_help_panel=self, **settings)


class Command(TyperCommand):
    """Its help shows the groups in the order of `Panel`, and `--help` in the last of them."""

    def get_params(self, ctx: Any) -> list[Any]:
        """Arguments, then options."""
        found: list[Any] = super().get_params(ctx)
        for one in found:
            if "--help" in one.opts:
                one.rich_help_panel = Panel.MESSAGES
        order = [None, *Panel]  # None: of arguments
        return sorted(found, key=lambda one: order.index(one.rich_help_panel))


# What a shell offers at the tab key: names out of the registry and the work folder.
#
# A shell waits for the answer, so nothing heavy is loaded: the registry is read as plain YAML. What
# cannot be read offers nothing, and says nothing.

REGISTRY, WORK = Path("data_registry.yaml"), Path("work")


def one_of(*names: str) -> Callable[[str], list[str]]:
    """Completes fixed names."""
    return lambda incomplete: [name for name in names if name.startswith(incomplete)]


def teacher_names(ctx: typer.Context, incomplete: str) -> list[str]:
    """Teachers of the registry that the command line names, or of the one that is there."""
    return _starting(_registry(ctx).get("teachers"), incomplete)


def case_names(ctx: typer.Context, incomplete: str) -> list[str]:
    """`dataset/case`: first the datasets, then the cases of one that the cache has."""
    dataset, slash, _ = incomplete.partition("/")
    if not slash:
        return [f"{name}/" for name in _starting(_registry(ctx).get("datasets"), incomplete)]
    try:
        folders = [p.name for p in (_work(ctx) / "cases" / dataset).iterdir()]
    except OSError:
        return []
    cases = {name.rpartition("@")[0] for name in folders if "@" in name}
    return _starting([f"{dataset}/{case}" for case in cases], incomplete)


def student_files(ctx: typer.Context, incomplete: str) -> list[str]:
    """The `student.pt` of finished runs in `work`; otherwise the shell offers files."""
    found = _in_runs(WORK / "students", "student.pt")
    return _starting([path.as_posix() for path in found], incomplete)


def run_names(ctx: typer.Context, incomplete: str) -> list[str]:
    """Runs below `WORK/students`; those of a comparison are `<comparison>/<run>`."""
    folder = _work(ctx) / "students"
    names = [p.parent.relative_to(folder).as_posix() for p in _in_runs(folder, "config.json")]
    return _starting(names, incomplete)


def _in_runs(folder: Path, name: str) -> list[Path]:
    return [*folder.glob(f"*/{name}"), *folder.glob(f"*/*/{name}")]


def _registry(ctx: typer.Context) -> dict[str, Any]:
    import yaml

    path = ctx.params.get("registry") or REGISTRY
    try:
        data = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError):
        return {}
    return data if isinstance(data, dict) else {}


def _work(ctx: typer.Context) -> Path:
    """A store is not asked: its answer takes longer than a person waits at the tab key."""
    return Path(str(ctx.params.get("work") or WORK))


def _starting(names: Any, incomplete: str) -> list[str]:
    if not isinstance(names, (dict, list)):
        return []
    return sorted(str(name) for name in names if str(name).startswith(incomplete))


RegistryOption = Annotated[
    Path, Panel.INPUT.option("--registry", "-r", help="YAML: organs, datasets and teachers.")
]
ConfigOption = Annotated[
    Path | None,
    Panel.INPUT.option("--config", "-c", help="YAML: settings of the stage; default: built in."),
]
WorkOption = Annotated[
    Folder,
    Panel.INPUT.option(
        "--work",
        "-w",
        parser=parse_folder,
        metavar="FOLDER",
        help="Work folder: cache and runs. A path, or s3://bucket/prefix.",
    ),
]
DeviceOption = Annotated[str, Panel.MACHINE.option(help="auto, cpu, cuda or cuda:1.")]
WorkersOption = Annotated[int, Panel.MACHINE.option(help="Processes that load data.", min=0)]
PrecisionOption = Annotated[
    Literal["fp32", "bf16", "fp16"],
    Panel.MACHINE.option(help="Of the network's passes; for GPUs. Changes rounding, too."),
]
ChannelsLastOption = Annotated[
    bool, Panel.MACHINE.option("--channels-last", help="Memory format of 3D convolutions.")
]
CompileOption = Annotated[bool, Panel.MACHINE.option("--compile", help="torch.compile.")]
WindowBatchOption = Annotated[int, Panel.MACHINE.option(help="Windows per pass.", min=1)]
QuietOption = Annotated[
    bool, Panel.MESSAGES.option("--quiet", "-q", help="Only warnings and errors.")
]
DryRunOption = Annotated[
    bool, Panel.SAFETY.option("--dry-run", help="Say what would be done; do nothing.")
]
JsonOption = Annotated[
    bool, Panel.MESSAGES.option("--json", help="The result as JSON, for machines.")
]
TrustOption = Annotated[
    list[str] | None,
    Panel.SAFETY.option(
        "--trust",
        help="A teacher whose own code or config may run; once for each.",
        autocompletion=teacher_names,
    ),
]
ReportOption = Annotated[
    Path | None,
    Panel.MESSAGES.option(
        "--report",
        metavar="FILE",
        help="JSON: what was asked, done, skipped, failed, and what it took; also on failure.",
    ),
]
VerboseOption = Annotated[
    bool, Panel.MESSAGES.option("--verbose", "-v", help="Each unit, and where an error comes from.")
]
YesOption = Annotated[bool, Panel.SAFETY.option("--yes", "-y", help="Do not ask.")]
MinutesOption = Annotated[
    float, Panel.MACHINE.option(help="Minutes between checkpoints: what a kill can cost.", min=0)
]
LoggerOption = Annotated[
    list[str] | None,
    Panel.MESSAGES.option(
        "--logger",
        help="tensorboard, mlflow or wandb beside metrics.jsonl; once for each.",
        autocompletion=one_of("tensorboard", "mlflow", "wandb"),
    ),
]


def parse_stage_to(text: str) -> Path:
    """The folder of `--stage-to`, as the shell left it."""
    if not text.strip() or "$" in text or "://" in text:
        why = "is no folder of this machine" if "://" in text else (
            "is no folder: a variable is not set, or the shell did not put it in"
        )  # fmt: skip
        raise ConfigError(
            f"{text!r} {why}.",
            where="--stage-to",
            fix='Name a folder on the node\'s own disk; a variable in double quotes: "$TMPDIR".',
        )
    return Path(text)


_SIZE = re.compile(r"\s*([0-9]*\.?[0-9]+(?:e[0-9]+)?)\s*([kmgtp]?)(i?)b?\s*", re.IGNORECASE)


def parse_size(text: str, option: str) -> int:
    """`2 TB`, `500GB`, `1.5TiB`, `1e12` -> bytes."""
    match = _SIZE.fullmatch(text)
    if match is None or (match[3] and not match[2]):
        raise ConfigError(
            f"{text!r} is no size.", where=option, fix='Write bytes, or for example "2 TB".'
        )
    power = " kmgtp".index(match[2].lower() or " ")
    base = 1024.0 if match[3] else 1000.0
    return round(float(match[1]) * base**power)


StageToOption = Annotated[
    Path | None,
    Panel.MACHINE.option(
        parser=parse_stage_to,
        metavar="FOLDER",
        help="On this machine's own disk: what the training reads is copied there first.",
    ),
]
AllowMissingOption = Annotated[
    bool,
    Panel.SAFETY.option(
        "--allow-missing", help="Train with the cases and units that the cache has."
    ),
]
FoldOption = Annotated[
    int | None, Panel.INPUT.option("--fold", help="Of `split: {folds: ..}`: the one held out.")
]
SelfTestOption = Annotated[
    bool,
    Panel.SAFETY.option(
        "--self-test",
        help="Only try, in a temporary folder, whether training here resumes exactly after kills.",
    ),
]


def open_registry(
    path: Path, *, files: bool = True, trust: Sequence[str] | None = None, fold: int | None = None
) -> Registry:
    """Reads a registry; `files`: also hold it against the files that it names; `trust`: teachers
    that may run code of their own; `fold`: that validates."""
    from pipeline.data.registry import load_registry

    found = load_registry(path, files=files).trusting(trust or ())
    return found if fold is None else found.on_fold(fold)


def open_settings(path: Path | None, model: type[ConfigT]) -> ConfigT:
    """A stage's settings from its YAML; without one, the defaults."""
    from pipeline.config import digest, load_config

    settings = model() if path is None else load_config(path, model)
    if (record := current()) is not None:
        record.config_digest = digest(settings)
    return settings


def open_log(
    quiet: bool, work: Folder | None = None, dry_run: bool = False, *, writer: str = ""
) -> Log:
    """Lines for people, and events in the work folder unless nothing may be written.

    `writer`: names the file of events where several jobs write at once, which not every file
    system lets them do in one file.
    """
    from pipeline.log import Log

    name = f"events.{writer}.jsonl" if writer else "events.jsonl"
    record = current()
    log = Log(
        quiet=quiet,
        verbose=record is not None and record.verbose,
        events=work / name if work and not dry_run else None,
    )
    if record is not None:
        record.attach(log)
    return log


def show(found: Any, people: Callable[[Any], None], as_json: bool) -> None:
    """A result on standard output: for machines, or in its tables for people."""
    if as_json:
        print_json(found.to_json())
    else:
        people(found)


def print_json(value: Any) -> None:
    """Plain values, on standard output."""
    typer.echo(json.dumps(value, indent=1))


def end(report: StageReport) -> None:
    """Says in a line what a stage did, then what failed, and exits with its code."""
    if (record := current()) is not None:
        record.reports.append(report)
    dry_run = record is not None and record.is_dry_run
    typer.echo(report.plan() if dry_run else report.summary(), err=True)
    for unit, error in report.failures():
        typer.echo(f"failed: {unit}: {error}", err=True)
        if record is not None and record.verbose:
            typer.echo("".join(traceback.format_exception(error)), err=True)
    for unit in report.to_mend:
        typer.echo(f"to mend: {unit}: {report.warnings[unit][0]}", err=True)
    if report.exit_code:
        raise typer.Exit(report.exit_code)
