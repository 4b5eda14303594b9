from __future__ import annotations

from pathlib import Path

import pytest

from pipeline.cli.options import parse_size
from pipeline.errors import ConfigError
from pipeline.log import size
from pipeline.setup.needs import (
    LOG_ODDS,
    Cost,
    Space,
    on_disk,
    shortfall,
    space_of,
)

ROOMY = Space(
    free_bytes=10**12, free_inodes=10**6, block_bytes=4096, used_bytes=0, quota_bytes=None
)


def part(num_bytes: float, files: int = 0, folders: int = 0) -> Cost:
    found = Cost(units=1, files=files, folders=folders)
    found.num_bytes[LOG_ODDS] = num_bytes
    return found


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("2 TB", 2 * 10**12),
        ("500GB", 5 * 10**11),
        ("1.5TiB", round(1.5 * 2**40)),
        ("1e12", 10**12),
        ("1000", 1000),
        ("3k", 3000),
        (" 7 mb ", 7_000_000),
        ("12 B", 12),
    ],
)
def test_sizes_are_read(text: str, expected: int) -> None:
    assert parse_size(text, "--quota") == expected


@pytest.mark.parametrize("text", ["", "much", "-1 TB", "1 XB", "1 i", "2 TB or so"])
def test_what_is_no_size_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="2 TB") as caught:
        parse_size(text, "--quota")
    assert caught.value.exit_code == 2


@pytest.mark.parametrize(
    ("num_bytes", "text"),
    [(0, "0 B"), (999, "999 B"), (1000, "1 kB"), (12_345, "12.3 kB"), (999_600, "1 MB"),
     (83_100_000, "83.1 MB"), (2e12, "2 TB"), (1.5e18, "1500 PB")],
)  # fmt: skip
def test_sizes_are_written(num_bytes: float, text: str) -> None:
    assert size(num_bytes) == text


def test_enough_of_everything_is_no_problem() -> None:
    assert shortfall([part(10**9, 10, 10)], ROOMY) == ""


def test_too_few_bytes() -> None:
    tight = Space(**{**vars(ROOMY), "free_bytes": 10**9})
    assert "needs about 2 GB more, and 1 GB are free" in shortfall([part(2e9)], tight)
    assert shortfall([part(9e8)], tight) == ""
    assert shortfall([part(6e8), part(6e8)], tight)


def test_blocks_count_as_well_as_bytes() -> None:
    assert on_disk([part(1000, files=2, folders=3)], 4096) == 1000 + 4096 + 3 * 4096
    tight = Space(**{**vars(ROOMY), "free_bytes": 5000})
    assert shortfall([part(1000, files=2, folders=3)], tight)


def test_too_few_inodes() -> None:
    tight = Space(**{**vars(ROOMY), "free_inodes": 9})
    problem = shortfall([part(1, files=5, folders=5)], tight)
    assert "10 more files and folders" in problem
    assert shortfall([part(1, files=5, folders=4)], tight) == ""
    unlimited = Space(**{**vars(ROOMY), "free_inodes": None})
    assert shortfall([part(1, files=10**7)], unlimited) == ""


def test_the_quota_counts_what_is_there_already() -> None:
    quota = Space(**{**vars(ROOMY), "quota_bytes": 10**9, "used_bytes": 6 * 10**8})
    assert "quota of 1 GB" in shortfall([part(5e8)], quota)
    assert shortfall([part(3e8)], quota) == ""


def test_a_work_folder_that_is_not_there_yet_is_measured_where_it_will_be(tmp_path: Path) -> None:
    found = space_of(tmp_path / "not" / "yet", None)
    assert found.free_bytes > 0
    assert not (tmp_path / "not").exists()


def test_used_bytes_are_those_of_the_work_folder(tmp_path: Path) -> None:
    (tmp_path / "inner").mkdir()
    (tmp_path / "inner" / "file").write_bytes(b"x" * 1234)
    found = space_of(tmp_path, 10**6)
    assert 1234 <= found.used_bytes <= 1234 + found.block_bytes
    assert space_of(tmp_path, None).used_bytes == 0
