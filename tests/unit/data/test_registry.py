"""Every mistake in a registry is one message with file, line and remedy, all in one run."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import yaml

from pipeline.config import digest
from pipeline.data.files import closed_cases
from pipeline.data.nifti import read_header, read_image
from pipeline.data.registry import Registry, load_registry
from pipeline.data.splits import SplitEntry
from pipeline.errors import GeometryError, RegistryError

REPOSITORY = Path(__file__).parents[3]

# Line numbers in the tests below are those of this text.
GOOD = """\
schema_version: 1
organs:
  liver: 1
  spleen: 2
grid:
  spacing_mm: [3.0, 2.0, 2.0]
datasets:
  liver-ct:
    root: data
    images: images/{case}.nii.gz
    labels: labels/{case}.nii.gz
    annotated: {liver: 1}
    ignore_values: [9]
    split: {validation: 0.25, seed: 3}
  spleen-ct:
    root: data
    pairs:
      one: {image: images/a.nii.gz, label: labels/a.nii.gz}
      two: {image: images/b.nii.gz, label: labels/b.nii.gz}
    annotated: {spleen: [1, 2]}
    split:
      train: [one]
      validation: [two]
      test: []
teachers:
  liver:
    kind: checkpoint
    weights: liver.pt
    organs: {liver: 1}
    num_channels: 2
    trained_on: liver-ct
  both:
    kind: factory
    factory: mine:build
    weights: both.pt
    organs: {liver: 1, spleen: [2, 3]}
    num_channels: 4
"""


def touch(folder: Path, names: Iterable[str]) -> None:
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Where the registry and its (empty) files lie."""
    cases = "abcd"
    touch(tmp_path / "data", [f"images/{c}.nii.gz" for c in cases])
    touch(tmp_path / "data", [f"labels/{c}.nii.gz" for c in cases])
    return tmp_path


def write(folder: Path, text: str = GOOD, *changes: tuple[str, str]) -> Path:
    for old, new in changes:
        assert text.count(old) == 1, old
        text = text.replace(old, new)
    path = folder / "registry.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def complaints(path: Path, **options: Any) -> list[str]:
    """The mistakes, each without the file's folder."""
    with pytest.raises(RegistryError) as caught:
        load_registry(path, **options)
    assert caught.value.exit_code == 2
    head, *rest = str(caught.value).replace(f"{path.parent}/", "").splitlines()
    if not rest:
        return [head]
    more = sum(map(int, re.findall(r" And (\d+) more like it", str(caught.value))))
    assert head == f"{len(rest) + more} mistakes:"
    return [line.strip() for line in rest]


def test_the_registry_of_the_repository_is_valid() -> None:
    registry = load_registry(REPOSITORY / "data_registry.yaml")
    assert registry.label_space.organs == ("liver", "spleen", "kidneys", "pancreas")
    # The numbers of the demo in the documentation are of these.
    for name in ("liver-ct", "spleen-ct", "kidney-ct", "pancreas-ct"):
        held_out = {c.case: c.split for c in registry.cases(name) if c.split != "train"}
        assert held_out == {"case_000": "validation", "case_006": "validation"}
    assert sum(len(registry.cases(name)) for name in registry.datasets) == 4 * 10 + 12


def test_the_good_registry_is_read(folder: Path) -> None:
    registry = load_registry(write(folder))
    assert registry.datasets["liver-ct"].annotated == {"liver": (1,)}
    assert registry.datasets["spleen-ct"].annotated == {"spleen": (1, 2)}
    assert registry.teachers["both"].organs == {"liver": (1,), "spleen": (2, 3)}
    assert registry.experts() == {"liver": ("both", "liver"), "spleen": ("both",)}
    assert [(c.name, c.split) for c in registry.cases("spleen-ct")] == [
        ("spleen-ct/one", "train"),
        ("spleen-ct/two", "validation"),
    ]
    (first, *_) = registry.cases("liver-ct")
    assert first.image == folder / "data/images/a.nii.gz"
    assert first.label == folder / "data/labels/a.nii.gz"
    assert registry.resolve("liver.pt") == folder / "liver.pt"


