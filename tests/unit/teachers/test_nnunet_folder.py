"""What a model folder says, and what it lacks: nothing here needs nnU-Net."""

from __future__ import annotations

import ast
import json
import warnings
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

import pipeline
from pipeline.data.entries import TeacherEntry
from pipeline.errors import TeacherWarning
from pipeline.teachers.nnunet_folder import check_against_registry, read_model_folder
from tests.unit.teachers.teacher_contract import refusal, weights_digest

LABELS = {"background": 0, "liver": 1, "spleen": 2}


def entry(**changes: Any) -> TeacherEntry:
    values = {"kind": "nnunet", "weights": "model", "organs": {"liver": 1}}
    return TeacherEntry.model_validate({**values, **changes})


def folder(
    path: Path,
    folds: tuple[str, ...] = ("0", "1"),
    labels: dict[str, Any] | None = None,
    **dataset: Any,
) -> Path:
    """A model folder whose checkpoints hold nothing of use."""
    path.mkdir(parents=True)
    plans = {
        "configurations": {},
        "transpose_forward": [0, 1, 2],
        "image_reader_writer": "SimpleITKIO",
    }
    (path / "plans.json").write_text(json.dumps(plans), encoding="utf-8")
    content = {"channel_names": {"0": "CT"}, "labels": labels or LABELS, **dataset}
    (path / "dataset.json").write_text(json.dumps(content), encoding="utf-8")
    for fold in folds:
        (path / f"fold_{fold}").mkdir()
        (path / f"fold_{fold}" / "checkpoint_final.pth").write_bytes(fold.encode())
    return path


def refused(path: Path, match: str, **changes: Any) -> str:
    return refusal(match, str(path), lambda: accepted(path, **changes))


def accepted(path: Path, **changes: Any) -> None:
    check_against_registry("mine", entry(**changes), read_model_folder(path, entry(**changes)))


def test_folds_are_those_that_have_the_checkpoint(tmp_path: Path) -> None:
    model = folder(tmp_path / "m", folds=("0", "2", "10", "all"))
    (model / "fold_3").mkdir()
    assert list(read_model_folder(model, entry()).checkpoints) == ["0", "2", "10"]
    named = entry(nnunet={"folds": ["all", 2]})
    assert list(read_model_folder(model, named).checkpoints) == ["all", "2"]
    alone = folder(tmp_path / "alone", folds=("all",))
    assert list(read_model_folder(alone, entry()).checkpoints) == ["all"]


@pytest.mark.parametrize("name", ["plans.json", "dataset.json"])
def test_a_folder_that_lacks_a_file(name: str, tmp_path: Path) -> None:
    model = folder(tmp_path / "m")
    (model / name).unlink()
    assert "copy it again with all that belongs to it" in refused(model, f"there is no {name}")


def test_no_folder_no_folds_no_checkpoint(tmp_path: Path) -> None:
    refused(tmp_path / "none", "there is no plans.json")
    refused(folder(tmp_path / "a", folds=()), "no fold_0")
    model = folder(tmp_path / "b")
    assert "Folds there: 0, 1" in refused(model, "fold 4 was not trained", nnunet={"folds": [4]})
    (model / "fold_1" / "checkpoint_final.pth").rename(model / "fold_1" / "checkpoint_best.pth")
    message = refused(model, "no checkpoint_final.pth", nnunet={"folds": [0, 1]})
    assert "name one, as in `nnunet: {checkpoint: checkpoint_best.pth}`" in message
    accepted(model, nnunet={"folds": [1], "checkpoint": "checkpoint_best.pth"})
    (model / "fold_1" / "checkpoint_best.pth").unlink()
    refused(model, "no checkpoint_final.pth.*Nothing was trained", nnunet={"folds": [1]})
    (model / "fold_0" / "checkpoint_final.pth").unlink()
    refused(model, "no checkpoint_final.pth")


@pytest.mark.parametrize("text", ["", "{", "[1]", "{}"])
@pytest.mark.parametrize("name", ["plans.json", "dataset.json"])
def test_files_that_nnunet_did_not_write(name: str, text: str, tmp_path: Path) -> None:
    model = folder(tmp_path / "m")
    (model / name).write_text(text, encoding="utf-8")
    assert name in refused(model, "JSON|lacks")


@pytest.mark.parametrize(
    "labels",
    [
        {"0": "background", "1": "liver"},
        {"background": 0, "liver": "1"},
        {"background": 0, "liver": []},
        {"background": 0, "liver": None},
    ],
)
def test_labels_as_nnunet_v2_does_not_write_them(labels: dict[str, Any], tmp_path: Path) -> None:
    refused(folder(tmp_path / "m", labels=labels), "v1")


REGIONS = {"background": 0, "whole": [1, 2], "liver": 2, "ignore": 3}


def test_channels_as_nnunet_numbers_them(tmp_path: Path) -> None:
    labels = {"liver": 1, "background": 0, "ignore": 3, "tumour": 2}
    found = read_model_folder(folder(tmp_path / "a", labels=labels), entry())
    assert found.channels == {"liver": 1, "background": 0, "tumour": 2}
    assert not found.has_regions
    regions = read_model_folder(folder(tmp_path / "b", labels=REGIONS), entry())
    assert regions.channels == {"whole": 0, "liver": 1}
    assert regions.has_regions


