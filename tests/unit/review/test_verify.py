from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipeline.cache.receipt import read_receipt
from pipeline.data.registry import load_registry
from pipeline.log import Log
from pipeline.review.verify import Verification, repair, verify
from tests.stages.stage_contract import snapshot
from tests.tiny import change_registry, work_of
from tests.unit.review.damage import flip, rewrite, shard, unit_at

CASE = "multi-ct/case_001"
LIVER = f"liver x {CASE}"


def look(registry: Path, *, deep: bool = True, **options: Any) -> Verification:
    known = load_registry(registry, files=False)
    options = {"everything": False, **options}
    return verify(work_of(registry), known, deep=deep, log=Log(quiet=True), **options)


def wrong(found: Verification) -> dict[str, str]:
    return {finding.unit: "; ".join(finding.what) for finding in found.findings}


@pytest.mark.parametrize("deep", [False, True])
def test_a_sound_cache(built_cache: Path, deep: bool) -> None:
    before = snapshot(work_of(built_cache))
    found = look(built_cache, deep=deep)
    assert (found.checked, found.findings, found.unreached) == (27, [], 0)
    assert found.num_bytes > 100_000
    assert "27 units" in found.summary()
    assert "nothing wrong" in found.summary()
    assert snapshot(work_of(built_cache)) == before


def flip_shard(unit: Path) -> None:
    flip(shard(unit, "log_odds/liver"))


def flip_metadata(unit: Path) -> None:
    flip(unit / "log_odds" / "liver" / "zarr.json")


def flip_attributes(unit: Path) -> None:
    flip(unit / "zarr.json")


def respace_receipt(unit: Path) -> None:
    path = unit / "receipt.json"
    path.write_text(path.read_text().replace("\n ", "\n\t", 1))


@pytest.mark.parametrize(
    ("damage", "match"),
    [
        (flip_shard, "chunk (0, 0, 0) of array log_odds/liver cannot be decoded"),
        (flip_shard, "log_odds/liver/c/0/0/0 has other bytes"),
        (flip_metadata, "log_odds/liver/zarr.json has other bytes"),
        (flip_attributes, "zarr.json has other bytes"),
        (respace_receipt, "the receipt has other bytes"),
    ],
)
def test_what_only_the_deep_check_sees(
    tiny_cached: Path, damage: Callable[[Path], None], match: str
) -> None:
    damage(unit_at(work_of(tiny_cached), LIVER))
    assert wrong(look(tiny_cached, deep=False)) == {}
    found = look(tiny_cached)
    assert list(wrong(found)) == [LIVER]
    assert match in wrong(found)[LIVER]


def infinite(arrays: dict[str, Any]) -> None:
    arrays["log_odds/liver"][0, 0, :2] = [np.inf, -np.inf]


def unseen(arrays: dict[str, Any]) -> None:
    arrays["log_odds/liver"][:] = np.nan


def integer(arrays: dict[str, Any]) -> None:
    arrays["log_odds/liver"] = np.zeros(arrays["log_odds/liver"].shape, dtype=np.int32)


def smaller(arrays: dict[str, Any]) -> None:
    arrays["log_odds/liver"] = arrays["log_odds/liver"][1:]


def smaller_features(arrays: dict[str, Any]) -> None:
    (name,) = (name for name in arrays if name.startswith("features/"))
    arrays[name] = arrays[name][:-1]


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (infinite, "log_odds/liver holds 2 infinite values"),
        (unseen, None),
        (integer, "is int32, neither float nor image nor label"),
        (smaller, "log_odds/liver has shape"),
        (smaller_features, "its grid (8, "),
    ],
)
def test_contents_that_a_receipt_vouches_for_and_that_are_wrong(
    tiny_cached: Path, change: Callable[[dict[str, Any]], None], match: str | None
) -> None:
    rewrite(unit_at(work_of(tiny_cached), LIVER), arrays=change)
    assert wrong(look(tiny_cached, deep=False)) == {}
    found = wrong(look(tiny_cached))
    if match is None:
        assert found == {}
    else:
        assert list(found) == [LIVER]
        assert match in found[LIVER]


def stray_value(arrays: dict[str, Any]) -> None:
    arrays["label"][0, 0, 0] = 77


def ignored(arrays: dict[str, Any]) -> None:
    arrays["label"][0, 0, 0] = 255


