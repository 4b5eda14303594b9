"""Stage one on Dask workers that die, leave and come, and a scheduler that goes."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from pipeline.engine.here import Engine
from pipeline.errors import EngineError, WorkerDied
from tests.faults.deadly import arm, build_deadly, deaths
from tests.faults.engines import PATIENCE_S, assert_whole, engine_on, num_units, wait_until
from tests.faults.ledger import LEDGER
from tests.faults.small import DATASET, cached_copy, run_stage, unit_names
from tests.tiny import copy_cohort

pytest.importorskip("distributed", reason="Dask's distributed is not installed")
from pipeline.engine import choose, dask

ROOT = Path(__file__).resolve().parents[2]
NUM_CASES = 24
MARKED = 3
POISON = f"{DATASET}/case_{MARKED:03}"


@pytest.fixture(scope="module")
def two_workers() -> Iterator[Engine]:
    with engine_on("local", workers=2) as engine:
        yield engine


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("deadly") / "cohort"
    return build_deadly(folder, num_cases=NUM_CASES, marked=MARKED)


@pytest.fixture(scope="module")
def undisturbed(built: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return cached_copy(built, tmp_path_factory.mktemp("deadly") / "undisturbed")


@pytest.fixture
def cohort(built: Path, tmp_path: Path) -> Path:
    return copy_cohort(built, tmp_path / "cohort")


def test_workers_make_what_this_process_makes(
    two_workers: Engine,
    cohort: Path,
    undisturbed: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(dask, "SECONDS_BETWEEN_LINES", 0.1)
    arm(cohort, seconds=0.3)
    report = run_stage(cohort, engine=two_workers)
    assert (report.failed, sorted(report.done)) == ({}, sorted(unit_names(cohort)))
    assert_whole(cohort, undisturbed)
    again = run_stage(cohort, engine=two_workers)
    assert (again.failed, again.done) == ({}, [])
    told = capsys.readouterr().err
    assert f"at work on 2 workers: {DATASET}/case_" in told
    assert "warning" not in told


def test_a_worker_that_is_killed_in_the_middle_of_a_case_costs_nothing_but_time(
    two_workers: Engine, cohort: Path, undisturbed: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arm(cohort, times=1)
    report = run_stage(cohort, engine=two_workers)
    assert (report.failed, report.exit_code) == ({}, 0)
    (death,) = deaths(cohort.parent / "grave")
    told = capsys.readouterr().err
    assert f"{POISON} was at work when its worker" in told
    assert f"pid {death.name.split('.')[1]}) was killed by signal 9 (SIGKILL" in told
    assert "B of memory at the most" in told
    assert_whole(cohort, undisturbed)
    LEDGER.add("worker killed in the middle of a case, Dask on one machine")


def test_a_case_that_kills_its_workers_is_named_and_no_other_fails(
    two_workers: Engine, cohort: Path, undisturbed: Path
) -> None:
    arm(cohort, times=99)
    report = run_stage(cohort, engine=two_workers)
    assert set(report.failed) == {f"one x {POISON}", f"two x {POISON}"}
    assert report.exit_code == 1
    for error in report.failed.values():
        assert isinstance(error, WorkerDied)
        assert str(error).startswith(f"{POISON}: its worker ended each of 3 times")
        assert "SIGKILL" in str(error)
    others = {name for name in unit_names(cohort) if not name.endswith(f"x {POISON}")}
    assert set(report.done) == others
    assert len(others) == NUM_CASES + 2 * (NUM_CASES - 1)  # cases, and units of two teachers
    assert len(deaths(cohort.parent / "grave")) == 3
    arm(cohort)
    assert run_stage(cohort).failed == {}
    assert_whole(cohort, undisturbed)
    LEDGER.add(f"poison case among {NUM_CASES}")


def test_workers_join_and_leave_and_the_scheduler_is_lost_and_restarted(
    cohort: Path, undisturbed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(choose, "_CONNECT_S", 3)
    arm(cohort, seconds=0.4)
    port = free_port()
    address = f"tcp://127.0.0.1:{port}"
    scheduler, first = start_scheduler(port), start_worker(address)
    others: list[subprocess.Popen[bytes]] = []
    outcome: list[Any] = []

    def drive() -> None:
        try:
            with engine_on(address) as engine:
                outcome.append(run_stage(cohort, engine=engine))
        except EngineError as error:
            outcome.append(error)

    driver = threading.Thread(target=drive)
    try:
        driver.start()
        wait_until(lambda: num_units(cohort) > 0)
        others.append(start_worker(address))
        first.send_signal(signal.SIGTERM)
        first.wait(PATIENCE_S)
        before = num_units(cohort)
        wait_until(lambda: num_units(cohort) > before)  # by the one that came
        scheduler.kill()
        driver.join(PATIENCE_S)
        (error,) = outcome
        assert isinstance(error, EngineError)
        assert "does not answer" in str(error)
        assert "then run the same command" in str(error)
        assert error.exit_code == 1
        with pytest.raises(EngineError, match="no Dask scheduler answers"), engine_on(address):
            pass
        arm(cohort)
        scheduler = start_scheduler(port)
        others.append(start_worker(address))
        with engine_on(address) as engine:
            report = run_stage(cohort, engine=engine)
        assert (report.failed, report.exit_code) == ({}, 0)
        assert report.skipped
        assert_whole(cohort, undisturbed)
        LEDGER.add("scheduler lost and restarted")
        LEDGER.add("workers join and leave")
    finally:
        for process in (*others, first, scheduler):
            process.kill()  # a worker's own process ends with its nanny
        for process in (*others, first, scheduler):
            process.wait(PATIENCE_S)
        driver.join(PATIENCE_S)


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def start_scheduler(port: int) -> subprocess.Popen[bytes]:
    """Begun and answering: how long that takes on a busy machine is not what is tried."""
    scheduler = _start(
        "dask_scheduler", "--host", "127.0.0.1", "--port", str(port), "--no-dashboard"
    )
    wait_until(lambda: answers(port))
    return scheduler


def answers(port: int) -> bool:
    with socket.socket() as asked:
        return asked.connect_ex(("127.0.0.1", port)) == 0


def start_worker(address: str) -> subprocess.Popen[bytes]:
    return _start("dask_worker", address, "--nthreads", "1", "--memory-limit", "0")


def _start(module: str, *arguments: str) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [sys.executable, "-m", f"distributed.cli.{module}", *arguments],
        env={**os.environ, "PYTHONPATH": str(ROOT)}, cwd=ROOT,
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
