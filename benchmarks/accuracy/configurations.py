"""What is compared: settings of `train-student` that differ in `supervision` alone, and screened
ones that may differ in anything."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.accuracy.cohort import network_settings
from benchmarks.accuracy.size import Size
from pipeline.config import digest, read_yaml
from pipeline.errors import ConfigError
from pipeline.student.settings import LABELS_ALONE, TrainingConfig
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


@dataclass(frozen=True)
class Configuration:
    """A name, and all that a training of that name is, but for seed and steps.

    Attributes:
        name: a kind's, or of the file that it was read from.
        training: with seed and steps of no meaning.
        online: whether teachers are asked in the loop instead of the cache; see `online`.
    """

    name: str
    training: TrainingConfig
    online: bool = False

    @property
    def registry(self) -> str:
        """Which registry of a job it is trained with."""
        return "full" if self.training.supervision.kind == "full" else "student"


def named(size: Size, kinds: Sequence[str]) -> list[Configuration]:
    """The kinds of supervision with their defaults."""
    return [_configuration(kind, size, {"supervision": {"kind": kind}}) for kind in kinds]


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
        online = bool(changes.pop("online", False))
        if {"seed", "steps"} & set(changes):
            raise ConfigError(
                "seed and steps are set by the bench.", where=path, fix="Remove them."
            )
        try:
            found.append(_configuration(path.stem, size, changes, online=online))
        except ValueError as error:
            raise ConfigError(str(error), where=path, fix=fix) from error
    known = {(identity(c.training), False): c.name for c in named(size, KINDS)}
    for path, new in zip(files, found, strict=True):
        same = known.setdefault((identity(new.training), new.online), new.name)
        if same != new.name:
            raise ConfigError(
                f"it is the same as {same}.", where=path, fix="Remove it, or change something."
            )
    return found


def _check_name(path: Path) -> None:
    if path.stem in KINDS:
        raise ConfigError(
            f"{path.stem} is a kind of supervision.", where=path, fix="Name the file otherwise."
        )
    if not re.fullmatch(RUN_NAME, path.stem):
        raise ConfigError(
            f"{path.stem!r} cannot name a run.",
            where=path,
            fix="Use letters, digits, dots, dashes and underscores.",
        )


def identity(training: TrainingConfig) -> str:
    """What a configuration is apart from seed and steps, as a digest.

    Of supervision by labels alone only what is read counts: new settings of the other kinds make
    no other marginal training of it.
    """
    content = training.model_dump(mode="json", exclude={"seed", "steps", "validate_every"})
    kind = training.supervision.kind
    if kind in LABELS_ALONE:
        known = {"kind": kind}
        if kind == "marginal_exclusion":
            known["exclusion"] = content["supervision"]["exclusion"]
        content["supervision"] = known
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
    name: str, size: Size, changes: Mapping[str, Any], *, online: bool = False
) -> Configuration:
    base: dict[str, Any] = {
        "network": network_settings(size),
        "patch": list(size.patch),
        "batch_size": size.batch_size,
        "optimiser": {"lr": size.lr},
        # The same patches for all: kinds that read teachers would else draw others.
        "sampling": {"organs_from": "labels"},
        "supervision": {"kind": METHOD},
    }
    wanted = merged(base, changes)
    return Configuration(name, TrainingConfig.model_validate(wanted), online)
