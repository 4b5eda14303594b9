"""A process that has imported everything and forks children, which may be killed at any moment.

Importing the stage takes seconds; forking takes milliseconds. The process holds one thread, so
that a fork copies all there is of it. Run as a module it answers one JSON line per line on its
standard input; `Nursery` is the other end.
"""

from __future__ import annotations

import gc
import importlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
PATIENCE_S = 120.0


@dataclass(frozen=True)
class Job:
    """A function of `tests.faults.jobs`, its arguments, and when its process is killed, if ever.

    Attributes:
        name: of the function.
        args: plain values.
        kill_after: seconds after the start; None lets it live.
    """

    name: str
    args: Mapping[str, Any]
    kill_after: float | None = None


@dataclass(frozen=True)
class Outcome:
    """How a child ended.

    Attributes:
        status: exit status, or minus the signal that ended it.
        seconds: it lived.
        result: what the function returned; None if it did not come to that.
        output: what it printed.
    """

    status: int
    seconds: float
    result: Any
    output: str

    @property
    def killed(self) -> bool:
        """Whether SIGKILL ended it."""
        return self.status == -signal.SIGKILL


class Nursery:
    """Starts the process on entering, ends it on leaving."""

    def __enter__(self) -> Nursery:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.faults.nursery"], cwd=ROOT, text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
            stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        )  # fmt: skip
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        at: TracebackType | None,
    ) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(timeout=PATIENCE_S)
        assert self._process.stdout is not None
        self._process.stdout.close()

    def warm(self, job: Job) -> None:
        """Runs a job that tells which modules it had imported; the parent then imports them too."""
        self._ask({"warm": vars(job)})

    def run(self, *jobs: Job) -> list[Outcome]:
        """Runs jobs at once, each in a child of its own, that all start at the same moment."""
        return [Outcome(**values) for values in self._ask({"jobs": [vars(job) for job in jobs]})]

    def _ask(self, question: Mapping[str, Any]) -> Any:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(question) + "\n")
        self._process.stdin.flush()
        return json.loads(self._process.stdout.readline())


def serve() -> None:
    """The process itself: until its standard input ends."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever is printed must not mix with the answers
    importlib.import_module("tests.faults.jobs")
    with tempfile.TemporaryDirectory() as folder:
        for line in sys.stdin:
            question = json.loads(line)
            if "warm" in question:
                (outcome,) = _run([Job(**question["warm"])], Path(folder))
                assert outcome["status"] == 0, outcome["output"]
                _import_all([name for name in outcome["result"] if name not in sys.modules])
                gc.freeze()
                answers.write("null\n")
            else:
                assert len(os.listdir("/proc/self/task")) == 1, "forking would lose a thread"
                jobs = [Job(**job) for job in question["jobs"]]
                answers.write(json.dumps(_run(jobs, Path(folder))) + "\n")
            answers.flush()


def _import_all(modules: list[str]) -> None:
    for name in modules:
        with suppress(Exception):
            importlib.import_module(name)


def _run(jobs: list[Job], folder: Path) -> list[dict[str, Any]]:
    gate, opener = os.pipe()
    pids = []
    for number, job in enumerate(jobs):
        pid = os.fork()
        if pid == 0:
            os.close(opener)
            os.read(gate, 1)
            _child(job, folder, number)
        pids.append(pid)
    os.close(opener)
    os.close(gate)
    began = time.monotonic()
    ended: dict[int, tuple[int, float]] = {}
    while len(ended) < len(jobs):
        passed = time.monotonic() - began
        for number, (job, pid) in enumerate(zip(jobs, pids, strict=True)):
            if number in ended:
                continue
            found, status = os.waitpid(pid, os.WNOHANG)
            if found:
                ended[number] = os.waitstatus_to_exitcode(status), passed
            elif passed > (PATIENCE_S if job.kill_after is None else job.kill_after):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.0005)
    return [_outcome(folder, number, *ended[number]) for number in range(len(jobs))]


def _child(job: Job, folder: Path, number: int) -> None:
    """Never returns."""
    status = 1
    try:
        handle = os.open(folder / f"output{number}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(handle, 1)
        os.dup2(handle, 2)
        function = getattr(importlib.import_module("tests.faults.jobs"), job.name)
        result = function(**job.args)
        (folder / f"result{number}").write_text(json.dumps(result))
        status = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def _outcome(folder: Path, number: int, status: int, seconds: float) -> dict[str, Any]:
    result, output = folder / f"result{number}", folder / f"output{number}"
    found = {
        "status": status,
        "seconds": seconds,
        "result": json.loads(result.read_text()) if status == 0 else None,
        "output": output.read_text(errors="replace") if output.exists() else "",
    }
    result.unlink(missing_ok=True)
    output.unlink(missing_ok=True)
    return found


if __name__ == "__main__":
    serve()
