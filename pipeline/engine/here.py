"""What an engine is, and the one that needs nothing: this process, which reads ahead and stores
behind.
"""

from __future__ import annotations

import queue
import threading
import traceback
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar

from pipeline.errors import PipelineError

# Reading, computing and storing overlap: one item ahead, one in hand, one behind.
#
# Pure: the three steps are callables. What they do in native code with the GIL released
# (decompression, interpolation, convolution, compression) runs at the same time.

Item = TypeVar("Item")
Read = TypeVar("Read")
Made = TypeVar("Made")
Result = TypeVar("Result")
Value = TypeVar("Value")
# How long an interruption waits for what is being read and stored at that moment.
_PATIENCE_S = 10.0


@dataclass(frozen=True)
class Outcome(Generic[Item, Result]):
    """What became of an item: a result, or the error that stopped it."""

    item: Item
    result: Result | None = None
    error: Exception | None = None


def overlapped(
    items: Iterable[Item],
    *,
    ahead: Callable[[Item], Read],
    work: Callable[[Item, Read], Made],
    behind: Callable[[Item, Made], Result],
) -> Generator[Outcome[Item, Result], None, None]:
    """Takes each item through three steps, of which three items are at any time in different ones.

    While an item is at work in the calling thread, the next is read in a thread ahead and the last
    is stored in a thread behind. No queue is longer than that: at most one item waits read, and an
    item is only handed behind when the one before it is stored, so that memory is bounded by one
    `Read` waiting, one in hand, one `Made` in hand and one being stored.

    An `Exception` in any step ends its item alone. Anything else (Ctrl-C) ends all: no further
    step begins, and those at it are given ten seconds. Close the iterator (`contextlib.closing`)
    to stop early.

    Args:
        items: consumed in the calling thread, one ahead of the work.
        ahead: reads an item.
        work: computes; in the calling thread, in the order of items.
        behind: stores; in the order of items.

    Yields:
        An outcome per item, in the order of items.
    """
    reader, writer = _Side("read ahead"), _Side("store behind")
    upcoming: _Ahead[Item, Read] = _Ahead(reader, items, ahead)
    stored: tuple[Item, Future[Result]] | None = None
    try:
        while (taken := upcoming.take()) is not None:
            item, read = taken
            made = read if isinstance(read, _Failed) else _attempt(work, item, read)
            del taken, read
            if stored is not None:
                yield _outcome(*stored)
                stored = None
            if isinstance(made, _Failed):
                yield Outcome(item, error=made.error)
            else:
                stored = item, writer.submit(behind, item, made)
            del made
        if stored is not None:
            yield _outcome(*stored)
    finally:
        reader.stop()
        writer.stop()


def in_turn(
    items: Iterable[Item],
    *,
    ahead: Callable[[Item], Read],
    work: Callable[[Item, Read], Made],
    behind: Callable[[Item, Made], Result],
) -> Generator[Outcome[Item, Result], None, None]:
    """`overlapped` without threads: one item after the other, with one item's memory."""

    def all_three(item: Item) -> Result:
        return behind(item, work(item, ahead(item)))

    for item in items:
        done = _attempt(all_three, item)
        if isinstance(done, _Failed):
            yield Outcome(item, error=done.error)
        else:
            yield Outcome(item, done)


@dataclass(frozen=True)
class _Failed:
    error: Exception


def _attempt(step: Callable[..., Value], *arguments: object) -> Value | _Failed:
    try:
        return step(*arguments)
    except Exception as error:
        return _Failed(_without_locals(error))


def _outcome(item: Item, future: Future[Result]) -> Outcome[Item, Result]:
    try:
        return Outcome(item, future.result())
    except Exception as error:
        return Outcome(item, error=_without_locals(error))


def _without_locals(error: Exception) -> Exception:
    """An error that is kept for a report must not keep the volumes of its frames in memory."""
    seen: BaseException | None = error
    while seen is not None:
        traceback.clear_frames(seen.__traceback__)
        seen = seen.__cause__ or seen.__context__
    return error


