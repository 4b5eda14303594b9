"""`cache verify`: can every unit be trusted? What cannot is named, and can be removed."""

from __future__ import annotations

from collections.abc import Sequence, Set
from dataclasses import dataclass, field
from typing import Any, Literal

from pipeline.cache.index import read_index
from pipeline.cache.places import Place, find_units, unit_bytes
from pipeline.cache.store import remove_unit
from pipeline.consensus.evidence import unreadable_evidence
from pipeline.data.registry import Registry
from pipeline.folder import Folder, remove
from pipeline.log import Log, print_table
from pipeline.review.units import (
    Reached,
    cheap_problems,
    counted,
    deep_problems,
    index_reach,
    megabytes,
    registry_reach,
)

_MOST_ROWS = 60
State = Literal["missing", "damaged"]


@dataclass(frozen=True)
class Finding:
    """Something that is not as it must be.

    Attributes:
        unit: its name, or that of an index entry.
        path: where.
        state: missing: the registry calls for it and it is not there; damaged: it cannot be used.
        what: in words, one per problem.
    """

    unit: str
    path: Folder
    state: State
    what: tuple[str, ...]


@dataclass
class Verification:
    """What was looked at and what was found.

    Attributes:
        deep: whether every byte was read.
        checked: units that were there.
        num_bytes: that they take on disk.
        findings: what is wrong, in the order of the work folder.
        unreached: units that no index entry leads to and that were not looked at.
    """

    deep: bool
    checked: int = 0
    num_bytes: int = 0
    findings: list[Finding] = field(default_factory=list)
    unreached: int = 0

    @property
    def damaged(self) -> list[Finding]:
        """What can be removed, so that the next run makes it anew."""
        return [finding for finding in self.findings if finding.state == "damaged"]

    def summary(self) -> str:
        """One line."""
        how = "every byte" if self.deep else "receipts and sizes"
        wrong = counted(len(self.findings), "thing") if self.findings else "nothing"
        rest = f" ({self.unreached} more that no index entry leads to: --all)"
        return (
            f"verify: {counted(self.checked, 'unit')}, {megabytes(self.num_bytes)}, by {how}: "
            f"{wrong} wrong{rest if self.unreached else ''}"
        )

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return {
            "deep": self.deep,
            "checked": self.checked,
            "bytes": self.num_bytes,
            "unreached": self.unreached,
            "findings": [
                {"unit": f.unit, "path": str(f.path), "state": f.state, "what": list(f.what)}
                for f in self.findings
            ],
        }


def verify(
    work: Folder,
    registry: Registry | None,
    *,
    deep: bool,
    everything: bool,
    log: Log,
) -> Verification:
    """Checks the units of a work folder.

    Args:
        work: the work folder.
        registry: what it calls for must be there; None leaves that open.
        deep: read every byte: checksums, values, shapes. Else receipts, presence and sizes.
        everything: also units that no index entry leads to.
        log: where progress goes.
    """
    files, unreadable = read_index(work)
    reached = index_reach(work, files)
    found = Verification(deep)
    for path, why in unreadable.items():
        found.findings.append(Finding(f"index entry {path.name}", path, "damaged", (why,)))
    for path, why in unreadable_evidence(work).items():
        found.findings.append(Finding(f"evidence {path.name}", path, "damaged", (why,)))
    all_places = find_units(work)
    places = [place for place in all_places if everything or place.path in reached]
    found.unreached = len(all_places) - len(places)
    if registry is not None:
        found.findings += _missing(work, registry, {place.path for place in all_places})
    with log.progress("units", len(places)) as advance:
        for place in places:
            problems = check(place, reached.get(place.path), deep=deep)
            found.checked += 1
            found.num_bytes += unit_bytes(place.path)
            if problems:
                found.findings.append(Finding(place.name, place.path, "damaged", tuple(problems)))
            advance(place.name)
    return found


def check(place: Place, reached: Reached | None, *, deep: bool) -> list[str]:
    """What is wrong with one unit."""
    expect = None if reached is None else reached.digest
    return deep_problems(place, expect) if deep else cheap_problems(place, expect)


def repair(work: Folder, found: Verification) -> list[Folder]:
    """Removes what was found damaged and still is; the next run of stage one makes it anew.

    Returns:
        What was removed.

    Raises:
        WorkFolderError: something cannot be removed.
    """
    reached = index_reach(work)
    places = {place.path: place for place in find_units(work)}
    removed = []
    for finding in found.damaged:
        place = places.get(finding.path)
        # Since it was found, another process may have replaced it.
        if place is not None and not check(place, reached.get(place.path), deep=found.deep):
            continue
        if place is not None:
            remove_unit(place.path)
        else:
            remove(finding.path)
        removed.append(finding.path)
    return removed


def print_verification(found: Verification) -> None:
    """A table of what is wrong, for people."""
    rows = [[f.unit, f.state, "; ".join(f.what)] for f in found.findings[:_MOST_ROWS]]
    if rows:
        more = f", the first {len(rows)}" if len(found.findings) > len(rows) else ""
        print_table(f"Wrong{more}", ["unit", "", "what"], rows)


def _missing(work: Folder, registry: Registry, there: Set[Folder]) -> Sequence[Finding]:
    reach = registry_reach(work, registry)
    gone = [
        Finding(name, work / "index", "missing", (error.what,))
        for name, error in reach.absent.items()
    ]
    gone += [
        Finding(unit.name, path, "missing", ("not in the cache",))
        for path, unit in reach.units.items()
        if path not in there
    ]
    return gone
