"""A student over a whole volume: blended windows, handed out slab by slab; and over a CT of any
grid.

Windows, padding, weights and the order of sums are those of MONAI's `sliding_window_inference` with
Gaussian blending, whose results these are to the bit; so a student that is exported to MONAI is run
there as it is here. Unlike there, never more than one window's depth of the logits is held.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from scipy.special import expit, softmax
from torch import Tensor, nn

from pipeline.data.labels import Intensity
from pipeline.data.patches import Index3, Patch, check_slice, padded_shape, windows
from pipeline.data.resample import SlabRows, resample
from pipeline.data.volume import Volume
from pipeline.networks.windows import BlendedSlabs, FloatArray, WholeArray, first_output
from pipeline.student.network import Head

SIGMA = 0.125  # of the Gaussian, in window sizes: MONAI's default
CPU = torch.device("cpu")

# Hears how many windows were run, and how many there are.
TellWindows = Callable[[int, int], None]


@dataclass(frozen=True)
class StudentWindows:
    """A student's network, and how it is run over volumes.

    Sums are held on the CPU: K + 1 channels of the patch's depth, whatever D is. HU are scaled
    window by window.

    Attributes:
        network: in evaluation mode, on `device`; (N, 1, ..) -> (N, K + 1, ..).
        intensity: HU -> what the network sees; a volume smaller than the patch is padded with air,
            as much before as after.
        overlap: fraction that neighbouring windows share.
        window_batch: windows per forward pass.
    """

    network: nn.Module
    intensity: Intensity
    patch: Index3
    device: torch.device = CPU
    overlap: float = 0.5
    window_batch: int = 1

    def logits(self, hu: npt.NDArray[Any]) -> FloatArray:
        """`slabs` put together: (K + 1, D, H, W)."""
        whole = WholeArray(hu.shape[0])
        for slab in self.slabs(hu):
            whole.put(slab)
        return whole.array

    def slabs(self, hu: npt.NDArray[Any], tell: TellWindows | None = None) -> Iterator[FloatArray]:
        """int16 HU (D, H, W) on the student grid -> slabs (K + 1, n, H, W), D rows in all.

        Raises:
            GeometryError: the image is one slice, and patches are thicker.
        """
        check_slice(hu.shape, self.patch, "Use a student that was trained on patches of one slice.")
        padded = padded_shape(hu.shape, self.patch, (1, 1, 1))
        before = tuple((n - size) // 2 for n, size in zip(padded, hu.shape, strict=True))
        plan = windows(padded, self.patch, self.overlap)
        blended = BlendedSlabs(padded, padded, self.patch, SIGMA, None)

        def cropped(slabs: Iterator[FloatArray]) -> Iterator[FloatArray]:
            row = blended.begin
            for slab in slabs:
                low = max(0, before[0] - row)
                high = min(slab.shape[1], before[0] + hu.shape[0] - row)
                row += slab.shape[1]
                if low < high:
                    y, x = (slice(before[a], before[a] + hu.shape[a]) for a in (1, 2))
                    yield slab[:, low:high, y, x]

        for begin in range(0, len(plan), self.window_batch):
            batch = plan[begin : begin + self.window_batch]
            cut = torch.stack([self._cut(hu, window, before) for window in batch])
            with torch.inference_mode():
                out = first_output(self.network(cut[:, None].to(self.device))).float().cpu()
            for window, logits in zip(batch, out, strict=True):
                if window.start[0] > blended.begin:  # windows come with z slowest
                    yield from cropped(blended.advance(window.start[0]))
                blended.put(window, logits)
            if tell is not None:
                tell(begin + len(batch), len(plan))
        yield from cropped(blended.advance(padded[0]))

    def rows(
        self, image: Volume, spacing_mm: Sequence[float], tell: TellWindows | None = None
    ) -> Iterator[tuple[slice, FloatArray]]:
        """int16 HU (D, H, W) on any grid -> logits (K + 1, n, H, W) on that grid, a few rows at a
        time, with where they are along z; each row once.

        Logits, not labels, are resampled, so that boundaries are those of the finer grid.

        Args:
            spacing_mm: of the student grid.
        """
        grid = image.grid.with_spacing(spacing_mm)
        rows = SlabRows(grid, image.grid)
        for slab in self.slabs(resample(image, grid, order=1).array, tell):
            for begin, logits in rows.put(slab):
                yield slice(begin, begin + logits.shape[1]), logits
        rows.check_complete()

    def _cut(self, hu: npt.NDArray[Any], window: Patch, before: tuple[int, ...]) -> Tensor:
        """A window of the padded image, in the network's units: float32 (d, h, w)."""
        z, y, x = (start - pad for start, pad in zip(window.start, before, strict=True))
        inside, missing = Patch((z, y, x), window.shape).clip(hu.shape)
        scaled = self.intensity.apply(hu[inside])
        return torch.from_numpy(np.pad(scaled, missing, constant_values=self.intensity.air))


def running_argmax(channels: Iterator[FloatArray]) -> npt.NDArray[np.uint8]:
    """Argmax over channels that come one at a time; two volumes in memory, not C."""
    best = next(channels)
    classes = np.zeros(best.shape, dtype=np.uint8)
    for number, channel in enumerate(channels, start=1):
        better = channel > best
        classes[better] = number
        best = np.where(better, channel, best)
    return classes


def organ_probabilities(logits: FloatArray, head: Head) -> FloatArray:
    """(K + 1, ...) logits -> (K, ...) probabilities of the organs, float32.

    softmax: exp(l_k) / sum of exp(l_c) over background and organs; sigmoid: 1 / (1 + exp(-l_k)),
    each organ against all else, so that they need not add up to 1.
    """
    if head == "sigmoid":
        return np.asarray(expit(logits[1:]), dtype=np.float32)
    return np.asarray(softmax(logits, axis=0)[1:], dtype=np.float32)


class MeanLogits(nn.Module):
    """(N, 1, ..) -> (N, C, ..): the mean of the logits of several networks, each on the window and
    all its mirror images; before the windows are blended, so that no more of a volume is held.

    Logits are averaged, not probabilities, as nnU-Net does with mirror images (Isensee et al. 2021,
    Nature Methods 18): the softmax of the mean is the normalised geometric mean of the softmaxes.

    Args:
        axes: 0 z, 1 y, 2 x; mirror images along all combinations of them.
    """

    def __init__(self, networks: Sequence[nn.Module], axes: Sequence[int]) -> None:
        super().__init__()
        self._networks = nn.ModuleList(networks)
        dims = [axis - 3 for axis in axes]
        self._flips = [f for n in range(len(dims) + 1) for f in combinations(dims, n)]

    def forward(self, window: Tensor) -> Tensor:
        """See the class."""
        total: Tensor | None = None
        for network in self._networks:
            for flip in self._flips:
                out = first_output(network(window.flip(flip) if flip else window)).float()
                out = out.flip(flip) if flip else out
                total = out if total is None else total + out
        assert total is not None
        return total / (len(self._networks) * len(self._flips))
