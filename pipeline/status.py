"""What is done, missing, stale or damaged: read from receipts and digests, never from a log."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from pipeline.cache.index import (
    IndexedCase,
    IndexedTeacher,
    case_path,
    read_dataset_index,
    unit_digest,
    unit_path,
)
from pipeline.cache.receipt import read_receipt
from pipeline.config import file_sha256
from pipeline.data.files import CaseFiles
from pipeline.data.registry import Registry
from pipeline.errors import CacheError, CacheMissing, CacheStale
from pipeline.folder import Folder, matching
from pipeline.identity import read_teacher
from pipeline.inventory.students import run_folders
from pipeline.log import print_table

State = Literal["done", "missing", "stale", "damaged"]
STATES: tuple[State, ...] = ("done", "missing", "stale", "damaged")


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
                current &= source is not None and source.split == entry.split
            units[dataset, "cases", case] = _state_of_case(work, entry, source, absent, current)
            for name, teacher in teachers.items():
                units[dataset, name, case] = _state_of_unit(work, teacher, entry, current)
    return Status(units, _runs(work))


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
    found = None if source is None else _sha256(source.image)
    return found is None or found == entry.image_sha256


def _sha256(path: Path) -> str | None:
    """None: the file cannot be read here; `pipeline check` says why."""
    try:
        return file_sha256(path)
    except OSError:
        return None


def _state_of_case(
    work: Folder, entry: IndexedCase | None, source: CaseFiles | None, absent: State, current: bool
) -> State:
    """A case also holds its label, which the teachers' units do not depend on."""
    if entry is None:
        return absent
    path = case_path(work, entry)
    state = _receipt_state(path, entry.digest) if current else "stale"
    if state == "done" and source is not None and (label := _sha256(source.label)) is not None:
        return "done" if label == read_receipt(path).inputs["label_sha256"] else "stale"
    return state


def _state_of_unit(
    work: Folder, teacher: IndexedTeacher | State, entry: IndexedCase | None, current: bool
) -> State:
    if not isinstance(teacher, IndexedTeacher):
        return teacher
    if entry is None:
        return "missing"
    if not current:
        return "stale"
    return _receipt_state(unit_path(work, teacher, entry), unit_digest(teacher, entry))


def _receipt_state(path: Folder, expect: str) -> State:
    try:
        read_receipt(path, expect=expect)
    except CacheMissing:
        return "missing"
    except CacheStale:
        return "stale"
    except CacheError:
        return "damaged"
    return "done"


def _runs(work: Folder) -> dict[str, str]:
    return {
        name: "finished" if (folder / "finished.json").exists() else "unfinished"
        for name, folder in run_folders(work).items()
    }
