"""`pipeline cache ...` as it is typed: arguments, exit codes, questions, output for machines."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner, Result

from pipeline.cli.app import app
from pipeline.errors import ConfigError, PipelineError
from tests.stages.stage_contract import snapshot
from tests.tiny import cache_config, change_registry, fill_cache, work_of
from tests.unit.review.damage import flip, rewrite, shard, unit_at

CASE = "multi-ct/case_001"
LIVER = f"liver x {CASE}"


def call(registry: Path, command: str, *arguments: str, answer: str | None = None) -> Result:
    options = [] if command in ("gc", "diff") else ["-r", str(registry)]
    work = [] if command == "diff" else ["-w", str(work_of(registry))]
    return CliRunner().invoke(app, ["cache", command, *arguments, *options, *work], input=answer)


def parsed(result: Result) -> Any:
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


@pytest.fixture
def dropped(tiny_cached: Path) -> Path:
    """A cached cohort whose registry has since dropped a teacher."""
    return change_registry(tiny_cached, lambda data: data["teachers"].pop("liver"))


# --- ls -------------------------------------------------------------------------------------------


def test_ls(built_cache: Path) -> None:
    result = call(built_cache, "ls")
    assert result.exit_code == 0
    assert "multi-ct" in result.stdout
    found = parsed(call(built_cache, "ls", "--json"))
    assert set(found) == {"work", "datasets", "teachers", "students", "bytes"}
    assert {entry["reached"] for entry in found["teachers"]} == {9}


def test_ls_of_no_folder_and_of_no_registry(
    built_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    work = str(work_of(built_cache))
    found = parsed(CliRunner().invoke(app, ["cache", "ls", "-w", work, "--json"]))
    assert {entry["reached"] for entry in found["teachers"]} == {None}
    refused = CliRunner().invoke(app, ["cache", "ls", "-w", "nowhere"])
    assert isinstance(refused.exception, ConfigError)
    absent = CliRunner().invoke(app, ["cache", "ls", "-w", work, "-r", "absent.yaml"])
    assert isinstance(absent.exception, PipelineError)
    assert absent.exception.exit_code == 2


# --- why ------------------------------------------------------------------------------------------


def test_why(built_cache: Path, tmp_path: Path) -> None:
    config = tmp_path / "cache.yaml"
    config.write_text(yaml.safe_dump(cache_config().model_dump(mode="json")))
    reused = parsed(call(built_cache, "why", CASE, "--json", "-c", str(config)))
    assert [reason["verdict"] for reason in reused] == ["reused"] * 3
    built_in = parsed(call(built_cache, "why", CASE, "--json"))
    assert [reason["verdict"] for reason in built_in] == ["reused", "unknown", "unknown"] or [
        line.split(": ")[0] for line in built_in[1]["differences"]
    ] == ["teacher.window.overlap", "teacher.window.shape"]
    shown = call(built_cache, "why", CASE, "-c", str(config))
    assert shown.exit_code == 0
    assert "reused" in shown.stdout


# --- verify ---------------------------------------------------------------------------------------


def test_verify_says_by_its_exit_code(tiny_cached: Path) -> None:
    assert call(tiny_cached, "verify", "-q").exit_code == 0
    flip(shard(unit_at(work_of(tiny_cached), LIVER), "log_odds/liver"))
    assert call(tiny_cached, "verify", "-q").exit_code == 0
    result = call(tiny_cached, "verify", "--deep", "-q")
    assert result.exit_code == 1
    assert LIVER in result.stdout
    assert "--repair" in result.stderr
    plain = json.loads(call(tiny_cached, "verify", "--deep", "-q", "--json").stdout)
    assert [finding["unit"] for finding in plain["findings"]] == [LIVER]
    assert plain["recomputed"] == []


def test_verify_asks_before_it_repairs(tiny_cached: Path) -> None:
    unit = unit_at(work_of(tiny_cached), LIVER)
    flip(shard(unit, "log_odds/liver"))
    before = snapshot(work_of(tiny_cached))
    refused = call(tiny_cached, "verify", "--deep", "--repair", "-q", answer="n\n")
    assert refused.exit_code == 1
    assert "Remove 1 damaged" in refused.stderr
    assert snapshot(work_of(tiny_cached)) == before
    without_answer = call(tiny_cached, "verify", "--deep", "--repair", "-q")
    assert without_answer.exit_code == 1
    assert snapshot(work_of(tiny_cached)) == before
    done = call(tiny_cached, "verify", "--deep", "--repair", "-q", answer="y\n")
    assert done.exit_code == 0
    assert not unit.exists()
    assert call(tiny_cached, "verify", "-q").exit_code == 1
    fill_cache(tiny_cached)
    assert call(tiny_cached, "verify", "--deep", "-q").exit_code == 0


def test_verify_repairs_without_asking(tiny_cached: Path) -> None:
    unit = unit_at(work_of(tiny_cached), LIVER)
    shard(unit, "log_odds/liver").unlink()
    assert call(tiny_cached, "verify", "--repair", "--yes", "-q").exit_code == 0
    assert not unit.exists()
    # Nothing is damaged any more, something is still missing, and that is no repair.
    assert call(tiny_cached, "verify", "--repair", "--yes", "-q").exit_code == 1


def test_verify_recomputes(tiny_cached: Path) -> None:
    options = ["--recompute", "--sample", "18", "--device", "cpu", "-q"]
    # In batches of another size, float32 sums may differ in their last bit: see docs/cache.md.
    assert call(tiny_cached, "verify", *options, "--window-batch", "1").exit_code == 0
    options += ["--window-batch", "8"]
    plain = parsed(call(tiny_cached, "verify", *options, "--json", "--tolerance", "0"))
    assert len(plain["recomputed"]) == 18
    assert {max(one["log_odds"].values()) for one in plain["recomputed"]} == {0}

    def change(arrays: dict[str, Any]) -> None:
        arrays["log_odds/liver"][3, 3, 3] += 2

    rewrite(unit_at(work_of(tiny_cached), LIVER), arrays=change)
    result = call(tiny_cached, "verify", *options)
    assert result.exit_code == 1
    assert "DIFFERS" in result.stdout
    assert call(tiny_cached, "verify", *options, "--tolerance", "3").exit_code == 0


# --- diff -----------------------------------------------------------------------------------------


def test_diff(tiny_cached: Path) -> None:
    a = work_of(tiny_cached)
    b = Path(shutil.copytree(a, a.with_name("other")))
    assert parsed(call(tiny_cached, "diff", str(a), str(b), "--json"))["same"] is True
    shutil.rmtree(unit_at(b, CASE))
    found = parsed(call(tiny_cached, "diff", str(a), str(b), "--json"))
    assert (found["same"], found["cases"]["only_a"]) == (False, [CASE])
    shown = call(tiny_cached, "diff", str(a), str(b))
    assert shown.exit_code == 0
    assert CASE in shown.stdout
    refused = call(tiny_cached, "diff", str(a), str(b / "nowhere"))
    assert isinstance(refused.exception, ConfigError)


# --- gc -------------------------------------------------------------------------------------------


def test_gc_dry_run_and_a_refused_question_remove_nothing(dropped: Path) -> None:
    before = snapshot(work_of(dropped))
    dry = call(dropped, "gc", str(dropped), "--dry-run")
    assert dry.exit_code == 0
    assert "would remove 11 things" in dry.stderr
    refused = call(dropped, "gc", str(dropped), answer="n\n")
    assert refused.exit_code == 1
    assert "Remove 11 things" in refused.stderr
    silent = call(dropped, "gc", str(dropped))
    assert silent.exit_code == 1
    assert snapshot(work_of(dropped)) == before


@pytest.mark.parametrize(("options", "answer"), [([], "y\n"), (["--yes"], None)])
def test_gc_removes(dropped: Path, options: list[str], answer: str | None) -> None:
    result = call(dropped, "gc", str(dropped), "-q", *options, answer=answer)
    assert result.exit_code == 0
    assert "removed 11 things" in result.stderr
    assert not list(work_of(dropped).glob("teachers/liver@*"))
    again = call(dropped, "gc", str(dropped), "--yes")
    assert "nothing to do" in again.stderr


def test_gc_for_machines(dropped: Path) -> None:
    found = parsed(call(dropped, "gc", str(dropped), "--dry-run", "--json"))
    assert len(found["units"]) == 9
    assert found["bytes"] > 1000


def test_gc_says_what_stays_because_it_is_young(dropped: Path) -> None:
    change_registry(dropped, lambda data: data["datasets"].pop("multi-ct"))
    result = call(dropped, "gc", str(dropped), "--dry-run")
    assert "3 case units that nobody reaches, younger than 24 hours" in result.stderr
    found = parsed(call(dropped, "gc", str(dropped), "--dry-run", "--json", "--grace-hours", "0"))
    assert found["kept_young"] == []
    assert {f"multi-ct/case_00{n}" for n in range(3)} <= {unit["unit"] for unit in found["units"]}


def test_gc_refuses(tiny_registry: Path, built_cache: Path) -> None:
    work = str(work_of(built_cache))
    other = change_registry(tiny_registry, lambda data: data["teachers"]["liver"].update(taps=[]))
    runner = CliRunner()
    never = runner.invoke(app, ["cache", "gc", str(built_cache), str(other), "-w", work, "--yes"])
    assert isinstance(never.exception, ConfigError)
    assert runner.invoke(app, ["cache", "gc", "-w", work]).exit_code == 2
    nowhere = runner.invoke(app, ["cache", "gc", str(built_cache), "-w", str(tiny_registry) + "x"])
    assert isinstance(nowhere.exception, ConfigError)


# --- export ---------------------------------------------------------------------------------------


def test_export(built_cache: Path, tmp_path: Path) -> None:
    options = ["--case", CASE, "-o", str(tmp_path), "--to", "nifti"]
    one = call(built_cache, "export", *options, "--teacher", "liver")
    assert one.exit_code == 0
    assert one.stdout.splitlines() == [str(tmp_path / CASE / "liver_liver.nii.gz")]
    every = call(built_cache, "export", *options, "--regions")
    assert len(every.stdout.splitlines()) == 5
    assert all(Path(line).is_file() for line in every.stdout.splitlines())
    assert call(built_cache, "export", *options[:-1], "mp3").exit_code == 2


# --- the whole command line -----------------------------------------------------------------------
