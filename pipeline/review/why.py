"""Why a unit is reused or not, and where two caches differ: `cache why CASE`, `cache diff A B`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

from pipeline.cache.cases import identify_case
from pipeline.cache.index import IndexedCase, IndexedTeacher, case_path, unit_digest, unit_path
from pipeline.cache.receipt import Receipt
from pipeline.cache.schema import Inputs, StorageConfig, differing
from pipeline.config import short
from pipeline.data.entries import CaseFiles
from pipeline.data.patches import WindowConfig
from pipeline.data.registry import Registry
from pipeline.errors import ConfigError, PipelineError, RegistryError, counted
from pipeline.folder import Folder
from pipeline.log import print_table, size
from pipeline.review.units import Inventory, accepted_in_words, plain, print_changes, unit_state
from pipeline.teachers.load import Teachers

T = TypeVar("T")

# `cache why CASE`: would stage one reuse a unit, and if not, what is different, field by field.


@dataclass(frozen=True)
class Reason:
    """What the next run of stage one would do about one unit.

    Attributes:
        verdict: reused; made: there is none; made again: it is damaged; left out: by its split;
            unknown: its digest cannot be computed here.
        nearest: the unit of this case and teacher that differs least; None if there is no other.
        differences: `field: its value -> value now`, against the nearest.
    """

    unit: str
    verdict: Literal["reused", "made", "made again", "left out", "unknown"]
    because: str
    nearest: Folder | None = None
    differences: tuple[str, ...] = ()


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
    Window, storage and splits are those that stage one would be run with.

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
    there = Inventory(work, dataset=source.dataset, case=source.case)
    others = {p.path: r.inputs for p, r in there.receipts.items() if p.teacher is None}
    reasons = [_reason(case, case_path(work, indexed), indexed.digest, inputs, others)]
    teachers = Teachers(registry, window, storage, "cpu")
    for name in registry.teachers:
        unit = f"{name} x {case}"
        try:
            teacher = teachers.open(name).indexed
        except PipelineError as error:
            reasons.append(Reason(unit, "unknown", f"the teacher cannot be loaded: {error}"))
            continue
        reasons.append(_teacher_reason(there, unit, teacher, indexed))
    return reasons


def _teacher_reason(
    there: Inventory, unit: str, teacher: IndexedTeacher, case: IndexedCase
) -> Reason:
    others = {
        place.path: _explained(there, receipt)
        for place, receipt in there.receipts.items()
        if place.teacher == teacher.teacher
    }
    wanted = {**teacher.inputs, "image_sha256": case.image_sha256}
    path = unit_path(there.work, teacher, case)
    return _reason(unit, path, unit_digest(teacher, case), wanted, others)


def _reason(
    unit: str, path: Folder, expect: str, wanted: Inputs, others: Mapping[Folder, Inputs]
) -> Reason:
    found = unit_state(path, expect)
    if found.receipt is not None:
        because = f"same digest {short(found.receipt.digest)}, written {found.receipt.written}"
        because += accepted_in_words(found.receipt.notes)
        return Reason(unit, "reused", because, path)
    if found.state != "missing":
        return Reason(unit, "made again", f"what is there is damaged: {found.problem}", path)
    compared = {other: differing(inputs, wanted) for other, inputs in others.items()}
    if not compared:
        return Reason(unit, "made", "the cache holds nothing of it")
    nearest = _nearest(compared)
    lines = tuple(compared[nearest])
    because = f"differs in {counted(len(lines), 'input')} from the nearest that is cached"
    return Reason(unit, "made", because, nearest, lines)


def _nearest(compared: Mapping[T, Sequence[str]]) -> T:
    """With the fewest differences."""
    return min(compared, key=lambda other: (len(compared[other]), str(other)))


def _explained(there: Inventory, receipt: Receipt) -> Inputs:
    """A teacher unit's inputs, with those that its teacher's digest is of, where they are known."""
    teacher = there.teacher_inputs(receipt)
    if not teacher:
        return receipt.inputs
    return {**teacher, **{k: v for k, v in receipt.inputs.items() if k != "teacher_digest"}}


def _find(registry: Registry, case: str) -> CaseFiles:
    dataset, _, name = case.partition("/")
    registry.check_dataset(dataset)
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
        a, b: its digest in A, 16 digits, and the one in B that differs least from it.
        differences: `field: in A -> in B`.
    """

    name: str
    a: str
    b: str
    differences: tuple[str, ...]


