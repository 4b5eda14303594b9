"""`pipeline cache tune`."""

from __future__ import annotations

import json
from functools import partial

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


@partial(recorded, group="cache")
def tune(
    registry: RegistryOption = REGISTRY,
    config: ConfigOption = None,
    device: DeviceOption = "auto",
    window_batch: WindowBatchOption = 1,
    trust: TrustOption = None,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Bytes against error and speed of each way to store, on two of your cases; writes nothing."""
    from pipeline.tuning.table import print_tuning
    from pipeline.tuning.tune import tune as measure
    from stages.cache_teachers import CacheTeachersConfig

    settings = open_settings(config, CacheTeachersConfig)
    found = measure(
        open_registry(registry, trust=trust),
        splits=settings.splits,
        window=settings.window,
        storage=settings.storage,
        log=open_log(quiet),
        device=device,
        window_batch=window_batch,
    )
    if as_json:
        typer.echo(json.dumps(found.to_json(), indent=1))
    else:
        print_tuning(found)
