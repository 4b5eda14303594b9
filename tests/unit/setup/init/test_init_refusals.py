"""What `pipeline init` refuses: folders and lists that are none, and flags that say nothing."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from pipeline.errors import WorkFolderError
from pipeline.setup.init.begin import InitRequest, begin
from tests.unit.setup.init.test_init_datasets import nnunet, put, refused


@pytest.mark.parametrize(
    ("flags", "wishes", "expected"),
    [
        ([], {}, "no dataset is named"),
        (["d=d:liver=1", "d=d:liver=1"], {}, "d is given twice"),
        (["d=d:liver=one"], {"organs": ["liver"]}, "liver=one names no numbers"),
        (["d=d:liver=1,liver=2"], {}, "liver is said twice"),
        (["=:liver=1"], {}, "neither a path nor NAME=PATH"),
        (["d=d:liver=1"], {"files": ["e=a,b"]}, "'e=a,b' names no dataset and its two patterns"),
        (["d=d:liver=1"], {"files": ["d=images"]}, "'d=images' names no dataset"),
        (["d=d:liver=1"], {"files": ["d=a.nii,b.nii"]}, "pattern 'a.nii' must contain {case}"),
        (["d=d:liver=1"], {"files": ["d={case}.nii,/{case}"]}, "must be relative to `root`"),
        (["d=d:liver=1"], {"organs": ["?"]}, "'?' is no organ"),
        (["d=d:liver=1"], {"organs": ["background"]}, "'background' is no organ"),
        (["d=d:liver=1"], {"organs": ["left_kidney", "LeftKidney"]}, "are one name"),
        (["d=e:liver=1"], {}, "no such folder or file"),
    ],
)
def test_flags(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    flags: Sequence[str],
    wishes: dict[str, Sequence[str]],
    expected: str,
) -> None:
    nnunet(tmp_path / "d")
    monkeypatch.chdir(tmp_path)
    assert expected in refused(tmp_path, *flags, **wishes)


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("{", "not a readable JSON file"),
        ("[]", "not a JSON object"),
        ({}, "neither nnU-Net's dataset.json nor a list of cases"),
        ({"training": ["a.nii.gz"]}, "none of its cases has a label"),
        ({"training": [{"image": 3, "label": "l.nii.gz"}]}, "not a case (TypeError"),
        (
            {"training": [{"image": "a.nii.gz", "label": "l.nii.gz"}] * 2},
            "a label is listed more than once",
        ),
        (
            {"training": [], "modality": {"0": "CT", "1": "PET"}},
            "images of several channels",
        ),
    ],
)
def test_lists(tmp_path: Path, content: Any, expected: str) -> None:
    put(tmp_path / "d", "a.nii.gz", "l.nii.gz")
    text = content if isinstance(content, str) else json.dumps(content)
    (tmp_path / "d" / "dataset.json").write_text(text)
    assert expected in refused(tmp_path, f"d={tmp_path}/d:liver=1")


def test_several_lists_in_a_folder(tmp_path: Path) -> None:
    put(tmp_path / "d", "a.nii.gz", "l.nii.gz")
    for name in ("fold_0.json", "fold_1.json"):
        content = {"training": [{"image": "a.nii.gz", "label": "l.nii.gz"}]}
        (tmp_path / "d" / name).write_text(json.dumps(content))
    assert "several lists of cases: fold_0.json, fold_1.json" in refused(
        tmp_path, f"d={tmp_path}/d:liver=1"
    )


def test_a_folder_of_nothing_that_is_known(tmp_path: Path) -> None:
    put(tmp_path / "d", "readme.txt")
    assert "no images with labels under names that are known" in refused(
        tmp_path, f"d={tmp_path}/d:liver=1"
    )


def test_files_that_nnunet_would_not_list_so(tmp_path: Path) -> None:
    nnunet(tmp_path / "d", dataset={"a": {"images": [], "label": "l.nii.gz"}})
    assert "`dataset` is not what nnU-Net v2 writes" in refused(
        tmp_path, f"d={tmp_path}/d:liver=1+2"
    )


def test_a_registry_that_cannot_be_written(tmp_path: Path) -> None:
    nnunet(tmp_path / "d")
    (tmp_path / "file").touch()
    with pytest.raises(WorkFolderError, match="cannot be written"):
        begin(tmp_path / "file" / "data_registry.yaml", InitRequest([f"d={tmp_path}/d:liver=1+2"]))
    assert (tmp_path / "file").read_bytes() == b""
