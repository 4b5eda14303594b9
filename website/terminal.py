"""What a person sees in a terminal: a command is run in a pseudo-terminal, and what it writes is
put on a screen as a terminal would."""

from __future__ import annotations

import codecs
import os
import pty
import re
import subprocess
import termios
from collections.abc import Mapping, Sequence
from pathlib import Path

# ECMA-48: a control sequence, or one character.
_TOKEN = re.compile(r"\x1b\[([?\d;]*)([A-Za-z])|(.)", re.DOTALL)
_ROWS = 50


class Screen:
    """A terminal without an end: cells of (style, character), row by row.

    It knows the control sequences that rich writes: colours, cursor up, erase a line, hide or show
    the cursor.
    """

    def __init__(self, columns: int) -> None:
        self._columns = columns
        self._rows: list[list[tuple[str, str]]] = [[]]
        self._row = self._column = 0
        self._style = ""

    def write(self, text: str) -> None:
        """Puts text on the screen.

        Raises:
            ValueError: a control sequence that is not known here.
        """
        for arguments, final, character in _TOKEN.findall(text):
            if character:
                self._put(character)
            else:
                self._control(arguments, final)

    def lines(self) -> list[str]:
        """Rows with their styles as control sequences; empty ones at the end are left out."""
        found = [_line(row) for row in self._rows]
        while found and not found[-1]:
            found.pop()
        return found

    def _put(self, character: str) -> None:
        if character == "\r":
            self._column = 0
        elif character == "\n":
            self._row += 1
            if self._row == len(self._rows):
                self._rows.append([])
        elif character.isprintable():
            if self._column == self._columns:
                self._put("\r")
                self._put("\n")
            row = self._rows[self._row]
            row += [("", " ")] * (self._column + 1 - len(row))
            row[self._column] = (self._style, character)
            self._column += 1
        else:
            raise ValueError(f"what does a terminal do with {character!r}?")

    def _control(self, arguments: str, final: str) -> None:
        if final == "m":
            self._style = "" if arguments in ("", "0") else self._style + f"\x1b[{arguments}m"
        elif final == "A":
            self._row = max(0, self._row - int(arguments or "1"))
        elif final == "K" and arguments == "2":
            self._rows[self._row] = []
        elif (arguments, final) not in (("?25", "l"), ("?25", "h")):
            raise ValueError(f"what does a terminal do with \\e[{arguments}{final}?")


def run(
    command: Sequence[str], folder: Path, columns: int, environment: Mapping[str, str]
) -> tuple[list[str], int]:
    """Runs a command as if a person sat before it.

    Args:
        command: program and arguments.
        folder: it is run there.
        columns: of the terminal.
        environment: of the command.

    Returns:
        What stands on the screen at the end, see `Screen.lines`, and the exit code.
    """
    ours, theirs = pty.openpty()
    termios.tcsetwinsize(theirs, (_ROWS, columns))
    with subprocess.Popen(
        command,
        cwd=folder,
        env=environment,
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        start_new_session=True,
    ) as process:
        os.close(theirs)
        screen = Screen(columns)
        decoder = codecs.getincrementaldecoder("utf-8")()
        rest = ""
        while data := _read(ours):
            rest += decoder.decode(data)
            # A control sequence may be cut in two.
            cut = rest.rfind("\x1b")
            whole = cut < 0 or re.match(r"\x1b\[[?\d;]*[A-Za-z]", rest[cut:]) is not None
            now, rest = (rest, "") if whole else (rest[:cut], rest[cut:])
            screen.write(now)
    os.close(ours)
    return screen.lines(), process.returncode


def _read(terminal: int) -> bytes:
    try:
        return os.read(terminal, 1 << 16)
    except OSError:  # Linux: the other end is closed
        return b""


def _line(row: Sequence[tuple[str, str]]) -> str:
    text, before = "", ""
    for style, character in row:
        if style != before:
            text += "\x1b[0m" + style
        text += character
        before = style
    return (text + "\x1b[0m" if before else text).rstrip()
