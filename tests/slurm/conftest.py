"""One Slurm for all tests of a session that want one."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.slurm.cluster import Slurm, slurm_cluster, why_not


@pytest.fixture(scope="session")
def slurm() -> Iterator[Slurm]:
    """Two nodes of two cores and two stand-in GPUs each."""
    if reason := why_not():
        pytest.skip(f"no Slurm can be started: {reason}")
    with slurm_cluster() as found:
        yield found
