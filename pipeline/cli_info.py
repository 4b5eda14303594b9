"""`pipeline info`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import typer

from pipeline.cli_options import REGISTRY, JsonOption, RegistryOption, open_registry
from pipeline.errors import PipelineError


def info(
    ctx: typer.Context, registry: RegistryOption = REGISTRY, as_json: JsonOption = False
) -> None:
    """Versions, commands, and what the registry holds; at once, and without a GPU.

    A registry that cannot be used, and cases that cannot be opened, are told last, with exit code
    2: the rest is told anyway.
    """
    from pipeline.about import about_tool

    found = about_tool(_commands(ctx))
    there, wrong = _registry(registry)
    if as_json:
        error = None if wrong is None else str(wrong)
        typer.echo(json.dumps({**found, "registry": there, "registry_error": error}, indent=1))
    else:
        _print_tool(found)
        _print_registry(there, registry)
    if wrong is not None:
        raise wrong


def _registry(path: Path) -> tuple[dict[str, Any] | None, PipelineError | None]:
    """What is in it, and what is wrong with it. Neither if none is named or there."""
    from pipeline.about import about_registry
    from pipeline.data.files import refuse_closed

    if path == REGISTRY and not path.exists():
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
    group: Any = ctx.find_root().command
    for name in group.list_commands(ctx):
        command: Any = group.get_command(ctx, name)
        if hasattr(command, "list_commands"):
            for inner in command.list_commands(ctx):
                found[f"{name} {inner}"] = _first_line(command.get_command(ctx, inner))
        else:
            found[name] = _first_line(command)
    return found


def _first_line(command: Any) -> str:
    return str(command.help or "").strip().split("\n")[0]


def _print_tool(found: dict[str, Any]) -> None:
    typer.echo(f"organ-distill {found['version'] or '(not installed)'}, Python {found['python']}")
    there = {name: text for name, text in found["packages"].items() if text is not None}
    typer.echo(", ".join(f"{name} {text}" for name, text in there.items()))
    absent = [name for name, text in found["packages"].items() if text is None]
    if absent:
        typer.echo(f"not installed: {', '.join(absent)}")
    typer.echo("")
    typer.echo("stages, with the YAML that shows all settings and their defaults:")
    for name, stage in found["stages"].items():
        typer.echo(f"  pipeline {name:15} {found['commands'].get(name, '')}")
        typer.echo(f"  {'':24} {stage['settings']}")
    others = [name for name in found["commands"] if name not in found["stages"]]
    typer.echo(f"other commands: {', '.join(others)}")


def _print_registry(found: dict[str, Any] | None, path: Path) -> None:
    from pipeline.about import SPLITS
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
        [
            name,
            one["kind"],
            ", ".join(one["organs"]),
            ", ".join(one["taps"]) or "–",
            one["weights"] if one["weights_there"] else f"{one['weights']} (not there yet)",
        ]
        for name, one in found["teachers"].items()
    ]
    if rows:
        print_table("Teachers", ["teacher", "kind", "organs", "taps", "weights"], rows)
