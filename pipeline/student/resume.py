"""Stopping and going on: the state of a training at a step, and the signals that end it early."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from pipeline.cache.store import write_json
from pipeline.config import canonical_json
from pipeline.errors import CheckpointError
from pipeline.log import Log
from pipeline.student.checkpoint import load_newest, save_training
from pipeline.student.network import StudentNetwork
from pipeline.student.speed import Speed


def save_state(
    folder: Path,
    step: int,
    identity: Mapping[str, Any],
    network: StudentNetwork,
    optimiser: torch.optim.Optimizer,
    speed: Speed,
) -> None:
    """Writes the checkpoint of a step: all that the steps after it depend on."""
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    save_training(
        folder / "checkpoints",
        step,
        {
            "identity": canonical_json(identity),
            "network": network.state_dict(),
            "optimiser": optimiser.state_dict(),
            "scaler": speed.state_dict(),
            "rng": {"torch": torch.get_rng_state(), "cuda": cuda},
        },
    )


def restore_state(
    folder: Path,
    identity: Mapping[str, Any],
    network: StudentNetwork,
    optimiser: torch.optim.Optimizer,
    speed: Speed,
    *,
    seed: int,
    log: Log,
    resume: bool,
) -> int:
    """Loads the newest checkpoint of this very run; returns the step to go on from.

    Args:
        folder: of the run.
        identity: settings and inputs that the run was started with.
        network: its weights are replaced.
        optimiser: its state is replaced.
        speed: the state of its scaler is replaced.
        seed: of the global random state where there is no checkpoint.
        log: hears of checkpoints that cannot be read.
        resume: False refuses to go on.

    Raises:
        CheckpointError: a run with other settings, or no checkpoint of several can be read.
    """
    state, complaints = load_newest(folder / "checkpoints")
    for complaint in complaints:
        log.warn(f"{complaint} The checkpoint before it is used.")
    if state is None:
        write_json(folder / "config.json", identity)
        torch.manual_seed(seed)
        return 0
    differing = _differing(json.loads(state["identity"]), json.loads(canonical_json(identity)))
    if differing or not resume:
        settings = f"was started with other settings: {'; '.join(differing[:6])}."
        raise CheckpointError(
            f"this run {settings if differing else 'has checkpoints.'}",
            where=folder,
            fix="Use the same settings to go on, or name another `run` in them to start over.",
        )
    network.load_state_dict(state["network"])
    optimiser.load_state_dict(state["optimiser"])
    speed.load_state_dict(state["scaler"])
    torch.set_rng_state(state["rng"]["torch"])
    if torch.cuda.is_available() and len(state["rng"]["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(state["rng"]["cuda"])
    step = int(state["step"])
    log.info(f"going on after step {step}")
    return step


@contextmanager
def stop_signals() -> Iterator[Callable[[], bool]]:
    """SIGTERM and SIGUSR1 set a flag; the loop stops at the next step with a checkpoint."""
    caught: list[int] = []
    names = (signal.SIGTERM, signal.SIGUSR1)
    try:
        before = {name: signal.signal(name, lambda n, _: caught.append(n)) for name in names}
    except ValueError:  # not in the main thread: whoever started us handles signals
        before = {}
    try:
        yield lambda: bool(caught)
    finally:
        for name, handler in before.items():
            signal.signal(name, handler)


def live_as_long_as_the_loop(worker: int) -> None:
    """Makes a loader process outlive signals to the whole job, but not the process that trains.

    A scheduler signals all processes of a job; the loop alone says when loading ends. If the loop
    is killed outright, a worker of forkserver would wait for it for ever, since its own parent,
    the server, waits for the workers.
    """
    for name in (signal.SIGTERM, signal.SIGUSR1):
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
