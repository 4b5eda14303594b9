"""`pipeline plan`."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from pipeline.cli_options import (
    REGISTRY,
    WORK,
    ConfigOption,
    DeviceOption,
    JsonOption,
    QuietOption,
    RegistryOption,
    TrustOption,
    WindowBatchOption,
    WorkOption,
    open_log,
    open_registry,
    open_settings,
)
from pipeline.cli_run import recorded


@recorded
def plan(
    registry: RegistryOption = REGISTRY,
    config: ConfigOption = None,
    work: WorkOption = WORK,
    quota: Annotated[
        str | None, typer.Option(help='What the work folder may hold, for example "2 TB".')
    ] = None,
    device: DeviceOption = "auto",
    window_batch: WindowBatchOption = 1,
    trust: TrustOption = None,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """What stage one will take: units, bytes, files, time, memory. Tries two cases first."""
    from pipeline.errors import SpaceError
    from pipeline.planning.plan import make_plan, print_plan
    from pipeline.planning.space import parse_size
    from stages.cache_teachers import CacheTeachersConfig

    settings = open_settings(config, CacheTeachersConfig)
    found = make_plan(
        settings,
        open_registry(registry, trust=trust),
        work,
        log=open_log(quiet),
        quota_bytes=None if quota is None else parse_size(quota),
        device=device,
        window_batch=window_batch,
    )
    if as_json:
        typer.echo(json.dumps(found.to_json(), indent=1))
    else:
        print_plan(found)
    if found.problem:
        raise SpaceError(
            found.problem,
            where=work,
            fix="Make room, choose another --work, or leave out `splits` or `taps`; "
            "cache-teachers refuses to start without --force.",
        )
