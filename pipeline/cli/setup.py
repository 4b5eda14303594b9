"""The commands before a run: `pipeline init`, `check`, `submit`, `info`."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

import stages
from pipeline.cli import options as opt
from pipeline.cli.options import Panel, one_of, open_log, open_registry, open_settings, show
from pipeline.cli.record import recorded
from pipeline.errors import ConfigError, PipelineError
from pipeline.folder import Folder, is_local

if TYPE_CHECKING:
    from pipeline.data.registry import Registry
    from pipeline.setup.submit import Stage, Target


@recorded
def init(
    dataset: Annotated[
        list[str] | None,
        Panel.INPUT.option(
            "--dataset",
            "-d",
            metavar="NAME=PATH[:liver=1+2,background=3]",
            help="Folder or list of cases, and what its label values mean; once for each.",
        ),
    ] = None,
    teacher: Annotated[
        list[str] | None,
        Panel.INPUT.option(
            "--teacher",
            "-t",
            metavar="NAME=PATH[:liver=1,background=rest]",
            help="nnU-Net model folder, MONAI bundle, exported file or checkpoint; once for each.",
        ),
    ] = None,
    organ: Annotated[
        list[str] | None,
        Panel.INPUT.option(metavar="NAME[=ID]", help="Organ to learn; once for each."),
    ] = None,
    files: Annotated[
        list[str] | None,
        Panel.INPUT.option(
            metavar="NAME=IMAGES,LABELS",
            help="Patterns with {case} below a dataset's folder, where they are not recognised.",
        ),
    ] = None,
    spacing_mm: Annotated[
        tuple[float, float, float] | None,
        Panel.RESULT.option(
            metavar="Z Y X", help="Of the student grid; default: what fits the files."
        ),
    ] = None,
    registry: Annotated[
        Path, Panel.RESULT.option("--registry", "-r", help="The file to write.")
    ] = opt.REGISTRY,
    force: Annotated[bool, Panel.SAFETY.option("--force", help="Replace a registry.")] = False,
    yes: opt.YesOption = False,
    dry_run: opt.DryRunOption = False,
) -> None:
    """Write a registry from folders of datasets and teachers.

    Datasets: nnU-Net, Decathlon, MONAI datalists, plain files. What cannot be known is asked.
    """
    from pipeline.data.files import closed_cases, refuse_closed
    from pipeline.setup.init.begin import InitRequest, begin, describe, draft, next_command

    request = InitRequest(dataset or [], teacher or [], files or [], organ or [], spacing_mm)
    ask = None if yes or not can_ask() else partial(typer.prompt, prompt_suffix="\n> ")
    if dry_run:
        typer.echo(draft(registry, request, force=force, ask=ask), nl=False)
        return
    written = begin(registry, request, force=force, ask=ask)
    for line in describe(written):
        typer.echo(line)
    typer.echo(f"wrote {registry}. Read it through; then: {next_command(written)}")
    cases = [case for dataset in written.datasets for case in written.cases(dataset)]
    refuse_closed(closed_cases(cases), registry)


def can_ask() -> bool:
    """Whether somebody sits at the terminal."""
    return sys.stdin.isatty()


@recorded
def check(
    registry: opt.RegistryOption = opt.REGISTRY,
    config: opt.ConfigOption = None,
    dataset: Annotated[str | None, Panel.INPUT.option(help="One alone; default: all.")] = None,
    student: Annotated[
        Path | None,
        Panel.INPUT.option(help="Settings of train-student, for the patch; default: built in."),
    ] = None,
    jobs: Annotated[
        int | None, Panel.MACHINE.option(help="Processes that read; default: one per core.", min=1)
    ] = None,
    no_teachers: Annotated[
        bool, Panel.INPUT.option("--no-teachers", help="Look at datasets alone.")
    ] = False,
    case: Annotated[
        str | None,
        Panel.INPUT.option(
            help="dataset/case for the teachers; default: the first that can be read."
        ),
    ] = None,
    side_mm: Annotated[
        float, Panel.RESULT.option(help="Side of the teachers' crop in mm.", min=1)
    ] = 120.0,
    device: opt.DeviceOption = "auto",
    window_batch: opt.WindowBatchOption = 1,
    trust: opt.TrustOption = None,
    as_json: opt.JsonOption = False,
    quiet: opt.QuietOption = False,
) -> None:
    """What is wrong: files, labels, HU, duplicates, teachers?

    Everything that can be known before a GPU is used.
    """
    from pipeline.config import load_config
    from pipeline.setup.check.cohort import check_datasets
    from pipeline.setup.check.report import Report, print_report
    from pipeline.setup.check.teachers import check_teachers
    from pipeline.teachers.load import Teachers
    from stages.cache_teachers import CacheTeachersConfig
    from stages.train_student import TrainStudentConfig

    settings = open_settings(config, CacheTeachersConfig)
    trained = load_config(student, TrainStudentConfig) if student else TrainStudentConfig()
    opened = open_registry(registry, files=False, trust=trust)
    log = open_log(quiet or as_json)
    data = check_datasets(opened, patch=trained.training.patch, log=log, dataset=dataset, jobs=jobs)
    teachers = None
    if opened.teachers and not no_teachers and any(found.shape for found in data.cases):
        asked = Teachers(opened, settings.window, settings.storage, device, window_batch)
        # One that not every teacher can run on, if there is any.
        case = case or next((found.case for found in data.cases if found.is_slice), None)
        teachers = check_teachers(asked, log, case=case, dataset=dataset, side_mm=side_mm)
    report = Report(opened, data, teachers)
    show(report, print_report, as_json)
    if report.exit_code:
        raise typer.Exit(report.exit_code)


STAGES = ("train-teachers", "cache-teachers", "train-student", "predict", "evaluate")


@recorded
def submit(
    stages: Annotated[
        list[str] | None,
        typer.Argument(
            help=f"One or several of {', '.join(STAGES)}.", autocompletion=one_of(*STAGES)
        ),
    ] = None,
    registry: opt.RegistryOption = opt.REGISTRY,
    config: Annotated[
        list[str] | None,
        Panel.INPUT.option(
            "--config",
            "-c",
            metavar="STAGE=FILE",
            help="How a stage computes; give it once for each. train-student's also names the run "
            "that is predicted and evaluated.",
        ),
    ] = None,
    work: opt.WorkOption = opt.WORK,
    slurm_config: Annotated[
        Path | None, Panel.JOBS.option(help="YAML: what the jobs ask for, per stage.")
    ] = None,
    num_parts: Annotated[
        int | None, Panel.JOBS.option(help="Elements of cache-teachers' array.", min=1)
    ] = None,
    after: Annotated[
        list[str] | None, Panel.JOBS.option(help="A job that the first one waits for.")
    ] = None,
    templates: Annotated[
        Path | None, Panel.INPUT.option(help="Folder with changed templates, <stage>.sh.")
    ] = None,
    copy_templates: Annotated[
        Path | None,
        Panel.RESULT.option(
            help="Only copy the built-in templates to this folder, to change them."
        ),
    ] = None,
    print_: Annotated[
        bool,
        Panel.SAFETY.option(
            "--print", "--dry-run", help="Only show the scripts; write and submit nothing."
        ),
    ] = False,
    quiet: opt.QuietOption = False,
) -> None:
    """Make Slurm jobs of stages and submit them in their order.

    Each waits for the one before.
    """
    from pipeline.config import load_config
    from pipeline.setup import submit as submission
    from pipeline.setup.submit import SubmitSettings

    log = open_log(quiet)
    if copy_templates is not None:
        for path in submission.copy_templates(copy_templates):
            log.info(str(path))
        return
    if not (names := submission.in_order(stages or [])):
        fix = "For example: `pipeline submit train-student --print`."
        raise ConfigError("no stage is named.", where="pipeline submit", fix=fix)
    settings = load_config(slurm_config, SubmitSettings) if slurm_config else SubmitSettings()
    if num_parts is not None:
        settings = settings.with_parts(num_parts)
    target = _target(registry, work, config or [])
    texts = submission.scripts(names, settings, target, templates)
    if print_:
        typer.echo("\n".join(texts.values()), nl=False)
        return
    submission.submit(texts, settings, target, after=after or [], log=log)


def _target(registry: Path, work: Folder, configs: list[str]) -> Target:
    """What the jobs work on. Settings of stages are read, so that no job fails on them later."""
    from pipeline.config import Config, load_config
    from pipeline.setup.submit import Target
    from stages.cache_teachers import CacheTeachersConfig
    from stages.evaluate import EvaluateConfig
    from stages.predict import PredictConfig
    from stages.train_student import TrainStudentConfig
    from stages.train_teachers import TrainTeachersConfig

    if not is_local(work):
        raise ConfigError(
            "jobs of Slurm need a work folder on a disk that the nodes share.",
            where=work,
            fix="Give a path; for a cache in an object store write the batch script yourself.",
        )
    files = _files(configs)
    models: dict[Stage, type[Config]] = {
        "train-teachers": TrainTeachersConfig,
        "cache-teachers": CacheTeachersConfig,
        "train-student": TrainStudentConfig,
        "predict": PredictConfig,
        "evaluate": EvaluateConfig,
    }
    read = {stage: load_config(path, models[stage]) for stage, path in files.items()}
    student, judged = read.get("train-student"), read.get("evaluate")
    loaded = open_registry(registry, files=False)
    trained = [n for n, e in loaded.teachers.items() if e.kind == "checkpoint" and e.trained_on]
    return Target(
        registry.absolute(),
        work.absolute(),
        run=student.run if isinstance(student, TrainStudentConfig) else TrainStudentConfig().run,
        teachers=tuple(trained),
        splits=(judged if isinstance(judged, EvaluateConfig) else EvaluateConfig()).splits,
        folds=loaded.num_folds,
        configs=files,
    )


def _files(configs: list[str]) -> dict[Stage, Path]:
    from pipeline.setup.submit import in_order

    pairs = {name: path for name, _, path in (text.partition("=") for text in configs)}
    if "" in pairs.values() or len(pairs) < len(configs):
        raise ConfigError(
            "--config takes STAGE=FILE, once for each stage.",
            where=" ".join(configs),
            fix="For example: `--config train-student=train_student.yaml`.",
        )
    return {stage: Path(pairs[stage]).absolute() for stage in in_order(list(pairs))}


# `pipeline info`: no network and no image is read, so that the answer is there at once.

SPLITS = ("train", "validation", "test")


def info(
    ctx: typer.Context, registry: opt.RegistryOption = opt.REGISTRY, as_json: opt.JsonOption = False
) -> None:
    """Versions, commands, and what the registry holds.

    At once, and without a GPU. What is wrong with the registry or its files comes last.
    """
    found = about_tool(_commands(ctx))
    there, wrong = _registry(registry)
    if as_json:
        error = None if wrong is None else str(wrong)
        opt.print_json({**found, "registry": there, "registry_error": error})
    else:
        _print_tool(found)
        _print_registry(there, registry)
    if wrong is not None:
        raise wrong


def _registry(path: Path) -> tuple[dict[str, Any] | None, PipelineError | None]:
    """What is in it, and what is wrong with it. Neither if none is named or there."""
    from pipeline.data.files import refuse_closed

    if path == opt.REGISTRY and not path.exists():
        return None, None
    found = None
    try:
        found = about_registry(open_registry(path, files=False))
        open_registry(path)
        closed = {c: why for one in found["datasets"].values() for c, why in one["closed"].items()}
        refuse_closed(closed, path)
    except PipelineError as error:
        return found, error
    return found, None


def _commands(ctx: typer.Context) -> dict[str, str]:
    """Every command, in the order of `pipeline --help`; those of a group as `cache ls`."""
    found: dict[str, str] = {}
    root: Any = ctx.find_root().command
    for name, command in root.commands.items():
        inner = {f"{name} {n}": one for n, one in getattr(command, "commands", {}).items()}
        for full, one in (inner or {name: command}).items():
            found[full] = str(one.help or "").strip().split("\n")[0]
    return found


def _print_tool(found: dict[str, Any]) -> None:
    typer.echo(f"organ-distill {found['version'] or '(not installed)'}, Python {found['python']}")
    packages = found["packages"].items()
    typer.echo(", ".join(f"{name} {text}" for name, text in packages if text is not None))
    if absent := [name for name, text in packages if text is None]:
        typer.echo(f"not installed: {', '.join(absent)}")
    typer.echo("\nstages, with the YAML that shows all settings and their defaults:")
    for name, stage in found["stages"].items():
        typer.echo(f"  pipeline {name:15} {found['commands'].get(name, '')}")
        typer.echo(f"  {'':24} {stage['settings']}")
    others = [name for name in found["commands"] if name not in found["stages"]]
    typer.echo(f"other commands: {', '.join(others)}")


def _print_registry(found: dict[str, Any] | None, path: Path) -> None:
    from pipeline.log import print_table

    if found is None:
        if not path.exists():
            typer.echo(f"no {path} here: `pipeline init` writes one, `pipeline demo` shows one")
        return
    organs = ", ".join(f"{organ} {number}" for organ, number in found["organs"].items())
    spacing = " x ".join(f"{mm:g}" for mm in found["grid"]["spacing_mm"])
    typer.echo(f"\n{found['path']}: student grid {spacing} mm (z, y, x)")
    typer.echo(f"organs with their ids: {organs}")
    rows = [
        [name, ", ".join(one["annotated"]), *(str(one[s]) for s in SPLITS), str(one["cases"])]
        for name, one in found["datasets"].items()
    ]
    print_table("Datasets", ["dataset", "annotated", *SPLITS, "cases"], rows)
    for name, one in found["datasets"].items():
        if one["note"]:
            typer.echo(f"{name}: {one['note']}")
    rows = [
        [name, one["kind"], ", ".join(one["organs"]), ", ".join(one["taps"]) or "–",
         f"{one['weights']}{'' if one['weights_there'] else ' (not there yet)'}"]
        for name, one in found["teachers"].items()
    ]  # fmt: skip
    if rows:
        print_table("Teachers", ["teacher", "kind", "organs", "taps", "weights"], rows)


def stage_settings() -> dict[str, Path]:
    """Command of each stage -> its annotated YAML, which shows all settings with their defaults."""
    modules = sorted(Path(stages.__path__[0]).glob("*.py"))
    found = {path.stem.replace("_", "-"): path.with_suffix(".yaml") for path in modules}
    return {name: path for name, path in found.items() if path.is_file()}


def about_tool(commands: Mapping[str, str]) -> dict[str, Any]:
    """Versions, and every command with what it is for."""
    from pipeline.config import TOOL, versions

    known, settings = versions(), stage_settings()
    return {
        "version": known.pop(TOOL),
        "python": known.pop("python"),
        "packages": known,
        "commands": dict(commands),
        "stages": {
            name: {"command": f"pipeline {name}", "settings": str(settings[name])}
            for name in commands
            if name in settings
        },
    }


def about_registry(registry: Registry) -> dict[str, Any]:
    """Organs with their ids, datasets with counts of cases, teachers.

    `cases` counts what is on the disk, by split; a phantom's cases count whether they have been
    generated or not. `closed` are those that cannot be opened, and why. No file is read.
    """
    return {
        "path": str(registry.path),
        "schema_version": registry.schema_version,
        "organs": dict(registry.label_space.ids),
        "grid": registry.grid.model_dump(mode="json"),
        "datasets": {name: _dataset(registry, name) for name in registry.datasets},
        "teachers": {name: _teacher(registry, name) for name in registry.teachers},
    }


def _dataset(registry: Registry, name: str) -> dict[str, Any]:
    from pipeline.data.files import closed_cases

    entry = registry.datasets[name]
    cases = registry.cases(name)
    counts = Counter(case.split for case in cases)
    folds = entry.split.num_folds
    return {
        "cases": counts.total(),
        **{split: counts[split] for split in SPLITS},
        "note": " ".join(registry.empty_split(name) or ())
        or (f"in {folds} folds, counted as fold 0 validates." if folds else None),
        "closed": closed_cases(cases) if entry.phantom is None else {},
        "annotated": list(entry.annotated),
        "root": str(registry.resolve(entry.root)),
        "made_up": entry.phantom is not None,
        "licence": entry.licence or None,
    }


def _teacher(registry: Registry, name: str) -> dict[str, Any]:
    entry = registry.teachers[name]
    weights = registry.resolve(entry.weights)
    return {
        "kind": entry.kind,
        "organs": list(entry.organs),
        "taps": list(entry.taps),
        "weights": str(weights),
        "weights_there": weights.exists(),
        "trained_on": entry.trained_on,
        "licence": entry.licence or None,
    }
