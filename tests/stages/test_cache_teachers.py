from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import yaml

from pipeline.data.registry import Registry, load_registry
from pipeline.log import Log
from stages import cache_teachers
from stages.report import StageReport
from tests.stages.stage_contract import StageContract
from tests.tiny import cache_config, work_of


def quiet_run(
    config: cache_teachers.CacheTeachersConfig, registry: Registry, work: Path, **options: Any
) -> StageReport:
    speed = {"device": "cpu", "window_batch": 8, "tables": False}
    return cache_teachers.run(config, registry, work, log=Log(quiet=True), **(speed | options))


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
