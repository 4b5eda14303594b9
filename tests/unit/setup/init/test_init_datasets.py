from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from pipeline.data.nifti import read_grid
from pipeline.data.registry import load_registry
from pipeline.errors import ConfigError, PipelineError, RegistryError
from pipeline.setup.init.begin import InitRequest, begin, draft
from pipeline.setup.topology import propose_grid

V2 = {
    "channel_names": {"0": "CT"},
    "labels": {"background": 0, "liver": 1, "cancer": 2},
    "numTraining": 2,
    "file_ending": ".nii.gz",
}


def put(root: Path, *names: str) -> Path:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()
    return root


def nnunet(root: Path, **changes: Any) -> Path:
    put(root, *(f"imagesTr/ct_{n}_0000.nii.gz" for n in (1, 2)))
    put(root, *(f"labelsTr/ct_{n}.nii.gz" for n in (1, 2)))
    (root / "dataset.json").write_text(json.dumps(V2 | changes))
    return root


def start(folder: Path, *datasets: str, **wishes: Sequence[str]) -> Path:
    path = folder / "data_registry.yaml"
    begin(path, InitRequest(datasets, **wishes))  # type: ignore[arg-type]
    return path


def refused(folder: Path, *datasets: str, **wishes: Sequence[str]) -> str:
    """The message; nothing was written."""
    before = sorted(folder.rglob("*"))
    with pytest.raises(PipelineError) as caught:
        start(folder, *datasets, **wishes)
    assert caught.value.exit_code == 2
    assert sorted(folder.rglob("*")) == before
    return str(caught.value)


