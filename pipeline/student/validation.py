"""Dice on labelled validation cases while training."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np
import torch
from torch import nn

from pipeline.cache.reader import CachedCase
from pipeline.intensity import Intensity
from pipeline.labels import IGNORE, LabelSpace
from pipeline.student.inference import predict_logits


class Settings(Protocol):
    """What of a training's configuration matters here."""

    @property
    def intensity(self) -> Intensity:
        """HU -> network units."""

    @property
    def patch(self) -> tuple[int, int, int]:
        """Window."""


def validate(
    network: nn.Module,
    cases: Sequence[CachedCase],
    space: LabelSpace,
    settings: Settings,
    device: torch.device,
) -> dict[str, float | None]:
    """Mean Dice per organ over the cases whose label shows it; None where none does.

    Each case is judged on the organs that it annotates; ignored voxels do not count.
    """
    network.eval()
    scores: dict[str, list[float]] = {organ: [] for organ in space.organs}
    for case in cases:
        logits = predict_logits(
            network, case.image(), settings.intensity, settings.patch, overlap=0.25, device=device
        )
        predicted = logits.argmax(axis=0)
        reference = space.to_classes(case.label())
        predicted[reference == IGNORE] = 0
        for organ in case.annotated:
            if organ not in scores:
                continue
            number = space.index(organ) + 1
            theirs, ours = reference == number, predicted == number
            if theirs.any():
                both = 2.0 * np.count_nonzero(theirs & ours)
                scores[organ].append(both / (np.count_nonzero(theirs) + np.count_nonzero(ours)))
    return {o: round(float(np.mean(found)), 4) if found else None for o, found in scores.items()}
