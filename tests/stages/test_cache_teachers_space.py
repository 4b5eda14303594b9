from __future__ import annotations

import json
import os
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from typer.testing import CliRunner

from pipeline.cli.app import app
from pipeline.data.registry import load_registry
from pipeline.errors import SpaceError
from pipeline.log import Log
from pipeline.setup.plan import make_plan
from pipeline.teachers.load import Teachers
from stages.report import StageReport
from tests.stages.stage_contract import snapshot
from tests.tiny import cache_config, change_registry, run_cache, work_of, write_teacher


def run(registry: Path, **options: bool) -> StageReport:
    return run_cache(
        cache_config(), load_registry(registry), work_of(registry), log=Log(quiet=True),
        device="cpu", window_batch=8, tables=False, **options,
    )  # fmt: skip


def plan(registry: Path, quota_bytes: int | None = None) -> int:
    config = cache_config()
    teachers = Teachers(load_registry(registry), config.window, config.storage, "cpu", 8)
    log, work = Log(quiet=True), work_of(registry)
    found = make_plan(teachers, config.splits, work, log=log, quota_bytes=quota_bytes)
    return found.to_json()["bytes_on_disk"]


def units(registry: Path) -> list[Path]:
    return list(work_of(registry).rglob("*.zarr"))


@pytest.fixture
def free(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The number in it is what the disk has free."""
    bytes_free, real = [10**15], os.statvfs

    def pretend(path: Path) -> object:
        found = real(path)
        return SimpleNamespace(
            f_bavail=bytes_free[0] / found.f_frsize, f_frsize=found.f_frsize,
            f_favail=found.f_favail, f_files=found.f_files,
        )  # fmt: skip

    monkeypatch.setattr(os, "statvfs", pretend)
    return bytes_free


def test_without_a_plan_a_disk_that_is_obviously_too_small_is_refused(
    tiny_registry: Path, free: list[int]
) -> None:
    free[0] = 50_000
    with pytest.raises(SpaceError) as caught:
        run(tiny_registry)
    assert caught.value.exit_code == 2
    for part in (str(work_of(tiny_registry)), "50 kB are free", "--force", "pipeline plan"):
        assert part in str(caught.value)
    assert units(tiny_registry) == []


def test_without_a_plan_what_may_fit_is_not_refused(tiny_registry: Path, free: list[int]) -> None:
    """The check without measurements is a lower bound: it is below what is really written."""
    fits = plan(tiny_registry)
    (work_of(tiny_registry) / "reports" / "plan.json").unlink()
    free[0] = fits
    assert run(tiny_registry).exit_code == 0


def test_with_a_plan_its_rates_are_used(tiny_registry: Path, free: list[int]) -> None:
    need = plan(tiny_registry)
    free[0] = round(0.95 * need)
    with pytest.raises(SpaceError, match="Measured by `pipeline plan`"):
        run(tiny_registry)
    assert units(tiny_registry) == []
    free[0] = round(1.05 * need)
    assert run(tiny_registry).exit_code == 0


def test_a_plan_of_other_teachers_is_not_used(tiny_registry: Path, free: list[int]) -> None:
    free[0] = round(0.95 * plan(tiny_registry))
    for organ in ("liver", "spleen"):
        write_teacher(tiny_registry.parent / "teachers" / f"{organ}.pt", organ, seed=99)
    assert run(tiny_registry).exit_code == 0


def test_a_plan_of_another_storage_is_not_used(tiny_registry: Path, free: list[int]) -> None:
    """Also where no teacher's digest would tell."""
    change_registry(tiny_registry, lambda data: data.update(teachers={}))
    free[0] = round(0.95 * plan(tiny_registry))
    with pytest.raises(SpaceError):
        run(tiny_registry)
    other = cache_config(storage={"zstd_level": 3})
    report = run_cache(
        other, load_registry(tiny_registry), work_of(tiny_registry), log=Log(quiet=True)
    )
    assert report.exit_code == 0


def test_a_damaged_plan_is_no_plan(tiny_registry: Path, free: list[int]) -> None:
    free[0] = round(0.95 * plan(tiny_registry))
    (work_of(tiny_registry) / "reports" / "plan.json").write_text('{"samples": 7}')
    assert run(tiny_registry).exit_code == 0


def test_the_quota_of_the_plan_holds_for_the_stage(tiny_registry: Path) -> None:
    plan(tiny_registry, quota_bytes=100_000)
    with pytest.raises(SpaceError, match="quota of 100 kB"):
        run(tiny_registry)
    plan(tiny_registry, quota_bytes=10**12)
    assert run(tiny_registry).exit_code == 0


def test_a_dry_run_warns_and_writes_nothing(
    tiny_registry: Path, free: list[int], capsys: pytest.CaptureFixture[str]
) -> None:
    free[0] = 1000
    before = snapshot(tiny_registry.parent)
    assert run(tiny_registry, dry_run=True).exit_code == 0
    assert snapshot(tiny_registry.parent) == before
    assert "1 kB are free" in capsys.readouterr().err


def test_nothing_left_to_do_fits_on_any_disk(tiny_cached: Path, free: list[int]) -> None:
    free[0] = 0
    report = run(tiny_cached)
    assert (report.done, report.exit_code) == ([], 0)


def test_the_flag(tiny_registry: Path, free: list[int]) -> None:
    free[0] = 1000
    config = tiny_registry.parent / "cache.yaml"
    config.write_text(yaml.safe_dump(cache_config().model_dump(mode="json")))
    command = ["cache-teachers", "-q", "--device", "cpu", "--window-batch", "8"]
    command += ["-r", str(tiny_registry), "-w", str(work_of(tiny_registry)), "-c", str(config)]
    refused = CliRunner().invoke(app, command)
    assert isinstance(refused.exception, SpaceError)
    forced = CliRunner().invoke(app, [*command, "--force"])
    assert forced.exit_code == 0, forced.output
    report = json.loads((work_of(tiny_registry) / "reports" / "cache-teachers.json").read_text())
    assert len(report["done"]) == 27
