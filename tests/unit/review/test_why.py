from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from pipeline.data.registry import load_registry
from pipeline.errors import GeometryError, RegistryError
from pipeline.review.why import Reason, why
from tests.tiny import (
    cache_config,
    change_registry,
    fill_cache,
    repaint,
    run_cache,
    work_of,
    write_teacher,
)
from tests.unit.review.damage import flip, say, shard, unit_at

CASE = "multi-ct/case_001"
LIVER, SPLEEN = f"liver x {CASE}", f"spleen x {CASE}"


def reasons(registry: Path, **changes: Any) -> dict[str, Reason]:
    config = cache_config(**changes)
    found = why(
        work_of(registry),
        load_registry(registry, files=False),
        CASE,
        window=config.window,
        storage=config.storage,
        splits=config.splits,
    )
    return {reason.unit: reason for reason in found}


def fields(reason: Reason) -> list[str]:
    return [line.split(": ")[0] for line in reason.differences]


def test_what_is_valid_is_reused(built_cache: Path) -> None:
    found = reasons(built_cache)
    assert list(found) == [CASE, LIVER, SPLEEN]
    for unit, reason in found.items():
        assert reason.verdict == "reused"
        assert reason.nearest == unit_at(work_of(built_cache), unit)
        assert reason.differences == ()
        assert "same digest" in reason.because


def test_nothing_of_it_in_the_cache(tiny_registry: Path) -> None:
    found = reasons(tiny_registry)
    assert {r.verdict for r in found.values()} == {"made"}
    assert {r.nearest for r in found.values()} == {None}
    assert not work_of(tiny_registry).exists()


@pytest.mark.parametrize(
    ("changes", "units", "field"),
    [
        ({"window": {"shape": (16, 16, 16), "overlap": 0.5}}, {LIVER, SPLEEN},
         "teacher.window.overlap: 0.25 -> 0.5"),
        ({"storage": {"log_odds_bits": 4}}, {CASE, LIVER, SPLEEN}, "storage.log_odds_bits: 5 -> 4"),
    ],
)  # fmt: skip
def test_a_changed_setting_is_named(
    built_cache: Path, changes: Any, units: set[str], field: str
) -> None:
    found = reasons(built_cache, **changes)
    assert {unit for unit, r in found.items() if r.verdict == "made"} == units
    for unit in units:
        assert found[unit].differences == (field,)
        assert found[unit].nearest == unit_at(work_of(built_cache), unit)
        assert "1 input" in found[unit].because


def test_other_weights_are_named_and_the_other_teacher_is_reused(tiny_cached: Path) -> None:
    write_teacher(tiny_cached.parent / "teachers" / "liver.pt", "liver", seed=99)
    found = reasons(tiny_cached)
    verdicts = {CASE: "reused", LIVER: "made", SPLEEN: "reused"}
    assert {unit: r.verdict for unit, r in found.items()} == verdicts
    assert fields(found[LIVER]) == ["weights_sha256"]
    # And this is what stage one then does.
    fill_cache(tiny_cached)
    assert {r.verdict for r in reasons(tiny_cached).values()} == {"reused"}
    assert found[LIVER].nearest is not None
    assert found[LIVER].nearest.exists()


def test_another_image_and_another_label(tiny_cached: Path) -> None:
    data = tiny_cached.parent / "data" / "multi-ct"
    repaint(data / "labels" / "case_001.nii.gz")
    found = reasons(tiny_cached)
    assert fields(found[CASE]) == ["label_sha256"]
    assert (found[LIVER].verdict, found[SPLEEN].verdict) == ("reused", "reused")
    repaint(data / "images" / "case_001.nii.gz")
    found = reasons(tiny_cached)
    assert fields(found[CASE]) == ["image_sha256", "label_sha256"]
    assert fields(found[LIVER]) == fields(found[SPLEEN]) == ["image_sha256"]


