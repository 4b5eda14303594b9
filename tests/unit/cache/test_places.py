from __future__ import annotations

from pathlib import Path

import pytest

from pipeline.cache.index import (
    IndexedCase,
    IndexedTeacher,
    case_path,
    teacher_folder,
    unit_path,
)
from pipeline.cache.places import find_units, place_of, unit_bytes, unit_name

WORK = Path("/work")
CASE = IndexedCase("liver-ct", "case_000", "train", "ab" * 32, "cd" * 32)
TEACHER = IndexedTeacher("liver", "ef" * 32, ("liver",), (), {})


def test_a_case_unit() -> None:
    path = case_path(WORK, CASE)
    place = place_of(path)
    assert place is not None
    assert (place.path, place.dataset, place.case) == (path, "liver-ct", "case_000")
    assert (place.teacher, place.teacher_tag, place.tag) == (None, "", "cd" * 8)
    assert place.name == place.case_name == unit_name(path) == "liver-ct/case_000"


def test_a_teacher_unit() -> None:
    place = place_of(unit_path(WORK, TEACHER, CASE))
    assert place is not None
    assert (place.teacher, place.teacher_tag, place.tag) == ("liver", "ef" * 8, "ab" * 8)
    assert place.case_name == "liver-ct/case_000"
    assert place.name == unit_name(place.path) == "liver x liver-ct/case_000"


def test_a_case_whose_name_has_an_at() -> None:
    odd = IndexedCase("d", "a@b.zarr", "train", "ab" * 32, "cd" * 32)
    place = place_of(case_path(WORK, odd))
    assert place is not None
    assert place.case == "a@b.zarr"


@pytest.mark.parametrize(
    "path",
    [
        "cases/d/c.zarr",
        "cases/d/c@0123.zarr",
        "cases/d/c@0123456789ABCDEF.zarr",
        "cases/d/c@0123456789abcdef",
        "cases/d/.c@0123456789abcdef.zarr",
        "cases/d/.c@0123456789abcdef.zarr~host~1~ab.tmp",
        "elsewhere/d/c@0123456789abcdef.zarr",
        "teachers/liver/d/c@0123456789abcdef.zarr",
        "other/liver@0123456789abcdef/d/c@0123456789abcdef.zarr",
        "students/run/c@0123456789abcdef.zarr",
    ],
)
def test_what_is_not_laid_out_as_a_unit_is_none(path: str) -> None:
    assert place_of(WORK / path) is None
    assert unit_name(WORK / path) == Path(path).name


def test_finding_units(tmp_path: Path) -> None:
    others = [
        IndexedCase("liver-ct", "case_001", "train", "1" * 64, "2" * 64),
        IndexedCase("multi-ct", "case_000", "train", "3" * 64, "4" * 64),
    ]
    wanted = []
    for case in (CASE, *others):
        for path in (case_path(tmp_path, case), unit_path(tmp_path, TEACHER, case)):
            path.mkdir(parents=True)
            wanted.append(path)
    (tmp_path / "cases" / "liver-ct" / "notes.txt").write_text("")
    (teacher_folder(tmp_path, TEACHER) / "liver-ct" / "c.zarr").mkdir()
    found = find_units(tmp_path)
    assert {place.path for place in found} == set(wanted)
    assert [place.teacher for place in found] == [None] * 3 + ["liver"] * 3
    of_one = find_units(tmp_path, dataset="liver-ct", case="case_001")
    assert [place.name for place in of_one] == ["liver-ct/case_001", "liver x liver-ct/case_001"]
    assert find_units(tmp_path / "absent") == []


def test_bytes_of_units_files_and_nothing(tmp_path: Path) -> None:
    (tmp_path / "u" / "a").mkdir(parents=True)
    (tmp_path / "u" / "a" / "x").write_bytes(b"123")
    (tmp_path / "u" / "y").write_bytes(b"4567")
    assert unit_bytes(tmp_path / "u") == 7
    assert unit_bytes(tmp_path / "u" / "y") == 4
    assert unit_bytes(tmp_path / "absent") == 0
