"""What there is of units: what is wrong with one, which the index leads to, which student used
it.
"""

from __future__ import annotations

import json
import time
from calendar import timegm
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt

from pipeline.cache.index import (
    IndexedCase,
    IndexedTeacher,
    IndexFile,
    case_path,
    case_records,
    dataset_file,
    read_dataset_index,
    read_index,
    read_teacher_index,
    teacher_file,
    unit_digest,
    unit_path,
)
from pipeline.cache.places import Place
from pipeline.cache.reader import Unit
from pipeline.cache.receipt import Receipt, read_receipt, verify_object, verify_seal
from pipeline.cache.schema import IMAGE, LABEL
from pipeline.config import short
from pipeline.consensus.evidence import evidence_file
from pipeline.data.labels import IGNORE
from pipeline.data.registry import Registry
from pipeline.data.volume import Grid
from pipeline.errors import CacheError, CacheMissing, CacheStale
from pipeline.folder import Folder, matching, read_text
from pipeline.log import print_table

# What is wrong with one unit: cheaply by its receipt, or deeply by every byte and number in it.


def cheap_problems(place: Place, expect: str | None = None) -> list[str]:
    """Receipt, presence, sizes, digest, and whether it lies where it belongs.

    Args:
        place: of the unit.
        expect: the digest that it must have; None takes what its path says.
    """
    try:
        receipt = read_receipt(place.path, expect=expect)
    except CacheMissing:
        return ["it has no receipt"]
    except CacheError as error:
        return [_words(error)]
    return _misplaced(place, receipt)


def deep_problems(place: Place, expect: str | None = None) -> list[str]:
    """`cheap_problems`; if there are none: every checksum, then every array's values.

    An infinite value is a problem; NaN in log-odds and features means "not seen" and is none.
    """
    found = cheap_problems(place, expect)
    if found:
        return found
    unit = Unit.open(place.path)
    found = _says(lambda: verify_seal(unit.path, unit.receipt))
    for name in unit.receipt.objects:
        found += _says(partial(verify_object, unit.path, unit.receipt, name))
    try:
        found += _attributes(place, unit)
        for name in unit.receipt.arrays:
            found += _array(unit, name)
    except CacheError as error:
        found.append(_words(error))
    except (KeyError, TypeError, ValueError) as error:
        found.append(f"its attributes are not those of a unit ({type(error).__name__}: {error})")
    return list(dict.fromkeys(found))


def _words(error: CacheError) -> str:
    return error.what.rstrip(".")


def _misplaced(place: Place, receipt: Receipt) -> list[str]:
    """The digests in its path are those of its inputs."""
    inputs = receipt.inputs
    if place.teacher is None:
        wanted = {"tag": short(receipt.digest)}
    else:
        wanted = {
            "teacher_tag": short(str(inputs.get("teacher_digest", ""))),
            "tag": short(str(inputs.get("image_sha256", ""))),
        }
    return [
        f"it was made as {value}, but lies under {getattr(place, field)}"
        for field, value in wanted.items()
        if getattr(place, field) != value
    ]


def _says(check: Callable[[], object]) -> list[str]:
    try:
        check()
    except CacheError as error:
        return [_words(error)]
    return []


def _attributes(place: Place, unit: Unit) -> list[str]:
    said = [("case", place.case_name), ("teacher", place.teacher)]
    return [
        f"its attribute {name} is {unit.attributes.get(name)!r}, its place says {value!r}"
        for name, value in said
        if value is not None and unit.attributes.get(name) != value
    ]


def _array(unit: Unit, name: str) -> list[str]:
    said = unit.receipt.arrays[name]
    try:
        array = unit.array(name)
        values = unit.read(name)
    except CacheError as error:
        return [_words(error)]
    found = []
    if list(array.shape) != list(said["shape"]):
        found.append(f"{name} has shape {array.shape}, its receipt says {said['shape']}")
    if str(array.dtype) != said["dtype"]:
        found.append(f"{name} is {array.dtype}, its receipt says {said['dtype']}")
    grid = Grid.from_json(unit.attributes["grid"])
    wanted: tuple[int, ...] = grid.shape
    if name.startswith("features/"):
        tap = unit.attributes["taps"][name.removeprefix("features/")]
        wanted = (tap["channels"], *grid.coarsen(tap["stride"]).shape)
    if values.shape != wanted:
        found.append(f"{name} has shape {values.shape}, its grid {wanted}")
    return found + _values(unit, name, values)


