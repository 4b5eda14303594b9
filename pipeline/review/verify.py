"""`cache verify`: can every unit be trusted? What cannot is named, and can be removed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt

from pipeline.cache.places import Place, unit_bytes
from pipeline.cache.reader import Unit
from pipeline.cache.receipt import Receipt, verify_object, verify_seal
from pipeline.cache.schema import IMAGE, LABEL
from pipeline.cache.store import remove_unit
from pipeline.config import short
from pipeline.consensus.evidence import unreadable_evidence
from pipeline.data.labels import IGNORE
from pipeline.data.registry import Registry
from pipeline.data.volume import Grid
from pipeline.errors import CacheError, counted
from pipeline.folder import Folder, remove
from pipeline.log import Log, print_table, size
from pipeline.review.units import Inventory, Reached, State, registry_reach, unit_state

_MOST_ROWS = 60


@dataclass(frozen=True)
class UnitProblem:
    """Something that is not as it must be.

    Attributes:
        state: missing: the registry calls for it and it is not there; damaged: it cannot be used.
    """

    unit: str
    path: Folder
    state: State
    what: tuple[str, ...]


@dataclass
class Verification:
    """What was looked at and what was found.

    Attributes:
        unreached: units that no index entry leads to and that were not looked at.
    """

    deep: bool
    checked: int = 0
    num_bytes: int = 0
    findings: list[UnitProblem] = field(default_factory=list)
    unreached: int = 0

    @property
    def damaged(self) -> list[UnitProblem]:
        """What can be removed, so that the next run makes it anew."""
        return [finding for finding in self.findings if finding.state == "damaged"]

    def summary(self) -> str:
        """One line."""
        how = "every byte" if self.deep else "receipts and sizes"
        wrong = counted(len(self.findings), "thing") if self.findings else "nothing"
        rest = f" ({self.unreached} more that no index entry leads to: --all)"
        return (
            f"verify: {counted(self.checked, 'unit')}, {size(self.num_bytes)}, by {how}: "
            f"{wrong} wrong{rest if self.unreached else ''}"
        )


def verify(
    work: Folder, registry: Registry | None, *, deep: bool, everything: bool, log: Log
) -> Verification:
    """Checks the units of a work folder.

    Args:
        registry: what it calls for must be there; None leaves that open.
        deep: read every byte: checksums, values, shapes. Else receipts, presence and sizes.
        everything: also units that no index entry leads to.
    """
    there = Inventory(work)
    places = [place for place in there.places if everything or place.path in there.reached]
    found = Verification(deep, unreached=len(there.places) - len(places))
    unreadable = {"index entry": there.unreadable, "evidence": unreadable_evidence(work)}
    for kind, files in unreadable.items():
        found.findings += [
            UnitProblem(f"{kind} {path.name}", path, "damaged", (why,))
            for path, why in files.items()
        ]
    if registry is not None:
        found.findings += _missing(there, registry)
    with log.progress("units", len(places)) as advance:
        for place in places:
            found.checked += 1
            found.num_bytes += unit_bytes(place.path)
            if problems := tuple(check(place, there.reached.get(place.path), deep=deep)):
                found.findings.append(UnitProblem(place.name, place.path, "damaged", problems))
            advance(place.name)
    return found


def check(place: Place, reached: Reached | None, *, deep: bool) -> list[str]:
    """What is wrong with one unit."""
    expect = None if reached is None else reached.digest
    return deep_problems(place, expect) if deep else cheap_problems(place, expect)


def repair(work: Folder, found: Verification) -> list[Folder]:
    """Removes what was found damaged and still is; the next run of stage one makes it anew."""
    there = Inventory(work)
    places = {place.path: place for place in there.places}
    removed = []
    for finding in found.damaged:
        if (place := places.get(finding.path)) is None:
            remove(finding.path)
        elif check(place, there.reached.get(place.path), deep=found.deep):
            remove_unit(place.path)
        else:  # since it was found, another process has replaced it
            continue
        removed.append(finding.path)
    return removed


def print_verification(found: Verification) -> None:
    """A table of what is wrong, for people."""
    rows = [[f.unit, f.state, "; ".join(f.what)] for f in found.findings[:_MOST_ROWS]]
    if rows:
        more = f", the first {len(rows)}" if len(found.findings) > len(rows) else ""
        print_table(f"Wrong{more}", ["unit", "", "what"], rows)


def _missing(there: Inventory, registry: Registry) -> Sequence[UnitProblem]:
    reach = registry_reach(there.work, registry)
    places = {place.path for place in there.places}
    index = there.work / "index"
    return [
        *(UnitProblem(n, index, "missing", (error.what,)) for n, error in reach.absent.items()),
        *(
            UnitProblem(unit.name, path, "missing", ("not in the cache",))
            for path, unit in reach.units.items()
            if path not in places
        ),
    ]


# What is wrong with one unit: cheaply by its receipt, or deeply by every byte and number in it.


def cheap_problems(place: Place, expect: str | None = None) -> list[str]:
    """Receipt, presence, sizes, digest, and whether it lies where its inputs say. `expect` is the
    digest that it must have; None takes what its path says."""
    found = unit_state(place.path, expect)
    if found.receipt is None:
        return [found.problem.rstrip(".")]
    return _misplaced(place, found.receipt)


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
    if values.dtype.kind == "f":
        bad = int(np.count_nonzero(np.isinf(values)))
        return [f"{name} holds {bad} infinite values"] if bad else []
    if name == LABEL:
        known = {0, IGNORE, *unit.attributes["organ_ids"].values()}
        strange = sorted({int(v) for v in np.unique(values)} - known)
        return [f"label holds the values {strange}, which are no organ's"] if strange else []
    if name == IMAGE:
        return []
    return [f"{name} is {values.dtype}, neither float nor image nor label"]
