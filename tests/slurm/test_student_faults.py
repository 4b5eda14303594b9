"""Stage two on two nodes of a real Slurm, under what happens to jobs. Each ends with the weights of
the student that nobody disturbed."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import pytest

from tests.faults.ledger import LEDGER
from tests.slurm.cluster import Slurm, wait_until
from tests.slurm.submitting import (
    ENDS,
    assert_intact,
    assert_same_student,
    logs,
    newest_step,
    process_of,
    submitted,
    use,
)

pytestmark = [pytest.mark.slurm, pytest.mark.slow]


@pytest.fixture
def student(
    slurm: Slurm, tiny_cached: Path, undisturbed_student: Path, monkeypatch: pytest.MonkeyPatch
) -> str:
    """The number of a job that has made its first step."""
    use(slurm, monkeypatch)
    job = submitted(tiny_cached, "train-student")["train-student"]
    wait_until(lambda: newest_step(tiny_cached) > 0)
    return job


def test_a_process_on_one_of_the_nodes_is_killed(
    slurm: Slurm, student: str, tiny_cached: Path, undisturbed_student: Path
) -> None:
    os.kill(process_of(student, 1), signal.SIGKILL)
    finish(slurm, student, tiny_cached, undisturbed_student, "SIGKILL of a process of stage two")


def test_a_job_of_a_higher_partition_takes_the_nodes(
    slurm: Slurm, student: str, tiny_cached: Path, undisturbed_student: Path
) -> None:
    urgent = tiny_cached.parent / "urgent.sh"
    urgent.write_text("#!/bin/bash\nsleep 1\n")
    other = slurm.submit(
        urgent, "--partition=high", "--nodes=2", "--exclusive", "--mem=100", "--output=/dev/null"
    )
    finish(slurm, student, tiny_cached, undisturbed_student, "stage two pre-empted by a partition")
    assert slurm.wait(other, until=ENDS) == {other: "COMPLETED"}
    assert slurm.times(other)[1] <= slurm.times(student)[0]  # of its last start


def finish(slurm: Slurm, job: str, registry: Path, undisturbed: Path, fault: str) -> None:
    """Waits for the end, and holds the student against the other; the fault happened just now."""
    before, began = newest_step(registry), time.monotonic()
    wait_until(lambda: newest_step(registry) > before + 1 or not alive(slurm, job))
    seconds = time.monotonic() - began
    assert slurm.wait(job, until=ENDS) == {job: "COMPLETED"}, logs(registry)
    assert "Restarts=1" in slurm.call("scontrol", "show", "job", job)
    assert "going on after step" in logs(registry)[f"train-student-{job}.log"]
    assert_same_student(registry, undisturbed)
    assert_intact(registry)
    LEDGER.add(f"{fault}, two Slurm nodes")
    LEDGER.took(f"{fault}, two Slurm nodes", seconds)


def alive(slurm: Slurm, job: str) -> bool:
    return not set(slurm.states(job).values()) <= set(ENDS)