def _values(unit: Unit, name: str, values: npt.NDArray[Any]) -> list[str]:
    match name:
        case _ if values.dtype.kind == "f":
            bad = int(np.count_nonzero(np.isinf(values)))
            return [f"{name} holds {bad} infinite values"] if bad else []
        case _ if name == LABEL:
            known = {0, IGNORE, *unit.attributes["organ_ids"].values()}
            strange = sorted({int(v) for v in np.unique(values)} - known)
            return [f"label holds the values {strange}, which are no organ's"] if strange else []
        case _ if name == IMAGE:
            return []
        case _:
            return [f"{name} is {values.dtype}, neither float nor image nor label"]


# Which units the index leads to: from one registry, or from any that was ever cached here.


@dataclass(frozen=True)
class Reached:
    """A unit that the index leads to: the digest its receipt must have, and who it is of."""

    digest: str
    case: IndexedCase
    teacher: IndexedTeacher | None

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
        units: path -> unit; whether it is there is for its receipt to say.
        index_files: the entries, and where the evidence of its teachers is if there is any.
        absent: datasets and teachers of the registry without a readable entry -> why.
    """

    units: Mapping[Folder, Reached]
    index_files: frozenset[Folder]
    absent: Mapping[str, CacheStale]


def registry_reach(work: Folder, registry: Registry) -> Reach:
    """All units that stage two, or a rerun of stage one, would use for a registry."""
    cases: list[IndexedCase] = []
    teachers: list[IndexedTeacher] = []
    files: set[Folder] = set()
    absent: dict[str, CacheStale] = {}
    for dataset in registry.datasets:
        key = registry.dataset_key(dataset)
        try:
            cases += read_dataset_index(work, dataset, key)
            files |= {dataset_file(work, dataset, key), *case_records(work, dataset, key)}
        except CacheStale as error:
            absent[f"dataset {dataset}"] = error
    for teacher in registry.teachers:
        key = registry.teacher_key(teacher)
        try:
            indexed = read_teacher_index(work, teacher, key)
            teachers.append(indexed)
            files |= {teacher_file(work, teacher, key), evidence_file(work, registry, indexed)}
        except CacheStale as error:
            absent[f"teacher {teacher}"] = error
    return Reach(_units(work, cases, teachers), frozenset(files), absent)


def index_reach(work: Folder, files: Iterable[IndexFile] | None = None) -> dict[Folder, Reached]:
    """All units that any pair of index entries leads to; many of them need not exist.

    Args:
        work: the work folder.
        files: the index, if it has been read already.
    """
    found = list(read_index(work)[0] if files is None else files)
    cases = [case for file in found for case in file.cases or ()]
    teachers = [file.teacher for file in found if file.teacher is not None]
    return _units(work, cases, teachers)


def _units(
    work: Folder, cases: Iterable[IndexedCase], teachers: Iterable[IndexedTeacher]
) -> dict[Folder, Reached]:
    units: dict[Folder, Reached] = {}
    teachers = list(teachers)
    for case in cases:
        units[case_path(work, case)] = Reached(case.digest, case, None)
        for teacher in teachers:
            path = unit_path(work, teacher, case)
            units[path] = Reached(unit_digest(teacher, case), case, teacher)
    return units


# Which student was trained from which units, as its run recorded it. Nothing is loaded.


@dataclass(frozen=True)
class StudentRun:
    """A run in `students/`.

    Attributes:
        run: its name.
        finished: whether all its steps were made.
        teachers: teacher -> digest.
        cases: `dataset/case` -> digest, of training and validation.
    """

    run: str
    finished: bool
    teachers: Mapping[str, str]
    cases: Mapping[str, str]

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
    said += [f"{group} ({n} run{'s' if n > 1 else ''})" for group, n in groups.items()]
    return ", ".join(sorted(said)) or "–"


# Sizes, ages and differences as people read them.


def megabytes(num_bytes: int) -> str:
    """A size."""
    for limit, unit in ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if num_bytes >= limit:
            return f"{num_bytes / limit:.1f} {unit}"
    return f"{num_bytes} B"


def counted(number: int, what: str) -> str:
    """`1 unit`, `2 units`."""
    return f"{number} {what}{'' if number == 1 else 's'}"


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
    """A table of `field: old -> new` lines, each once, with all that it holds for.

    Args:
        title: of the table.
        arrow: what stands on its two sides, as `there -> now`.
        changes: name of what changed, and its lines.
    """
    names: dict[str, list[str]] = {}
    for name, lines in changes:
        for line in lines:
            names.setdefault(line, []).append(name)
    if names:
        rows = [[*line.split(": ", 1), ", ".join(of)] for line, of in names.items()]
        print_table(title, ["input", arrow, "in"], rows)
