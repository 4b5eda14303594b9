"""How tests are dealt to several processes: what takes long begins first, Slurm is started once.

Left to itself, pytest-xdist begins with the files of most tests; the few long ones then run last,
with idle cores beside them.
"""

from __future__ import annotations

import os

from xdist.scheduler import LoadFileScheduling

LONG_FIRST = ("tests/slurm/", "tests/faults/", "tests/integration/", "tests/benchmarks/")


class Dealt(LoadFileScheduling):
    """A file is one piece, and so is all of `tests/slurm`: its cluster has the machine's cores."""

    def _split_scope(self, nodeid: str) -> str:
        return piece(nodeid)


def piece(nodeid: str) -> str:
    """What a test runs together with, in one process."""
    return LONG_FIRST[0] if nodeid.startswith(LONG_FIRST[0]) else nodeid.split("::", 1)[0]


def rank(nodeid: str) -> int:
    """The lower, the earlier."""
    found = [i for i, folder in enumerate(LONG_FIRST) if nodeid.startswith(folder)]
    return found[0] if found else len(LONG_FIRST)


def num_processes() -> int:
    """One more than there are cores: tests that wait for processes, or for Slurm, need none."""
    return len(os.sched_getaffinity(0)) + 1
