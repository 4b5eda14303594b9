"""A student over a whole volume."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from monai.inferers.utils import sliding_window_inference
from torch import Tensor, nn

from pipeline.intensity import Intensity
from pipeline.patches import Index3


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
    """int16 HU (D, H, W) on the student grid -> logits (K + 1, D, H, W), Gaussian-blended windows.

    The result is accumulated on the CPU, so that a case larger than the GPU's memory is no problem.
    """
    image = torch.from_numpy(intensity.apply(hu))[None, None]
    with torch.inference_mode():
        out = sliding_window_inference(
            image,
            patch,
            window_batch,
            lambda batch: first_output(network(batch)).float(),
            overlap=overlap,
            mode="gaussian",
            padding_mode="constant",
            cval=intensity.air,
            sw_device=device,
            device=torch.device("cpu"),
        )
    assert isinstance(out, Tensor)
    return out[0].numpy()


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
