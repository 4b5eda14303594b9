"""What an engine is, and the one that needs nothing: this process, which reads ahead and stores
behind.
"""

from __future__ import annotations

import queue
import threading
import traceback
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, Generic, Protocol, TypeVar

from pipeline.errors import PipelineError

Item = TypeVar("Item")
AnyItem = TypeVar("AnyItem", contravariant=True)
Read = TypeVar("Read")
Made = TypeVar("Made")
Result = TypeVar("Result")
AnyResult = TypeVar("AnyResult", covariant=True)
Value = TypeVar("Value")
# How long an interruption waits for what is being read and stored at that moment.
_PATIENCE_S = 10.0


class Steps(Protocol[AnyItem, Read, Made, AnyResult]):
    """What is done with each item. Results go to disk, not into memory; an engine with other
    processes pickles the steps, the items and what `store` returns."""

    def group(self, item: AnyItem) -> str:
        """Names what an item is of. Items of one group that come one after the other are worked on
        one after the other in one process; messages call them by this name."""

    def read(self, item: AnyItem) -> Read:
        """The first step, in a thread ahead."""

    def compute(self, item: AnyItem, read: Read) -> Made:
        """The second, in the order of items."""

    def store(self, item: AnyItem, made: Made) -> AnyResult:
        """The third, in a thread behind, in the order of items."""


@dataclass(frozen=True)
class Outcome(Generic[Item, Result]):
    """What became of an item: a result, or the error that stopped it.

    Attributes:
        unreported: what became of it is not known, for example because its process died: it may
            have been stored before that.
    """

    item: Item
    result: Result | None = None
    error: Exception | None = None
    unreported: bool = False

    def __getstate__(self) -> dict[str, Any]:
        """As another process can read it."""
        return {**self.__dict__, "error": self.error and sendable(self.error)}


Outcomes = Generator[Outcome[Item, Result], None, None]


class Engine(Protocol):
    """Where work is done."""

    @property
    def remote(self) -> bool:
        """Whether work is done in other processes, and must be picklable."""

    def run(
        self, steps: Steps[Item, Any, Any, Result], items: Iterable[Item]
    ) -> Outcomes[Item, Result]:
        """Takes each item through the steps; an `Exception` in one of them ends its item alone.

        Args:
            items: consumed in the calling thread.

        Yields:
            An outcome per item; in this process in the order of items. Close it
            (`contextlib.closing`) to stop early.

        Raises:
            PipelineError: no item can be done any more.
        """

    def call(self, function: Callable[[], Value], *, name: str) -> Value:
        """What a function returns, or raises, where items are worked on; messages call it
        `name`."""


@dataclass(frozen=True)
class Here:
    """This process.

    Attributes:
        overlap: read the next item and store the last one while one is at work; without it, one
            thing at a time, with less memory.
    """

    overlap: bool = True
    remote: bool = field(default=False, init=False)

    def run(
        self, steps: Steps[Item, Any, Any, Result], items: Iterable[Item]
    ) -> Outcomes[Item, Result]:
        """See `Engine.run`."""
        return overlapped(steps, items) if self.overlap else in_turn(steps, items)

    def call(self, function: Callable[[], Value], *, name: str) -> Value:
        """See `Engine.call`."""
        return function()


HERE = Here()


@dataclass(frozen=True, kw_only=True)
class Execution:
    """Where and how fast; nothing of it changes a number.

    Attributes:
        engine: where cases are worked on; the registry and the work folder must be reached there
            by the same paths.
        device: auto, cpu, cuda, cuda:1.
        window_batch: windows per forward pass, at most.
        force: start even if what is still to be made will not fit.
    """

    engine: Engine = HERE
    device: str = "auto"
    window_batch: int = 1
    force: bool = False


# Reading, computing and storing overlap: one item ahead, one in hand, one behind. What the steps do
# in native code with the GIL released (decompression, interpolation, convolution, compression) runs
# at the same time.


