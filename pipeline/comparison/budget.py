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
from pathlib import Path
from typing import Any

import torch

from pipeline.cache.store import write_json
from pipeline.comparison.configurations import without_seed_and_steps
from pipeline.config import digest
from pipeline.errors import ConfigError
from pipeline.folder import Folder, read_text
from pipeline.labels import LabelSpace
from pipeline.log import Advance, Log
from pipeline.staging import staged_inputs
from pipeline.student.speed import SpeedFlags
from pipeline.student.training import train
from pipeline.student_inputs import StudentInputs
from stages.train_student import TrainStudentConfig

ROUNDS = 2
MEASURED_STEPS = 16
WARM_UP_STEPS = 4


class StepClock(Log):
    """A log that hands a training's progress on and keeps the time of every step.

    Args:
        log: lines, warnings and events go there.
        hand_on: hears of every step that is made, with its note; None: nobody does.
    """

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
    """The same number of steps for all: the one given, or the one that all of them name.

    Raises:
        ConfigError: they name different numbers and none is given.
    """
    own = {config.run: config.training.steps for config in configs}
    if steps is None and len(set(own.values())) > 1:
        named = ", ".join(f"{run} {number}" for run, number in own.items())
        raise ConfigError(
            f"the configurations have different budgets: steps {named}.",
            where="training.steps",
            fix="Give --steps or --seconds for all of them.",
        )
    return {run: steps or number for run, number in own.items()}


def steps_for_seconds(
    configs: Sequence[TrainStudentConfig],
    inputs: Mapping[str, StudentInputs],
    space: LabelSpace,
    seconds: float,
    record: Folder,
    *,
    log: Log,
    device: torch.device,
    workers: int,
    flags: SpeedFlags | None,
    stage_to: Path | None = None,
) -> dict[str, int]:
    """Steps that fit in `seconds` of training, measured once and then read from `record`.

    Each configuration trains a few steps in each of two rounds, in turns; the faster round counts,
    since what else the machine does can only slow one down. Validation, checkpoints and start-up
    are not in it.

    Raises:
        ConfigError: the record was made for other seconds; or a configuration is new in it, and
            was to be measured on another device or with other workers than the others.
    """
    before = _read(record)
    here = {"device": device.type, "workers": workers, "flags": str(flags or SpeedFlags())}
    known: dict[str, Any] = before.get("seconds_per_step", {})
    keys = {c.run: digest(without_seed_and_steps(c.training)) for c in configs}
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
            fix="Add configurations where the others were measured, or begin anew: another --name.",
        )
    staged = {c.run: staged_inputs(inputs[c.run], stage_to, log=log) for c in new}
    rounds: dict[str, list[float]] = {config.run: [] for config in new}
    for number in range(ROUNDS if new else 0):
        for config in new:
            found = _probe(config, staged[config.run], space, log, device, workers, flags)
            rounds[config.run].append(found)
            log.info(f"{config.run}: {found:.3f} s a step (round {number + 1} of {ROUNDS})")
    measured = {keys[run]: min(times) for run, times in rounds.items()}
    if measured:
        known = known | measured
        content = {"seconds": seconds, "measured_on": here, "seconds_per_step": known}
        write_json(record, content)
    return {run: max(1, round(seconds / known[key])) for run, key in keys.items()}


def recorded_steps(
    configs: Sequence[TrainStudentConfig], seconds: float, record: Folder
) -> dict[str, int]:
    """`steps_for_seconds` of what was measured before; their own of those that were not."""
    known: dict[str, Any] = _read(record).get("seconds_per_step", {})
    keys = {c.run: digest(without_seed_and_steps(c.training)) for c in configs}
    return {
        c.run: max(1, round(seconds / known[key])) if (key := keys[c.run]) in known
        else c.training.steps
        for c in configs
    }  # fmt: skip


def _probe(
    config: TrainStudentConfig,
    inputs: StudentInputs,
    space: LabelSpace,
    log: Log,
    device: torch.device,
    workers: int,
    flags: SpeedFlags | None,
) -> float:
    """Seconds per step, once loader processes and caches are warm."""
    warm = WARM_UP_STEPS + 2 * workers  # batches that were loaded ahead come too fast
    steps = warm + MEASURED_STEPS
    clock = StepClock(log)
    clock.quiet = True
    with tempfile.TemporaryDirectory() as folder:
        train(
            config.training.model_copy(update={"steps": steps}),
            space,
            inputs.training,
            [],
            Path(folder),
            taps=inputs.taps,
            inputs=inputs.identity,
            log=clock,
            device=device,
            temperatures=inputs.temperatures,
            workers=workers,
            flags=flags,
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
