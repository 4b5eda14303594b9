"""What there is of units: which lie in a work folder, in which state, which the index leads to,
which student used them."""

from __future__ import annotations

import json
import time
from calendar import timegm
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields, is_dataclass
from functools import cached_property
from typing import Any, Literal, get_args

from pipeline.cache.index import (
    IndexedCase,
    IndexedTeacher,
    case_path,
    dataset_entries,
    read_dataset_index,
    read_index,
    read_teacher_index,
    teacher_file,
    unit_digest,
    unit_path,
)
from pipeline.cache.places import Place, find_units
from pipeline.cache.receipt import Receipt, read_receipt
from pipeline.cache.schema import Inputs
from pipeline.config import short
from pipeline.consensus.evidence import evidence_file
from pipeline.data.registry import Registry
from pipeline.errors import CacheError, CacheMissing, CacheStale, counted
from pipeline.folder import Folder, matching, read_text
from pipeline.log import print_table

# In which state a unit is, by its receipt.

State = Literal["done", "missing", "stale", "damaged"]
STATES: tuple[State, ...] = get_args(State)


@dataclass(frozen=True)
class UnitState:
    """What a unit's receipt says: there is one if it is done, else a problem in words."""

    state: State
    receipt: Receipt | None = None
    problem: str = ""


def unit_state(path: Folder, expect: str | None = None) -> UnitState:
    """Reads the receipt and sees whether what it names is there; `expect` is its digest."""
    try:
        return UnitState("done", read_receipt(path, expect=expect))
    except CacheMissing:
        return UnitState("missing", problem="it has no receipt.")
    except CacheStale as error:
        return UnitState("stale", problem=error.what)
    except CacheError as error:
        return UnitState("damaged", problem=error.what)


# Which units there are, and which the index leads to.


class Inventory:
    """The units that lie in a work folder, and its index. Receipts are read when they are first
    asked for, and once; who removes something takes a new one.

    Attributes:
        unreadable: index entries that cannot be read -> why.
    """

    def __init__(self, work: Folder, *, dataset: str = "*", case: str = "*") -> None:
        self.work = work
        self.index, self.unreadable = read_index(work)
        self.places = find_units(work, dataset=dataset, case=case)

    @cached_property
    def receipts(self) -> Mapping[Place, Receipt]:
        """Of the units that have a valid one, whatever the index says that they must be."""
        states = {place: unit_state(place.path) for place in self.places}
        return {p: found.receipt for p, found in states.items() if found.receipt is not None}

    @cached_property
    def reached(self) -> Mapping[Folder, Reached]:
        """Path -> unit that any pair of index entries leads to; many of them need not exist."""
        cases = [(file.key, case) for file in self.index for case in file.cases or ()]
        teachers = [(file.key, file.teacher) for file in self.index if file.teacher is not None]
        return _units(self.work, cases, teachers)

    def teacher_inputs(self, receipt: Receipt) -> Inputs:
        """What the digest of a unit's teacher is of; empty if neither unit nor index tells."""
        wanted = receipt.inputs.get("teacher_digest")
        known = (file.teacher for file in self.index if file.teacher is not None)
        return receipt.teacher_inputs or next((t.inputs for t in known if t.digest == wanted), {})


@dataclass(frozen=True)
class Reached:
    """A unit that the index leads to: the digest its receipt must have, who it is of, and which
    entries of its own dataset (a case unit) or teacher lead to it, as 16 digits."""

    digest: str
    case: IndexedCase
    teacher: IndexedTeacher | None = None
    keys: set[str] = field(default_factory=set, compare=False)

    @property
    def name(self) -> str:
        """As messages name it."""
        return (
            self.case.name if self.teacher is None else f"{self.teacher.teacher} x {self.case.name}"
        )


@dataclass(frozen=True)
class Reach:
    """What a registry leads to through its index entries.

    Attributes:
        units: by path; whether one is there is for its receipt to say.
        index_files: the entries, and where the evidence of its teachers is if there is any.
        absent: datasets and teachers of the registry without a readable entry -> why.
    """

    units: Mapping[Folder, Reached]
    index_files: frozenset[Folder]
    absent: Mapping[str, CacheStale]


def registry_reach(work: Folder, registry: Registry) -> Reach:
    """All units that stage two, or a rerun of stage one, would use for a registry."""
    cases: list[tuple[str, IndexedCase]] = []
    teachers: list[tuple[str, IndexedTeacher]] = []
    files: set[Folder] = set()
    absent: dict[str, CacheStale] = {}
    for dataset in registry.datasets:
        key = registry.dataset_key(dataset)
        try:
            cases += [(key, case) for case in read_dataset_index(work, dataset, key)]
            files |= {*dataset_entries(work, dataset, key)}
        except CacheStale as error:
            absent[f"dataset {dataset}"] = error
    for teacher in registry.teachers:
        key = registry.teacher_key(teacher)
        try:
            indexed = read_teacher_index(work, teacher, key)
            teachers.append((key, indexed))
            files |= {teacher_file(work, teacher, key), evidence_file(work, registry, indexed)}
        except CacheStale as error:
            absent[f"teacher {teacher}"] = error
    return Reach(_units(work, cases, teachers), frozenset(files), absent)


