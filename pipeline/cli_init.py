"""`pipeline init`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from pipeline.cli_options import REGISTRY, DryRunOption, YesOption
from pipeline.cli_run import recorded


@recorded
def init(
    dataset: Annotated[
        list[str] | None,
        typer.Option(
            "--dataset",
            "-d",
            metavar="NAME=PATH[:liver=1+2,background=3]",
            help="Folder or list of cases, and what its label values mean; once for each.",
        ),
    ] = None,
    teacher: Annotated[
        list[str] | None,
        typer.Option(
            "--teacher",
            "-t",
            metavar="NAME=PATH[:liver=1,background=rest]",
            help="nnU-Net model folder, MONAI bundle, exported file or checkpoint; once for each.",
        ),
    ] = None,
    organ: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME[=ID]", help="Organ to learn; once for each."),
    ] = None,
    files: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME=IMAGES,LABELS",
            help="Patterns with {case} below a dataset's folder, where they are not recognised.",
        ),
    ] = None,
    spacing_mm: Annotated[
        tuple[float, float, float], typer.Option(help="Of the student grid: z y x.")
    ] = (3.0, 1.5, 1.5),
    registry: Annotated[
        Path, typer.Option("--registry", "-r", help="The file to write.")
    ] = REGISTRY,
    force: Annotated[bool, typer.Option("--force", help="Replace a registry.")] = False,
    yes: YesOption = False,
    dry_run: DryRunOption = False,
) -> None:
    """Write a registry from folders: nnU-Net, Decathlon, MONAI datalists, plain files; teachers."""
    from pipeline.data.files import closed_cases, refuse_closed
    from pipeline.layouts.begin import Wishes, begin, describe, look, next_command

    wishes = Wishes(dataset or [], teacher or [], files or [], organ or [], spacing_mm)
    ask = None if yes or not can_ask() else _ask
    if dry_run:
        typer.echo(look(registry, wishes, force=force, ask=ask), nl=False)
        return
    written = begin(registry, wishes, force=force, ask=ask)
    for line in describe(written):
        typer.echo(line)
    typer.echo(f"wrote {registry}. Read it through; then: {next_command(written)}")
    cases = [case for dataset in written.datasets for case in written.cases(dataset)]
    refuse_closed(closed_cases(cases), registry)


def can_ask() -> bool:
    """Whether somebody sits at the terminal."""
    return sys.stdin.isatty()


def _ask(question: str) -> str:
    answer: str = typer.prompt(question, prompt_suffix="\n> ")
    return answer
