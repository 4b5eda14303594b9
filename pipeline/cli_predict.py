"""`pipeline predict`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from pipeline.cli_complete import student_files
from pipeline.cli_options import (
    ConfigOption,
    DryRunOption,
    QuietOption,
    WindowBatchOption,
    end,
    open_log,
    open_registry,
    open_settings,
)
from pipeline.cli_run import recorded
from pipeline.errors import ConfigError
from pipeline.folder import Folder, parse_folder


@recorded
def predict(
    student: Annotated[
        Folder,
        typer.Argument(
            help="student.pt of a finished run.",
            parser=parse_folder,
            metavar="STUDENT",
            autocompletion=student_files,
        ),
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder of label maps.")],
    images: Annotated[
        list[Path] | None,
        typer.Argument(help="NIfTI files, folders of them, or patterns in quotes."),
    ] = None,
    registry: Annotated[
        Path | None,
        typer.Option("--registry", "-r", help="Instead of IMAGES: its cases, <dataset>/<case>."),
    ] = None,
    split: Annotated[
        list[str] | None, typer.Option(help="Of the registry; default: test. Once for each.")
    ] = None,
    config: ConfigOption = None,
    device: Annotated[
        str,
        typer.Option(
            help="auto, cpu, cuda or cuda:1; several share the cases: cuda:0,cuda:1. Speed only."
        ),
    ] = "auto",
    window_batch: WindowBatchOption = 1,
    probabilities: Annotated[
        Literal["float16", "float32"] | None,
        typer.Option(help="Also write each organ's probability, of this precision."),
    ] = None,
    probabilities_4d: Annotated[
        bool, typer.Option("--probabilities-4d", help="One 4D file, not a file per organ.")
    ] = False,
    dry_run: DryRunOption = False,
    quiet: QuietOption = False,
) -> None:
    """NIfTI in, multi-organ label map out, in the geometry of the input."""
    from pipeline.predicting.case import Probabilities
    from stages import predict as stage

    if probabilities_4d and probabilities is None:
        raise ConfigError(
            "--probabilities-4d without --probabilities.", fix="Add --probabilities float16."
        )
    layout: Literal["4d", "per-organ"] = "4d" if probabilities_4d else "per-organ"
    known = open_registry(registry, files=False) if registry else None
    left: list[str] = []
    inputs = stage.chosen_inputs(images, known, split, left)
    other = {d for d, e in known.datasets.items() if e.units == "other"} if known else set()
    cases = [case for name in known.datasets for case in known.cases(name)] if known else []
    log = open_log(quiet)
    for text in left:
        log.warn(text)
    report = stage.run(
        open_settings(config, stage.PredictConfig),
        student,
        inputs,
        output,
        log=log,
        device=device,
        window_batch=window_batch,
        probabilities=Probabilities(probabilities, layout) if probabilities else None,
        other_units=[name for name in inputs if name.partition("/")[0] in other],
        references=[file for case in cases for file in (case.image, case.label)],
        dry_run=dry_run,
    )
    report.details["not_taken"] = left
    end(report)