class TestLayouts:
    def test_nnunet_raw(self, tmp_path: Path) -> None:
        nnunet(tmp_path / "Dataset003_Liver")
        path = start(tmp_path, f"liver-ct={tmp_path}/Dataset003_Liver:liver=1+2")
        found = load_registry(path)
        assert [case.case for case in found.cases("liver-ct")] == ["ct_1", "ct_2"]
        assert found.datasets["liver-ct"].annotated == {"liver": (1, 2)}
        assert found.organs == {"liver": 1}
        assert "1 liver, 2 cancer" in path.read_text()

    def test_nnunet_raw_of_files_that_it_lists(self, tmp_path: Path) -> None:
        put(tmp_path / "d", "a/x.nii.gz", "b/y.nii.gz")
        listed = {"case_x": {"images": ["a/x.nii.gz"], "label": "b/y.nii.gz"}}
        (tmp_path / "d" / "dataset.json").write_text(json.dumps(V2 | {"dataset": listed}))
        found = load_registry(start(tmp_path, f"d={tmp_path}/d:liver=1,background=2"))
        (case,) = found.cases("d")
        assert (case.case, case.image.name, case.label.name) == ("case_x", "x.nii.gz", "y.nii.gz")
        assert found.datasets["d"].background_values == (2,)

    def test_nnunets_ignore_label_teaches_nothing(self, tmp_path: Path) -> None:
        nnunet(tmp_path / "d", labels={"background": 0, "liver": 1, "ignore": 2})
        found = load_registry(start(tmp_path, f"d={tmp_path}/d", organs=["liver"]))
        assert found.datasets["d"].ignore_values == (2,)

    def test_regions_of_nnunet_share_values(self, tmp_path: Path) -> None:
        nnunet(tmp_path / "d", labels={"background": 0, "liver": [1, 2], "cancer": 2})
        found = load_registry(start(tmp_path, f"d={tmp_path}/d", organs=["liver"]))
        assert found.datasets["d"].annotated == {"liver": (1, 2)}

    def test_regions_of_another_name_are_asked_for_together(self, tmp_path: Path) -> None:
        labels = {"background": 0, "kidney": [1, 2, 3], "masses": [2, 3], "tumor": 2}
        nnunet(tmp_path / "d", labels=labels)
        said = refused(tmp_path, f"d={tmp_path}/d", organs=["liver", "kidneys"])
        assert "for example, liver=1+2+3 or kidneys=1+2+3 or background=1+2+3" in said

    def test_the_ct_among_several_channels(self, tmp_path: Path) -> None:
        nnunet(tmp_path / "d", channel_names={"0": "PET", "1": "CT"})
        put(tmp_path / "d", "imagesTr/ct_1_0001.nii.gz", "imagesTr/ct_2_0001.nii.gz")
        found = load_registry(start(tmp_path, f"d={tmp_path}/d:liver=1+2"))
        assert found.cases("d")[0].image.name == "ct_1_0001.nii.gz"

    def test_decathlon(self, tmp_path: Path) -> None:
        root = put(tmp_path / "Task09_Spleen", "imagesTr/._spleen_2.nii.gz")
        names = ("spleen_2", "spleen_10")
        put(root, *(f"{f}/{n}.nii.gz" for f in ("imagesTr", "labelsTr") for n in names))
        content = {
            "name": "Spleen", "licence": "CC-BY-SA 4.0", "modality": {"0": "CT"},
            "labels": {"0": "background", "1": "spleen"},
            "training": [
                {"image": f"./imagesTr/{n}.nii.gz", "label": f"./labelsTr/{n}.nii.gz"}
                for n in names
            ],
            "test": ["./imagesTs/spleen_1.nii.gz"],
        }  # fmt: skip
        (root / "dataset.json").write_text(json.dumps(content))
        found = load_registry(start(tmp_path, f"spleen={root}", organs=["spleen=7"]))
        entry = found.datasets["spleen"]
        assert (entry.images, entry.labels) == ("imagesTr/{case}.nii.gz", "labelsTr/{case}.nii.gz")
        assert (entry.annotated, entry.licence) == ({"spleen": (1,)}, "CC-BY-SA 4.0")
        assert found.organs == {"spleen": 7}

    def test_a_decathlon_list_of_fewer_cases_than_lie_there(self, tmp_path: Path) -> None:
        root = put(tmp_path / "t", *(f"{f}/a{n}.nii.gz" for f in ("im", "la") for n in (1, 2)))
        training = [{"image": "im/a1.nii.gz", "label": "la/a1.nii.gz"}]
        content = {"labels": {"1": "liver"}, "training": training}
        (root / "dataset.json").write_text(json.dumps(content))
        found = load_registry(start(tmp_path, f"t={root}", organs=["liver"]))
        assert [case.case for case in found.cases("t")] == ["a1"]

    def test_a_monai_datalist_keeps_its_split(self, tmp_path: Path) -> None:
        cases = {"training": ("p1", "p2"), "validation": ("p3",), "testing": ("p4",)}
        root = put(tmp_path / "m", *(f"{n}/{f}.nii.gz" for c in cases.values() for n in c
                                     for f in ("ct", "seg")))  # fmt: skip
        content: dict[str, list[dict[str, str]]] = {
            key: [{"image": f"{n}/ct.nii.gz", "label": f"{n}/seg.nii.gz"} for n in names]
            for key, names in cases.items()
        }
        content["testing"].append({"image": "p5/ct.nii.gz"})
        (root / "dataset_0.json").write_text(json.dumps(content))
        path = start(tmp_path, f"m={root}/dataset_0.json:liver=1")
        found = load_registry(path)
        assert {case.image.parent.name: case.split for case in found.cases("m")} == {
            "p1": "train", "p2": "train", "p3": "validation", "p4": "test"
        }  # fmt: skip
        assert "1 cases without a label are left out" in path.read_text()
        other = tmp_path / "other"
        assert load_registry(start(other, f"m={root}:liver=1")).datasets == found.datasets

    @pytest.mark.parametrize(
        "pair",
        [
            ("images/{}.nii.gz", "labels/{}.nii.gz"),
            ("scans/{}.nii", "masks/{}_seg.nii"),
            ("img/img{}.nii.gz", "label/label{}.nii.gz"),
            ("volume-{}.nii", "segmentation-{}.nii"),
            ("Batch 1/volume-{}.nii", "Batch 1/segmentation-{}.nii"),
            ("case_{}/imaging.nii.gz", "case_{}/segmentation.nii.gz"),
        ],
    )
    def test_plain_pairs(self, tmp_path: Path, pair: tuple[str, str]) -> None:
        root = tmp_path / "some"
        put(root, *(name.format(n) for name in pair for n in ("0001", "0002")))
        found = load_registry(start(tmp_path, f"a={root}:liver=1"))
        files = [(case.image, case.label) for case in found.cases("a")]
        assert files == [tuple(root / p.format(n) for p in pair) for n in ("0001", "0002")]

    def test_files_that_only_the_user_knows(self, tmp_path: Path) -> None:
        root = put(tmp_path / "x", "t1_A.nii.gz", "t1_B.nii.gz")
        files = ["x={case}_A.nii.gz,{case}_B.nii.gz"]
        found = load_registry(start(tmp_path, f"x={root}:liver=1", files=files))
        assert [case.case for case in found.cases("x")] == ["t1"]


