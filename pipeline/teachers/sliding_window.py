"""Sliding-window inference that returns logits and tapped features from one forward pass.

MONAI's `sliding_window_inference` is not used here for two reasons: it blends everything a network
returns, whereas features of a window-normalised network are window-dependent and must be taken
from the core of each window, its halo discarded; and it accumulates in the network's dtype. The
Gaussian weights are MONAI's own.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
from monai.data.utils import compute_importance_map
from pydantic import Field
from torch import Tensor, nn

from pipeline.config import Config
from pipeline.network import tapped
from pipeline.patches import Index3, Patch, padded_shape, windows


class WindowConfig(Config):
    """How a volume is cut into windows and put together again; all of it changes numbers."""

    shape: tuple[int, int, int] = Field(default=(96, 96, 96), description="voxels along z, y, x")
    overlap: float = Field(default=0.5, ge=0, lt=1, description="fraction shared by neighbours")
    sigma: float = Field(default=0.125, gt=0, description="Gaussian weight, in window sizes")


def sliding_window(
    network: nn.Module,
    image: npt.NDArray[np.float32],
    config: WindowConfig,
    *,
    taps: Sequence[str] = (),
    strides: Sequence[Index3] = (),
    pad_value: float = 0.0,
    batch_size: int = 1,
    device: torch.device | None = None,
) -> tuple[npt.NDArray[np.float32], dict[str, npt.NDArray[np.float32]]]:
    """Runs a network over a volume.

    Logits are blended with Gaussian weights: sum(w * logits) / sum(w), accumulated in float32.
    A feature cell is taken from the window in whose middle it lies deepest.

    Args:
        network: in evaluation mode.
        image: (D, H, W) in the network's units.
        config: window shape and overlap.
        taps: layers whose features are wanted.
        strides: voxels per feature cell, one (z, y, x) per tap.
        pad_value: fills what a volume lacks to a window or to a whole number of cells.
        batch_size: windows per forward pass; changes speed and memory only.
        device: where the network is.

    Returns:
        Logits (C, D, H, W) and per tap (F, ceil(D / s), ceil(H / s), ceil(W / s)), float32.
    """
    align: Index3 = _lcm(strides)
    window = padded_shape(config.shape, (1, 1, 1), align)
    shape = padded_shape(image.shape, window, align)
    padding = [(0, n - m) for n, m in zip(shape, image.shape, strict=True)]
    padded = torch.from_numpy(np.pad(image, padding, constant_values=pad_value))
    plan = windows(shape, window, config.overlap, align)
    weight = compute_importance_map(window, mode="gaussian", sigma_scale=config.sigma)
    weight = weight.to(torch.float32).clamp(min=1e-3 * float(weight.max()))
    total = torch.zeros(shape)
    logits: Tensor | None = None
    cores = [_Cores(shape, window, stride) for stride in strides]
    with torch.inference_mode(), tapped(network, taps) as features:
        for begin in range(0, len(plan), batch_size):
            batch = plan[begin : begin + batch_size]
            stacked = torch.stack([padded[p.slices] for p in batch]).unsqueeze(1)
            out = _forward(network, stacked.to(device)).float().cpu()
            if logits is None:
                logits = torch.zeros((out.shape[1], *shape))
            for number, patch in enumerate(batch):
                logits[(slice(None), *patch.slices)] += weight * out[number]
                total[patch.slices] += weight
                for tap, core in zip(taps, cores, strict=True):
                    core.put(patch, features[tap][number].float().cpu())
        assert logits is not None
        logits /= total
    d, h, w = image.shape
    return logits[:, :d, :h, :w].numpy(), {
        tap: core.take(image.shape) for tap, core in zip(taps, cores, strict=True)
    }


def _forward(network: nn.Module, batch: Tensor) -> Tensor:
    """Networks with deep supervision return several outputs; the first is the full-size one."""
    out = network(batch)
    if isinstance(out, (list, tuple)):
        out = out[0]
    result: Tensor = out
    return result


class _Cores:
    """Assembles features: each cell from the window whose border is farthest from it."""

    def __init__(self, shape: Index3, window: Index3, stride: Index3) -> None:
        self._stride = stride
        cells = [n // s for n, s in zip(shape, stride, strict=True)]
        self._depth = torch.full(cells, -1.0)
        self._values: Tensor | None = None
        per_axis = []
        for n, s in zip(window, stride, strict=True):
            cell = torch.arange(n // s, dtype=torch.float32) + 0.5
            per_axis.append(torch.minimum(cell, n // s - cell) / (n // s))
        z, y, x = per_axis
        self._inside = z[:, None, None] * y[None, :, None] * x[None, None, :]

    def put(self, patch: Patch, values: Tensor) -> None:
        if self._values is None:
            self._values = torch.zeros((values.shape[0], *self._depth.shape))
        cells = patch.coarsen(self._stride).slices
        deeper = self._inside > self._depth[cells]
        self._depth[cells] = torch.where(deeper, self._inside, self._depth[cells])
        view = self._values[(slice(None), *cells)]
        self._values[(slice(None), *cells)] = torch.where(deeper, values, view)

    def take(self, image_shape: Sequence[int]) -> npt.NDArray[np.float32]:
        assert self._values is not None
        d, h, w = (-(-n // s) for n, s in zip(image_shape, self._stride, strict=True))
        return self._values[:, :d, :h, :w].numpy()


def _lcm(strides: Sequence[Index3]) -> Index3:
    z, y, x = (int(np.lcm.reduce([s[axis] for s in strides] or [1])) for axis in range(3))
    return z, y, x
