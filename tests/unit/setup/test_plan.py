from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from pipeline.cli.app import app
from pipeline.data.registry import load_registry
from pipeline.errors import ConfigError, GeometryError, RegistryError, SpaceError
from pipeline.log import Log
from pipeline.setup.needs import FEATURES, IMAGES, KINDS, LOG_ODDS, METADATA
from pipeline.setup.plan import Plan, make_plan, print_plan
from pipeline.teachers.load import Teachers
from tests.stages.stage_contract import snapshot
from tests.tiny import cache_config, change_registry, fill_cache, shrink_organ, work_of


def planned(registry: Path, **options: object) -> Plan:
    config, log = cache_config(), Log(quiet=True)
    teachers = Teachers(load_registry(registry), config.window, config.storage, "cpu", 8)
    return make_plan(teachers, config.splits, work_of(registry), log=log, **options)  # type: ignore[arg-type]


def written(work: Path) -> dict[str, int]:
    """Kind -> bytes of all units, and the number of files and folders below the work folder."""
    found = dict.fromkeys(KINDS, 0)
    for unit in [*work.glob("cases/*/*.zarr"), *work.glob("teachers/*/*/*.zarr")]:
        for path in (p for p in unit.rglob("*") if p.is_file()):
            inner = path.relative_to(unit)
            kind = METADATA if "c" not in inner.parts else LOG_ODDS
            kind = FEATURES if inner.parts[0] == "features" and kind != METADATA else kind
            kind = IMAGES if unit.parts[-3] == "cases" and kind != METADATA else kind
            found[kind] += path.stat().st_size
    found["files"] = sum(p.is_file() for p in work.rglob("*"))
    found["inodes"] = sum(1 for _ in work.rglob("*"))
    return found


def test_the_outcome_is_within_a_quarter_of_the_plan(tiny_registry: Path) -> None:
    total = planned(tiny_registry).total
    fill_cache(tiny_registry)
    outcome = written(work_of(tiny_registry))
    for kind in KINDS:
        assert total.num_bytes[kind] == pytest.approx(outcome[kind], rel=0.25), kind
    assert total.total_bytes == pytest.approx(sum(outcome[kind] for kind in KINDS), rel=0.25)
    assert total.files == pytest.approx(outcome["files"], rel=0.25)
    assert total.inodes == pytest.approx(outcome["inodes"], rel=0.25)
    assert total.units == 27


def test_the_probe_leaves_nothing_but_the_record(tiny_registry: Path) -> None:
    before = snapshot(tiny_registry.parent)
    found = planned(tiny_registry)
    assert found.probe is not None
    assert len(found.probe.samples) == 6
    assert len({sample.case for sample in found.probe.samples}) == 2
    assert found.probe.memory_bytes > 50e6
    assert found.probe.write_bytes_per_s > 1e5
    after = snapshot(tiny_registry.parent)
    assert set(after) - set(before) == {"work", "work/reports", "work/reports/plan.json"}


def test_what_is_cached_is_subtracted(tiny_cached: Path) -> None:
    found = planned(tiny_cached)
    assert (found.todo.num_missing, found.todo.num_cached) == (0, 27)
    assert found.total.total_bytes == 0
    assert found.probe is None
    (work_of(tiny_cached) / "cases").rename(work_of(tiny_cached) / "elsewhere")
    again = planned(tiny_cached)
    assert again.total.units == again.parts["cases"].units == 9
    assert again.total.num_bytes[LOG_ODDS] == 0
    assert again.probe is not None
    assert {sample.what for sample in again.probe.samples} == {"cases"}


def test_the_table_and_json_say_the_same(
    tiny_registry: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = planned(tiny_registry, quota_bytes=10**9)
    print_plan(found)
    printed = capsys.readouterr().out
    for word in ("cases", "liver", "spleen", "total", "log-odds", "inodes", "quota", "peak memory"):
        assert word in printed
    data = json.loads(json.dumps(found.to_json()))
    assert data["fits"] is True
    assert data["to_make"]["total"]["total_bytes"] == found.total.total_bytes
    assert data["units"] == {"to_make": 27, "cached": 0}
    assert data["space"]["quota_bytes"] == 10**9


def test_what_is_improbable_in_the_probed_cases_is_told(
    tiny_registry: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for dataset in ("liver-ct", "spleen-ct", "multi-ct"):
        for label in (tiny_registry.parent / "data" / dataset / "labels").iterdir():
            shrink_organ(label, 1, 24)
    change_registry(tiny_registry, lambda data: data["grid"].update(spacing_mm=[24, 24, 24]))
    planned(tiny_registry)
    assert capsys.readouterr().err.count("and none on the student grid") == 2


def test_a_quota_that_is_too_small_is_a_problem(tiny_registry: Path) -> None:
    found = planned(tiny_registry, quota_bytes=1000)
    assert "quota of 1 kB" in found.problem
    assert found.to_json()["fits"] is False


def test_a_case_without_a_header_is_left_out_and_told(tiny_registry: Path) -> None:
    broken = tiny_registry.parent / "data" / "multi-ct" / "images" / "case_001.nii.gz"
    broken.write_bytes(b"nothing")
    found = planned(tiny_registry)
    assert isinstance(found.unreadable["multi-ct/case_001"], GeometryError)
    assert found.parts["cases"].units == 8


def test_no_case_at_all_is_refused(tiny_registry: Path) -> None:
    for image in tiny_registry.parent.rglob("images/*.nii.gz"):
        image.write_bytes(b"nothing")
    with pytest.raises(RegistryError, match="readable header"):
        planned(tiny_registry)


def test_a_registry_without_teachers_plans_its_cases(tiny_registry: Path) -> None:
    change_registry(tiny_registry, lambda data: data.update(teachers={}))
    found = planned(tiny_registry)
    assert set(found.parts) == {"cases"}
    assert found.total.units == 9


def arguments(registry: Path) -> list[str]:
    config = registry.parent / "cache.yaml"
    config.write_text(yaml.safe_dump(cache_config().model_dump(mode="json")))
    return ["-q", "--device", "cpu", "--window-batch", "8", "-r", str(registry),
            "-w", str(work_of(registry)), "-c", str(config)]  # fmt: skip


def test_the_command(tiny_registry: Path) -> None:
    result = CliRunner().invoke(app, ["plan", "--json", *arguments(tiny_registry)])
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["units"] == {"to_make": 27, "cached": 0}


def test_the_command_fails_over_a_quota_after_it_has_printed(tiny_registry: Path) -> None:
    command = ["plan", "--json", "--quota", "10 kB", *arguments(tiny_registry)]
    result = CliRunner().invoke(app, command)
    assert isinstance(result.exception, SpaceError)
    assert result.exception.exit_code == 2
    assert "quota of 10 kB" in str(result.exception)
    assert json.loads(result.stdout)["fits"] is False


def test_a_quota_that_is_no_size(tiny_registry: Path) -> None:
    result = CliRunner().invoke(app, ["plan", "--quota", "some", *arguments(tiny_registry)])
    assert isinstance(result.exception, ConfigError)
