from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from pipeline.cache.reader import CachedCase, Trust, Unit
from pipeline.cache.schema import StorageConfig, image_spec
from pipeline.cache.store import write_unit
from pipeline.data.volume import Grid
from pipeline.errors import CacheCorrupt
from pipeline.student.dataset import PatchDataset
from pipeline.student.sampling import Sampler, SamplingConfig
from tests.unit.student.coded import place
from tests.unit.student.samples import dataset

ORGANS = ("liver", "spleen", "pancreas")
ALWAYS = SamplingConfig(foreground=1.0)
SHAPE = (6, 7, 8)
Centres = Mapping[str, list[list[int]]]


def held(folder: Path, name: str, labelled: Centres, taught: Centres | None = None) -> CachedCase:
    """A case that is nothing but these voxels of organs, by the label and by teacher t."""
    taught = taught or {}
    grid = Grid.axis_aligned(SHAPE, (1, 1, 1)).to_json()
    units = []
    for what, centres in (("cases", labelled), ("teachers", taught)):
        path = folder / what / f"{name}.zarr"
        attributes = {"grid": grid, "centres": dict(centres)}
        arrays = [image_spec(np.zeros(SHAPE, dtype=np.int16))]
        write_unit(path, arrays, attributes, {}, storage=StorageConfig())
        units.append(Unit.open(path))
    experts = {organ: ["t"] for organ in taught}
    return CachedCase(name, "train", tuple(labelled), units[0], {"t": units[1]}, experts)


def draws(
    cases: Sequence[CachedCase],
    config: SamplingConfig = ALWAYS,
    *,
    num: int = 900,
    organs: Sequence[str] = ORGANS,
    use_teachers: bool = True,
) -> list[tuple[str, tuple[int, ...]]]:
    """Names of cases and centres."""
    sampler = Sampler(cases, organs, config, use_teachers=use_teachers)
    rng = np.random.Generator(np.random.Philox(5))
    return [(case.name, tuple(centre)) for case, centre in (sampler.draw(rng) for _ in range(num))]


def shares(values: Sequence[Any]) -> dict[Any, float]:
    return {value: count / len(values) for value, count in Counter(values).items()}


# Where each organ is, so that a centre tells its organ.
AT: dict[tuple[int, ...], str] = {(1, 1, 1): "liver", (2, 2, 2): "spleen", (3, 3, 3): "pancreas"}
LIVER, SPLEEN, PANCREAS = ({organ: [list(at)]} for at, organ in AT.items())


@pytest.fixture(scope="module")
def uneven(tmp_path_factory: pytest.TempPathFactory) -> list[CachedCase]:
    """Ten livers, two spleens, one pancreas, by their labels; teachers find livers in spleen-ct."""
    folder = tmp_path_factory.mktemp("uneven")
    return [
        *(held(folder, f"liver-ct/{n}", LIVER) for n in range(10)),
        *(held(folder, f"spleen-ct/{n}", SPLEEN, LIVER) for n in range(2)),
        held(folder, "multi-ct/0", {**LIVER, **PANCREAS, "spleen": []}, SPLEEN),
    ]