# Name -> what is put for what, and what is said of it; … stands for more words.
ONE_MISTAKE: dict[str, tuple[str, str, str]] = {
    "unknown key": (
        "    root: data\n    images",
        "    rot: 1\n    root: data\n    images",
        "9: datasets.liver-ct.rot: unknown key.…spelling",
    ),
    "unknown key at the top": (
        "schema_version: 1\n",
        "schema_version: 1\ndataset: {}\n",
        "2: dataset: unknown key. Known here: admission, datasets, grid, organs, schema_version, "
        "teachers.",
    ),
    "key written twice": (
        "  spleen: 2\n",
        "  spleen: 2\n  liver: 1\n",
        "5: organs.liver: written twice. Keep one of the two.",
    ),
    "wrong type": (
        "  liver: 1\n",
        "  liver: one\n",
        "3: organs.liver: must be a whole number…not 'one'",
    ),
    "a wrong type where a name is wanted": (
        "    trained_on: liver-ct\n",
        "    trained_on: [liver-ct]\n",
        "31: teachers.liver.trained_on: must be a text…not ['liver-ct']",
    ),
    "wrong number of values": (
        "[3.0, 2.0, 2.0]",
        "[3.0, 2.0]",
        "6: grid.spacing_mm.2: required, but missing. Add it.",
    ),
    "spacing not positive": (
        "[3.0, 2.0, 2.0]",
        "[3.0, 0.0, 2.0]",
        "6: grid.spacing_mm.1: must be greater than 0, not 0.0.",
    ),
    "another schema version": (
        "schema_version: 1",
        "schema_version: 2",
        "1: schema_version: must be 1, not 2.",
    ),
    "missing key": (
        "grid:\n  spacing_mm: [3.0, 2.0, 2.0]\n",
        "",
        "1: grid: required, but missing. Add it.",
    ),
    "organ that nobody knows": (
        "  spleen: 2\n",
        "  spleen: 2\n  aorta: 3\n",
        "5: organs.aorta: no dataset annotates aorta and no teacher knows it. "
        "Remove it, or add a dataset or teacher for it.",
    ),
    "annotated organ that is not listed": (
        "annotated: {liver: 1}",
        "annotated: {liver: 1, aorta: 2}",
        "12: datasets.liver-ct.annotated.aorta: aorta is not one of the registry's "
        "organs.…organs are: liver, spleen.",
    ),
    "expert organ that is not listed": (
        "    organs: {liver: 1}\n    num_channels: 2\n    trained_on: liver-ct",
        "    organs:\n      liver: 1\n      aorta: 0\n    num_channels: 2",
        "31: teachers.liver.organs.aorta: aorta is not one of the registry's organs.…correct its "
        "name",
    ),
    "id used twice": (
        "  spleen: 2\n",
        "  spleen: 1\n",
        "4: organs.spleen: id 1 is already used by liver. Give every organ its own id.",
    ),
    "id out of range": (
        "  spleen: 2\n",
        "  spleen: 255\n",
        "4: organs.spleen: must be less than or equal to 254, not 255.",
    ),
    "channel out of range": (
        "spleen: [2, 3]}",
        "spleen: [2, 4]}",
        "36: teachers.both.organs.spleen: channel 4 is out of range: num_channels is 4. "
        "Channels count from 0 to 3.",
    ),
    "negative channel": (
        "    organs: {liver: 1}\n",
        "    organs: {liver: -1}\n",
        "29: teachers.liver.organs.liver.0: must be greater than or equal to 0, not -1.",
    ),
    "label value with two meanings": (
        "ignore_values: [9]",
        "ignore_values: [9, 1]",
        "13: datasets.liver-ct.ignore_values: label value 1 already means liver. "
        "A label value has one meaning.",
    ),
    "label value both ignored and background": (
        "ignore_values: [9]",
        "ignore_values: [9]\n    background_values: [9]",
        "14: datasets.liver-ct.background_values: label value 9 already means ignore_values. "
        "A label value has one meaning.",
    ),
    "label value 0": (
        "annotated: {spleen: [1, 2]}",
        "annotated: {spleen: [0, 2]}",
        "20: datasets.spleen-ct.annotated.spleen: label value 0 is background. "
        "Use the organ's own value.",
    ),
    "case in two splits": (
        "validation: [two]",
        "validation: [two, one]",
        "23: datasets.spleen-ct.split.validation.1: case one is already in train. "
        "A case belongs to one split, once.",
    ),
    "split names an absent case": (
        "test: []",
        "test: [three]",
        "24: datasets.spleen-ct.split.test.0: there is no case three. "
        "Correct the name, or remove it.",
    ),
    "split half by fraction": (
        "validation: [two]",
        "validation: 0.2",
        "21: datasets.spleen-ct.split: with `train` as a list…`validation` and `test` are lists "
        "too.",
    ),
    "fraction beyond one": (
        "validation: 0.25",
        "validation: 1.5",
        "14: datasets.liver-ct.split.validation.fraction: must be less than or equal to 1…not 1.5",
    ),
    "case name that is a number": (
        "train: [one]",
        "train: [1]",
        "22: datasets.spleen-ct.split.train.0: must be a text, not 1.",
    ),
    "trained on an unknown dataset": (
        "trained_on: liver-ct",
        "trained_on: liver",
        "31: teachers.liver.trained_on: there is no dataset 'liver'. "
        "Datasets are: liver-ct, spleen-ct.",
    ),
    "trained on a dataset that lacks the organ": (
        "trained_on: liver-ct",
        "trained_on: spleen-ct",
        "31: teachers.liver.trained_on: spleen-ct does not annotate liver, so it cannot teach it. "
        "Choose the dataset that does.",
    ),
    "factory for another kind": (
        "kind: checkpoint",
        "kind: checkpoint\n    factory: mine:build",
        "26: teachers.liver: `factory: module:function` belongs to kind `factory`",
    ),
    "no factory for kind factory": (
        "    factory: mine:build\n",
        "",
        "32: teachers.both: `factory: module:function` belongs to kind `factory`",
    ),
    "factory that is no function": (
        "factory: mine:build",
        "factory: import os",
        "34: teachers.both.factory: must be module:function…not 'import os'",
    ),
    "unknown kind": ("kind: checkpoint", "kind: onnx", "27: …'nnunet' or 'factory', not 'onnx'."),
    "pattern that matches nothing": (
        "images: images/",
        "images: imgs/",
        "8: datasets.liver-ct: pattern 'imgs/{case}.nii.gz' matches nothing below data. "
        "Check `root` and `images`",
    ),
    "folder that does not exist": (
        "root: data\n    images",
        "root: dat\n    images",
        "8: datasets.liver-ct: there is no folder dat. Check `root`.",
    ),
    "pattern without a case": (
        "images: images/{case}.nii.gz",
        "images: images/*.nii.gz",
        "8: datasets.liver-ct: pattern 'images/*.nii.gz' must contain {case} exactly once.",
    ),
    "pattern that leaves the name open": (
        "images: images/{case}.nii.gz",
        "images: images/*{case}.nii.gz",
        "8: …does not say where the case's name begins and ends…put some other character between",
    ),
    "absolute pattern": (
        "images: images/{case}.nii.gz",
        "images: /images/{case}.nii.gz",
        "8: …must be relative to `root`",
    ),
    "double star inside a name": (
        "images: images/{case}.nii.gz",
        "images: im**/{case}.nii.gz",
        "8: …** must stand between slashes",
    ),
    "neither patterns nor pairs": (
        "    images: images/{case}.nii.gz\n    labels: labels/{case}.nii.gz\n",
        "",
        "8: datasets.liver-ct: name the files by `images` and `labels`, or by `pairs`.",
    ),
    "images without labels": (
        "    labels: labels/{case}.nii.gz\n",
        "",
        "8: datasets.liver-ct: `images` and `labels` belong together.",
    ),
    "pair that does not exist": (
        "label: labels/b.nii.gz",
        "label: labels/z.nii.gz",
        "15: datasets.spleen-ct: files do not exist: data/labels/z.nii.gz. "
        "Check `root` and `pairs`.",
    ),
    "one image under two names": (
        "two: {image: images/b.nii.gz",
        "two: {image: images/a.nii.gz",
        "15: datasets.spleen-ct: cases one and two have the same image images/a.nii.gz. "
        "Keep one of the two.",
    ),
    "case written twice": (
        "      two: {image",
        "      one: {image: images/c.nii.gz, label: labels/c.nii.gz}\n      two: {image",
        "19: datasets.spleen-ct.pairs.one: written twice. Keep one of the two.",
    ),
    "name that cannot name a folder": (
        "  liver:\n    kind",
        "  a/b:\n    kind",
        "26: teachers.a/b.[key]: may have letters, digits…not 'a/b'",
    ),
}


