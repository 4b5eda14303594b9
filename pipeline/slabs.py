"""Windows put together slab by slab: blended logits, and the cores of features.

Windows come with z slowest. Once one begins at row z, no later one touches the rows before z: they
are handed out, and only one window's depth of the volume is held.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import numpy.typing as npt
import torch
from monai.data.utils import compute_importance_map
from torch import Tensor

from pipeline.patches import Index3, Patch

_VALUES_AT_ONCE = 4_000_000


class BlendedSlabs:
    """sum(w * logits) / sum(w) with Gaussian weights w, accumulated in float32 in the order in
    which windows come.

    Args:
        image_shape: (D, H, W) of what is handed out.
        padded: (D, H, W) that windows cover.
        window: their shape.
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
        weight = compute_importance_map(window, mode="gaussian", sigma_scale=sigma)
        weight = weight.to(torch.float32).clamp(min=1e-3 * float(weight.max()))
        self._weight: Tensor = weight.to(device)
        self._norm = torch.zeros(self._held, device=device)
        self._sum: Tensor | None = None

    def put(self, patch: Patch, logits: Tensor) -> None:
        """Adds a window that begins at row `begin`: float32 (C, d, h, w)."""
        assert patch.start[0] == self.begin
        if self._sum is None:
            self._sum = torch.zeros((logits.shape[0], *self._held), device=self._norm.device)
        _, y, x = patch.slices
        for channel, values in zip(self._sum, logits, strict=True):
            channel[:, y, x] += self._weight * values
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


class CoreSlabs:
    """Features: each cell from the window whose border is farthest from it.

    Args:
        image_shape: (D, H, W) in voxels.
        padded: (D, H, W) in voxels that windows cover.
        window: their shape in voxels.
        stride: voxels per cell.
    """

    def __init__(
        self, image_shape: Sequence[int], padded: Index3, window: Index3, stride: Index3
    ) -> None:
        self._stride = stride
        self._begin = 0
        self._cells = [-(-n // s) for n, s in zip(image_shape, stride, strict=True)]
        held = [n // s for n, s in zip((window[0], *padded[1:]), stride, strict=True)]
        self._depth = torch.full(held, -1.0)
        self._values: Tensor | None = None
        per_axis = []
        for n, s in zip(window, stride, strict=True):
            cell = torch.arange(n // s, dtype=torch.float32) + 0.5
            per_axis.append(torch.minimum(cell, n // s - cell) / (n // s))
        z, y, x = per_axis
        self._inside = z[:, None, None] * y[None, :, None] * x[None, None, :]

    def put(self, patch: Patch, values: Tensor) -> None:
        """Takes what lies deeper in this window than in those before it: (F, d, h, w)."""
        values = values.float()
        if self._values is None:
            self._depth, self._inside = self._depth.to(values), self._inside.to(values)
            self._values = values.new_zeros((values.shape[0], *self._depth.shape))
        _, y, x = patch.coarsen(self._stride).slices
        depth = self._depth[:, y, x]
        deeper = self._inside > depth
        self._depth[:, y, x] = torch.where(deeper, self._inside, depth)
        for held, new in zip(self._values, values, strict=True):
            held[:, y, x] = torch.where(deeper, new, held[:, y, x])

    def advance(self, row: int) -> npt.NDArray[np.float32]:
        """The cells before voxel row `row` that are not handed out yet, (F, n, h, w)."""
        assert self._values is not None
        begin, end = self._begin, row // self._stride[0]
        depth, height, width = self._cells
        wanted = max(0, min(end, depth) - begin)
        kept = self._values[:, :wanted, :height, :width]
        slab: npt.NDArray[np.float32] = kept.cpu().numpy().copy()  # its own, since rows move on
        _shift(self._values, end - begin)
        _shift(self._depth[None], end - begin)
        self._depth[self._depth.shape[0] - (end - begin) :] = -1.0
        self._begin = end
        return slab


def _shift(held: Tensor, rows: int) -> None:
    """Rows move to the front of axis 1, channel by channel; zeros come in behind."""
    kept = held.shape[1] - rows
    for channel in held:
        channel[:kept] = channel[rows:].clone()
        channel[kept:] = 0