def test_registry_entries_that_change_numbers(tiny_cached: Path) -> None:
    def change(data: dict[str, Any]) -> None:
        data["teachers"]["liver"]["taps"] = []
        data["datasets"]["multi-ct"]["ignore_values"] = [9]
        data["grid"]["spacing_mm"] = [12.0, 12.0, 10.0]

    change_registry(tiny_cached, change)
    found = reasons(tiny_cached)
    assert fields(found[CASE]) == ["grid.spacing_mm", "ignore_values"]
    assert fields(found[SPLEEN]) == ["grid.spacing_mm"]
    assert found[LIVER].differences[:2] == (
        "features_version: 2 -> absent",
        "grid.spacing_mm: [12.0, 12.0, 12.0] -> [12.0, 12.0, 10.0]",
    )
    assert fields(found[LIVER])[2].startswith("teacher.taps.")


def test_the_nearest_of_several_is_named(tiny_cached: Path) -> None:
    """The index forgets an earlier run with the same registry; the receipts do not."""
    from pipeline.log import Log

    run_cache(
        cache_config(window={"shape": (16, 16, 16), "overlap": 0.5}, storage={"feature_bits": 6}),
        load_registry(tiny_cached),
        work_of(tiny_cached),
        log=Log(quiet=True),
        device="cpu",
        window_batch=8,
        tables=False,
    )
    found = reasons(tiny_cached, window={"shape": (16, 16, 16), "overlap": 0.4})
    assert found[LIVER].differences == ("teacher.window.overlap: 0.25 -> 0.4",)
    found = reasons(
        tiny_cached,
        window={"shape": (16, 16, 16), "overlap": 0.5},
        storage={"feature_bits": 7},
    )
    assert found[LIVER].differences == ("storage.feature_bits: 6 -> 7",)


def test_damage_is_told_from_difference(tiny_cached: Path) -> None:
    work = work_of(tiny_cached)
    shard(unit_at(work, LIVER), "log_odds/liver").unlink()
    say(unit_at(work, SPLEEN), seconds=77)
    found = reasons(tiny_cached)
    assert found[CASE].verdict == "reused"
    assert (found[LIVER].verdict, found[SPLEEN].verdict) == ("made again", "made again")
    assert "log_odds/liver/c/0/0/0 is missing" in found[LIVER].because
    assert "its own digest" in found[SPLEEN].because
    shutil.rmtree(unit_at(work, LIVER))
    assert reasons(tiny_cached)[LIVER].verdict == "made"


def test_absent_or_unusable_weights_are_said_and_the_rest_is_answered(tiny_cached: Path) -> None:
    (tiny_cached.parent / "teachers" / "liver.pt").unlink()
    flip(tiny_cached.parent / "teachers" / "spleen.pt")
    found = reasons(tiny_cached)
    assert found[CASE].verdict == "reused"
    assert found[LIVER].verdict == "unknown"
    assert "the weights do not exist" in found[LIVER].because
    assert found[SPLEEN].verdict in ("unknown", "made")


def test_a_case_of_another_split(built_cache: Path) -> None:
    (reason,) = reasons(built_cache, splits=["train"]).values()
    assert reason.verdict == "left out"
    assert "split test" in reason.because


@pytest.mark.parametrize(
    ("case", "match"),
    [
        ("nowhere/case_001", "no dataset 'nowhere'"),
        ("case_001", "no dataset 'case_001'"),
        ("multi-ct/case_9", "no case 'case_9'"),
        ("multi-ct", "no case ''"),
    ],
)
def test_a_case_that_does_not_exist(built_cache: Path, case: str, match: str) -> None:
    config = cache_config()
    with pytest.raises(RegistryError, match=match) as caught:
        why(
            work_of(built_cache),
            load_registry(built_cache),
            case,
            window=config.window,
            storage=config.storage,
        )
    assert caught.value.exit_code == 2
    assert "multi-ct" in str(caught.value) or "case_000" in str(caught.value)


def test_an_image_that_is_not_here(tiny_cached: Path) -> None:
    (tiny_cached.parent / "data" / "multi-ct" / "images" / "case_001.nii.gz").unlink()
    (tiny_cached.parent / "data" / "multi-ct" / "labels" / "case_001.nii.gz").unlink()
    with pytest.raises((GeometryError, RegistryError), match=r"case_001"):
        reasons(tiny_cached)
