"""Bytes against error and speed of each way to store, on two of your cases; writes nothing.

python -m benchmarks.tune -r data_registry.yaml -c cache_teachers.yaml
"""

from __future__ import annotations

import json

import typer

from benchmarks.tune.measure import tune
from benchmarks.tune.table import print_tuning
from pipeline.cli.options import (
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
from stages.cache_teachers import CacheTeachersConfig


def main(
    registry: RegistryOption = REGISTRY,
    config: ConfigOption = None,
    device: DeviceOption = "auto",
    window_batch: WindowBatchOption = 1,
    trust: TrustOption = None,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Bytes against error and speed of each way to store, on two of your cases; writes nothing."""
    settings = open_settings(config, CacheTeachersConfig)
    found = tune(
        open_registry(registry, trust=trust),
        splits=settings.splits,
        window=settings.window,
        storage=settings.storage,
        log=open_log(quiet),
        device=device,
        window_batch=window_batch,
    )
    if as_json:
        print(json.dumps(found.to_json(), indent=1))
    else:
        print_tuning(found)


if __name__ == "__main__":
    typer.run(main)
