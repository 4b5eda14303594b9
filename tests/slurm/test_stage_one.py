"""Stage one on a real Slurm: an array with an element that is put back, and Dask workers in jobs.

What the jobs run is what a user's would; every test ends with a deep look at the cache.
"""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from pipeline.engine.parts import Part
from pipeline.errors import ConfigError
from tests.faults.deadly import arm, build_deadly, deaths
from tests.faults.engines import assert_whole, engine_on, wait_until
from tests.faults.ledger import LEDGER
from tests.faults.small import DATASET, run_stage
from tests.slurm.cluster import Slurm
from tests.slurm.submitting import ROOT, use
from tests.tiny import work_of

pytestmark = pytest.mark.slurm

POISON = f"{DATASET}/case_003"
SCRIPT = """\
#!/bin/bash
#SBATCH --requeue --open-mode=append --output=element-%a.log --mem=500 --cpus-per-task=1
export PYTHONPATH={root} OMP_NUM_THREADS=1
exec {python} -m pipeline.cli cache-teachers -r data_registry.yaml -w work -c stage.yaml \\
  --device cpu --quiet {part}
"""


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_deadly(tmp_path_factory.mktemp("slurm") / "cohort", num_cases=6, marked=3)


def test_an_array_with_one_element_put_back_while_it_runs(
    slurm: Slurm, cohort: Path, undisturbed: Path
) -> None:
    arm(cohort, seconds=1.0)
    folder = cohort.parent
    (folder / "stage.yaml").write_text("storage: {chunk: 8}\n")
    gate, script = folder / "gate.sh", folder / "array.sh"
    parts = '--num-parts "$SLURM_ARRAY_TASK_COUNT"'
    for path, part in ((gate, "--gate-only"), (script, parts)):
        path.write_text(SCRIPT.format(root=ROOT, python=sys.executable, part=part))
    first = slurm.submit(gate, "--output=gate.log")
    job = slurm.submit(script, "--array=1-3", f"--dependency=afterok:{first}")
    events = work_of(cohort) / f"events.{Part(1, 3).tag}.jsonl"
    wait_until(lambda: events.exists() and '"one x ' in events.read_text())
    slurm.call("scontrol", "requeue", f"{job}_2")
    states = slurm.wait(job)
    logs = {path.name: path.read_text() for path in folder.glob("element-*.log")}
    assert set(states.values()) == {"COMPLETED"}, logs
    assert "0 already there" not in logs["element-2.log"].splitlines()[-1]
    assert all(", 0 failed" in log.splitlines()[-1] for log in logs.values()), logs
    assert run_stage(cohort).done == []
    assert_whole(cohort, undisturbed)
    LEDGER.add("Slurm array, one element requeued while it runs")


def test_a_worker_of_a_slurm_job_is_killed_in_the_middle_of_a_case(
    slurm: Slurm,
    cohort: Path,
    undisturbed: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    use(slurm, monkeypatch)
    arm(cohort, times=1)
    config = cohort.parent / "slurm.yaml"
    config.write_text(
        "{partition: low, walltime: '00:10:00', cores: 1, memory: 1GB, gres: 'gpu:1', "
        "interface: lo}"
    )
    with engine_on("slurm", workers=2, slurm_config=config, work=work_of(cohort)) as engine:
        report = run_stage(cohort, engine=engine)
        jobs = slurm.call("squeue", "-h", "-o", "%T %b").splitlines()
    assert jobs == ["RUNNING gres:gpu:1"] * 2
    assert (report.failed, report.exit_code) == ({}, 0)
    assert len(deaths(cohort.parent / "grave")) == 1
    told = capsys.readouterr().err
    assert f"{POISON} was at work when its worker" in told
    assert "was killed by signal 9 (SIGKILL" in told
    assert_whole(cohort, undisturbed)
    wait_until(lambda: not slurm.call("squeue", "-h"))  # its jobs end with it
    LEDGER.add("worker killed in the middle of a case, Dask on Slurm")


def test_what_slurm_would_not_take_is_said_before_anything_waits_for_it(
    slurm: Slurm, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    use(slurm, monkeypatch)
    config = tmp_path / "slurm.yaml"
    config.write_text("{partition: none-such, cores: 1, memory: 1GB, interface: lo}")
    with (
        pytest.raises(ConfigError, match=r"Slurm refuses the workers' jobs.*partition"),
        engine_on("slurm", workers=1, slurm_config=config, work=tmp_path),
    ):
        pass
