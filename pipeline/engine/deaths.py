"""How a worker died: what the nanny beside it can tell, in words."""

from __future__ import annotations

import os
import signal
import socket
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from distributed.diagnostics.plugin import NannyPlugin
from tornado.ioloop import PeriodicCallback

TOPIC = "organ-distill: a worker's process ended"
_LOOK_EVERY_MS = 1000


class TellOfDeaths(NannyPlugin):  # type: ignore[misc]
    """Every nanny, also of workers that join later, tells the scheduler how its worker's process
    ended and how much memory it held at the most. Without a nanny nobody can tell."""

    name = "organ-distill-deaths"

    def setup(self, nanny: Any) -> None:
        """Listens to what the nanny learns anyway; a nanny that is made otherwise tells nothing."""
        peak = _Peak(nanny)
        told = nanny._on_worker_exit_sync

        def on_exit(exit_code: int) -> None:
            address = peak.address
            nanny.log_event(
                TOPIC,
                {
                    "worker": address,
                    "host": socket.gethostname(),
                    "pid": peak.pid,
                    "exit_code": exit_code,
                    "peak_bytes": peak.num_bytes,
                },
            )
            told(exit_code)

        self._told = told
        self._listen(nanny, on_exit)
        self._periodic = PeriodicCallback(peak.look, _LOOK_EVERY_MS)
        self._periodic.start()

    def teardown(self, nanny: Any) -> None:
        """Stops looking and listening: the next run brings a plugin of its own."""
        self._periodic.stop()
        self._listen(nanny, self._told)

    def _listen(self, nanny: Any, on_exit: Callable[[int], None]) -> None:
        nanny._on_worker_exit_sync = on_exit
        if nanny.process is not None:
            nanny.process.on_exit = on_exit


class _Peak:
    """The most memory that the process of a nanny's worker was seen to hold."""

    def __init__(self, nanny: Any) -> None:
        self._nanny = nanny
        self.address: str | None = None
        self.pid: int | None = None
        self.num_bytes: int | None = None
        self.look()

    def look(self) -> None:
        pid = self._nanny.pid
        if pid is None:
            return
        if pid != self.pid:
            self.pid, self.num_bytes = pid, None
        self.address = self._nanny.worker_address or self.address
        self.num_bytes = peak_bytes(pid) or self.num_bytes


def peak_bytes(pid: int) -> int | None:
    """The most resident memory that a living process ever held; None where nobody says."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
        (found,) = (line.split()[1] for line in lines if line.startswith("VmHWM:"))
        return int(found) * 1024
    except (OSError, ValueError):
        return None


def in_words(worker: str, told: Mapping[str, Any] | None, last: Mapping[str, Any] | None) -> str:
    """What is known of a worker's end.

    Args:
        worker: its address.
        told: by its nanny; None: nothing came.
        last: its last heartbeat, as the scheduler had it.
    """
    if told is None:
        memory = (last or {}).get("metrics", {}).get("memory")
        held = "" if not memory else f" At its last heartbeat it held {_size(memory)}."
        return (
            f"worker {worker} went without a word: no nanny, or its job or node ended with it, so "
            f"nobody knows the exit code.{held}"
        )
    code, peak = told["exit_code"], told["peak_bytes"]
    held = "" if not peak else f", having held {_size(peak)} of memory at the most"
    who = f"worker {worker} (host {told['host']}, pid {told['pid']})"
    if code >= 0:
        return f"{who} exited with status {code}{held}."
    return f"{who} was killed by signal {-code} ({_signal_name(-code)}){held}."


def left_on_purpose(told: Mapping[str, Any] | None) -> bool:
    """Whether a worker's process ended well: it was retired, or its job asked it to go."""
    return told is not None and told["exit_code"] in (0, -signal.SIGTERM)


def _signal_name(number: int) -> str:
    try:
        name = signal.Signals(number).name
    except ValueError:
        return "unknown"
    hint = ", which the system also sends when memory runs out" if name == "SIGKILL" else ""
    return f"{name}{hint}"


def _size(num_bytes: float) -> str:
    return f"{num_bytes / 1e9:.2f} GB"


def allowed_threads() -> int | None:
    """Cores that this worker was given; None where nobody said so."""
    given = os.environ.get("ORGAN_DISTILL_THREADS") or os.environ.get("SLURM_CPUS_PER_TASK")
    return int(given) if given else None
