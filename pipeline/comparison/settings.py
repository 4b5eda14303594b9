"""What a comparison is of, beside its configurations: name, seeds, budget, and what is scored."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

from pipeline.errors import ConfigError
from stages.train_student import RUN_NAME


@dataclass(frozen=True)
class Settings:
    """What a comparison is of, beside its configurations.

    Attributes:
        name: its folder below WORK/students.
        seeds: each configuration is trained with each.
        steps: of every run; None: those of the configurations, which must then agree.
        seconds: of training of every run, instead of steps.
        baseline: the configuration that others are compared with; None: the first.
        test: score the test cases instead of the validation cases.
        surface: also measure NSD and HD95.
        allow_missing: train and score with the cases and units that the cache has.
    """

    name: str
    seeds: tuple[int, ...] = (0, 1, 2)
    steps: int | None = None
    seconds: float | None = None
    baseline: str | None = None
    test: bool = False
    surface: bool = True
    allow_missing: bool = False


def check_settings(settings: Settings) -> None:
    """Whether a comparison can be of this at all.

    Raises:
        ConfigError: a name, seeds or a budget that nothing can be trained with.
    """
    if not re.fullmatch(RUN_NAME, settings.name):
        raise ConfigError(
            f"{settings.name!r} cannot name a comparison.",
            where="--name",
            fix="Use letters, digits, dots, dashes and underscores.",
        )
    if not settings.seeds or len(set(settings.seeds)) < len(settings.seeds):
        raise ConfigError(
            "seeds must be at least one, and each another.", where="--seeds", fix="Say 0,1,2."
        )
    if min(settings.seeds) < 0:
        raise ConfigError("a seed is negative.", where="--seeds", fix="Say 0,1,2.")
    if settings.steps is not None and settings.seconds is not None:
        raise ConfigError(
            "--steps and --seconds are two budgets.", where="--seconds", fix="Give one of them."
        )
    if settings.steps is not None and settings.steps < 1:
        raise ConfigError("there must be at least one step.", where="--steps", fix="Give more.")
    if settings.seconds is not None and not 0 < settings.seconds < math.inf:
        raise ConfigError("must be more than 0.", where="--seconds", fix="Give more.")
