"""What makes a training faster and is no part of its digest: precision, memory format, compiling.

Rounding differs between these, so a resumed run is bit for bit the undisturbed one only with the
same flags.
"""

from __future__ import annotations

import importlib.util
import math
import os
import shutil
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from pipeline.errors import ConfigError
from pipeline.log import Log
from pipeline.networks.by_name import pick_device
from pipeline.student.loggers import open_loggers

Precision = Literal["fp32", "bf16", "fp16"]
_SMALLEST_SCALE = 1.0


@dataclass(frozen=True)
class SpeedFlags:
    """Flags of the command line.

    Attributes:
        precision: of the network's passes; weights, losses and the optimiser stay float32.
        channels_last: convolutions on (N, D, H, W, C) memory.
    """

    precision: Precision = "fp32"
    channels_last: bool = False
    compile: bool = False

    def __str__(self) -> str:
        """Those that are set."""
        others = {"channels last": self.channels_last, "compiled": self.compile}
        return ", ".join([self.precision, *(name for name, is_set in others.items() if is_set)])


@dataclass(frozen=True)
class TrainingExecution:
    """Where and how a training runs; no part of its digest.

    Attributes:
        device: auto, cpu, cuda, cuda:1.
        loggers: names of loggers that are told beside metrics.jsonl.
        checkpoint_minutes: at most so much work is lost to a kill.
        stage_to: folder on the machine's own disk that is read from instead of the cache; see
            `pipeline.student.staging`.
        pool_bytes: decoded chunks kept in each loader process.
    """

    device: str = "auto"
    workers: int = 0
    flags: SpeedFlags = SpeedFlags()
    loggers: Sequence[str] = ()
    checkpoint_minutes: float = 10.0
    stage_to: Path | None = None
    pool_bytes: int = 512_000_000

    def check(self) -> None:
        """What cannot be is refused before hours of training.

        Raises:
            ConfigError: no such device, half precision on a CPU, or a logger that is unknown or
                not installed.
        """
        open_loggers(self.loggers)
        check_device(self.flags, pick_device(self.device))


def check_device(flags: SpeedFlags | None, device: torch.device) -> None:
    """Half precision is for GPUs.

    Raises:
        ConfigError: it was asked for on a CPU.
    """
    if flags is not None and flags.precision != "fp32" and device.type == "cpu":
        raise ConfigError(
            f"{flags.precision} on a CPU is slower than fp32 and not to be trusted: there, torch's "
            "gradients of 3 x 3 x 3 convolutions on small maps can be garbage "
            "(benchmarks/half_precision.py).",
            where="--precision",
            fix="Leave --precision out, or train on a GPU.",
        )


class Speed:
    """These flags at work on one network.

    A step is: the loss within `autocast`, `scaler.scale(loss).backward()`, `scaler.unscale_`,
    clipping, `step`. Without fp16 the scaler does nothing.
    """

    def __init__(self, flags: SpeedFlags | None = None, device: torch.device | None = None) -> None:
        self.flags = flags or SpeedFlags()
        self.device = device or torch.device("cpu")
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=self.flags.precision == "fp16")
        self.resumed_flags = self.flags

    def prepare(self, network: nn.Module, inner: nn.Module, log: Log) -> None:
        """Sets the memory format of a network and compiles the MONAI network inside of it.

        An image has one channel, so its memory is in either format already.

        The losses are not compiled, they are small; names of layers and weights do not change.

        Raises:
            ConfigError: nothing here to compile with.
        """
        flags = self.flags
        if flags.channels_last:
            network.to(memory_format=torch.channels_last_3d)  # type: ignore[call-overload]
        if flags.compile:
            _check_compiler(self.device)
            inner.compile()

    def autocast(self) -> AbstractContextManager[Any]:
        """For passes of the network; what is computed in float32 stays so."""
        if self.flags.precision == "fp32":
            return nullcontext()
        dtype = torch.bfloat16 if self.flags.precision == "bf16" else torch.float16
        return torch.autocast(self.device.type, dtype=dtype)

    def step(self, optimiser: torch.optim.Optimizer, norm: float) -> bool:
        """One step of the optimiser; False if fp16 overflowed and the step was left out.

        Args:
            optimiser: its gradients are unscaled and clipped.
            norm: of the gradient before clipping; one that `is_lost` is not stepped with.
        """
        self.scaler.step(optimiser)
        self.scaler.update()
        return math.isfinite(norm)

    def is_lost(self, norm: float) -> bool:
        """Whether a gradient is not finite, and that is not fp16's overflow."""
        return not math.isfinite(norm) and self.scaler.get_scale() <= _SMALLEST_SCALE

    def state_dict(self) -> dict[str, Any]:
        """What the steps to come depend on: the scaler's state, empty without fp16; and flags."""
        return {"scaler": self.scaler.state_dict(), "flags": asdict(self.flags)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes it back; the scaler's of a run without fp16 is empty and changes nothing."""
        self.resumed_flags = SpeedFlags(**state["flags"])
        if state["scaler"] and self.scaler.is_enabled():
            self.scaler.load_state_dict(state["scaler"])


def _check_compiler(device: torch.device) -> None:
    if device.type == "cuda":
        if importlib.util.find_spec("triton") is None:
            raise ConfigError(
                "torch.compile needs triton on a GPU and it is not installed.",
                where="--compile",
                fix="Install it, or leave --compile out.",
            )
    elif not any(shutil.which(name) for name in (os.environ.get("CXX", "g++"), "clang++")):
        raise ConfigError(
            "torch.compile needs a C++ compiler on a CPU and there is none.",
            where="--compile",
            fix="Install g++ or set CXX, or leave --compile out.",
        )
