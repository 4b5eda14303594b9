"""Why a unit is reused or not, and where two caches differ: `cache why CASE`, `cache diff A B`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Set
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Literal

from pipeline.cache.cases import identify_case
from pipeline.cache.index import (
    IndexedCase,
    IndexedTeacher,
    case_path,
    read_index,
    unit_digest,
    unit_path,
)
from pipeline.cache.places import Place, find_units
from pipeline.cache.receipt import Receipt, read_receipt
from pipeline.cache.schema import Inputs, StorageConfig, differing
from pipeline.config import short
from pipeline.data.entries import CaseFiles
from pipeline.data.registry import Registry
from pipeline.errors import CacheError, CacheMissing, ConfigError, PipelineError, RegistryError
from pipeline.folder import Folder
from pipeline.log import print_table
from pipeline.networks.windows import WindowConfig
from pipeline.review.units import accepted_in_words, counted, megabytes, print_changes
from pipeline.teachers.load import open_teacher

# `cache why CASE`: would stage one reuse a unit, and if not, what is different, field by field.

Verdict = Literal["reused", "made", "made again", "left out", "unknown"]


@dataclass(frozen=True)
class Reason:
    """What the next run of stage one would do about one unit.

    Attributes:
        unit: its name.
        verdict: reused; made: there is none; made again: it is damaged; left out: by its split;
            unknown: its digest cannot be computed here.
        because: in words.
        nearest: the unit of this case and teacher that differs least; None if there is no other.
        differences: `field: its value -> value now`, against the nearest.
    """

    unit: str
    verdict: Verdict
    because: str
    nearest: Folder | None = None
    differences: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return {
            "unit": self.unit,
            "verdict": self.verdict,
            "because": self.because,
            "nearest": None if self.nearest is None else str(self.nearest),
            "differences": list(self.differences),
        }


def why(
    work: Folder,
    registry: Registry,
    case: str,
    *,
    window: WindowConfig,
    storage: StorageConfig,
    splits: Sequence[str] = ("train", "validation", "test"),
) -> list[Reason]:
    """Explains the case unit and every teacher's unit of one case; hashes its files and weights.

    Args:
        work: the work folder.
        registry: what exists.
        case: `dataset/case`.
        window: as stage one would be run.
        storage: likewise.
        splits: likewise.

    Raises:
        RegistryError: no such case.
        GeometryError: its files cannot be read.
    """
    source = _find(registry, case)
    if source.split not in splits:
        because = f"it is in split {source.split}, which these settings do not name"
        return [Reason(case, "left out", because)]
    grid = registry.grid.spacing_mm
    indexed, inputs = identify_case(registry, source, spacing_mm=grid, storage=storage)
    places = find_units(work, dataset=source.dataset, case=source.case)
    own = [place for place in places if place.teacher is None]
    there = {path: receipt.inputs for path, receipt in _receipts(own).items()}
    reasons = [_reason(case, case_path(work, indexed), indexed.digest, inputs, there)]
    for name in registry.teachers:
        unit = f"{name} x {case}"
        try:
            teacher = open_teacher(
                name, registry, window=window, storage=storage, device="cpu", window_batch=1
            ).indexed
        except PipelineError as error:
            reasons.append(Reason(unit, "unknown", f"the teacher cannot be loaded: {error}"))
            continue
        theirs = [place for place in places if place.teacher == name]
        reasons.append(_teacher_reason(work, unit, teacher, indexed, theirs))
    return reasons


def _teacher_reason(
    work: Folder, unit: str, teacher: IndexedTeacher, case: IndexedCase, places: Sequence[Place]
) -> Reason:
    index = {
        file.teacher.digest: file.teacher.inputs
        for file in read_index(work)[0]
        if file.teacher is not None
    }
    there = {path: _explained(receipt, index) for path, receipt in _receipts(places).items()}
    wanted = {**teacher.inputs, "image_sha256": case.image_sha256}
    path = unit_path(work, teacher, case)
    return _reason(unit, path, unit_digest(teacher, case), wanted, there)


def _reason(
    unit: str, path: Folder, expect: str, wanted: Inputs, there: Mapping[Folder, Inputs]
) -> Reason:
    try:
        receipt = read_receipt(path, expect=expect)
    except CacheMissing:
        pass
    except CacheError as error:
        return Reason(unit, "made again", f"what is there is damaged: {error.what}", path)
    else:
        because = f"same digest {short(receipt.digest)}, written {receipt.written}"
        because += accepted_in_words(receipt.notes)
        return Reason(unit, "reused", because, path)
    compared = {other: differing(inputs, wanted) for other, inputs in there.items()}
    if not compared:
        return Reason(unit, "made", "the cache holds nothing of it")
    nearest = min(compared, key=lambda other: (len(compared[other]), str(other)))
    lines = tuple(compared[nearest])
    because = f"differs in {counted(len(lines), 'input')} from the nearest that is cached"
    return Reason(unit, "made", because, nearest, lines)


def _explained(receipt: Receipt, index: Mapping[str, Inputs]) -> Inputs:
    """A teacher unit's inputs, with those that its teacher's digest is of, where they are known."""
    inputs = dict(receipt.inputs)
    teacher = receipt.teacher_inputs or index.get(inputs["teacher_digest"])
    if teacher is None:
        return inputs
    del inputs["teacher_digest"]
    return {**teacher, **inputs}


def _receipts(places: Sequence[Place]) -> dict[Folder, Receipt]:
    found = {}
    for place in places:
        with suppress(CacheError):
            found[place.path] = read_receipt(place.path)
    return found


def _find(registry: Registry, case: str) -> CaseFiles:
    dataset, _, name = case.partition("/")
    if dataset not in registry.datasets:
        known = ", ".join(registry.datasets)
        fix = f"A case is named dataset/case; datasets: {known}."
        raise RegistryError(f"there is no dataset {dataset!r}.", where=registry.path, fix=fix)
    sources = {source.case: source for source in registry.cases(dataset)}
    if name not in sources:
        some = ", ".join(list(sources)[:8])
        raise RegistryError(
            f"dataset {dataset} has no case {name!r} in any split.",
            where=registry.path,
            fix=f"Its cases: {some}{' and others' if len(sources) > 8 else ''}.",
        )
    return sources[name]


def print_reasons(reasons: Sequence[Reason]) -> None:
    """A table of verdicts, then what differs, for people."""
    rows = [[reason.unit, reason.verdict, reason.because] for reason in reasons]
    print_table("The next cache-teachers", ["unit", "", "because"], rows)
    print_changes("What differs", "there -> now", [(r.unit, r.differences) for r in reasons])


# `cache diff A B`: in which cases, teachers and settings two work folders differ.

Key = tuple[str, str]
"""(`dataset/case` or teacher, digest)."""


@dataclass(frozen=True)
class Change:
    """A case or teacher that is in both folders, made from other inputs.

    Attributes:
        name: `dataset/case`, or the teacher.
        a: its digest in A, 16 digits.
        b: the digest in B that differs least from it.
        differences: `field: in A -> in B`.
    """

    name: str
    a: str
    b: str
    differences: tuple[str, ...]


@dataclass(frozen=True)
class Side:
    """How two folders differ in one kind of thing.

    Attributes:
        only_a: in A alone.
        only_b: in B alone.
        changed: in both, from other inputs.
        same: in both, from the same inputs.
    """

    only_a: tuple[str, ...]
    only_b: tuple[str, ...]
    changed: tuple[Change, ...]
    same: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        changed = [{**vars(c), "differences": list(c.differences)} for c in self.changed]
        only = {"only_a": list(self.only_a), "only_b": list(self.only_b)}
        return {**only, "changed": changed, "same": list(self.same)}


@dataclass(frozen=True)
class Difference:
    """Two work folders side by side.

    Attributes:
        a: the first.
        b: the second.
        cases: case units, as `dataset/case`.
        teachers: by name.
        units: teacher units of teachers that are the same in both.
        other_bytes: units of one digest whose arrays hold other bytes: made on another device.
        num_bytes: of all units: in A, in B, and of those that both have.
        unreadable: units without a valid receipt, which are in neither.
    """

    a: Folder
    b: Folder
    cases: Side
    teachers: Side
    units: Side
    other_bytes: tuple[str, ...]
    num_bytes: tuple[int, int, int]
    unreadable: tuple[str, ...]

    @property
    def same(self) -> bool:
        """Whether there is no difference at all."""
        sides = (self.cases, self.teachers, self.units)
        unlike = any(side.only_a or side.only_b or side.changed for side in sides)
        return not (unlike or self.other_bytes or self.unreadable)

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        a, b, both = self.num_bytes
        return {
            "a": str(self.a),
            "b": str(self.b),
            "same": self.same,
            "cases": self.cases.to_json(),
            "teachers": self.teachers.to_json(),
            "units": self.units.to_json(),
            "other_bytes": list(self.other_bytes),
            "bytes": {"a": a, "b": b, "both": both},
            "unreadable": list(self.unreadable),
        }


@dataclass(frozen=True)
class _Contents:
    cases: Mapping[Key, Inputs]
    teachers: Mapping[Key, Inputs]
    units: Mapping[Key, Inputs]
    receipts: Mapping[str, Receipt]
    unreadable: tuple[str, ...]


def diff(a: Folder, b: Folder) -> Difference:
    """Compares two work folders by their receipts; no array is read.

    Raises:
        ConfigError: one of them is no work folder.
    """
    first, second = _read(a), _read(b)
    same_teachers = set(first.teachers) & set(second.teachers)
    both = set(first.receipts) & set(second.receipts)
    sizes = [
        sum(side.receipts[name].num_bytes for name in names)
        for side, names in ((first, first.receipts), (second, second.receipts), (first, both))
    ]
    unlike = [n for n in sorted(both) if first.receipts[n].contents != second.receipts[n].contents]
    return Difference(
        a,
        b,
        cases=_side(first.cases, second.cases),
        teachers=_side(first.teachers, second.teachers),
        units=_side(
            {key: inputs for key, inputs in first.units.items() if _of(key, same_teachers)},
            {key: inputs for key, inputs in second.units.items() if _of(key, same_teachers)},
        ),
        other_bytes=tuple(unlike),
        num_bytes=(sizes[0], sizes[1], sizes[2]),
        unreadable=tuple(f"{n} in A" for n in first.unreadable)
        + tuple(f"{n} in B" for n in second.unreadable),
    )


def print_difference(found: Difference) -> None:
    """Tables, for people."""
    sides = {"cases": found.cases, "teachers": found.teachers, "units": found.units}
    rows = [
        [what, *(str(len(n)) for n in (side.only_a, side.only_b, side.changed, side.same))]
        for what, side in sides.items()
    ]
    title = f"A {found.a}, B {found.b}"
    print_table(title, ["", "only in A", "only in B", "other inputs", "same"], rows)
    only = [
        [name, where]
        for side in sides.values()
        for where, names in (("A", side.only_a), ("B", side.only_b))
        for name in names
    ]
    if only:
        print_table("In one of them", ["", "only in"], only)
    changed = [change for side in sides.values() for change in side.changed]
    print_changes("What differs", "A -> B", [(c.name, c.differences) for c in changed])
    if found.other_bytes:
        rows = [[name] for name in found.other_bytes]
        print_table("Same inputs, other bytes (made on another device?)", ["unit"], rows)
    if found.unreadable:
        print_table("No valid receipt", ["unit"], [[name] for name in found.unreadable])
    a, b, both = (megabytes(n) for n in found.num_bytes)
    print_table("Bytes", ["A", "B", "in both"], [[a, b, both]])


def _of(key: Key, teachers: Set[Key]) -> bool:
    name, _, _ = key[0].partition(" x ")
    teacher, _, tag = name.rpartition("@")
    return (teacher, tag) in teachers


def _read(work: Folder) -> _Contents:
    places = find_units(work)
    if not places and not (work / "index").is_dir():
        raise ConfigError(
            "there is no cache here.", where=work, fix="Give two folders that stage one has filled."
        )
    index = {
        short(file.teacher.digest): file.teacher.inputs
        for file in read_index(work)[0]
        if file.teacher is not None
    }
    cases: dict[Key, Inputs] = {}
    teachers: dict[Key, Inputs] = {}
    units: dict[Key, Inputs] = {}
    receipts: dict[str, Receipt] = {}
    unreadable: list[str] = []
    for place in places:
        try:
            receipt = read_receipt(place.path)
        except CacheError:
            unreadable.append(place.name)
            continue
        receipts[str(place.path).removeprefix(f"{work}/")] = receipt
        if place.teacher is None:
            cases[place.case_name, place.tag] = receipt.inputs
            continue
        said = receipt.teacher_inputs or index.get(place.teacher_tag, {})
        teachers[place.teacher, place.teacher_tag] = said
        units[_unit_key(place)] = receipt.inputs
    return _Contents(cases, teachers, units, receipts, tuple(unreadable))


def _unit_key(place: Place) -> Key:
    return f"{place.teacher}@{place.teacher_tag} x {place.case_name}", place.tag


def _side(a: Mapping[Key, Inputs], b: Mapping[Key, Inputs]) -> Side:
    """Each that has another digest in B is compared with the one in B that differs least."""
    same = sorted(set(a) & set(b))
    names_a, names_b = {name for name, _ in a}, {name for name, _ in b}
    changed = []
    for name, digest in sorted(set(a) - set(b)):
        others = [key for key in b if key[0] == name and key not in a] or [
            key for key in b if key[0] == name
        ]
        if others:
            lines = {key: differing(a[name, digest], b[key]) for key in others}
            nearest = min(others, key=lambda key: (len(lines[key]), key))
            changed.append(Change(name, digest, nearest[1], tuple(lines[nearest])))
    paired = {(change.name, change.b) for change in changed}
    for name, digest in sorted(set(b) - set(a) - paired):
        others = [key for key in a if key[0] == name]
        if others:
            lines = {key: differing(a[key], b[name, digest]) for key in others}
            nearest = min(others, key=lambda key: (len(lines[key]), key))
            changed.append(Change(name, nearest[1], digest, tuple(lines[nearest])))
    return Side(
        only_a=tuple(sorted(names_a - names_b)),
        only_b=tuple(sorted(names_b - names_a)),
        changed=tuple(changed),
        same=tuple(name for name, _ in same),
    )
