"""Batches of eight voxels, and a network that says what it is told to."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pipeline.data.labels import IGNORE
from pipeline.student import training
from pipeline.student.network import CachedTap, StudentNetwork, TapKey
from pipeline.student.settings import Kind, SupervisionConfig
from pipeline.student.supervision import Batch, batch_loss

SHAPE = (2, 2, 2)
K = 2
NAN = math.nan


class Fixed(StudentNetwork):
    """A network whose logits and feature are given, and may be asked for gradients.

    One layer, `x`, of 2 x 2 x 2 voxels a cell; its feature is compared as it is.
    """

    def __init__(self, logits: Tensor, feature: Tensor | None = None) -> None:
        nn.Module.__init__(self)
        self.logits = nn.Parameter(logits)
        self.feature = feature
        organs_of = {("one", "a"): (0,), ("two", "a"): (1,), ("both", "b"): (0, 1)}
        self.cached = {key: CachedTap(2, (2, 2, 2), organs) for key, organs in organs_of.items()}
        self.calls = 0

    def forward(self, image: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        self.calls += 1
        return self.logits, {} if self.feature is None else {"x": self.feature}

    def adapt(self, key: TapKey, features: Mapping[str, Tensor]) -> Tensor:
        return features["x"]


def grid(*values: float, dtype: torch.dtype = torch.float64) -> Tensor:
    """Eight values, voxel by voxel: (1, 2, 2, 2)."""
    return torch.tensor(values, dtype=dtype).reshape(1, *SHAPE)


def make_batch(**changes: Any) -> Batch:
    """One case that annotates organ 0 alone; both teachers have spoken.

    voxel        0     1     2     3     4     5     6     7
    label        1     1     0     0     0  ignored  0     0
    d_0          7     6    -6    -6    -6    2     -6    -6
    d_1         -7    -6     3     1    -2  unseen  -9   unseen
    """
    log_odds = torch.stack(
        [grid(7, 6, -6, -6, -6, 2, -6, -6), grid(-7, -6, 3, 1, -2, NAN, -9, NAN)], dim=1
    )
    values: dict[str, Any] = {
        "image": torch.zeros(1, 1, *SHAPE),
        "classes": grid(1, 1, 0, 0, 0, IGNORE, 0, 0, dtype=torch.int64),
        "annotated": torch.tensor([[True, False]]),
        "known": torch.tensor([[True, True]]),
        "log_odds": log_odds,
    }
    return Batch(**(values | changes))


def some_logits(seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn((1, K + 1, *SHAPE), generator=generator, dtype=torch.float64)


def config(kind: Kind = "ms_kd", **changes: Any) -> SupervisionConfig:
    return SupervisionConfig.model_validate({"kind": kind, **changes})


def terms_of(
    settings: SupervisionConfig,
    batch: Batch | None = None,
    logits: Tensor | None = None,
    *,
    fraction: float = 0.0,
    feature: Tensor | None = None,
) -> Mapping[str, float]:
    network = Fixed(some_logits() if logits is None else logits, feature)
    loss, terms = batch_loss(settings, network, batch or make_batch(), fraction)
    assert network.calls == 1
    assert float(loss.detach()) == pytest.approx(sum(terms.values()))
    return terms


def gradient(settings: SupervisionConfig, batch: Batch | None = None) -> Tensor:
    network = Fixed(some_logits())
    batch_loss(settings, network, batch or make_batch(), 0.0)[0].backward()  # type: ignore[no-untyped-call]
    assert network.logits.grad is not None
    return network.logits.grad


def p_of(logits: Tensor) -> Tensor:
    return torch.softmax(logits, dim=1)


def dice_of(p: Tensor, y: Tensor, seen: Tensor) -> float:
    both, size = (p * y)[seen].sum(), (p.square() + y)[seen].sum()
    return float(1 - (2 * both + 1e-5) / (size + 1e-5))


SEEN = grid(1, 1, 1, 1, 1, 0, 1, 1).bool()


@contextmanager
def changed_loss(change: Callable[[Tensor, Any, Any], tuple[Tensor, Any]]) -> Iterator[None]:
    """Whatever is trained meanwhile has other losses: what `change` makes of loss, terms and
    network."""
    real = training.batch_loss

    def changed(config: Any, network: Any, *rest: Any) -> tuple[Tensor, Any]:
        return change(*real(config, network, *rest), network)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training, "batch_loss", changed)
        yield