@pytest.mark.parametrize(("old", "new", "says"), ONE_MISTAKE.values(), ids=ONE_MISTAKE)
def test_one_mistake_is_one_message(old: str, new: str, says: str, folder: Path) -> None:
    (message,) = complaints(write(folder, GOOD, (old, new)))
    words = ".*".join(map(re.escape, says.split("…")))
    assert re.match(f"registry.yaml:{words}", message), message


def test_images_without_a_label_are_named(folder: Path) -> None:
    (folder / "data/labels/c.nii.gz").unlink()
    (folder / "data/labels/d.nii.gz").unlink()
    (message,) = complaints(write(folder))
    assert message.startswith("registry.yaml:8: datasets.liver-ct: images without a label")
    assert "'labels/{case}.nii.gz': c, d. Add the labels, or move these images" in message


def test_a_label_without_an_image_is_no_mistake(folder: Path) -> None:
    touch(folder, ["data/labels/e.nii.gz"])
    assert [c.case for c in load_registry(write(folder)).cases("liver-ct")] == list("abcd")


def test_long_lists_of_files_are_cut(folder: Path) -> None:
    touch(folder, [f"data/images/x{n:02}.nii.gz" for n in range(20)])
    (message,) = complaints(write(folder))
    assert "x07 and 12 more." in message
    assert "x08" not in message


def test_a_case_found_twice_is_told_with_its_files(folder: Path) -> None:
    touch(folder, ["data/images/sub/a.nii.gz", "data/labels/sub/a.nii.gz"])
    path = write(
        folder,
        GOOD,
        ("images: images/{case}", "images: images/**/{case}"),
        ("labels: labels/{case}", "labels: labels/**/{case}"),
    )
    images, labels = complaints(path)
    for message, kind in ((images, "images"), (labels, "labels")):
        assert message.startswith("registry.yaml:8: datasets.liver-ct: case a is found more than")
        assert f"data/{kind}/a.nii.gz, data/{kind}/sub/a.nii.gz. Narrow the pattern." in message


def test_all_mistakes_are_told_in_one_run(folder: Path) -> None:
    (folder / "data/labels/d.nii.gz").unlink()
    path = write(
        folder,
        GOOD,
        ("  spleen: 2\n", "  spleen: 1\n"),  # id used twice
        ("    ignore_values: [9]\n", "    ignore: [9]\n"),  # unknown key
        ("validation: 0.25", "validation: half"),  # wrong type
        ("test: []", "test: [three]"),  # absent case
        ("label: labels/b.nii.gz", "label: labels/z.nii.gz"),  # absent file
        ("organs: {liver: 1}\n", "organs: {liver: 5}\n"),  # channel out of range
        ("trained_on: liver-ct", "trained_on: nobody"),  # absent dataset
        ("    kind: factory\n", "    kind: fabric\n"),  # wrong value
    )
    found = complaints(path)
    expected = [
        (4, "already used"),
        (8, "images without a label"),
        (13, "unknown key"),
        (14, "must be a number"),
        (15, "files do not exist"),
        (24, "no case three"),
        (29, "out of range"),
        (31, "no dataset 'nobody'"),
        (33, "'nnunet' or 'factory', not"),
    ]
    assert len(found) == len(expected), found
    for message, (line, what) in zip(found, expected, strict=True):
        assert message.startswith(f"registry.yaml:{line}: ")
        assert what in message


@pytest.mark.parametrize(
    "change",
    [
        ("organs:\n  liver: 1\n  spleen: 2\n", "organs: [liver, spleen]\n"),
        ("organs:\n  liver: 1\n  spleen: 2\n", "organs: {}\n"),
        ("    annotated: {liver: 1}\n", "    annotated: liver\n"),
        ("    annotated: {liver: 1}\n", "    annotated: {liver: {a: [1]}}\n"),
        ("    split: {validation: 0.25, seed: 3}\n", "    split: 0.2\n"),
        ("    ignore_values: [9]\n", "    ignore_values: 9\n"),
        ("    num_channels: 4\n", "    num_channels: four\n"),
        ("    organs: {liver: 1, spleen: [2, 3]}\n", "    organs: {liver: 1, spleen: two}\n"),
        ("    root: data\n    pairs", "    root: [data]\n    pairs"),
    ],
)
def test_a_wrong_type_brings_no_other_complaint_with_it(
    change: tuple[str, str], folder: Path
) -> None:
    assert len({m.split(" ")[0] for m in complaints(write(folder, GOOD, change))}) <= 2
    assert any("must" in message for message in complaints(write(folder, GOOD, change)))


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (("train: [one]", "train: [0, 1]"),
         "22: datasets.spleen-ct.split.train: must be texts, not 0, 1. YAML reads them as numbers: "
         "write '0', '1' in quotes."),
        (("train: [one]", "train: [one, 0010]"),
         "22: datasets.spleen-ct.split.train.1: must be a text, not 0010. YAML reads it "
         "as a number: write '0010' in quotes."),
        (("      one: {image", "      0010: {image"),
         "18: datasets.spleen-ct.pairs.0010: must be a text, not 0010. YAML reads it "
         "as a number: write '0010' in quotes."),
        (("      one: {image", "      2024-01-01: {image"),
         "18: datasets.spleen-ct.pairs.2024-01-01: must be a text, not 2024-01-01. YAML "
         "reads it as a date: write '2024-01-01' in quotes."),
        (("trained_on: liver-ct", "trained_on: no"),
         "31: teachers.liver.trained_on: must be a text, not no. YAML reads it "
         "as a truth value: write 'no' in quotes."),
        (("      one: {image: images/a.nii.gz", "      one: {image: 12:30"),
         "18: datasets.spleen-ct.pairs.one.image: must be a text, not 12:30. YAML reads it "
         "as a number: write '12:30' in quotes."),
    ],
)  # fmt: skip
def test_what_yaml_does_not_read_as_text_is_told_in_one_line_that_names_quotes(
    folder: Path, change: tuple[str, str], says: str
) -> None:
    found = complaints(write(folder, GOOD, change))
    assert [line for line in found if "YAML" in line] == [f"registry.yaml:{says}"]


