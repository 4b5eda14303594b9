"""Several devices of one machine: a process for each, which takes the next item when it is free."""

from __future__ import annotations

import multiprocessing
import signal
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess
from typing import Any, TypeVar

from pipeline.engine.here import sendable
from pipeline.errors import EngineError, WorkerDied

Item = TypeVar("Item")
Token = TypeVar("Token")
Tell = Callable[[Token], None]
# Does some items and tells, of each, what became of it; it keeps results on disk, not in memory.
Work = Callable[[Iterable[Item], Tell[Token]], None]


@dataclass
class _Worker:
    """A process, the way to it, and what it has in hand."""

    process: SpawnProcess
    way: Connection
    item: Any = None


def run_on_devices(
    works: Sequence[Work[Item, Token]],
    items: Iterable[Item],
    *,
    tell: Tell[Token],
    lost: Callable[[Item, Exception], None],
    name: Callable[[Item], str],
) -> None:
    """Does all items, in one process per work; returns when each has been told of, or is lost.

    Processes start anew (`spawn`), so that each can open a GPU. One that dies loses the item that
    it had in hand; the others go on with the rest.

    Args:
        works: what to do, pickled to a process each; called with one item at a time.
        items: consumed as processes become free.
        tell: hears, in this process, what a work tells.
        lost: hears of items that a work raised at, or whose process died.
        name: of an item, for messages.

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
        busy = [worker for worker in workers if _give(worker, left, lost, name)]
        while busy:
            for ready in wait([worker.way for worker in busy]):
                worker = next(w for w in busy if w.way is ready)
                if not _hear(worker, tell, lost, name) or not _give(worker, left, lost, name):
                    busy.remove(worker)
        for item in left:
            raise EngineError(
                f"all {len(workers)} processes died; this and what follows was not begun.",
                where=name(item),
                fix="What is done is kept: run the same command again, with fewer devices.",
            )
    finally:
        _end(workers)


def _give(
    worker: _Worker,
    left: Iterator[Item],
    lost: Callable[[Item, Exception], None],
    name: Callable[[Item], str],
) -> bool:
    """Hands the next item to a worker; False if there is none, or nobody to take it."""
    for item in left:
        worker.item = item
        try:
            worker.way.send(item)
        except OSError:
            lost(item, _death(worker, name(item)))
            return False
        return True
    return False


def _hear(
    worker: _Worker,
    tell: Tell[Any],
    lost: Callable[[Any, Exception], None],
    name: Callable[[Any], str],
) -> bool:
    """Takes what a worker says until it is free; False if it died."""
    while True:
        try:
            kind, content = worker.way.recv()
        except (EOFError, OSError):
            lost(worker.item, _death(worker, name(worker.item)))
            return False
        if kind == "told":
            tell(content)
            continue
        if kind == "lost":
            lost(worker.item, content)
        return True


def _death(worker: _Worker, name: str) -> WorkerDied:
    worker.process.join(timeout=10)
    code = worker.process.exitcode
    how = f"ended with status {code}"
    if code is not None and code < 0:
        with suppress(ValueError):
            how = f"was killed by {signal.Signals(-code).name}"
    hint = " The system also kills when memory runs out." if code == -signal.SIGKILL else ""
    return WorkerDied(
        f"the process that worked on it {how}.{hint}",
        where=name,
        fix="Run the same command again; with fewer devices if memory ran out.",
    )


def _end(workers: Sequence[_Worker]) -> None:
    for worker in workers:
        worker.way.close()
    for worker in workers:
        worker.process.join(timeout=5)
        if worker.process.is_alive():
            worker.process.terminate()
            worker.process.join()


def _serve(way: Connection, work: Work[Any, Any]) -> None:
    """The life of a process: an item, what it has to tell, the next item."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the one who started it ends it
    while True:
        try:
            item = way.recv()
        except EOFError:
            return
        try:
            work([item], lambda token: way.send(("told", token)))
        except Exception as error:
            way.send(("lost", sendable(error)))
        else:
            way.send(("free", None))
