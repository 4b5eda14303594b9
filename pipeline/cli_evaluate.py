"""`pipeline evaluate`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from pipeline.cli_options import (
    REGISTRY,
    ConfigOption,
    DryRunOption,
    QuietOption,
    RegistryOption,
    end,
    open_log,
    open_registry,
    open_settings,
)
from pipeline.cli_run import recorded


@recorded
def evaluate(
    predictions: Annotated[
        Path, typer.Argument(help="Folder with <dataset>/<case>.nii.gz, or a run that predicted.")
    ],
    registry: RegistryOption = REGISTRY,
    config: ConfigOption = None,
    against: Annotated[
        list[Path] | None,
        typer.Option(
            help="Another such folder, or a run that predicted: paired differences. Once for each."
        ),
    ] = None,
    dry_run: DryRunOption = False,
    quiet: QuietOption = False,
) -> None:
    """Dice, NSD and HD95 per case and organ: summary.json, scores.csv, a table."""
    from stages import evaluate as stage

    settings = open_settings(config, stage.EvaluateConfig)
    if against or (predictions / "student.pt").exists():
        from pipeline.comparison.folders import predictions_of

        predictions, *others = [predictions_of(path) for path in (predictions, *(against or []))]
    if against:
        from pipeline.comparison.paired_tables import check_place

        check_place(predictions)
    opened, log = open_registry(registry), open_log(quiet)
    report = stage.run(settings, opened, predictions, log=log, table=not quiet, dry_run=dry_run)
    if against and not dry_run:
        from pipeline.comparison.folders import side_by_side
        from pipeline.comparison.paired_tables import print_side_by_side, write_side_by_side

        found = side_by_side(settings, opened, predictions, others, log=log)
        written = write_side_by_side(found, predictions)
        if not quiet:
            print_side_by_side(found)
        log.info(f"written: {', '.join(str(path) for path in written)}")
    end(report)
