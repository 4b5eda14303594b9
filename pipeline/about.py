"""`pipeline info`: this tool, its packages, its commands, and what a registry holds.

No network and no image is read: the answer is there at once, also where there is no GPU.
"""

from __future__ import annotations

import pkgutil
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import stages
from pipeline.data.files import closed_cases
from pipeline.versions import TOOL, versions

if TYPE_CHECKING:
    from pipeline.data.registry import Registry

SPLITS = ("train", "validation", "test")


def stage_settings() -> dict[str, Path]:
    """Command of each stage -> its annotated YAML, which shows all settings with their defaults."""
    folder = Path(stages.__path__[0])
    names = sorted(module.name for module in pkgutil.iter_modules(stages.__path__))
    return {
        name.replace("_", "-"): folder / f"{name}.yaml"
        for name in names
        if (folder / f"{name}.yaml").is_file()
    }


def about_tool(commands: Mapping[str, str]) -> dict[str, Any]:
    """Versions, and every command with what it is for.

    Args:
        commands: command -> its first line of help.
    """
    known = versions()
    settings = stage_settings()
    return {
        "version": known.pop(TOOL),
        "python": known.pop("python"),
        "packages": known,
        "commands": dict(commands),
        "stages": {
            name: {"command": f"pipeline {name}", "settings": str(path)}
            for name, path in settings.items()
        },
    }


def about_registry(registry: Registry) -> dict[str, Any]:
    """Organs with their ids, datasets with counts of cases, teachers.

    `cases` counts what is on the disk, by split; a phantom's cases count whether they have been
    generated or not. `closed` are those that cannot be opened, and why. No file is read.
    """
    return {
        "path": str(registry.path),
        "schema_version": registry.schema_version,
        "organs": dict(registry.label_space.ids),
        "grid": registry.grid.model_dump(mode="json"),
        "datasets": {name: _dataset(registry, name) for name in registry.datasets},
        "teachers": {name: _teacher(registry, name) for name in registry.teachers},
    }


def _dataset(registry: Registry, name: str) -> dict[str, Any]:
    entry = registry.datasets[name]
    cases = registry.cases(name)
    counts = Counter(case.split for case in cases)
    return {
        "cases": counts.total(),
        **{split: counts[split] for split in SPLITS},
        "note": " ".join(registry.empty_split(name) or ()) or None,
        "closed": closed_cases(cases) if entry.phantom is None else {},
        "annotated": list(entry.annotated),
        "root": str(registry.resolve(entry.root)),
        "made_up": entry.phantom is not None,
        "licence": entry.licence or None,
    }


def _teacher(registry: Registry, name: str) -> dict[str, Any]:
    entry = registry.teachers[name]
    weights = registry.resolve(entry.weights)
    return {
        "kind": entry.kind,
        "organs": list(entry.organs),
        "taps": list(entry.taps),
        "weights": str(weights),
        "weights_there": weights.exists(),
        "trained_on": entry.trained_on,
        "licence": entry.licence or None,
    }
