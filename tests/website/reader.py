"""Somebody who types what a page shows: block after block, in one folder, in a real shell."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from tests.website.command_lines import Block, shell_blocks
from tests.website.warm_pipeline import CLIENT

ROOT = Path(__file__).resolve().parents[2]
_ASSIGNMENT = re.compile(r"^(?:export )?[A-Z_]+=.*$", re.MULTILINE)
_PATIENCE_S = 1500


@dataclass(frozen=True)
class Change:
    """Something that is not typed as the page shows it.

    Attributes:
        old: as it stands, once, in a shell block of the page.
        new: what is typed instead; "" if nothing is.
        why: the reason.
        tested: for what is not typed: a test that executes the like, and a word in it.
    """

    old: str
    new: str
    why: str
    tested: tuple[str, str] | None = None


class Shell:
    """bash, in which `pipeline` starts at once."""

    def __init__(self, programs: Path, calls: Path) -> None:
        self.programs = programs
        self._calls = calls

    def calls(self) -> list[dict[str, Any]]:
        """Each call of `pipeline` so far: arguments, exit code, seconds."""
        if not self._calls.exists():
            return []
        return [json.loads(line) for line in self._calls.read_text("utf-8").splitlines()]

    def run(self, script: str, folder: Path) -> subprocess.CompletedProcess[str]:
        """Types it; the first command that fails ends it."""
        environment = os.environ | {
            "PATH": f"{self.programs}:{Path(sys.executable).parent}:{os.environ['PATH']}",
            "PYTHONPATH": str(ROOT),
            "OMP_NUM_THREADS": "1",
            "COLUMNS": "200",  # or tables break words that a page quotes
        }
        return subprocess.run(
            ["bash", "--norc", "-euo", "pipefail", "-c", script],
            cwd=folder, env=environment, stdin=subprocess.DEVNULL,
            capture_output=True, text=True, check=False, timeout=_PATIENCE_S,
        )  # fmt: skip


@contextmanager
def warm_shell() -> Iterator[Shell]:
    """A shell, and the process behind its `pipeline`."""
    with tempfile.TemporaryDirectory(prefix="shell-") as name:
        folder, address = Path(name), f"{name}/socket"
        program = folder / "pipeline"
        program.write_text(CLIENT.format(python=sys.executable, address=address))
        program.chmod(0o755)
        command = [sys.executable, "-m", "tests.website.warm_pipeline", address]
        server = subprocess.Popen(
            [*command, str(folder / "calls.jsonl")],
            cwd=ROOT, stdin=subprocess.DEVNULL, start_new_session=True,
            stdout=subprocess.DEVNULL,
            env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "PYTHONUTF8": "1"},
        )  # fmt: skip
        try:
            while not Path(address).exists():
                assert server.poll() is None, "the process behind `pipeline` ended"
                time.sleep(0.05)
            yield Shell(folder, folder / "calls.jsonl")
        finally:
            # With it go the children of a command that was given up.
            os.killpg(server.pid, signal.SIGKILL)
            server.wait()


class Reader:
    """Types the shell blocks of a page, all of them, with its changes."""

    def __init__(
        self, page: Path, folder: Path, shell: Shell, changes: Sequence[Change] = ()
    ) -> None:
        self.page, self.folder, self.shell = page, folder, shell
        self._waiting = changed(page, changes)
        self._variables: list[str] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *rest: TracebackType | object) -> None:
        if kind is None:
            left = [f"{self.page.name}:{block.line}" for block in self._waiting]
            assert not left, f"nobody typed what stands at {', '.join(left)}"

    def type_next(self, *, code: int = 0) -> str:
        """Types the next block.

        Args:
            code: what its last command ends with.

        Returns:
            What it printed, standard error behind standard output.
        """
        block = self._waiting.pop(0)
        before = len(self.shell.calls())
        done = self.shell.run("\n".join([*self._variables, block.text]), self.folder)
        self._variables += _ASSIGNMENT.findall(block.text)
        said = f"{self.page.name}:{block.line}\n{block.text}\n{done.stdout}\n{done.stderr}"
        assert done.returncode == code, f"exit code {done.returncode} of {said}"
        calls = self.shell.calls()[before:]
        # The shell has put in variables and patterns, so that only the first words can be compared.
        typed = [words[0] for words in block.commands]
        assert [call["arguments"][0] for call in calls] == typed, said
        return done.stdout + done.stderr

    def type_rest(self) -> str:
        """Types all that is left."""
        return "".join(self.type_next() for _ in range(len(self._waiting)))


def changed(page: Path, changes: Sequence[Change]) -> list[Block]:
    """The blocks as they are typed. Those with nothing but comments are left out."""
    blocks = list(shell_blocks(page))
    for change in changes:
        number = sum(block.text.count(change.old) for block in blocks)
        assert number == 1, f"{page.name}: {change.old!r} stands {number} times in its shell blocks"
        blocks = [
            replace(block, text=block.text.replace(change.old, change.new)) for block in blocks
        ]
    return [b for b in blocks if re.search(r"^[ \t]*[^#\s]", b.text, re.MULTILINE)]
