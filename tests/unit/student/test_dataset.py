from __future__ import annotations

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
from pipeline.student.dataset import to_batch
from pipeline.student.network import CachedTap
from pipeline.student.sampling import SamplingConfig
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

ROOT = Path(__file__).resolve().parents[3]


class TestWhatASampleHolds:
    @pytest.mark.parametrize("augment", [STILL, MOVING], ids=["still", "moving"])
    def test_everything_lies_where_the_image_lies(
        self, coded_case: CachedCase, augment: AugmentConfig
    ) -> None:
        data = dataset([coded_case], augment=augment, num_steps=12)
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
        data = dataset([coded_case], taps={TAP: CACHED}, align=STRIDE, num_steps=10)
        starts = set()
        for item in range(len(data)):
            sample = arrays(data[item])
            inside, voxels = place(sample["image"][0])
            start = voxels[0]
            assert not (start % STRIDE).any()
            starts.add(tuple(start))
            first, cells = start // 2, [n // 2 for n in PATCH]
            d, h, w = np.meshgrid(*(np.arange(n) for n in cells), indexing="ij")
            expected = np.stack([16 * (d + first[0]) + h + first[1], w + first[2]])
            seen = inside[::2, ::2, ::2]
            assert np.array_equal(sample["feature0"][:, seen], expected[:, seen])
        assert len(starts) > 5

    def test_each_tap_is_read_in_its_own_cells_of_the_same_place(
        self, coded_case: CachedCase, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        read: list[Patch] = []

        def features(self: CachedCase, teacher: str, tap: str, cells: Patch) -> npt.NDArray[Any]:
            read.append(cells)
            return np.zeros((1, *cells.shape), dtype=np.float16)

        monkeypatch.setattr(CachedCase, "features", features)
        strides = ((2, 2, 2), (4, 1, 5))
        taps = {("one", str(s)): CachedTap(1, s, (0,)) for s in strides}
        data = dataset([coded_case], taps=taps, align=(4, 2, 10))
        for item in range(len(data)):
            read.clear()
            voxels = place(arrays(data[item])["image"][0])[1]
            for cells, stride in zip(read, strides, strict=True):
                assert tuple(np.multiply(cells.start, stride)) == tuple(voxels[0])
                assert tuple(np.multiply(cells.shape, stride)) == PATCH

    def test_intensity_is_of_the_image_alone(self, coded_case: CachedCase) -> None:
        brighter = AugmentConfig.model_validate({"brightness": {"probability": 1}})
        still, changed = (
            arrays(dataset([coded_case], augment=augment)[0]) for augment in (STILL, brighter)
        )
        assert not np.array_equal(still.pop("image"), changed.pop("image"))
        for name, array in still.items():
            assert np.array_equal(array, changed[name], equal_nan=array.dtype.kind == "f"), name

    def test_dtypes_and_shapes(self, coded_cases: list[CachedCase]) -> None:
        data = dataset(coded_cases, taps={TAP: CACHED}, align=STRIDE)
        collated = torch.utils.data.default_collate([data[0], data[1]])
        batch = to_batch(collated, [TAP], torch.device("cpu"))
        assert batch.image.shape == (2, 1, *PATCH)
        assert batch.image.dtype == torch.float32
        assert batch.classes.dtype == torch.int64
        assert batch.log_odds is not None
        assert batch.log_odds.dtype == torch.float32
        assert batch.organ is not None
        assert batch.organ.shape == (2, 2, *PATCH)
        assert batch.features[TAP].shape == (2, CHANNELS, 4, 5, 5)

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

    def test_a_case_that_nobody_knows_has_no_regions(self, coded_folder: Path) -> None:
        case = write_case(coded_folder, "liver-ct/only-label", teachers=())
        sample = dataset([case])[0]
        assert not sample["known"].any()
        assert not sample["background"].any()
        assert not sample["organ"].any()
        assert torch.isnan(sample["log_odds"]).all()

    def test_teachers_speak_of_their_organs_and_the_label_of_the_rest(
        self, coded_folder: Path
    ) -> None:
        settings = SupervisionConfig.model_validate({"logits": {"target": "marginal"}})
        both = write_case(coded_folder, "liver-ct/a")
        without_one = write_case(coded_folder, "liver-ct/only-two", teachers=("two",))
        cases = {case.name: case for case in (both, without_one)}
        data = dataset(list(cases.values()), supervision=settings)
        found = {sample["case"]: sample for sample in (data[i] for i in range(len(data)))}
        # Rows: teachers one and two, then the label of liver and of spleen.
        by_teachers = [[True, False], [False, True], [False, False], [False, False]]
        assert found["liver-ct/a"]["experts"].tolist() == by_teachers
        by_label = [[False, False], [False, True], [True, False], [False, False]]
        assert found["liver-ct/only-two"]["experts"].tolist() == by_label
        for sample in found.values():
            assert torch.equal(sample["experts"].any(0), sample["known"])
        assert "experts" not in dataset(list(cases.values()), supervision=SupervisionConfig())[0]

    def test_a_teacher_of_two_organs_speaks_of_both(self, coded_case: CachedCase) -> None:
        settings = SupervisionConfig.model_validate({"logits": {"target": "marginal"}})
        experts = {"liver": ["one"], "spleen": ["one", "two"]}
        wide = CachedCase(
            coded_case.name,
            "train",
            coded_case.annotated,
            coded_case.case,
            dict(coded_case.teachers),
            experts,
        )
        by_label = SamplingConfig(organs_from="labels")  # unit one stored no centres of spleen
        data = dataset([wide], supervision=settings, sampling=by_label)
        assert data._experts(wide, [0, 1]).tolist()[:2] == [[True, True], [False, True]]

    def test_features_of_a_missing_unit_are_not_seen(self, coded_folder: Path) -> None:
        case = write_case(coded_folder, "liver-ct/two", teachers=("two",))
        sample = dataset([case], taps={TAP: CACHED}, align=STRIDE)[0]
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
        for name in ("image", "organ", "background", "classes"):
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
