"""Dask: cases go to workers, one at a time to each, and come back as a few words.

Never more than one case is handed to a worker: Dask suspects every task that is assigned to a
worker that dies, so that one case that kills its worker would condemn innocent ones.
"""

from __future__ import annotations

import logging
import os
import queue
import re
import secrets
import signal
import socket
import sys
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from typing import Any, Generic

import dask
from distributed import Client, Future, Nanny, Scheduler, SpecCluster
from distributed.core import Status
from distributed.diagnostics.plugin import NannyPlugin
from tornado.ioloop import PeriodicCallback

from pipeline.engine.here import (
    HERE,
    Item,
    Outcome,
    Outcomes,
    Result,
    Steps,
    Value,
    sendable,
)
from pipeline.engine.parts import SlurmSettings, sbatch
from pipeline.errors import ConfigError, EngineError, WorkerDied, listed
from pipeline.log import SECONDS_BETWEEN_LINES, Log, size

# How often a case is tried whose workers die, and whose workers leave.
_DEATHS, _LEAVES = 3, 10
_POLL_S = 0.5
# How long the nanny of a worker that is gone may take to say why.
_PATIENCE_S = 3.0
_GATHER_S = 60.0
_NAMED = 8


@dataclass
class _Try(Generic[Item]):
    """A group of items and how its workers ended so far."""

    name: str
    items: Sequence[Item]
    deaths: list[str] = field(default_factory=list)
    leaves: int = 0

    @property
    def is_last(self) -> bool:
        return len(self.deaths) == _DEATHS - 1


@dataclass
class _Assignment(Generic[Item]):
    """A group of items at a worker."""

    what: _Try[Item]
    future: Future
    folder: str  # of the worker's process: a restarted one has another
    began: float
    seen: Mapping[str, Any]
    gone_since: float | None = None


class DaskEngine:
    """Work on the workers of a Dask scheduler; they may come and go while it runs.

    A case whose worker died is tried again when all others have had their turn, and the last time
    while no other case is at work: then no neighbour can be to blame. Then it is given up.

    Args:
        client: of the scheduler.
        log: hears of deaths, and of what is at work when nothing else is to be reported.
        renew: called every now and then, to start workers in place of those that ended.
    """

    remote = True

    def __init__(self, client: Client, *, log: Log, renew: Callable[[], None]) -> None:
        self._client, self._log, self._renew = client, log, renew
        self._address = str(client.scheduler.address)
        self._reports: dict[str, Mapping[str, Any]] = {}
        client.subscribe_topic(TOPIC, self._receive)
        client.register_plugin(ReportDeaths())

    def run(
        self, steps: Steps[Item, Any, Any, Result], items: Iterable[Item]
    ) -> Outcomes[Item, Result]:
        """See `Engine.run`: outcomes come as groups end, in the order of items within each."""
        return _Run(self, steps, items).run()

    def call(self, function: Callable[[], Value], *, name: str) -> Value:
        """See `Engine.call`."""
        (outcome,) = self.run(_Call(function), [name])
        if outcome.error is not None:
            raise outcome.error
        return outcome.result  # type: ignore[return-value]

    def _receive(self, event: tuple[float, Mapping[str, Any]]) -> None:
        _, message = event
        if message.get("worker"):
            self._reports[message["worker"]] = message

    def workers(self) -> Mapping[str, Mapping[str, Any]]:
        """Address -> what the scheduler knows of each worker.

        Raises:
            EngineError: the scheduler is gone.
        """
        try:
            if self._client.status == "running":
                found: Mapping[str, Mapping[str, Any]]
                found = self._client.scheduler_info(n_workers=-1)["workers"]
                return found
            why = f"the connection is {self._client.status}"
        except (OSError, TimeoutError) as error:
            why = str(error) or type(error).__name__
        raise EngineError(
            f"the Dask scheduler does not answer any more ({why}).",
            where=self._address,
            fix="Units that are done stay done: start a scheduler and workers again, then run the "
            "same command.",
        )


@dataclass(frozen=True)
class _Call(Generic[Value]):
    """The steps of something that is asked once; the item is its name."""

    function: Callable[[], Value]

    def group(self, item: str) -> str:
        return item

    def read(self, item: str) -> None:
        return None

    def compute(self, item: str, read: None) -> Value:
        return self.function()

    def store(self, item: str, made: Value) -> Value:
        return made