@pytest.mark.parametrize(
    ("labels", "changes", "match"),
    [
        (LABELS, {"organs": {"liver": 2}}, "liver is channel 1"),
        (LABELS, {"organs": {"Liver": 2}}, "Liver is channel 1"),
        (LABELS, {"organs": {"liver": [1, 2], "spleen": 2}}, "but 2 is spleen"),
        (LABELS, {"organs": {"liver": 3}}, "there are 3 channels"),
        (LABELS, {"organs": {"hepar": 0}}, "0, which is background"),
        (LABELS, {"num_channels": 2}, "num_channels is 3 in the folder but 2"),
        (LABELS, {"activation": "sigmoid"}, "`activation` must be softmax, not sigmoid"),
        (REGIONS, {}, "`activation` must be sigmoid, not softmax"),
        (REGIONS, {"activation": "sigmoid", "organs": {"liver": 0}}, "liver is channel 1"),
        (REGIONS, {"activation": "sigmoid", "organs": {"liver": 2}}, "there are 2 channels"),
    ],
)
def test_a_registry_that_contradicts_dataset_json(
    labels: dict[str, Any], changes: dict[str, Any], match: str, tmp_path: Path
) -> None:
    message = refused(folder(tmp_path / "m", labels=labels), match, **changes)
    assert "teacher mine" in message
    assert "Output channels there: " in message


@pytest.mark.parametrize("name", ["MRI", "T1w", "FLAIR", "rgb_to_0_1"])
def test_a_channel_that_is_no_ct(tmp_path: Path, name: str) -> None:
    model = folder(tmp_path / "m", channel_names={"0": name})
    assert f"its input channel is {name}, and a teacher is shown CT" in refused(model, "input")


@pytest.mark.parametrize("name", ["zscore", "noNorm", "abdomen"])
def test_a_channel_that_may_be_ct_is_said(tmp_path: Path, name: str) -> None:
    model = folder(tmp_path / "m", channel_names={"0": name})
    with pytest.warns(TeacherWarning, match=f"calls its input channel '{name}'.*as a CT"):
        accepted(model)


@pytest.mark.parametrize("names", [{"0": "CT"}, {"0": "ct"}, {"0": "CT_venous"}])
def test_ct_by_any_spelling(tmp_path: Path, names: dict[str, str]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        accepted(folder(tmp_path / "m", channel_names=names))


def test_registries_that_agree(tmp_path: Path) -> None:
    model = folder(tmp_path / "m", labels={**LABELS, "liver_tumour": 3})
    accepted(model, organs={"liver": [1, 3], "spleen": 2}, num_channels=4)
    # A name of one's own says nothing against the folder's.
    accepted(model, organs={"hepar": [1, 3]})
    regions = folder(tmp_path / "r", labels=REGIONS)
    accepted(regions, organs={"whole": 0, "liver": 1}, activation="sigmoid", num_channels=2)


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"spacing_mm": [1, 1, 1]}, "spacing_mm: not for kind `nnunet`"),
        ({"intensity": {"kind": "raw"}}, "intensity: not for kind `nnunet`"),
        ({"args": {"a": 1}}, "args: not for kind `nnunet`"),
        ({"taps": ["decoder"]}, "taps: kind `nnunet` has none"),
        ({"kind": "checkpoint", "nnunet": {}}, "`nnunet` belongs to kind `nnunet`"),
        ({"nnunet": {"orientation": "LPX"}}, "one letter of each"),
        ({"nnunet": {"tile_step": 0}}, "greater than 0"),
        ({"nnunet": {"folds": []}}, "at least 1 item"),
        ({"nnunet": {"checkpoint": "../other.pth"}}, r"match pattern .*\.pth"),
        ({"nnunet": {"stride": 1}}, "Extra inputs"),
    ],
)
def test_entries_that_make_no_sense(changes: dict[str, Any], match: str) -> None:
    with pytest.raises(ValidationError, match=match):
        entry(**changes)


def test_the_digest_is_of_the_files_that_are_used_wherever_they_lie(tmp_path: Path) -> None:
    model = folder(tmp_path / "m")
    first = weights_digest(entry(), model)
    assert weights_digest(entry(nnunet={"folds": [0, 1]}), model) == first
    assert weights_digest(entry(), folder(tmp_path / "elsewhere" / "copy")) == first
    assert weights_digest(entry(nnunet={"folds": [0]}), model) != first
    for name in ("plans.json", "dataset.json", "fold_1/checkpoint_final.pth"):
        before = (model / name).read_bytes()
        (model / name).write_bytes(before + b" ")
        assert weights_digest(entry(), model) != first
        (model / name).write_bytes(before)
    # Logs, and folds that are not used, change nothing.
    (model / "fold_0" / "training_log.txt").write_text("epoch 1", encoding="utf-8")
    (model / "fold_0" / "checkpoint_best.pth").write_bytes(b"x")
    assert weights_digest(entry(), model) == first
    swapped = folder(tmp_path / "swapped", folds=())
    for fold, content in (("0", b"1"), ("1", b"0")):
        (swapped / f"fold_{fold}").mkdir()
        (swapped / f"fold_{fold}" / "checkpoint_final.pth").write_bytes(content)
    assert weights_digest(entry(), swapped) != first


def test_the_key_of_an_entry_of_another_kind_does_not_know_of_nnunet() -> None:
    # Indexes of work folders are named by it: a new kind must not make them stale.
    checkpoint = TeacherEntry.model_validate(
        {"kind": "checkpoint", "weights": "w", "organs": {"liver": 1}, "licence": "x"}
    )
    assert "nnunet" not in checkpoint.key()
    assert "licence" not in checkpoint.key()
    assert entry(nnunet={"folds": [1]}).key()["nnunet"]["folds"] == [1]


def test_other_kinds_do_not_import_nnunet() -> None:
    """It is imported within functions alone: it takes seconds, and need not be installed."""
    for path in Path(pipeline.__file__).parent.rglob("*.py"):
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, (ast.Import, ast.ImportFrom)):
                assert "nnunetv2" not in ast.unparse(node), path
