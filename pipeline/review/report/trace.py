"""What a run was trained from, followed by digests through the cache down to files and weights.

The registry is not asked: it may have changed since. Names of units come from the digests that the
run recorded, and what made them from their receipts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pipeline.cache.index import IndexedTeacher, read_index
from pipeline.cache.places import Place, find_units
from pipeline.cache.reader import CachedCase, Unit
from pipeline.config import short
from pipeline.errors import CacheError
from pipeline.folder import Folder
from pipeline.html_report.record import RunRecord

TRAINING, VALIDATION = "train", "validation"
GONE = "no longer in the cache"


@dataclass(frozen=True)
class Traced:
    """A unit, or why it cannot be opened.

    Attributes:
        unit: open for reading; None if it is not there, damaged, or of another digest.
        problem: why, in words; empty if it is in order.
    """

    unit: Unit | None
    problem: str = ""


@dataclass(frozen=True)
class TracedCase:
    """A case of the run.

    Attributes:
        name: `dataset/case`.
        split: train or validation.
        digest: as the run recorded it.
        case: the unit with image and label.
        units: teacher -> its unit of this case. Those of validation cases no training reads; they
            are here for pictures.
        left_out: teachers whose units were missing when the run was started.
    """

    name: str
    split: str
    digest: str
    case: Traced
    units: Mapping[str, Traced]
    left_out: frozenset[str] = frozenset()

    @property
    def usable(self) -> dict[str, Unit]:
        """Units that can be read, by teacher."""
        return {name: t.unit for name, t in self.units.items() if t.unit is not None}


@dataclass(frozen=True)
class TracedTeacher:
    """A teacher of the run.

    Attributes:
        name: its name.
        digest: as the run recorded it.
        inputs: what that is the digest of; None if neither index nor any unit tells any more.
        indexed: the same as the index has it, for looking up what was measured; or None.
        accepted: organ -> what a receipt notes of a teacher that the gate would have stopped.
    """

    name: str
    digest: str
    inputs: Mapping[str, Any] | None
    indexed: IndexedTeacher | None
    accepted: Mapping[str, Any]

    @property
    def organs(self) -> tuple[str, ...]:
        """Those that it is expert in; empty if nothing tells."""
        return tuple((self.inputs or {}).get("organs", ()))


@dataclass(frozen=True)
class Lineage:
    """All of it."""

    cases: Sequence[TracedCase]
    teachers: Sequence[TracedTeacher]

    def of(self, split: str) -> list[TracedCase]:
        """Cases of a split."""
        return [case for case in self.cases if case.split == split]

    def open(self, case: TracedCase) -> CachedCase | None:
        """The case for reading, with the units that there are; None without its image."""
        if case.case.unit is None:
            return None
        units = case.usable
        experts = {
            organ: sorted(t.name for t in self.teachers if organ in t.organs and t.name in units)
            for organ in dict.fromkeys(o for t in self.teachers for o in t.organs)
        }
        annotated = tuple(case.case.unit.receipt.inputs.get("label_values", {}))
        return CachedCase(case.name, case.split, annotated, case.case.unit, units, experts)


def trace(work: Folder, record: RunRecord) -> Lineage:
    """Opens every unit that the run names; only receipts are read."""
    cases, units = _places(work)
    missing = {t: set(names) for t, names in record.inputs.get("missing_units", {}).items()}
    found = []
    for split, named in ((TRAINING, record.cases), (VALIDATION, record.validation)):
        for name, digest in named.items():
            case = _open(cases.get((name, short(digest))), digest)
            image = None if case.unit is None else case.unit.receipt.inputs.get("image_sha256")
            traced = {
                teacher: _unit(units.get((teacher, short(of), name), ()), of, image)
                for teacher, of in record.teachers.items()
            }
            left_out = frozenset(t for t, names in missing.items() if name in names)
            found.append(TracedCase(name, split, digest, case, traced, left_out))
    return Lineage(found, _teachers(work, record, found))


def _places(
    work: Folder,
) -> tuple[dict[tuple[str, str], Place], dict[tuple[str, str, str], list[Place]]]:
    """Places of case units by (case, tag), and of teachers' by (teacher, its tag, case)."""
    cases: dict[tuple[str, str], Place] = {}
    units: dict[tuple[str, str, str], list[Place]] = {}
    for place in find_units(work):
        if place.teacher is None:
            cases[place.case_name, place.tag] = place
        else:
            key = (place.teacher, place.teacher_tag, place.case_name)
            units.setdefault(key, []).append(place)
    return cases, units


def _open(place: Place | None, digest: str | None) -> Traced:
    if place is None:
        return Traced(None, GONE)
    try:
        return Traced(Unit.open(place.path, expect=digest))
    except CacheError as error:
        return Traced(None, error.what)


def _unit(places: Sequence[Place], teacher_digest: str, image: str | None) -> Traced:
    """That of this very image, if the case still tells which; else the only one there is."""
    fitting = [p for p in places if image is None or p.tag == short(image)]
    if len(fitting) > 1:
        return Traced(None, "several in the cache, and the case no longer tells which is meant")
    traced = _open(fitting[0] if fitting else None, None)
    if traced.unit is not None and traced.unit.receipt.inputs["teacher_digest"] != teacher_digest:
        return Traced(None, "of a teacher with another digest")
    return traced


def _teachers(work: Folder, record: RunRecord, cases: Sequence[TracedCase]) -> list[TracedTeacher]:
    files, _ = read_index(work)
    indexed = {file.teacher.digest: file.teacher for file in files if file.teacher is not None}
    found = []
    for name, digest in record.teachers.items():
        units = [case.usable[name] for case in cases if name in case.usable]
        known = indexed.get(digest)
        inputs = known.inputs if known else units[0].receipt.teacher_inputs if units else None
        notes = [u.receipt.notes["accepted"] for u in units if "accepted" in u.receipt.notes]
        found.append(TracedTeacher(name, digest, inputs, known, notes[0] if notes else {}))
    return found
