"""Configurations side by side: their names, what differs, and whether they can be compared."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pipeline.config import digest, load_config
from pipeline.errors import ConfigError
from pipeline.student.settings import TrainingConfig
from stages.train_student import RUN_NAME, TrainStudentConfig

# What a comparison sets itself, and what only says how often a training looks at itself.
_SET_BY_COMPARISON = ("seed", "steps")
_COMPUTE = ("network", "patch", "batch_size")


def load_configurations(paths: Sequence[Path]) -> list[TrainStudentConfig]:
    """Reads `train-student` settings; one that names no `run` is named by its file.

    Raises:
        ConfigError: a mistake in a file.
    """
    found = []
    for path in paths:
        config = load_config(path, TrainStudentConfig)
        if "run" not in config.model_fields_set:
            name = re.sub(r"[^A-Za-z0-9_.-]", "-", path.stem).lstrip("_.-") or "student"
            config = config.model_copy(update={"run": name})
        found.append(config)
    return found


def check_configurations(configs: Sequence[TrainStudentConfig], baseline: str) -> None:
    """Makes sure that configurations can stand in one table.

    Raises:
        ConfigError: fewer than one, equal names or contents, or no such baseline.
    """
    if not configs:
        raise ConfigError(
            "no configuration to compare is named.",
            where="pipeline compare",
            fix="Name at least one YAML file of train-student.",
        )
    names = [config.run for config in configs]
    contents: dict[str, str] = {}
    for config in configs:
        if not re.fullmatch(RUN_NAME, config.run):
            raise ConfigError(
                f"{config.run!r} is a run of another comparison.",
                where="run",
                fix="Give the configuration a `run` without a slash.",
            )
        if names.count(config.run) > 1:
            raise ConfigError(
                f"{names.count(config.run)} configurations are called {config.run!r}.",
                where="run",
                fix="Give each its own `run`, or leave it out: the file's name is taken then.",
            )
        key = digest(without_seed_and_steps(config.training))
        if key in contents:
            raise ConfigError(
                f"configurations {contents[key]!r} and {config.run!r} have the same content "
                "(seed and steps are set by the comparison).",
                where="training",
                fix="Leave one out, or change what you want to compare.",
            )
        contents[key] = config.run
    if baseline not in names:
        raise ConfigError(
            f"there is no configuration {baseline!r} to compare with.",
            where="--baseline",
            fix=f"Choose one of {', '.join(names)}.",
        )


def without_seed_and_steps(training: TrainingConfig) -> dict[str, Any]:
    """What a configuration is compared for."""
    return training.model_dump(mode="json", exclude=set(_SET_BY_COMPARISON))


def differing_fields(configs: Sequence[TrainStudentConfig]) -> dict[str, dict[str, Any]]:
    """Dotted field of `training` -> configuration -> its value, where not all are equal."""
    contents = {c.run: flat(without_seed_and_steps(c.training)) for c in configs}
    fields = dict.fromkeys(name for values in contents.values() for name in values)
    return {
        field: {run: values.get(field) for run, values in contents.items()}
        for field in fields
        if len({repr(values.get(field)) for values in contents.values()}) > 1
    }


def unequal_compute(fields: Mapping[str, Any]) -> list[str]:
    """Which of network, patch and batch size differ: steps are then not equal amounts of work."""
    return [name for name in _COMPUTE if any(f.split(".")[0] == name for f in fields)]


def flat(value: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mappings as one, with dotted names."""
    found: dict[str, Any] = {}
    for key, inner in value.items():
        if isinstance(inner, dict) and inner:
            found |= flat(inner, f"{prefix}{key}.")
        else:
            found[f"{prefix}{key}"] = inner
    return found
