"""What a shell offers at the tab key: names out of the registry and the work folder.

A shell waits for the answer, so nothing heavy is loaded: the registry is read as plain YAML. What
cannot be read offers nothing, and says nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import typer

_REGISTRY, _WORK = "data_registry.yaml", "work"


def one_of(*names: str) -> Callable[[str], list[str]]:
    """Completes fixed names."""

    def complete(incomplete: str) -> list[str]:
        return [name for name in names if name.startswith(incomplete)]

    return complete


def teacher_names(ctx: typer.Context, incomplete: str) -> list[str]:
    """Teachers of the registry that the command line names, or of the one that is there."""
    return _starting(_registry(ctx).get("teachers"), incomplete)


def case_names(ctx: typer.Context, incomplete: str) -> list[str]:
    """`dataset/case`: first the datasets, then the cases of one that the cache has."""
    dataset, slash, _ = incomplete.partition("/")
    if not slash:
        return [f"{name}/" for name in _starting(_registry(ctx).get("datasets"), incomplete)]
    try:
        folders = [p.name for p in (_work(ctx) / "cases" / dataset).iterdir()]
    except OSError:
        return []
    cases = {name.rpartition("@")[0] for name in folders if "@" in name}
    return _starting([f"{dataset}/{case}" for case in cases], incomplete)


def student_files(ctx: typer.Context, incomplete: str) -> list[str]:
    """The `student.pt` of finished runs in `work`; otherwise the shell offers files."""
    folder = Path(_WORK) / "students"
    found = [*folder.glob("*/student.pt"), *folder.glob("*/*/student.pt")]
    return _starting([path.as_posix() for path in found], incomplete)


def run_names(ctx: typer.Context, incomplete: str) -> list[str]:
    """Runs below `WORK/students`; those of a comparison are `<comparison>/<run>`."""
    folder = _work(ctx) / "students"
    found = [*folder.glob("*/config.json"), *folder.glob("*/*/config.json")]
    names = [path.parent.relative_to(folder).as_posix() for path in found]
    return _starting(names, incomplete)


def _registry(ctx: typer.Context) -> dict[str, Any]:
    import yaml

    path = ctx.params.get("registry") or _REGISTRY
    try:
        data = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError):
        return {}
    return data if isinstance(data, dict) else {}


def _work(ctx: typer.Context) -> Path:
    """A store is not asked: its answer takes longer than a person waits at the tab key."""
    work = ctx.params.get("work") or _WORK
    return work if isinstance(work, Path) else Path(str(work))


def _starting(names: Any, incomplete: str) -> list[str]:
    if not isinstance(names, (dict, list)):
        return []
    return sorted(str(name) for name in names if str(name).startswith(incomplete))
