"""Processes of this machine that share out what needs no device, and how much memory one takes."""

from __future__ import annotations

import resource
import signal
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import suppress
from multiprocessing import get_context
from pathlib import Path
from typing import Literal, TypeVar

from pipeline.errors import WorkerDied

Item = TypeVar("Item")
Result = TypeVar("Result")


def in_processes(
    work: Callable[[Item], Result],
    items: Sequence[Item],
    *,
    number: int,
    name: Callable[[Item], str],
    advance: Callable[[str], None],
) -> list[Result | Exception]:
    """What `work` returned for each item, or raised; in the order of items.

    Processes that are killed (by lack of memory, say) cost no other item: what was left is done
    one item at a time, and an item whose process dies again comes to a `WorkerDied`.

    Args:
        work: a function of a module, or a `partial` of one.
        number: of processes; 0 does all in this one.
        advance: hears the name of each item that is done.
    """
    found: dict[int, Result | Exception] = {}

    def keep(place: int, made: Result | Exception) -> None:
        found[place] = made
        advance(name(items[place]))

    if number:
        for place, made in _in_pool(work, dict(enumerate(items)), number):
            keep(place, made)
    else:
        for place, item in enumerate(items):
            keep(place, _attempt(work, item))
    for place, item in enumerate(items):
        if place not in found:
            died = WorkerDied(
                "the process that worked on it was killed, twice.",
                where=name(item),
                fix="Most likely memory ran out: how large are its files? Run the same command "
                "again, with fewer processes.",
            )
            keep(place, dict(_in_pool(work, {place: item}, 1)).get(place, died))
    return [found[place] for place in range(len(items))]


def _attempt(work: Callable[[Item], Result], item: Item) -> Result | Exception:
    try:
        return work(item)
    except Exception as error:
        return error


def _in_pool(
    work: Callable[[Item], Result], items: Mapping[int, Item], number: int
) -> Iterator[tuple[int, Result | Exception]]:
    """Of each item its key and what it came to; fewer if a process dies."""
    # A copy of this process (fork) would hold its threads' locks for ever.
    context = get_context("forkserver")
    context.set_forkserver_preload([getattr(work, "func", work).__module__])
    with ProcessPoolExecutor(number, mp_context=context) as pool:
        try:
            places = {pool.submit(work, item): place for place, item in items.items()}
            for future in as_completed(places):
                error = future.exception()
                if isinstance(error, BrokenProcessPool):
                    return
                if error is not None and not isinstance(error, Exception):
                    raise error
                yield places[future], error or future.result()
        except BrokenProcessPool:
            return
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def how_it_ended(code: int) -> str:
    """An exit code as a message has it; of a signal it is negative."""
    if code >= 0:
        return f"exited with status {code}"
    name = "unknown"
    with suppress(ValueError):
        name = signal.Signals(-code).name
    hint = ", which the system also sends when memory runs out" if name == "SIGKILL" else ""
    return f"was killed by signal {-code} ({name}{hint})"


def memory_bytes(which: Literal["VmRSS", "VmHWM"]) -> int:
    """Resident memory of this process now (VmRSS), or the most so far (VmHWM); that as well where
    the system does not say."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return status_bytes(which) or (peak if sys.platform == "darwin" else peak * 1024)


def status_bytes(which: str, pid: int | None = None) -> int | None:
    """`memory_bytes` of any living process; None where nobody says."""
    with suppress(OSError, StopIteration, ValueError):
        lines = Path(f"/proc/{pid or 'self'}/status").read_text().splitlines()
        return int(next(line for line in lines if line.startswith(which)).split()[1]) * 1024
    return None
