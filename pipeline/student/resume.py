"""A run's folder: the state of a training at a step, kept there and gone on from; and the signals
that end a training early.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from pipeline.cache.schema import Inputs, differing
from pipeline.cache.store import write_json
from pipeline.config import canonical_json
from pipeline.errors import CheckpointError, PipelineError
from pipeline.folder import Folder, mirrored
from pipeline.log import Log
from pipeline.student.checkpoint import StudentRecord, load_newest, save_student, save_training
from pipeline.student.distributed import ALONE, Processes
from pipeline.student.inputs import TrainingInputs
from pipeline.student.loggers import LoggedRun, open_loggers
from pipeline.student.network import StudentNetwork
from pipeline.student.progress import Metrics, followed, mean_dice
from pipeline.student.settings import TrainingConfig
from pipeline.student.speed import Speed


@dataclass
class BestSoFar:
    """The highest mean Dice of the validations before; in the checkpoint, as what follows depends
    on it."""

    mean_dice: float = -1.0

    def beaten_by(self, dice: float | None) -> bool:
        """Whether it is higher than all before; it is then the best."""
        if dice is None or dice <= self.mean_dice:
            return False
        self.mean_dice = dice
        return True

    def state_dict(self) -> dict[str, float]:
        """The number."""
        return asdict(self)

    def load_state_dict(self, state: Mapping[str, float], /) -> None:
        """Replaces the number."""
        self.mean_dice = state["mean_dice"]


@dataclass(frozen=True)
class TrainingState:
    """A training at a step: its settings, and all that later steps depend on.

    Attributes:
        speed: precision, memory format and compiling at work, and the device.
        best: of the validations so far.
    """

    config: TrainingConfig
    inputs: TrainingInputs
    network: StudentNetwork
    optimiser: torch.optim.Optimizer
    speed: Speed
    processes: Processes = ALONE
    best: BestSoFar = field(default_factory=BestSoFar)

    @property
    def identity(self) -> dict[str, Any]:
        """Settings and inputs: with others it is another run."""
        inputs = dict(self.inputs.identity)
        return {"config": self.config.model_dump(mode="json"), "inputs": inputs}

    @property
    def parts(self) -> dict[str, Any]:
        """What is in a checkpoint, by name; each with `state_dict` and `load_state_dict`."""
        names = ("network", "optimiser", "speed", "best")
        return {name: getattr(self, name) for name in names}


@dataclass
class RunFolder:
    """The folder of a run: config.json, checkpoints, metrics.jsonl, progress.png, and the student.

    Of processes that train together the first alone writes to it.

    Attributes:
        name: of the run, for people; by default the folder's.
        saved: called whenever a checkpoint has been written.
        record: what a student's file says beside its weights, for a step and its Dice per organ;
            None: best.pt is not kept, and no rule for small parts is learnt.
        pictures: draw progress.png beside each checkpoint.
    """

    path: Path
    name: str = ""
    saved: Callable[[], None] = lambda: None
    record: Callable[[int, Mapping[str, float | None]], StudentRecord] | None = None
    pictures: bool = True
    _metrics: Metrics = field(init=False, repr=False)

    def restore(self, state: TrainingState, log: Log) -> int:
        """Loads the newest checkpoint of this very run; returns the step to go on from.

        The first process reads it for all.

        Raises:
            CheckpointError: a run with other settings, or no checkpoint of several can be read.
        """
        config, processes, speed = state.config, state.processes, state.speed
        found = processes.from_first(lambda: self._read(state.identity, log))
        if found is None:
            torch.manual_seed(_stream(config.seed, 0, processes.rank))
            if processes.size > 1:  # equal already, if the machines are
                weights = state.network.state_dict()
                first = processes.from_first(lambda: {n: w.cpu() for n, w in weights.items()})
                state.network.load_state_dict(first)
            return 0
        step = int(found["step"])
        for name, part in state.parts.items():
            part.load_state_dict(found[name])
        torch.manual_seed(_stream(config.seed, step, processes.rank))
        if len(found["rng"]) == processes.size:
            set_random_state(found["rng"][processes.rank], speed.device)
        else:
            log.warn(
                f"the checkpoint is of {len(found['rng'])} processes, now there are "
                f"{processes.size}: the same samples and losses follow, but not bit for bit."
            )
        log.info(f"going on after step {step}")
        if speed.resumed_flags != speed.flags:
            log.warn(
                f"the run was trained with {speed.resumed_flags} and goes on with {speed.flags}: "
                "not bit for bit what it would have been."
            )
        return step

    @contextmanager
    def followed(
        self, state: TrainingState, start: int, loggers: Sequence[str], log: Log
    ) -> Iterator[Metrics]:
        """The metrics of the steps after `start`; what loggers began is finished whatever happens.

        Metrics of other processes than the first are seen by nobody.
        """
        processes, config = state.processes, state.identity["config"]
        with processes.folder_to_write(self.path) as written, ExitStack() as following:

            def opened() -> Metrics:
                run = LoggedRun(self.name or written.name, written, config, start)
                others = open_loggers(loggers if processes.is_first else ())
                size = state.config.batch_size
                return following.enter_context(followed(run, size, log.warn, others))

            self._metrics = processes.together(opened)
            yield self._metrics

    def add_validation(
        self, state: TrainingState, step: int, scores: Mapping[str, float | None]
    ) -> None:
        """Dice per organ; the student of the highest mean so far is kept as best.pt."""
        state.processes.from_first(partial(self._add_validation, state, step, scores))

    def save(self, state: TrainingState, step: int) -> None:
        """Writes the checkpoint of a step: all that the steps after it depend on.

        Raises:
            PipelineError: a weight or a number of the optimiser is not finite; nothing is written.
        """
        random = state.processes.gathered(lambda: random_state(state.speed.device))
        state.processes.from_first(partial(self._save, state, step, random))

    def save_student(
        self,
        name: str,
        network: nn.Module,
        step: int,
        scores: Mapping[str, float | None],
        **learnt: Any,
    ) -> None:
        """Writes student.pt or best.pt; `learnt`: further fields of its record."""
        assert self.record is not None
        record = self.record(step, scores).model_copy(update=learnt)
        save_student(self.path / name, record, network)

    def _add_validation(
        self, state: TrainingState, step: int, scores: Mapping[str, float | None]
    ) -> None:
        if state.best.beaten_by(mean_dice(scores)) and self.record is not None:
            check_finite(state.network.state_dict(), self.path, step)
            self.save_student("best.pt", state.network.network, step, scores)
        self._metrics.add_validation(step, scores)
        if self._metrics.picture_is_old:
            self._draw(state)

    def _save(self, state: TrainingState, step: int, random: Sequence[Mapping[str, Any]]) -> None:
        self._metrics.flush()
        states = {name: part.state_dict() for name, part in state.parts.items()}
        check_finite(states, self.path, step)
        identity = canonical_json(state.identity)
        save_training(
            self.path / "checkpoints", step, {**states, "identity": identity, "rng": list(random)}
        )
        self._draw(state)
        self.saved()

    def _draw(self, state: TrainingState) -> None:
        if self.pictures:
            self._metrics.draw(self.path / "progress.png", state.inputs.space.ids)

    def _read(self, identity: Mapping[str, Any], log: Log) -> dict[str, Any] | None:
        """The newest checkpoint; where there is none, config.json is written instead."""
        found, complaints = load_newest(self.path / "checkpoints")
        for complaint in complaints:
            log.warn(f"{complaint} The checkpoint before it is used.")
        if found is None:
            write_json(self.path / "config.json", identity)
            return None
        fix = "Use the same settings to go on, or name another `run` in them to start over."
        check_same(json.loads(found["identity"]), identity, self.path, fix)
        return found


def check_same(before: Inputs, now: Inputs, where: object, fix: str) -> None:
    """Refuses to go on with a run whose configuration or inputs were others.

    Raises:
        CheckpointError: names what differs.
    """
    if changes := differing(before, json.loads(canonical_json(now))):
        changes.sort(key=lambda told: told.partition(":")[0].count("."))  # fold before cases
        raise CheckpointError(
            f"this run was started with other settings: {'; '.join(changes[:6])}.",
            where=where,
            fix=fix,
        )


@contextmanager
def open_run(
    folder: Folder,
    processes: Processes = ALONE,
    *,
    name: str,
    record: Callable[[int, Mapping[str, float | None]], StudentRecord] | None = None,
) -> Iterator[RunFolder]:
    """A run's folder; of one in an object store a copy, sent back whenever a checkpoint is written.

    Other processes than the first write nothing, and name the folder in errors alone.
    """
    if not processes.is_first:
        yield RunFolder(Path(str(folder)), name, record=record)
        return
    with mirrored(folder) as (local, send):
        yield RunFolder(local, name, send, record)


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
def stop_signals(*, answered: bool = False) -> Iterator[Callable[[], bool]]:
    """SIGTERM, SIGUSR1 and Ctrl-C set a flag; the loop stops at the next step with a checkpoint.

    A second Ctrl-C ends the program at once. One that follows within a second is still the first:
    torchrun hands on to its processes what the terminal sent to all of them.

    Args:
        answered: the first Ctrl-C is answered, since the step may take a while.
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
        if answered and len(pressed) == 1:
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
    when loading ends. If the loop is killed outright, a worker of forkserver would wait for it for
    ever, since its own parent, the server, waits for the workers.
    """
    for name in _STOPS:
        signal.signal(name, signal.SIG_IGN)
    loop = multiprocessing.parent_process()
    if loop is not None:

        def follow() -> None:
            loop.join()
            os._exit(1)

        threading.Thread(target=follow, daemon=True).start()