def overlapped(
    steps: Steps[Item, Read, Made, Result], items: Iterable[Item]
) -> Outcomes[Item, Result]:
    """Takes each item through the steps, of which three items are at any time in different ones.

    While an item is at work in the calling thread, the next is read in a thread ahead and the last
    is stored in a thread behind. No queue is longer than that: at most one item waits read, and an
    item is only handed behind when the one before it is stored, so that memory is bounded by one
    `Read` waiting, one in hand, one `Made` in hand and one being stored.

    An `Exception` in any step ends its item alone. Anything else (Ctrl-C) ends all: no further
    step begins, and those at it are given ten seconds.

    Yields:
        An outcome per item, in the order of items.
    """
    reader, writer = _Side("read ahead"), _Side("store behind")
    stored: tuple[Item, Future[Result]] | None = None
    try:
        for item, read in _ahead(reader, items, steps.read):
            made: Made | _Failed
            try:
                made = steps.compute(item, read.result())
            except Exception as error:
                made = _Failed(error)
            del read
            if stored is not None:
                yield _outcome(*stored)
                stored = None
            if isinstance(made, _Failed):
                yield Outcome(item, error=made.error)
            else:
                stored = item, writer.submit(steps.store, item, made)
            del made
        if stored is not None:
            yield _outcome(*stored)
    finally:
        reader.stop()
        writer.stop()


def in_turn(
    steps: Steps[Item, Read, Made, Result], items: Iterable[Item]
) -> Outcomes[Item, Result]:
    """`overlapped` without threads: one item after the other, with one item's memory."""
    for item in items:
        try:
            outcome = Outcome(item, do_one(steps, item))
        except Exception as error:
            outcome = Outcome(item, error=_Failed(error).error)
        yield outcome


def do_one(steps: Steps[Item, Read, Made, Result], item: Item) -> Result:
    """One item through all steps; raises what they raise."""
    return steps.store(item, steps.compute(item, steps.read(item)))


class _Failed:
    """An error that is kept for a report must not keep the volumes of its frames in memory."""

    def __init__(self, error: Exception) -> None:
        seen: BaseException | None = error
        while seen is not None:
            traceback.clear_frames(seen.__traceback__)
            seen = seen.__cause__ or seen.__context__
        # The first frame is the engine's own, which goes on and holds the items that come.
        inner = error.__traceback__ and error.__traceback__.tb_next
        self.error = error.with_traceback(inner)


def _outcome(item: Item, future: Future[Result]) -> Outcome[Item, Result]:
    try:
        return Outcome(item, future.result())
    except Exception as error:
        return Outcome(item, error=_Failed(error).error)


def _ahead(
    side: _Side, items: Iterable[Item], read: Callable[[Item], Read]
) -> Iterator[tuple[Item, Future[Read]]]:
    """Each item, being read or read, while the next one is; holds none that it gave away."""
    waiting = deque[tuple[Item, Future[Read]]]()
    for item in items:
        waiting.append((item, side.submit(read, item)))
        if len(waiting) > 1:
            yield waiting.popleft()
    while waiting:
        yield waiting.popleft()


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


# What crosses between processes, and what a worker keeps.


def sendable(error: Exception) -> Exception:
    """An error that reaches another process whole: one that nobody foresaw may not be picklable,
    and its traceback never is; it arrives as text."""
    if isinstance(error, PipelineError):
        return error
    told = RuntimeError(f"{type(error).__name__}: {error}")
    told.add_note("".join(traceback.format_exception(error)).rstrip())
    return told


_OPENED: dict[str, Any] = {}


def once_per_process(key: str, make: Callable[[], Value]) -> Value:
    """What a worker keeps between tasks, for example networks in memory. It holds one thing only:
    another key takes the place of the last one, which is let go of first."""
    if key not in _OPENED:
        _OPENED.clear()
        _OPENED[key] = make()
    found: Value = _OPENED[key]
    return found
