"""Two processes that train together over gloo, forked from a warm server, and what they tell.

`Scenario` says what happens to them; `together` runs it and returns one `Told` per process.
"""

from __future__ import annotations

import json
import math
import os
import signal
import socket
import sys
import time
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import pipeline.student.distributed
from pipeline.errors import PipelineError
from pipeline.log import Log
from pipeline.networks.by_name import NetworkConfig
from pipeline.student import losses, training
from pipeline.student.dataset import PatchDataset, forks_of_a_server
from pipeline.student.distributed import ALONE, Processes, joined
from pipeline.student.inputs import TrainingInputs
from pipeline.student.network import CachedTap
from pipeline.student.resume import RunFolder
from pipeline.student.settings import TrainingConfig
from pipeline.student.speed import TrainingExecution
from pipeline.student.training import Trained, train
from tests.tiny import NETWORK
from tests.unit.student.coded import CHANNELS, SPACE, STRIDE, TAP, write_case

SIZE = 2
STEPS = 6
PATIENCE_S = 60.0


@dataclass(frozen=True)
class Scenario:
    """What happens to the processes.

    Attributes:
        cases: folder of cases, made if they are not there.
        folder: of the run.
        dropout: whose masks come from each process's own random state.
        sgd: instead of AdamW, which turns the rounding of a gradient of 0 into whole steps.
        every_step: write a checkpoint after every step.
        signal: (rank, step): that process gets SIGUSR1 in that step.
        kill: (rank, step): likewise SIGKILL.
        nan: (rank, step): that process's image is NaN in that step.
        steep: (rank, step): the gradient of its Dice is NaN in that step.
        error: (rank, item): that sample cannot be read.
    """

    cases: str
    folder: str
    dropout: float = 0.0
    sgd: bool = False
    every_step: bool = False
    signal: tuple[int, int] | None = None
    kill: tuple[int, int] | None = None
    nan: tuple[int, int] | None = None
    steep: tuple[int, int] | None = None
    error: tuple[int, int] | None = None


@dataclass(frozen=True)
class Told:
    """How a process ended.

    Attributes:
        code: exit code; -9 if it was killed.
        step: that it had reached; None if it failed.
        error: of a `PipelineError`.
        seconds: from the start of the training.
        wrote: names of files that it opened for writing in the run's folder.
    """

    code: int | None
    step: int | None = None
    error: str = ""
    seconds: float = 0.0
    wrote: tuple[str, ...] = ()


def settings(dropout: float, sgd: bool) -> TrainingConfig:
    """Six steps with features, whose adapters are used outside the network's forward pass."""
    network = NetworkConfig(name="UNet", args={**NETWORK.args, "dropout": dropout})
    values: dict[str, Any] = {
        "network": network.model_dump(),
        "intensity": {"kind": "zscore", "window_hu": [-1024, 9000], "mean_hu": 4e3, "std_hu": 3e3},
        "patch": [8, 8, 8],
        "batch_size": 2,
        "steps": STEPS,
        "seed": 5,
        "validate_every": 3,
        "optimiser": {"name": "sgd", "lr": 0.01} if sgd else {},
        "supervision": {"features": {"student_taps": ["model.0.conv"], "until": 0.5}},
    }
    return TrainingConfig.model_validate(values)


def start(scenario: Scenario, processes: Processes = ALONE) -> Trained:
    """Trains, or goes on."""
    torch.set_num_threads(1)
    found = [
        write_case(Path(scenario.cases), "liver-ct/a"),
        write_case(Path(scenario.cases), "spleen-ct/b", annotated=("spleen",)),
        write_case(Path(scenario.cases), "liver-ct/c", shape=(16, 18, 20)),
    ]
    return train(
        settings(scenario.dropout, scenario.sgd),
        TrainingInputs(found, found, SPACE, {}, {TAP: CachedTap(CHANNELS, STRIDE, (0,))}),
        RunFolder(Path(scenario.folder), pictures=False),
        TrainingExecution(device="cpu", checkpoint_minutes=0.0 if scenario.every_step else 1e9),
        Log(quiet=True),
        processes,
    )


