from __future__ import annotations

from dataclasses import fields

import numpy as np
import numpy.typing as npt
import pytest
import torch
from torch import Tensor, nn

from pipeline.cache.reader import CachedCase
from pipeline.data.labels import LabelSpace
from pipeline.data.patches import Patch
from pipeline.student.inference import StudentWindows
from pipeline.student.training import mean_scores, validate
from tests.unit.student.coded import RAW, SHAPE, SPACE, place, write_case


class FirstPlanes(nn.Module):
    """Says liver in the planes z < `planes`, read off the coded image; elsewhere background."""

    def __init__(self, planes: int) -> None:
        super().__init__()
        self.last = planes * SHAPE[1] * SHAPE[2]

    def forward(self, image: Tensor) -> Tensor:
        liver = torch.where((image >= 0) & (image < self.last), 1.0, -1.0)
        return torch.cat([liver * 0, liver, liver * 0 - 5], dim=1)


def scores(planes: int, *cases: CachedCase, space: LabelSpace = SPACE) -> dict[str, float | None]:
    windows = StudentWindows(FirstPlanes(planes), RAW, (16, 16, 16), overlap=0.25)
    return mean_scores(validate(windows, cases, space))


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> CachedCase:
    return write_case(tmp_path_factory.mktemp("coded"), "liver-ct/a")


def test_dice_by_hand(case: CachedCase) -> None:
    found = scores(6, case)
    # Of 18 planes 6 are liver, 6 are predicted, and 0 and 3 are both.
    assert found == {"liver": pytest.approx(2 * 2 / (6 + 6), abs=1e-4), "spleen": None}


def test_the_network_stays_in_evaluation_mode(case: CachedCase) -> None:
    network = FirstPlanes(6).train()
    validate(StudentWindows(network, RAW, (16, 16, 16)), [case], SPACE)
    assert not network.training


class Relabelled(CachedCase):
    """A case with another label."""

    other: npt.NDArray[np.uint8]

    @classmethod
    def of(cls, case: CachedCase, label: npt.NDArray[np.uint8]) -> Relabelled:
        found = cls(**{field.name: getattr(case, field.name) for field in fields(case)})
        object.__setattr__(found, "other", label)
        return found

    def label(self, patch: Patch | None = None, *, fill: float = 255) -> npt.NDArray[np.uint8]:
        return self.other


def test_ignored_voxels_do_not_count(case: CachedCase) -> None:
    label = case.label()
    z = place(case.image().astype(np.float32))[1].reshape(*SHAPE, 3)[..., 0]
    label[(z == 1) | (z == 2)] = 255
    found = scores(6, Relabelled.of(case, label))
    assert found["liver"] == pytest.approx(2 * 2 / (6 + 4), abs=1e-4)


def test_the_mean_is_over_cases_that_show_the_organ(case: CachedCase) -> None:
    empty = Relabelled.of(case, np.zeros(SHAPE, np.uint8))
    both = scores(6, empty, case)
    assert both == scores(6, case)


def test_a_missed_organ_is_zero_and_an_unknown_one_is_not_asked_for(case: CachedCase) -> None:
    assert scores(0, case)["liver"] == 0.0
    spleen_alone = LabelSpace({"spleen": 2})
    assert scores(6, case, space=spleen_alone) == {"spleen": None}


def test_no_case_is_no_score() -> None:
    assert scores(1) == {"liver": None, "spleen": None}
