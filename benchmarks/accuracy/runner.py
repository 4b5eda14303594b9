"""Runs jobs as processes, a few at a time, and ends them when it is told to end."""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from pipeline.errors import PipelineError
from pipeline.log import Log

POLL_SECONDS = 0.5
SECONDS_TO_END = 60.0  # a training writes its checkpoint first
STOPPED = 130  # the exit code after a signal


@dataclass(frozen=True)
class Task:
    """A process to run: its name, its arguments after `python`, and the file that it logs to."""

    name: str
    arguments: Sequence[str]
    log: Path


class StoppedBySignal(Exception):
    """SIGTERM or SIGINT came; all processes have ended."""


def exit_code_of(
    run: Callable[[argparse.Namespace, Log], int], arguments: argparse.Namespace
) -> int:
    """Of a bench: what it returns, that of an error, 130 after a signal; both are told."""
    log = Log()
    try:
        return run(arguments, log)
    except StoppedBySignal:
        log.warn("stopped; the same command goes on from there")
        return STOPPED
    except PipelineError as error:
        log.warn(str(error))
        return error.exit_code


@dataclass
class _Running:
    task: Task
    process: subprocess.Popen[bytes]
    file: IO[bytes]


def run_tasks(
    tasks: Sequence[Task], num: int, *, log: Log, tick: Callable[[], None]
) -> dict[str, str]:
    """Runs all tasks, `num` at a time; one that fails leaves the others.

    Args:
        tasks: in the order in which they start.
        num: at the same time.
        log: hears of every end.
        tick: called about twice a second.

    Returns:
        Task -> why it failed; those that did not are absent.

    Raises:
        StoppedBySignal: after the processes have been told to end, and have ended.
    """
    waiting = list(tasks)
    running: list[_Running] = []
    failed: dict[str, str] = {}
    with _signals() as stopping:
        try:
            while (waiting or running) and not stopping():
                while waiting and len(running) < num:
                    running.append(_start(waiting.pop(0)))
                time.sleep(POLL_SECONDS)
                for one in [r for r in running if r.process.poll() is not None]:
                    running.remove(one)
                    one.file.close()
                    code = one.process.returncode
                    if code:
                        failed[one.task.name] = f"exit code {code}, see {one.task.log}"
                        log.warn(f"{one.task.name} failed ({failed[one.task.name]})")
                    else:
                        log.info(f"{one.task.name} is done")
                tick()
        finally:
            _end(running)
        if stopping():
            raise StoppedBySignal
    return failed


def _start(task: Task) -> _Running:
    task.log.parent.mkdir(parents=True, exist_ok=True)
    file = task.log.open("ab")
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    # A session of its own: a Ctrl-C reaches this process alone, which tells the others.
    process = subprocess.Popen(
        [sys.executable, *task.arguments],
        stdin=subprocess.DEVNULL, stdout=file, stderr=subprocess.STDOUT,
        env=environment, start_new_session=True,
    )  # fmt: skip
    return _Running(task, process, file)


def _end(running: Sequence[_Running]) -> None:
    for one in running:
        one.process.terminate()
    until = time.monotonic() + SECONDS_TO_END
    for one in running:
        try:
            one.process.wait(max(0.1, until - time.monotonic()))
        except subprocess.TimeoutExpired:
            one.process.kill()
            one.process.wait()
        one.file.close()


@contextmanager
def _signals() -> Iterator[Callable[[], bool]]:
    caught: list[int] = []

    def catch(number: int, _: Any) -> None:
        caught.append(number)

    before = {name: signal.signal(name, catch) for name in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield lambda: bool(caught)
    finally:
        for name, handler in before.items():
            signal.signal(name, handler)
