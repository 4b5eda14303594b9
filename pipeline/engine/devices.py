"""Several devices of one machine: a process for each, which takes the next item when it is free."""

from __future__ import annotations

import multiprocessing
import signal
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess
from typing import Any

from pipeline.engine.here import Item, Outcome, Outcomes, Result
from pipeline.engine.processes import how_it_ended
from pipeline.errors import EngineError, WorkerDied


@dataclass
class _Worker:
    """A process, the connection to it, and what it has in hand."""

    process: SpawnProcess
    connection: Connection
    item: Any = None


def run_on_devices(
    works: Sequence[Callable[[Item], Result]], items: Iterable[Item], *, name: Callable[[Item], str]
) -> Outcomes[Item, Result]:
    """Does all items, in one process per work.

    Processes start anew (`spawn`), so that each can open a GPU. One that dies loses the item that
    it had in hand; the others go on with the rest.

    Args:
        works: what to do with an item, pickled to a process each.

    Yields:
        An outcome per item, as they end.

    Raises:
        EngineError: all processes died while items were left.
    """
    context = multiprocessing.get_context("spawn")
    left = iter(items)
    workers: list[_Worker] = []
    try:
        for work in works:
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(theirs, work), daemon=True)
            process.start()
            theirs.close()
            workers.append(_Worker(process, ours))
        for worker in workers:
            yield from _give(worker, left, name)
        while busy := [worker.connection for worker in workers if worker.item is not None]:
            for ready in wait(busy):
                worker = next(w for w in workers if w.connection is ready)
                try:
                    yield worker.connection.recv()
                except (EOFError, OSError):
                    yield _death(worker, name(worker.item))
                    worker.item = None
                else:
                    yield from _give(worker, left, name)
        for item in left:
            raise EngineError(
                f"all {len(workers)} processes died; this and what follows was not begun.",
                where=name(item),
                fix="What is done is kept: run the same command again, with fewer devices.",
            )
    finally:
        _end(workers)


def _give(
    worker: _Worker, left: Iterator[Item], name: Callable[[Item], str]
) -> Iterator[Outcome[Item, Any]]:
    """Hands the next item to a worker that is free; without one, it has none in hand."""
    worker.item = None
    for item in left:
        worker.item = item
        try:
            worker.connection.send(item)
        except OSError:
            yield _death(worker, name(item))
            worker.item = None
        return


def _death(worker: _Worker, name: str) -> Outcome[Any, Any]:
    worker.process.join(timeout=10)
    code = worker.process.exitcode
    how = "went without a word" if code is None else how_it_ended(code)
    died = WorkerDied(
        f"the process that worked on it {how}.",
        where=name,
        fix="Run the same command again; with fewer devices if memory ran out.",
    )
    return Outcome(worker.item, error=died, unreported=True)


def _end(workers: Sequence[_Worker]) -> None:
    for worker in workers:
        worker.connection.close()
    for worker in workers:
        worker.process.join(timeout=5)
        if worker.process.is_alive():
            worker.process.terminate()
            worker.process.join()


def _serve(connection: Connection, work: Callable[[Any], Any]) -> None:
    """The life of a process: an item, what became of it, the next item."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the one who started it ends it
    while True:
        try:
            item = connection.recv()
        except EOFError:
            return
        try:
            outcome = Outcome(item, work(item))
        except Exception as error:
            outcome = Outcome(item, error=error)
        connection.send(outcome)
