"""Options that several commands share, what the tab key offers for them, and how a command opens
its registry and its log.
"""

from __future__ import annotations

import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from pipeline.cli.record import current, note_config, note_report
from pipeline.errors import ConfigError
from pipeline.folder import Folder, parse_folder

if TYPE_CHECKING:
    from pipeline.config import ConfigT
    from pipeline.data.registry import Registry
    from pipeline.log import Log
    from stages.report import StageReport

# What a shell offers at the tab key: names out of the registry and the work folder.
#
# A shell waits for the answer, so nothing heavy is loaded: the registry is read as plain YAML.
# What
# cannot be read offers nothing, and says nothing.

_REGISTRY, _WORK = "data_registry.yaml", "work"


def one_of(*names: str) -> Callable[[str], list[str]]:
    """Completes fixed names."""

    def complete(incomplete: str) -> list[str]:
        return [name for name in names if name.startswith(incomplete)]

    return complete


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
    folder = Path(_WORK) / "students"
    found = [*folder.glob("*/student.pt"), *folder.glob("*/*/student.pt")]
    return _starting([path.as_posix() for path in found], incomplete)


def run_names(ctx: typer.Context, incomplete: str) -> list[str]:
    """Runs below `WORK/students`; those of a comparison are `<comparison>/<run>`."""
    folder = _work(ctx) / "students"
    found = [*folder.glob("*/config.json"), *folder.glob("*/*/config.json")]
    names = [path.parent.relative_to(folder).as_posix() for path in found]
    return _starting(names, incomplete)


def _registry(ctx: typer.Context) -> dict[str, Any]:
    import yaml

    path = ctx.params.get("registry") or _REGISTRY
    try:
        data = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError):
        return {}
    return data if isinstance(data, dict) else {}


def _work(ctx: typer.Context) -> Path:
    """A store is not asked: its answer takes longer than a person waits at the tab key."""
    work = ctx.params.get("work") or _WORK
    return work if isinstance(work, Path) else Path(str(work))


def _starting(names: Any, incomplete: str) -> list[str]:
    if not isinstance(names, (dict, list)):
        return []
    return sorted(str(name) for name in names if str(name).startswith(incomplete))


# Options that several commands share, and how a command opens its registry and its log.

RegistryOption = Annotated[Path, typer.Option("--registry", "-r", help="What exists.")]
ConfigOption = Annotated[
    Path | None, typer.Option("--config", "-c", help="How the stage computes; default: built in.")
]
WorkOption = Annotated[
    Folder,
    typer.Option(
        "--work",
        "-w",
        parser=parse_folder,
        metavar="FOLDER",
        help="Work folder: cache and runs. A path, or s3://bucket/prefix.",
    ),
]
DeviceOption = Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:1. Speed only.")]
WorkersOption = Annotated[int, typer.Option(help="Loader processes. Speed only.", min=0)]
PrecisionOption = Annotated[
    Literal["fp32", "bf16", "fp16"],
    typer.Option(help="Of the network's passes; for GPUs. Speed and rounding only."),
]
ChannelsLastOption = Annotated[
    bool, typer.Option("--channels-last", help="Memory format of 3D convolutions. Speed only.")
]
CompileOption = Annotated[bool, typer.Option("--compile", help="torch.compile. Speed only.")]
WindowBatchOption = Annotated[int, typer.Option(help="Windows per pass. Speed only.", min=1)]
QuietOption = Annotated[bool, typer.Option("--quiet", "-q", help="Only warnings and errors.")]
DryRunOption = Annotated[bool, typer.Option("--dry-run", help="Say what would be done.")]
JsonOption = Annotated[bool, typer.Option("--json", help="For machines.")]
TrustOption = Annotated[
    list[str] | None,
    typer.Option(
        "--trust",
        help="A teacher whose own code or config may run; give it once for each.",
        autocompletion=teacher_names,
    ),
]
YesOption = Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")]
MinutesOption = Annotated[
    float, typer.Option(help="Minutes between checkpoints: what a kill can cost.", min=0)
]
LoggerOption = Annotated[
    list[str] | None,
    typer.Option(
        "--logger",
        help="tensorboard, mlflow or wandb beside metrics.jsonl; give it once for each.",
        autocompletion=one_of("tensorboard", "mlflow", "wandb"),
    ),
]


def parse_stage_to(text: str) -> Path:
    """The folder of `--stage-to`, as the shell left it.

    Raises:
        ConfigError: it is empty, or a variable stands in it: one is not set, or was quoted; or it
            is in an object store.
    """
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


StageToOption = Annotated[
    Path | None,
    typer.Option(
        parser=parse_stage_to,
        metavar="FOLDER",
        help="On this machine's own disk: what the training reads is copied there first. "
        "Speed only.",
    ),
]
AllowMissingOption = Annotated[
    bool,
    typer.Option("--allow-missing", help="Train with the cases and units that the cache has."),
]
SelfTestOption = Annotated[
    bool,
    typer.Option(
        "--self-test",
        help="Only try, in a temporary folder, whether this setup resumes exactly after kills.",
    ),
]
REGISTRY = Path("data_registry.yaml")
WORK: Folder = Path("work")


def open_registry(
    path: Path, *, files: bool = True, trust: Sequence[str] | None = None
) -> Registry:
    """Reads a registry; `files`: also hold it against the files that it names; `trust`: teachers
    that may run code of their own."""
    from pipeline.data.registry import load_registry

    return load_registry(path, files=files).trusting(trust or ())


def open_settings(path: Path | None, model: type[ConfigT]) -> ConfigT:
    """A stage's settings from its YAML; without one, the defaults."""
    from pipeline.config import load_config

    settings = model() if path is None else load_config(path, model)
    note_config(settings)
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
        record.tell(log)
    return log


def end(report: StageReport) -> None:
    """Says in a line what a stage did, then what failed, and exits with its code."""
    note_report(report)
    record = current()
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
