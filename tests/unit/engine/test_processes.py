"""Items shared out to processes: results, errors, and processes that are killed."""

from __future__ import annotations

import os
import signal
from functools import partial
from pathlib import Path

import pytest

from pipeline.engine.processes import in_processes
from pipeline.errors import ConfigError, WorkerDied


def square(item: int, dies_at: int | None = None, once: Path | None = None) -> int:
    if item == dies_at and (once is None or not once.exists()):
        if once is not None:
            once.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    if item < 0:
        raise ConfigError("negative", where=str(item), fix="Give another.")
    return item**2


@pytest.mark.parametrize("number", [0, 2])
def test_results_and_errors_come_in_the_order_of_items(number: int) -> None:
    told: list[str] = []
    made = in_processes(square, [3, -1, 2], number=number, name=str, advance=told.append)
    assert [made[0], made[2]] == [9, 4]
    assert isinstance(made[1], ConfigError)
    assert (made[1].where, made[1].fix) == ("-1", "Give another.")
    assert sorted(told) == ["-1", "2", "3"]


def test_nothing_to_do() -> None:
    assert in_processes(square, [], number=2, name=str, advance=print) == []


def test_a_process_that_dies_twice_costs_its_item_alone() -> None:
    told: list[str] = []
    work = partial(square, dies_at=2)
    made = in_processes(work, [1, 2, 3, 4], number=2, name=str, advance=told.append)
    assert [made[0], *made[2:]] == [1, 9, 16]
    assert isinstance(made[1], WorkerDied)
    assert str(made[1]).startswith("2: the process that worked on it was killed, twice. Most")
    assert sorted(told) == ["1", "2", "3", "4"]


def test_a_process_that_dies_once_costs_nothing(tmp_path: Path) -> None:
    work = partial(square, dies_at=2, once=tmp_path / "died")
    assert in_processes(work, [1, 2, 3], number=2, name=str, advance=print) == [1, 4, 9]
    assert (tmp_path / "died").exists()
