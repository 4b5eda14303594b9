"""Stopping and going on: the state of a training at a step, and the signals that end it early."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch

from pipeline.cache.store import write_json
from pipeline.config import canonical_json
from pipeline.errors import CheckpointError, PipelineError
from pipeline.log import Log
from pipeline.student.checkpoint import load_newest, save_training
from pipeline.student.processes import ALONE, Processes


class Stateful(Protocol):
    """A part of a training that later steps depend on: network, optimiser and the like."""

    def state_dict(self) -> Any:
        """All of it."""

    def load_state_dict(self, state: Any, /) -> Any:
        """Replaces all of it."""


class BestSoFar:
    """The highest mean Dice of the validations before; in the checkpoint, as what follows depends
    on it."""

    def __init__(self) -> None:
        self._dice = -1.0

    def beaten_by(self, dice: float | None) -> bool:
        """Whether it is higher than all before; it is then the best."""
        if dice is None or dice <= self._dice:
            return False
        self._dice = dice
        return True

    def state_dict(self) -> dict[str, float]:
        """The number."""
        return {"mean_dice": self._dice}

    def load_state_dict(self, state: Mapping[str, float], /) -> None:
        """Replaces the number."""
        self._dice = state["mean_dice"]


def save_state(
    folder: Path,
    step: int,
    identity: Mapping[str, Any],
    parts: Mapping[str, Stateful],
    rng: Sequence[Mapping[str, Any]],
) -> None:
    """Writes the checkpoint of a step: all that the steps after it depend on.

    Args:
        folder: of the run.
        step: that has been made.
        identity: settings and inputs that the run was started with.
        parts: by name.
        rng: `random_state` of each process, by rank.

    Raises:
        PipelineError: a weight or a number of the optimiser is not finite; nothing is written.
    """
    states = {name: part.state_dict() for name, part in parts.items()}
    check_finite(states, folder, step)
    save_training(
        folder / "checkpoints",
        step,
        {**states, "identity": canonical_json(identity), "rng": list(rng)},
    )


def restore_state(
    folder: Path,
    identity: Mapping[str, Any],
    parts: Mapping[str, Stateful],
    *,
    seed: int,
    log: Log,
    resume: bool,
    device: torch.device,
    processes: Processes = ALONE,
) -> int:
    """Loads the newest checkpoint of this very run; returns the step to go on from.

    The first process reads it for all.

    Args:
        folder: of the run.
        identity: settings and inputs that the run was started with.
        parts: by name; their state is replaced.
        seed: of the global random state where there is no checkpoint.
        log: hears of checkpoints that cannot be read.
        resume: False refuses to go on.
        device: whose random state is restored beside the CPU's.
        processes: that train together.

    Raises:
        CheckpointError: a run with other settings, or no checkpoint of several can be read.
    """
    state = processes.from_first(lambda: _read_state(folder, identity, log, resume))
    if state is None:
        torch.manual_seed(_stream(seed, 0, processes.rank))
        if processes.size > 1:  # equal already, if the machines are
            network = parts["network"]
            network.load_state_dict(processes.from_first(lambda: _on_cpu(network.state_dict())))
        return 0
    step = int(state["step"])
    for name, part in parts.items():
        part.load_state_dict(state[name])
    torch.manual_seed(_stream(seed, step, processes.rank))
    if len(state["rng"]) == processes.size:
        set_random_state(state["rng"][processes.rank], device)
    else:
        log.warn(
            f"the checkpoint is of {len(state['rng'])} processes, now there are {processes.size}: "
            "the same samples and losses follow, but not bit for bit."
        )
    log.info(f"going on after step {step}")
    return step


def random_state(device: torch.device) -> dict[str, Any]:
    """Of the generators that a training step draws from: torch's, of the CPU and of one GPU."""
    cuda = torch.cuda.get_rng_state(device) if device.type == "cuda" else None
    return {"torch": torch.get_rng_state(), "cuda": cuda}


def check_finite(state: Any, where: object, step: int) -> None:
    """Refuses a state that training could not go on from.

    Raises:
        PipelineError: a number in one of its tensors is NaN or infinite.
    """
    bad = _not_finite(state)
    if bad:
        raise PipelineError(
            f"{bad} is not finite after step {step}, although loss and gradient were.",
            where=where,
            fix="The last checkpoint is intact. Lower optimiser.lr.",
        )


