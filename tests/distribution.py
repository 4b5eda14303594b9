"""How tests are dealt to several processes: what takes long begins first, Slurm is started once.

Left to itself, pytest-xdist begins with the files of most tests; the few long ones then run last,
with idle cores beside them.
"""

from __future__ import annotations

import os
import re

from xdist.scheduler import LoadFileScheduling

# Each process that runs one of these trains the models of nnU-Net once more.
NNUNET = re.compile(r"test_(?:cache_teachers_)?nnunet(?:_axes|_parity)?\.py")
LONG_FIRST = (
    "tests/slurm/", "tests/website/", "tests/faults/", "tests/integration/", "tests/benchmarks/"
)  # fmt: skip
# What its files share is started or made once: a cluster that has the machine's cores, a process
# that has imported everything, finished runs.
TOGETHER = ("tests/slurm/", "tests/faults/", "tests/unit/review/report/")


class Dealt(LoadFileScheduling):
    """A file is one piece, and so is each of the folders above, and the files that share the
    models of nnU-Net, which take most of a minute to train."""

    def _split_scope(self, nodeid: str) -> str:
        return piece(nodeid)


def piece(nodeid: str) -> str:
    """What a test runs together with, in one process."""
    file = nodeid.split("::", 1)[0]
    if NNUNET.search(file):
        return "nnU-Net"
    return next((folder for folder in TOGETHER if file.startswith(folder)), file)


def rank(nodeid: str) -> int:
    """The lower, the earlier."""
    if NNUNET.search(nodeid):
        return 1
    found = [i for i, folder in enumerate(LONG_FIRST) if nodeid.startswith(folder)]
    return found[0] if found else len(LONG_FIRST)


def num_processes() -> int:
    """One more than there are cores: tests that wait for processes, or for Slurm, need none."""
    return len(os.sched_getaffinity(0)) + 1
