"""`pipeline submit` on a real Slurm: stages in a chain, and a student on two nodes that is
signalled, saves, is put back and ends with the weights of one that nobody disturbed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from typer.testing import CliRunner

from pipeline.cli import app
from pipeline.inventory.verify import verify
from pipeline.log import Log
from pipeline.student.checkpoint import load_student
from pipeline.student.metrics_file import metric_lines, without_timing
from pipeline.submission.jobs import recorded, with_states
from pipeline.submission.settings import STAGES
from tests.faults.ledger import LEDGER, LONG
from tests.slurm.cluster import Slurm, wait_until
from tests.slurm.test_stage_one import use
from tests.tiny import cache_config, copy_cohort, training_settings, work_of

pytestmark = [pytest.mark.slurm, pytest.mark.slow]

JOBS: dict[str, Any] = {
    "partition": "low",
    "walltime": "00:10:00",
    "cores": 1,
    "memory": "500MB",
    # All nodes are this machine, and their names lead nowhere.
    "prologue": ["export MASTER_ADDR=127.0.0.1"],
    "arguments": ["--device", "cpu"],
    "stages": {
        "cache-teachers": {"num_parts": 2},
        # A checkpoint after every step, with its picture: slow enough to be signalled.
        "train-student": {
            "nodes": 2,
            "arguments": ["--device", "cpu", "--checkpoint-minutes", "0"],
        },
        "evaluate": {"arguments": []},
    },
}
STUDENT = {"training": training_settings(batch_size=2, steps=8)}


def submitted(registry: Path, *stages: str) -> dict[str, str]:
    """Submits stages of a cohort; stage -> number of its job."""
    folder = registry.parent
    files = {
        "slurm": JOBS,
        "cache-teachers": cache_config().model_dump(mode="json"),
        "train-student": STUDENT,
    }
    for name, content in files.items():
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(content))
    configs = [f"-c{name}={folder / name}.yaml" for name in list(files)[1:]]
    result = CliRunner().invoke(
        app,
        ["submit", *stages, "-r", str(registry), "-w", str(work_of(registry)), "-q", *configs,
         "--slurm-config", str(folder / "slurm.yaml")],
    )  # fmt: skip
    assert result.exit_code == 0, (result.output, result.exception)
    return {job.stage: job.job for job in recorded(work_of(registry))}


def test_a_chain_whose_student_on_two_nodes_is_signalled(
    slurm: Slurm, tiny_cached: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    use(slurm, monkeypatch)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    other = copy_cohort(tiny_cached, tmp_path / "undisturbed")
    jobs = submitted(tiny_cached, *(STAGES[1:] if LONG else ("train-student", "predict")))
    student, run = jobs["train-student"], work_of(tiny_cached) / "students" / "student"
    wait_until(lambda: any((run / "checkpoints").glob("step_*.pt")))
    slurm.call("scancel", "--signal=USR1", student)
    monkeypatch.setitem(JOBS["stages"], "train-student", {"nodes": 2})
    quiet = submitted(other, "train-student")["train-student"]

    ends = ("COMPLETED", "FAILED", "CANCELLED")
    states = {state for job in jobs.values() for state in slurm.wait(job, until=ends).values()}
    logs = {p.name: p.read_text() for p in (work_of(tiny_cached) / "logs/slurm").iterdir()}
    assert states == {"COMPLETED"}, logs
    log = logs[f"train-student-{student}.log"]
    assert "8 steps in 2 processes" in log
    assert "going on after step" in log
    assert "Restarts=1" in slurm.call("scontrol", "show", "job", student)
    assert len(list((work_of(tiny_cached) / "predictions/student/multi-ct").glob("*.nii.gz"))) == 2
    assert all(job["state"].endswith("COMPLETED") for job in with_states(work_of(tiny_cached)))

    assert slurm.wait(quiet, until=ends) == {quiet: "COMPLETED"}
    undisturbed = work_of(other) / "students" / "student"
    ours, theirs = (load_student(f / "student.pt")[1].state_dict() for f in (run, undisturbed))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    lines = [without_timing(metric_lines(f / "metrics.jsonl")) for f in (run, undisturbed)]
    assert lines[0] == lines[1]
    found = verify(work_of(tiny_cached), None, deep=True, everything=True, log=Log(quiet=True))
    assert found.findings == []
    LEDGER.add("stage two on two Slurm nodes, USR1 and put back")
