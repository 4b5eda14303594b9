"""Factories that a registry may name in tests, and a trap."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.data.volume import Volume
from pipeline.errors import ConfigError
from pipeline.teachers.teacher import Prediction

NOT_CALLABLE = 3


class Threshold:
    """Two channels: soft tissue above a threshold is organ; features are blocks of 2 voxels."""

    def __init__(self, taps: Sequence[str], hu: float, box: Sequence[int] | None) -> None:
        self.taps, self.hu, self.box = list(taps), hu, box

    def predict(self, image: Volume) -> Prediction:
        """Looks at a box of the image only, from voxel 0 on, where `box` is given."""
        if self.box is not None:
            d, h, w = self.box
            grid = image.grid.crop((0, 0, 0), self.box)
            image = Volume(image.array[:d, :h, :w], grid)
        odds = (image.array.astype(np.float64) - self.hu) / 100
        logits = Volume(np.stack([np.zeros_like(odds), odds]), image.grid)
        cells = Volume(odds[None, ::2, ::2, ::2], image.grid.coarsen((2, 2, 2)))
        return Prediction(logits, dict.fromkeys(self.taps, cells))

    def describe(self) -> Mapping[str, Any]:
        """What changes numbers."""
        return {"hu": self.hu, "box": self.box}


def threshold(
    weights: Path,
    *,
    taps: Sequence[str],
    device: str,
    hu: float = 0.0,
    box: Sequence[int] | None = None,
) -> Threshold:
    """A teacher without weights; the file must be there all the same."""
    assert weights.is_file()
    assert device == "cpu"
    return Threshold(taps, hu, box)


class Sure(Threshold):
    """Gives probabilities, or the most probable channel alone, or what may be anything."""

    def __init__(self, how: str) -> None:
        super().__init__([], 0, None)
        self.how = how

    def predict(self, image: Volume) -> Prediction:
        """See `how`."""
        logits = super().predict(image).logits
        odds = logits.array[1]
        p = 1 / (1 + np.exp(-odds)) if self.how == "softmax" else (odds > 0).astype(np.float64)
        both = np.stack([1 - p, p])
        if self.how == "undecided":
            both = 0.2 + 0.3 * np.stack([p, p])
        return Prediction(Volume(both, logits.grid))


def sure(weights: Path, *, taps: Sequence[str], device: str, how: str = "softmax") -> Sure:
    """A teacher whose outputs are no logits."""
    return Sure(how)


class Poor(Threshold):
    """Misbehaves as told, on every case or on one with a voxel of that value, until it is mended:
    until a file is there."""

    def __init__(self, how: str, marked_by: int | None, hu: float, mended: str) -> None:
        super().__init__([], hu, None)
        self.how, self.marked_by, self.mended = how, marked_by, mended

    def predict(self, image: Volume) -> Prediction:
        """See `how`."""
        good = super().predict(image)
        if self.marked_by is not None and not np.any(image.array == self.marked_by):
            return good
        if self.mended and Path(self.mended).exists():
            return good
        match self.how:
            case "nan":
                good.logits.array[0, 0, 0, 0] = np.nan
            case "infinite":
                good.logits.array[1, 0, 0, 0] = np.inf
            case "raise":
                raise RuntimeError("out of memory")
            case "pipeline error":
                raise ConfigError("my own words")
            case "array":
                return good.logits.array  # type: ignore[return-value]
            case "no channels":
                return Prediction(Volume(good.logits.array[0], good.logits.grid))
        return good


def poor(
    weights: Path,
    *,
    taps: Sequence[str],
    device: str,
    how: str,
    marked_by: int | None = None,
    hu: float = 0.0,
    mended: str = "",
) -> Poor:
    """A teacher that is wrong on purpose."""
    return Poor(how, marked_by, hu, mended)


def failing(weights: Path, *, taps: Sequence[str], device: str) -> Threshold:
    """Cannot even be made."""
    raise OSError("licence server does not answer")


class Payload:
    """Runs code when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.marker,)
