"""Where units are: the paths of a work folder taken apart, all that lies in it, and what killed
writers left.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from pipeline.cache.store import copies_without_receipt
from pipeline.folder import (
    Folder,
    ages,
    folders_below,
    is_local,
    local_temporaries,
    matching,
    remove,
    sizes,
    written_by_dead,
)

_UNIT = re.compile(r"(?P<case>.+)@(?P<tag>[0-9a-f]{16})\.zarr")
_TEACHER = re.compile(r"(?P<teacher>.+)@(?P<tag>[0-9a-f]{16})")
CASES = "cases"
TEACHERS = "teachers"


@dataclass(frozen=True)
class Place:
    """The place of a unit, by its path alone: something may be wrong with what is there.

    Attributes:
        teacher: None for a case unit.
        teacher_tag: first 16 digits of the teacher's digest; empty for a case unit.
        tag: first 16 digits of the case's digest, in a teacher unit of the image's SHA-256.
    """

    path: Folder
    dataset: str
    case: str
    teacher: str | None
    teacher_tag: str
    tag: str

    @property
    def case_name(self) -> str:
        """`dataset/case`."""
        return f"{self.dataset}/{self.case}"

    @property
    def name(self) -> str:
        """`dataset/case`, or `teacher x dataset/case`: as messages name it."""
        return self.case_name if self.teacher is None else f"{self.teacher} x {self.case_name}"


def place_of(path: Folder) -> Place | None:
    """Takes the path of a unit apart; None if it is not laid out as one."""
    unit = _UNIT.fullmatch(path.name)
    if unit is None or path.name.startswith("."):
        return None
    dataset, above = path.parent.name, path.parent.parent
    if above.name == CASES:
        return Place(path, dataset, unit["case"], None, "", unit["tag"])
    teacher = _TEACHER.fullmatch(above.name)
    if teacher is None or above.parent.name != TEACHERS:
        return None
    return Place(path, dataset, unit["case"], teacher["teacher"], teacher["tag"], unit["tag"])


def unit_name(path: Folder) -> str:
    """A unit's name by its path, for messages."""
    place = place_of(path)
    return path.name if place is None else place.name


def find_units(work: Folder, *, dataset: str = "*", case: str = "*") -> list[Place]:
    """All that is laid out as a unit in a work folder, cases first, in order of path; of a dataset
    or a case only, if one is given."""
    found = []
    for pattern in (f"{CASES}/*/*.zarr", f"{TEACHERS}/*/*/*.zarr"):
        places = (place_of(path) for path in matching(work, pattern))
        found += [
            place
            for place in places
            if place is not None and dataset in ("*", place.dataset) and case in ("*", place.case)
        ]
    return found


def unit_bytes(path: Folder) -> int:
    """What a unit, or a file, takes on disk, whatever its receipt says."""
    if is_local(path) and path.is_file():
        return path.stat().st_size
    return sum(sizes(path).values())


# What killed writers left: temporaries on a disk, copies without a receipt in an object store.

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
