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
        self.seconds: dict[str, list[float]] = {}

    def add(self, kind: str, *, tried: int = 1, detected: int = 1, lost: int = 0) -> None:
        """Counts trials of one kind."""
        row = self.rows.setdefault(kind, Counter())
        row.update({"tried": tried, "detected": detected, "lost": lost})

    def took(self, kind: str, *seconds: float) -> None:
        """From a fault of this kind until work was further than before."""
        self.seconds.setdefault(kind, []).extend(round(one, 1) for one in seconds)

    def table(self) -> list[str]:
        """Markdown."""
        lines = [f"| fault | {' | '.join(COLUMNS)} |", "| --- | ---: | ---: | ---: |"]
        for kind, row in self.rows.items():
            lines.append(f"| {kind} | {' | '.join(str(row[column]) for column in COLUMNS)} |")
        return lines

    def times(self) -> list[str]:
        """Markdown; empty if nothing was measured."""
        rows = [
            f"| {kind} | {', '.join(f'{one:g}' for one in found)} |"
            for kind, found in self.seconds.items()
        ]
        return (
            ["| fault | seconds until work was further |", "| --- | ---: |", *rows] if rows else []
        )


LEDGER = Ledger()


def how_many(short: int, long: int) -> int:
    """The number of trials of this run."""
    return long if LONG else short
