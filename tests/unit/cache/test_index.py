from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from pipeline.cache.index import (
    IndexedCase,
    IndexedTeacher,
    case_path,
    case_records,
    dataset_file,
    read_dataset_index,
    read_index,
    read_indexed_dataset,
    read_teacher_index,
    teacher_file,
    teacher_folder,
    unit_digest,
    unit_path,
    write_case_record,
    write_dataset_index,
    write_failed_record,
    write_teacher_index,
)
from pipeline.errors import CacheStale

KEY, OTHER_KEY = "1" * 64, "2" * 64
CASE = IndexedCase("ct", "case_1", "train", "a" * 64, "b" * 64)
TEACHER = IndexedTeacher("liver", "c" * 64, ("liver", "tumour"), ("tap",), {"window": [8, 8, 8]})


def test_cases_come_back_in_order(tmp_path: Path) -> None:
    cases = [CASE, replace(CASE, case="case_0", split="test", digest="d" * 64)]
    write_dataset_index(tmp_path, "ct", KEY, cases)
    assert read_dataset_index(tmp_path, "ct", KEY) == cases
    assert CASE.name == "ct/case_1"


def test_teachers_come_back(tmp_path: Path) -> None:
    write_teacher_index(tmp_path, KEY, TEACHER)
    assert read_teacher_index(tmp_path, "liver", KEY) == TEACHER


def test_another_registry_entry_is_another_file(tmp_path: Path) -> None:
    write_dataset_index(tmp_path, "ct", KEY, [CASE])
    write_dataset_index(tmp_path, "ct", OTHER_KEY, [])
    assert read_dataset_index(tmp_path, "ct", KEY) == [CASE]
    assert read_dataset_index(tmp_path, "ct", OTHER_KEY) == []


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
    write_dataset_index(tmp_path, "ct", OTHER_KEY, [])
    write_teacher_index(tmp_path, KEY, TEACHER)
    found, unreadable = read_index(tmp_path)
    assert unreadable == {}
    assert {(f.path, f.key, f.cases, f.teacher) for f in found if f.teacher is None} == {
        (dataset_file(tmp_path, "ct", KEY), KEY, (CASE,), None),
        (dataset_file(tmp_path, "ct", OTHER_KEY), OTHER_KEY, (), None),
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
    assert [f.path for f in found] == [dataset_file(tmp_path, "ct", KEY)]
    assert list(unreadable) == [broken]


def test_records_of_single_cases_are_read_with_the_file_and_before_it(tmp_path: Path) -> None:
    other, third = replace(CASE, case="case_0"), replace(CASE, case="case_2")
    write_dataset_index(tmp_path, "ct", KEY, [CASE, other])
    seen_anew = replace(CASE, digest="f" * 64)
    for case in (third, seen_anew):
        write_case_record(tmp_path, KEY, case)
    assert read_dataset_index(tmp_path, "ct", KEY) == [other, seen_anew, third]
    found, unreadable = read_index(tmp_path)
    assert {case for file in found for case in file.cases or ()} == {CASE, other, seen_anew, third}
    assert unreadable == {}
    write_failed_record(tmp_path, "ct", KEY, "case_2")
    found = read_indexed_dataset(tmp_path, "ct", KEY)
    assert (found.cases, found.left_out) == ([other, seen_anew], {"case_2"})


def test_records_alone_are_an_index(tmp_path: Path) -> None:
    write_case_record(tmp_path, KEY, CASE)
    assert read_dataset_index(tmp_path, "ct", KEY) == [CASE]
    with pytest.raises(CacheStale):
        read_dataset_index(tmp_path, "ct", OTHER_KEY)


def test_a_run_over_all_cases_folds_the_records_in(tmp_path: Path) -> None:
    write_case_record(tmp_path, KEY, replace(CASE, digest="0" * 64))
    write_case_record(tmp_path, KEY, replace(CASE, case="gone"))
    write_dataset_index(tmp_path, "ct", KEY, [CASE])
    assert read_dataset_index(tmp_path, "ct", KEY) == [CASE]
    assert case_records(tmp_path, "ct", KEY) == []


def test_a_damaged_record_is_not_passed_over(tmp_path: Path) -> None:
    write_dataset_index(tmp_path, "ct", KEY, [CASE])
    write_case_record(tmp_path, KEY, CASE)
    (record,) = case_records(tmp_path, "ct", KEY)
    record.write_text(record.read_text().replace("train", "test"))
    with pytest.raises(CacheStale):
        read_dataset_index(tmp_path, "ct", KEY)
