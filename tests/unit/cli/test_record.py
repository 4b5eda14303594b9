"""`--report` and `--verbose`: what is told of one call of a command."""

from __future__ import annotations

import inspect
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import pytest
import typer
from typer.testing import CliRunner

from pipeline.cli import app as cli
from pipeline.cli.options import end, open_log, open_settings
from pipeline.cli.record import OUTPUTS, WRITES, CallRecord, current, recorded
from pipeline.config import digest, file_sha256
from pipeline.errors import ConfigError, GeometryError, PipelineError, WorkFolderError
from stages.evaluate import EvaluateConfig
from stages.report import StageReport
from tests.tiny import RunCli, file_limit, work_of
from tests.unit.cli.test_app import ROOT

KEYS = {
    "format_version", "command", "arguments", "dry_run", "began", "ended", "seconds", "exit_code",
    "error", "units", "stages", "config_digest", "inputs", "outputs", "device", "memory", "machine",
    "versions",
}  # fmt: skip
# A recorded command that sleeps, so that a signal finds it at work; it loads no stage.
_SLEEPER = """
import time
import typer
from pipeline.cli.record import recorded
app = typer.Typer(pretty_exceptions_enable=False)
@app.command()
@recorded
def sleeper() -> None:
    print("asleep", flush=True)
    time.sleep(60)
app()
"""


def app_of(body: Any) -> typer.Typer:
    """A command line with one recorded command, whose body is given."""
    app = typer.Typer(pretty_exceptions_enable=False)

    @app.command()
    @recorded
    def try_it(
        work: Annotated[Path, typer.Option()] = Path("work"),
        config: Annotated[Path | None, typer.Option()] = None,
        device: str = "cpu",
        quiet: bool = False,
        dry_run: bool = False,
    ) -> None:
        """A line of help."""
        body(work, config, quiet)

    return app


def report_of(tmp_path: Path, body: Any, *arguments: str) -> tuple[dict[str, Any], Any]:
    path = tmp_path / "out" / "run.json"
    result = CliRunner().invoke(app_of(body), ["--report", str(path), *arguments])
    found: dict[str, Any] = json.loads(path.read_text())
    assert set(found) == KEYS
    assert [p.name for p in path.parent.iterdir()] == ["run.json"]  # nothing temporary
    return found, result


def test_a_run_that_is_done(tmp_path: Path) -> None:
    config = tmp_path / "e.yaml"
    config.write_text("tolerance_mm: 2.0\n")

    def body(work: Path, config: Path | None, quiet: bool) -> None:
        open_settings(config, EvaluateConfig)
        open_log(quiet, work)
        end(StageReport("evaluate", done=["a/1"], skipped=["a/2"], num_bytes=5))

    found, result = report_of(tmp_path, body, "--config", str(config), "--work", str(tmp_path))
    assert result.exit_code == found["exit_code"] == 0
    assert found["command"] == "try-it"
    assert found["units"] == {"done": ["a/1"], "skipped": ["a/2"], "failed": {}}
    assert (found["error"], found["dry_run"]) == (None, False)
    assert found["config_digest"] == digest(EvaluateConfig(tolerance_mm=2.0))
    assert found["inputs"] == {"config": {"path": str(config), "sha256": file_sha256(config)}}
    assert found["outputs"] == {"work": str(tmp_path)}
    assert found["device"] == {"asked": "cpu", "used": "cpu", "name": None}
    assert found["memory"]["peak_rss_bytes"] > 10_000_000
    assert found["versions"]["torch"].startswith("2.")
    assert found["stages"][0]["bytes"] == 5
    assert found["began"] <= found["ended"]
    assert found["arguments"]["config"] == str(config)


def test_only_a_report_is_replaced(tmp_path: Path) -> None:
    """A slip in a long command line must not cost a registry."""

    def body(work: Path, config: Path | None, quiet: bool) -> None:
        bodies.append(work)

    bodies: list[Path] = []
    path = tmp_path / "data_registry.yaml"
    for text in ("organs: {liver: 1}", '{"organs": {"liver": 1}}'):
        path.write_text(text)
        result = CliRunner().invoke(app_of(body), ["--report", str(path)])
        assert isinstance(result.exception, ConfigError)
        assert str(result.exception) == (
            f"{path}: `pipeline try-it` did not write this file and does not replace it. Name "
            "another file with --report."
        )
        assert (path.read_text(), bodies) == (text, [])
    path.unlink()
    for number in (1, 2):
        assert CliRunner().invoke(app_of(body), ["--report", str(path)]).exit_code == 0
        assert len(bodies) == number


