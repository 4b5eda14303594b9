"""Links out of docs/ into the repository: as they work on a code host, so they work in the site."""

from __future__ import annotations

import posixpath
import re
from collections.abc import Callable, Mapping
from pathlib import Path

# Markdown's [words](target#part); no image is outside docs/.
_LINK = re.compile(r"(?<=\]\()(?![a-z]+:|#|/)([^)\s#]*)(#[^)\s]*)?(?=\))")
_FENCE = re.compile(r"^\s*(```|~~~)")

# Files of the repository that are pages of the site.
PAGES: Mapping[str, str] = {
    "CHANGELOG.md": "changelog.md",
    "CONTRIBUTING.md": "contributing.md",
    "README.md": "index.md",
    "data_registry.yaml": "reference/files/data_registry.md",
}


def page_of(path: str) -> str:
    """Where a file of the repository is in the site, relative to docs/; empty: nowhere."""
    if path.startswith("docs/"):
        return path.removeprefix("docs/")
    if path.startswith("stages/") and path.endswith(".yaml"):
        return f"reference/files/{Path(path).stem}.md"
    return PAGES.get(path, "")


def relinked(text: str, source: str, page: str) -> str:
    """A page's Markdown with links that hold in the site.

    Args:
        text: as it stands in the repository.
        source: its file, relative to the repository.
        page: its place in the site, relative to docs/.
    """

    def moved(target: str) -> str:
        path = posixpath.normpath(posixpath.join(posixpath.dirname(source), target))
        there = page_of(path)
        return posixpath.relpath(there, posixpath.dirname(page) or ".") if there else target

    return _each_link(text, moved)


def _each_link(text: str, change: Callable[[str], str]) -> str:
    lines, fenced = [], False
    for line in text.split("\n"):
        if _FENCE.match(line):
            fenced = not fenced
        elif not fenced:
            line = _LINK.sub(lambda m: (change(m[1]) if m[1] else "") + (m[2] or ""), line)
        lines.append(line)
    return "\n".join(lines)
