from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import typer.main
from typer.testing import CliRunner

from pipeline.cli import app as cli
from pipeline.cli.options import Panel, end
from pipeline.errors import CacheMissing, ConfigError, PipelineError
from pipeline.log import Log
from pipeline.student.speed import SpeedFlags, TrainingExecution
from stages.report import Scope, StageReport
from tests.tiny import ROOT, RunCli, run_python
from website.command_reference import walk

Body = Callable[[], object]


def pipeline(*arguments: str, code: str = "from pipeline.cli import main; main()") -> tuple[
    int, str, str
]:  # fmt: skip
    """Runs the command line in a process of its own: exit code, standard output and error."""
    done = run_python("-c", code, *arguments, COLUMNS="200")
    return done.returncode, done.stdout, done.stderr


@pytest.fixture
def try_it() -> Iterator[Callable[[Body], None]]:
    """Adds a command `try-it` with a given body to the command line."""

    def add(body: Body) -> None:
        cli.app.command("try-it")(lambda: body() and None)

    yield add
    cli.app.registered_commands.pop()


def failing(error: Exception) -> Body:
    def fail() -> None:
        raise error

    return fail


class TestHelp:
    def test_the_first_screen_is_in_the_order_of_the_road(self) -> None:
        """At 80 columns each command has one line, below its group's title."""
        lines = CliRunner().invoke(cli.app, ["--help"], env={"COLUMNS": "80"}).output.splitlines()
        shown = [line.strip("│ ").split()[0] for line in lines if line.startswith("│ ")]
        road = ["demo", "info", "init", "check", "plan", "phantom", "train-teachers"]
        road += ["cache-teachers", "cache", "train-student", "predict", "evaluate", "export"]
        road += ["compare", "status", "inspect", "report", "submit"]
        assert shown[-len(road) :] == road

    def test_every_option_is_in_a_group_and_the_groups_have_one_order(self) -> None:
        for name, command in walk(typer.main.get_command(cli.app), ""):
            context = command.make_context(name, [], resilient_parsing=True)
            options = [p for p in command.get_params(context) if p.param_type_name == "option"]
            groups = [one.rich_help_panel for one in options]
            assert set(groups) <= set(Panel), name
            assert groups == sorted(groups, key=list(Panel).index), name
            assert options[-1].name == "help", name

    def test_an_unknown_command_or_option_is_the_users_mistake(self) -> None:
        assert CliRunner().invoke(cli.app, ["train"]).exit_code == 2
        assert CliRunner().invoke(cli.app, ["status", "--jsn"]).exit_code == 2


class TestErrors:
    @pytest.mark.parametrize(
        ("error", "expected"),
        [
            (ConfigError("a mistake.", where="a.yaml:3", fix="Mend it."), 2),
            (CacheMissing("not there."), 1),
            (PipelineError("broken."), 1),
        ],
    )
    def test_one_paragraph_without_traceback(
        self, error: PipelineError, expected: int, try_it: Callable[[Body], None], run_cli: RunCli
    ) -> None:
        try_it(failing(error))
        code, out, err = run_cli("try-it")
        assert code == expected
        assert err == f"error: {error}\n"
        assert out == ""

    @pytest.mark.parametrize(
        "error",
        [
            ZeroDivisionError("a bug"),
            # Not taken for one of standard output either:
            OSError(5, "another file"),
            UnicodeEncodeError("utf-8", "x", 0, 1, ""),
        ],
    )
    def test_anything_else_keeps_its_traceback(
        self,
        monkeypatch: pytest.MonkeyPatch,
        error: Exception,
        try_it: Callable[[Body], None],
    ) -> None:
        try_it(failing(error))
        monkeypatch.setattr(sys, "argv", ["pipeline", "try-it"])
        with pytest.raises(type(error)):
            cli.main()

    def test_a_name_that_this_session_cannot_spell(
        self, monkeypatch: pytest.MonkeyPatch, try_it: Callable[[Body], None], run_cli: RunCli
    ) -> None:
        try_it(failing(UnicodeEncodeError("ascii", "Gr\xfcn", 2, 3, "ordinal not in range")))
        monkeypatch.setattr(sys, "getfilesystemencoding", lambda: "ascii")
        code, _, err = run_cli("try-it")
        assert code == 1
        assert err.endswith(" cannot be a file's name in ascii. Set PYTHONUTF8=1.\n")

    def test_an_unknown_key_of_a_configuration_names_file_and_line(
        self, tmp_path: Path, run_cli: RunCli
    ) -> None:
        config = tmp_path / "student.yaml"
        config.write_text("run: x\ntraining:\n  steps: 3\n  lr: 0.1\n")
        code, _, err = run_cli("train-student", "-c", str(config))
        assert code == 2
        assert f"{config}:4: training.lr: unknown key" in err
        assert "Traceback" not in err

    @pytest.mark.parametrize(
        "command", ["train-teachers", "cache-teachers", "train-student", "status", "phantom"]
    )
    def test_a_bad_registry_is_the_users_mistake_and_nothing_is_written(
        self, tmp_path: Path, command: str, run_cli: RunCli
    ) -> None:
        registry = tmp_path / "data_registry.yaml"
        registry.write_text("schema_version: 1\norgans: {liver: 0}\ndatasets: {}\n")
        arguments = [command, "-r", str(registry)]
        if command != "phantom":
            arguments += ["-w", str(tmp_path / "work")]
        code, _, err = run_cli(*arguments)
        assert code == 2
        assert f"{registry}:2: organs.liver" in err
        assert "mistakes" in err
        assert [p.name for p in tmp_path.iterdir()] == ["data_registry.yaml"]