@pytest.mark.parametrize("text", ["", "[]", "7", "datasets: {}", "datasets: [1]", "teachers: 3"])
def test_a_file_that_is_no_registry_at_all(text: str, folder: Path) -> None:
    for message in complaints(write(folder, text)):
        assert message.startswith("registry.yaml:1: ")


def test_stage_two_reads_a_registry_without_the_files(folder: Path) -> None:
    path = write(folder, GOOD.replace("root: data", "root: elsewhere"))
    assert len(complaints(path)) == 2
    assert set(load_registry(path, files=False).datasets) == {"liver-ct", "spleen-ct"}
    twice = write(folder, GOOD, ("test: []", "test: [two]"))
    assert "already in validation" in complaints(twice, files=False)[0]


def test_an_absent_registry_is_told_by_its_path(tmp_path: Path) -> None:
    with pytest.raises(RegistryError, match="cannot be read") as caught:
        load_registry(tmp_path / "absent.yaml")
    assert str(tmp_path / "absent.yaml") in str(caught.value)


def cases_of(folder: Path, images: str, labels: str) -> dict[str, tuple[str, str]]:
    path = write(
        folder,
        GOOD,
        ("images/{case}.nii.gz\n    labels", f"{images}\n    labels"),
        ("labels/{case}.nii.gz\n", f"{labels}\n"),
    )
    root = folder / "data"
    return {
        c.case: (c.image.relative_to(root).as_posix(), c.label.relative_to(root).as_posix())
        for c in load_registry(path).cases("liver-ct")
    }


def test_nnunet_folders(folder: Path) -> None:
    touch(folder / "data", ["imagesTr/la_003_0000.nii.gz", "imagesTr/la_004_0000.nii.gz"])
    touch(folder / "data", ["imagesTr/la_003_0001.nii.gz", "imagesTr/._la_003_0000.nii.gz"])
    touch(folder / "data", ["labelsTr/la_003.nii.gz", "labelsTr/la_004.nii.gz"])
    found = cases_of(folder, "imagesTr/{case}_0000.nii.gz", "labelsTr/{case}.nii.gz")
    assert found == {
        "la_003": ("imagesTr/la_003_0000.nii.gz", "labelsTr/la_003.nii.gz"),
        "la_004": ("imagesTr/la_004_0000.nii.gz", "labelsTr/la_004.nii.gz"),
    }


def test_hidden_files_are_no_cases(folder: Path) -> None:
    touch(folder / "data", ["images/._a.nii.gz", "images/.b.nii.gz.17.tmp.nii.gz"])
    found = cases_of(folder, "images/{case}.nii.gz", "labels/{case}.nii.gz")
    assert list(found) == list("abcd")


def test_one_folder_per_case_at_any_depth(folder: Path) -> None:
    for case in ("x/p1", "x/y/p2", "p3"):
        touch(folder / "data/all" / case, ["ct.nii.gz", "seg.nii.gz", "other.nii.gz"])
    found = cases_of(folder, "all/**/{case}/ct.nii.gz", "all/**/{case}/seg.nii.gz")
    assert found == {
        "p1": ("all/x/p1/ct.nii.gz", "all/x/p1/seg.nii.gz"),
        "p2": ("all/x/y/p2/ct.nii.gz", "all/x/y/p2/seg.nii.gz"),
        "p3": ("all/p3/ct.nii.gz", "all/p3/seg.nii.gz"),
    }


def test_a_star_and_a_question_mark_stop_at_a_slash(folder: Path) -> None:
    touch(folder / "data", ["ct/site1/v1_p.nii.gz", "ct/site2/v2_q.nii.gz", "ct/a/b/v1_r.nii.gz"])
    touch(folder / "data", ["seg/p.nii.gz", "seg/q.nii.gz"])
    found = cases_of(folder, "ct/*/v?_{case}.nii.gz", "seg/{case}.nii.gz")
    assert list(found) == ["p", "q"]


def test_dots_and_brackets_in_a_pattern_mean_themselves(folder: Path) -> None:
    touch(folder / "data", ["im/p.nii", "im/pXnii", "seg/p.nii"])
    assert list(cases_of(folder, "im/{case}.nii", "seg/{case}.nii")) == ["p"]


class TestNamesThatCannotBeOpened:
    """They are cases by name, keep their split, and fail where they are opened."""

    @pytest.mark.parametrize("part", ["images", "labels"])
    @pytest.mark.parametrize(
        ("how", "what"),
        [
            ("gone", r"\(No such file or directory; it is a link to .*none\).*datalad get"),
            ("loop", "Too many levels of symbolic links"),
            ("folder", "it is a folder"),
            ("pipe", "it is no file"),
        ],
    )
    def test_they_are_cases(self, folder: Path, part: str, how: str, what: str) -> None:
        before = {c.case: c.split for c in load_registry(write(folder)).cases("liver-ct")}
        path = folder / "data" / part / "b.nii.gz"
        path.unlink()
        match how:
            case "gone":
                path.symlink_to("../none")
            case "loop":
                path.symlink_to(path.name)
            case "folder":
                path.mkdir()
            case "pipe":
                os.mkfifo(path)
        cases = load_registry(write(folder)).cases("liver-ct")
        assert {c.case: c.split for c in cases} == before
        (why,) = closed_cases(cases).items()
        assert why[0] == "liver-ct/b"
        assert re.search(what, why[1])
        for read in (read_image, read_header):
            with pytest.raises(GeometryError, match=what):
                read(path)

    def test_pairs_too(self, folder: Path) -> None:
        path = folder / "data/images/b.nii.gz"
        path.unlink()
        path.symlink_to("../none")
        assert set(closed_cases(load_registry(write(folder)).cases("spleen-ct"))) == {
            "spleen-ct/two"
        }

    def test_a_name_that_is_not_utf8(self, folder: Path) -> None:
        for part in ("images", "labels"):
            name = os.fsdecode(f"data/{part}/".encode() + b"f\xfcr.nii.gz")
            touch(folder, [name, f"data/{part}/grün.nii.gz"])
        cases = load_registry(write(folder)).cases("liver-ct")
        assert [c.case for c in cases] == [*"abcd", r"f\xfcr", "grün"]
        (why,) = closed_cases(cases).values()
        assert why.endswith(
            r"f\xfcr.nii.gz: the file cannot be read (its name is not UTF-8). Rename it."
        )

    @pytest.mark.skipif(os.geteuid() == 0, reason="root may look anywhere")
    def test_a_folder_that_cannot_be_looked_into(self, folder: Path) -> None:
        (folder / "data/images").chmod(0)
        try:
            message, _ = complaints(write(folder))
        finally:
            (folder / "data/images").chmod(0o755)
        assert "data/images cannot be looked into (Permission denied)." in message


