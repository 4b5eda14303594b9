from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipeline.data.registry import load_registry
from pipeline.errors import CacheCorrupt, CacheStale, ConfigError, GeometryError, TeacherError
from pipeline.log import Log
from pipeline.review.recompute import Recomputed, recompute
from tests.tiny import TAP, work_of, write_teacher
from tests.unit.review.damage import flip, rewrite, shard, unit_at

EVERY = 18
LIVER = "liver x multi-ct/case_001"


def again(registry: Path, sample: int = EVERY, seed: int = 0) -> dict[str, Recomputed]:
    found = recompute(
        work_of(registry),
        load_registry(registry),
        sample=sample,
        seed=seed,
        device="cpu",
        window_batch=8,
        log=Log(quiet=True),
    )
    assert len({one.unit for one in found}) == len(found)
    return {one.unit: one for one in found}


def test_the_sample_is_drawn_by_the_seed(built_cache: Path) -> None:
    first, second = again(built_cache, 4, seed=1), again(built_cache, 4, seed=1)
    assert list(first) == list(second)
    assert len(first) == 4
    assert set(again(built_cache, 4, seed=2)) != set(first)


def test_what_differs_is_measured(tiny_cached: Path) -> None:
    largest: dict[str, float] = {}

    def change(arrays: dict[str, Any]) -> None:
        odds, features = arrays["log_odds/liver"], arrays[f"features/{TAP}"]
        odds[3, 3, 3] += np.float16(2)
        odds[0, 0, :3] = np.nan
        largest["features"] = float(np.abs(features[1:]).max())
        features[0] = 0
        features[0, 0, 0, 0] = 5 * largest["features"]

    rewrite(unit_at(work_of(tiny_cached), LIVER), arrays=change)
    found = again(tiny_cached)
    one = found.pop(LIVER)
    assert one.log_odds["liver"] == pytest.approx(2, rel=0.01)
    assert 0.7 < one.features[TAP] < 1.3
    assert one.seen == 3
    assert not one.agrees(100)
    assert all(other.agrees(0) for other in found.values())


def test_agreement_is_within_a_tolerance() -> None:
    assert Recomputed("u", {"a": 0.5}, {"t": 0.05}).agrees(0.5)
    assert not Recomputed("u", {"a": 0.1, "b": 0.6}, {}).agrees(0.5)
    assert not Recomputed("u", {"a": 0}, {"t": 0.06}).agrees(0.5)
    assert not Recomputed("u", {"a": 0}, {}, seen=1).agrees(0.5)
    assert not Recomputed("u", {}, {}, error=ConfigError("x")).agrees(0.5)


def test_damaged_units_and_other_images_are_reported_by_unit(tiny_cached: Path) -> None:
    flip(shard(unit_at(work_of(tiny_cached), LIVER), "log_odds/liver"))
    data = tiny_cached.parent / "data" / "liver-ct" / "images"
    (data / "case_000.nii.gz").write_bytes((data / "case_001.nii.gz").read_bytes())
    found = again(tiny_cached)
    assert isinstance(found[LIVER].error, CacheCorrupt)
    for teacher in ("liver", "spleen"):
        error = found[f"{teacher} x liver-ct/case_000"].error
        assert isinstance(error, GeometryError)
        assert "another one" in str(error)
    assert sum(one.error is not None for one in found.values()) == 3


def test_another_teacher_is_refused_field_by_field(tiny_cached: Path) -> None:
    write_teacher(tiny_cached.parent / "teachers" / "liver.pt", "liver", seed=99)
    with pytest.raises(CacheStale, match=r"teacher liver: .* weights_sha256"):
        again(tiny_cached)
    (tiny_cached.parent / "teachers" / "liver.pt").unlink()
    with pytest.raises(TeacherError, match="do not exist"):
        again(tiny_cached)


def test_nothing_to_draw_from(tiny_registry: Path) -> None:
    with pytest.raises(ConfigError, match="no teacher unit") as caught:
        again(tiny_registry)
    assert caught.value.exit_code == 2
