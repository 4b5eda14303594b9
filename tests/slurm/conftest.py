"""One Slurm for all tests of a session that want one."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.faults.small import cached_copy
from tests.slurm.cluster import Slurm, slurm_cluster, why_not
from tests.slurm.submitting import ENDS, submitted, use
from tests.tiny import copy_cohort


@pytest.fixture(scope="session")
def slurm() -> Iterator[Slurm]:
    """Two nodes of two cores and two stand-in GPUs each."""
    if reason := why_not():
        pytest.skip(f"no Slurm can be started: {reason}")
    with slurm_cluster() as found:
        yield found


@pytest.fixture(scope="session")
def undisturbed_student(
    slurm: Slurm, built_cache: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """The registry of a cohort whose student was trained on two nodes, and nobody disturbed it."""
    registry = copy_cohort(built_cache, tmp_path_factory.mktemp("slurm") / "undisturbed")
    with pytest.MonkeyPatch.context() as monkeypatch:
        use(slurm, monkeypatch)
        words = ["--device", "cpu"]
        job = submitted(registry, "train-student", train_student={"arguments": words})
        (student,) = job.values()
        assert slurm.wait(student, until=ENDS) == {student: "COMPLETED"}
    return registry


@pytest.fixture(scope="module")
def undisturbed(built: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the cohort that a module of tests has `built`, cached by this process alone."""
    return cached_copy(built, tmp_path_factory.mktemp("slurm") / "undisturbed")


@pytest.fixture
def cohort(built: Path, tmp_path: Path) -> Path:
    """A copy of it with nothing cached."""
    return copy_cohort(built, tmp_path / "cohort")
