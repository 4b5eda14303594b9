"""Teachers in the training loop: what a student would learn if nothing were cached.

The same student, patches and terms; but the log-odds of a batch come from the teachers' networks,
which see the very patch that the student sees, after the augmentation of its intensity. Without
features. Teachers work on the student's grid here, so nothing is resampled.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn

from pipeline.data.registry import Registry
from pipeline.networks.by_name import build_network
from pipeline.student import training
from pipeline.student.dataset import to_batch
from pipeline.student.supervision import Batch
from pipeline.teachers.checkpoint import read_teacher


@contextmanager
def teachers_in_the_loop(registry: Registry) -> Iterator[None]:
    """While it is open, trainings of this process ask the teachers instead of the cache.

    Margin 0, labels win with 6 log-odds, every teacher is believed.
    """
    networks = [_network(registry, teacher) for teacher in registry.teachers]
    organs = list(registry.organs)
    order = [organs.index(o) for entry in registry.teachers.values() for o in entry.organs]

    def asked(*arguments: Any) -> Batch:
        batch = to_batch(*arguments)
        with torch.inference_mode():
            logits = [network(batch.image).float() for network in networks]
        said = torch.empty_like(batch.image.expand(-1, len(organs), -1, -1, -1)).contiguous()
        for k, s in zip(order, logits, strict=True):
            said[:, k] = s[:, 1] - s[:, 0]
        # Outside of the case nobody sees anything, as in the cache.
        assert batch.log_odds is not None
        outside = torch.isnan(batch.log_odds).all(dim=1, keepdim=True)
        d = _labels_win(said.clone().masked_fill(outside, torch.nan), batch)
        return replace(batch, log_odds=d)

    with patch.object(training, "to_batch", asked):
        yield


def _network(registry: Registry, teacher: str) -> nn.Module:
    entry = registry.teachers[teacher]
    record, state = read_teacher(registry.resolve(str(entry.weights)))
    network: nn.Module = build_network(record.network, in_channels=1, out_channels=2)
    network.load_state_dict(state)
    return network.eval()


def _labels_win(d: Tensor, batch: Batch, confidence: float = 6.0) -> Tensor:
    """As `consensus.labels_win`, on tensors."""
    numbers = torch.arange(1, d.shape[1] + 1)[None, :, None, None, None]
    classes = batch.classes[:, None]
    known, sure = classes != 255, torch.nan_to_num(d.abs(), nan=0.0).clamp(min=confidence)
    not_k = (classes != numbers) & known & batch.annotated[:, :, None, None, None]
    other = (classes != numbers) & (classes > 0) & known
    d = torch.where(not_k | other, -sure, d)
    return torch.where(classes == numbers, sure, d)
