"""Dask: cases go to workers, one at a time to each, and come back as a few words.

Never more than one case is handed to a worker: Dask suspects every task that is assigned to a
worker that dies, so that one case that kills its worker would condemn innocent ones.
"""

from __future__ import annotations

import queue
import secrets
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Generic

from distributed import Client, Future

from pipeline.engine.deaths import TOPIC, TellOfDeaths, allowed_threads, in_words, left_on_purpose
from pipeline.engine.here import Item, Tell, Token, Work, sendable
from pipeline.errors import EngineError, WorkerDied
from pipeline.log import SECONDS_BETWEEN_LINES, Log

# How often a case is tried whose workers die, and whose workers leave.
_DEATHS, _LEAVES = 3, 10
_LOOK_EVERY_S = 0.5
# How long the nanny of a worker that is gone may take to say why.
_PATIENCE_S = 3.0
_GATHER_S = 60.0
_NAMED = 8


@dataclass
class _Try(Generic[Item]):
    """An item and how its workers ended so far."""

    item: Item
    deaths: list[str] = field(default_factory=list)
    leaves: int = 0

    @property
    def is_last(self) -> bool:
        return len(self.deaths) == _DEATHS - 1


@dataclass
class _Flight(Generic[Item]):
    """An item at a worker."""

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
        log: hears of deaths, and of what is at work when nothing else is to be told.
        renew: called every now and then, to start workers in place of those that ended.
    """

    remote = True

    def __init__(self, client: Client, *, log: Log, renew: Callable[[], None]) -> None:
        self._client, self._log, self._renew = client, log, renew
        self._address = str(client.scheduler.address)
        self._told: dict[str, Mapping[str, Any]] = {}
        client.subscribe_topic(TOPIC, self._hear)
        client.register_plugin(TellOfDeaths())

    def run(
        self,
        work: Work[Item, Token],
        items: Iterable[Item],
        *,
        tell: Tell[Token],
        lost: Callable[[Item, Exception], None],
        name: Callable[[Item], str],
    ) -> None:
        """See `Engine.run`."""
        _Window(self, work, items, tell, lost, name).run()

    def _hear(self, event: tuple[float, Mapping[str, Any]]) -> None:
        _, message = event
        if message.get("worker"):
            self._told[message["worker"]] = message

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


class _Window(Generic[Item, Token]):
    """One run: which items wait, which are at which worker."""

    def __init__(
        self,
        engine: DaskEngine,
        work: Work[Item, Token],
        items: Iterable[Item],
        tell: Tell[Token],
        lost: Callable[[Item, Exception], None],
        name: Callable[[Item], str],
    ) -> None:
        self._engine, self._client, self._log = engine, engine._client, engine._log
        self._work, self._tell, self._lost, self._name = work, tell, lost, name
        self._fresh: Iterator[Item] = iter(items)
        self._next: _Try[Item] | None = None
        self._again: deque[_Try[Item]] = deque()
        self._flying: dict[str, _Flight[Item]] = {}
        self._ended: queue.SimpleQueue[str] = queue.SimpleQueue()
        self._quiet_since = time.monotonic()
        self._draw()

    def run(self) -> None:
        try:
            while self._flying or self._next is not None or self._again:
                workers = self._engine.workers()
                self._part_with_the_gone(workers)
                self._send(workers)
                self._beat(len(workers))
                self._engine._renew()
                self._take_what_ended()
        finally:
            if self._flying:
                self._client.cancel([flight.future for flight in self._flying.values()])

    def _draw(self) -> None:
        self._next = None
        for item in self._fresh:
            self._next = _Try(item)
            return

    def _send(self, workers: Mapping[str, Mapping[str, Any]]) -> None:
        for address, seen in workers.items():
            if address in self._flying or seen.get("status", "running") != "running":
                continue
            what = self._choose()
            if what is None:
                return
            future = self._client.submit(
                _do, self._work, what.item, key=f"organ-distill-{secrets.token_hex(8)}",
                workers=[address], allow_other_workers=False, pure=False, retries=0,
            )  # fmt: skip
            now = time.monotonic()
            self._flying[address] = _Flight(what, future, seen["local_directory"], now, seen)
            future.add_done_callback(lambda _, address=address: self._ended.put(address))

    def _choose(self) -> _Try[Item] | None:
        """Fresh ones first, suspects later, their last try alone."""
        if any(flight.what.is_last for flight in self._flying.values()):
            return None
        if self._next is not None:
            what = self._next
            self._draw()
            return what
        if not self._again or (self._again[0].is_last and self._flying):
            return None
        return self._again.popleft()

    def _take_what_ended(self) -> None:
        """Waits a little; looks at whatever has ended."""
        try:
            address = self._ended.get(timeout=_LOOK_EVERY_S)
            while True:
                self._land(address)
                address = self._ended.get_nowait()
        except queue.Empty:
            return

    def _land(self, address: str) -> None:
        flight = self._flying.get(address)
        if flight is None or not flight.future.done():
            return
        if flight.future.status == "finished":
            try:
                done, result = flight.future.result(timeout=_GATHER_S)
            except Exception:  # it died before it could be asked: next look at the workers
                flight.gone_since = flight.gone_since or time.monotonic()
                return
            del self._flying[address]
            self._quiet_since = time.monotonic()
            for token in result:
                self._tell(token)
            if isinstance(done, Exception):
                self._lost(flight.what.item, done)
        elif flight.future.status == "error":
            error = flight.future.exception(timeout=_GATHER_S)
            if type(error).__name__ == "KilledWorker":
                flight.gone_since = flight.gone_since or time.monotonic()
                return
            del self._flying[address]
            self._lost(flight.what.item, sendable(error))
        else:  # cancelled: its worker went, or so did the scheduler, which the next look tells
            flight.gone_since = flight.gone_since or time.monotonic()

    def _part_with_the_gone(self, workers: Mapping[str, Mapping[str, Any]]) -> None:
        now = time.monotonic()
        for address, flight in list(self._flying.items()):
            here = workers.get(address)
            if here is not None and here["local_directory"] == flight.folder:
                flight.seen = here
                if flight.gone_since is None:
                    continue
            flight.gone_since = flight.gone_since or now
            told = self._engine._told.get(address)
            if told is None and now - flight.gone_since < _PATIENCE_S:
                continue
            del self._flying[address]
            self._client.cancel([flight.future])
            self._engine._told.pop(address, None)
            self._try_again(flight, told)

    def _try_again(self, flight: _Flight[Item], told: Mapping[str, Any] | None) -> None:
        what, name = flight.what, self._name(flight.what.item)
        how = in_words(str(flight.seen.get("name", "")), told, flight.seen)
        self._quiet_since = time.monotonic()
        if left_on_purpose(told):
            what.leaves += 1
        else:
            what.deaths.append(how)
        tries = len(what.deaths) + what.leaves
        self._log.event("worker died", case=name, how=how, tries=tries)
        if len(what.deaths) < _DEATHS and what.leaves < _LEAVES:
            self._again.append(what)
            last = ", and then alone" if what.is_last else ""
            self._log.warn(f"{name} was at work when its {how} It is tried again{last}.")
            return
        self._lost(
            what.item,
            WorkerDied(
                f"its worker ended each of {tries} times, the last time while no other case was at "
                f"work: {how}",
                where=name,
                fix="Does it need more memory than a worker has? Run it alone without --executor "
                "to see; other cases are not affected.",
            ),
        )

    def _beat(self, num_workers: int) -> None:
        now = time.monotonic()
        if now - self._quiet_since < SECONDS_BETWEEN_LINES:
            return
        self._quiet_since = now
        busy = [(self._name(f.what.item), now - f.began) for f in self._flying.values()]
        self._log.event("at work", workers=num_workers, cases=[case for case, _ in busy])
        if not num_workers:
            self._log.info("waiting for workers: none is there")
            return
        shown = ", ".join(f"{case} ({seconds:.0f} s)" for case, seconds in busy[:_NAMED])
        more = f" and {len(busy) - _NAMED} more" if len(busy) > _NAMED else ""
        self._log.info(f"at work on {num_workers} workers: {shown or 'nothing'}{more}")


def _do(work: Work[Item, Token], item: Item) -> tuple[Exception | None, list[Token]]:
    """In a worker: one item, and what was told of it."""
    _settle_threads()
    told: list[Token] = []
    try:
        work([item], told.append)
    except Exception as error:
        return sendable(error), told
    return None, told


def _settle_threads() -> None:
    """Nannies start workers with one thread for arithmetic, whatever cores they have."""
    threads = allowed_threads()
    if threads is not None:
        import torch

        if torch.get_num_threads() != threads:
            torch.set_num_threads(threads)