def _units(
    work: Folder,
    cases: Iterable[tuple[str, IndexedCase]],
    teachers: Sequence[tuple[str, IndexedTeacher]],
) -> dict[Folder, Reached]:
    """By keys of the index and what stands under them."""
    units: dict[Folder, Reached] = {}
    for case_key, case in cases:
        unit = Reached(case.digest, case)
        units.setdefault(case_path(work, case), unit).keys.add(short(case_key))
        for key, teacher in teachers:
            unit = Reached(unit_digest(teacher, case), case, teacher)
            units.setdefault(unit_path(work, teacher, case), unit).keys.add(short(key))
    return units


def by_folder(places: Iterable[Place]) -> dict[str, list[Place]]:
    """Units by dataset (`cases/ct`), and by teacher and digest (`teachers/liver@0123..`)."""
    groups: dict[str, list[Place]] = {}
    for place in places:
        what = f"cases/{place.dataset}"
        if place.teacher is not None:
            what = f"teachers/{place.teacher}@{place.teacher_tag}"
        groups.setdefault(what, []).append(place)
    return groups


# Which student was trained from which units, as its run recorded it. Nothing is loaded.


@dataclass(frozen=True)
class StudentRun:
    """A run in `students/`, and the digests of the teachers and of the cases (`dataset/case`, of
    training and validation) that it was trained with."""

    run: str
    finished: bool
    teachers: Mapping[str, str]
    cases: Mapping[str, str]

    @property
    def state(self) -> str:
        """As tables name it."""
        return "finished" if self.finished else "unfinished"

    def used(self, place: Place) -> bool:
        """Whether it was trained on a unit."""
        if place.teacher is None:
            return short(self.cases.get(place.case_name, "")) == place.tag
        teacher = short(self.teachers.get(place.teacher, ""))
        return teacher == place.teacher_tag and place.case_name in self.cases


def student_runs(work: Folder) -> Sequence[StudentRun]:
    """The runs of a work folder, by name; one whose record cannot be read has used nothing."""
    runs = []
    for name, folder in run_folders(work).items():
        try:
            inputs = json.loads(read_text(folder / "config.json"))["inputs"]
            teachers = dict(inputs.get("teachers", {}))
            cases = {**inputs.get("cases", {}), **inputs.get("validation", {})}
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            teachers, cases = {}, {}
        finished = (folder / "finished.json").exists()
        runs.append(StudentRun(name, finished, teachers, cases))
    return runs


def run_folders(work: Folder) -> dict[str, Folder]:
    """Name -> folder of every run; those of a comparison are `<comparison>/<run>`."""
    found: dict[str, Folder] = {}
    for folder in (p for p in matching(work / "students", "[!.]*") if p.is_dir()):
        within = [path.parent for path in matching(folder, "[!.]*/config.json")]
        if within and not (folder / "config.json").exists():
            found |= {f"{folder.name}/{run.name}": run for run in within}
        else:
            found[folder.name] = folder
    return found


def used_by(place: Place, runs: Sequence[StudentRun]) -> list[str]:
    """Names of the runs that were trained on a unit."""
    return [run.run for run in runs if run.used(place)]


def in_few_words(runs: Iterable[str]) -> str:
    """Names of runs for a column of a table; those of one comparison are counted."""
    groups, said = Counter[str](), []
    for name in runs:
        group, _, within = name.partition("/")
        if within:
            groups[group] += 1
        else:
            said.append(name)
    said += [f"{group} ({counted(n, 'run')})" for group, n in groups.items()]
    return ", ".join(sorted(said)) or "–"


# Ages and differences as people read them, and all of it for machines.


def plain(value: Any) -> Any:
    """For JSON: a dataclass as its fields, `num_bytes` as `bytes`, paths as text."""
    if is_dataclass(value):
        named = {each.name: plain(getattr(value, each.name)) for each in fields(value)}
        return {"bytes" if name == "num_bytes" else name: entry for name, entry in named.items()}
    if isinstance(value, Mapping):
        return {name: plain(entry) for name, entry in value.items()}
    if isinstance(value, list | tuple):
        return [plain(entry) for entry in value]
    return value if isinstance(value, str | int | float | None) else str(value)


def seconds_since(written: str, *, now: float | None = None) -> float:
    """Age of a receipt by what it says; infinite if that is no time, negative if it is to come."""
    try:
        then = timegm(time.strptime(written, "%Y-%m-%dT%H:%M:%SZ"))
    except (TypeError, ValueError):
        return float("inf")
    return (time.time() if now is None else now) - then


def accepted_in_words(notes: Mapping[str, Any]) -> str:
    """What a receipt notes of a teacher that the admission gate would have stopped; else empty."""
    organs = [
        f"{organ}: Dice {entry['dice']:.3f}, asked for {entry['threshold']:g}"
        for organ, entry in notes.get("accepted", {}).items()
    ]
    return f", accepted below the gate ({'; '.join(organs)})" if organs else ""


def print_changes(title: str, arrow: str, changes: Iterable[tuple[str, Sequence[str]]]) -> None:
    """A table of `field: old -> new` lines, each once, with the names of all that it holds for.
    `arrow` says what stands on the two sides: `there -> now`."""
    names: dict[str, list[str]] = {}
    for name, lines in changes:
        for line in lines:
            names.setdefault(line, []).append(name)
    if names:
        rows = [[*line.split(": ", 1), ", ".join(of)] for line, of in names.items()]
        print_table(title, ["input", arrow, "in"], rows)
