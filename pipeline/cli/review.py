"""`pipeline inspect`."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pipeline.cli_complete import case_names
from pipeline.cli_options import (
    REGISTRY,
    WORK,
    JsonOption,
    QuietOption,
    RegistryOption,
    WorkersOption,
    WorkOption,
    open_log,
    open_registry,
    open_settings,
)
from pipeline.cli_run import recorded

if TYPE_CHECKING:
    from pipeline.data.registry import Registry
    from pipeline.errors import PipelineError
    from pipeline.folder import Folder
    from pipeline.inspection.cohort_table import CohortNumbers
    from pipeline.inspection.looks import View


@recorded
def inspect(
    case: Annotated[
        str | None,
        typer.Argument(
            help="dataset/case; without it, a table of all cases.", autocompletion=case_names
        ),
    ] = None,
    registry: RegistryOption = REGISTRY,
    config: Annotated[
        Path | None,
        typer.Option(
            "--config", "-c", help="A student's YAML: regions as that training sees them."
        ),
    ] = None,
    work: WorkOption = WORK,
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder to write into.")] = Path(
        "inspection"
    ),
    margin: Annotated[
        float | None, typer.Option(help="Log-odds; instead of the YAML's.", min=0)
    ] = None,
    labels_win: Annotated[
        bool | None,
        typer.Option("--labels-win/--no-labels-win", help="Instead of the YAML's."),
    ] = None,
    calibrated: Annotated[
        bool | None,
        typer.Option("--calibrated/--no-calibrated", help="Instead of the YAML's."),
    ] = None,
    reliability: Annotated[
        bool,
        typer.Option("--reliability/--no-reliability", help="Whether teachers may be doubted."),
    ] = True,
    allow_missing: Annotated[
        bool, typer.Option("--allow-missing", help="Leave out teachers that a case lacks.")
    ] = False,
    workers: WorkersOption = 0,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """What a student would be taught: regions, agreed background, conflicts, disagreement.

    With a case: NIfTI files and a figure. Without: a table of all cases, improbable ones first.
    """
    from pipeline.inspection.run import inspect_case, inspect_cohort

    known = open_registry(registry, files=False)
    changes = {"margin": margin, "labels_win": labels_win, "calibrated": calibrated}
    view, allowed = _view(config, known, work, changes)
    if not reliability:
        view = replace(view, reliability=None)
    allowed = allowed or allow_missing
    if case is not None:
        numbers, written = inspect_case(known, work, case, view, output, allow_missing=allowed)
        if as_json:
            typer.echo(json.dumps(numbers.model_dump(mode="json"), indent=1))
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
    from pipeline.admission.evidence import temperatures
    from pipeline.inspection.looks import View
    from stages.train_student import TrainStudentConfig

    settings = open_settings(config, TrainStudentConfig)
    supervision = settings.training.supervision
    given = {name: value for name, value in changes.items() if value is not None}
    chosen = supervision.model_copy(update=given)
    heat = {}
    if chosen.calibrated:
        measured = temperatures(work, registry, list(registry.teachers))
        heat = {who: t for who, t in measured.items() if t is not None}
    reliability = chosen.reliability if chosen.uses_reliability else None
    view = View(chosen.margin, chosen.labels_win, chosen.confidence, heat, reliability)
    return view, settings.allow_missing


def _tell(found: CohortNumbers, output: Path, as_json: bool) -> None:
    from pipeline.inspection.cohort_table import print_cohort

    if as_json:
        typer.echo(json.dumps(found.to_json(), indent=1))
    else:
        print_cohort(found)
    typer.echo(
        f"inspect: {len(found.cases)} cases, {found.num_improbable} improbable; "
        f"{output / 'cohort.csv'}, {output / 'cohort.json'}",
        err=True,
    )
    for unit, error in found.failed.items():
        typer.echo(f"not inspected: {unit}: {error}", err=True)
    if found.failed:
        raise typer.Exit(exit_code(found.failed.values()))


def exit_code(errors: Iterable[PipelineError]) -> int:
    """As of a stage: 2 if every failure is the user's input, else 1."""
    return 2 if all(error.exit_code == 2 for error in errors) else 1
