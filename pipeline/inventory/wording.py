"""Sizes, ages and differences as people read them."""

from __future__ import annotations

import time
from calendar import timegm
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from pipeline.log import print_table


def megabytes(num_bytes: int) -> str:
    """A size."""
    for limit, unit in ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if num_bytes >= limit:
            return f"{num_bytes / limit:.1f} {unit}"
    return f"{num_bytes} B"


def counted(number: int, what: str) -> str:
    """`1 unit`, `2 units`."""
    return f"{number} {what}{'' if number == 1 else 's'}"


def seconds_since(written: str, *, now: float | None = None) -> float:
    """Age of a receipt by what it says; infinite if that is no time, negative if it is to come."""
    try:
        then = timegm(time.strptime(written, "%Y-%m-%dT%H:%M:%SZ"))
    except (TypeError, ValueError):
        return float("inf")
    return (time.time() if now is None else now) - then


def accepted_in_words(notes: Mapping[str, Any]) -> str:
    """What a receipt notes of a teacher that the admission gate would have stopped; else empty."""
    organs = [
        f"{organ}: Dice {entry['dice']:.3f}, asked for {entry['threshold']:g}"
        for organ, entry in notes.get("accepted", {}).items()
    ]
    return f", accepted below the gate ({'; '.join(organs)})" if organs else ""


def print_changes(title: str, arrow: str, changes: Iterable[tuple[str, Sequence[str]]]) -> None:
    """A table of `field: old -> new` lines, each once, with all that it holds for.

    Args:
        title: of the table.
        arrow: what stands on its two sides, as `there -> now`.
        changes: name of what changed, and its lines.
    """
    names: dict[str, list[str]] = {}
    for name, lines in changes:
        for line in lines:
            names.setdefault(line, []).append(name)
    if names:
        rows = [[*line.split(": ", 1), ", ".join(of)] for line, of in names.items()]
        print_table(title, ["input", arrow, "in"], rows)
