"""`--executor`: which engine a command line asks for, and schedulers and workers: started on this
machine or by Slurm, or found where they are. `distributed` is not imported without it.
"""

from __future__ import annotations

import logging
import os
import re
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.config import load_config
from pipeline.engine.here import HERE, Engine
from pipeline.engine.parts import SlurmSettings, sbatch
from pipeline.errors import ConfigError, EngineError
from pipeline.folder import Folder, is_local
from pipeline.log import Log

if TYPE_CHECKING:
    from distributed import Client

_CORES_PER_WORKER = 4
_CONNECT_S = 15
_RENEW_EVERY_S = 30.0
# Jobs that end at once must not be replaced for ever.
_RENEWALS_PER_WORKER = 20


@contextmanager
def open_engine(
    executor: str | None,
    *,
    workers: int | None,
    slurm_config: Path | None,
    device: str,
    work: Folder,
    log: Log,
) -> Iterator[Engine]:
    """The engine for the block; what was started is stopped at its end.

    Args:
        executor: local, slurm or tcp://HOST:PORT; None: this process.
        workers: how many to start; None: one per GPU, or per four cores without one. Not for
            tcp://, whose workers are whoever comes.
        slurm_config: YAML of `SlurmSettings`, what each job asks for.
        device: as given; cpu starts no worker per GPU.
        work: jobs of Slurm write their output there.

    Raises:
        ConfigError: options that do not go together, packages that are not installed, no such
            executor, or Slurm refuses such jobs.
        EngineError: nothing answers, or nothing starts.
    """
    if executor is None and workers is not None:
        raise ConfigError("--workers without --executor.", fix="Add --executor local or slurm.")
    if executor != "slurm" and slurm_config is not None:
        raise ConfigError(
            "--slurm-config without --executor slurm.",
            fix="Add --executor slurm, or leave --slurm-config out.",
        )
    if executor is None:
        yield HERE
        return
    if workers is not None and executor not in ("local", "slurm"):
        raise ConfigError(
            f"--workers with --executor {executor}: this command does not start workers there.",
            fix="Start them with `dask worker`, before or while this runs.",
        )
    if device not in ("auto", "cpu", "cuda"):
        raise ConfigError(
            f"--device {device} with --executor: each worker has its own GPU.",
            fix="Give auto, cpu or cuda; CUDA_VISIBLE_DEVICES chooses among GPUs.",
        )
    settings = load_config(slurm_config, SlurmSettings) if slurm_config else SlurmSettings()
    try:
        import dask

        from pipeline.engine.dask import DaskEngine
    except ImportError as error:
        raise ConfigError(
            f"--executor needs a package that is not installed ({error.name}).",
            fix="Install it: pip install 'organ-distill[cluster]'; [slurm] for --executor slurm.",
        ) from error
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
                logs = (work if is_local(work) else Path.cwd()) / settings.logs
                opened = _slurm(workers or 1, settings, logs)
            case _:
                opened = _existing(executor)
        with opened as (address, renew), _client(address) as client:
            log.info(f"Dask scheduler {client.scheduler.address}")
            yield DaskEngine(client, log=log, renew=renew)


Opened = Iterator[tuple[Any, Callable[[], None]]]


@contextmanager
def _client(address: Any) -> Iterator[Client]:
    from distributed import Client

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
    from distributed import Nanny, Scheduler, SpecCluster

    specs = local_workers(workers, gpus=[] if device == "cpu" else visible_gpus())
    common = {"host": "127.0.0.1", "dashboard": False}
    options = {**common, "nthreads": 1, "memory_limit": 0, "silence_logs": logging.ERROR}
    workers_of = {
        number: {"cls": Nanny, "options": {**options, "env": env}}
        for number, env in enumerate(specs)
    }
    scheduler = {"cls": Scheduler, "options": {**common, "port": 0}}
    with SpecCluster(scheduler=scheduler, workers=workers_of, silence_logs="error") as cluster:
        yield cluster, lambda: check_nannies(cluster)


def check_nannies(cluster: Any) -> None:
    """A nanny starts its worker again as long as it lives itself; without any, nothing ever
    comes."""
    from distributed.core import Status

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
        job_script_prologue=[f"export ORGAN_DISTILL_THREADS={settings.cores}", *settings.prologue],
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
    """Whether Slurm would take such a job; submitted later, its refusal would only be logged."""
    asked = sbatch(script, "--test-only", where="--executor slurm")
    if asked.returncode:
        raise ConfigError(
            f"Slurm refuses the workers' jobs ({asked.stderr.strip()}).",
            where="--executor slurm",
            fix="Change the file that --slurm-config names.",
        )