@pytest.mark.parametrize(("change", "is_wrong"), [(stray_value, True), (ignored, False)])
def test_values_of_the_label(
    tiny_cached: Path, change: Callable[[dict[str, Any]], None], is_wrong: bool
) -> None:
    rewrite(unit_at(work_of(tiny_cached), CASE), arrays=change)
    found = wrong(look(tiny_cached))
    assert (CASE in found) == is_wrong
    if is_wrong:
        assert "the values [77]" in found[CASE]


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda a: a.update(case="multi-ct/case_002"), "attribute case is 'multi-ct/case_002'"),
        (lambda a: a.update(teacher="spleen"), "attribute teacher is 'spleen'"),
        (lambda a: a.pop("grid"), "not those of a unit"),
        (lambda a: a.update(taps={}), "not those of a unit"),
    ],
)
def test_attributes_that_belong_to_another_unit(
    tiny_cached: Path, change: Callable[[dict[str, Any]], object], match: str
) -> None:
    rewrite(unit_at(work_of(tiny_cached), LIVER), attributes=change)
    assert match in wrong(look(tiny_cached))[LIVER]


def test_units_in_each_others_places(tiny_cached: Path) -> None:
    work = work_of(tiny_cached)
    for name in ("{}/case_001", "liver x {}/case_001"):
        here = unit_at(work, name.format("multi-ct"))
        there = unit_at(work, name.format("liver-ct"))
        aside = here.with_name("aside")
        here.rename(aside)
        there.rename(here)
        aside.rename(there)
    found = wrong(look(tiny_cached, deep=False))
    assert set(found) == {
        "multi-ct/case_001", "liver-ct/case_001", LIVER, "liver x liver-ct/case_001",
    }  # fmt: skip
    assert "made from other inputs" in found[LIVER]
    # The path alone tells, where no index does.
    shutil.rmtree(work / "index")
    found = wrong(verify(work, None, deep=False, everything=True, log=Log(quiet=True)))
    assert "but lies under" in found[LIVER]
    assert len(found) == 4


# --- which units ----------------------------------------------------------------------------------


def test_what_the_registry_calls_for_and_is_not_there(tiny_cached: Path) -> None:
    shutil.rmtree(unit_at(work_of(tiny_cached), LIVER))
    found = look(tiny_cached, deep=False)
    assert [(f.unit, f.state) for f in found.findings] == [(LIVER, "missing")]
    assert found.damaged == []
    without = verify(work_of(tiny_cached), None, deep=False, everything=False, log=Log(quiet=True))
    assert (without.checked, without.findings) == (26, [])


def test_a_registry_that_was_never_cached(tiny_cached: Path) -> None:
    def change(data: dict[str, Any]) -> None:
        data["teachers"]["liver"]["taps"] = []
        data["datasets"]["multi-ct"]["ignore_values"] = [9]

    change_registry(tiny_cached, change)
    found = look(tiny_cached, deep=False)
    assert {f.unit: f.state for f in found.findings} == {
        "dataset multi-ct": "missing",
        "teacher liver": "missing",
    }


def test_units_that_no_entry_leads_to_only_with_all(tiny_cached: Path) -> None:
    work = work_of(tiny_cached)
    for path in (work / "index" / "teachers").glob("liver.*"):
        path.unlink()
    flip(shard(unit_at(work, LIVER), "log_odds/liver"))
    some = verify(work, None, deep=True, everything=False, log=Log(quiet=True))
    assert (some.checked, some.unreached, some.findings) == (18, 9, [])
    assert "9 more that no index entry leads to: --all" in some.summary()
    every = verify(work, None, deep=True, everything=True, log=Log(quiet=True))
    assert (every.checked, every.unreached, list(wrong(every))) == (27, 0, [LIVER])


def test_an_index_entry_that_cannot_be_read(tiny_cached: Path) -> None:
    (path,) = (work_of(tiny_cached) / "index" / "teachers").glob("liver.*.json")
    path.write_text("{")
    found = look(tiny_cached, deep=False)
    assert set(wrong(found)) == {f"index entry {path.name}", "teacher liver"}
    assert [f.path for f in found.damaged] == [path]


# --- repair ---------------------------------------------------------------------------------------


def test_what_was_replaced_meanwhile_is_left_alone(tiny_cached: Path) -> None:
    work = work_of(tiny_cached)
    unit = unit_at(work, LIVER)
    kept = shutil.copytree(unit, work / "kept")
    flip(shard(unit, "log_odds/liver"))
    found = look(tiny_cached)
    assert [f.unit for f in found.damaged] == [LIVER]
    shutil.rmtree(unit)
    kept.rename(unit)
    assert repair(work, found) == []
    assert read_receipt(unit)
