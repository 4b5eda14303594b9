"""What tests submit by `pipeline submit`, and what they see of it."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from typer.testing import CliRunner

from pipeline.cli.app import app
from pipeline.log import Log
from pipeline.review.verify import verify
from pipeline.setup.submit import STAGES, recorded
from pipeline.student.checkpoint import load_student
from pipeline.student.progress import metric_lines, without_timing
from tests.slurm.cluster import Slurm
from tests.tiny import cache_config, training_settings, work_of

ROOT = Path(__file__).resolve().parents[2]
ENDS = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL")

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
CONFIGS: dict[str, Any] = {
    "cache-teachers": cache_config().model_dump(mode="json"),
    "train-teachers": {"training": training_settings(steps=2)},
    "train-student": {"training": training_settings(batch_size=2, steps=8)},
}


def submitted(registry: Path, *stages: str, configs: Any = None, **of: Any) -> dict[str, str]:
    """Submits stages of a cohort; stage -> number of its job.

    Args:
        registry: of the cohort.
        stages: in any order.
        configs: stage -> its settings, where they are not `CONFIGS`.
        of: what differs from `JOBS`; for a stage, by its name with underscores.
    """
    folder = registry.parent
    by_stage = {name: of.pop(name.replace("-", "_"), {}) for name in STAGES}
    own = {n: {**JOBS["stages"].get(n, {}), **changes} for n, changes in by_stage.items()}
    files = {"slurm": {**JOBS, **of, "stages": own}, **CONFIGS, **(configs or {})}
    for name, content in files.items():
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(content))
    options = [f"-c{name}={folder / name}.yaml" for name in list(files)[1:]]
    result = CliRunner().invoke(
        app,
        ["submit", *stages, "-r", str(registry), "-w", str(work_of(registry)), "-q", *options,
         "--slurm-config", str(folder / "slurm.yaml")],
    )  # fmt: skip
    assert result.exit_code == 0, (result.output, result.exception)
    return {job.stage: job.job for job in recorded(work_of(registry))}


def use(slurm: Slurm, monkeypatch: pytest.MonkeyPatch) -> None:
    """Commands of Slurm that this process starts talk to it."""
    for name in [name for name in os.environ if name.startswith("SLURM_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("SLURM_CONF", str(slurm.conf))
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


def run_of(registry: Path) -> Path:
    """The folder of the student."""
    return work_of(registry) / "students" / "student"


def newest_step(registry: Path) -> int:
    """Of the checkpoints; 0 without one."""
    names = [path.stem for path in (run_of(registry) / "checkpoints").glob("step_*.pt")]
    return max((int(name.removeprefix("step_")) for name in names), default=0)


def logs(registry: Path) -> dict[str, str]:
    """What jobs said."""
    return {p.name: p.read_text() for p in (work_of(registry) / "logs/slurm").iterdir()}


def assert_same_student(registry: Path, undisturbed: Path) -> None:
    """Weights and metrics, bit for bit."""
    runs = run_of(registry), run_of(undisturbed)
    ours, theirs = (load_student(run / "student.pt")[1].state_dict() for run in runs)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    lines = [without_timing(metric_lines(run / "metrics.jsonl")) for run in runs]
    assert lines[0] == lines[1]


def assert_intact(registry: Path) -> None:
    """A deep look at the cache finds nothing."""
    found = verify(work_of(registry), None, deep=True, everything=True, log=Log(quiet=True))
    assert found.findings == []


def process_of(job: str, rank: int) -> int:
    """The process of a rank of a job's step, on this machine."""
    wanted = {f"SLURM_JOB_ID={job}".encode(), f"SLURM_PROCID={rank}".encode()}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            environment = (folder / "environ").read_bytes().split(b"\0")
            words = (folder / "cmdline").read_bytes().split(b"\0")
        except OSError:
            continue
        # Not srun, whose words name the command as well.
        if wanted <= set(environment) and b"pipeline.cli" in words and b"python" in words[0]:
            return int(folder.name)
    raise AssertionError(f"no process of rank {rank} of job {job}")
