"""The small cohort, cached and not, and the nursery."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.faults.nursery import Job, Nursery
from tests.faults.small import build_small, cached_copy
from tests.tiny import copy_cohort


@pytest.fixture(scope="session")
def small_built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The one original, never to be changed."""
    return build_small(tmp_path_factory.mktemp("small") / "cohort")


@pytest.fixture(scope="session")
def undisturbed(small_built: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The original with a cache that nothing has disturbed; only to be read."""
    return cached_copy(small_built, tmp_path_factory.mktemp("small") / "undisturbed")


@pytest.fixture
def small(small_built: Path, tmp_path: Path) -> Path:
    """A copy with nothing cached."""
    return copy_cohort(small_built, tmp_path / "small")


@pytest.fixture
def small_cached(undisturbed: Path, tmp_path: Path) -> Path:
    """A copy with a filled cache."""
    return copy_cohort(undisturbed, tmp_path / "small")


@pytest.fixture(scope="session")
def nursery(small_built: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Nursery]:
    """Forks processes that may be killed."""
    registry = copy_cohort(small_built, tmp_path_factory.mktemp("small") / "warm")
    with Nursery() as found:
        found.warm(Job("modules", {"job": "cache", "registry": str(registry)}))
        yield found
