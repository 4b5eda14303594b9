"""What is compared: settings of `train-student` that differ in `supervision` alone, and screened
ones that may differ in anything."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from benchmarks.accuracy.cohort import network_settings
from benchmarks.accuracy.size import Size
from pipeline.config import digest, read_yaml
from pipeline.errors import ConfigError
from pipeline.student.settings import TrainingConfig
from stages.train_student import RUN_NAME

KINDS_OF_BUDGET: Mapping[str, tuple[str, ...]] = {
    "short": (
        "naive", "marginal_exclusion", "masked_bce", "marginal", "pseudo_label", "ms_kd", "full",
    ),
    "long": ("marginal", "pseudo_label", "ms_kd", "full"),
}  # fmt: skip
KINDS = KINDS_OF_BUDGET["short"]
METHOD = "ms_kd"
BASELINES = ("marginal", "pseudo_label")
UPPER = "full"
# Settings that a baseline reads beside its kind.
_READ: Mapping[str, tuple[str, ...]] = {
    "marginal_exclusion": ("exclusion",),
    "pseudo_label": ("labels_win", "confidence", "calibrated"),
}
ORACLE = "perfect_teachers"  # the method, taught by teachers that never err
GENERATION = "generation_2"  # the method, whose student teaches the next one beside the experts
ROWS = (*KINDS, ORACLE, GENERATION)
Teachers = Literal["cached", "online", "perfect", "and-student"]


@dataclass(frozen=True)
class Configuration:
    """A name, and all that a training of that name is, but for seed and steps.

    Attributes:
        name: a kind's, or of the file that it was read from.
        training: with seed and steps of no meaning.
        teachers: who speaks: the cache, the teachers' networks in the loop (see `online`), the
            labels of all organs (see `oracle`), or the cache and the method's own student, trained
            before.
    """

    name: str
    training: TrainingConfig
    teachers: Teachers = "cached"

    @property
    def registry(self) -> str:
        """Which registry of a job it is trained with."""
        return "full" if self.training.supervision.kind == "full" else "student"


def named(size: Size, rows: Sequence[str]) -> list[Configuration]:
    """The kinds of supervision with their defaults, and the method with other teachers."""
    others: dict[str, tuple[dict[str, Any], Teachers]] = {
        ORACLE: ({"supervision": {"reliability": None}}, "perfect"),
        GENERATION: ({}, "and-student"),
    }
    return [
        _configuration(row, size, *others.get(row, ({"supervision": {"kind": row}},)))
        for row in rows
    ]


def screened(size: Size, folder: Path) -> list[Configuration]:
    """One configuration per YAML file of a folder, named by it: what it says of `training`
    replaces what ms_kd has there.

    Raises:
        ConfigError: no file, a mistake in one, a name that is a kind's, or nothing new in it.
    """
    files = sorted(folder.glob("*.yaml"))
    if not files:
        raise ConfigError("there is no .yaml file.", where=folder, fix="Name another --configs.")
    found: list[Configuration] = []
    for path in files:
        _check_name(path)
        changes = read_yaml(path).data
        fix = "See stages/train_student.yaml, below `training`."
        if not isinstance(changes, dict):
            raise ConfigError("not a mapping of settings.", where=path, fix=fix)
        teachers = changes.pop("teachers", "cached")
        if teachers not in get_args(Teachers):
            names = ", ".join(get_args(Teachers))
            raise ConfigError(
                f"there are no teachers {teachers!r}.", where=path, fix=f"Choose of {names}."
            )
        if {"seed", "steps"} & set(changes):
            raise ConfigError(
                "seed and steps are set by the bench.", where=path, fix="Remove them."
            )
        try:
            found.append(_configuration(path.stem, size, changes, teachers))
        except ValueError as error:
            raise ConfigError(str(error), where=path, fix=fix) from error
    known = {(identity(c.training), c.teachers): c.name for c in named(size, ROWS)}
    for path, new in zip(files, found, strict=True):
        same = known.setdefault((identity(new.training), new.teachers), new.name)
        if same != new.name:
            raise ConfigError(
                f"it is the same as {same}.", where=path, fix="Remove it, or change something."
            )
    return found


def _check_name(path: Path) -> None:
    if path.stem in ROWS:
        raise ConfigError(
            f"{path.stem} is a row of the bench.", where=path, fix="Name the file otherwise."
        )
    if not re.fullmatch(RUN_NAME, path.stem):
        raise ConfigError(
            f"{path.stem!r} cannot name a run.",
            where=path,
            fix="Use letters, digits, dots, dashes and underscores.",
        )


def identity(training: TrainingConfig) -> str:
    """What a configuration is apart from seed and steps, as a digest.

    Of a baseline only what it reads counts: new settings of the method make no other training.
    """
    content = training.model_dump(mode="json", exclude={"seed", "steps", "validate_every"})
    supervision = content["supervision"]
    if training.supervision.kind != METHOD:
        read = ["kind", *_READ.get(training.supervision.kind, ())]
        content["supervision"] = {key: supervision[key] for key in read}
    return digest(content)


def merged(base: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """Nested mappings, those of `changes` laid over those of `base`."""
    found = dict(base)
    for key, value in changes.items():
        below = found.get(key)
        both = isinstance(value, Mapping) and isinstance(below, Mapping)
        found[key] = merged(below, value) if both else value  # type: ignore[arg-type]
    return found


def _configuration(
    name: str, size: Size, changes: Mapping[str, Any], teachers: Teachers = "cached"
) -> Configuration:
    base: dict[str, Any] = {
        "network": network_settings(size),
        "patch": list(size.patch),
        "batch_size": size.batch_size,
        "optimiser": {"lr": size.lr},
        "supervision": {"kind": METHOD},
    }
    wanted = merged(base, changes)
    return Configuration(name, TrainingConfig.model_validate(wanted), teachers)
