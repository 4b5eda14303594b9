"""Which pages stand where in the site: the order is here, what there is comes from the files."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

# A page that does not exist is left out; one that is named nowhere comes under "More".
_SECTIONS: Mapping[str, tuple[str, ...]] = {
    "Begin": ("index.md", "quickstart.md", "from-nnunet.md", "info.md", "commands.md", "peers.md"),
    "Data and teachers": ("registry.md", "datasets.md", "check.md", "teachers.md"),
    "Stage one": ("planning.md", "admission.md", "cache.md", "inspect.md"),
    "Stage two": (
        "watching.md", "compare.md", "predict.md", "evaluate.md", "report.md", "export.md",
    ),
    "Clusters": ("cluster.md", "staging.md", "exactness.md"),
    "Method": ("method.md", "cache-format.md", "real-ct.md", "faults.md"),
    "Reference": (
        "reference/commands.md", "reference/registry.md", "reference/settings.md",
        "reference/files/*",
    ),
    "Help": ("troubleshooting.md",),
    "Project": ("architecture.md", "contributing.md", "changelog.md", "decisions/*"),
}  # fmt: skip
_TITLES: Mapping[str, str] = {"index.md": "Overview"}  # others: the heading of the page
# Folders that are a section of their own within a section.
_FOLDERS: Mapping[str, str] = {"decisions/": "Decisions", "reference/files/": "Annotated files"}


def navigation(pages: Collection[str]) -> list[dict[str, list[Any]]]:
    """Sections of the site with the pages that are there, each page in one of them.

    Args:
        pages: paths below docs/, as `decisions/0001-cache-is-the-only-door.md`.
    """
    left = sorted(pages)
    sections: dict[str, list[Any]] = {}
    for title, wanted in _SECTIONS.items():
        entries: list[Any] = []
        for name in wanted:
            folder = name.removesuffix("*")
            here = [p for p in left if p == name or (folder != name and p.startswith(folder))]
            left = [page for page in left if page not in here]
            entries += _entries(folder, here)
        if entries:
            sections[title] = entries
    if left:
        sections["More"] = left
    return [{title: entries} for title, entries in sections.items()]


def _entries(folder: str, here: list[str]) -> list[Any]:
    if folder in _FOLDERS and here:
        return [{_FOLDERS[folder]: sorted(here, key=lambda page: ("README" not in page, page))}]
    return [{_TITLES[page]: page} if page in _TITLES else page for page in here]
