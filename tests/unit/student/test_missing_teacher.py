"""A case that lacks one teacher's unit is taught by the terms that exist, and by no wrong one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pipeline.student.augment import AugmentConfig
from pipeline.student.dataset import PatchDataset, collate, to_batch
from pipeline.student.inputs import TrainingInputs
from pipeline.student.losses import regions_of
from pipeline.student.network import StudentNetwork
from pipeline.student.settings import SupervisionConfig, TrainingConfig
from pipeline.student.supervision import Batch, batch_loss
from tests.unit.student.coded import RAW, SPACE, write_case

PATCH = (8, 8, 8)
BACKGROUND, SPLEEN = 0, 2


class Given(StudentNetwork):
    """A network that answers with given logits."""

    def __init__(self, logits: Tensor) -> None:
        nn.Module.__init__(self)
        self.logits = logits

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor | None]:
        return self.logits, None


def batch_of(folder: Path, supervision: SupervisionConfig, *teachers: str) -> Batch:
    """One patch of a case that annotates the liver."""
    case = write_case(folder, "set/case", annotated=("liver",), teachers=teachers)
    config = TrainingConfig(
        supervision=supervision, patch=PATCH, intensity=RAW, augment=AugmentConfig(flip_axes=()),
        batch_size=1, steps=4, seed=3,
    )  # fmt: skip
    data = PatchDataset(config, TrainingInputs([case], [], SPACE, {}))
    collated = collate([data[0]])
    assert isinstance(collated, dict)
    return to_batch(collated, [], torch.device("cpu"))


def logits_with(share: float) -> Tensor:
    """Random logits in which p_0 + p_spleen is the same whatever the spleen's share of it."""
    s = torch.randn((1, 3, *PATCH), generator=torch.Generator().manual_seed(0))
    both = torch.tensor([1 - share, share]).log()
    s[:, BACKGROUND], s[:, SPLEEN] = both[0], both[1]
    return s


def loss(supervision: SupervisionConfig, logits: Tensor, batch: Batch) -> float:
    return float(batch_loss(supervision, Given(logits), batch, 0.0)[0])


KINDS: list[dict[str, Any]] = [
    {"kind": "ms_kd"},
    {"kind": "ms_kd", "logits": {"schedule": "decay"}},
    {"kind": "ms_kd", "logits": {"hard": True}},
    {"kind": "pseudo_label"},
]


@pytest.mark.parametrize("values", KINDS, ids=str)
def test_nothing_is_said_of_the_organ_that_nobody_knows(
    tmp_path: Path, values: dict[str, Any]
) -> None:
    supervision = SupervisionConfig.model_validate(values)
    batch = batch_of(tmp_path / "without", supervision, "one")
    assert batch.known.tolist() == [[True, False]]
    assert batch.log_odds is not None
    # Background on which the expert that is there agrees with the label.
    assert regions_of(batch.log_odds).background.any()
    little, much = logits_with(0.05), logits_with(0.9)
    assert loss(supervision, little, batch) == pytest.approx(loss(supervision, much, batch))
    # The same patch with its teacher does tell the two students apart.
    whole = batch_of(tmp_path / "with", supervision, "one", "two")
    assert abs(loss(supervision, little, whole) - loss(supervision, much, whole)) > 1e-3
