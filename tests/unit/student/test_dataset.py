from __future__ import annotations

from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch

from pipeline.cache.reader import CachedCase
from pipeline.data.labels import IGNORE
from pipeline.data.patches import Patch
from pipeline.student.augment import AugmentConfig
from pipeline.student.dataset import features_at
from pipeline.student.network import CachedTap
from pipeline.student.settings import SupervisionConfig
from tests.unit.student.coded import (
    CHANNELS,
    SHAPE,
    STRIDE,
    TAP,
    expected_odds,
    place,
    write_case,
)
from tests.unit.student.samples import CACHED, MOVING, PATCH, STILL, arrays, check_places, dataset


class Watched(CachedCase):
    """A case that keeps which cells are read; of each box, cell (1, 0, 0) is not seen."""

    read: list[Patch]

    @classmethod
    def of(cls, case: CachedCase) -> Watched:
        watched = cls(**{field.name: getattr(case, field.name) for field in fields(case)})
        object.__setattr__(watched, "read", [])
        return watched

    def features(self, teacher: str, tap: str, cells: Patch | None = None) -> npt.NDArray[Any]:
        assert cells is not None
        self.read.append(cells)
        found = np.ones((1, *cells.shape), dtype=np.float16)
        found[:, 1, 0, 0] = np.nan
        return found