@dataclass(frozen=True)
class Side:
    """How two folders differ in one kind of thing: what is in one of them alone, and what is in
    both, made from other inputs or from the same."""

    only_a: tuple[str, ...]
    only_b: tuple[str, ...]
    changed: tuple[Change, ...]
    same: tuple[str, ...]


@dataclass(frozen=True)
class WorkDifference:
    """Two work folders side by side.

    Attributes:
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
        sizes = dict(zip(("a", "b", "both"), self.num_bytes, strict=True))
        return {**plain(self), "same": self.same, "bytes": sizes}


def diff(a: Folder, b: Folder) -> WorkDifference:
    """Compares two work folders by their receipts; no array is read."""
    first, second = _contents(a), _contents(b)
    both = sorted(set(first.receipts) & set(second.receipts))
    sizes = [
        sum(side.receipts[name].num_bytes for name in names)
        for side, names in ((first, first.receipts), (second, second.receipts), (first, both))
    ]
    unlike = [n for n in both if first.receipts[n].contents != second.receipts[n].contents]
    teachers = set(first.teachers) & set(second.teachers)
    return WorkDifference(
        a,
        b,
        cases=_side(first.cases, second.cases),
        teachers=_side(first.teachers, second.teachers),
        units=_side(first.units_of(teachers), second.units_of(teachers)),
        other_bytes=tuple(unlike),
        num_bytes=(sizes[0], sizes[1], sizes[2]),
        unreadable=(
            *(f"{name} in A" for name in first.unreadable),
            *(f"{name} in B" for name in second.unreadable),
        ),
    )


@dataclass(frozen=True)
class _Contents:
    """Of one folder: inputs by key, receipts by the path within it, units without a valid one."""

    cases: dict[Key, Inputs]
    teachers: dict[Key, Inputs]
    units: dict[tuple[Key, Key], Inputs]
    receipts: dict[str, Receipt]
    unreadable: list[str]

    def units_of(self, teachers: Set[Key]) -> dict[Key, Inputs]:
        """Of these teachers alone."""
        return {unit: inputs for (of, unit), inputs in self.units.items() if of in teachers}


def _contents(work: Folder) -> _Contents:
    there = Inventory(work)
    if not there.places and not (work / "index").is_dir():
        raise ConfigError(
            "there is no cache here.", where=work, fix="Give two folders that stage one has filled."
        )
    found = _Contents({}, {}, {}, {}, [p.name for p in there.places if p not in there.receipts])
    for place, receipt in there.receipts.items():
        found.receipts[str(place.path).removeprefix(f"{work}/")] = receipt
        if place.teacher is None:
            found.cases[place.case_name, place.tag] = receipt.inputs
        else:
            teacher = place.teacher, place.teacher_tag
            unit = f"{place.teacher}@{place.teacher_tag} x {place.case_name}", place.tag
            found.teachers[teacher] = there.teacher_inputs(receipt)
            found.units[teacher, unit] = receipt.inputs
    return found


def _side(a: Mapping[Key, Inputs], b: Mapping[Key, Inputs]) -> Side:
    """Each that has another digest in B is compared with the one in B that differs least."""
    changed: dict[tuple[Key, Key], list[str]] = {}

    def compare(pairs: Sequence[tuple[Key, Key]]) -> None:
        lines = {(key, other): differing(a[key], b[other]) for key, other in pairs}
        if lines:
            nearest = _nearest(lines)
            changed[nearest] = lines[nearest]

    for key in sorted(set(a) - set(b)):
        others = [other for other in b if other[0] == key[0]]
        new = [other for other in others if other not in a]
        compare([(key, other) for other in new or others])
    paired = {other for _, other in changed}
    for key in sorted(set(b) - set(a) - paired):
        compare([(other, key) for other in a if other[0] == key[0]])
    names_a, names_b = {name for name, _ in a}, {name for name, _ in b}
    return Side(
        only_a=tuple(sorted(names_a - names_b)),
        only_b=tuple(sorted(names_b - names_a)),
        changed=tuple(
            Change(name, here, there, tuple(lines))
            for ((name, here), (_, there)), lines in changed.items()
        ),
        same=tuple(name for name, _ in sorted(set(a) & set(b))),
    )


def print_difference(found: WorkDifference) -> None:
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
    a, b, both = (size(n) for n in found.num_bytes)
    print_table("Bytes", ["A", "B", "in both"], [[a, b, both]])
