"""The reader of pages: what it would not let pass."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.website.reader import Change, Reader, Shell

PROGRAM = """#!{python} -IS
import json, sys
words = sys.argv[1:]
with open({calls!r}, "a") as log:
    log.write(json.dumps({{"arguments": words, "code": 0, "seconds": 0}}) + "\\n")
print("said", *words)
sys.exit(3 if "fail" in words else 0)
"""


@pytest.fixture
def reader(tmp_path: Path) -> Callable[..., Reader]:
    """Makes a reader of some text; `pipeline` only tells what it was asked."""
    calls = tmp_path / "calls"
    program = tmp_path / "pipeline"
    program.write_text(PROGRAM.format(python=sys.executable, calls=str(calls)))
    program.chmod(0o755)

    def make(*blocks: str, changes: tuple[Change, ...] = ()) -> Reader:
        page = tmp_path / "page.md"
        page.write_text("".join(f"words\n\n```sh\n{text}\n```\n" for text in blocks))
        return Reader(page, tmp_path, Shell(tmp_path, calls), changes)

    return make


def test_a_command_that_fails_is_told_with_page_line_and_output(
    reader: Callable[..., Reader],
) -> None:
    typed = reader("pipeline good", "pipeline fail\npipeline never")
    typed.type_next()
    with pytest.raises(AssertionError, match=r"exit code 3 of page\.md:9\n(.*\n)*said fail"):
        typed.type_next()


def test_a_block_that_nobody_types_is_told(reader: Callable[..., Reader]) -> None:
    with (
        pytest.raises(AssertionError, match=r"nobody typed what stands at page\.md:9"),
        reader("pipeline one", "pipeline two") as typed,
    ):
        typed.type_next()


def test_a_command_that_the_shell_passed_by_is_told(reader: Callable[..., Reader]) -> None:
    with pytest.raises(AssertionError, match="passed"):
        reader(
            "false && \\\npipeline one || true\nif false; then\n  pipeline passed\nfi"
        ).type_next()


@pytest.mark.parametrize(("old", "times"), [("pipeline oen", 0), ("pipeline", 2)])
def test_a_change_that_does_not_fit_is_told(
    reader: Callable[..., Reader], old: str, times: int
) -> None:
    with pytest.raises(AssertionError, match=f"stands {times} times"):
        reader("pipeline one", "pipeline two", changes=(Change(old, "", "why"),))
