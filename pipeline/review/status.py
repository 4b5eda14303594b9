"""What is done, missing, stale or damaged: read from receipts and digests, never from a log.
With `cache ls`: what a work folder holds, how much, who can reach it and who used it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from pipeline.cache.identity import read_teacher
from pipeline.cache.index import (
    IndexedCase,
    IndexedTeacher,
    IndexFile,
    case_path,
    read_dataset_index,
    unit_digest,
    unit_path,
)
from pipeline.cache.places import Place, unit_bytes
from pipeline.cache.receipt import Receipt
from pipeline.config import sha256_if_there, short
from pipeline.data.entries import CaseFiles
from pipeline.data.registry import Registry
from pipeline.errors import CacheStale, counted
from pipeline.folder import Folder, matching
from pipeline.log import print_table, size
from pipeline.review.units import (
    STATES,
    Inventory,
    State,
    StudentRun,
    by_folder,
    in_few_words,
    plain,
    registry_reach,
    seconds_since,
    student_runs,
    unit_state,
    used_by,
)


@dataclass(frozen=True)
class Status:
    """States of all units.

    Attributes:
        units: (dataset, teacher or "cases", case) -> state.
        runs: student run -> "finished" or "unfinished".
        jobs: submitted ones in order: job, stage, state, submitted, after, log.
    """

    units: dict[tuple[str, str, str], State]
    runs: dict[str, str]
    jobs: list[dict[str, Any]] = field(default_factory=list)

    def counts(self) -> list[dict[str, Any]]:
        """Per dataset and teacher, how many units are in each state."""
        groups: dict[tuple[str, str], Counter[str]] = {}
        for (dataset, what, _), state in self.units.items():
            groups.setdefault((dataset, what), Counter())[state] += 1
        return [
            {"dataset": dataset, "unit": what, **{state: count[state] for state in STATES}}
            for (dataset, what), count in groups.items()
        ]

    def to_json(self) -> dict[str, Any]:
        """For machines: counts, each unit that is not done, and the runs."""
        return {
            "counts": self.counts(),
            "not_done": [
                {"dataset": d, "unit": w, "case": c, "state": state}
                for (d, w, c), state in self.units.items()
                if state != "done"
            ],
            "runs": self.runs,
            "jobs": self.jobs,
        }


def status(registry: Registry, work: Folder) -> Status:
    """Looks at every unit that the registry calls for; hashes its input files.

    Stale: the input's bytes, the weights' bytes or the registry entry changed since it was made.
    """
    units: dict[tuple[str, str, str], State] = {}
    teachers = {name: _teacher(registry, work, name) for name in registry.teachers}
    for dataset in registry.datasets:
        files = {source.case: source for source in registry.cases(dataset)}
        try:
            entries = read_dataset_index(work, dataset, registry.dataset_key(dataset))
        except CacheStale:
            earlier = bool(matching(work / "cases" / dataset, "*.zarr"))
            entries = []
            absent: State = "stale" if earlier else "missing"
        else:
            absent = "missing"
        indexed = {entry.case: entry for entry in entries}
        # Where the raw CTs are not, the index says which cases there are.
        for case in {**files, **indexed}:
            entry, source = indexed.get(case), files.get(case)
            current = entry is not None and _same_image(entry, source)
            if files and entry is not None:  # stage two refuses one that went, or changed its split
                here = source and (source.split, source.fold)
                current &= here == (entry.split, entry.fold)
            units[dataset, "cases", case] = _state_of_case(work, entry, source, absent, current)
            for name, teacher in teachers.items():
                units[dataset, name, case] = _state_of_unit(work, teacher, entry, current)
    return Status(units, {run.run: run.state for run in student_runs(work)})


def print_status(found: Status) -> None:
    """Tables, for people."""
    rows = [
        [row["dataset"], row["unit"], *(str(row[state]) for state in STATES)]
        for row in found.counts()
    ]
    print_table("Cache", ["dataset", "units", *STATES], rows)
    if found.runs:
        print_table("Students", ["run", "state"], [[run, how] for run, how in found.runs.items()])
    if found.jobs:
        jobs = [[j["job"], j["stage"], j["state"], j["submitted"][:16]] for j in found.jobs]
        print_table("Jobs", ["job", "stage", "state", "submitted, UTC"], jobs)


def _teacher(registry: Registry, work: Folder, name: str) -> IndexedTeacher | State:
    """Its index entry if that is current, else the state of all its units."""
    try:
        return read_teacher(work, registry, name)
    except CacheStale:
        earlier = bool(matching(work / "teachers", f"{name}@*"))
        return "stale" if earlier else "missing"


def _same_image(entry: IndexedCase, source: CaseFiles | None) -> bool:
    """An image that is not here (stage two's machine) cannot have made the cache stale."""
    found = None if source is None else sha256_if_there(source.image)
    return found is None or found == entry.image_sha256


def _state_of_case(
    work: Folder, entry: IndexedCase | None, source: CaseFiles | None, absent: State, current: bool
) -> State:
    """A case also holds its label, which the teachers' units do not depend on."""
    if entry is None:
        return absent
    if not current:
        return "stale"
    found = unit_state(case_path(work, entry), entry.digest)
    label = None if found.receipt is None or source is None else sha256_if_there(source.label)
    if found.receipt is not None and label not in (None, found.receipt.inputs["label_sha256"]):
        return "stale"
    return found.state


def _state_of_unit(
    work: Folder, teacher: IndexedTeacher | State, entry: IndexedCase | None, current: bool
) -> State:
    if not isinstance(teacher, IndexedTeacher):
        return teacher
    if entry is None:
        return "missing"
    if not current:
        return "stale"
    return unit_state(unit_path(work, teacher, entry), unit_digest(teacher, entry)).state


# What a work folder holds, as `cache ls` lists it.


@dataclass(frozen=True)
class Entry:
    """One dataset's case units, or the units of one teacher with one digest.

    Attributes:
        digest: of the teacher, 16 digits; empty for a dataset.
        organs, taps: of the teacher, as far as index or units say.
        units: more than cases where a case was cached in several ways.
        reached: units that the given registry leads to; None if there is none.
        keys: index entries that lead to a unit of it, as 16 digits.
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
            "datasets": plain(self.datasets),
            "teachers": plain(self.teachers),
            "students": [
                {"run": r.run, "finished": r.finished, "teachers": dict(r.teachers)}
                for r in self.students
            ],
            "bytes": sum(e.num_bytes for e in (*self.datasets, *self.teachers)),
        }


def list_cache(work: Folder, registry: Registry | None = None) -> Listing:
    """Reads every receipt of a work folder, and no array; counts what the registry reaches."""
    there = Inventory(work)
    runs = student_runs(work)
    mine = None if registry is None else set(registry_reach(work, registry).units)
    datasets: list[Entry] = []
    teachers: list[Entry] = []
    for places in by_folder(there.places).values():
        entries = datasets if places[0].teacher is None else teachers
        entries.append(_entry(there, places, mine, runs))
    return Listing(work, datasets, teachers, runs)


def print_listing(found: Listing) -> None:
    """Tables, for people."""
    by = ["reached"] if any(e.reached is not None for e in found.datasets) else []
    columns = ["units", "bytes", *by, "entries", "students", "age"]
    if not found.datasets and not found.teachers:
        print_table(f"{found.work} holds no units", ["dataset", *columns], [])
        return
    print_table("Cases", ["dataset", *columns], [[e.name, *_cells(e)] for e in found.datasets])
    rows = [[e.name, e.digest, _organs(e), *_cells(e)] for e in found.teachers]
    print_table("Teachers", ["teacher", "digest", "organs", *columns], rows)
    if found.students:
        runs = [[r.run, r.state, _teachers(r)] for r in found.students]
        print_table("Students", ["run", "state", "teachers"], runs)


def _entry(
    there: Inventory, places: Sequence[Place], mine: set[Folder] | None, runs: Sequence[StudentRun]
) -> Entry:
    """Of the units in one folder."""
    first = places[0]
    receipts = {place: there.receipts.get(place) for place in places}
    good = [receipt for receipt in receipts.values() if receipt is not None]
    ages = [seconds_since(receipt.written) for receipt in good]
    organs, taps = _of_teacher(first, there.index, good)
    reached = [there.reached[place.path] for place in places if place.path in there.reached]
    return Entry(
        name=first.teacher or first.dataset,
        digest=first.teacher_tag,
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
        keys=tuple(sorted({key for unit in reached for key in unit.keys})),
        students=tuple(sorted({run for place in places for run in used_by(place, runs)})),
        age_days=round(min(ages) / 86400, 3) if ages else None,
    )


def _of_teacher(
    place: Place, index: Iterable[IndexFile], receipts: Sequence[Receipt]
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Organs and taps: the index knows those of its own teachers, arrays tell of all others."""
    for teacher in (file.teacher for file in index):
        known = teacher is not None and (teacher.teacher, short(teacher.digest))
        if teacher is not None and known == (place.teacher, place.teacher_tag):
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
        size(entry.num_bytes),
        *reached,
        str(len(entry.keys)),
        in_few_words(entry.students),
        "–" if entry.age_days is None else _age(entry.age_days),
    ]


def _organs(entry: Entry) -> str:
    taps = f" + {counted(len(entry.taps), 'tap')}" if entry.taps else ""
    return ", ".join(entry.organs) + taps


def _age(days: float) -> str:
    return f"{days:.0f} d" if days >= 2 else f"{days * 24:.0f} h" if days >= 0.1 else "new"


def _teachers(run: StudentRun) -> str:
    return ", ".join(f"{name}@{short(digest)[:8]}" for name, digest in run.teachers.items()) or "–"
