"""A student on a CT of any grid: student grid, windows, logits back onto the CT's own grid.

Logits, not labels, are resampled, so that boundaries are those of the finer grid. Of the logits
only the rows that are being worked on are in memory; the image, and what is made of the rows, are
held whole.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from scipy.special import expit, softmax
from torch import nn

from pipeline.data.resample import SlabRows, resample
from pipeline.student.checkpoint import StudentRecord
from pipeline.student.inference import TellWindows, running_argmax, stream_logits
from pipeline.student.network import Head
from pipeline.volume import Volume

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