class TestRefused:
    def test_what_is_not_said_is_asked_for_all_at_once(self, tmp_path: Path) -> None:
        nnunet(tmp_path / "d")
        put(tmp_path / "p", "images/a.nii.gz", "labels/a.nii.gz")
        said = refused(tmp_path, f"d={tmp_path}/d:liver=1", f"p={tmp_path}/p")
        assert "2 things are not known" in said
        assert "label value 2 (cancer)" in said
        assert "liver=1+2 or background=2 or ignore=2" in said
        assert "--dataset p: nothing names its label values" in said

    def test_no_organ_is_guessed_from_a_name_that_nobody_uses(self, tmp_path: Path) -> None:
        nnunet(tmp_path / "d")
        assert "which organs the student is to know" in refused(tmp_path, f"d={tmp_path}/d")
        assert "label value 1 (liver), 2 (cancer)" in refused(
            tmp_path, f"d={tmp_path}/d", organs=["hepar"]
        )

    def test_words_that_contradict_the_file(self, tmp_path: Path) -> None:
        nnunet(tmp_path / "d", labels={"background": 0, "liver": 1, "spleen": 2})
        swapped = refused(tmp_path, f"d={tmp_path}/d:liver=2,spleen=1")
        assert "liver is label value 1, not 2" in swapped
        assert "There: 1 is liver, 2 is spleen" in swapped
        assert "no label value 3" in refused(tmp_path, f"d={tmp_path}/d:liver=1+3,spleen=2")

    def test_one_value_means_one_thing(self, tmp_path: Path) -> None:
        nnunet(tmp_path / "d")
        said = refused(tmp_path, f"d={tmp_path}/d:liver=1+2,background=2")
        assert "2 is both liver and background" in said

    @pytest.mark.parametrize(
        ("changes", "expected"),
        [
            ({"channel_names": {"0": "MRI"}}, "channels are MRI"),
            ({"channel_names": {"0": "T1", "1": "T2"}}, "channels are T1, T2"),
            ({"file_ending": ".png"}, "only NIfTI"),
            ({"labels": {"background": 0, "liver": "one"}}, "`labels` cannot be read"),
        ],
    )
    def test_folders_of_something_else(
        self, tmp_path: Path, changes: dict[str, Any], expected: str
    ) -> None:
        nnunet(tmp_path / "d", **changes)
        assert expected in refused(tmp_path, f"d={tmp_path}/d:liver=1+2")

    def test_two_readings_of_plain_files(self, tmp_path: Path) -> None:
        put(tmp_path / "p", "images/a.nii.gz", "labels/a.nii.gz", "masks/a.nii.gz")
        said = refused(tmp_path, f"p={tmp_path}/p:liver=1")
        assert "more than one way" in said
        assert "--files" in said

    def test_a_file_per_structure(self, tmp_path: Path) -> None:
        put(tmp_path / "p", "s1/ct.nii.gz", "s1/segmentations/liver.nii.gz")
        assert "one label map" in refused(tmp_path, f"p={tmp_path}/p:liver=1")

    def test_listed_files_that_are_not_there(self, tmp_path: Path) -> None:
        root = put(tmp_path / "m", "a.nii.gz")
        content = {"training": [{"image": "a.nii.gz", "label": "b.nii.gz"}]}
        (root / "list.json").write_text(json.dumps(content))
        assert "the first is b.nii.gz" in refused(tmp_path, f"m={root}:liver=1")

    def test_an_image_without_label_is_named_under_the_registrys_own_name(
        self, tmp_path: Path
    ) -> None:
        nnunet(tmp_path / "d")
        put(tmp_path / "d", "imagesTr/ct_9_0000.nii.gz")
        said = refused(tmp_path, f"d={tmp_path}/d:liver=1+2")
        assert "images without a label" in said
        assert "ct_9" in said
        assert "tmp:" not in said.replace(str(tmp_path), "")

    def test_rest_means_nothing_where_nothing_is_named(self, tmp_path: Path) -> None:
        put(tmp_path / "p", "images/a.nii.gz", "labels/a.nii.gz")
        assert "List them" in refused(tmp_path, f"p={tmp_path}/p:liver=1,background=rest")

    def test_an_existing_registry_stays(self, tmp_path: Path) -> None:
        nnunet(tmp_path / "d")
        path = tmp_path / "data_registry.yaml"
        mine = "schema_version: 1\norgans: {}\ndatasets: {}\n"
        path.write_text(mine)
        with pytest.raises(RegistryError, match="--force"):
            begin(path, InitRequest([f"d={tmp_path}/d:liver=1+2"]))
        with pytest.raises(ConfigError):
            begin(path, InitRequest([f"d={tmp_path}/d:liver=1"]), force=True)
        assert path.read_text() == mine
        begin(path, InitRequest([f"d={tmp_path}/d:liver=1+2"]), force=True)
        assert load_registry(path).organs == {"liver": 1}


