"""How many steps each configuration makes: as many as the others, or as fit in equal seconds.

A training must know its last step before its first: the learning rate and the weights of the terms
run along it. So seconds are turned into steps once, by a probe of each configuration, and what was
found is kept beside the runs: a comparison that goes on makes the same number of steps.
"""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from pipeline.cache.store import write_json
from pipeline.config import digest
from pipeline.errors import ConfigError
from pipeline.folder import Folder, read_text
from pipeline.log import Advance, Log
from pipeline.networks.by_name import pick_device
from pipeline.student.inputs import TrainingInputs
from pipeline.student.resume import RunFolder
from pipeline.student.settings import TrainingConfig
from pipeline.student.speed import TrainingExecution
from pipeline.student.staging import staged_inputs
from pipeline.student.training import train
from stages.train_student import TrainStudentConfig

# What a comparison sets itself.
_SET_BY_COMPARISON = {"seed", "steps"}
ROUNDS = 2
MEASURED_STEPS = 16
WARM_UP_STEPS = 4


class StepClock(Log):
    """A log that keeps the time of every step; `hand_on` hears of each that is made."""

    def __init__(self, log: Log, hand_on: Advance | None = None) -> None:
        self.__dict__.update(log.__dict__)
        self._hand_on = hand_on
        self.times: list[float] = []

    @contextmanager
    def progress(self, what: str, total: int, *, done: int = 0) -> Iterator[Advance]:
        """See `Log.progress`; shows nothing itself."""

        def advance(note: str = "", steps: int = 1) -> None:
            if not note:  # steps that an earlier process made
                return
            self.times.append(time.monotonic())
            if self._hand_on is not None:
                self._hand_on(note, steps)

        yield advance

    def median_seconds(self) -> float | None:
        """Seconds between two steps, validations being the exception; None for too few steps."""
        gaps = sorted(b - a for a, b in zip(self.times, self.times[1:], strict=False))
        return gaps[len(gaps) // 2] if len(gaps) >= MEASURED_STEPS // 2 else None


def equal_steps(configs: Sequence[TrainStudentConfig], steps: int | None) -> dict[str, int]:
    """The same number of steps for all: the one given, or the one that all of them name."""
    own = {config.run: config.training.steps for config in configs}
    if steps is None and len(set(own.values())) > 1:
        named = ", ".join(f"{run} {number}" for run, number in own.items())
        raise ConfigError(
            f"the configurations have different budgets: steps {named}.",
            where="training.steps",
            fix="Give --steps or --seconds for all of them.",
        )
    return {run: steps or number for run, number in own.items()}


def without_seed_and_steps(training: TrainingConfig) -> dict[str, Any]:
    """What a configuration is compared for."""
    return training.model_dump(mode="json", exclude=_SET_BY_COMPARISON)


def steps_for_seconds(
    configs: Sequence[TrainStudentConfig],
    inputs: Mapping[str, TrainingInputs],
    seconds: float,
    record: Folder,
    execution: TrainingExecution | None,
    log: Log,
) -> dict[str, int]:
    """Steps that fit in `seconds` of training, measured once and then read from `record`.

    Each configuration trains a few steps in each of two rounds, in turns; the faster round counts,
    since what else the machine does can only slow one down. Validation, checkpoints and start-up
    are not in it. Without an `execution`, configurations that were not measured keep their own.

    Raises:
        ConfigError: the record was made for other seconds; or a configuration is new in it, and
            was to be measured on another device or with other workers than the others.
    """
    before = _read(record)
    known: dict[str, Any] = before.get("seconds_per_step", {})
    keys = {c.run: digest(without_seed_and_steps(c.training)) for c in configs}
    if execution is not None:
        device = pick_device(execution.device).type
        here = {"device": device, "workers": execution.workers, "flags": str(execution.flags)}
        new = [config for config in configs if keys[config.run] not in known]
        if before and before["seconds"] != seconds:
            raise ConfigError(
                f"this comparison was begun with {before['seconds']} seconds, not {seconds}.",
                where=record,
                fix="Use the same to go on, or another --name to begin anew.",
            )
        if before and new and before["measured_on"] != here:
            raise ConfigError(
                f"{', '.join(c.run for c in new)} would be measured on {here}, the others were on "
                f"{before['measured_on']}.",
                where=record,
                fix="Add configurations where the others were measured, or begin anew: another "
                "--name.",
            )
        staged = {c.run: staged_inputs(inputs[c.run], execution.stage_to, log=log) for c in new}
        rounds: dict[str, list[float]] = {config.run: [] for config in new}
        for number in range(ROUNDS):
            for config in new:
                found = _probe(config, staged[config.run], execution, log)
                rounds[config.run].append(found)
                log.info(f"{config.run}: {found:.3f} s a step (round {number + 1} of {ROUNDS})")
        if new:
            known = known | {keys[run]: min(times) for run, times in rounds.items()}
            content = {"seconds": seconds, "measured_on": here, "seconds_per_step": known}
            write_json(record, content)
    return {
        c.run: max(1, round(seconds / known[key])) if (key := keys[c.run]) in known
        else c.training.steps
        for c in configs
    }  # fmt: skip


def _probe(
    config: TrainStudentConfig, inputs: TrainingInputs, execution: TrainingExecution, log: Log
) -> float:
    """Seconds per step, once loader processes and caches are warm."""
    warm = WARM_UP_STEPS + 2 * execution.workers  # batches that were loaded ahead come too fast
    steps = warm + MEASURED_STEPS
    clock = StepClock(log)
    clock.quiet = True
    with tempfile.TemporaryDirectory() as folder:
        train(
            config.training.model_copy(update={"steps": steps}),
            replace(inputs, validation=()),
            RunFolder(Path(folder)),
            TrainingExecution(execution.device, execution.workers, execution.flags),
            clock,
        )
    return (clock.times[-1] - clock.times[warm - 1]) / MEASURED_STEPS


def _read(record: Folder) -> dict[str, Any]:
    try:
        found: dict[str, Any] = json.loads(read_text(record))
    except FileNotFoundError:
        return {}
    except ValueError as error:
        raise ConfigError(
            f"cannot be read ({error}).", where=record, fix="Remove it to measure anew."
        ) from error
    return found
