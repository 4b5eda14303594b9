"""`cache ls`: what a work folder holds, how much, who can reach it and who used it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pipeline.cache.index import IndexFile, read_index
from pipeline.cache.places import Place, find_units, unit_bytes
from pipeline.cache.receipt import Receipt, read_receipt
from pipeline.config import short
from pipeline.data.registry import Registry
from pipeline.errors import CacheError
from pipeline.folder import Folder
from pipeline.inventory.reach import index_reach, registry_reach
from pipeline.inventory.students import StudentRun, in_few_words, student_runs, used_by
from pipeline.inventory.wording import megabytes, seconds_since
from pipeline.log import print_table


@dataclass(frozen=True)
class Entry:
    """One dataset's case units, or the units of one teacher with one digest.

    Attributes:
        name: the dataset or teacher.
        digest: of the teacher, 16 digits; empty for a dataset.
        organs: that the teacher is expert in, as far as index or units say.
        taps: whose features it cached.
        cases: number of different cases.
        units: number of units; more than cases where a case was cached in several ways.
        damaged: units that fail the cheap check.
        num_bytes: of all units.
        reached: units that the given registry leads to; None if there is none.
        keys: index entries that lead to a unit of it, as 16 digits.
        students: runs that were trained on one of them.
        age_days: since the newest unit was written; None if no receipt can be read.
    """

    name: str
    digest: str
    organs: tuple[str, ...]
    taps: tuple[str, ...]
    cases: int
    units: int
    damaged: int
    num_bytes: int
    reached: int | None
    keys: tuple[str, ...]
    students: tuple[str, ...]
    age_days: float | None


@dataclass(frozen=True)
class Listing:
    """All that a work folder holds."""

    work: Folder
    datasets: Sequence[Entry]
    teachers: Sequence[Entry]
    students: Sequence[StudentRun]

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return {
            "work": str(self.work),
            "datasets": [_plain(entry) for entry in self.datasets],
            "teachers": [_plain(entry) for entry in self.teachers],
            "students": [
                {"run": r.run, "finished": r.finished, "teachers": dict(r.teachers)}
                for r in self.students
            ],
            "bytes": sum(e.num_bytes for e in (*self.datasets, *self.teachers)),
        }


def list_cache(work: Folder, registry: Registry | None = None) -> Listing:
    """Reads every receipt of a work folder, and no array.

    Args:
        work: the work folder.
        registry: whose units to count as reached; read without its files.
    """
    files, _ = read_index(work)
    runs = student_runs(work)
    mine = None if registry is None else set(registry_reach(work, registry).units)
    keys = _keys(work, files)
    groups: dict[tuple[bool, str, str], list[Place]] = {}
    for place in find_units(work):
        owner = place.dataset if place.teacher is None else place.teacher
        groups.setdefault((place.teacher is None, owner, place.teacher_tag), []).append(place)
    entries = {
        group: _entry(group[1], group[2], places, files, mine, keys, runs)
        for group, places in groups.items()
    }
    return Listing(
        work,
        [entry for (is_case, _, _), entry in entries.items() if is_case],
        [entry for (is_case, _, _), entry in entries.items() if not is_case],
        runs,
    )


def print_listing(found: Listing, *, registry: Registry | None) -> None:
    """Tables, for people."""
    by = [] if registry is None else ["reached"]
    columns = ["units", "bytes", *by, "entries", "students", "age"]
    if not found.datasets and not found.teachers:
        print_table(f"{found.work} holds no units", ["dataset", *columns], [])
        return
    print_table("Cases", ["dataset", *columns], [[e.name, *_cells(e)] for e in found.datasets])
    rows = [[e.name, e.digest, _organs(e), *_cells(e)] for e in found.teachers]
    print_table("Teachers", ["teacher", "digest", "organs", *columns], rows)
    if found.students:
        runs = [
            [r.run, "finished" if r.finished else "unfinished", _teachers(r)]
            for r in found.students
        ]
        print_table("Students", ["run", "state", "teachers"], runs)


def _entry(
    name: str,
    tag: str,
    places: Sequence[Place],
    files: Sequence[IndexFile],
    mine: set[Folder] | None,
    keys: Mapping[Folder, set[str]],
    runs: Sequence[StudentRun],
) -> Entry:
    receipts = {place: _receipt(place) for place in places}
    good = [receipt for receipt in receipts.values() if receipt is not None]
    ages = [seconds_since(receipt.written) for receipt in good]
    organs, taps = _of_teacher(name, tag, files, good)
    return Entry(
        name=name,
        digest=tag,
        organs=organs,
        taps=taps,
        cases=len({place.case_name for place in places}),
        units=len(places),
        damaged=len(places) - len(good),
        num_bytes=sum(
            unit_bytes(place.path) if receipt is None else receipt.num_bytes
            for place, receipt in receipts.items()
        ),
        reached=None if mine is None else sum(place.path in mine for place in places),
        keys=tuple(sorted({key for place in places for key in keys.get(place.path, ())})),
        students=tuple(sorted({run for place in places for run in used_by(place, runs)})),
        age_days=round(min(ages) / 86400, 3) if ages else None,
    )


def _receipt(place: Place) -> Receipt | None:
    try:
        return read_receipt(place.path)
    except CacheError:
        return None


def _keys(work: Folder, files: Sequence[IndexFile]) -> dict[Folder, set[str]]:
    """Unit -> index entries of its own dataset (a case unit) or teacher that lead to it."""
    found: dict[Folder, set[str]] = {}
    cases = [file for file in files if file.cases is not None]
    for file in files:
        with_cases = [file] if file.cases is not None else [file, *cases]
        for path, unit in index_reach(work, with_cases).items():
            if (unit.teacher is None) == (file.teacher is None):
                found.setdefault(path, set()).add(short(file.key))
    return found


def _of_teacher(
    name: str, tag: str, files: Iterable[IndexFile], receipts: Sequence[Receipt]
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Organs and taps: the index knows those of its own teachers, arrays tell of all others."""
    for file in files:
        teacher = file.teacher
        if teacher is not None and teacher.teacher == name and short(teacher.digest) == tag:
            return teacher.organs, teacher.taps
    arrays = sorted({array for receipt in receipts for array in receipt.arrays})
    organs = tuple(a.removeprefix("log_odds/") for a in arrays if a.startswith("log_odds/"))
    taps = tuple(a.removeprefix("features/") for a in arrays if a.startswith("features/"))
    return organs, taps


def _cells(entry: Entry) -> list[str]:
    reached = [] if entry.reached is None else [f"{entry.reached} of {entry.units}"]
    damaged = f" ({entry.damaged} damaged)" if entry.damaged else ""
    return [
        f"{entry.units}{damaged}",
        megabytes(entry.num_bytes),
        *reached,
        str(len(entry.keys)),
        in_few_words(entry.students),
        "–" if entry.age_days is None else _age(entry.age_days),
    ]


def _organs(entry: Entry) -> str:
    taps = f" + {len(entry.taps)} tap{'s' if len(entry.taps) > 1 else ''}" if entry.taps else ""
    return ", ".join(entry.organs) + taps


def _age(days: float) -> str:
    return f"{days:.0f} d" if days >= 2 else f"{days * 24:.0f} h" if days >= 0.1 else "new"


def _teachers(run: StudentRun) -> str:
    return ", ".join(f"{name}@{short(digest)[:8]}" for name, digest in run.teachers.items()) or "–"


def _plain(entry: Entry) -> dict[str, Any]:
    values = {**vars(entry), "bytes": entry.num_bytes}
    del values["num_bytes"]
    return values
