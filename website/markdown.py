"""Markdown of generated pages."""

from __future__ import annotations

from collections.abc import Sequence


def cell(text: str) -> str:
    """Text that may stand in a table: on one line, with no bar and no tag of its own."""
    parts = " ".join(text.split()).split("`")
    for number in range(0, len(parts), 2):  # what stands between backticks is shown as it is
        parts[number] = parts[number].replace("<", "&lt;").replace("*", "\\*")
    return "`".join(parts).replace("|", "\\|")


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table of cells, with an empty line behind it."""
    lines = [header, ["---"] * len(header), *rows]
    return "".join("| " + " | ".join(line) + " |\n" for line in lines)
