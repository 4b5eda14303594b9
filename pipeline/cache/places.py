"""Where units are: the paths of a work folder taken apart, and all that lies in it."""

from __future__ import annotations

import re
from dataclasses import dataclass

from pipeline.folder import Folder, is_local, matching, sizes

_UNIT = re.compile(r"(?P<case>.+)@(?P<tag>[0-9a-f]{16})\.zarr")
_TEACHER = re.compile(r"(?P<teacher>.+)@(?P<tag>[0-9a-f]{16})")
CASES = "cases"
TEACHERS = "teachers"


@dataclass(frozen=True)
class Place:
    """The place of a unit, by its path alone: something may be wrong with what is there.

    Attributes:
        path: of the unit.
        dataset: of its case.
        case: its case.
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
    """All that is laid out as a unit in a work folder, cases first, in order of path.

    Args:
        work: the work folder.
        dataset: only of this one.
        case: only of this one.
    """
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