class TestLinkedFolders:
    PATTERNS = ("all/**/images/{case}.nii.gz", "all/**/labels/{case}.nii.gz")

    def batches(self, folder: Path) -> Path:
        """Batch 1 below `all`, batch 2 elsewhere."""
        for number, batch in ((1, "data/all/batch1"), (2, "elsewhere")):
            touch(folder / batch, [f"{part}/x{number}.nii.gz" for part in ("images", "labels")])
        return folder / "data/all"

    def test_they_are_followed(self, folder: Path) -> None:
        (self.batches(folder) / "batch2").symlink_to(folder / "elsewhere")
        found = cases_of(folder, *self.PATTERNS)
        assert found["x1"][0] == "all/batch1/images/x1.nii.gz"
        assert found["x2"][0] == "all/batch2/images/x2.nii.gz"

    def test_a_folder_under_two_names_holds_each_case_once(self, folder: Path) -> None:
        (self.batches(folder) / "latest").symlink_to("batch1")
        assert list(cases_of(folder, *self.PATTERNS)) == ["x1"]

    @pytest.mark.parametrize("target", ["data", "data/all/batch1", "data/all/batch1/other"])
    def test_a_circle_is_a_mistake_that_names_the_link(self, folder: Path, target: str) -> None:
        inner = self.batches(folder) / "batch1/other"
        inner.mkdir()
        (inner / "up").symlink_to(folder / target)
        with pytest.raises(RegistryError, match=r"the link \S+/batch1/other/up leads in a circle"):
            cases_of(folder, *self.PATTERNS)

    @pytest.mark.parametrize("patterns", [PATTERNS, tuple(p.replace("**", "*") for p in PATTERNS)])
    def test_one_that_leads_nowhere_is_a_mistake(
        self, folder: Path, patterns: tuple[str, str]
    ) -> None:
        link = self.batches(folder) / "batch2"
        link.symlink_to(folder / "not mounted")
        (link.parent / "LICENSE").symlink_to("../.git/annex/objects/x/LICENSE")  # a file
        with pytest.raises(RegistryError) as caught:
            cases_of(folder, *patterns)
        assert "batch2 cannot be looked into (it is a link to " in str(caught.value)
        assert "LICENSE" not in str(caught.value)


def test_images_and_labels_side_by_side(folder: Path) -> None:
    touch(folder / "data", ["x/p.nii.gz", "x/p_seg.nii.gz", "x/q.nii.gz", "x/q_seg.nii.gz"])
    found = cases_of(folder, "x/{case}.nii.gz", "x/{case}_seg.nii.gz")
    assert found == {c: (f"x/{c}.nii.gz", f"x/{c}_seg.nii.gz") for c in "pq"}


def test_brackets_in_a_pattern_mean_themselves(folder: Path) -> None:
    touch(folder / "data", ["im[x]/p[1].nii", "imx/q1.nii", "seg/p.nii", "seg/q.nii"])
    assert list(cases_of(folder, "im[x]/{case}[1].nii", "seg/{case}.nii")) == ["p"]


def test_a_phantom_needs_no_files(tmp_path: Path) -> None:
    data = yaml.safe_load((REPOSITORY / "data_registry.yaml").read_text())
    path = tmp_path / "data_registry.yaml"
    path.write_text(yaml.safe_dump(data))
    cases = load_registry(path).cases("multi-organ-ct")
    assert [c.case for c in cases] == [f"case_{n:03}" for n in range(12)]
    assert cases[0].image == tmp_path / "phantom/multi-organ-ct/images/case_000.nii.gz"
    assert not cases[0].image.exists()


CASES = [f"case_{n:03}" for n in range(1000)]


def counts(split: SplitEntry, num_cases: int) -> list[int]:
    found = list(split.assign([f"c{n}" for n in range(num_cases)]).values())
    assert len(found) == num_cases
    return [found.count("train"), found.count("validation"), found.count("test")]


def test_fractions_are_shares_of_many_cases() -> None:
    train, validation, test = counts(SplitEntry(validation=0.2, test=0.3), 10_000)
    assert abs(train - 5000) < 150
    assert abs(validation - 2000) < 120
    assert abs(test - 3000) < 140
    assert counts(SplitEntry(validation=0.2), 0) == [0, 0, 0]
    assert counts(SplitEntry(validation=0.0), 300) == [300, 0, 0]
    assert counts(SplitEntry(validation=0.3, test=0.7), 300)[0] == 0
    assert counts(SplitEntry(validation=0.0, test=1.0), 300) == [0, 0, 300]


@pytest.mark.parametrize("seed", range(5))
def test_a_case_keeps_its_split_whatever_other_cases_come_or_go(seed: int) -> None:
    split = SplitEntry(validation=0.2, test=0.2, seed=seed)
    drawn = split.assign(CASES)
    for number in (1, 20, 21, 500):
        assert split.assign(CASES[:number]) == {c: drawn[c] for c in CASES[:number]}
    assert split.assign(CASES[::-7]) == {c: drawn[c] for c in CASES[::-7]}


def test_another_validation_fraction_moves_no_test_case() -> None:
    few, many = (SplitEntry(validation=v, test=0.2).assign(CASES) for v in (0.1, 0.4))
    assert [c for c in CASES if few[c] == "test"] == [c for c in CASES if many[c] == "test"]
    assert {c for c in CASES if few[c] == "validation"} < {
        c for c in CASES if many[c] == "validation"
    }


