"""A student over a whole volume: blended windows, handed out slab by slab; and over a CT of any
grid.

Windows, padding, weights and the order of sums are those of MONAI's `sliding_window_inference` with
Gaussian blending, whose results these are to the bit; so a student that is exported to MONAI is run
there as it is here. Unlike there, never more than one window's depth of the logits is held.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
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
from pipeline.networks.windows import BlendedSlabs
from pipeline.student.checkpoint import StudentRecord
from pipeline.student.network import Head

SIGMA = 0.125  # of the Gaussian, in window sizes: MONAI's default

# Hears how many windows were run, and how many there are.
TellWindows = Callable[[int, int], None]


def stream_logits(
    network: nn.Module,
    hu: npt.NDArray[Any],
    intensity: Intensity,
    patch: Index3,
    *,
    overlap: float = 0.5,
    window_batch: int = 1,
    device: torch.device,
    tell: TellWindows | None = None,
) -> Iterator[npt.NDArray[np.float32]]:
    """int16 HU (D, H, W) on the student grid -> slabs (K + 1, n, H, W) of logits, D rows in all.

    Sums are held on the CPU: K + 1 channels of the patch's depth, whatever D is. HU are scaled
    window by window.

    Args:
        network: in evaluation mode, on `device`.
        hu: the image.
        intensity: HU -> what the network sees; a volume smaller than the patch is padded with air,
            as much before as after.
        patch: of the windows, in voxels.
        overlap: fraction that neighbouring windows share.
        window_batch: windows per forward pass.
        device: where the network is.
        tell: hears after each pass how many windows are done, and of how many.

    Raises:
        GeometryError: the image is one slice, and patches are thicker.
    """
    check_slice(hu.shape, patch, "Use a student that was trained on patches of one slice.")
    padded = padded_shape(hu.shape, patch, (1, 1, 1))
    before = tuple((n - size) // 2 for n, size in zip(padded, hu.shape, strict=True))
    plan = windows(padded, patch, overlap)
    blended = BlendedSlabs(padded, padded, patch, SIGMA, None)

    def cropped(slabs: Iterator[npt.NDArray[np.float32]]) -> Iterator[npt.NDArray[np.float32]]:
        row = blended.begin
        for slab in slabs:
            low = max(0, before[0] - row)
            high = min(slab.shape[1], before[0] + hu.shape[0] - row)
            row += slab.shape[1]
            if low < high:
                y, x = (slice(before[a], before[a] + hu.shape[a]) for a in (1, 2))
                yield slab[:, low:high, y, x]

    for begin in range(0, len(plan), window_batch):
        batch = plan[begin : begin + window_batch]
        cut = torch.stack([_cut(hu, window, before, intensity) for window in batch])
        with torch.inference_mode():
            out = first_output(network(cut[:, None].to(device))).float().cpu()
        for window, logits in zip(batch, out, strict=True):
            if window.start[0] > blended.begin:  # windows come with z slowest
                yield from cropped(blended.advance(window.start[0]))
            blended.put(window, logits)
        if tell is not None:
            tell(begin + len(batch), len(plan))
    yield from cropped(blended.advance(padded[0]))


def predict_logits(
    network: nn.Module,
    hu: npt.NDArray[Any],
    intensity: Intensity,
    patch: Index3,
    *,
    overlap: float = 0.5,
    window_batch: int = 1,
    device: torch.device,
) -> npt.NDArray[np.float32]:
    """`stream_logits` put together: (K + 1, D, H, W)."""
    out: npt.NDArray[np.float32] | None = None
    row = 0
    for slab in stream_logits(
        network, hu, intensity, patch, overlap=overlap, window_batch=window_batch, device=device
    ):
        if out is None:
            out = np.empty((slab.shape[0], *hu.shape), dtype=np.float32)
        out[:, row : row + slab.shape[1]] = slab
        row += slab.shape[1]
    assert out is not None
    return out


def first_output(out: Any) -> Tensor:
    """Networks with deep supervision return several outputs; the first is the full-size one."""
    result: Tensor = out[0] if isinstance(out, (list, tuple)) else out
    return result


def running_argmax(channels: Iterator[npt.NDArray[np.float32]]) -> npt.NDArray[np.uint8]:
    """Argmax over channels that come one at a time; two volumes in memory, not C."""
    best = next(channels)
    classes = np.zeros(best.shape, dtype=np.uint8)
    for number, channel in enumerate(channels, start=1):
        better = channel > best
        classes[better] = number
        best = np.where(better, channel, best)
    return classes


def _cut(
    hu: npt.NDArray[Any], window: Patch, before: tuple[int, ...], intensity: Intensity
) -> Tensor:
    """A window of the padded image, in the network's units: float32 (d, h, w)."""
    z, y, x = (start - pad for start, pad in zip(window.start, before, strict=True))
    inside, missing = Patch((z, y, x), window.shape).clip(hu.shape)
    scaled = intensity.apply(hu[inside])
    return torch.from_numpy(np.pad(scaled, missing, constant_values=intensity.air))


# A student on a CT of any grid: student grid, windows, logits back onto the CT's own grid.
#
# Logits, not labels, are resampled, so that boundaries are those of the finer grid. Of the logits
# only the rows that are being worked on are in memory; the image, and what is made of the rows,
# are
# held whole.

FloatArray = npt.NDArray[np.float32]


def logit_rows(
    image: Volume,
    record: StudentRecord,
    network: nn.Module,
    *,
    overlap: float,
    window_batch: int = 1,
    device: torch.device,
    tell: TellWindows | None = None,
) -> Iterator[tuple[int, FloatArray]]:
    """int16 HU (D, H, W) on any grid -> logits on that grid, a few rows at a time, each row once.

    Args:
        image: the CT.
        record: of the student.
        network: in evaluation mode, on `device`; (N, 1, ..) -> (N, C, ..).
        overlap: fraction that neighbouring windows share.
        window_batch: windows per forward pass.
        device: where the network is.
        tell: hears of windows, see `stream_logits`.

    Yields:
        The number of a row along z, and logits (C, n, H, W) from there on.
    """
    grid = image.grid.with_spacing(record.spacing_mm)
    rows = SlabRows(grid, image.grid)
    for slab in stream_logits(
        network,
        resample(image, grid, order=1).array,
        record.intensity,
        record.patch,
        overlap=overlap,
        window_batch=window_batch,
        device=device,
        tell=tell,
    ):
        yield from rows.put(slab)
    rows.check_complete()


def segment(
    image: Volume,
    record: StudentRecord,
    network: nn.Module,
    *,
    take: Callable[[int, FloatArray], object] | None = None,
    **how: Any,
) -> npt.NDArray[np.uint8]:
    """int16 HU (D, H, W) on any grid -> classes 0 .. K on that grid, uint8.

    Args:
        image: the CT.
        record: of the student.
        network: its network.
        take: also gets the logits, as `logit_rows` yields them.
        how: the other arguments of `logit_rows`.
    """
    classes = np.empty(image.grid.shape, dtype=np.uint8)
    for begin, logits in logit_rows(image, record, network, **how):
        classes[begin : begin + logits.shape[1]] = running_argmax(iter(logits))
        if take is not None:
            take(begin, logits)
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
        networks: one or more.
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
