"""`cache gc`: what no named registry can reach; nothing that is not laid out as a cache goes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from pipeline.cache.identity import entries_of_others
from pipeline.cache.places import Place, dead_temporaries, unit_bytes
from pipeline.cache.store import remove_unit
from pipeline.consensus.evidence import evidence_files
from pipeline.data.registry import Registry
from pipeline.errors import ConfigError
from pipeline.folder import Folder, remove
from pipeline.log import Log, print_table, size
from pipeline.review.units import (
    Inventory,
    by_folder,
    in_few_words,
    plain,
    registry_reach,
    seconds_since,
    student_runs,
    unit_state,
    used_by,
)

_RECHECK_EVERY = 32
"""Removals after which the index is read again, for a stage that runs meanwhile."""


@dataclass(frozen=True)
class Garbage:
    """What can go, and what stays for now.

    Attributes:
        units: case and teacher units that no registry reaches.
        index_files: index entries of none of the registries, or unreadable, and evidence of
            teachers that none of them has.
        temporaries: of processes of this host that no longer live.
        young: case units that nobody reaches yet: stage one may be about to index them.
        students: unit -> runs that were trained on it.
        others: registries that are not named and whose entries call for something: it stays.
    """

    units: tuple[Place, ...]
    index_files: tuple[Folder, ...]
    temporaries: tuple[Folder, ...]
    num_bytes: dict[Folder, int]
    young: tuple[Place, ...]
    students: dict[Folder, list[str]]
    others: tuple[str, ...]

    @property
    def total(self) -> int:
        """Bytes that removing it frees."""
        return sum(self.num_bytes.values())

    @property
    def count(self) -> int:
        """How many units, entries and temporaries."""
        return len(self.num_bytes)

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        units = [
            {"unit": place.name, "path": str(path := place.path), "bytes": self.num_bytes[path],
             "students": self.students[path]}
            for place in self.units
        ]  # fmt: skip
        return {
            "units": units,
            "index_files": plain(self.index_files),
            "temporaries": plain(self.temporaries),
            "kept_young": [str(place.path) for place in self.young],
            "kept_for": list(self.others),
            "bytes": self.total,
        }


def find_garbage(work: Folder, registries: Sequence[Registry], *, grace_hours: float) -> Garbage:
    """Looks for what none of the registries reaches; removes nothing.

    Args:
        grace_hours: unreached case units that are younger stay. Stage one writes all case units
            before it indexes them; teachers' units are indexed before they are written.

    Raises:
        ConfigError: no registry is named, or one is not in the index as it stands: what it needs
            cannot be told from what nobody needs.
    """
    there = Inventory(work)
    kept, entries, others = _reached(there, registries)
    unreached = [place for place in there.places if place.path not in kept]
    young = dict.fromkeys(p for p in unreached if _is_young(p, grace_hours))
    runs = student_runs(work)
    old = [place for place in unreached if place not in young]
    kept_files = (*(file.path for file in there.index), *there.unreadable, *evidence_files(work))
    orphans = [path for path in kept_files if path not in entries]
    dead = dead_temporaries(work)
    paths = [*(place.path for place in old), *orphans, *dead]
    return Garbage(
        tuple(old),
        tuple(orphans),
        tuple(dead),
        {path: unit_bytes(path) for path in paths},
        tuple(young),
        {place.path: used_by(place, runs) for place in old},
        others,
    )


def remove_garbage(
    work: Folder, registries: Sequence[Registry], garbage: Garbage, *, log: Log
) -> tuple[int, int]:
    """Removes what was found, except what a registry has come to reach since; returns how many
    things went, and their bytes."""
    gone: list[Folder] = []
    kept, entries, _ = _reached(Inventory(work), registries)
    with log.progress("units removed", len(garbage.units)) as advance:
        for number, place in enumerate(garbage.units):
            if number % _RECHECK_EVERY == 0:
                kept, entries, _ = _reached(Inventory(work), registries)
            if place.path not in kept:
                remove_unit(place.path)
                gone.append(place.path)
            advance(place.name)
    for path in (*(p for p in garbage.index_files if p not in entries), *garbage.temporaries):
        remove(path)
        gone.append(path)
    return len(gone), sum(garbage.num_bytes[path] for path in gone)


def print_garbage(garbage: Garbage) -> None:
    """A table by dataset and teacher, for people."""
    rows = [
        [what, str(len(places)), size(sum(garbage.num_bytes[place.path] for place in places)),
         in_few_words({run for place in places for run in garbage.students[place.path]})]
        for what, places in by_folder(garbage.units).items()
    ]  # fmt: skip
    for what, paths in (("index", garbage.index_files), ("unfinished", garbage.temporaries)):
        if paths:
            taken = sum(garbage.num_bytes[path] for path in paths)
            rows.append([what, str(len(paths)), size(taken), "–"])
    print_table("No registry named here reaches", ["", "number", "bytes", "students"], rows)


def _reached(
    there: Inventory, registries: Sequence[Registry]
) -> tuple[set[Folder], set[Folder], tuple[str, ...]]:
    """Units and index entries of all registries, and of others for which the index has entries;
    which these are."""
    if not registries:
        raise ConfigError(
            "no registry is named.",
            where="pipeline cache gc",
            fix="Name all whose cached units are to stay.",
        )
    units: set[Folder] = set()
    entries: set[Folder] = set()
    for registry in registries:
        reach = registry_reach(there.work, registry)
        if reach.absent:
            raise ConfigError(
                f"{next(iter(reach.absent.values())).what} What this registry needs cannot be told "
                "from what nobody needs. Nothing was removed.",
                where=f"{registry.path}, {there.work}",
                fix="Run `pipeline cache-teachers` with it first; what is valid is reused.",
            )
        units |= set(reach.units)
        entries |= reach.index_files
    unnamed = [file for file in there.index if file.path not in entries]
    if not (others := entries_of_others(there.work, registries, unnamed)):
        return units, entries, ()
    cases = {case for file in others for case in file.cases or ()}
    teachers = {file.teacher.digest for file in others if file.teacher is not None}
    units |= {
        path
        for path, of in there.reached.items()
        if of.case in cases or (of.teacher is not None and of.teacher.digest in teachers)
    }
    # Whose a measurement is, only its registry can tell.
    entries |= {*(file.path for file in others), *evidence_files(there.work)}
    names = {f"{o.registry[0]} on {o.host}" for file in others if (o := file.origin) is not None}
    return units, entries, tuple(sorted(names))


def _is_young(place: Place, grace_hours: float) -> bool:
    receipt = unit_state(place.path).receipt if place.teacher is None else None
    return receipt is not None and seconds_since(receipt.written) < grace_hours * 3600
