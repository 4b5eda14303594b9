from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import pytest
import yaml

from pipeline.data.registry import Registry, load_registry
from pipeline.log import Log
from stages import cache_teachers
from stages.report import StageReport
from tests.stages.stage_contract import StageContract
from tests.tiny import cache_config, change_registry, run_cache, work_of


def quiet_run(
    config: cache_teachers.CacheTeachersConfig, registry: Registry, work: Path, **options: Any
) -> StageReport:
    speed = {"device": "cpu", "window_batch": 8, "tables": False}
    return run_cache(config, registry, work, log=Log(quiet=True), **(speed | options))


def run(registry: Path, *, dry_run: bool = False) -> StageReport:
    return quiet_run(cache_config(), load_registry(registry), work_of(registry), dry_run=dry_run)


def units_of(work: Path) -> list[Path]:
    return sorted(work.rglob("*.zarr"))


class TestCacheTeachers(StageContract):
    of_each_run: ClassVar[tuple[str, ...]] = ("reports/*", "events.jsonl")
    timed: ClassVar[tuple[str, ...]] = ("*/receipt.json",)
    kill_at = "pipeline.cache.store:_make_visible"
    kill_nth = 12

    def run(self, registry: Path, *, dry_run: bool = False) -> StageReport:
        return run(registry, dry_run=dry_run)

    def command(self, registry: Path) -> list[str]:
        config = registry.parent / "cache.yaml"
        config.write_text(yaml.safe_dump(cache_config().model_dump(mode="json")))
        work = str(work_of(registry))
        return [
            "cache-teachers", "-q", "--device", "cpu", "--window-batch", "8",
            "-r", str(registry), "-w", work, "-c", str(config),
        ]  # fmt: skip

    def output(self, registry: Path) -> Path:
        return work_of(registry)

    def units(self, registry: Path) -> set[str]:
        loaded = load_registry(registry)
        cases = [case.name for d in loaded.datasets for case in loaded.cases(d)]
        return {*cases, *(f"{t} x {case}" for t in loaded.teachers for case in cases)}

    def remove_one(self, registry: Path) -> str:
        (unit,) = work_of(registry).glob("teachers/liver@*/multi-ct/case_001@*.zarr")
        shutil.rmtree(unit)
        return "liver x multi-ct/case_001"

    def break_one(self, registry: Path) -> Mapping[str, str]:
        image = registry.parent / "data" / "multi-ct" / "images" / "case_001.nii.gz"
        image.write_bytes(image.read_bytes()[:2000])
        return {"multi-ct/case_001": "case_001.nii.gz"}


def test_validation_cases_that_trained_before_are_told_once(
    tiny_cached: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """By another seed, by lists, or by the other rule of an older version: whatever moved them."""
    capfd.readouterr()
    lists = {"train": ["case_000"], "validation": ["case_001"], "test": ["case_002"]}
    change_registry(tiny_cached, lambda d: d["datasets"]["liver-ct"].update(split=lists))
    assert not run(tiny_cached).failed
    said = " ".join(capfd.readouterr().err.split())
    assert said[8:].startswith(
        " warning: these validation and test cases were training cases when this work folder was "
        "filled before: liver-ct/case_001, liver-ct/case_002. What was trained then has seen them: "
        "train it again, or keep the splits of then (docs/registry.md, Registries from before)."
    )
    run(tiny_cached)
    assert "were training cases" not in capfd.readouterr().err


def test_a_split_that_the_hash_leaves_empty_is_told(
    tiny_registry: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    change_registry(
        tiny_registry, lambda d: d["datasets"]["liver-ct"].update(split={"validation": 0.1})
    )
    run(tiny_registry, dry_run=True)
    said = " ".join(capfd.readouterr().err.split())
    assert said[8:].startswith(
        " warning: dataset liver-ct: none of its 3 cases falls into validation (0.1). "
    )
