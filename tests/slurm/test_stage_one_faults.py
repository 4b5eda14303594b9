"""Stage one on a real Slurm: a node that is lost while its processes live on, and a job that comes
to its time limit."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path

import pytest

from tests.faults.deadly import arm, build_deadly, held, let_go
from tests.faults.engines import assert_whole, num_units
from tests.faults.ledger import LEDGER, LONG
from tests.faults.small import TEACHERS, run_stage
from tests.slurm.cluster import Slurm, slurm_cluster, wait_until, why_not
from tests.slurm.submitting import ENDS, ROOT, logs, submitted, use

pytestmark = [pytest.mark.slurm, pytest.mark.slow]

NUM_CASES = 3
SETTINGS = {"storage": {"chunk": 8}}
SCRIPT = f"""\
#!/bin/bash
#SBATCH --requeue --open-mode=append --output=job.log --mem=500 --cpus-per-task=1
export PYTHONPATH={ROOT} OMP_NUM_THREADS=1
exec {sys.executable} -m pipeline.cli cache-teachers -r data_registry.yaml -w work -c stage.yaml \\
  --device cpu --quiet
"""


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_deadly(tmp_path_factory.mktemp("slurm") / "cohort", num_cases=NUM_CASES, marked=1)


@pytest.fixture
def impatient() -> Iterator[Slurm]:
    """One that gives a node up soon."""
    if reason := why_not():
        pytest.skip(f"no Slurm can be started: {reason}")
    with slurm_cluster(lost_after_s=5) as found:
        yield found


def test_a_node_is_lost_and_its_process_lives_on_beside_the_job_that_is_put_back(
    impatient: Slurm, cohort: Path, undisturbed: Path
) -> None:
    arm(cohort, hold=True)
    (cohort.parent / "stage.yaml").write_text("storage: {chunk: 8}\n")
    script = cohort.parent / "job.sh"
    script.write_text(SCRIPT)
    job = impatient.submit(script)
    wait_until(lambda: held(cohort) != [])
    (old,) = held(cohort)
    arm(cohort)
    node = impatient.node_of(job)
    impatient.lose_node(node)
    began, before = time.monotonic(), num_units(cohort)
    if not LONG:  # Slurm takes half a minute to notice; here its operator is faster
        impatient.call("scontrol", "update", f"NodeName={node}", "State=DOWN", "Reason=lost")
    wait_until(lambda: num_units(cohort) > before)
    noticed = "by Slurm" if LONG else "by its operator"
    LEDGER.took(f"node lost, its process lives on; noticed {noticed}", time.monotonic() - began)
    impatient.wait(job, until=("COMPLETED",))
    assert impatient.node_of(job) != node
    assert num_units(cohort) == NUM_CASES * len(TEACHERS)
    assert alive(old), "it was to write beside the other one"
    let_go(cohort, old)
    wait_until(lambda: not alive(old))
    if not LONG:
        impatient.call("scontrol", "update", f"NodeName={node}", "State=RESUME")
    impatient.start_node(node)  # which ends what is left of the old job there
    assert "Restarts=1" in impatient.call("scontrol", "show", "job", job)
    assert_whole(cohort, undisturbed)
    assert num_units(cohort) == NUM_CASES * len(TEACHERS)
    LEDGER.add("node lost, its process lives on")


def test_a_job_that_comes_to_its_time_limit(
    slurm: Slurm, cohort: Path, undisturbed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    use(slurm, monkeypatch)
    arm(cohort, hold=True)
    (job,) = submitted(
        cohort, "cache-teachers", configs={"cache-teachers": SETTINGS},
        signal_seconds=120, cache_teachers={"num_parts": 1},
    ).values()  # fmt: skip
    wait_until(lambda: held(cohort) != [])
    (old,) = held(cohort)
    arm(cohort)
    # However long the start took: the signal is due now, and Slurm looks every half minute.
    went = datetime.now() - datetime.fromisoformat(slurm.times(job)[0])
    limit_job(slurm, job, minutes=int(went.total_seconds() // 60) + 2)
    wait_until(lambda: not alive(old))
    limit_job(slurm, job, minutes=10)
    began, before = time.monotonic(), num_units(cohort)
    let_go(cohort, old)
    wait_until(lambda: num_units(cohort) > before)
    LEDGER.took("stage one at its time limit", time.monotonic() - began)
    states = slurm.wait(job, until=ENDS)
    assert set(states.values()) == {"COMPLETED"}, logs(cohort)
    assert "Restarts=0" not in slurm.call("scontrol", "show", "job", job)
    assert run_stage(cohort).done == []
    assert_whole(cohort, undisturbed)
    LEDGER.add("stage one at its time limit")


def limit_job(slurm: Slurm, job: str, *, minutes: int) -> None:
    slurm.call("scontrol", "update", f"JobId={job}", f"TimeLimit={minutes}")


def alive(pid: int) -> bool:
    """Not counting one that has ended and that nobody has asked after."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False