class TestWhatASampleHolds:
    @pytest.mark.parametrize("augment", [STILL, MOVING], ids=["still", "moving"])
    def test_everything_lies_where_the_image_lies(
        self, coded_case: CachedCase, augment: AugmentConfig
    ) -> None:
        data = dataset([coded_case], augment=augment, steps=12)
        seen = set()
        for item in range(len(data)):
            voxels = check_places(data[item], SHAPE)
            assert len(voxels) == np.prod(PATCH)
            order = voxels.reshape(*PATCH, 3)
            seen.add(tuple(np.sign(order[-1, -1, -1] - order[0, 0, 0])))
        # Eight mirror images, or none.
        assert len(seen) > 4 if augment is MOVING else seen == {(1, 1, 1)}

    def test_it_is_the_same_as_slicing_the_cache(self, coded_case: CachedCase) -> None:
        sample = arrays(dataset([coded_case])[0])
        _, voxels = place(sample["image"][0])
        z, y, x = (int(v) for v in voxels[0])
        box = Patch((z, y, x), PATCH).slices
        whole = coded_case.teachers["one"].read("log_odds/liver")
        assert np.array_equal(sample["log_odds"][0], whole[box].astype(np.float32))
        assert np.array_equal(sample["image"][0], coded_case.image()[box].astype(np.float32))
        assert np.array_equal(sample["classes"], coded_case.label()[box])

    def test_labels_win_where_asked(self, coded_case: CachedCase) -> None:
        sample = arrays(dataset([coded_case], supervision=SupervisionConfig(confidence=6.0))[0])
        _, voxels = place(sample["image"][0])
        raw = expected_odds(voxels).reshape(2, *PATCH)
        strong = np.maximum(np.abs(raw), 6.0)
        liver = sample["classes"] == 1
        assert liver.any()
        assert np.array_equal(sample["log_odds"][0], np.where(liver, strong[0], -strong[0]))
        assert np.array_equal(sample["log_odds"][1], np.where(liver, -strong[1], raw[1]))

    def test_features_are_those_of_the_same_place(self, coded_case: CachedCase) -> None:
        data = dataset([coded_case], taps={TAP: CACHED}, steps=10)
        starts = set()
        for item in range(len(data)):
            sample = arrays(data[item])
            inside, voxels = place(sample["image"][0])
            starts.add(tuple(voxels[0] % STRIDE))
            first, cells = voxels[0] / STRIDE, [n // 2 for n in PATCH]
            d, h, w = np.meshgrid(*(np.arange(n) for n in cells), indexing="ij")
            # What was written is linear in the cell, so that in between is exact.
            expected = np.stack([16 * (d + first[0]) + h + first[1], w + first[2]])
            assert inside.all()
            assert np.array_equal(sample["feature0"], expected)
        assert len(starts) > 3

    def test_features_are_standardised_over_the_cohort(self, coded_case: CachedCase) -> None:
        moments = {"mean": (100.0, 3.0), "std": (20.0, 0.0)}
        plain = dataset([coded_case], taps={TAP: CACHED})
        scaled = dataset([coded_case], taps={TAP: replace(CACHED, **moments)})
        for item in range(len(plain)):
            before, after = (arrays(data[item])["feature0"] for data in (plain, scaled))
            np.testing.assert_allclose(after[0], (before[0] - 100) / 20, rtol=1e-5)
            np.testing.assert_array_equal(after[1], before[1] - 3)  # it never varies

    def test_what_is_not_air_is_told_with_features_alone(self, coded_case: CachedCase) -> None:
        assert "body" not in dataset([coded_case])[0]
        data = dataset([coded_case], patch=(20, 10, 10), taps={TAP: CACHED})
        sample = arrays(data[0])
        # Coded images hold values from 0 on, and air outside of the case.
        assert np.array_equal(sample["body"], sample["image"][0] >= 0)
        assert not sample["body"].all()

    def test_next_to_a_cell_that_is_not_seen_is_nothing(self, coded_case: CachedCase) -> None:
        case = Watched.of(coded_case)
        found = features_at(case, "one", "deep", Patch((5, 2, 3), (8, 4, 1)), (2, 2, 1))
        assert case.read == [Patch((2, 1, 3), (5, 2, 1))]
        assert found.shape == (1, 4, 2, 1)
        assert np.argwhere(np.isnan(found)).tolist() == [[0, 0, 0, 0], [0, 1, 0, 0]]

    def test_each_tap_is_read_in_its_own_cells_of_the_same_place(
        self, coded_case: CachedCase
    ) -> None:
        case = Watched.of(coded_case)
        strides = ((2, 2, 2), (4, 1, 5))
        taps = {("one", str(s)): CachedTap(1, s, (0,)) for s in strides}
        data = dataset([case], taps=taps)
        for item in range(len(data)):
            case.read.clear()
            voxels = place(arrays(data[item])["image"][0])[1]
            for cells, stride in zip(case.read, strides, strict=True):
                into = voxels[0] % stride
                assert np.array_equal(np.multiply(cells.start, stride) + into, voxels[0])
                assert np.array_equal(np.multiply(cells.shape - (into > 0), stride), PATCH)

    def test_intensity_is_of_the_image_alone(self, coded_case: CachedCase) -> None:
        brighter = AugmentConfig.model_validate({"brightness": {"probability": 1}})
        still, changed = (
            arrays(dataset([coded_case], augment=augment)[0]) for augment in (STILL, brighter)
        )
        assert not np.array_equal(still.pop("image"), changed.pop("image"))
        for name, array in still.items():
            assert np.array_equal(array, changed[name], equal_nan=array.dtype.kind == "f"), name

    def test_labels_alone_read_no_teacher(self, coded_case: CachedCase) -> None:
        blind = CachedCase(
            "liver-ct/a", "train", ("liver",), coded_case.case, {}, {"liver": ["one"]}
        )
        sample = dataset([blind], supervision=SupervisionConfig(kind="marginal"))[0]
        assert set(sample) == {"image", "classes", "annotated", "known", "case"}
        assert sample["known"].tolist() == [True, False]


class TestWhoIsKnown:
    def test_teachers_and_labels(self, coded_folder: Path) -> None:
        case = write_case(coded_folder, "liver-ct/only-label", teachers=())
        sample = dataset([case], supervision=SupervisionConfig())[0]
        assert sample["annotated"].tolist() == [True, False]
        assert sample["known"].tolist() == [True, False]
        sample = dataset([write_case(coded_folder, "liver-ct/two", teachers=("two",))])[0]
        assert sample["known"].tolist() == [False, True]

    def test_a_label_that_does_not_win_makes_no_log_odds(self, coded_folder: Path) -> None:
        case = write_case(coded_folder, "liver-ct/without-one", teachers=("two",))
        sample = dataset([case])[0]
        assert sample["annotated"].tolist() == [True, False]
        assert sample["known"].tolist() == [False, True]
        assert torch.isnan(sample["log_odds"][0]).all()

    def test_of_a_case_that_nobody_knows_nothing_is_said(self, coded_folder: Path) -> None:
        case = write_case(coded_folder, "liver-ct/only-label", teachers=())
        sample = dataset([case])[0]
        assert not sample["known"].any()
        assert torch.isnan(sample["log_odds"]).all()

    def test_features_of_a_missing_unit_are_not_seen(self, coded_folder: Path) -> None:
        case = write_case(coded_folder, "liver-ct/two", teachers=("two",))
        sample = dataset([case], taps={TAP: CACHED})[0]
        assert sample["feature0"].shape == (CHANNELS, 4, 5, 5)
        assert torch.isnan(sample["feature0"]).all()


def test_log_odds_of_a_batch_are_divided_by_their_teachers_temperature(tmp_path: Path) -> None:
    case = write_case(tmp_path, "livers/case_0")
    plain = dataset([case])
    hot = dataset([case], temperatures={("one", "liver"): 4.0, ("two", "spleen"): 0.5})
    for item in range(len(plain)):
        before, after = arrays(plain[item]), arrays(hot[item])
        np.testing.assert_array_equal(after["log_odds"][0], before["log_odds"][0] / 4)
        np.testing.assert_array_equal(after["log_odds"][1], before["log_odds"][1] / 0.5)
        for name in ("image", "classes"):
            np.testing.assert_array_equal(after[name], before[name])


def test_a_label_that_wins_is_as_sure_whatever_the_temperature(tmp_path: Path) -> None:
    case = write_case(tmp_path, "livers/case_0")
    wins = SupervisionConfig(labels_win=True, confidence=6.0)
    sure = dataset([case], supervision=wins, temperatures={("one", "liver"): 10_000.0})
    for item in range(len(sure)):
        sample = arrays(sure[item])
        known = (sample["classes"] != IGNORE) & ~np.isnan(sample["log_odds"][0])
        expected = np.where(sample["classes"] == 1, 6.0, -6.0)
        np.testing.assert_allclose(sample["log_odds"][0][known], expected[known])
