from __future__ import annotations

import pickle
import signal
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from pipeline.engine import choose, here
from pipeline.engine.choose import open_engine
from pipeline.engine.here import HERE, Outcome, once_per_process, sendable
from pipeline.engine.parts import SlurmSettings
from pipeline.errors import ConfigError, EngineError, GeometryError
from pipeline.log import Log


def opened(executor: str | None, **options: Any) -> Any:
    values = {"workers": None, "slurm_config": None, "device": "auto", "work": Path("work")}
    return open_engine(executor, log=Log(quiet=True), **(values | options))


def test_without_an_executor_it_is_this_process() -> None:
    with opened(None) as engine:
        assert engine is HERE


@pytest.mark.parametrize(
    ("executor", "options", "why"),
    [
        (None, {"workers": 2}, "--workers without --executor"),
        ("local", {"slurm_config": Path("x.yaml")}, "without --executor slurm"),
        ("tcp://127.0.0.1:1", {"workers": 2}, "does not start workers there"),
        ("local", {"device": "cuda:1"}, "each worker has its own GPU"),
        ("loacl", {}, "no such executor"),
    ],
)
def test_options_that_do_not_go_together_are_refused(
    executor: str | None, options: dict[str, Any], why: str
) -> None:
    with pytest.raises(ConfigError, match=why), opened(executor, **options):
        pass


def test_slurm_settings_refuse_what_they_do_not_know(tmp_path: Path) -> None:
    path = tmp_path / "slurm.yaml"
    path.write_text("partition: gpu\nwalltme: '1:00:00'\n")
    with (
        pytest.raises(ConfigError, match=r"slurm\.yaml:2: walltme: unknown key"),
        opened("slurm", slurm_config=path),
    ):
        pass
    with pytest.raises(ValueError, match="pattern"):
        SlurmSettings(partition="gpu\n#SBATCH --uid=0")


class TestWorkersOfThisMachine:
    def test_one_for_each_gpu(self) -> None:
        found = choose.local_workers(None, gpus=["2", "GPU-a"], cores=8)
        assert [env["CUDA_VISIBLE_DEVICES"] for env in found] == ["2", "GPU-a"]
        assert {env["ORGAN_DISTILL_THREADS"] for env in found} == {"4"}

    def test_one_for_four_cores_without(self) -> None:
        assert len(choose.local_workers(None, gpus=[], cores=9)) == 2
        assert len(choose.local_workers(None, gpus=[], cores=1)) == 1
        (env, *more) = choose.local_workers(3, gpus=[], cores=8)
        assert (len(more), env["OMP_NUM_THREADS"]) == (2, "2")
        assert "CUDA_VISIBLE_DEVICES" not in env

    def test_jobs_that_end_at_once_are_not_replaced_for_ever(self) -> None:
        class Cluster:
            workers: dict[str, object] = {}  # noqa: RUF012
            scaled = 0

            def scale(self, jobs: int) -> None:
                assert jobs == 2
                self.scaled += 1

        cluster = Cluster()
        renewal = choose._Renewal(cluster, 2)
        renewal()
        assert cluster.scaled == 0  # jobs need a while to start

        def renew_for_ever() -> None:
            while cluster.scaled < 1000:
                renewal._at = -1e9
                renewal()

        with pytest.raises(EngineError, match="ended again and again"):
            renew_for_ever()
        assert 2 < cluster.scaled < 100

    def test_without_a_living_nanny_nobody_waits(self) -> None:
        core = pytest.importorskip("distributed.core")

        def nannies(*states: str) -> Any:
            found = [SimpleNamespace(status=core.Status[state]) for state in states]
            return SimpleNamespace(workers=dict(enumerate(found)))

        choose.check_nannies(nannies("closed", "running"))
        choose.check_nannies(nannies("starting"))
        with pytest.raises(EngineError, match="no worker of this machine"):
            choose.check_nannies(nannies("closed", "failed"))


class TestDeathsInWords:
    def test_by_a_signal(self) -> None:
        deaths = pytest.importorskip("pipeline.engine.dask")
        told = {"host": "n1", "pid": 7, "exit_code": -9, "peak_bytes": 2_500_000_000}
        text = deaths.in_words("3", told, {})
        assert text.startswith("worker 3 (host n1, pid 7) was killed by signal 9 (SIGKILL")
        assert "2.5 GB" in text
        assert not deaths.left_on_purpose(told)
        assert "exited with status 3" in deaths.in_words("3", {**told, "exit_code": 3}, {})

    def test_nobody_knows(self) -> None:
        deaths = pytest.importorskip("pipeline.engine.dask")
        text = deaths.in_words("3", None, {"metrics": {"memory": 1_000_000_000}})
        assert "nobody knows the exit code" in text
        assert "1 GB" in text
        assert not deaths.left_on_purpose(None)

    @pytest.mark.parametrize("code", [0, -signal.SIGTERM])
    def test_one_that_was_asked_to_go_is_no_death(self, code: int) -> None:
        deaths = pytest.importorskip("pipeline.engine.dask")
        assert deaths.left_on_purpose({"exit_code": code})


class Stubborn(Exception):
    """Cannot be unpickled."""

    def __init__(self, what: str, more: int) -> None:
        super().__init__(what)


def test_errors_reach_another_process_whole() -> None:
    known = GeometryError("wrong", where="ct/case", fix="mend it")
    there = pickle.loads(pickle.dumps(Outcome("ct/case", error=known)))
    assert (str(there.error), there.error.exit_code) == (str(known), 2)
    try:
        raise Stubborn("a bug", 1)
    except Stubborn as error:
        there = pickle.loads(pickle.dumps(Outcome("ct/case", error=error)))
    assert str(there.error) == "Stubborn: a bug"
    assert "test_choose.py" in there.error.__notes__[0]
    assert sendable(known) is known


def test_a_process_keeps_what_its_run_opened_and_nothing_else() -> None:
    made: list[str] = []

    def make(name: str) -> str:
        made.append(name)
        return name

    for name in ("a", "a", "b", "b", "a"):
        assert once_per_process(name, lambda name=name: make(name)) == name
        assert list(here._OPENED) == [name]
    assert made == ["a", "b", "a"]
    here._OPENED.clear()
