"""Schedulers and workers: started on this machine or by Slurm, or found where they are."""

from __future__ import annotations

import logging
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import dask
from distributed import Client, Nanny, Scheduler, SpecCluster
from distributed.core import Status

from pipeline.engine.dask_engine import DaskEngine
from pipeline.engine.slurm_settings import SlurmSettings
from pipeline.errors import ConfigError, EngineError
from pipeline.log import Log

_CORES_PER_WORKER = 4
_CONNECT_S = 15
_RENEW_EVERY_S = 30.0
# Jobs that end at once must not be replaced for ever.
_RENEWALS_PER_WORKER = 20


@contextmanager
def open_cluster(
    executor: str,
    *,
    workers: int | None,
    device: str,
    slurm: SlurmSettings,
    logs: Path,
    log: Log,
) -> Iterator[DaskEngine]:
    """An engine on Dask workers; what was started is stopped at the end of the block.

    Args:
        executor: local, slurm or tcp://HOST:PORT.
        workers: how many; None: one per GPU, or per four cores without one. Not for tcp://, whose
            workers are whoever comes.
        device: cpu starts no worker per GPU.
        slurm: what each job asks for.
        logs: where jobs write to.
        log: for the engine.

    Raises:
        ConfigError: no such executor, or Slurm refuses such jobs.
        EngineError: nothing answers, or nothing starts.
    """
    quiet = {
        "distributed.comm.timeouts.connect": f"{_CONNECT_S}s",
        "distributed.logging": {"distributed": "error"},
        # Networks and volumes are not Dask's to manage: it would pause workers that use memory.
        "distributed.worker.memory.target": False,
        "distributed.worker.memory.spill": False,
        "distributed.worker.memory.pause": False,
        "distributed.worker.memory.terminate": False,
    }
    with dask.config.set(quiet):
        match executor:
            case "local":
                opened = _local(workers, device)
            case "slurm":
                opened = _slurm(workers or 1, slurm, logs)
            case _:
                opened = _existing(executor)
        with opened as (address, renew), _client(address) as client:
            log.info(f"Dask scheduler {client.scheduler.address}")
            yield DaskEngine(client, log=log, renew=renew)


Opened = Iterator[tuple[Any, Callable[[], None]]]


@contextmanager
def _client(address: Any) -> Iterator[Client]:
    try:
        client = Client(address, set_as_default=False, timeout=_CONNECT_S)
    except (OSError, TimeoutError) as error:
        raise EngineError(
            f"no Dask scheduler answers ({error or type(error).__name__}).",
            where=address,
            fix="Is `dask scheduler` running there, and is the port open from here?",
        ) from error
    try:
        yield client
    finally:
        client.close(timeout=5)


@contextmanager
def _existing(address: str) -> Opened:
    if not re.fullmatch(r"(tcp|tls|ucxx?)://\S+:\d+", address):
        raise ConfigError(
            f"--executor {address}: no such executor.",
            fix="Use local, slurm or the address of a Dask scheduler, tcp://HOST:PORT.",
        )
    yield address, lambda: None


@contextmanager
def _local(workers: int | None, device: str) -> Opened:
    specs = local_workers(workers, gpus=[] if device == "cpu" else visible_gpus())
    options = {
        "nthreads": 1,
        "dashboard": False,
        "memory_limit": 0,
        "host": "127.0.0.1",
        "silence_logs": logging.ERROR,
    }
    cluster = SpecCluster(
        scheduler={
            "cls": Scheduler,
            "options": {"host": "127.0.0.1", "port": 0, "dashboard": False},
        },
        workers={
            number: {"cls": Nanny, "options": {**options, "env": env}}
            for number, env in enumerate(specs)
        },
        silence_logs="error",
    )
    with cluster:
        yield cluster, lambda: check_nannies(cluster)


def check_nannies(cluster: Any) -> None:
    """A nanny starts its worker again as long as it lives itself; without any, nothing ever comes.

    Raises:
        EngineError: none lives.
    """
    ended = (Status.closed, Status.failed)
    if all(nanny.status in ended for nanny in cluster.workers.values()):
        raise EngineError(
            "no worker of this machine can be started any more.",
            where="--executor local",
            fix="The lines above may say why; without --executor there is one process only. Units "
            "that are done stay done.",
        )


