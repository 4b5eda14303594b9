"""How often each fault was tried, how often it was noticed, and what was lost; and how long to try.

The environment variable FAULTS=long asks for the long versions (`make faults`).
"""

from __future__ import annotations

import os
from collections import Counter
from typing import Final

LONG: Final = os.environ.get("FAULTS") == "long"
COLUMNS: Final = ("tried", "detected", "lost")


class Ledger:
    """Counts per kind of fault; lost means a wrong number, a lost unit or a nameless error."""

    def __init__(self) -> None:
        self.rows: dict[str, Counter[str]] = {}

    def add(self, kind: str, *, tried: int = 1, detected: int = 1, lost: int = 0) -> None:
        """Counts trials of one kind."""
        row = self.rows.setdefault(kind, Counter())
        row.update({"tried": tried, "detected": detected, "lost": lost})

    def table(self) -> list[str]:
        """Markdown."""
        lines = [f"| fault | {' | '.join(COLUMNS)} |", "| --- | ---: | ---: | ---: |"]
        for kind, row in self.rows.items():
            lines.append(f"| {kind} | {' | '.join(str(row[column]) for column in COLUMNS)} |")
        return lines


LEDGER = Ledger()


def how_many(short: int, long: int) -> int:
    """The number of trials of this run."""
    return long if LONG else short
