"""Engines for tests, and what must hold of a cache that they filled."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pipeline.data.registry import load_registry
from pipeline.engine.choose import open_engine
from pipeline.engine.here import Engine
from pipeline.log import Log
from pipeline.review.status import status
from pipeline.review.verify import verify
from tests.faults.small import content, hidden
from tests.tiny import work_of

PATIENCE_S = 120.0


@contextmanager
def engine_on(executor: str, **options: Any) -> Iterator[Engine]:
    """As `--executor` opens it."""
    values = {"workers": None, "slurm_config": None, "device": "cpu", "work": Path("/nowhere")}
    with open_engine(executor, log=Log(), **(values | options)) as engine:
        yield engine


def assert_whole(registry: Path, undisturbed: Path) -> None:
    """Nothing is damaged, missing, left over, or other than in an undisturbed run."""
    found = verify(work_of(registry), None, deep=True, everything=True, log=Log(quiet=True))
    assert found.findings == []
    assert cached(registry) == cached(undisturbed)
    assert hidden(work_of(registry)) == []
    states = status(load_registry(registry), work_of(registry)).units
    assert set(states.values()) == {"done"}


def cached(registry: Path) -> dict[str, str]:
    """File -> what it holds, without what jobs and parts tell of themselves."""
    found = content(work_of(registry))
    return {n: text for n, text in found.items() if not n.startswith(("events.", "logs/", "jobs/"))}


def num_units(registry: Path) -> int:
    """Units of teachers."""
    return len(list(work_of(registry).glob("teachers/*/*/*.zarr")))


def wait_until(condition: Callable[[], bool]) -> None:
    """Looks ten times a second."""
    deadline = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < deadline, "it did not come to pass"
        time.sleep(0.1)
