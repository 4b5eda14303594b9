from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from pipeline.data.registry import load_registry
from pipeline.log import Log
from pipeline.review.why import WorkDifference, diff
from tests.tiny import cache_config, fill_cache, run_cache, work_of, write_teacher
from tests.unit.review.damage import rewrite, shard, unit_at

CASE = "multi-ct/case_001"
LIVER = f"liver x {CASE}"


@pytest.fixture
def copies(tiny_cached: Path) -> tuple[Path, Path]:
    """Two work folders with the same content."""
    a = work_of(tiny_cached)
    return a, Path(shutil.copytree(a, a.with_name("other")))


def only(found: WorkDifference) -> dict[str, Any]:
    """What differs, without what is the same."""
    sides = found.to_json()
    return {
        f"{what} {how}": value
        for what in ("cases", "teachers", "units")
        for how, value in sides[what].items()
        if how != "same" and value
    }


def test_cases_and_units_that_one_lacks(copies: tuple[Path, Path]) -> None:
    a, b = copies
    shutil.rmtree(unit_at(a, CASE))
    shutil.rmtree(unit_at(b, LIVER))
    found = diff(a, b)
    assert not found.same
    assert found.cases.only_b == (CASE,)
    assert found.cases.only_a == ()
    (unit,) = found.units.only_a
    assert unit.startswith("liver@")
    assert unit.endswith(CASE)
    size_a, size_b, both = found.num_bytes
    assert both < min(size_a, size_b)


def test_a_teacher_that_one_lacks_is_named_once(copies: tuple[Path, Path]) -> None:
    a, b = copies
    shutil.rmtree(unit_at(b, LIVER).parent.parent)
    found = diff(a, b)
    assert only(found) == {"teachers only_a": ["liver"]}


def test_settings_that_differ_are_named_field_by_field(copies: tuple[Path, Path]) -> None:
    a, b = copies
    registry = a.parent / "data_registry.yaml"
    shutil.rmtree(b)
    write_teacher(registry.parent / "teachers" / "spleen.pt", "spleen", seed=9)
    run_cache(
        cache_config(window={"shape": (16, 16, 16), "overlap": 0.5}),
        load_registry(registry),
        b,
        log=Log(quiet=True),
        device="cpu",
        window_batch=8,
        tables=False,
    )
    found = diff(a, b)
    assert only(found).keys() == {"teachers changed"}
    changed = {change.name: change.differences for change in found.teachers.changed}
    assert len(found.teachers.changed) == 2
    assert changed["liver"] == ("teacher.window.overlap: 0.25 -> 0.5",)
    assert changed["spleen"][0] == "teacher.window.overlap: 0.25 -> 0.5"
    assert changed["spleen"][1].startswith("weights_sha256: ")
    assert found.units.same == ()
    assert diff(b, a).teachers.changed[0].differences == ("teacher.window.overlap: 0.5 -> 0.25",)


def test_a_version_that_one_has_besides_is_compared_with_the_nearest(tiny_cached: Path) -> None:
    a = work_of(tiny_cached)
    b = Path(shutil.copytree(a, a.with_name("other")))
    write_teacher(tiny_cached.parent / "teachers" / "liver.pt", "liver", seed=9)
    fill_cache(tiny_cached)
    for found, digests in ((diff(a, b), ("a", "b")), (diff(b, a), ("b", "a"))):
        (change,) = found.teachers.changed
        new, old = (getattr(change, side) for side in digests)
        assert new != old
        assert [line.split(":")[0] for line in change.differences] == ["weights_sha256"]
        assert found.teachers.only_a == found.teachers.only_b == ()


def test_the_same_inputs_with_other_bytes(copies: tuple[Path, Path]) -> None:
    def nudge(arrays: dict[str, Any]) -> None:
        arrays["log_odds/liver"][0, 0, 0] += 1

    a, b = copies
    rewrite(unit_at(b, LIVER), arrays=nudge)
    found = diff(a, b)
    assert only(found) == {}
    assert not found.same
    (unit,) = found.other_bytes
    assert unit == str(unit_at(a, LIVER).relative_to(a))


def test_what_has_no_valid_receipt_is_said(copies: tuple[Path, Path]) -> None:
    a, b = copies
    shard(unit_at(b, LIVER), "log_odds/liver").unlink()
    found = diff(a, b)
    assert found.unreadable == (f"{LIVER} in B",)
    assert not found.same