def test_a_split_by_fraction_depends_on_names_and_seed_alone() -> None:
    cases = CASES[:30]
    drawn = SplitEntry(validation=0.2, test=0.2, seed=1).assign(cases)
    assert SplitEntry(validation=0.2, test=0.2, seed=2).assign(cases) != drawn
    # Written down once: a split must stay what it is from version to version.
    parts = {s: [int(c[-2:]) for c in cases if drawn[c] == s] for s in ("validation", "test")}
    assert parts == {
        "validation": [10, 18, 21, 22, 25, 27],
        "test": [0, 3, 4, 7, 12, 13, 14, 16, 28],
    }


def test_a_patient_is_in_one_split_in_every_dataset() -> None:
    visits = [f"p{n:02}_{visit}" for n in range(100) for visit in range(2)]
    split = SplitEntry(validation=0.2, test=0.2, group=r"(p\d+)_")
    drawn = split.assign(visits)
    assert all(drawn[f"p{n:02}_0"] == drawn[f"p{n:02}_1"] for n in range(100))
    assert len(set(drawn.values())) == 3
    whole = SplitEntry(validation=0.2, test=0.2, group=r"p\d+")
    assert whole.assign(visits) == drawn
    # Another dataset, where the patient is the name and needs no group.
    names = [f"p{n:02}" for n in range(100)]
    assert SplitEntry(validation=0.2, test=0.2).assign(names) == {
        name: drawn[f"{name}_1"] for name in names
    }


GROUPED = ("seed: 3}", r"seed: 3, group: '([a-c])'}")


def test_a_name_without_a_patient_is_an_error(folder: Path) -> None:
    path = write(folder, GOOD, GROUPED)
    assert complaints(path) == [
        "registry.yaml:14: datasets.liver-ct.split.group: `group` '([a-c])' finds no patient at "
        "the beginning of these names: d. Correct the regular expression: its first (..), or all "
        "of it, is the patient."
    ]
    registry = load_registry(path, files=False)
    with pytest.raises(RegistryError, match=r"finds no patient .* names: d") as caught:
        registry.cases("liver-ct")
    assert str(caught.value).startswith(f"{path}, dataset liver-ct, split.group: ")


def test_what_is_no_regular_expression(folder: Path) -> None:
    (found,) = complaints(write(folder, GOOD, ("seed: 3}", "seed: 3, group: '(p'}")))
    assert "registry.yaml:14: " in found
    assert "'(p' is no regular expression: missing ), unterminated subpattern" in found


TABLE = ("seed: 3}", "seed: 3, group: {csv: who.csv, case: id, column: patient}}")


def test_a_table_says_whose_a_case_is(folder: Path) -> None:
    (folder / "who.csv").write_text("﻿id,age,patient\na,50,x\nb,51,x\nb,51,x\nc,60,y\nd,1,x\n")
    registry = load_registry(write(folder, GOOD, TABLE))
    drawn = {case.case: case.split for case in registry.cases("liver-ct")}
    assert drawn["a"] == drawn["b"] == drawn["d"]
    split = SplitEntry(validation=0.25, seed=3)
    assert [drawn["a"], drawn["c"]] == list(split.assign(["x", "y"]).values())
    before = registry.dataset_key("liver-ct")
    (folder / "who.csv").write_text("id,patient\na,x\nb,x\nc,y\nd,z\n")
    assert load_registry(registry.path, files=False).dataset_key("liver-ct") != before


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (None, "who.csv: cannot be read ([Errno 2]"),
        ("id,who\na,x\n", "who.csv: there is no column 'patient'. Columns, divided by commas: id"),
        ("", "who.csv: there is no column 'id'. Columns, divided by commas: none."),
        ("id,patient\na,x\nb,\n", "who.csv:3: case 'b' has no patient. Give every case one "),
        ("id,patient\na,x\na,y\n", "who.csv:3: case 'a' has two patients, x and y. Give "),
        ("id,patient\na,x\nc,x\n", "`group` does not say whose these cases are: b, d. Add a "),
    ],
)  # fmt: skip
def test_tables_that_do_not_say_whose_a_case_is(text: str | None, says: str, folder: Path) -> None:
    if text is not None:
        (folder / "who.csv").write_text(text)
    (found,) = complaints(write(folder, GOOD, TABLE))
    assert found.startswith("registry.yaml:14: datasets.liver-ct.split.group: ")
    assert says in found


def test_a_patient_in_two_lists_or_two_datasets_is_an_error(folder: Path) -> None:
    listed = "split: {train: [a, b], validation: [c], test: [d], group: '.'}"
    assert load_registry(write(folder, GOOD, ("split: {validation: 0.25, seed: 3}", listed)))
    (folder / "who.csv").write_text("id,patient\na,x\nb,x\nc,y\nd,x\none,z\ntwo,z\n")
    table = "{csv: who.csv, case: id, column: patient}"
    one = ("split: {validation: 0.25, seed: 3}", listed.replace("'.'", table))
    (found,) = complaints(write(folder, GOOD, one))
    assert "split.group: patient x is in two splits: d in test, a of liver-ct in train. " in found
    assert found.endswith(
        "with fractions, give all the same `seed` and fractions; in lists, move the case."
    )
    fraction = "split: {validation: 0.0, test: 0.0, group: '.'}"
    other = "split: {train: [], validation: [], test: [two, one], group: '.'}"
    spleens = (
        "split:\n      train: [one]\n      validation: [two]\n      test: []\n",
        other + "\n",
    )
    both = ("split: {validation: 0.25, seed: 3}", fraction)
    assert load_registry(write(folder, GOOD, both, spleens))  # a to d, o and t
    pairs = (("one: {", "a1: {"), ("two: {", "b1: {"), ("test: [two, one]", "test: [a1, b1]"))
    (found,) = complaints(write(folder, GOOD, both, spleens, *pairs))
    assert (
        "datasets.spleen-ct.split.group: patient a is in two splits: a1 in test, a of liver-ct in "
        in found
    )
    assert "train (and 1 more)." in found