class _Run(Generic[Item, Result]):
    """One run: which groups wait, which are at which worker."""

    def __init__(
        self, engine: DaskEngine, steps: Steps[Item, Any, Any, Result], items: Iterable[Item]
    ) -> None:
        self._engine, self._client, self._log = engine, engine._client, engine._log
        self._steps = steps
        groups = groupby(items, key=steps.group)
        self._fresh = deque(_Try(name, list(group)) for name, group in groups)
        self._again: deque[_Try[Item]] = deque()
        self._assigned: dict[str, _Assignment[Item]] = {}
        self._ended: queue.SimpleQueue[str] = queue.SimpleQueue()
        self._quiet_since = time.monotonic()

    def run(self) -> Outcomes[Item, Result]:
        try:
            while self._assigned or self._fresh or self._again:
                workers = self._engine.workers()
                yield from self._release_gone(workers)
                self._send(workers)
                self._report_activity(len(workers))
                self._engine._renew()
                yield from self._collect_ended()
        finally:
            if self._assigned:
                self._client.cancel([assignment.future for assignment in self._assigned.values()])

    def _send(self, workers: Mapping[str, Mapping[str, Any]]) -> None:
        for address, seen in workers.items():
            if address in self._assigned or seen.get("status", "running") != "running":
                continue
            what = self._choose()
            if what is None:
                return
            future = self._client.submit(
                _do, self._steps, what.items, key=f"organ-distill-{secrets.token_hex(8)}",
                workers=[address], allow_other_workers=False, pure=False, retries=0,
            )  # fmt: skip
            now = time.monotonic()
            self._assigned[address] = _Assignment(what, future, seen["local_directory"], now, seen)
            future.add_done_callback(lambda _, address=address: self._ended.put(address))

    def _choose(self) -> _Try[Item] | None:
        """Fresh ones first, suspects later, their last try alone."""
        if any(assignment.what.is_last for assignment in self._assigned.values()):
            return None
        if self._fresh:
            return self._fresh.popleft()
        if not self._again or (self._again[0].is_last and self._assigned):
            return None
        return self._again.popleft()

    def _collect_ended(self) -> Iterator[Outcome[Item, Result]]:
        """Waits a little; looks at whatever has ended."""
        try:
            address = self._ended.get(timeout=_POLL_S)
            while True:
                yield from self._collect(address)
                address = self._ended.get_nowait()
        except queue.Empty:
            return

    def _collect(self, address: str) -> Sequence[Outcome[Item, Result]]:
        assignment = self._assigned.get(address)
        if assignment is None or not assignment.future.done():
            return ()
        if assignment.future.status == "finished":
            try:
                outcomes: list[Outcome[Item, Result]] = assignment.future.result(timeout=_GATHER_S)
            except Exception:  # it died before it could be asked: the next poll asks
                assignment.gone_since = assignment.gone_since or time.monotonic()
                return ()
            del self._assigned[address]
            self._quiet_since = time.monotonic()
            return outcomes
        if assignment.future.status == "error":
            error = assignment.future.exception(timeout=_GATHER_S)
            if type(error).__name__ != "KilledWorker":
                del self._assigned[address]
                return _unreported(assignment.what.items, sendable(error))
        # Cancelled: its worker went, or so did the scheduler, which the next poll shows.
        assignment.gone_since = assignment.gone_since or time.monotonic()
        return ()

    def _release_gone(
        self, workers: Mapping[str, Mapping[str, Any]]
    ) -> Iterator[Outcome[Item, Result]]:
        now = time.monotonic()
        for address, assignment in list(self._assigned.items()):
            here = workers.get(address)
            if here is not None and here["local_directory"] == assignment.folder:
                assignment.seen = here
                if assignment.gone_since is None:
                    continue
            assignment.gone_since = assignment.gone_since or now
            report = self._engine._reports.get(address)
            if report is None and now - assignment.gone_since < _PATIENCE_S:
                continue
            del self._assigned[address]
            self._client.cancel([assignment.future])
            self._engine._reports.pop(address, None)
            yield from self._try_again(assignment, report)

    def _try_again(
        self, assignment: _Assignment[Item], report: Mapping[str, Any] | None
    ) -> Sequence[Outcome[Item, Result]]:
        what = assignment.what
        how = in_words(str(assignment.seen.get("name", "")), report, assignment.seen)
        self._quiet_since = time.monotonic()
        if left_on_purpose(report):
            what.leaves += 1
        else:
            what.deaths.append(how)
        tries = len(what.deaths) + what.leaves
        self._log.event("worker died", case=what.name, how=how, tries=tries)
        if len(what.deaths) < _DEATHS and what.leaves < _LEAVES:
            self._again.append(what)
            last = ", and then alone" if what.is_last else ""
            self._log.warn(f"{what.name} was at work when its {how} It is tried again{last}.")
            return ()
        error = WorkerDied(
            f"its worker ended each of {tries} times, the last time while no other case was at "
            f"work: {how}",
            where=what.name,
            fix="Does it need more memory than a worker has? Run it alone without --executor "
            "to see; other cases are not affected.",
        )
        return _unreported(what.items, error)

    def _report_activity(self, num_workers: int) -> None:
        now = time.monotonic()
        if now - self._quiet_since < SECONDS_BETWEEN_LINES:
            return
        self._quiet_since = now
        busy = [(f.what.name, now - f.began) for f in self._assigned.values()]
        self._log.event("at work", workers=num_workers, cases=[case for case, _ in busy])
        if not num_workers:
            self._log.info("waiting for workers: none is there")
            return
        shown = listed([f"{case} ({seconds:.0f} s)" for case, seconds in busy], _NAMED)
        self._log.info(f"at work on {num_workers} workers: {shown or 'nothing'}")


