"""The engine: order, overlap, bounds, errors, interruption. No test depends on how long things
take: steps wait for each other by events, which time out only where the engine is wrong."""

from __future__ import annotations

import gc
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest

from pipeline.engine import here
from pipeline.engine.here import in_turn, overlapped

PATIENCE_S = 10
ORDERS = pytest.mark.parametrize("order", [overlapped, in_turn])


def read(item: int) -> int:
    return item * 10


def compute(item: int, seen: int) -> int:
    return seen + item


def store(item: int, made: int) -> str:
    return f"{item}: {made}"


def steps_of(**steps: Any) -> Any:
    """`Steps` of functions; those above where none is given."""
    return SimpleNamespace(**{"read": read, "compute": compute, "store": store} | steps)


def threads() -> list[str]:
    return [t.name for t in threading.enumerate() if t.name in ("read ahead", "store behind")]


@ORDERS
@pytest.mark.parametrize("count", [0, 1, 2, 7])
def test_each_item_goes_through_three_steps_in_order(order: Any, count: int) -> None:
    outcomes = list(order(steps_of(), range(count)))
    assert [o.item for o in outcomes] == list(range(count))
    assert [o.result for o in outcomes] == [f"{i}: {11 * i}" for i in range(count)]
    assert not any(o.error for o in outcomes)
    assert threads() == []


@ORDERS
@pytest.mark.parametrize("step", ["read", "compute", "store"])
@pytest.mark.parametrize("bad", [{0}, {1, 2}, {4}, {0, 1, 2, 3, 4}])
def test_an_error_ends_its_item_alone(order: Any, step: str, bad: set[int]) -> None:
    steps: dict[str, Any] = {"read": read, "compute": compute, "store": store}

    def broken(item: int, *more: int) -> Any:
        if item in bad:
            raise ValueError(f"item {item}")
        return steps_were[step](item, *more)

    steps_were = dict(steps)
    steps[step] = broken
    outcomes = list(order(steps_of(**steps), range(5)))
    assert [o.item for o in outcomes] == list(range(5))
    for outcome in outcomes:
        if outcome.item in bad:
            assert str(outcome.error) == f"item {outcome.item}"
            assert outcome.result is None
        else:
            assert outcome.result == f"{outcome.item}: {11 * outcome.item}"


def test_the_next_is_read_and_the_last_is_stored_while_one_is_at_work() -> None:
    reading = [threading.Event() for _ in range(3)]
    storing = [threading.Event() for _ in range(3)]
    working = [threading.Event() for _ in range(3)]

    def ahead(item: int) -> int:
        reading[item].set()
        return item

    def meet(item: int, seen: int) -> int:
        assert threading.current_thread() is threading.main_thread()
        working[item].set()
        if item == 1:
            assert reading[2].wait(PATIENCE_S)
            assert storing[0].wait(PATIENCE_S)
        return seen

    def behind(item: int, made: int) -> int:
        storing[item].set()
        if item == 0:
            assert working[1].wait(PATIENCE_S)  # storing 0 is not over when work on 1 begins
        return made

    outcomes = list(overlapped(steps_of(read=ahead, compute=meet, store=behind), range(3)))
    assert [o.result for o in outcomes] == [0, 1, 2]


def test_no_more_than_one_item_waits_at_either_side() -> None:
    """However fast reading is and however slow storing."""
    begun: dict[str, set[int]] = {"ahead": set(), "work": set(), "stored": set()}
    wrong: list[str] = []
    room = threading.Event()

    def ahead(item: int) -> int:
        begun["ahead"].add(item)
        if item - len(begun["work"]) > 1:
            wrong.append(f"{item} is read with {len(begun['work'])} begun")
        return item

    def meet(item: int, seen: int) -> int:
        begun["work"].add(item)
        if item >= 2 and item - 2 not in begun["stored"]:
            wrong.append(f"work on {item} before {item - 2} is stored")
        return seen

    def behind(item: int, made: int) -> int:
        room.wait(0.02)
        begun["stored"].add(item)
        return made

    assert len(list(overlapped(steps_of(read=ahead, compute=meet, store=behind), range(12)))) == 12
    assert wrong == []


class Volume:
    """Something large."""

    alive: weakref.WeakSet[Volume]

    def __init__(self) -> None:
        Volume.alive.add(self)


def test_what_was_read_and_made_is_let_go() -> None:
    Volume.alive = weakref.WeakSet()
    most = 0

    def ahead(item: int) -> Volume:
        return Volume()

    def meet(item: int, seen: Volume) -> Volume:
        nonlocal most
        del seen
        made = Volume()
        most = max(most, len(Volume.alive))
        return made

    def behind(item: int, made: Volume) -> None:
        return None

    for _ in overlapped(steps_of(read=ahead, compute=meet, store=behind), range(10)):
        pass
    # Read: one waits, one is in hand. Made: one in hand, one being stored.
    assert most <= 4
    gc.collect()
    assert len(Volume.alive) == 0


