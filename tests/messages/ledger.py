"""Which `PipelineError`s of the code base the tests have raised, and how they read.

Every instance that code in `pipeline/` or `stages/` makes in a test process is noted by the line
that made it. Errors of processes that tests start are not seen here.

RAISED=FILE adds the lines of this run to a file, so that several runs count as one.
"""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path
from typing import Any

from pipeline.errors import PipelineError

ROOT = Path(__file__).resolve().parents[2]
_OURS = tuple(f"{ROOT / folder}{os.sep}" for folder in ("pipeline", "stages"))

# What only the people who wrote the code say, and words for which design has another one.
JARGON = re.compile(
    r"\b(None|NoneType|KeyError|kwargs?|stdin|stderr|regex|pydantic|dataclass|iterable|callable|"
    r"traceback|errno|deserial\w+|instantiat\w+|subprocess|invalid|soft labels?|subjects?|"
    r"scans?|ndarray|boolean|bool|schema)\b|<\S+ object at|0x[0-9a-f]{6,}|\bstr\b|\bint\b"
)


class RaisedLedger:
    """Sites as (file, line), and texts that do not read well.

    Attributes:
        sites: where errors were made, file relative to the repository.
        complaints: what is wrong with which text, since the last look.
        verdict: how the sites differ from the list of those that no test raises; empty unless the
            whole suite has run.
    """

    def __init__(self) -> None:
        self.sites: set[tuple[str, int]] = set()
        self.complaints: list[str] = []
        self.verdict: list[str] = []

    def note(self, filename: str, line: int, error: PipelineError) -> None:
        """An error that was made at a line; only the code base counts."""
        if not filename.startswith(_OURS) or filename.endswith("pipeline/errors.py"):
            return
        file = Path(filename).relative_to(ROOT).as_posix()
        self.sites.add((file, line))
        self.complaints += [f"{file}:{line}: {text}" for text in complaints_about(error)]

    def install(self) -> None:
        """From here on every error that is made is noted."""
        plain = PipelineError.__init__
        ledger = self

        def noting(self: PipelineError, *args: Any, **kwargs: Any) -> None:
            plain(self, *args, **kwargs)
            caller = sys._getframe(1)
            ledger.note(caller.f_code.co_filename, caller.f_lineno, self)

        PipelineError.__init__ = noting  # type: ignore[method-assign]


def complaints_about(error: PipelineError) -> list[str]:
    """What a person would stumble over in the text of an error; none if it reads well."""
    found = []
    text = str(error)
    if not error.what.rstrip().endswith((".", "?", "!", ":")) and not error.what.endswith("`"):
        found.append(f"no sentence: {error.what!r}")
    if error.fix and error.fix.strip()[-1] not in ".?!`'\")":
        found.append(f"what to do is no sentence: {error.fix!r}")
    if "Traceback (most recent" in text:
        found.append("a traceback")
    if "  " in text.replace("\n  ", "\n") or ".." in error.what.replace("...", "")[-3:]:
        found.append(f"spaces or full stops that are doubled: {text!r}")
    if len(text) > 4000:
        found.append(f"{len(text)} characters")
    return found


RAISED = RaisedLedger()


def keep_with_earlier_runs(sites: set[tuple[str, int]]) -> set[tuple[str, int]]:
    """Adds to the file that RAISED names, if it names one; returns all that is in it."""
    if (name := os.environ.get("RAISED", "write")) == "write":
        return sites
    path = Path(name)
    before = path.read_text(encoding="utf-8").split() if path.exists() else []
    known = {(file, int(line)) for file, _, line in (text.rpartition(":") for text in before)}
    path.write_text("".join(f"{f}:{n}\n" for f, n in sorted(known | sites)), encoding="utf-8")
    return known | sites