def _do(steps: Steps[Item, Any, Any, Result], items: Sequence[Item]) -> list[Outcome[Item, Result]]:
    """In a worker: one group, and what became of each of its items."""
    _set_threads()
    return list(HERE.run(steps, items))


def _unreported(items: Iterable[Item], error: Exception) -> list[Outcome[Item, Result]]:
    return [Outcome(item, error=error, unreported=True) for item in items]


def _set_threads() -> None:
    """Nannies start workers with one thread for arithmetic, whatever cores they have."""
    threads = allowed_threads()
    if threads is not None:
        import torch

        if torch.get_num_threads() != threads:
            torch.set_num_threads(threads)


# Schedulers and workers: started on this machine or by Slurm, or found where they are.

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
    """Whether Slurm would take such a job; submitted later, its refusal would only be logged."""
    asked = sbatch(script, "--test-only", where="--executor slurm")
    if asked.returncode:
        raise ConfigError(
            f"Slurm refuses the workers' jobs ({asked.stderr.strip()}).",
            where="--executor slurm",
            fix="Change the file that --slurm-config names.",
        )


# How a worker died: what the nanny beside it knows, in words.

TOPIC = "organ-distill: a worker's process ended"
_POLL_MS = 1000


class ReportDeaths(NannyPlugin):  # type: ignore[misc]
    """Every nanny, also of workers that join later, reports to the scheduler how its worker's
    process ended and how much memory it held at the most. Without a nanny it is not known."""

    name = "organ-distill-deaths"

    def setup(self, nanny: Any) -> None:
        """Listens to what the nanny learns anyway; one that is made otherwise reports nothing."""
        peak = _Peak(nanny)
        usual = nanny._on_worker_exit_sync

        def on_exit(exit_code: int) -> None:
            address = peak.address
            nanny.log_event(
                TOPIC,
                {
                    "worker": address,
                    "host": socket.gethostname(),
                    "pid": peak.pid,
                    "exit_code": exit_code,
                    "peak_bytes": peak.num_bytes,
                },
            )
            usual(exit_code)

        self._usual = usual
        self._listen(nanny, on_exit)
        self._periodic = PeriodicCallback(peak.measure, _POLL_MS)
        self._periodic.start()

    def teardown(self, nanny: Any) -> None:
        """Stops looking and listening: the next run brings a plugin of its own."""
        self._periodic.stop()
        self._listen(nanny, self._usual)

    def _listen(self, nanny: Any, on_exit: Callable[[int], None]) -> None:
        nanny._on_worker_exit_sync = on_exit
        if nanny.process is not None:
            nanny.process.on_exit = on_exit


class _Peak:
    """The most memory that the process of a nanny's worker was seen to hold."""

    def __init__(self, nanny: Any) -> None:
        self._nanny = nanny
        self.address: str | None = None
        self.pid: int | None = None
        self.num_bytes: int | None = None
        self.measure()

    def measure(self) -> None:
        pid = self._nanny.pid
        if pid is None:
            return
        if pid != self.pid:
            self.pid, self.num_bytes = pid, None
        self.address = self._nanny.worker_address or self.address
        self.num_bytes = peak_bytes(pid) or self.num_bytes


def peak_bytes(pid: int) -> int | None:
    """The most resident memory that a living process ever held; None where nobody says."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
        (found,) = (line.split()[1] for line in lines if line.startswith("VmHWM:"))
        return int(found) * 1024
    except (OSError, ValueError):
        return None


def in_words(worker: str, report: Mapping[str, Any] | None, last: Mapping[str, Any] | None) -> str:
    """What is known of a worker's end.

    Args:
        worker: its address.
        report: by its nanny; None: nothing came.
        last: its last heartbeat, as the scheduler had it.
    """
    if report is None:
        memory = (last or {}).get("metrics", {}).get("memory")
        held = "" if not memory else f" At its last heartbeat it held {size(memory)}."
        return (
            f"worker {worker} went without a word: no nanny, or its job or node ended with it, so "
            f"nobody knows the exit code.{held}"
        )
    code, peak = report["exit_code"], report["peak_bytes"]
    held = "" if not peak else f", having held {size(peak)} of memory at the most"
    who = f"worker {worker} (host {report['host']}, pid {report['pid']})"
    if code >= 0:
        return f"{who} exited with status {code}{held}."
    return f"{who} was killed by signal {-code} ({_signal_name(-code)}){held}."


def left_on_purpose(report: Mapping[str, Any] | None) -> bool:
    """Whether a worker's process ended well: it was retired, or its job asked it to go."""
    return report is not None and report["exit_code"] in (0, -signal.SIGTERM)


def _signal_name(number: int) -> str:
    try:
        name = signal.Signals(number).name
    except ValueError:
        return "unknown"
    hint = ", which the system also sends when memory runs out" if name == "SIGKILL" else ""
    return f"{name}{hint}"


def allowed_threads() -> int | None:
    """Cores that this worker was given; None where nobody said so."""
    given = os.environ.get("ORGAN_DISTILL_THREADS") or os.environ.get("SLURM_CPUS_PER_TASK")
    return int(given) if given else None