def test_many_mistakes_alike_are_told_in_one_line(folder: Path) -> None:
    """One mistake, made a thousand times by a program that wrote the file."""
    names = [f"x{n}" for n in range(1000)]
    split = f"split: {{train: {names}, validation: {list(range(500))}, test: [y, z]}}"
    first = ("split: {validation: 0.25, seed: 3}", split)
    pairs = "".join(f"      c{n}: {{image: a.nii, labels: b.nii}}\n" for n in range(50))
    found = complaints(write(folder, GOOD, first, ("    pairs:\n", f"    pairs:\n{pairs}")))
    assert len(found) == 6
    assert found[0].startswith("registry.yaml:14: datasets.liver-ct.split.")
    assert "must be texts, not 0, 1, 2 and 497 more." in found[0]
    assert "there is no case x0. Correct the name, or remove it. And 999 more like" in found[1]
    assert "there is no case y" in found[2]
    assert "there is no case z" in found[3]
    assert "pairs.c0.label: required, but missing. Add it. And 49 more like it." in found[4]
    assert "pairs.c0.labels: unknown key." in found[5]


def test_an_empty_split_is_told_and_not_mended(folder: Path) -> None:
    registry = load_registry(write(folder, GOOD, ("0.25, seed: 3", "0.2, seed: 0")))
    assert {case.split for case in registry.cases("liver-ct")} == {"train"}
    (found,) = registry.empty_splits()
    assert found == (
        "dataset liver-ct: none of its 4 cases falls into validation (0.2). Choose another `seed` "
        "(`seed: 1` has some in each) or fraction, or name the cases by lists."
    )
    assert registry.empty_splits(["test"]) == []
    mended = load_registry(write(folder, GOOD, ("0.25, seed: 3", "0.2, seed: 1")))
    assert mended.empty_splits() == []
    one = {case.split for case in mended.cases("liver-ct")}
    assert one == {"train", "validation"}