def steep(x: Tensor) -> Tensor:
    """0, with a gradient of NaN: the root's slope at 0 is infinite."""
    return (0 * x.sum()).sqrt()


def together(scenario: Scenario) -> list[Told]:
    """Runs a scenario in two processes."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = str(found.getsockname()[1])
    context = forks_of_a_server(__name__, "torch._dynamo")
    started = [
        context.Process(target=_process, args=(scenario, rank, port)) for rank in range(SIZE)
    ]
    for process in started:
        process.start()
    for process in started:
        process.join(PATIENCE_S)
        if process.exitcode is None:
            process.kill()
            process.join()
    return [_told(scenario, rank, p.exitcode) for rank, p in enumerate(started)]


def _told(scenario: Scenario, rank: int, code: int | None) -> Told:
    path = Path(f"{scenario.folder}.told{rank}")
    if not path.exists():
        return Told(code)
    found = json.loads(path.read_text())
    path.unlink()
    return Told(**{**found, "code": code, "wrote": tuple(found["wrote"])})


def _process(scenario: Scenario, rank: int, port: str) -> None:
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(SIZE), LOCAL_RANK=str(rank))
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
    wrote = _watch_writes(scenario.folder)
    _arrange(scenario, rank)
    began = time.monotonic()
    step, error, code = None, "", 0
    try:
        with joined(patience=timedelta(seconds=PATIENCE_S / 2)) as processes:
            step = start(scenario, processes).step
    except PipelineError as found:
        error, code = str(found), found.exit_code
    told = Told(code, step, error, time.monotonic() - began, tuple(sorted(wrote)))
    Path(f"{scenario.folder}.told{rank}").write_text(json.dumps(asdict(told)))
    raise SystemExit(code)


def _watch_writes(folder: str) -> set[str]:
    """Names of the files that this process opens for writing below a folder, as they come."""
    found: set[str] = set()

    def hear(event: str, args: tuple[Any, ...]) -> None:
        if event != "open" or not str(args[0]).startswith(f"{folder}/"):
            return
        if args[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
            found.add(Path(args[0]).name)

    sys.addaudithook(hear)
    return found


def _arrange(scenario: Scenario, rank: int) -> None:
    real_step, real_loss, real_target, real_item = (
        training.make_step, training.batch_loss, losses.one_target, PatchDataset.__getitem__,
    )  # fmt: skip

    def make_step(*args: Any) -> Any:
        step = args[-1] + 1
        if scenario.signal == (rank, step):
            os.kill(os.getpid(), signal.SIGUSR1)
        if scenario.kill == (rank, step):
            os.kill(os.getpid(), signal.SIGKILL)
        return real_step(*args)

    calls: list[int] = []

    def batch_loss(config: Any, network: Any, batch: Any, fraction: float, told: Any) -> Any:
        calls.append(1)
        if scenario.nan == (rank, len(calls)):
            batch.image.mul_(math.nan)
        return real_loss(config, network, batch, fraction)

    def one_target(log_p: Tensor, *args: Any, **options: Any) -> tuple[Tensor, Tensor]:
        entropy, dice = real_target(log_p, *args, **options)
        later = scenario.steep is not None and scenario.steep[1] <= len(calls)
        return entropy, dice + steep(log_p) if later and scenario.steep[0] == rank else dice

    def item(data: PatchDataset, number: int) -> Any:
        if scenario.error == (rank, number):
            raise PipelineError("a chunk cannot be decoded.", where="liver-ct/a")
        return real_item(data, number)

    replace: list[tuple[Any, str, Any]] = [
        (pipeline.student.distributed, "_BUCKET_BYTES", 256),  # many, of so small a network
        (training, "make_step", make_step),
        (training, "batch_loss", batch_loss),
        (losses, "one_target", one_target),
        (PatchDataset, "__getitem__", item),
    ]
    for owner, name, function in replace:
        setattr(owner, name, function)
