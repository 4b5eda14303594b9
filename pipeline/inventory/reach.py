"""Which units the index leads to: from one registry, or from any that was ever cached here."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from pipeline.admission.evidence import evidence_file
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
from pipeline.data.registry import Registry
from pipeline.errors import CacheStale
from pipeline.folder import Folder


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
