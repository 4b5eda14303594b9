"""Parts of stage one: together they do what one run does, in whatever order and however often."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from pipeline.cache.index import case_records, read_dataset_index
from pipeline.cache.places import find_units
from pipeline.data.nifti import read_image, write_image
from pipeline.data.registry import load_registry
from pipeline.data.volume import Volume
from pipeline.engine.parts import Part
from pipeline.log import Log
from pipeline.review.gc import find_garbage
from pipeline.review.status import status
from pipeline.review.verify import verify
from tests.faults.small import DATASET, build_small, cached_copy, content, run_stage, unit_names
from tests.tiny import change_registry, copy_cohort, work_of

NUM_CASES = 6


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_small(tmp_path_factory.mktemp("parts") / "cohort", num_cases=NUM_CASES)


@pytest.fixture(scope="module")
def whole(built: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Cached by one run."""
    return cached_copy(built, tmp_path_factory.mktemp("parts") / "whole")


@pytest.fixture
def cohort(built: Path, tmp_path: Path) -> Path:
    return copy_cohort(built, tmp_path / "cohort")


def units_and_evidence(registry: Path) -> dict[str, str]:
    """All but the form of the datasets' index, which differs between parts and a whole run."""
    found = content(work_of(registry))
    return {name: data for name, data in found.items() if not name.startswith("index/datasets/")}


def empty(label: Path) -> None:
    volume = read_image(label).volume
    write_image(label, Volume(np.zeros_like(volume.array, dtype=np.uint8), volume.grid))


def deep_findings(registry: Path) -> list[str]:
    found = verify(work_of(registry), None, deep=True, everything=True, log=Log(quiet=True))
    return [finding.unit for finding in found.findings]


def report_of(registry: Path, part: Part) -> dict[str, object]:
    path = work_of(registry) / "reports" / f"cache-teachers.{part.tag}.json"
    report: dict[str, object] = json.loads(path.read_text())
    return report


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 0, 1)])
def test_together_they_make_what_one_run_makes(
    cohort: Path, whole: Path, order: tuple[int, ...]
) -> None:
    registry = load_registry(cohort)
    done: list[str] = []
    for number in order:
        report = run_stage(cohort, part=Part(number, 3))
        assert (report.failed, report.skipped) == ({}, [])
        done += report.done
    assert sorted(done) == sorted(unit_names(cohort))
    assert units_and_evidence(cohort) == units_and_evidence(whole)
    key = registry.dataset_key(DATASET)
    assert len(case_records(work_of(cohort), DATASET, key)) == NUM_CASES
    # What nobody reaches may go; these records are the registry's.
    assert find_garbage(work_of(cohort), [registry], grace_hours=0).index_files == ()
    expected = read_dataset_index(work_of(whole), DATASET, key)
    assert read_dataset_index(work_of(cohort), DATASET, key) == expected
    assert set(status(registry, work_of(cohort)).units.values()) == {"done"}
    # Only the last can know the whole: it judges and makes the tables.
    *_, last = order
    told = {number: report_of(cohort, Part(number, 3)) for number in order}
    assert [bool(told[number]["teachers"]) for number in order] == [False, False, True]
    one = json.loads((work_of(whole) / "reports" / "cache-teachers.json").read_text())
    for table in ("teachers", "elsewhere", "regions_ml"):
        assert told[last][table] == one[table]
    assert deep_findings(cohort) == []
    # A run over everything finds nothing to do and folds the records in.
    report = run_stage(cohort)
    assert (report.done, report.failed) == ([], {})
    assert content(work_of(cohort)) == content(work_of(whole))


def test_parts_that_overlap_and_parts_again_do_no_harm(cohort: Path, whole: Path) -> None:
    for part in (Part(0, 2), Part(1, 3), Part(0, 2), Part(1, 2), Part(0, 3)):
        assert run_stage(cohort, part=part).exit_code == 0
    assert run_stage(cohort, part=Part(1, 2)).done == []
    assert units_and_evidence(cohort) == units_and_evidence(whole)
    assert deep_findings(cohort) == []


def test_a_part_alone_is_seen_as_what_it_is(cohort: Path) -> None:
    report = run_stage(cohort, part=Part(0, 3))
    states = status(load_registry(cohort), work_of(cohort)).units
    assert sorted(states.values()).count("done") == len(report.done) == NUM_CASES
    assert set(states.values()) == {"done", "missing"}
    assert len(find_units(work_of(cohort))) == NUM_CASES


def test_a_case_that_fails_is_named_by_its_part_and_the_last_judges_without_it(
    cohort: Path,
) -> None:
    broken = cohort.parent / "data" / DATASET / "images" / "case_001.nii.gz"
    run_stage(cohort, part=Part(0, 2))
    run_stage(cohort, part=Part(1, 2))
    broken.write_bytes(broken.read_bytes()[:400])
    reports = {number: run_stage(cohort, part=Part(number, 2)) for number in (0, 1)}
    failed = [unit for report in reports.values() for unit in report.failed]
    assert failed == [f"{DATASET}/case_001"]
    registry = load_registry(cohort)
    key = registry.dataset_key(DATASET)
    names = [case.case for case in read_dataset_index(work_of(cohort), DATASET, key)]
    assert names == [f"case_{n:03}" for n in range(NUM_CASES) if n != 1]
    assert report_of(cohort, Part(1, 2))["teachers"]


def test_the_last_part_says_that_a_teacher_is_refused_and_then_all_stop(cohort: Path) -> None:
    change_registry(cohort, lambda data: data["admission"].update(dice=0.99))
    first, last = (run_stage(cohort, part=Part(number, 2)) for number in (0, 1))
    assert first.failed == {}
    assert set(last.failed) == {"teacher one", "teacher two"}
    assert last.exit_code == 2
    again = run_stage(cohort, part=Part(0, 2))  # now there is a verdict before anything is made
    assert set(again.failed) == {"teacher one", "teacher two"}
    accepted = [run_stage(cohort, part=Part(n, 2), accept=["one", "two"]) for n in (0, 1)]
    assert [report.exit_code for report in accepted] == [0, 0]


def test_a_teacher_that_is_known_to_be_refused_costs_a_part_nothing(
    cohort: Path, built: Path
) -> None:
    change_registry(cohort, lambda data: data["admission"].update(dice=0.99))
    assert run_stage(cohort).exit_code == 2
    made = len(find_units(work_of(cohort)))
    assert made < len(unit_names(cohort))
    for number in (0, 1):
        assert run_stage(cohort, part=Part(number, 2)).exit_code == 2
    assert len(find_units(work_of(cohort))) == made


def test_an_organ_that_is_empty_in_one_part_only_is_no_mistake(cohort: Path) -> None:
    labels = sorted((cohort.parent / "data" / DATASET / "labels").iterdir())
    for label in labels[:-1]:
        empty(label)
    for number in range(NUM_CASES):
        assert run_stage(cohort, part=Part(number, NUM_CASES)).failed == {}
    empty(labels[-1])
    failed = [
        what
        for number in range(NUM_CASES)
        for what in run_stage(cohort, part=Part(number, NUM_CASES)).failed
    ]
    assert failed == [f"dataset {DATASET}"]


def test_parts_of_other_settings_do_not_count_as_the_others(cohort: Path) -> None:
    run_stage(cohort, part=Part(0, 2), bits=6)
    run_stage(cohort, part=Part(1, 2))
    assert not report_of(cohort, Part(1, 2))["regions_ml"]
