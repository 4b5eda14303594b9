"""The commands that stand in pages: in fences, in indented blocks, between backticks."""

from __future__ import annotations

import re
import shlex
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

_FENCE = re.compile(r"^\s*```")
_CODE = re.compile(r"(?<!`)`([^`]+)`(?!`)")
_START = re.compile(r"^(?:\$ |[A-Z_]+=\S+ )*(?:pipeline|torchrun .*-m pipeline\.cli)(?= )")
_ASSIGNMENT = re.compile(r"^([A-Z]+)=\"([^\"]*)\"$")


@dataclass(frozen=True)
class CommandLine:
    """One command of a page.

    Attributes:
        page: its file's name.
        line: from 1.
        words: behind `pipeline`.
        whole: it can be typed as it stands; else it is mentioned between backticks.
    """

    page: str
    line: int
    words: tuple[str, ...]
    whole: bool


@dataclass(frozen=True)
class Block:
    """A fence of shell commands.

    Attributes:
        line: of its first command, from 1.
        text: all between the fences, as somebody would paste it.
    """

    line: int
    text: str

    @property
    def commands(self) -> list[tuple[str, ...]]:
        """The words behind each `pipeline`."""
        lines = self.text.replace("\\\n", " ").splitlines()
        return [_words(line.strip(), {}) for line in lines if _START.match(line.strip())]


def shell_blocks(page: Path) -> Iterator[Block]:
    """All ```sh fences of a page, in order."""
    lines = page.read_text(encoding="utf-8").splitlines()
    began: int | None = None
    for number, line in enumerate(lines, 1):
        if began is None and line.strip() == "```sh":
            began = number + 1
        elif began is not None and _FENCE.match(line):
            yield Block(began, textwrap.dedent("\n".join(lines[began - 1 : number - 1])) + "\n")
            began = None


def command_lines(page: Path) -> Iterator[CommandLine]:
    """All commands of a page, `\\` at the end of a line and variables of the page put in."""
    values: dict[str, str] = {}
    fenced, began, text = False, 0, ""
    for number, line in enumerate(page.read_text(encoding="utf-8").splitlines(), 1):
        if _FENCE.match(line):
            fenced = not fenced
        elif fenced or line.startswith("    "):
            began = began if text else number
            text += line.strip()
            if text.endswith("\\"):
                text = text[:-1]
                continue
            if found := _ASSIGNMENT.match(text):
                values[found[1]] = found[2]
            if _START.match(text):
                yield CommandLine(page.name, began, _words(text, values), whole=True)
            text = ""
        else:
            for code in _CODE.findall(line):
                if _START.match(code):
                    yield CommandLine(page.name, number, _words(code, values), whole=False)


def _words(text: str, values: dict[str, str]) -> tuple[str, ...]:
    for name, value in values.items():
        text = text.replace(f"${name}", value)
    words = shlex.split(_START.sub("", text), comments=True)
    ends = [n for n, word in enumerate(words) if word in ("&&", "||", "|", ";", ">", "&")]
    return tuple(words[: ends[0]] if ends else words)
