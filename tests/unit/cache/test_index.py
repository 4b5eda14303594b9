from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from pipeline.cache import index
from pipeline.cache.index import (
    IndexedCase,
    IndexedTeacher,
    case_path,
    dataset_entries,
    dataset_folder,
    read_dataset_index,
    read_index,
    read_indexed_dataset,
    read_teacher_index,
    teacher_file,
    teacher_folder,
    unit_digest,
    unit_path,
    write_dataset_index,
    write_teacher_index,
)
from pipeline.errors import CacheStale
from tests.tiny import as_one_file

KEY, OTHER_KEY = "1" * 64, "2" * 64
CASE = IndexedCase("ct", "case_1", "train", "a" * 64, "b" * 64)
TEACHER = IndexedTeacher("liver", "c" * 64, ("liver", "tumour"), ("tap",), {"window": [8, 8, 8]})


def test_what_stage_one_has_not_seen_is_stale(tmp_path: Path) -> None:
    write_dataset_index(tmp_path, "ct", KEY, [CASE])
    write_teacher_index(tmp_path, KEY, TEACHER)
    with pytest.raises(CacheStale, match="dataset ct is not in the cache as the registry"):
        read_dataset_index(tmp_path, "ct", OTHER_KEY)
    with pytest.raises(CacheStale, match="teacher liver is not in the cache as the registry"):
        read_teacher_index(tmp_path, "liver", OTHER_KEY)
    with pytest.raises(CacheStale, match="cache-teachers"):
        read_teacher_index(tmp_path, "spleen", KEY)


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"cases": [{"case": "x"}], "teacher": 1}'])
def test_an_index_of_another_make_is_stale(tmp_path: Path, text: str) -> None:
    write_dataset_index(tmp_path, "ct", KEY, [CASE])
    write_teacher_index(tmp_path, KEY, TEACHER)
    for path in (tmp_path / "index").rglob("*.json"):
        assert json.loads(path.read_text())["key"] == KEY
        path.write_text(text)
    with pytest.raises(CacheStale):
        read_dataset_index(tmp_path, "ct", KEY)
    with pytest.raises(CacheStale):
        read_teacher_index(tmp_path, "liver", KEY)


def test_paths_follow_from_what_determines_the_numbers(tmp_path: Path) -> None:
    unit = unit_path(tmp_path, TEACHER, CASE)
    assert unit == tmp_path / "teachers" / f"liver@{'c' * 16}" / "ct" / f"case_1@{'a' * 16}.zarr"
    assert unit.is_relative_to(teacher_folder(tmp_path, TEACHER))
    assert case_path(tmp_path, CASE) == tmp_path / "cases" / "ct" / f"case_1@{'b' * 16}.zarr"
    relabelled = replace(CASE, digest="e" * 64)
    assert unit_path(tmp_path, TEACHER, relabelled) == unit
    assert case_path(tmp_path, relabelled) != case_path(tmp_path, CASE)
    rescanned = replace(CASE, image_sha256="e" * 64)
    assert unit_path(tmp_path, TEACHER, rescanned) != unit
    retrained = replace(TEACHER, digest="e" * 64)
    assert teacher_folder(tmp_path, retrained) != teacher_folder(tmp_path, TEACHER)


def test_a_units_digest_is_of_teacher_and_image_alone() -> None:
    digest = unit_digest(TEACHER, CASE)
    assert unit_digest(TEACHER, replace(CASE, digest="e" * 64, split="test")) == digest
    assert unit_digest(replace(TEACHER, digest="e" * 64), CASE) != digest
    assert unit_digest(TEACHER, replace(CASE, image_sha256="e" * 64)) != digest