def test_what_fractions_used_to_mean_can_be_written_down_as_lists(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The program of docs/registry.md; numbers are those of the older rule's own test."""
    names = [f"case_{n:03}" for n in range(30)]
    touch(folder / "many", [f"{part}/{c}.nii.gz" for part in ("images", "labels") for c in names])
    changes = (
        ("    root: data\n    images", "    root: many\n    images"),
        ("{validation: 0.25, seed: 3}", "{validation: 0.2, test: 0.2, seed: 1}"),
    )
    path = write(folder, GOOD, *changes)
    page = (REPOSITORY / "docs" / "registry.md").read_text()
    (program,) = [b.split("```")[0] for b in page.split("```python\n") if "old_splits.py" in b]
    monkeypatch.setattr("sys.argv", ["old_splits.py", str(path)])
    exec(program, {})
    name, line = capsys.readouterr().out.splitlines()
    assert name == "liver-ct:"
    old = "split: {validation: 0.2, test: 0.2, seed: 1}"
    path.write_text(path.read_text().replace(old, line.strip()))
    registry = load_registry(path)
    found = {case.case: case.split for case in registry.cases("liver-ct")}
    assert sorted(found) == names
    assert [int(c[-2:]) for c in names if found[c] == "validation"] == [0, 4, 12, 13, 14, 16]
    assert list(found.values()).count("test") == 6


def test_a_key_changes_where_the_cases_may_have_moved(folder: Path) -> None:
    """By fractions, in an index of before there were thresholds; not by lists."""
    registry = load_registry(write(folder, GOOD), files=False)
    for name, stays in (("liver-ct", False), ("spleen-ct", True)):
        placeless = {"licence", "source", "root", "images", "labels", "pairs"}
        entry = registry.datasets[name].model_dump(mode="json", exclude=placeless)
        del entry["split"]["group"]
        ids = {organ: registry.organs[organ] for organ in registry.datasets[name].annotated}
        before = digest({"dataset": entry, "ids": ids, "grid": registry.grid})
        assert (registry.dataset_key(name) == before) is stays


def test_a_split_by_list_leaves_out_what_it_does_not_name(folder: Path) -> None:
    change = (
        "split: {validation: 0.25, seed: 3}",
        "split: {train: [d], validation: [a], test: [b]}",
    )
    cases = load_registry(write(folder, GOOD, change)).cases("liver-ct")
    assert {c.case: c.split for c in cases} == {"a": "validation", "b": "test", "d": "train"}


@pytest.mark.parametrize(
    ("validation", "test", "train", "says"),
    [
        (("a",), ("b",), None, "names `train` too"),
        (0.2, 0.2, ("a",), "lists too"),
        (0.7, 0.7, None, "more than 1"),
    ],
)
def test_splits_that_make_no_sense(validation: Any, test: Any, train: Any, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        SplitEntry(validation=validation, test=test, train=train)


def test_folds_are_dealt_evenly_and_patients_stay_whole() -> None:
    cases = [f"p{n:02}_{visit}" for n in range(23) for visit in range(1 + n % 3)]
    split = SplitEntry(folds=5, test=0.2, group=r"(p\d+)_")
    drawn = split.assign(cases)
    of = {case: case.split("_")[0] for case in cases}
    folds = [{of[c] for c, place in drawn.items() if place == k} for k in range(5)]
    assert max(map(len, folds)) - min(map(len, folds)) <= 1
    assert sum(map(len, folds)) == len(set.union(*folds))
    # The test cases are those of a split by fraction, and a seed deals otherwise.
    fraction = SplitEntry(validation=0.0, test=0.2, group=r"(p\d+)_").assign(cases)
    assert {c for c in cases if drawn[c] == "test"} == {c for c in cases if fraction[c] == "test"}
    assert split.assign(cases[::-1]) == drawn
    assert split.model_copy(update={"seed": 1}).assign(cases) != drawn
    # What is left over goes to other folds in other datasets.
    seven = SplitEntry(folds=5).assign
    starts = {
        tuple(list(seven(CASES[:7], None, name).values()).count(k) for k in range(5))
        for name in "abcdefgh"
    }
    assert len(starts) > 2
    named = SplitEntry(folds=3, test=("case_000", "gone")).assign(CASES[:4])
    assert named.pop("case_000") == "test"
    assert sorted(map(str, named.values())) == ["0", "1", "2"]


FOLDS = "split: {folds: [[a, b], [c]], test: [d], group: '.'}"
SPLEENS = "split:\n      train: [one]\n      validation: [two]\n      test: []\n"


def in_folds(folder: Path, first: str, second: str = "split: {folds: 2}") -> Path:
    changes = ("split: {validation: 0.25, seed: 3}", first), (SPLEENS, f"{second}\n")
    return write(folder, GOOD, *changes)


def test_a_fold_validates_while_the_others_train(folder: Path) -> None:
    known = load_registry(in_folds(folder, FOLDS))
    assert (known.num_folds, known.fold) == (2, None)
    cases = {c.case: (c.split, c.fold) for c in known.on_fold(1).cases("liver-ct")}
    assert cases == {
        "a": ("train", 0), "b": ("train", 0), "c": ("validation", 1), "d": ("test", None)
    }  # fmt: skip
    # Whoever chose none sees the first one; and no digest knows what was chosen.
    assert known.cases("liver-ct") == known.on_fold(0).cases("liver-ct")
    assert known.dataset_key("liver-ct") == known.on_fold(1).dataset_key("liver-ct")
    with pytest.raises(RegistryError, match=r"no fold 2\. Folds are 0 to 1\."):
        known.on_fold(2)
    plain = load_registry(write(folder, GOOD))
    with pytest.raises(RegistryError, match=r"no dataset is in folds\. Write `split: {folds: 5}`"):
        plain.on_fold(0)


@pytest.mark.parametrize(
    ("first", "second", "says"),
    [
        (FOLDS.replace("[c]", "[c, a]"), None, "case a is already in fold 0"),
        ("split: {folds: [[a, b], [c, e]]}", None, "split.folds.1.1: there is no case e."),
        ("split: {folds: 5}", "split: {folds: 5}", "5 folds are more than it has patients to deal"),
        ("split: {folds: 2}", "split: {folds: 3}", "another dataset is in 3 folds, this one has 2"),
        (
            "split: {folds: 2}", "split: {validation: 0.5}",
            "in 2 folds, this one has validation cases and no folds. Write `folds: 2`, or",
        ),
        ("split: {folds: 2, validation: 0.2}", None, "leave out validation"),
        ("split: {folds: [[a], [b]], test: 0.2}", None, "`test` is a list too"),
        ("split: {folds: [[a, b, c], []]}", None, "split.folds"),
        ("split: {folds: 1}", None, "split.folds"),
    ],
)  # fmt: skip
def test_folds_that_make_no_sense(folder: Path, first: str, second: str | None, says: str) -> None:
    found = complaints(in_folds(folder, first, second or "split: {validation: 0.0}"))
    assert any(says in line for line in found), found


def test_a_patient_in_two_folds_is_an_error(folder: Path) -> None:
    (folder / "who.csv").write_text("id,patient\na,x\nb,y\nc,x\nd,z\n")
    table = "{csv: who.csv, case: id, column: patient}"
    (found,) = complaints(in_folds(folder, FOLDS.replace("'.'", table)))
    assert "patient x is in two splits: c in fold 1, a of liver-ct in fold 0. " in found
    assert found.endswith(
        "A patient belongs to one fold, in all datasets: name the folds by lists."
    )


def keys(folder: Path, *changes: tuple[str, str]) -> tuple[str, str]:
    registry = load_registry(write(folder, GOOD, *changes), files=False)
    return registry.dataset_key("liver-ct"), registry.teacher_key("liver")


@pytest.mark.parametrize(
    ("change", "dataset_changes", "teacher_changes"),
    [
        # Where files lie is no meaning: what moved is found again, by its bytes.
        (("    root: data\n    images", "    root: ./data\n    images"), False, False),
        (("images: images/", "images: other/"), False, False),
        (("weights: liver.pt", "weights: other.pt"), False, False),
        (("annotated: {liver: 1}", "annotated: {liver: 2}"), True, False),
        (("ignore_values: [9]", "ignore_values: [8]"), True, False),
        (("ignore_values: [9]", "background_values: [9]"), True, False),
        (("seed: 3", "seed: 4"), True, False),
        (("  liver: 1\n", "  liver: 7\n"), True, False),
        (("[3.0, 2.0, 2.0]", "[3.0, 2.0, 2.5]"), True, True),
        (("organs: {liver: 1}\n", "organs: {liver: 0}\n"), False, True),
        (("num_channels: 2", "taps: [model.1]"), False, True),
        (("num_channels: 2", "intensity: {window_hu: [-100, 100]}"), False, True),
        (("  spleen: 2\n", "  spleen: 5\n"), False, False),
        (("[3.0, 2.0, 2.0]", "[3, 2, 2]"), False, False),
        (("annotated: {liver: 1}", "annotated: {liver: [1]}"), False, False),
        (("annotated: {liver: 1}", "annotated: {liver: 1}\n    licence: CC0"), False, False),
        (("annotated: {liver: 1}", "annotated: {liver: 1}\n    source: me"), False, False),
        (("weights: liver.pt", "weights: liver.pt\n    licence: CC0"), False, False),
        (("weights: liver.pt", "weights: liver.pt\n    source: me"), False, False),
        (("weights: both.pt", "weights: neither.pt"), False, False),
        (("weights: liver.pt", "weights: liver.pt\n    admission: {dice: 0.7}"), False, False),
        (
            ("schema_version: 1", "schema_version: 1\nadmission: {dice: 0.4, cases: 1}"),
            False,
            False,
        ),
    ],
)
def test_keys_change_with_what_matters(
    change: tuple[str, str], dataset_changes: bool, teacher_changes: bool, folder: Path
) -> None:
    dataset, teacher = keys(folder)
    new_dataset, new_teacher = keys(folder, change)
    assert (new_dataset != dataset, new_teacher != teacher) == (dataset_changes, teacher_changes)


def test_reading_a_registry_runs_nothing_that_it_names(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ran = folder / "ran"
    (folder / "mine.py").write_text(f"open({str(ran)!r}, 'w').close()\n")
    monkeypatch.syspath_prepend(folder)
    load_registry(write(folder))
    assert not ran.exists()


def test_every_line_of_every_message_names_file_and_line(folder: Path) -> None:
    broken = re.sub(r": \[?\w+\]?$", ": {}", GOOD, flags=re.MULTILINE)
    found = complaints(write(folder, broken))
    assert len(found) > 6
    for message in found:
        assert re.match(r"registry\.yaml:\d+: \S+: .+\.$", message), message


def test_a_registry_cannot_be_changed(folder: Path) -> None:
    registry: Registry = load_registry(write(folder))
    with pytest.raises(ValueError, match="frozen"):
        registry.organs = {}  # type: ignore[misc]