def test_failed_units_are_named_with_their_errors(tmp_path: Path) -> None:
    wrong = GeometryError("no image.", where="a/2, x.nii.gz", fix="Copy it again.")

    def body(work: Path, config: Path | None, quiet: bool) -> None:
        end(StageReport("predict", done=["a/1"], failed={"a/2": wrong, "a/3": ValueError("bug")}))

    found, result = report_of(tmp_path, body)
    assert result.exit_code == found["exit_code"] == 1
    failed = found["units"]["failed"]
    assert failed["a/2"] == {
        "kind": "GeometryError", "what": "no image.", "where": "a/2, x.nii.gz",
        "fix": "Copy it again.", "message": str(wrong), "exit_code": 2,
    }  # fmt: skip
    assert (failed["a/3"]["kind"], failed["a/3"]["exit_code"]) == ("ValueError", 1)
    assert found["error"] is None


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (ConfigError("a mistake.", where="a.yaml:3", fix="Mend it."), 2),
        (PipelineError("broken."), 1),
        (ZeroDivisionError("a bug"), 1),
        (KeyboardInterrupt(), 130),
        (typer.Exit(2), 2),
    ],
)
def test_it_is_written_however_a_command_ends(
    tmp_path: Path, error: BaseException, code: int
) -> None:
    def body(work: Path, config: Path | None, quiet: bool) -> None:
        raise error

    found, result = report_of(tmp_path, body)
    assert found["exit_code"] == code
    if isinstance(error, typer.Exit):
        assert (found["error"], result.exit_code) == (None, 2)
    else:
        assert found["error"]["kind"] == type(error).__name__
        assert found["error"]["message"] == str(error)
    assert current() is None


def test_a_signal_that_ends_a_job_leaves_a_report(tmp_path: Path) -> None:
    path = tmp_path / "run.json"
    process = subprocess.Popen(
        [sys.executable, "-c", _SLEEPER, "--report", str(path)], cwd=ROOT, stdout=subprocess.PIPE
    )
    assert process.stdout is not None
    assert process.stdout.readline() == b"asleep\n"
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 128 + signal.SIGTERM
    found = json.loads(path.read_text())
    assert (found["command"], found["exit_code"]) == ("sleeper", 143)
    assert found["error"]["kind"] == "SystemExit"


def commands(app: typer.Typer = cli.app, prefix: str = "") -> Iterator[tuple[str, set[str]]]:
    """Each command as it is typed, with its parameters."""
    for command in app.registered_commands:
        assert command.callback is not None
        name = command.name or command.callback.__name__.replace("_", "-")
        yield f"{prefix}{name}", set(inspect.signature(command.callback).parameters)
    for group in app.registered_groups:
        assert group.typer_instance is not None
        yield from commands(group.typer_instance, f"{group.name} ")


def test_all_that_work_for_longer_than_a_moment_have_the_options() -> None:
    lacking = {name for name, known in commands() if not {"report", "verbose"} <= known}
    assert lacking == {"info", "status", "cache ls", "cache why", "cache diff"}
    # It has no progress to show.
    assert {name for name, known in commands() if "quiet" not in known} - lacking == {"init"}


def test_several_devices_are_all_named(tmp_path: Path) -> None:
    found, _ = report_of(tmp_path, lambda *a: None, "--device", "cpu, cpu")
    assert found["device"] == {"asked": "cpu, cpu", "used": "cpu,cpu", "name": None}


def test_predictions_are_written_by_evaluate_and_read_by_report(tmp_path: Path) -> None:
    for command, output in (("evaluate", True), ("report", False)):
        path = tmp_path / "run.json"
        record = CallRecord(command, {"predictions": tmp_path, "work": tmp_path}, path)
        record.begin()
        record.end(0)
        found = json.loads(path.read_text())
        assert ("predictions" in found["outputs"]) == output
        assert ("predictions" in found["inputs"]) == (not output)
        assert found["outputs"]["work"] == str(tmp_path)


