from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch

from pipeline.cache.pool import POOL
from pipeline.cache.reader import CachedCase
from pipeline.labels import IGNORE
from pipeline.patches import Patch
from pipeline.student.augment import AugmentConfig
from pipeline.student.dataset import AIR_HU, PatchDataset, SamplingConfig, to_batch
from pipeline.student.supervision import SupervisionConfig
from tests.unit.student.coded import (
    CHANNELS,
    LIVER_PLANES,
    RAW,
    SHAPE,
    SPACE,
    STRIDE,
    TAP,
    expected_label,
    expected_odds,
    place,
    write_case,
)

ROOT = Path(__file__).resolve().parents[3]
PATCH = (8, 10, 10)
NUM_STEPS, BATCH_SIZE = 5, 2
# The log-odds as they were written, not as labels would correct them.
TEACHERS = SupervisionConfig(labels_win=False)
STILL = AugmentConfig(intensity=0)
MOVING = AugmentConfig(intensity=0, flip_axes=(0, 1, 2), rotate=True)


def dataset(cases: Sequence[CachedCase], **changes: Any) -> PatchDataset:
    settings: dict[str, Any] = {
        "supervision": TEACHERS,
        "taps": {},
        "patch": PATCH,
        "align": (1, 1, 1),
        "intensity": RAW,
        "sampling": SamplingConfig(),
        "augment": STILL,
        "batch_size": BATCH_SIZE,
        "num_steps": NUM_STEPS,
        "seed": 3,
        "pool_bytes": 50_000_000,
    }
    return PatchDataset(cases, SPACE, **(settings | changes))


def fingerprint(sample: dict[str, Any]) -> str:
    h = hashlib.sha256(sample["case"].encode())
    for name, value in sorted(sample.items()):
        if isinstance(value, torch.Tensor):
            h.update(name.encode() + str(value.dtype).encode() + value.numpy().tobytes())
    return h.hexdigest()


def fingerprints(data: PatchDataset) -> list[str]:
    return [fingerprint(data[item]) for item in range(len(data))]


def arrays(sample: dict[str, Any]) -> dict[str, npt.NDArray[Any]]:
    return {n: v.numpy() for n, v in sample.items() if isinstance(v, torch.Tensor)}


