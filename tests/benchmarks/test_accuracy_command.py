"""The bench of accuracy as a command: processes, signals, and one tiny run from end to end."""

from __future__ import annotations

import fcntl
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from benchmarks.accuracy.__main__ import main
from benchmarks.accuracy.job import BUSY
from benchmarks.accuracy.job import main as job_main
from benchmarks.accuracy.runner import StoppedBySignal, Task, run_tasks
from pipeline.log import Log

ROOT = Path(__file__).parents[2]


def python(folder: Path, name: str, code: str) -> Task:
    """A task of some Python code."""
    return Task(name, ["-c", code], folder / f"{name}.log")


def test_a_failed_job_is_named_and_the_others_go_on(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    ticks: list[int] = []
    threads = "import os; print(os.environ['OMP_NUM_THREADS'])"
    tasks = [python(tmp_path, "bad", "print('why', flush=True); 1 / 0")]
    tasks += [python(tmp_path, f"good{n}", threads) for n in range(2)]
    failed = run_tasks(tasks, 1, log=Log(), tick=lambda: ticks.append(1))
    assert list(failed) == ["bad"]
    assert "exit code 1" in failed["bad"]
    assert str(tmp_path / "bad.log") in capfd.readouterr().err
    log = (tmp_path / "bad.log").read_text()
    assert "why" in log
    assert "ZeroDivisionError" in log
    assert (tmp_path / "good1.log").read_text() == "1\n"
    assert ticks


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_the_children_first(tmp_path: Path, number: signal.Signals) -> None:
    code = (
        "import os, pathlib, time\n"
        f"pathlib.Path({str(tmp_path)!r}, 'begun').write_text(str(os.getpid()))\n"
        "time.sleep(300)"
    )
    tasks = [python(tmp_path, "long", code), python(tmp_path, "next", "print('started')")]

    def send() -> None:
        while not (tmp_path / "begun").exists() or not (tmp_path / "begun").read_text():
            time.sleep(0.05)
        os.kill(os.getpid(), number)

    threading.Thread(target=send, daemon=True).start()
    before = signal.getsignal(number)
    with pytest.raises(StoppedBySignal):
        run_tasks(tasks, 1, log=Log(quiet=True), tick=lambda: None)
    assert signal.getsignal(number) is before
    with pytest.raises(ProcessLookupError):
        os.kill(int((tmp_path / "begun").read_text()), 0)
    assert not (tmp_path / "next.log").exists()


def test_two_processes_never_work_on_one_job(tmp_path: Path) -> None:
    request = tmp_path / "request.json"
    request.write_text(json.dumps({"folder": str(tmp_path)}))
    with (tmp_path / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert job_main(request) == BUSY


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--regimes", "a,z"], "no 'z'"),
        (["--budgets", "medium"], "short, long"),
        (["--kinds", "ms-kd"], "ms_kd"),
        (["--kinds", "generation_2"], "taught by the student of ms_kd"),
        (["--seeds", "0"], "at least one"),
    ],
)
def test_wrong_arguments(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], said: str
) -> None:
    assert main([str(tmp_path / "new"), *arguments]) == 2
    assert said in capsys.readouterr().err
    assert not (tmp_path / "new").exists()


@pytest.mark.slow
def test_from_nothing_to_tables(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    configs = tmp_path / "configs"
    configs.mkdir()
    (configs / "constant.yaml").write_text("supervision: {logits: {schedule: constant}}\n")
    folder = tmp_path / "bench"
    wanted = [
        str(folder), "--size", "tiny", "--regimes", "d", "--seeds", "1", "--first-seed", "3",
        "--budgets", "short", "--configs", str(configs),
        "--kinds", "marginal,pseudo_label,ms_kd,full,perfect_teachers,generation_2",
    ]  # fmt: skip
    # Killed outright while it makes teachers: the same command goes on.
    began = subprocess.Popen(
        [sys.executable, "-m", "benchmarks.accuracy", *wanted, "--cohorts-only"],
        cwd=ROOT, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    job = folder / "d" / "seed3"
    until = time.monotonic() + 300
    while not (job / "teachers").exists() and time.monotonic() < until:
        time.sleep(0.1)
    began.send_signal(signal.SIGTERM)
    assert began.wait(60) == 130
    assert not (job / "cohort.json").exists()

    assert main(wanted) == 0, (job / "job.log").read_text()
    table = capsys.readouterr().out
    assert "ms_kd - the better of both" in table
    assert "constant - marginal" in table
    assert "7 configurations were ever scored" in table
    results = json.loads((folder / "validation" / "results.json").read_text())
    assert set(results["findings"]["dice"]["short"]["d"]) == {
        "marginal", "pseudo_label", "ms_kd", "full", "perfect_teachers", "generation_2",
        "constant",
    }  # fmt: skip
    assert results["missing"] == []
    assert results["num_scored_on_test"] == 0
    assert set(results["teachers"]["d/seed3"]["liver"]) == {
        "recall", "precision", "dice", "missed_cases", "num_cases",
    }  # fmt: skip
    assert not list(folder.glob("**/scores_test.json"))
    page = (folder / "validation" / "accuracy.md").read_text()
    assert "| d: ms_kd | 2 |" in page

    students = {p: p.stat().st_mtime_ns for p in folder.glob("**/student.pt")}
    assert len(students) == 7
    # Experts and the first student, of all its organs.
    assert len(list((job / "work" / "teachers").glob("student@*"))) == 1
    assert main([*wanted, "--test"]) == 0
    assert {p: p.stat().st_mtime_ns for p in folder.glob("**/student.pt")} == students
    tested = json.loads((folder / "test" / "results.json").read_text())
    assert tested["num_scored_on_test"] == 7
    rows = json.loads(next(folder.glob("**/ms_kd-*/scores_test.json")).read_text())["rows"]
    cases = {row["case"] for row in rows}
    assert cases == {f"{o}-ct/case_003" for o in ("liver", "spleen", "kidneys", "pancreas")} | {
        "multi-ct/case_001"
    }
    # Nothing is left to do: no process is started.
    (job / "job.log").unlink()
    assert main(wanted) == 0
    assert not (job / "job.log").exists()
