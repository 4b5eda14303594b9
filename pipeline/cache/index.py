"""The index: which digests a registry entry means now. It is how stage two finds its units.

Stage two has neither weights nor raw CTs to digest, so stage one writes, per registry entry, one
small JSON under a key that the registry alone determines. It says where to look, never what is
done: that is for receipts to say.

A run over all cases of a dataset writes one file for it. Runs that share the cases between them
write a record per case in a folder beside it, so that none overwrites what another found, without
locks; readers take both, a record before the file, and the next run over all cases folds them in.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from typing import Any

from pipeline.cache.provenance import Inputs, unit_inputs
from pipeline.cache.sealed import read_sealed, write_sealed
from pipeline.config import digest, short
from pipeline.errors import CacheStale
from pipeline.folder import Folder, matching, remove

_UNREADABLE = (OSError, ValueError, KeyError, TypeError)


@dataclass(frozen=True)
class IndexedCase:
    """A case as stage one last saw it."""

    dataset: str
    case: str
    split: str
    image_sha256: str
    digest: str

    @property
    def name(self) -> str:
        """`dataset/case`, as messages name it."""
        return f"{self.dataset}/{self.case}"


@dataclass(frozen=True)
class IndexedTeacher:
    """A teacher as stage one last saw it; `inputs` is what its digest is of."""

    teacher: str
    digest: str
    organs: tuple[str, ...]
    taps: tuple[str, ...]
    inputs: Inputs


@dataclass(frozen=True)
class IndexFile:
    """One file of the index.

    Attributes:
        path: the file.
        key: the registry's key that it was written under.
        cases: what it says of a dataset, or of one case in a case's record; None in a teacher's.
        teacher: what it says of a teacher; None in a dataset's file.
    """

    path: Folder
    key: str
    cases: tuple[IndexedCase, ...] | None
    teacher: IndexedTeacher | None


def case_path(work: Folder, case: IndexedCase) -> Folder:
    """Where a case on the student grid is."""
    return work / "cases" / case.dataset / f"{case.case}@{short(case.digest)}.zarr"


def teacher_folder(work: Folder, teacher: IndexedTeacher) -> Folder:
    """The folder of all units of one teacher with one digest."""
    return work / "teachers" / f"{teacher.teacher}@{short(teacher.digest)}"


def unit_path(work: Folder, teacher: IndexedTeacher, case: IndexedCase) -> Folder:
    """Where one teacher's numbers for one case are."""
    image = short(case.image_sha256)
    return teacher_folder(work, teacher) / case.dataset / f"{case.case}@{image}.zarr"


def unit_digest(teacher: IndexedTeacher, case: IndexedCase) -> str:
    """The digest that the receipt of such a unit must have."""
    inputs = unit_inputs(teacher_digest=teacher.digest, image_sha256=case.image_sha256)
    return digest(inputs)


def read_index(work: Folder) -> tuple[list[IndexFile], dict[Folder, str]]:
    """All that stage one has written into the index, under whatever keys.

    Returns:
        The files, and those that cannot be read -> why.
    """
    found: list[IndexFile] = []
    unreadable: dict[Folder, str] = {}
    for pattern in ("datasets/[!.]*.json", "datasets/*/[!.]*.json", "teachers/[!.]*.json"):
        for path in matching(work / "index", pattern):
            try:
                content = read_sealed(path)
                if pattern.startswith("datasets"):
                    found.append(IndexFile(path, content["key"], _cases(content), None))
                else:
                    found.append(IndexFile(path, content["key"], None, _teacher(content)))
            except _UNREADABLE as error:
                unreadable[path] = f"{type(error).__name__}: {error}"
    return found, unreadable


def write_dataset_index(work: Folder, dataset: str, key: str, cases: Sequence[IndexedCase]) -> None:
    """Records the cases of a dataset under the registry's key for it: these and no others."""
    records = case_records(work, dataset, key)
    content = {"dataset": dataset, "key": key, "cases": [asdict(case) for case in cases]}
    write_sealed(dataset_file(work, dataset, key), content)
    for record in records:  # not those that another run has added meanwhile
        remove(record)