def local_workers(
    workers: int | None, *, gpus: list[str], cores: int | None = None
) -> list[dict[str, str]]:
    """The environment of each worker of this machine: its GPU, and threads for arithmetic.

    With more workers than GPUs, GPUs are shared.
    """
    cores = cores or len(os.sched_getaffinity(0))
    number = workers or len(gpus) or max(1, cores // _CORES_PER_WORKER)
    threads = str(max(1, cores // number))
    found = []
    for index in range(number):
        env = {"ORGAN_DISTILL_THREADS": threads, "OMP_NUM_THREADS": threads}
        if gpus:
            env["CUDA_VISIBLE_DEVICES"] = gpus[index % len(gpus)]
        found.append(env)
    return found


def visible_gpus() -> list[str]:
    """As `CUDA_VISIBLE_DEVICES` names them."""
    import torch

    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    number = torch.cuda.device_count()
    names = [n.strip() for n in named.split(",")] if named else [str(n) for n in range(number)]
    return names[:number]


@contextmanager
def _slurm(workers: int, settings: SlurmSettings, logs: Path) -> Opened:
    try:
        from dask_jobqueue import SLURMCluster
    except ImportError as error:
        raise ConfigError(
            "--executor slurm needs dask-jobqueue.",
            fix="Install it: pip install 'organ-distill[slurm]'; `sbatch --array` with --num-parts "
            "needs none.",
        ) from error
    logs.mkdir(parents=True, exist_ok=True)
    gres = [f"--gres={settings.gres}"] if settings.gres else []
    cluster = SLURMCluster(
        queue=settings.partition,
        account=settings.account,
        walltime=settings.walltime,
        cores=settings.cores,
        processes=1,
        memory=settings.memory,
        job_name="organ-distill",
        job_extra_directives=[*gres, *settings.directives],
        job_script_prologue=[
            f"export ORGAN_DISTILL_THREADS={settings.cores}",
            *settings.prologue,
        ],
        worker_extra_args=["--memory-limit", "0", "--no-dashboard"],
        interface=settings.interface,
        log_directory=str(logs),
        python=sys.executable,
        scheduler_options={"dashboard": False, "dashboard_address": ":0"},
        silence_logs="error",
    )
    with cluster:
        _ask_slurm(cluster.job_script())
        cluster.scale(jobs=workers)
        yield cluster, _Renewal(cluster, workers)


class _Renewal:
    """Submits jobs in place of those that ended, a bounded number of times."""

    def __init__(self, cluster: Any, workers: int) -> None:
        self._cluster, self._workers = cluster, workers
        self._left = workers * _RENEWALS_PER_WORKER
        self._at = time.monotonic()

    def __call__(self) -> None:
        now = time.monotonic()
        if now - self._at < _RENEW_EVERY_S:
            return
        self._at = now
        ended = self._workers - len(self._cluster.workers)
        if ended <= 0:
            return
        if self._left <= 0:
            if not self._cluster.workers:
                raise EngineError(
                    "the Slurm jobs of the workers ended again and again.",
                    where="--executor slurm",
                    fix="Look at their output in the work folder's logs/slurm. Units that are "
                    "done stay done.",
                )
            return
        self._left -= ended
        self._cluster.scale(jobs=self._workers)


def _ask_slurm(script: str) -> None:
    """Whether Slurm would take such a job; submitted later, its refusal would only be logged.

    Raises:
        ConfigError: it would not, or there is no Slurm here.
    """
    with tempfile.NamedTemporaryFile("w", suffix=".sh") as file:
        file.write(script)
        file.flush()
        try:
            asked = subprocess.run(
                ["sbatch", "--test-only", file.name], capture_output=True, text=True, check=False
            )
        except OSError as error:
            raise ConfigError(
                f"sbatch cannot be run ({error.strerror}).",
                where="--executor slurm",
                fix="--executor slurm must be started where jobs can be submitted.",
            ) from error
    if asked.returncode:
        raise ConfigError(
            f"Slurm refuses the workers' jobs ({asked.stderr.strip()}).",
            where="--executor slurm",
            fix="Change the file that --slurm-config names.",
        )
