"""The file metrics.jsonl: one JSON object a line, in the order of the steps.

A line of a step: `step`, `loss`, `terms` (weighted, they sum to the loss), `lr`, `gradient_norm`.
A line of a validation: `step`, `validation_dice`. All of that is the same in every run with the
same settings, interrupted or not. What a clock measured stands under one further key, `timing`: in
lines of steps once per window of some steps (`steps`, `seconds`, `data_wait`,
`samples_per_second`), in lines of validations `seconds`.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any


def metric_lines(path: Path) -> Iterator[dict[str, Any]]:
    """Lines of a file one after the other, up to one that a kill cut short."""
    with path.open("rb") as file:
        for text in file:
            line = parsed(text)
            if line is None:
                return
            yield line


def without_timing(lines: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Lines as far as they are the same in every run with the same settings."""
    return [{key: value for key, value in line.items() if key != "timing"} for line in lines]


def append_lines(path: Path, lines: Iterable[Mapping[str, Any]]) -> None:
    """Appends, in one write."""
    text = "".join(json.dumps(line) + "\n" for line in lines)
    with path.open("a", encoding="utf-8") as file:
        file.write(text)


def sync(path: Path) -> None:
    """Returns when all that was appended is on the disk."""
    with path.open("rb") as file:
        os.fsync(file.fileno())


def kept_lines(path: Path, keep_until: int) -> Iterator[dict[str, Any]]:
    """Lines up to a step; once all are taken, the file ends with them.

    It is cut, not written anew: a kill costs no line that is kept, and one line at a time is in
    memory.
    """
    end, last = 0, b"\n"
    with path.open("rb") as file:
        for text in file:
            line = parsed(text)
            if line is None or line["step"] > keep_until:
                break
            end, last = end + len(text), text
            yield line
    if end < path.stat().st_size:
        os.truncate(path, end)
    if not last.endswith(b"\n"):
        append = path.open("ab")
        with append:
            append.write(b"\n")


def parsed(text: bytes) -> dict[str, Any] | None:
    """A line; None for one that a kill cut short, or that is none."""
    try:
        line = json.loads(text)
    except ValueError:
        return None
    return line if isinstance(line, dict) and isinstance(line.get("step"), int) else None
