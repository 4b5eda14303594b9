"""`pipeline export`."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from pipeline.cli_complete import case_names, student_files
from pipeline.cli_options import (
    ConfigOption,
    DryRunOption,
    JsonOption,
    QuietOption,
    end,
    open_log,
    open_settings,
)
from pipeline.cli_run import recorded
from pipeline.folder import Folder, parse_folder


class FormatName(StrEnum):
    """What `--format` takes; `stages.export.FORMATS`, without loading torch."""

    BUNDLE = "bundle"
    TORCHSCRIPT = "torchscript"
    TORCH_EXPORT = "torch-export"
    ONNX = "onnx"


@recorded
def export(
    run: Annotated[
        Folder,
        typer.Argument(
            help="Folder of a finished run, or its student.pt.",
            parser=parse_folder,
            metavar="RUN",
            autocompletion=student_files,
        ),
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help="A folder per format in it.")],
    formats: Annotated[
        list[FormatName],
        typer.Option("--format", "-f", help="Give it once for each."),
    ],
    check_on: Annotated[
        Path | None,
        typer.Option(help="A CT (NIfTI) to hold it against the student on; else --case."),
    ] = None,
    case: Annotated[
        str | None,
        typer.Option(
            help="DATASET/CASE of the cache to check on; default: the first one.",
            autocompletion=case_names,
        ),
    ] = None,
    config: ConfigOption = None,
    as_json: JsonOption = False,
    dry_run: DryRunOption = False,
    quiet: QuietOption = False,
) -> None:
    """The student as MONAI bundle, TorchScript, torch.export or ONNX, held against `predict`."""
    import json

    from stages import export as stage

    report = stage.run(
        open_settings(config, stage.ExportConfig),
        run,
        [form.value for form in formats],
        output,
        log=open_log(quiet or as_json),
        check_on=check_on,
        case=case,
        dry_run=dry_run,
    )
    if as_json:
        typer.echo(json.dumps(report.to_json(), indent=1))
    end(report)