class TestPlaces:
    def test_a_place_that_cannot_be_written_is_refused_first(self, tmp_path: Path) -> None:
        ran: list[int] = []
        (tmp_path / "file").touch()
        for path in (tmp_path, tmp_path / "file" / "run.json"):
            result = CliRunner().invoke(app_of(lambda *a: ran.append(1)), ["--report", str(path)])
            assert isinstance(result.exception, PipelineError)
            assert str(result.exception).startswith(f"--report {path}")
            assert "cannot be written: " in str(result.exception)
            assert result.exception.exit_code == 2
        assert ran == []

    @pytest.mark.parametrize(
        "arguments",
        [
            ["cache", "export", "--case", "a/b", "-o"],
            ["cache-teachers", "-w"],
            ["compare", "a.yaml", "-o", "out", "-w"],
            ["compare", "a.yaml", "-o"],
            ["demo"],
            ["export", "run", "-f", "onnx", "-o"],
            ["inspect", "-o"],
            ["predict", "student.pt", "ct.nii", "-o"],
            ["train-student", "-w"],
            ["train-teachers", "-w"],
        ],
        ids=" ".join,
    )
    def test_a_folder_that_cannot_be_filled_is_refused_first(
        self, arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Nothing else that these commands lack is looked at before, nor anything made."""
        monkeypatch.chdir(tmp_path)
        (tmp_path / "file").touch()
        wanted = tmp_path / "file" / "out"
        error = CliRunner().invoke(cli.app, [*arguments, str(wanted)]).exception
        assert isinstance(error, WorkFolderError)
        assert str(error).startswith(f"{wanted}: this folder cannot be written: a file is in the")
        assert error.exit_code == 2
        monkeypatch.setattr(os, "access", lambda path, mode: False)  # root may write everywhere
        error = CliRunner().invoke(cli.app, [*arguments, str(tmp_path / "out")]).exception
        assert isinstance(error, WorkFolderError)
        assert f"nobody may write into {tmp_path}." in str(error)
        assert [path.name for path in tmp_path.iterdir()] == ["file"]

    def test_no_command_that_fills_a_folder_is_forgotten(self) -> None:
        only_read_or_ask_at_once = {
            "cache gc", "cache verify", "evaluate", "plan", "report", "submit",
        }  # fmt: skip
        found = set()
        root = typer.main.get_command(cli.app)
        for name, one in root.commands.items():  # type: ignore[attr-defined]
            for below, command in getattr(one, "commands", {"": one}).items():
                names = {option.name for option in command.params}
                if "report" in names and names & set(OUTPUTS):
                    found.add(f"{name} {below}".strip())
        assert found == set(WRITES) | only_read_or_ask_at_once

    def test_a_disk_that_fills_up_meanwhile_is_told(self, tmp_path: Path) -> None:
        path = tmp_path / "run.json"
        with file_limit(10):
            result = CliRunner().invoke(app_of(lambda *a: None), ["--report", str(path)])
        assert "the report cannot be written (File too large)." in str(result.exception)

        def fail(*_: object) -> None:
            raise ConfigError("the first error.", where="x", fix="y.")

        with file_limit(10):
            result = CliRunner().invoke(app_of(fail), ["--report", str(path)])
        assert "the first error." in str(result.exception)  # and not the one of its report
        assert "the report cannot be written" in result.stderr

    def test_of_several_processes_the_first_alone_writes_it(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, built_cache: Path, run_cli: RunCli
    ) -> None:
        for rank in (1, 0):
            path = tmp_path / f"{rank}.json"
            monkeypatch.setenv("WORLD_SIZE", "2")
            monkeypatch.setenv("RANK", str(rank))
            run_cli(
                "train-student", "-r", str(built_cache), "-w", str(work_of(built_cache)),
                "--report", str(path), "--dry-run"
            )  # fmt: skip
            assert path.exists() == (rank == 0)


class TestVerbose:
    def test_it_shows_where_an_error_comes_from(self, tmp_path: Path, run_cli: RunCli) -> None:
        arguments = ["check", "-r", str(tmp_path / "nowhere.yaml")]
        code, _, quiet = run_cli(*arguments)
        assert code == 2
        assert "Traceback" not in quiet
        code, _, told = run_cli(*arguments, "-v")
        assert code == 2
        assert told.startswith("Traceback")
        assert "FileNotFoundError" in told  # what lies behind it
        assert told.splitlines()[-1] == quiet.splitlines()[-1]

    def test_details_are_lines_of_their_own(self, capsys: pytest.CaptureFixture[str]) -> None:
        def body(work: Path, config: Path | None, quiet: bool) -> None:
            open_settings(config, EvaluateConfig)
            open_log(quiet).detail("a unit")

        for arguments, there in ((["--verbose"], True), ([], False)):
            told = CliRunner().invoke(app_of(body), arguments).stderr
            assert ("a unit" in told) == there
            assert (digest(EvaluateConfig()) in told) == there
            assert ("torch 2." in told) == there

    def test_it_is_the_opposite_of_quiet(self) -> None:
        result = CliRunner().invoke(app_of(lambda *a: None), ["--verbose", "--quiet"])
        assert str(result.exception).startswith("--quiet and --verbose are opposites.")


class TestEvents:
    def test_begin_and_end_enclose_what_happened(self, tmp_path: Path) -> None:
        wrong = ConfigError("a mistake.", where="b", fix="Mend it.")

        def body(work: Path, config: Path | None, quiet: bool) -> None:
            open_log(quiet, work).event("unit", unit="a")
            end(StageReport("predict", done=["a"], failed={"b": wrong}))

        work = tmp_path / "work"
        CliRunner().invoke(app_of(body), ["--work", str(work)])
        first, unit, last = map(json.loads, (work / "events.jsonl").read_text().splitlines())
        assert (first["event"], first["command"]) == ("begin", "try-it")
        assert first["arguments"]["work"] == str(work)
        assert "torch" in first["versions"]
        assert unit["unit"] == "a"
        assert (last["event"], last["exit_code"], last["done"]) == ("end", 2, 1)
        assert last["failed"] == {"b": str(wrong)}

    def test_a_command_that_did_nothing_leaves_no_folder(self, tmp_path: Path) -> None:
        work = tmp_path / "work"
        CliRunner().invoke(app_of(lambda w, c, q: open_log(q, w) and None), ["--work", str(work)])
        assert not work.exists()
