"""Dask: cases go to workers, one at a time to each, and come back as a few words.

Never more than one case is handed to a worker: Dask suspects every task that is assigned to a
worker that dies, so that one case that kills its worker would condemn innocent ones.
"""

from __future__ import annotations

import os
import queue
import secrets
import signal
import socket
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from types import SimpleNamespace
from typing import Any, Generic

from distributed import Client, Future
from distributed.diagnostics.plugin import NannyPlugin
from tornado.ioloop import PeriodicCallback

from pipeline.engine.here import HERE, Item, Outcome, Outcomes, Result, Steps, Value, sendable
from pipeline.engine.processes import how_it_ended, status_bytes
from pipeline.errors import EngineError, WorkerDied, listed
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
        steps: Any = SimpleNamespace(
            group=str, read=str, compute=lambda *_: function(), store=lambda _, made: made
        )
        (outcome,) = self.run(steps, [name])
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
    """Nannies start workers with one thread for arithmetic, whatever cores they were given."""
    given = os.environ.get("ORGAN_DISTILL_THREADS") or os.environ.get("SLURM_CPUS_PER_TASK")
    if given:
        import torch

        if torch.get_num_threads() != int(given):
            torch.set_num_threads(int(given))


# How a worker died: what the nanny beside it knows, in words.

TOPIC = "organ-distill: a worker's process ended"
_POLL_MS = 1000


class ReportDeaths(NannyPlugin):  # type: ignore[misc]
    """Every nanny, also of workers that join later, reports to the scheduler how its worker's
    process ended and how much memory it held at the most. Without a nanny it is not known."""

    name = "organ-distill-deaths"
    _address: str | None = None
    _pid: int | None = None
    _peak: int | None = None

    def setup(self, nanny: Any) -> None:
        """Listens to what the nanny learns anyway; one that is made otherwise reports nothing."""
        self._nanny, self._usual = nanny, nanny._on_worker_exit_sync
        self._measure()
        self._listen(self._on_exit)
        self._periodic = PeriodicCallback(self._measure, _POLL_MS)
        self._periodic.start()

    def teardown(self, nanny: Any) -> None:
        """Stops looking and listening: the next run brings a plugin of its own."""
        self._periodic.stop()
        self._listen(self._usual)

    def _listen(self, on_exit: Callable[[int], None]) -> None:
        self._nanny._on_worker_exit_sync = on_exit
        if self._nanny.process is not None:
            self._nanny.process.on_exit = on_exit

    def _on_exit(self, exit_code: int) -> None:
        told = {
            "worker": self._address, "host": socket.gethostname(), "pid": self._pid,
            "exit_code": exit_code, "peak_bytes": self._peak,
        }  # fmt: skip
        self._nanny.log_event(TOPIC, told)
        self._usual(exit_code)

    def _measure(self) -> None:
        pid = self._nanny.pid
        if pid is None:
            return
        if pid != self._pid:
            self._pid, self._peak = pid, None
        self._address = self._nanny.worker_address or self._address
        self._peak = status_bytes("VmHWM", pid) or self._peak


def in_words(worker: str, report: Mapping[str, Any] | None, last: Mapping[str, Any]) -> str:
    """What is known of a worker's end: by its nanny's report, or by the last heartbeat that the
    scheduler had of it, where nothing came."""
    if report is None:
        memory = last.get("metrics", {}).get("memory")
        held = "" if not memory else f" At its last heartbeat it held {size(memory)}."
        return (
            f"worker {worker} went without a word: no nanny, or its job or node ended with it, so "
            f"nobody knows the exit code.{held}"
        )
    peak = report["peak_bytes"]
    held = "" if not peak else f", having held {size(peak)} of memory at the most"
    who = f"worker {worker} (host {report['host']}, pid {report['pid']})"
    return f"{who} {how_it_ended(report['exit_code'])}{held}."


def left_on_purpose(report: Mapping[str, Any] | None) -> bool:
    """Whether a worker's process ended well: it was retired, or its job asked it to go."""
    return report is not None and report["exit_code"] in (0, -signal.SIGTERM)
