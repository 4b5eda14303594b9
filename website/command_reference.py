"""The reference of the command line, written from the Typer app."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator
from typing import Any

import typer
import typer.main

from website.markdown import cell, table

# What Typer puts behind an option's help: [default: 0; x>=0; required].
_EXTRA = re.compile(r"\s*\[((?:default: |required|env var: |[^\[\]]*x?[<>]=?)[^\[\]]*)\]$")
_INTRODUCTION = """\
# Commands

Made from the command line's own definitions when this site was built: the words are those of
`pipeline COMMAND --help`. Exit codes: 0 done, 2 something for you to mend, 1 anything else.
"""


def command_reference(app: typer.Typer) -> str:
    """A page in Markdown: all commands, and all arguments and options of each."""
    root = typer.main.get_command(app)
    commands = list(walk(root, ""))
    rows = [[f"[`{name}`](#{_anchor(name)})", cell(_summary(c))] for name, c in commands]
    parts = [_INTRODUCTION, table(["command", "what it does"], rows)]
    parts += [_section(name, command) for name, command in commands]
    return "\n".join(parts)


def walk(command: Any, name: str) -> Iterator[tuple[str, Any]]:
    """All commands below a Typer group, with their names as they are typed."""
    for word, child in getattr(command, "commands", {}).items():
        full = f"{name} {word}".strip()
        if getattr(child, "commands", None):
            yield from walk(child, full)
        elif not getattr(child, "hidden", False):
            yield full, child


def _anchor(name: str) -> str:
    return "pipeline-" + name.replace(" ", "-")


def _summary(command: Any) -> str:
    return inspect.cleandoc(command.help or "").split("\n\n")[0].replace("\n", " ")


def _section(name: str, command: Any) -> str:
    context = command.make_context(name, [], resilient_parsing=True)
    usage = " ".join(["pipeline", name, *command.collect_usage_pieces(context)])
    parts = [f"## pipeline {name} {{ #{_anchor(name)} }}", ""]
    parts += [inspect.cleandoc(command.help or ""), "", "```text", usage, "```", ""]
    arguments, options = [], []
    for parameter in command.get_params(context):
        if getattr(parameter, "hidden", False) or "--help" in parameter.opts:
            continue
        if parameter.param_type_name == "argument":
            text = parameter.help or ""
            need = "required" if parameter.required else ""
            shown = parameter.get_help_record(context)[0]
            arguments.append([f"`{shown}`", need, cell(text)])
        else:
            options.append(_option(parameter, context))
    if arguments:
        parts.append(table(["argument", "", "meaning"], arguments))
    if options:
        parts.append(table(["option", "value", "default", "meaning"], options))
    return "\n".join(parts)


def _option(parameter: Any, context: Any) -> list[str]:
    names = [*parameter.opts, *parameter.secondary_opts]
    shown = ", ".join(f"`{name}`" for name in sorted(names, key=lambda n: not n.startswith("--")))
    usage, text = parameter.get_help_record(context)
    value = usage.split(" ", usage.count(", ") + usage.count(" / ") * 2 + 1)[-1]
    value = "" if parameter.is_flag or value in names else value.strip("<>").replace(">...", " ..")
    found = _EXTRA.search(text)
    text, extra = (text[: found.start()], found.group(1)) if found else (text, "")
    bounds = [e for e in extra.split("; ") if e and not e.startswith(("default: ", "required"))]
    if parameter.required:
        default = "required"
    elif parameter.is_flag or parameter.default in (None, ""):
        default = ""
    elif isinstance(parameter.default, tuple | list):
        default = " ".join(str(v) for v in parameter.default)
    else:
        default = str(parameter.default)
    default = f"`{default}`" if default and default != "required" else default
    value = f"`{value}`" + (f", {', '.join(bounds)}" if bounds else "") if value else ""
    return [shown, cell(value), cell(default), cell(text)]