@pytest.fixture(autouse=True)
def _pool_as_before() -> Iterator[None]:
    yield
    POOL.resize(0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("coded")


@pytest.fixture(scope="module")
def cases(folder: Path) -> list[CachedCase]:
    return [
        write_case(folder, "liver-ct/a"),
        write_case(folder, "liver-ct/b", shape=(16, 12, 14)),
        write_case(folder, "spleen-ct/c", annotated=("spleen",)),
        write_case(folder, "spleen-ct/d", annotated=("spleen",)),
        write_case(folder, "spleen-ct/e", annotated=("spleen",)),
    ]


@pytest.fixture(scope="module")
def case(cases: list[CachedCase]) -> CachedCase:
    return cases[0]


class TestPureFunctionOfItsNumber:
    def test_order_and_repetition_do_not_matter(self, cases: list[CachedCase]) -> None:
        data = dataset(cases, augment=MOVING)
        forwards = fingerprints(data)
        order = np.random.default_rng(0).permutation(len(data))
        again = {int(item): fingerprint(data[int(item)]) for item in order}
        assert [again[item] for item in range(len(data))] == forwards
        assert len(set(forwards)) == len(forwards)

    @pytest.mark.parametrize("pool_bytes", [0, 20_000])
    def test_the_pool_does_not_matter(self, cases: list[CachedCase], pool_bytes: int) -> None:
        settings = {"taps": {TAP: CHANNELS}, "align": STRIDE, "augment": AugmentConfig()}
        roomy = fingerprints(dataset(cases, **settings))
        assert fingerprints(dataset(cases, pool_bytes=pool_bytes, **settings)) == roomy

    def test_global_random_state_does_not_matter_and_is_left_alone(
        self, cases: list[CachedCase]
    ) -> None:
        data = dataset(cases, augment=AugmentConfig(flip_axes=(2,), intensity=1))
        torch.manual_seed(0)
        first = fingerprint(data[1])
        torch.manual_seed(1)
        before = torch.get_rng_state()
        assert fingerprint(data[1]) == first
        assert torch.equal(torch.get_rng_state(), before)

    def test_the_seed_matters(self, cases: list[CachedCase]) -> None:
        assert set(fingerprints(dataset(cases))).isdisjoint(fingerprints(dataset(cases, seed=4)))

    def test_two_processes_make_the_samples_of_one(self, cases: list[CachedCase]) -> None:
        one = fingerprints(dataset(cases))
        shares = [fingerprints(dataset(cases, rank=rank, world_size=2)) for rank in (0, 1)]
        assert [sample for step in zip(*shares, strict=True) for sample in step] == one

    def test_the_length_of_training_does_not_matter(self, cases: list[CachedCase]) -> None:
        longer = dataset(cases, num_steps=500)
        short = dataset(cases)
        assert [fingerprint(longer[item]) for item in range(len(short))] == fingerprints(short)

    def test_step_and_index_are_what_counts_not_the_item(self, cases: list[CachedCase]) -> None:
        # Item 4 is (step 2, index 0) of batches of two and (step 4, index 0) of single samples.
        single = dataset(cases, batch_size=1)
        pairs = dataset(cases)
        assert fingerprint(single[2]) == fingerprint(pairs[4])
        assert fingerprint(single[4]) != fingerprint(pairs[4])

    def test_another_process_gives_the_same(self, cases: list[CachedCase], folder: Path) -> None:
        data = dataset(cases, taps={TAP: CHANNELS}, align=STRIDE, augment=AugmentConfig())
        torch.save(data, folder / "data.pt")
        code = (
            "import sys, torch\n"
            "from tests.unit.student.test_dataset import fingerprints\n"
            "print(*fingerprints(torch.load(sys.argv[1], weights_only=False)))\n"
        )
        done = subprocess.run(
            [sys.executable, "-c", code, str(folder / "data.pt")],
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
            check=False,
            timeout=120,
        )
        assert done.returncode == 0, done.stderr
        assert done.stdout.split() == fingerprints(data)


class TestWhatASampleHolds:
    def _check(self, sample: dict[str, Any], shape: tuple[int, int, int]) -> npt.NDArray[Any]:
        """Every voxel's label, log-odds and regions are those of where its image value lies."""
        found = arrays(sample)
        inside, voxels = place(found["image"][0], shape)
        assert np.array_equal(found["classes"][inside], expected_label(voxels))
        odds = expected_odds(voxels)
        assert np.array_equal(found["log_odds"][:, inside], odds)
        assert np.array_equal(found["organ"][:, inside], odds > 0)
        assert np.array_equal(found["background"][inside], (odds < 0).all(axis=0))
        return voxels

    @pytest.mark.parametrize("augment", [STILL, MOVING], ids=["still", "moving"])
    def test_everything_lies_where_the_image_lies(
        self, case: CachedCase, augment: AugmentConfig
    ) -> None:
        data = dataset([case], augment=augment, num_steps=12)
        seen = set()
        for item in range(len(data)):
            voxels = self._check(data[item], SHAPE)
            assert len(voxels) == np.prod(PATCH)
            order = voxels.reshape(*PATCH, 3)
            seen.add(tuple(np.sign(order[-1, -1, -1] - order[0, 0, 0])))
        # Eight mirror images, or none.
        assert len(seen) > 4 if augment is MOVING else seen == {(1, 1, 1)}

    def test_it_is_the_same_as_slicing_the_cache(self, case: CachedCase) -> None:
        sample = arrays(dataset([case])[0])
        _, voxels = place(sample["image"][0])
        z, y, x = (int(v) for v in voxels[0])
        box = Patch((z, y, x), PATCH).slices
        whole = case.teachers["one"].read("log_odds/liver")
        assert np.array_equal(sample["log_odds"][0], whole[box].astype(np.float32))
        assert np.array_equal(sample["image"][0], case.image()[box].astype(np.float32))
        assert np.array_equal(sample["classes"], case.label()[box])

    def test_labels_win_where_asked(self, case: CachedCase) -> None:
        sample = arrays(dataset([case], supervision=SupervisionConfig(confidence=6.0))[0])
        _, voxels = place(sample["image"][0])
        raw = expected_odds(voxels).reshape(2, *PATCH)
        strong = np.maximum(np.abs(raw), 6.0)
        liver = sample["classes"] == 1
        assert liver.any()
        assert np.array_equal(sample["log_odds"][0], np.where(liver, strong[0], -strong[0]))
        assert np.array_equal(sample["log_odds"][1], np.where(liver, -strong[1], raw[1]))

    def test_a_patch_larger_than_the_case_is_filled_with_the_unknown(self, folder: Path) -> None:
        small = (16, 12, 14)
        case = write_case(folder, "liver-ct/b", shape=small)
        patch = (20, 12, 20)
        data = dataset([case], patch=patch, taps={TAP: CHANNELS}, align=STRIDE)
        sample = arrays(data[0])
        inside, voxels = place(sample["image"][0], small)
        assert len(voxels) == np.prod(small)
        self._check(data[0], small)
        outside = ~inside
        assert (sample["image"][0][outside] == AIR_HU).all()
        assert (sample["classes"][outside] == IGNORE).all()
        assert np.isnan(sample["log_odds"][:, outside]).all()
        assert not sample["organ"][:, outside].any()
        assert not sample["background"][outside].any()
        cells = inside[::2, ::2, ::2]
        assert np.isnan(sample["feature0"][:, ~cells]).all()
        assert np.isfinite(sample["feature0"][:, cells]).all()

    def test_features_are_those_of_the_same_place(self, case: CachedCase) -> None:
        data = dataset([case], taps={TAP: CHANNELS}, align=STRIDE, num_steps=10)
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

    def test_intensity_is_of_the_image_alone(self, case: CachedCase) -> None:
        still, changed = (
            arrays(dataset([case], augment=AugmentConfig(intensity=i))[0]) for i in (0, 1)
        )
        assert not np.array_equal(still.pop("image"), changed.pop("image"))
        for name, array in still.items():
            assert np.array_equal(array, changed[name], equal_nan=array.dtype.kind == "f"), name

    def test_dtypes_and_shapes(self, cases: list[CachedCase]) -> None:
        data = dataset(cases, taps={TAP: CHANNELS}, align=STRIDE)
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

    def test_labels_alone_read_no_teacher(self, case: CachedCase) -> None:
        blind = CachedCase(case.name, "train", ("liver",), case.case, {}, {"liver": ["one"]})
        sample = dataset([blind], supervision=SupervisionConfig(kind="marginal"))[0]
        assert set(sample) == {"image", "classes", "annotated", "known", "case"}
        assert sample["known"].tolist() == [True, False]


class TestWhoIsKnown:
    def test_teachers_and_labels(self, folder: Path) -> None:
        case = write_case(folder, "liver-ct/only-label", teachers=())
        sample = dataset([case], supervision=SupervisionConfig())[0]
        assert sample["annotated"].tolist() == [True, False]
        assert sample["known"].tolist() == [True, False]
        sample = dataset([write_case(folder, "liver-ct/two", teachers=("two",))])[0]
        assert sample["known"].tolist() == [False, True]

    def test_a_label_that_does_not_win_makes_no_log_odds(self, folder: Path) -> None:
        case = write_case(folder, "liver-ct/without-one", teachers=("two",))
        sample = dataset([case])[0]
        assert sample["annotated"].tolist() == [True, False]
        assert sample["known"].tolist() == [False, True]
        assert torch.isnan(sample["log_odds"][0]).all()

    def test_a_case_that_nobody_knows_has_no_regions(self, folder: Path) -> None:
        case = write_case(folder, "liver-ct/only-label", teachers=())
        sample = dataset([case])[0]
        assert not sample["known"].any()
        assert not sample["background"].any()
        assert not sample["organ"].any()
        assert torch.isnan(sample["log_odds"]).all()

    def test_features_of_a_missing_unit_are_not_seen(self, folder: Path) -> None:
        case = write_case(folder, "liver-ct/two", teachers=("two",))
        sample = dataset([case], taps={TAP: CHANNELS}, align=STRIDE)[0]
        assert sample["feature0"].shape == (CHANNELS, 4, 5, 5)
        assert torch.isnan(sample["feature0"]).all()


class TestWherePatchesLie:
    def _middles(self, data: PatchDataset) -> list[tuple[str, npt.NDArray[np.int64]]]:
        found = []
        for item in range(len(data)):
            sample = data[item]
            voxels = place(sample["image"][0].numpy())[1].reshape(*data.patch, 3)
            found.append((sample["case"], voxels[tuple(n // 2 for n in data.patch)]))
        return found

    def test_datasets_are_drawn_equally_whatever_their_size(self, cases: list[CachedCase]) -> None:
        data = dataset(cases, patch=(2, 2, 2), num_steps=70)
        names = [data[item]["case"] for item in range(len(data))]
        share = sum(name.startswith("liver-ct") for name in names) / len(names)
        assert 0.35 < share < 0.65
        spleen = [name for name in names if name.startswith("spleen-ct")]
        assert all(0.15 < spleen.count(n) / len(spleen) < 0.55 for n in set(spleen))
        assert len(set(names)) == len(cases)

    def test_foreground_patches_are_centred_on_organs_equally(self, case: CachedCase) -> None:
        settings = {"patch": (2, 2, 2), "num_steps": 60}
        data = dataset([case], sampling=SamplingConfig(foreground=1.0), **settings)
        labelled = {tuple(c) for c in case.case.attributes["centres"]["liver"]}
        taught = {tuple(c) for c in case.teachers["two"].attributes["centres"]["spleen"]}
        middles = [tuple(int(v) for v in middle) for _, middle in self._middles(data)]
        # Those at the very edge are pushed inside; all others hit a stored voxel.
        hits = {"liver": 0, "spleen": 0}
        for middle in middles:
            hits["liver"] += middle in labelled and middle not in taught
            hits["spleen"] += middle in taught and middle not in labelled
        assert min(hits.values()) > 0.25 * len(middles)

    def test_labels_alone_may_say_where(self, case: CachedCase) -> None:
        data = dataset(
            [case],
            sampling=SamplingConfig(foreground=1.0, organs_from="labels"),
            patch=(2, 2, 2),
            num_steps=40,
        )
        middles = [middle for _, middle in self._middles(data)]
        in_plane = [m[0] % LIVER_PLANES == 0 for m in middles if m[0] not in (0, 1)]
        assert all(in_plane)

    def test_without_foreground_all_places_are_drawn(self, case: CachedCase) -> None:
        data = dataset(
            [case], sampling=SamplingConfig(foreground=0.0), patch=(2, 2, 2), num_steps=80
        )
        planes = [int(middle[0]) for _, middle in self._middles(data)]
        assert set(planes) >= set(range(2, SHAPE[0] - 1))

    def test_a_case_without_any_centre_is_drawn_anywhere(self, folder: Path) -> None:
        case = write_case(folder, "spleen-ct/empty", annotated=("spleen",), teachers=())
        data = dataset([case], sampling=SamplingConfig(foreground=1.0))
        starts = {tuple(place(data[i]["image"][0].numpy())[1][0]) for i in range(len(data))}
        assert len(starts) > 3


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