@pytest.mark.parametrize("force", [False, True])
def test_a_file_that_is_no_registry_stays(tmp_path: Path, force: bool) -> None:
    nnunet(tmp_path / "d")
    notes = tmp_path / "notes.txt"
    notes.write_text("the datasets of Monday")
    for look_or_begin in (draft, begin):
        with pytest.raises(ConfigError) as caught:
            look_or_begin(notes, InitRequest([f"d={tmp_path}/d:liver=1+2"]), force=force)
        assert str(caught.value) == (
            f"{notes}: `pipeline init` did not write this file and does not replace it. Name "
            "another file with -r."
        )
    assert notes.read_text() == "the datasets of Monday"


def test_rest_is_background_where_the_file_names_it(tmp_path: Path) -> None:
    labels = {"background": 0, "aorta": 1, "liver": 2, "colon": 3}
    nnunet(tmp_path / "d", labels=labels)
    found = load_registry(start(tmp_path, f"d={tmp_path}/d:liver=2,background=rest"))
    assert found.datasets["d"].background_values == (1, 3)


def test_paths_are_relative_to_the_registry(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    nnunet(tmp_path / "data" / "d")
    monkeypatch.chdir(tmp_path)
    found = load_registry(start(Path("project"), "d=data/d:liver=1+2"))
    assert found.datasets["d"].root == "../data/d"


class TestQuestions:
    def test_answers_go_into_the_registry(self, tmp_path: Path) -> None:
        nnunet(tmp_path / "d", labels={"background": 0, "liver": 1, "cancer": 2, "node": 3})
        put(tmp_path / "p", "images/a.nii.gz", "labels/a.nii.gz")
        answers = iter(["liver", "hepar", "liver", "background", "spleen=1", "liver=4"])
        asked: list[str] = []

        def ask(question: str) -> str:
            asked.append(question)
            return next(answers)

        path = tmp_path / "data_registry.yaml"
        begin(path, InitRequest([f"d={tmp_path}/d", f"p={tmp_path}/p"]), ask=ask)
        found = load_registry(path)
        assert found.datasets["d"].annotated == {"liver": (1, 2)}
        assert found.datasets["d"].background_values == (3,)
        assert found.datasets["p"].annotated == {"liver": (4,)}
        assert "liver, cancer, node" in asked[0]
        assert asked[1] == asked[2]
        assert "spleen is none of the organs (liver)" in asked[5]


def test_the_files_own_spacings_stand_beside_the_grid(tiny_registry: Path, tmp_path: Path) -> None:
    data = tiny_registry.parent / "data" / "liver-ct"
    path = start(tmp_path, f"liver={data}:liver=1")
    (note,) = [line for line in path.read_text().splitlines() if "Median spacing" in line]
    assert "(3 files)" in note
    spacings = [read_grid(file).spacing_mm for file in (data / "images").iterdir()]
    assert str([round(sorted(axis)[1], 2) for axis in zip(*spacings, strict=True)]) in note


def test_the_grid_is_what_fits_the_files(tiny_registry: Path, tmp_path: Path) -> None:
    data = tiny_registry.parent / "data" / "liver-ct"
    path = start(tmp_path, f"liver={data}:liver=1")
    grids = [read_grid(file) for file in (data / "images").iterdir()]
    proposed = propose_grid(grids)
    assert load_registry(path).grid.spacing_mm == proposed.spacing_mm
    assert f"# Proposed: {proposed.why}." in path.read_text()


def test_files_without_voxels_get_a_grid_all_the_same(tmp_path: Path) -> None:
    put(tmp_path / "d", "images/a.nii.gz", "labels/a.nii.gz")
    path = start(tmp_path, f"d={tmp_path}/d:liver=1")
    assert load_registry(path, files=False).grid.spacing_mm == (3.0, 1.5, 1.5)
    assert "Proposed" not in path.read_text()


def test_one_seed_by_which_every_dataset_validates(tmp_path: Path) -> None:
    """By seed 0 none of a to d is below 0.2; a name in two datasets is in one split."""
    for name, cases in (("one", "abcd"), ("two", "cdef")):
        put(
            tmp_path / name, *(f"{part}/{c}.nii.gz" for part in ("images", "labels") for c in cases)
        )
    path = start(tmp_path, f"one={tmp_path}/one:liver=1", f"two={tmp_path}/two:liver=1")
    registry = load_registry(path)
    assert registry.empty_splits() == []
    one, two = ({c.case: c.split for c in registry.cases(name)} for name in ("one", "two"))
    assert [one[c] for c in "cd"] == [two[c] for c in "cd"]
    assert registry.datasets["one"].split.seed == registry.datasets["two"].split.seed > 0


class TestAllNamesDecide:
    """Not one that ends in _0000; and no file among the images is left out unsaid."""

    def listed(self, root: Path, cases: Sequence[str]) -> Path:
        put(root, *(f"{part}/{c}.nii.gz" for part in ("imagesTr", "labelsTr") for c in cases))
        lists = [
            {"image": f"./imagesTr/{c}.nii.gz", "label": f"./labelsTr/{c}.nii.gz"} for c in cases
        ]
        content = {"labels": {"0": "background", "1": "liver"}, "training": lists}
        (root / "dataset.json").write_text(json.dumps(content))
        return root

    @pytest.mark.parametrize("cases", [["a", "b", "scan_0000"], ["ct_0000", "ct_0001"]])
    def test_a_list_is_no_nnunet_folder(self, tmp_path: Path, cases: list[str]) -> None:
        self.listed(tmp_path / "d", cases)
        found = load_registry(start(tmp_path, f"d={tmp_path}/d", organs=["liver"]))
        assert [case.case for case in found.cases("d")] == cases

    def test_nnunet_of_version_1_is_one(self, tmp_path: Path) -> None:
        root = self.listed(tmp_path / "d", ["a", "b"])
        for case in "ab":
            path = root / "imagesTr" / f"{case}.nii.gz"
            path.rename(path.with_name(f"{case}_0000.nii.gz"))
        found = load_registry(start(tmp_path, f"d={tmp_path}/d", organs=["liver"]))
        assert [case.image.name for case in found.cases("d")] == ["a_0000.nii.gz", "b_0000.nii.gz"]

    @pytest.mark.parametrize("cases", [["a", "b", "scan_0000"], ["ct_0000", "ct_0001"]])
    def test_plain_folders(self, tmp_path: Path, cases: list[str]) -> None:
        put(tmp_path / "d", *(f"{p}/{c}.nii.gz" for p in ("images", "labels") for c in cases))
        found = load_registry(start(tmp_path, f"d={tmp_path}/d:liver=1"))
        assert [case.case for case in found.cases("d")] == cases

    def test_two_endings_in_one_folder(self, tmp_path: Path) -> None:
        put(tmp_path / "d", "images/a.nii", "images/b.nii.gz", "labels/a.nii.gz", "labels/b.nii")
        found = load_registry(start(tmp_path, f"d={tmp_path}/d:liver=1"))
        assert [case.case for case in found.cases("d")] == ["a", "b"]
        assert found.datasets["d"].images == "images/{case}.nii*"

    @pytest.mark.parametrize("mark", ["seg", "label", "mask"])
    def test_images_and_labels_in_one_folder(self, tmp_path: Path, mark: str) -> None:
        put(tmp_path / "d", *(f"{c}{end}.nii.gz" for c in "ab" for end in ("", f"_{mark}")))
        found = load_registry(start(tmp_path, f"d={tmp_path}/d:liver=1"))
        assert [(c.image.name, c.label.name) for c in found.cases("d")] == [
            (f"{c}.nii.gz", f"{c}_{mark}.nii.gz") for c in "ab"
        ]

    @pytest.mark.parametrize(
        ("files", "left"),
        [
            (("images/a_0000.nii.gz", "images/b.nii.gz", "labels/a.nii.gz"), "images/b.nii.gz"),
            (("images/a.nii.gz", "images/B.NII.GZ", "labels/a.nii.gz"), "images/B.NII.GZ"),
            (("p1/ct.nii.gz", "p1/seg.nii.gz", "p2/CT_1.nii.gz", "none/x.dcm"), "p2"),
        ],
    )
    def test_what_is_left_out_is_told_and_the_fix_works(
        self, tmp_path: Path, files: tuple[str, ...], left: str
    ) -> None:
        put(tmp_path / "d", *files)
        said = refused(tmp_path, f"d={tmp_path}/d:liver=1")
        assert f" leaves out {left}. " in said
        meant = said.split("'NAME=")[1].split("'")[0]
        found = load_registry(start(tmp_path, f"d={tmp_path}/d:liver=1", files=[f"d={meant}"]))
        assert len(found.cases("d")) == 1

    def test_a_stray_file_in_an_nnunet_folder_is_told(self, tmp_path: Path) -> None:
        put(nnunet(tmp_path / "d"), "imagesTr/ct_3.nii.gz", "imagesTr/ct_1_0001.nii.gz")
        said = refused(tmp_path, f"d={tmp_path}/d:liver=1,background=2")
        assert "labelsTr/{case}.nii.gz leaves out imagesTr/ct_3.nii.gz. Name them" in said