def test_while_all_wait_for_a_network_two_cts_are_in_memory_and_no_outputs() -> None:
    """The one at work and the next; what was stored is gone, though nothing new has come."""
    Volume.alive = weakref.WeakSet()
    alive: list[int] = []
    last_is_read = threading.Event()

    def ahead(item: int) -> Volume:
        volume = Volume()
        if item == 4:
            last_is_read.set()
        return volume

    def meet(item: int, seen: Volume) -> Volume:
        if item == 3:
            assert last_is_read.wait(PATIENCE_S)
            patience = time.monotonic() + PATIENCE_S
            while len(Volume.alive) != 2 and time.monotonic() < patience:
                time.sleep(0.001)
            alive.append(len(Volume.alive))
        return Volume()

    def behind(item: int, made: Volume) -> None:
        return None

    assert len(list(overlapped(steps_of(read=ahead, compute=meet, store=behind), range(5)))) == 5
    assert alive == [2]


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """A step that hangs is waited for no longer than a moment."""
    monkeypatch.setattr(here, "_PATIENCE_S", 0.05)


@pytest.mark.usefixtures("impatient")
def test_a_side_that_is_stopped_begins_nothing_more() -> None:
    begun, release = threading.Event(), threading.Event()
    side, done = here._Side("read ahead"), []

    def first() -> None:
        begun.set()
        release.wait(PATIENCE_S)

    side.submit(first)
    side.submit(done.append, 2)
    assert begun.wait(PATIENCE_S)
    side.stop()
    release.set()
    side._thread.join(PATIENCE_S)
    assert done == []
    assert threads() == []


@pytest.mark.parametrize("step", ["read", "compute", "store"])
@pytest.mark.parametrize("order", [overlapped, in_turn])
def test_an_error_that_is_kept_keeps_no_volume(order: Any, step: str) -> None:
    Volume.alive = weakref.WeakSet()
    steps: dict[str, Any] = {"read": read, "compute": compute, "store": store}

    def broken(*arguments: Any) -> None:
        volume = Volume()
        try:
            raise KeyError("inner")
        except KeyError as error:
            raise ValueError(f"of {type(volume).__name__}") from error

    outcomes = list(order(steps_of(**steps | {step: broken}), range(3)))
    gc.collect()
    assert [str(o.error) for o in outcomes] == ["of Volume"] * 3
    assert outcomes[0].error is not None
    assert outcomes[0].error.__traceback__ is not None  # where it came from can still be told
    assert len(Volume.alive) == 0


@pytest.mark.parametrize("step", ["read", "compute", "store"])
def test_an_interruption_ends_all(step: str) -> None:
    steps: dict[str, Any] = {"read": read, "compute": compute, "store": store}
    begun: list[int] = []

    def broken(item: int, *more: int) -> Any:
        begun.append(item)
        if item == 2:
            raise KeyboardInterrupt
        return {"read": read, "compute": compute, "store": store}[step](item, *more)  # type: ignore[operator]

    outcomes: list[int] = []
    with pytest.raises(KeyboardInterrupt):
        outcomes.extend(o.item for o in overlapped(steps_of(**steps | {step: broken}), range(50)))
    assert max(begun) <= 4
    assert outcomes in ([0], [0, 1])
    assert threads() == []


def test_closing_stops_early_and_waits_for_what_is_being_stored() -> None:
    stored: list[int] = []
    hold = threading.Event()

    def behind(item: int, made: int) -> int:
        hold.wait(0.05)
        stored.append(item)
        return made

    outcomes = overlapped(steps_of(store=behind), range(50))
    first = next(outcomes)
    outcomes.close()
    assert first.item == 0
    assert stored in ([0], [0, 1])
    assert threads() == []


@pytest.mark.usefixtures("impatient")
def test_a_step_that_hangs_does_not_hold_up_an_interruption() -> None:
    hangs, release = threading.Event(), threading.Event()

    def hang(item: int) -> int:
        if item:
            hangs.set()
            release.wait(PATIENCE_S)
        return item

    def interrupted(item: int, seen: int) -> int:
        assert hangs.wait(PATIENCE_S)
        raise KeyboardInterrupt

    try:
        with pytest.raises(KeyboardInterrupt):
            next(overlapped(steps_of(read=hang, compute=interrupted), range(3)))
        assert threads() == ["read ahead"]
    finally:
        release.set()


@ORDERS
def test_items_are_asked_for_as_they_are_needed(order: Any) -> None:
    """Whether a unit is there already is looked at shortly before its turn, in this thread."""
    asked: list[int] = []

    def items() -> Iterator[int]:
        for item in range(5):
            assert threading.current_thread() is threading.main_thread()
            asked.append(item)
            yield item

    def meet(item: int, seen: int) -> int:
        assert len(asked) <= item + 2
        return seen

    call: Callable[..., Any] = order
    assert len(list(call(steps_of(compute=meet), items()))) == 5
