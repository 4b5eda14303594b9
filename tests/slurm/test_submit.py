"""`pipeline submit` on a real Slurm: stages in a chain, and a student on two nodes that is
signalled, saves, is put back and ends with the weights of one that nobody disturbed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from pipeline.setup.submit import STAGES, with_states
from tests.faults.ledger import LEDGER
from tests.slurm.cluster import Slurm, wait_until
from tests.slurm.submitting import (
    ENDS,
    assert_intact,
    assert_same_student,
    logs,
    newest_step,
    submitted,
    use,
)
from tests.tiny import work_of

pytestmark = [pytest.mark.slurm, pytest.mark.slow]


def test_a_chain_whose_student_on_two_nodes_is_signalled(
    slurm: Slurm, tiny_cached: Path, undisturbed_student: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    use(slurm, monkeypatch)
    jobs = submitted(tiny_cached, "train-student", "predict")
    student = jobs["train-student"]
    wait_until(lambda: newest_step(tiny_cached) > 0)
    slurm.call("scancel", "--signal=USR1", student)
    states = {state for job in jobs.values() for state in slurm.wait(job, until=ENDS).values()}
    told = logs(tiny_cached)
    assert states == {"COMPLETED"}, told
    log = told[f"train-student-{student}.log"]
    assert "8 steps in 2 processes" in log
    assert "going on after step" in log
    assert "Restarts=1" in slurm.call("scontrol", "show", "job", student)
    assert len(list((work_of(tiny_cached) / "predictions/student/multi-ct").glob("*.nii.gz"))) == 2
    assert all(job["state"].endswith("COMPLETED") for job in with_states(work_of(tiny_cached)))
    assert_same_student(tiny_cached, undisturbed_student)
    assert_intact(tiny_cached)
    LEDGER.add("stage two on two Slurm nodes, USR1 and put back")


def test_the_whole_road_in_one_chain(
    slurm: Slurm, tiny_registry: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    use(slurm, monkeypatch)
    monkeypatch.setenv("NODE", str(tiny_registry.parent / "node"))
    for weights in (tiny_registry.parent / "teachers").glob("*.pt"):
        weights.unlink()
    jobs = submitted(
        tiny_registry, *STAGES,
        cache_teachers={"num_parts": 1}, train_student={"nodes": 1, "stage_to": "$NODE"},
    )  # fmt: skip
    states = {
        f"{stage} {one}": state
        for stage, job in jobs.items()
        for one, state in slurm.wait(job, until=ENDS).items()
    }
    told = logs(tiny_registry)
    assert set(states.values()) == {"COMPLETED"}, (states, told)
    assert len(states) == 2 + 1 + 1 + 1 + 1  # two teachers
    begun = [slurm.times(job)[0] for job in jobs.values()]
    ended = [slurm.times(job)[1] for job in jobs.values()]
    assert all(end <= begin for end, begin in zip(ended, begun[1:], strict=False))
    assert (
        f"units are read from {tiny_registry.parent / 'node'}"
        in told[f"train-student-{jobs['train-student']}.log"]
    )
    summary = work_of(tiny_registry) / "predictions" / "student" / "summary.json"
    assert len(json.loads(summary.read_text())["metric_per_case"]) == 2
    assert_intact(tiny_registry)
    LEDGER.add("chain of all stages on Slurm")
