"""What killed writers left: temporaries on a disk, copies without a receipt in an object store."""

from __future__ import annotations

from pathlib import Path

from pipeline.cache.objects import copies_without_receipt
from pipeline.cache.places import CASES, TEACHERS, place_of
from pipeline.folder import (
    Folder,
    ages,
    folders_below,
    is_local,
    local_temporaries,
    remove,
    written_by_dead,
)

# No unit takes a day to upload: whoever wrote such a copy, on whatever host, is gone.
_OLD_SECONDS = 24 * 3600.0


def clean_temporaries(folder: Folder) -> int:
    """Removes `dead_temporaries`; returns how many."""
    found = dead_temporaries(folder)
    for path in found:
        remove(path)
    return len(found)


def dead_temporaries(folder: Folder) -> list[Folder]:
    """What writers of this host left that no longer live.

    A temporary of another host, or of a living process, is none of them. In an object store,
    whose writers come and go with their hosts, so is every copy older than a day that no receipt
    names.
    """
    if is_local(folder):
        return list(_dead_on_disk(folder))
    return [*_dead_on_disk(local_temporaries()), *_dead_copies(folder)]


def _dead_on_disk(folder: Path) -> list[Path]:
    found = []
    for root, folders, files in folders_below(folder):
        names = [name for name in (*folders, *files) if _is_temporary(name)]
        found += [root / name for name in names if written_by_dead(name)]
        # Nothing is written inside a unit, and what is temporary goes whole.
        folders[:] = [f for f in folders if not _is_temporary(f) and not f.endswith(".zarr")]
    return sorted(found)


def _is_temporary(name: str) -> bool:
    return name.startswith(".") and name.endswith(".tmp")


def _dead_copies(folder: Folder) -> list[Folder]:
    units: dict[str, dict[str, float]] = {}
    for kind in (CASES, TEACHERS):
        for name, age in ages(folder / kind).items():
            head, separator, rest = name.partition(".zarr/")
            if separator:
                units.setdefault(f"{kind}/{head}.zarr", {})[rest] = age
    found: list[Folder] = []
    for unit, objects in sorted(units.items()):
        path = folder / unit
        if is_local(path) or place_of(path) is None:
            continue
        for copy in copies_without_receipt(path, objects):
            youngest = min(age for name, age in objects.items() if name.startswith(f"{copy}/"))
            if written_by_dead(copy) or youngest > _OLD_SECONDS:
                found.append(path / copy)
    return found
