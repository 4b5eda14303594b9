"""Sliding windows: forward passes that fit the memory, blended logits and tapped features, slab
by slab.

MONAI's `sliding_window_inference` is not used here for three reasons: it blends what a network
returns, not what its layers do; it accumulates in the network's dtype; and it holds all channels of
the whole volume, whereas here what no further window touches is handed on and let go. The Gaussian
weights are those of MONAI, bit for bit.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import combinations
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from pipeline.data.patches import (
    Index3,
    Patch,
    Precision,
    WindowConfig,
    check_slice,
    padded_shape,
    windows,
)
from pipeline.errors import ConfigError, TeacherWarning
from pipeline.networks.by_name import tapped

# Windows put together slab by slab: logits voxel by voxel, features cell by cell.
#
# Windows come with z slowest. Once one begins at row z, no later one touches the rows before z:
# they are handed out, and only one window's depth of the volume is held.

_VALUES_AT_ONCE = 4_000_000


class BlendedSlabs:
    """sum(w * values) / sum(w) with Gaussian weights w, accumulated in float32 in the order in
    which windows come. All shapes are in voxels, or all in a tap's cells.

    Args:
        image_shape: (D, H, W) of what is handed out.
        padded: (D, H, W) that windows cover.
        sigma: of the Gaussian, in window sizes.
        device: where sums are held; None is the CPU.

    Attributes:
        begin: the first row that is not handed out yet.
    """

    def __init__(
        self,
        image_shape: Sequence[int],
        padded: Index3,
        window: Index3,
        sigma: float,
        device: torch.device | None,
    ) -> None:
        self.begin = 0
        self._image_shape, self._held = image_shape, (window[0], *padded[1:])
        self._weight: Tensor = _gaussian(window, sigma, device)
        self._norm = torch.zeros(self._held, device=device)
        self._sum: Tensor | None = None

    def put(self, patch: Patch, values: Tensor) -> None:
        """Adds a window that begins at row `begin`: (C, d, h, w)."""
        assert patch.start[0] == self.begin
        if self._sum is None:
            self._sum = torch.zeros((values.shape[0], *self._held), device=self._norm.device)
        _, y, x = patch.slices
        for channel, new in zip(self._sum, values, strict=True):
            channel[:, y, x] += self._weight * new
        self._norm[:, y, x] += self._weight

    def advance(self, row: int) -> Iterator[npt.NDArray[np.float32]]:
        """The rows from `begin` to `row`, cropped to the image, a few at a time: (C, n, H, W)."""
        assert self._sum is not None
        depth, height, width = self._image_shape
        wanted = max(0, min(row, depth) - self.begin)
        at_once = max(1, _VALUES_AT_ONCE // (len(self._sum) * height * width))
        for begin in range(0, wanted, at_once):
            rows = slice(begin, min(wanted, begin + at_once)), slice(height), slice(width)
            slab = self._sum[(slice(None), *rows)] / self._norm[rows]
            array: npt.NDArray[np.float32] = slab.cpu().numpy()
            yield array
        _shift(self._sum, row - self.begin)
        _shift(self._norm[None], row - self.begin)
        self.begin = row


@lru_cache(maxsize=4)
def _gaussian(window: Index3, sigma: float, device: torch.device | None) -> Tensor:
    """Weights of a window's voxels, at least 1e-3 of the largest: float32 (d, h, w). Kept: of a
    case of one window they cost as much as blending."""
    axes = []
    for size in window:
        x = torch.arange(-(size - 1) / 2, (size - 1) / 2 + 1, dtype=torch.float32)
        axes.append(torch.exp(x**2 / (-2 * (size * sigma) ** 2)))
    z, y, x = axes
    weight = (z[:, None] * y)[..., None] * x
    return weight.clamp(min=1e-3).clamp(min=1e-3 * float(weight.max())).to(device)


def _shift(held: Tensor, rows: int) -> None:
    """Rows move to the front of axis 1, channel by channel; zeros come in behind."""
    kept = held.shape[1] - rows
    for channel in held:
        channel[:kept] = channel[rows:].clone()
        channel[kept:] = 0


# Forward passes over windows: in batches that fit the memory, mirrored, in mixed precision.

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
                    out = first_output(self._network(batch.flip(flip) if flip else batch))
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


def first_output(out: Any) -> Tensor:
    """Networks with deep supervision return several outputs; the first is the full-size one."""
    result: Tensor = out[0] if isinstance(out, (list, tuple)) else out
    return result


FloatArray = npt.NDArray[np.float32]
_FLAT_WINDOW = (
    "Set `window.shape` to [1, h, w] if network and taps have stride 1 along that axis; a network "
    "of volumes cannot teach slices: leave them out."
)
# Takes the next rows, (C, n, H, W), of an array that arrives slab by slab along z.
Sink = Callable[[FloatArray], None]


@dataclass(frozen=True)
class SlidingWindow:
    """A network, and how it is run over volumes.

    Attributes:
        network: in evaluation mode.
        strides: layers whose features are wanted -> voxels per feature cell along z, y, x.
        pad_value: in the network's units; fills what a volume lacks to a window or to a whole
            number of cells.
        batch_size: windows per forward pass, at most; fewer where memory is short.
        device: where the network is; None is the CPU.
        scale: voxel by voxel, image -> the network's units; applied window by window, so that no
            float32 copy of the image is made. None: the image is in the network's units.
    """

    network: nn.Module
    config: WindowConfig
    strides: Mapping[str, Index3] = field(default_factory=dict)
    pad_value: float = 0.0
    batch_size: int = 1
    device: torch.device | None = None
    scale: Callable[[npt.NDArray[Any]], FloatArray] | None = None

    def run(self, image: npt.NDArray[Any]) -> tuple[FloatArray, dict[str, FloatArray]]:
        """All of a volume; see `stream`.

        Returns:
            Logits (C, D, H, W) and per tap (F, ceil(D / s), ceil(H / s), ceil(W / s)), float32.
        """
        whole = WholeArray(image.shape[0])
        cells = {tap: WholeArray(-(-image.shape[0] // s[0])) for tap, s in self.strides.items()}
        self.stream(image, whole.put, {tap: sink.put for tap, sink in cells.items()})
        return whole.array, {tap: sink.array for tap, sink in cells.items()}

    def stream(self, image: npt.NDArray[Any], logits: Sink, features: Mapping[str, Sink]) -> None:
        """Runs over a volume; what is finished is handed out slab by slab, in order.

        Logits and features are blended with Gaussian weights: sum(w * logits) / sum(w), accumulated
        in float32. No more than one window's depth of the volume is held, on the network's device.
        On the CPU the results are the same to the bit for every `batch_size`.

        Args:
            image: (D, H, W), any real dtype.
            logits: takes slabs (C, n, H, W), D rows in all.
            features: of all taps, takes slabs (F, n, h, w), ceil(D / s) rows in all.

        Raises:
            ConfigError: mixed precision without a GPU.
            GeometryError: the image is one slice, and windows are thicker.
            MemoryError, RuntimeError: out of memory with one window at a time.
        """
        config, strides = self.config, self.strides
        align = _lcm(list(strides.values()))
        window = padded_shape(config.shape, (1, 1, 1), align)
        check_slice(image.shape, window, _FLAT_WINDOW)
        shape = padded_shape(image.shape, window, align)
        plan = windows(shape, window, config.overlap, align)
        passes = WindowPasses(
            self.network, list(features), precision=config.precision, mirror=config.mirror,
            batch_size=self.batch_size, device=self.device,
        )  # fmt: skip

        def blend(stride: Index3) -> BlendedSlabs:
            cells, padded, one = (
                Patch((0, 0, 0), n).coarsen(stride).shape
                for n in (padded_shape(image.shape, (1, 1, 1), stride), shape, window)
            )
            return BlendedSlabs(cells, padded, one, config.sigma, self.device)

        def hand_out(row: int) -> None:
            for slab in blended.advance(row):
                logits(slab)
            for tap, sink in features.items():
                for slab in cells[tap].advance(row // strides[tap][0]):
                    sink(slab)

        blended, cells = blend((1, 1, 1)), {tap: blend(strides[tap]) for tap in features}
        for patch, out, taps in passes.run(plan, lambda patch: self._cut(image, patch)):
            if patch.start[0] > blended.begin:  # windows come with z slowest
                hand_out(patch.start[0])
            blended.put(patch, out)
            for tap, cell in cells.items():
                cell.put(patch.coarsen(strides[tap]), taps[tap])
        hand_out(shape[0])

    def _cut(self, image: npt.NDArray[Any], patch: Patch) -> Tensor:
        inside, missing = patch.clip(image.shape)
        part = image[inside] if self.scale is None else self.scale(image[inside])
        # A copy of its own, also where nothing is missing: the network may write into its input.
        padded = np.pad(
            part.astype(np.float32, copy=False), missing, constant_values=self.pad_value
        )
        return torch.from_numpy(padded)


class WholeArray:
    """A sink that keeps everything."""

    def __init__(self, rows: int) -> None:
        self._rows, self._end = rows, 0
        self._array: FloatArray | None = None

    def put(self, slab: FloatArray) -> None:
        """The next rows."""
        if self._array is None:
            self._array = np.empty((slab.shape[0], self._rows, *slab.shape[2:]), dtype=np.float32)
        self._array[:, self._end : self._end + slab.shape[1]] = slab
        self._end += slab.shape[1]

    @property
    def array(self) -> FloatArray:
        """All rows."""
        assert self._array is not None
        assert self._end == self._rows
        return self._array


def _lcm(strides: Sequence[Index3]) -> Index3:
    z, y, x = (int(np.lcm.reduce([s[axis] for s in strides] or [1])) for axis in range(3))
    return z, y, x
