"""Forward passes over windows: in batches that fit the memory, mirrored, in mixed precision."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from itertools import combinations
from typing import Literal, TypeVar

import torch
from torch import Tensor, nn

from pipeline.errors import ConfigError, TeacherWarning
from pipeline.network import tapped

Precision = Literal["float32", "bfloat16", "float16"]
Window = TypeVar("Window")
_AXES = {"z": -3, "y": -2, "x": -1}


class WindowPasses:
    """Runs a network over windows, some at a time, and gives what it says of each by itself.

    On the CPU the network sees one window at a time, whatever the batch size: which kernel a
    convolution uses, and so its last bits, depends on the size of the batch, and results must not
    depend on a flag. On a GPU they do, within rounding.

    Args:
        network: in evaluation mode.
        taps: layers whose outputs are wanted.
        precision: of the arithmetic; other than float32 on CUDA only.
        mirror: axes; logits are averaged over the window and all its mirror images. Features are
            those of the window as it is: what a network computes of a mirrored image is not the
            mirror image of its features, and their mean would be neither.
        batch_size: windows per pass, at most; halved where memory does not suffice.
        device: where the network is; None is the CPU.

    Raises:
        ConfigError: mixed precision without a GPU.
    """

    def __init__(
        self,
        network: nn.Module,
        taps: Sequence[str],
        *,
        precision: Precision,
        mirror: Sequence[str],
        batch_size: int,
        device: torch.device | None,
    ) -> None:
        self._network, self._taps = network, taps
        self._device = device or torch.device("cpu")
        check_precision(precision, self._device)
        self._precision = precision
        axes = [_AXES[axis] for axis in mirror]
        self._flips = [f for n in range(len(axes) + 1) for f in combinations(axes, n)]
        self.batch_size = largest_batch(batch_size, self._device)

    def run(
        self, plan: Sequence[Window], load: Callable[[Window], Tensor]
    ) -> Iterator[tuple[Window, Tensor, dict[str, Tensor]]]:
        """Yields each window of the plan, in order, with float32 logits (C, d, h, w) and per tap
        (F, d', h', w'), on the network's device.

        Args:
            plan: the windows.
            load: cuts a window out of the image: float32 (d, h, w).

        Raises:
            MemoryError, RuntimeError: out of memory with one window at a time.
        """
        at = 0
        while at < len(plan):
            batch = plan[at : at + self.batch_size]
            try:
                out, features = self._forward(torch.stack([load(window) for window in batch]))
            except (MemoryError, RuntimeError) as error:
                if not is_out_of_memory(error) or len(batch) == 1:
                    raise
                self._halve(len(batch))
                continue
            for number, window in enumerate(batch):
                yield window, out[number], {tap: features[tap][number] for tap in self._taps}
            at += len(batch)

    def _forward(self, windows: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        # Not held across a yield: both would also apply to what the consumer does.
        with torch.inference_mode(), tapped(self._network, self._taps) as collected:
            batch = windows.unsqueeze(1).to(self._device)
            features: dict[str, Tensor] = {}
            total: Tensor | None = None
            for flip in self._flips:
                with _autocast(self._precision):
                    out = _first_output(self._network(batch.flip(flip) if flip else batch))
                out = out.float().flip(flip) if flip else out.float()
                if total is None:
                    total, features = out, dict(collected)
                else:
                    total = total + out
            assert total is not None
            return total / len(self._flips) if len(self._flips) > 1 else total, features

    def _halve(self, tried: int) -> None:
        self.batch_size = max(1, tried // 2)
        if self._device.type == "cuda":
            torch.cuda.empty_cache()
        warnings.warn(
            f"out of memory with {tried} windows at a time: going on with fewer. A smaller "
            "--window-batch saves the attempt.",
            TeacherWarning,
            stacklevel=2,
        )


def check_precision(precision: Precision, device: torch.device) -> None:
    """Refuses what would be computed otherwise than the digest says.

    Raises:
        ConfigError: mixed precision without a GPU.
    """
    if precision != "float32" and device.type != "cuda":
        raise ConfigError(
            f"{precision} is for a CUDA GPU; on {device.type} it is many times slower.",
            where="window.precision",
            fix="Set float32, or use --device cuda. Units of either have digests of their own.",
        )


def largest_batch(asked: int, device: torch.device) -> int:
    """Windows per pass that leave the results as they are: one on the CPU."""
    return 1 if device.type == "cpu" else asked


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error means that memory does not suffice, on the CPU or on a GPU."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    text = str(error).lower()
    return isinstance(error, RuntimeError) and any(
        words in text
        for words in ("out of memory", "not enough memory", "can't allocate memory", "bad_alloc")
    )


def _autocast(precision: Precision) -> AbstractContextManager[object]:
    match precision:
        case "float32":
            return nullcontext()
        case "bfloat16":
            return torch.autocast("cuda", dtype=torch.bfloat16)
        case "float16":
            return torch.autocast("cuda", dtype=torch.float16)


def _first_output(out: object) -> Tensor:
    """Networks with deep supervision return several outputs; the first is the full-size one."""
    if isinstance(out, (list, tuple)):
        out = out[0]
    assert isinstance(out, Tensor)
    return out
