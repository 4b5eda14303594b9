from __future__ import annotations

import os
import signal
from dataclasses import dataclass

import pytest

from pipeline.engine.devices import run_on_devices
from pipeline.errors import ConfigError, EngineError, WorkerDied


@dataclass(frozen=True)
class Squares:
    """Gives (item, its square, who); dies or raises at some items."""

    dies_at: tuple[int, ...] = ()

    def __call__(self, item: int) -> tuple[int, int, int]:
        if item in self.dies_at:
            os.kill(os.getpid(), signal.SIGKILL)
        if item < 0:
            raise ConfigError("negative", where=str(item), fix="Give another.")
        if item == 13:
            raise ValueError("nobody foresaw this")
        return item, item**2, os.getpid()


def run(
    works: list[Squares], items: list[int]
) -> tuple[dict[int, int], dict[int, Exception], set[int]]:
    outcomes = list(run_on_devices(works, items, name=str))
    told = [outcome.result for outcome in outcomes if outcome.result is not None]
    lost = {o.item: o.error for o in outcomes if o.error is not None}
    return {item: square for item, square, _ in told}, lost, {pid for _, _, pid in told}


def test_all_items_are_done_by_other_processes() -> None:
    done, lost, by = run([Squares(), Squares()], list(range(12)))
    assert done == {n: n * n for n in range(12)}
    assert lost == {}
    assert os.getpid() not in by
    assert 1 <= len(by) <= 2


def test_what_a_work_raises_arrives_and_its_process_goes_on() -> None:
    done, lost, _ = run([Squares()], [1, -2, 13, 3])
    assert done == {1: 1, 3: 9}
    assert isinstance(lost[-2], ConfigError)
    assert (lost[-2].where, lost[-2].fix) == ("-2", "Give another.")
    assert "nobody foresaw this" in str(lost[13])


def test_a_process_that_dies_loses_its_item_and_the_others_do_the_rest() -> None:
    done, lost, _ = run([Squares(dies_at=(5,)), Squares(dies_at=(5,))], list(range(12)))
    assert set(done) == set(range(12)) - {5}
    assert isinstance(lost[5], WorkerDied)
    assert "killed by signal 9 (SIGKILL" in str(lost[5])


def test_with_nobody_left_the_first_item_that_was_not_begun_is_named() -> None:
    with pytest.raises(EngineError, match=r"3: all 1 processes died; this and what follows"):
        run([Squares(dies_at=(2,))], [1, 2, 3, 4])
