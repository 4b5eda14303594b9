"""Parts of stage one: after the gate they do together what one run does, in whatever order and
however often."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from pipeline.cache.index import read_dataset_index
from pipeline.cache.places import find_units
from pipeline.data.nifti import read_image, write_image
from pipeline.data.registry import load_registry
from pipeline.data.volume import Volume
from pipeline.engine.parts import GATE, Part
from pipeline.errors import CacheMissing
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
def test_after_the_gate_they_make_what_one_run_makes(
    cohort: Path, whole: Path, order: tuple[int, ...]
) -> None:
    registry = load_registry(cohort)
    gate = run_stage(cohort, part=GATE)
    assert (gate.failed, gate.skipped, gate.details["regions_ml"]) == ({}, [], [])
    done = list(gate.done)
    asked = set(done)
    for number in order:
        report = run_stage(cohort, part=Part(number, 3))
        assert report.failed == {}
        assert asked.issuperset(report.skipped)
        done += report.done
    assert sorted(done) == sorted(unit_names(cohort))
    assert content(work_of(cohort)) == content(work_of(whole))
    # What nobody reaches may go; these records are the registry's.
    assert find_garbage(work_of(cohort), [registry], grace_hours=0).index_files == ()
    assert set(status(registry, work_of(cohort)).units.values()) == {"done"}
    one = json.loads((work_of(whole) / "reports" / "cache-teachers.json").read_text())
    for told in (gate.details, *(report_of(cohort, Part(number, 3)) for number in order)):
        for table in ("teachers", "elsewhere"):
            assert told[table] == one[table]
    assert gate.details["taps"]
    assert deep_findings(cohort) == []
    report = run_stage(cohort)
    assert (report.done, report.failed) == ([], {})
    assert report.details["regions_ml"] == one["regions_ml"]


def test_parts_that_overlap_and_parts_again_do_no_harm(cohort: Path, whole: Path) -> None:
    for part in (GATE, Part(0, 2), Part(1, 3), Part(0, 2), GATE, Part(1, 2), Part(0, 3)):
        assert run_stage(cohort, part=part).exit_code == 0
    assert run_stage(cohort, part=Part(1, 2)).done == []
    assert content(work_of(cohort)) == content(work_of(whole))
    assert deep_findings(cohort) == []


def test_a_part_alone_is_seen_as_what_it_is(cohort: Path) -> None:
    judged = run_stage(cohort, part=GATE)
    report = run_stage(cohort, part=Part(0, 3))
    states = status(load_registry(cohort), work_of(cohort)).units
    made = len(judged.done) + len(report.done)
    assert sorted(states.values()).count("done") == made == len(find_units(work_of(cohort)))
    assert set(states.values()) == {"done", "missing"}


@pytest.mark.parametrize("before", [None, "other settings", "another case", "other weights"])
def test_a_part_makes_no_unit_before_the_gate_has_judged(cohort: Path, before: str | None) -> None:
    if before is not None:
        run_stage(cohort, part=GATE, bits=6 if before == "other settings" else 5)
    if before == "another case":
        empty(sorted((cohort.parent / "data" / DATASET / "labels").iterdir())[0])
    if before == "other weights":
        (cohort.parent / "teachers" / "none.pt").write_bytes(b"others")
    made = set(find_units(work_of(cohort)))
    with pytest.raises(CacheMissing, match="the admission gate has not judged") as refused:
        run_stage(cohort, part=Part(0, 3))
    assert "`pipeline cache-teachers --gate-only`" in refused.value.fix
    assert set(find_units(work_of(cohort))) == made
    assert run_stage(cohort, part=GATE).exit_code == 0
    assert run_stage(cohort, part=Part(0, 3)).exit_code == 0


def test_a_case_that_fails_is_named_by_the_gate_and_by_its_part(cohort: Path) -> None:
    broken = cohort.parent / "data" / DATASET / "images" / "case_001.nii.gz"
    broken.write_bytes(broken.read_bytes()[:400])
    assert list(run_stage(cohort, part=GATE).failed) == [f"{DATASET}/case_001"]
    reports = [run_stage(cohort, part=Part(number, 2)) for number in (0, 1)]
    failed = {name: error for report in reports for name, error in report.failed.items()}
    assert list(failed) == [f"{DATASET}/case_001"]
    assert "stage one left this case out" in str(failed[f"{DATASET}/case_001"])
    assert sorted(report.exit_code for report in reports) == [0, 1]
    key = load_registry(cohort).dataset_key(DATASET)
    names = [case.case for case in read_dataset_index(work_of(cohort), DATASET, key)]
    assert names == [f"case_{n:03}" for n in range(NUM_CASES) if n != 1]


def test_a_teacher_that_is_refused_costs_no_part_a_unit(cohort: Path) -> None:
    change_registry(cohort, lambda data: data["admission"].update(dice=0.99))
    for part in (GATE, Part(0, 2), Part(1, 2)):
        report = run_stage(cohort, part=part)
        assert set(report.failed) == {"teacher one", "teacher two"}
        assert report.exit_code == 2
        assert (report.done == []) == (part != GATE)
    accepted = [run_stage(cohort, part=Part(n, 2), accept=["one", "two"]) for n in (0, 1)]
    assert [report.exit_code for report in accepted] == [0, 0]
    assert deep_findings(cohort) == []


def test_a_teacher_of_which_the_gate_saw_nothing_costs_no_part_a_unit(cohort: Path) -> None:
    probabilities = {"factory": "tests.unit.teachers.made_teachers:sure", "args": {}, "taps": []}
    change_registry(cohort, lambda data: data["teachers"]["one"].update(probabilities))
    gate = run_stage(cohort, part=GATE)
    assert gate.failed
    assert all("one x" in name for name in gate.failed)
    for number in (0, 1):
        report = run_stage(cohort, part=Part(number, 2))
        assert list(report.failed) == ["teacher one"]
        assert not any(name.startswith("one x") for name in report.done)
        assert report.exit_code == 2


def test_an_organ_that_is_empty_everywhere_is_told_before_any_part(cohort: Path) -> None:
    labels = sorted((cohort.parent / "data" / DATASET / "labels").iterdir())
    for label in labels[:-1]:
        empty(label)
    assert run_stage(cohort, part=GATE).failed == {}
    empty(labels[-1])
    assert list(run_stage(cohort, part=GATE).failed) == [f"dataset {DATASET}"]
