"""Sliding-window inference that hands out logits and tapped features slab by slab.

MONAI's `sliding_window_inference` is not used here for three reasons: it blends everything a
network returns, whereas features of a window-normalised network are window-dependent and must be
taken from the core of each window, its halo discarded; it accumulates in the network's dtype; and
it holds all channels of the whole volume, whereas here what no further window touches is handed on
and let go. The Gaussian weights are MONAI's own.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from pydantic import Field, field_validator
from torch import Tensor, nn

from pipeline.config import Config
from pipeline.patches import Index3, Patch, padded_shape, windows
from pipeline.slabs import BlendedSlabs, CoreSlabs
from pipeline.teachers.teacher import Sink
from pipeline.teachers.window_passes import Precision, WindowPasses

FloatArray = npt.NDArray[np.float32]


class WindowConfig(Config):
    """How a volume is cut into windows and put together again; all of it changes numbers.

    `precision` and `mirror` are left out of `model_dump` at their defaults, so that units made
    before these fields existed keep their digests.
    """

    shape: tuple[int, int, int] = Field(default=(96, 96, 96), description="voxels along z, y, x")
    overlap: float = Field(default=0.5, ge=0, lt=1, description="fraction shared by neighbours")
    sigma: float = Field(default=0.125, gt=0, description="Gaussian weight, in window sizes")
    precision: Precision = Field(
        default="float32",
        description="of the network's arithmetic, on a GPU only; blending is float32 always",
        exclude_if=lambda value: value == "float32",
    )
    mirror: tuple[Literal["z", "y", "x"], ...] = Field(
        default=(),
        description="axes: logits are averaged over the window and its mirror images",
        exclude_if=lambda value: value == (),
    )

    @field_validator("mirror")
    @classmethod
    def _in_order(cls, axes: tuple[str, ...]) -> tuple[str, ...]:
        """Each axis once, in one order, so that what means the same has one digest."""
        return tuple(axis for axis in "zyx" if axis in axes)


def sliding_window(
    network: nn.Module,
    image: npt.NDArray[Any],
    config: WindowConfig,
    *,
    taps: Sequence[str] = (),
    strides: Sequence[Index3] = (),
    pad_value: float = 0.0,
    batch_size: int = 1,
    device: torch.device | None = None,
    scale: Callable[[npt.NDArray[Any]], FloatArray] | None = None,
) -> tuple[FloatArray, dict[str, FloatArray]]:
    """Runs a network over a volume and returns all of it; see `stream_windows`.

    Args:
        network: in evaluation mode.
        image: (D, H, W) in the network's units.
        config: window shape and overlap.
        taps: layers whose features are wanted.
        strides: voxels per feature cell, one (z, y, x) per tap.
        pad_value: fills what a volume lacks to a window or to a whole number of cells.
        batch_size: windows per forward pass; changes speed and memory only.
        device: where the network is.
        scale: as for `stream_windows`.

    Returns:
        Logits (C, D, H, W) and per tap (F, ceil(D / s), ceil(H / s), ceil(W / s)), float32.

    Raises:
        ConfigError: mixed precision without a GPU.
    """
    whole = _Whole(image.shape[0])
    cells = {
        tap: _Whole(-(-image.shape[0] // stride[0]))
        for tap, stride in zip(taps, strides, strict=True)
    }
    stream_windows(
        network, image, config, logits=whole.put,
        features={tap: sink.put for tap, sink in cells.items()},
        strides=dict(zip(taps, strides, strict=True)),
        pad_value=pad_value, batch_size=batch_size, device=device, scale=scale,
    )  # fmt: skip
    return whole.array, {tap: sink.array for tap, sink in cells.items()}


def stream_windows(
    network: nn.Module,
    image: npt.NDArray[Any],
    config: WindowConfig,
    *,
    logits: Sink,
    features: Mapping[str, Sink],
    strides: Mapping[str, Index3],
    pad_value: float = 0.0,
    batch_size: int = 1,
    device: torch.device | None = None,
    scale: Callable[[npt.NDArray[Any]], FloatArray] | None = None,
) -> None:
    """Runs a network over a volume; what is finished is handed out slab by slab, in order.

    Logits are blended with Gaussian weights: sum(w * logits) / sum(w), accumulated in float32.
    A feature cell is taken from the window in whose middle it lies deepest. No more than one
    window's depth of the volume is held, on the network's device. On the CPU the results are the
    same to the bit for every `batch_size`.

    Args:
        network: in evaluation mode.
        image: (D, H, W), any real dtype.
        config: window shape and overlap.
        logits: takes slabs (C, n, H, W), D rows in all.
        features: tap -> takes slabs (F, n, h, w), ceil(D / s) rows in all.
        strides: tap -> voxels per feature cell along z, y, x.
        pad_value: in the network's units; fills what a volume lacks to a window or to a whole
            number of cells.
        batch_size: windows per forward pass, at most; fewer where memory is short.
        device: where the network is.
        scale: voxel by voxel, image -> the network's units; applied window by window, so that no
            float32 copy of the image is made. None: the image is in the network's units.

    Raises:
        ConfigError: mixed precision without a GPU.
        MemoryError, RuntimeError: out of memory with one window at a time.
    """
    align = _lcm(list(strides.values()))
    window = padded_shape(config.shape, (1, 1, 1), align)
    shape = padded_shape(image.shape, window, align)
    plan = windows(shape, window, config.overlap, align)
    passes = WindowPasses(
        network, list(features), precision=config.precision, mirror=config.mirror,
        batch_size=batch_size, device=device,
    )  # fmt: skip

    def load(patch: Patch) -> Tensor:
        return torch.from_numpy(_cut(image, patch, pad_value, scale))

    blended = BlendedSlabs(image.shape, shape, window, config.sigma, device)
    cores = {tap: CoreSlabs(image.shape, shape, window, strides[tap]) for tap in features}
    for patch, out, tapped in passes.run(plan, load):
        if patch.start[0] > blended.begin:  # windows come with z slowest
            for slab in blended.advance(patch.start[0]):
                logits(slab)
            for tap, sink in features.items():
                sink(cores[tap].advance(patch.start[0]))
        blended.put(patch, out)
        for tap, core in cores.items():
            core.put(patch, tapped[tap])
    for slab in blended.advance(shape[0]):
        logits(slab)
    for tap, sink in features.items():
        sink(cores[tap].advance(shape[0]))


class _Whole:
    """A sink that keeps everything."""

    def __init__(self, rows: int) -> None:
        self._rows, self._end = rows, 0
        self._array: FloatArray | None = None

    def put(self, slab: FloatArray) -> None:
        if self._array is None:
            self._array = np.empty((slab.shape[0], self._rows, *slab.shape[2:]), dtype=np.float32)
        self._array[:, self._end : self._end + slab.shape[1]] = slab
        self._end += slab.shape[1]

    @property
    def array(self) -> FloatArray:
        assert self._array is not None
        assert self._end == self._rows
        return self._array


def _cut(
    image: npt.NDArray[Any],
    patch: Patch,
    pad_value: float,
    scale: Callable[[npt.NDArray[Any]], FloatArray] | None,
) -> FloatArray:
    inside, missing = patch.clip(image.shape)
    part = image[inside] if scale is None else scale(image[inside])
    # A copy of its own, also where nothing is missing: the network may write into its input.
    return np.pad(part.astype(np.float32, copy=False), missing, constant_values=pad_value)


def _lcm(strides: Sequence[Index3]) -> Index3:
    z, y, x = (int(np.lcm.reduce([s[axis] for s in strides] or [1])) for axis in range(3))
    return z, y, x
