"""`pipeline check`."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from pipeline.cli_options import (
    REGISTRY,
    ConfigOption,
    DeviceOption,
    JsonOption,
    QuietOption,
    RegistryOption,
    TrustOption,
    WindowBatchOption,
    open_log,
    open_registry,
    open_settings,
)
from pipeline.cli_run import recorded


@recorded
def check(
    registry: RegistryOption = REGISTRY,
    config: ConfigOption = None,
    case: Annotated[
        str | None, typer.Option(help="dataset/case; default: the first that can be read.")
    ] = None,
    side_mm: Annotated[float, typer.Option(help="Side of the crop in mm.", min=1)] = 120.0,
    device: DeviceOption = "auto",
    window_batch: WindowBatchOption = 1,
    trust: TrustOption = None,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Run every teacher on one small crop: channels, organs, spacing, taps, memory, time."""
    from pipeline.checking import check_teachers, print_check
    from stages.cache_teachers import CacheTeachersConfig

    settings = open_settings(config, CacheTeachersConfig)
    report = check_teachers(
        open_registry(registry, trust=trust),
        window=settings.window,
        storage=settings.storage,
        log=open_log(quiet or as_json),
        case=case,
        side_mm=side_mm,
        device=device,
        window_batch=window_batch,
    )
    if as_json:
        typer.echo(json.dumps(report.to_json(), indent=1))
    else:
        print_check(report)
    if report.num_failed:
        raise typer.Exit(2)