def test_the_whole_index(tmp_path: Path) -> None:
    assert read_index(tmp_path) == ([], {})
    write_dataset_index(tmp_path, "ct", KEY, [CASE])
    write_dataset_index(tmp_path, "ct", OTHER_KEY, [], left_out=["case_1"])
    write_teacher_index(tmp_path, KEY, TEACHER)
    found, unreadable = read_index(tmp_path)
    assert unreadable == {}
    assert {(f.path, f.key, f.cases, f.teacher) for f in found if f.teacher is None} == {
        (dataset_folder(tmp_path, "ct", KEY) / "case_1.json", KEY, (CASE,), None),
        (dataset_folder(tmp_path, "ct", OTHER_KEY) / "case_1.json", OTHER_KEY, (), None),
    }
    (teacher,) = (f for f in found if f.teacher is not None)
    assert (teacher.path, teacher.cases) == (teacher_file(tmp_path, "liver", KEY), None)
    assert teacher.teacher == TEACHER


def test_entries_that_cannot_be_read_are_told_from_the_others(tmp_path: Path) -> None:
    write_dataset_index(tmp_path, "ct", KEY, [CASE])
    write_teacher_index(tmp_path, KEY, TEACHER)
    broken = teacher_file(tmp_path, "liver", KEY)
    broken.write_text("{")
    (tmp_path / "index" / "teachers" / "README").write_text("mine")
    (tmp_path / "index" / "teachers" / ".hidden.json").write_text("{")
    found, unreadable = read_index(tmp_path)
    assert [f.path for f in found] == dataset_entries(tmp_path, "ct", KEY)
    assert list(unreadable) == [broken]


def test_a_run_over_all_cases_records_these_and_no_others(tmp_path: Path) -> None:
    gone = replace(CASE, case="gone")
    write_dataset_index(tmp_path, "ct", KEY, [replace(CASE, digest="0" * 64), gone])
    write_dataset_index(tmp_path, "ct", KEY, [CASE], left_out=["case_2"])
    found = read_indexed_dataset(tmp_path, "ct", KEY)
    assert (found.cases, found.left_out) == ([CASE], {"case_2"})
    names = [path.name for path in dataset_entries(tmp_path, "ct", KEY)]
    assert names == ["case_1.json", "case_2.json"]


def test_the_one_file_that_earlier_versions_wrote_is_read_until_records_take_its_place(
    tmp_path: Path,
) -> None:
    other, third = replace(CASE, case="case_0"), replace(CASE, case="case_2")
    write_dataset_index(tmp_path, "ct", KEY, [CASE, other], left_out=["case_2"])
    file = as_one_file(dataset_folder(tmp_path, "ct", KEY))
    assert dataset_entries(tmp_path, "ct", KEY) == [file]
    found = read_indexed_dataset(tmp_path, "ct", KEY)
    assert (found.cases, found.left_out) == ([other, CASE], {"case_2"})
    assert [f.cases for f in read_index(tmp_path)[0]] == [(CASE, other)]
    # Killed while it gave way, or with records of parts of a job array beside it: these hold.
    before, seen_anew = file.read_text(), replace(CASE, digest="f" * 64)
    write_dataset_index(tmp_path, "ct", KEY, [seen_anew, third])
    assert not file.exists()
    file.write_text(before)
    found = read_indexed_dataset(tmp_path, "ct", KEY)
    assert (found.cases, found.left_out) == ([other, seen_anew, third], set())
    write_dataset_index(tmp_path, "ct", KEY, [CASE])
    assert read_dataset_index(tmp_path, "ct", KEY) == [CASE]
    assert not file.exists()


def test_a_reader_looks_again_where_a_file_has_just_given_way(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_dataset_index(tmp_path, "ct", KEY, [CASE])
    as_one_file(dataset_folder(tmp_path, "ct", KEY))
    real = index.dataset_entries

    def just_before(*arguments: Any) -> Any:
        listed = real(*arguments)
        monkeypatch.undo()
        write_dataset_index(tmp_path, "ct", KEY, [CASE])
        return listed

    monkeypatch.setattr(index, "dataset_entries", just_before)
    assert read_dataset_index(tmp_path, "ct", KEY) == [CASE]


def test_a_damaged_record_is_not_passed_over(tmp_path: Path) -> None:
    write_dataset_index(tmp_path, "ct", KEY, [CASE, replace(CASE, case="case_0")])
    record = dataset_entries(tmp_path, "ct", KEY)[0]
    record.write_text(record.read_text().replace("train", "test"))
    with pytest.raises(CacheStale):
        read_dataset_index(tmp_path, "ct", KEY)