class TestBalance:
    def test_every_organ_gets_the_same_share_however_few_cases_hold_it(
        self, uneven: list[CachedCase]
    ) -> None:
        found = shares([AT[centre] for _, centre in draws(uneven)])
        assert set(found) == set(ORGANS)
        assert all(0.28 < share < 0.39 for share in found.values())

    def test_then_datasets_and_then_cases_that_hold_it(self, uneven: list[CachedCase]) -> None:
        livers = [name for name, centre in draws(uneven, num=3000) if AT[centre] == "liver"]
        datasets = shares([name.split("/")[0] for name in livers])
        assert all(0.28 < datasets[d] < 0.39 for d in ("liver-ct", "spleen-ct", "multi-ct"))
        inside = shares([name for name in livers if name.startswith("liver-ct")])
        assert len(inside) == 10
        assert all(0.05 < share < 0.16 for share in inside.values())

    def test_an_annotated_organ_is_where_the_label_says_not_where_a_teacher_does(
        self, uneven: list[CachedCase]
    ) -> None:
        spleens = {name for name, centre in draws(uneven) if AT[centre] == "spleen"}
        assert spleens == {"spleen-ct/0", "spleen-ct/1"}

    @pytest.mark.parametrize(
        ("config", "use_teachers"),
        [
            (SamplingConfig(foreground=1.0, organs_from="labels"), True),
            (ALWAYS, False),  # supervision by labels alone
        ],
    )
    def test_labels_alone_may_say_where(
        self, uneven: list[CachedCase], config: SamplingConfig, use_teachers: bool
    ) -> None:
        found = draws(uneven, config, use_teachers=use_teachers)
        livers = {name.split("/")[0] for name, centre in found if AT[centre] == "liver"}
        assert livers == {"liver-ct", "multi-ct"}

    def test_the_rest_is_anywhere_datasets_equally_often(self, uneven: list[CachedCase]) -> None:
        found = draws(uneven, SamplingConfig(foreground=0.0), num=2000)
        datasets = shares([name.split("/")[0] for name, _ in found])
        assert all(0.3 < share < 0.37 for share in datasets.values())
        for axis, size in enumerate(SHAPE):
            assert {centre[axis] for _, centre in found} == set(range(size))

    def test_foreground_is_the_share_that_is_centred_on_organs(
        self, uneven: list[CachedCase]
    ) -> None:
        found = draws(uneven, SamplingConfig(foreground=0.5), num=2000)
        on_organs = sum(centre in AT for _, centre in found) / len(found)
        assert 0.46 < on_organs < 0.55  # a little more: "anywhere" may be an organ

    def test_cases_without_any_organ_are_drawn_anywhere(self, tmp_path: Path) -> None:
        empty = held(tmp_path, "spleen-ct/0", {"spleen": []})
        assert len({centre for _, centre in draws([empty])}) > 100

    def test_organs_of_the_student_alone_count(self, uneven: list[CachedCase]) -> None:
        found = draws(uneven, organs=("pancreas",))
        assert {name for name, _ in found} == {"multi-ct/0"}

    def test_no_patch_is_centred_on_a_claim_that_does_not_count(self, tmp_path: Path) -> None:
        case = held(tmp_path, "liver-ct/0", {"liver": [[1, 1, 1]]}, {"spleen": [[2, 2, 2]]})
        assert {centre for _, centre in draws([case])} == {(1, 1, 1), (2, 2, 2)}
        doubted = replace(case, trust={("t", "spleen"): Trust(here=False)})
        assert {centre for _, centre in draws([doubted])} == {(1, 1, 1)}


class TestWithoutReadingVolumes:
    def test_attributes_alone_are_read_and_not_kept(self, tmp_path: Path) -> None:
        case = held(tmp_path, "liver-ct/0", LIVER, SPLEEN)
        for unit in (case.case, case.teachers["t"]):
            shutil.rmtree(unit.path / "image")
        assert {AT[centre] for _, centre in draws([case])} == {"liver", "spleen"}
        assert "group" not in vars(case.case)

    def test_damaged_attributes_are_told_before_the_training(self, tmp_path: Path) -> None:
        case = held(tmp_path, "liver-ct/0", LIVER)
        file = case.case.path / "zarr.json"
        file.write_text(file.read_text().replace("centres", "centred"))
        with pytest.raises(CacheCorrupt):
            Sampler([case], ORGANS, ALWAYS, use_teachers=True)


class TestPatches:
    """What the sampler draws is where the patches of a dataset are."""

    def middles(self, data: PatchDataset) -> list[tuple[str, npt.NDArray[np.int64]]]:
        found = []
        for item in range(len(data)):
            sample = data[item]
            voxels = place(sample["image"][0].numpy())[1].reshape(*data.config.patch, 3)
            found.append((sample["case"], voxels[tuple(n // 2 for n in data.config.patch)]))
        return found

    def test_foreground_patches_are_centred_on_organs_equally(self, coded_case: CachedCase) -> None:
        data = dataset([coded_case], sampling=ALWAYS, patch=(2, 2, 2), steps=25)
        labelled = {tuple(c) for c in coded_case.case.attributes["centres"]["liver"]}
        taught = {tuple(c) for c in coded_case.teachers["two"].attributes["centres"]["spleen"]}
        middles = [tuple(int(v) for v in middle) for _, middle in self.middles(data)]
        # Those at the very edge are pushed inside; all others hit a stored voxel.
        hits = {"liver": 0, "spleen": 0}
        for middle in middles:
            hits["liver"] += middle in labelled and middle not in taught
            hits["spleen"] += middle in taught and middle not in labelled
        assert min(hits.values()) > 0.25 * len(middles)
