"""What an engine is, and the one that needs nothing: this process."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, Protocol, TypeVar

from pipeline.errors import PipelineError

Item = TypeVar("Item")
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
