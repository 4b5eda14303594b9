"""Pictures of the command line: a terminal's screen, and what of it comes into docs/images."""

from __future__ import annotations

import os
import re
from html import unescape
from pathlib import Path

import pytest
from rich.text import Text

from website.screens import IMAGES, ROOT, SCREENS, Shown, draw
from website.terminal import Screen, run


def test_a_screen_shows_what_was_written_last() -> None:
    screen = Screen(10)
    screen.write("\x1b[?25lold line\r\x1b[2Knew\x1b[31m red\x1b[0m.\r\n")
    screen.write("below\r\n\x1b[2A\x1b[2K\x1b[1mtop\x1b[0m")
    screen.write("\r\n\n0123456789ab\n\n")
    lines = screen.lines()
    assert [Text.from_ansi(line).plain for line in lines] == ["top", "below", "0123456789", "ab"]
    (span,) = Text.from_ansi(lines[0]).spans
    assert (span.start, span.end, str(span.style)) == (0, 3, "bold")
    with pytest.raises(ValueError, match="5J"):
        screen.write("\x1b[5J")


def test_a_command_believes_that_somebody_watches(tmp_path: Path) -> None:
    command = "test -t 1 && stty size && pwd && printf 'a\\033[32mb\\033[0m\\n' >&2; exit 3"
    lines, code = run(["sh", "-c", command], tmp_path, 77, dict(os.environ))
    assert (lines, code) == (["50 77", str(tmp_path), "a\x1b[0m\x1b[32mb\x1b[0m"], 3)


def test_a_picture_fetches_nothing_and_begins_where_it_should() -> None:
    shown = Shown("pipeline this \\\n  that", since="second")
    text = draw("this", shown, ["first", "\x1b[32msecond\x1b[0m"])
    assert "url(#" in text
    assert not re.findall(r"url\((?!#)|href=|@import|@font-face", text)
    said = re.findall(r">([^<>]+)</text>", text)
    assert [unescape(line).replace("\xa0", " ") for line in said if line.strip()] == [
        "pipeline this", "$ pipeline this \\", ">   that", "[..]", "second",
    ]  # fmt: skip


@pytest.mark.parametrize("name", SCREENS)
def test_each_is_in_the_docs_and_small(name: str) -> None:
    path = IMAGES / f"screen-{name}.svg"
    assert 2_000 < path.stat().st_size < 150_000
    pages = [page.read_text(encoding="utf-8") for page in (ROOT / "docs").glob("*.md")]
    alt = [re.search(rf"!\[([^]]+)\]\(images/{path.name}\)", page) for page in pages]
    assert any(alt)