def write_case_record(work: Folder, key: str, case: IndexedCase) -> None:
    """Records one case of a dataset, whatever other runs record of other cases meanwhile."""
    content = {"dataset": case.dataset, "key": key, "cases": [asdict(case)]}
    write_sealed(_record(work, case.dataset, key, case.case), content)


def remove_case_record(work: Folder, dataset: str, key: str, case: str) -> None:
    """What another run recorded of a case holds no longer; no error if none did."""
    remove(_record(work, dataset, key, case))


def read_dataset_index(work: Folder, dataset: str, key: str) -> list[IndexedCase]:
    """The cases of a dataset.

    Raises:
        CacheStale: stage one has not seen this registry entry.
    """
    with _stale_if_unreadable(f"dataset {dataset}", work):
        recorded: dict[str, IndexedCase] = {}
        for path in case_records(work, dataset, key):
            with suppress(FileNotFoundError):  # just folded into the file, which is read next
                recorded |= _by_name(read_sealed(path))
        try:
            whole = _by_name(read_sealed(dataset_file(work, dataset, key)))
        except FileNotFoundError:
            if not recorded:
                raise
            whole = {}
    if not recorded:
        return list(whole.values())
    return sorted((whole | recorded).values(), key=lambda case: case.case)


def case_records(work: Folder, dataset: str, key: str) -> list[Folder]:
    """The records of single cases under the registry's key for a dataset."""
    return matching(dataset_file(work, dataset, key).with_suffix(""), "[!.]*.json")


def write_teacher_index(work: Folder, key: str, teacher: IndexedTeacher) -> None:
    """Records a teacher's digest under the registry's key for it."""
    write_sealed(teacher_file(work, teacher.teacher, key), {"key": key, **asdict(teacher)})


def read_teacher_index(work: Folder, teacher: str, key: str) -> IndexedTeacher:
    """A teacher's digest, organs and taps.

    Raises:
        CacheStale: stage one has not seen this registry entry.
    """
    path = teacher_file(work, teacher, key)
    with _stale_if_unreadable(f"teacher {teacher}", work):
        return _teacher(read_sealed(path))


def dataset_file(work: Folder, dataset: str, key: str) -> Folder:
    """The index file of a dataset under a registry's key for it."""
    return work / "index" / "datasets" / f"{dataset}.{short(key)}.json"


def teacher_file(work: Folder, teacher: str, key: str) -> Folder:
    """The index file of a teacher under a registry's key for it."""
    return work / "index" / "teachers" / f"{teacher}.{short(key)}.json"


def _record(work: Folder, dataset: str, key: str, case: str) -> Folder:
    return dataset_file(work, dataset, key).with_suffix("") / f"{case}.json"


def _by_name(content: Mapping[str, Any]) -> dict[str, IndexedCase]:
    return {case.case: case for case in _cases(content)}


def _cases(content: Mapping[str, Any]) -> tuple[IndexedCase, ...]:
    return tuple(IndexedCase(**case) for case in content["cases"])


def _teacher(content: Mapping[str, Any]) -> IndexedTeacher:
    organs, taps = tuple(content["organs"]), tuple(content["taps"])
    return IndexedTeacher(
        content["teacher"], content["digest"], organs, taps, dict(content["inputs"])
    )


@contextmanager
def _stale_if_unreadable(what: str, work: Folder) -> Iterator[None]:
    """Absent, damaged, or written by a version with other fields: stage one writes it anew."""
    try:
        yield
    except _UNREADABLE as error:
        raise CacheStale(
            f"{what} is not in the cache as the registry describes it now.",
            where=work,
            fix="Run `pipeline cache-teachers` with this registry; what is still valid is reused.",
        ) from error
