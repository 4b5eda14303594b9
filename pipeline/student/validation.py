"""Dice on labelled validation cases while training."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

import numpy as np
import torch
from torch import nn

from pipeline.cache.reader import CachedCase
from pipeline.intensity import Intensity
from pipeline.labels import IGNORE, LabelSpace
from pipeline.student.inference import predict_logits
from pipeline.student.processes import ALONE, Processes


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
    processes: Processes = ALONE,
) -> dict[str, float | None]:
    """Mean Dice per organ over the cases whose label shows it; None where none does.

    Each case is judged on the organs that it annotates; ignored voxels do not count. Processes
    share the cases; the means are those of one process, to the bit.
    """
    network.eval()
    mine = cases[processes.rank :: processes.size]
    shares = processes.gathered(
        lambda: [_scores(network, case, space, settings, device) for case in mine]
    )
    scores: dict[str, list[float]] = {organ: [] for organ in space.organs}
    for number in range(len(cases)):
        rank, of_rank = number % processes.size, number // processes.size
        for organ, score in shares[rank][of_rank].items():
            scores[organ].append(score)
    return {o: round(float(np.mean(found)), 4) if found else None for o, found in scores.items()}


def mean_dice(scores: Mapping[str, float | None]) -> float | None:
    """Over the organs that have a score; None if none has."""
    found = [score for score in scores.values() if score is not None]
    return sum(found) / len(found) if found else None


def _scores(
    network: nn.Module,
    case: CachedCase,
    space: LabelSpace,
    settings: Settings,
    device: torch.device,
) -> dict[str, float]:
    """Dice of one case per organ that its label shows."""
    logits = predict_logits(
        network, case.image(), settings.intensity, settings.patch, overlap=0.25, device=device
    )
    predicted = logits.argmax(axis=0)
    reference = space.to_classes(case.label())
    predicted[reference == IGNORE] = 0
    scores = {}
    for organ in case.annotated:
        if organ not in space.organs:
            continue
        number = space.index(organ) + 1
        theirs, ours = reference == number, predicted == number
        if theirs.any():
            both = 2.0 * np.count_nonzero(theirs & ours)
            scores[organ] = float(both / (np.count_nonzero(theirs) + np.count_nonzero(ours)))
    return scores
