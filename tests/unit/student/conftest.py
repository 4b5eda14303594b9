"""Coded cases, written once."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipeline.cache.reader import CachedCase
from tests.unit.student.coded import write_case


@pytest.fixture(scope="session")
def coded_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("coded")


@pytest.fixture(scope="session")
def coded_cases(coded_folder: Path) -> list[CachedCase]:
    return [
        write_case(coded_folder, "liver-ct/a"),
        write_case(coded_folder, "liver-ct/b", shape=(16, 12, 14)),
        write_case(coded_folder, "spleen-ct/c", annotated=("spleen",)),
        write_case(coded_folder, "spleen-ct/d", annotated=("spleen",)),
        write_case(coded_folder, "spleen-ct/e", annotated=("spleen",)),
    ]


@pytest.fixture(scope="session")
def coded_case(coded_cases: list[CachedCase]) -> CachedCase:
    return coded_cases[0]