class TestEnd:
    @pytest.mark.parametrize(
        ("failed", "expected"),
        [
            ({}, 0),
            ({"a": ConfigError("x.")}, 2),
            ({"a": ConfigError("x."), "b": PipelineError("y.")}, 1),
            ({"a": ValueError("z")}, 1),
        ],
    )
    def test_the_exit_code_tells_and_failures_are_named(
        self,
        failed: dict[str, Exception],
        expected: int,
        try_it: Callable[[Body], None],
        run_cli: RunCli,
    ) -> None:
        report = StageReport("evaluate", done=["good"], failed=failed)
        try_it(lambda: end(report))
        code, _, err = run_cli("try-it")
        assert code == expected
        assert "evaluate: 1 done" in err
        for unit, error in failed.items():
            assert f"failed: {unit}: {error}" in err

    def test_many_failures_alike_are_told_in_one_line(
        self, try_it: Callable[[Body], None], run_cli: RunCli
    ) -> None:
        failed: dict[str, Exception] = {
            f"liver x a/case_{n}": ConfigError("is 7 mm.", where=f"a/case_{n}, i/case_{n}.nii")
            for n in range(9)
        }
        failed |= {f"spleen x a/c_{n}": ConfigError("is 7 mm.", where="liver") for n in range(3)}
        report = StageReport("evaluate", failed=failed)
        try_it(lambda: end(report))
        code, _, err = run_cli("try-it")
        assert code == 2
        assert [line for line in err.splitlines() if line.startswith("failed")] == [
            "failed: liver x a/case_0, liver x a/case_1, liver x a/case_2 and 6 more alike: "
            "a/case_0, i/case_0.nii: is 7 mm.",
            *(f"failed: spleen x a/c_{n}: liver: is 7 mm." for n in range(3)),
        ]
        assert len(report.to_json()["failed"]) == 12

    def test_options_reach_the_stage(
        self, built_cohort: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, run_cli: RunCli
    ) -> None:
        seen: dict[str, object] = {}

        def remember(
            config: object, scope: Scope, execution: TrainingExecution, **options: object
        ) -> object:
            seen.update(options, **vars(execution), work=scope.work, log=scope.log)
            return StageReport("train-student")

        monkeypatch.setattr("stages.train_student.run", remember)
        arguments = [
            "train-student", "-r", str(built_cohort), "-w", str(tmp_path), "--device", "cpu",
            "--workers", "3", "--checkpoint-minutes", "0.5", "--dry-run",
            "--precision", "bf16", "--channels-last", "--compile",
        ]  # fmt: skip
        assert run_cli(*arguments)[0] == 0
        assert (seen["workers"], seen["device"], seen["dry_run"]) == (3, "cpu", True)
        assert (seen["checkpoint_minutes"], seen["work"]) == (0.5, tmp_path)
        assert seen["flags"] == SpeedFlags("bf16", channels_last=True, compile=True)
        log = seen["log"]
        assert isinstance(log, Log)
        assert log.events is None


class TestStreams:
    """Whatever standard output is, nobody is shown a traceback."""

    @pytest.mark.parametrize(
        ("to", "code", "says", "buffered"),
        [
            (">&-", 1, "error: standard output cannot be written (Bad file descriptor).\n", ""),
            (">/dev/full", 1, "error: standard output cannot be written (No space left on", ""),
            (">/dev/full", 1, "error: standard output cannot be written (No space left on", "1"),
            ("| true", 1, "", ""),
            (">/dev/null 2>&-", 0, "", ""),
        ],
    )
    def test_one_that_takes_nothing(self, to: str, code: int, says: str, buffered: str) -> None:
        command = f"set -o pipefail; {sys.executable} -m pipeline.cli info --json {to}"
        done = subprocess.run(
            ["bash", "-c", command], cwd=ROOT, capture_output=True, text=True, check=False,
            timeout=60, env={**os.environ, "PYTHONUNBUFFERED": buffered},
        )  # fmt: skip
        assert (done.returncode, done.stderr.startswith(says)) == (code, True), done.stderr
        assert done.stderr.count("\n") == bool(says)

    @pytest.mark.parametrize("utf8", ["0", "1"])
    def test_cases_with_umlauts(self, tmp_path: Path, utf8: str) -> None:
        """Where names of files cannot be spelt either, such a case fails by name."""
        for part in ("images", "labels"):
            (tmp_path / part).mkdir()
            (tmp_path / part / "Lübeck.nii.gz").touch()
        (tmp_path / "r.yaml").write_text(
            "schema_version: 1\norgans: {liver: 1}\ngrid: {spacing_mm: [5, 5, 5]}\n"
            "datasets:\n  a:\n    root: .\n    images: images/{case}.nii.gz\n"
            "    labels: labels/{case}.nii.gz\n    annotated: {liver: 1}\n"
        )
        done = subprocess.run(
            [sys.executable, "-m", "pipeline.cli", "check", "--no-teachers", "--jobs", "1", "-r",
             str(tmp_path / "r.yaml")],
            cwd=ROOT, capture_output=True, check=False, timeout=60,
            env={**os.environ, "LC_ALL": "C", "PYTHONUTF8": utf8, "PYTHONIOENCODING": "ascii",
                 "PYTHONCOERCECLOCALE": "0"},
        )  # fmt: skip
        assert (done.returncode, b"Traceback" in done.stderr) == (2, False), done.stderr
        assert rb"a/L\xfcbeck" in done.stdout
        assert (b"PYTHONUTF8=1" in done.stdout) == (utf8 == "0")