def _read_state(
    folder: Path, identity: Mapping[str, Any], log: Log, resume: bool
) -> dict[str, Any] | None:
    state, complaints = load_newest(folder / "checkpoints")
    for complaint in complaints:
        log.warn(f"{complaint} The checkpoint before it is used.")
    if state is None:
        write_json(folder / "config.json", identity)
        return None
    differing = _differing(json.loads(state["identity"]), json.loads(canonical_json(identity)))
    if differing or not resume:
        settings = f"was started with other settings: {'; '.join(differing[:6])}."
        raise CheckpointError(
            f"this run {settings if differing else 'has checkpoints.'}",
            where=folder,
            fix="Use the same settings to go on, or name another `run` in them to start over.",
        )
    return state


def _on_cpu(state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: tensor.cpu() for name, tensor in state.items()}


def set_random_state(state: Mapping[str, Any], device: torch.device) -> None:
    """Takes a `random_state` back."""
    torch.set_rng_state(state["torch"])
    if device.type == "cuda" and state["cuda"] is not None:
        torch.cuda.set_rng_state(state["cuda"], device)


def _stream(seed: int, step: int, rank: int) -> int:
    """The seed itself at the start of the first process; of every other place one of its own."""
    if step == rank == 0:
        return seed
    return int(np.random.SeedSequence([seed, step, rank]).generate_state(1, np.uint64)[0] >> 1)


def _not_finite(state: Any, name: str = "") -> str:
    """The name of the first tensor with such a number; empty if there is none."""
    if isinstance(state, torch.Tensor):
        return "" if not state.is_floating_point() or bool(state.isfinite().all()) else name
    if isinstance(state, Mapping):
        named = [_not_finite(value, f"{name}.{key}".lstrip(".")) for key, value in state.items()]
        return next(filter(None, named), "")
    return ""


_STOPS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
_ONE_PRESS_SECONDS = 1.0


@contextmanager
def stop_signals(*, aloud: bool = False) -> Iterator[Callable[[], bool]]:
    """SIGTERM, SIGUSR1 and Ctrl-C set a flag; the loop stops at the next step with a checkpoint.

    A second Ctrl-C ends the program at once. One that follows within a second is still the first:
    torchrun hands on to its processes what the terminal sent to all of them.

    Args:
        aloud: the first Ctrl-C is answered, since the step may take a while.
    """
    caught: list[float] = []
    pressed: list[float] = []

    def catch(number: int, _: object) -> None:
        now = time.monotonic()
        caught.append(now)
        if number != signal.SIGINT:
            return
        pressed.append(now)
        if now - pressed[0] > _ONE_PRESS_SECONDS:
            raise KeyboardInterrupt
        if aloud and len(pressed) == 1:
            # No print: the signal may have come in the middle of one.
            os.write(2, b"\nCtrl-C: stopping after this step, with a checkpoint. "
                        b"Once more ends at once, without one.\n")  # fmt: skip

    # What is ignored stays so: a script's background job shall outlive Ctrl-C in its terminal.
    names = [n for n in _STOPS if n != signal.SIGINT or signal.getsignal(n) != signal.SIG_IGN]
    try:
        before = {name: signal.signal(name, catch) for name in names}
    except ValueError:  # not in the main thread: whoever started us handles signals
        before = {}
    try:
        yield lambda: bool(caught)
    finally:
        for name, handler in before.items():
            signal.signal(name, handler)


def live_as_long_as_the_loop(worker: int) -> None:
    """Makes a loader process outlive signals to the whole job, but not the process that trains.

    A scheduler signals all processes of a job, and Ctrl-C all of a terminal's; the loop alone says
    when loading ends. If the loop
    is killed outright, a worker of forkserver would wait for it for ever, since its own parent,
    the server, waits for the workers.
    """
    for name in _STOPS:
        signal.signal(name, signal.SIG_IGN)
    loop = multiprocessing.parent_process()
    if loop is not None:
        threading.Thread(target=_exit_after, args=(loop,), daemon=True).start()


def _exit_after(process: Any) -> None:
    process.join()
    os._exit(1)


def _differing(old: Any, new: Any, prefix: str = "") -> list[str]:
    if isinstance(old, dict) and isinstance(new, dict):
        return [
            line
            for key in sorted({*old, *new})
            for line in _differing(old.get(key), new.get(key), f"{prefix}{key}.")
        ]
    return [] if old == new else [f"{prefix[:-1]} was {old}, now {new}"]