class _Ahead(Generic[Item, Read]):
    """The next item, being read."""

    def __init__(self, side: _Side, items: Iterable[Item], read: Callable[[Item], Read]) -> None:
        self._side, self._items, self._read = side, iter(items), read
        self._next: tuple[Item, Future[Read]] | None = None
        self._begin()

    def take(self) -> tuple[Item, Read | _Failed] | None:
        """Waits for the item that is being read, lets the next one begin; None at the end."""
        if self._next is None:
            return None
        item, future = self._next
        self._next = None
        try:
            read: Read | _Failed = future.result()
        except Exception as error:
            read = _Failed(_without_locals(error))
        self._begin()
        return item, read

    def _begin(self) -> None:
        for item in self._items:
            self._next = item, self._side.submit(self._read, item)
            return


class _Side:
    """One daemon thread that does one thing after the other. Not a `ThreadPoolExecutor`: Python
    waits for its threads when it exits, however long a dead file system makes them hang."""

    def __init__(self, name: str) -> None:
        self._tasks: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def submit(self, step: Callable[..., Value], *arguments: object) -> Future[Value]:
        future: Future[Value] = Future()

        def task() -> None:
            try:
                future.set_result(step(*arguments))
            except BaseException as error:
                future.set_exception(error)

        self._tasks.put(task)
        return future

    def stop(self) -> None:
        """No further step begins; waits a little for the one that runs."""
        with suppress(queue.Empty):
            while True:
                self._tasks.get_nowait()
        self._tasks.put(None)
        self._thread.join(_PATIENCE_S)

    def _run(self) -> None:
        while (task := self._tasks.get()) is not None:
            task()
            del task  # or its arguments would live until the next one comes


# What an engine is, and the one that needs nothing: this process.

Token = TypeVar("Token")
Tell = Callable[[Token], None]
# Does some items and tells, of each, what became of it; it keeps results on disk, not in memory.
# An engine with other processes pickles it and calls it with one item at a time.
Work = Callable[[Iterable[Item], Tell[Token]], None]


class Engine(Protocol):
    """Where work is done."""

    @property
    def remote(self) -> bool:
        """Whether work is done in other processes, and must be picklable."""

    def run(
        self,
        work: Work[Item, Token],
        items: Iterable[Item],
        *,
        tell: Tell[Token],
        lost: Callable[[Item, Exception], None],
        name: Callable[[Item], str],
    ) -> None:
        """Does all items; returns when each has been told of, or is lost.

        Args:
            work: what to do.
            items: consumed as they are needed.
            tell: hears, in this process, what `work` tells.
            lost: hears of items that `work` could not tell of: it raised, or its process died.
            name: of an item, for messages.

        Raises:
            PipelineError: no item can be done any more.
        """


class Here:
    """This process. What `work` raises is raised: nothing else could be done with the next item."""

    remote = False

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
        work(items, tell)


HERE = Here()


def sendable(error: Exception) -> Exception:
    """An error that reaches another process whole: one that nobody foresaw may not be picklable,
    and its traceback never is; it arrives as text."""
    if isinstance(error, PipelineError):
        return error
    import traceback

    told = RuntimeError(f"{type(error).__name__}: {error}")
    told.add_note("".join(traceback.format_exception(error)).rstrip())
    return told


def first_told(engine: Engine, work: Work[None, Token], *, name: str) -> Token:
    """What `work` tells when it is called with nothing: for what is asked once.

    Raises:
        Exception: what `work` raised.
    """
    told: list[Token] = []

    def lost(_: None, error: Exception) -> None:
        raise error

    engine.run(work, [None], tell=told.append, lost=lost, name=lambda _: name)
    return told[0]


_OPENED: dict[str, Any] = {}


def once_per_process(key: str, make: Callable[[], Token]) -> Token:
    """What a worker keeps between tasks, for example networks in memory. It holds one thing only:
    another key takes the place of the last one, which is let go of first."""
    if key not in _OPENED:
        _OPENED.clear()
        _OPENED[key] = make()
    found: Token = _OPENED[key]
    return found
