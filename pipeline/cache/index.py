"""The index: which digests a registry entry means now. It is how stage two finds its units.

Stage two has neither weights nor raw CTs to digest, so stage one writes a small JSON per case and
per teacher, under a key that the registry alone determines. It says where to look, never what is
done: that is for receipts to say.

Earlier versions wrote one file for all cases of a dataset. It has the fields of a record, and is
read as one, before the records; the next run of stage one writes records in its place.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from typing import Any, Final

from pipeline.cache.schema import Inputs, unit_inputs
from pipeline.cache.store import json_text, write_json
from pipeline.config import FileStamp, digest, short
from pipeline.errors import CacheStale
from pipeline.folder import Folder, is_local, matching, read_text, remove, unreachable

# Raised when entries of before must not be believed: 1 knew cases by the registry's text.
VERSION: Final = 2
_ATTEMPTS = 3
_UNREADABLE = (OSError, ValueError, KeyError, TypeError)


@dataclass(frozen=True)
class Origin:
    """For whom an entry was written, and from what. A place is spelled as an absolute path and, of
    a local work folder, as seen from there: a project that is moved or copied with its work folder
    keeps the second.

    Attributes:
        registry: the registry's file.
        place: root of the dataset, or the teacher's weights.
        files: what below the root a dataset's files are, as a digest; empty for a teacher.
        host: that wrote it.
    """

    registry: tuple[str, ...]
    place: tuple[str, ...]
    files: str
    host: str

    def same_place(self, other: Origin) -> bool:
        """Whether both speak of the same files, whatever those hold."""
        return self.files == other.files and bool({*self.place} & {*other.place})

    def same_project(self, other: Origin) -> bool:
        """Whether one may change what the other wrote: of one registry, or of the same files."""
        return bool({*self.registry} & {*other.registry}) or self.same_place(other)


@dataclass(frozen=True)
class IndexedCase:
    """A case as stage one last saw it; `image` and `label` are what its files were then."""

    dataset: str
    case: str
    split: str
    image_sha256: str
    digest: str
    image: FileStamp | None = field(default=None, compare=False)
    label: FileStamp | None = field(default=None, compare=False)
    fold: int | None = None  # `split` is then as while the first fold validates

    @property
    def name(self) -> str:
        """`dataset/case`, as messages name it."""
        return f"{self.dataset}/{self.case}"


@dataclass(frozen=True)
class IndexedDataset:
    """A dataset as stage one last saw it.

    Attributes:
        left_out: names of cases that failed, or are of a split that was not asked for.
        origins: of the records, without repetition.
        whole: there are as many records as each of them says.
    """

    cases: list[IndexedCase]
    left_out: frozenset[str]
    origins: tuple[Origin, ...]
    whole: bool = True


@dataclass(frozen=True)
class IndexedTeacher:
    """A teacher as stage one last saw it; `inputs` is what its digest is of, `weights` what the
    files of its weights were."""

    teacher: str
    digest: str
    organs: tuple[str, ...]
    taps: tuple[str, ...]
    inputs: Inputs
    weights: Mapping[str, FileStamp] = field(default_factory=dict, compare=False)
    origin: Origin | None = field(default=None, compare=False)


@dataclass(frozen=True)
class IndexFile:
    """One file of the index.

    Attributes:
        key: the registry's key that it was written under.
        cases: the case of a record, none if it was left out; None in a teacher's.
        teacher: what it says of a teacher; None in a case's.
    """

    path: Folder
    name: str
    key: str
    origin: Origin | None
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
                key, origin = content["key"], _origin(content)
                if pattern.startswith("datasets"):
                    name, cases = content["dataset"], _cases(content)
                    found.append(IndexFile(path, name, key, origin, cases, None))
                else:
                    name, teacher = content["teacher"], _teacher(content)
                    found.append(IndexFile(path, name, key, origin, None, teacher))
            except _UNREADABLE as error:
                unreadable[path] = f"{type(error).__name__}: {error}"
    return found, unreadable


def write_dataset_index(
    work: Folder,
    dataset: str,
    key: str,
    cases: Sequence[IndexedCase],
    *,
    origin: Origin | None = None,
    left_out: Iterable[str] = (),
) -> None:
    """Records the cases of a dataset under the registry's key for it, each in a file: these, those
    that were left out as such, and no others."""
    others = {*dataset_entries(work, dataset, key)}  # not those that another run adds meanwhile
    whom = None if origin is None else asdict(origin)
    found: list[tuple[str, list[Any], list[str]]]
    found = [(case.case, [_plain(case)], []) for case in cases]
    found += [(name, [], [name]) for name in left_out]
    for name, known, lost in found:
        record = dataset_folder(work, dataset, key) / f"{name}.json"
        content = {"version": VERSION, "dataset": dataset, "key": key, "origin": whom}
        write_sealed(record, content | {"of": len(found), "cases": known, "left_out": lost})
        others.discard(record)
    for path in others:
        remove(path)


def read_dataset_index(work: Folder, dataset: str, key: str) -> list[IndexedCase]:
    """The cases of a dataset; see `read_indexed_dataset`."""
    return read_indexed_dataset(work, dataset, key).cases


def read_indexed_dataset(work: Folder, dataset: str, key: str) -> IndexedDataset:
    """A dataset, by the records of its cases, in order of their names.

    Raises:
        CacheStale: stage one has not seen this registry entry.
    """
    cases: dict[str, IndexedCase] = {}
    left_out: set[str] = set()
    origins: dict[Origin, None] = {}
    with _stale_if_unreadable("dataset", dataset, work):
        contents = _contents(work, dataset, key)
        for content in contents:
            seen = {case.case: case for case in _cases(content)}
            left_out = (left_out - {*seen}) | {*content["left_out"]}
            cases = {name: case for name, case in (cases | seen).items() if name not in left_out}
            if (origin := _origin(content)) is not None:
                origins[origin] = None
    found = sorted(cases.values(), key=lambda case: case.case)
    number = len(found) + len(left_out)
    whole = all(content.get("of", number) == number for content in contents)
    return IndexedDataset(found, frozenset(left_out), tuple(origins), whole)


def _contents(work: Folder, dataset: str, key: str) -> list[dict[str, Any]]:
    for _ in range(_ATTEMPTS):
        # One that is gone by now has given way to records that were not there yet: look again.
        with suppress(FileNotFoundError):
            if contents := [_read(path) for path in dataset_entries(work, dataset, key)]:
                return contents
    raise FileNotFoundError(dataset_folder(work, dataset, key))


def dataset_entries(work: Folder, dataset: str, key: str) -> list[Folder]:
    """The index files of a dataset under the registry's key for it: the one that earlier versions
    wrote for all of its cases, if it is still there, then the records."""
    folder = dataset_folder(work, dataset, key)
    patterns = (f"{folder.name}.json", f"{folder.name}/[!.]*.json")
    return [path for pattern in patterns for path in matching(folder.parent, pattern)]


def write_teacher_index(work: Folder, key: str, teacher: IndexedTeacher) -> None:
    """Records a teacher's digest under the registry's key for it."""
    content = {"version": VERSION, "key": key, **asdict(teacher)}
    write_sealed(teacher_file(work, teacher.teacher, key), content)


def read_teacher_index(work: Folder, teacher: str, key: str) -> IndexedTeacher:
    """A teacher's digest, organs and taps.

    Raises:
        CacheStale: stage one has not seen this registry entry.
    """
    path = teacher_file(work, teacher, key)
    with _stale_if_unreadable("teacher", teacher, work):
        return _teacher(_read(path))


def dataset_folder(work: Folder, dataset: str, key: str) -> Folder:
    """Where the records of a dataset's cases are under a registry's key for it."""
    return work / "index" / "datasets" / f"{dataset}.{short(key)}"


def teacher_file(work: Folder, teacher: str, key: str) -> Folder:
    """The index file of a teacher under a registry's key for it."""
    return work / "index" / "teachers" / f"{teacher}.{short(key)}.json"


def _plain(case: IndexedCase) -> dict[str, Any]:
    content = asdict(case)
    return content if case.fold is not None else {k: v for k, v in content.items() if k != "fold"}


def _read(path: Folder) -> dict[str, Any]:
    """An entry of this version."""
    content = read_sealed(path)
    if content["version"] != VERSION:
        raise ValueError(f"version {content['version']}")
    return content


def _cases(content: Mapping[str, Any]) -> tuple[IndexedCase, ...]:
    return tuple(
        IndexedCase(**{**case, **{file: _stamp(case.get(file)) for file in ("image", "label")}})
        for case in content["cases"]
    )


def _teacher(content: Mapping[str, Any]) -> IndexedTeacher:
    organs, taps = tuple(content["organs"]), tuple(content["taps"])
    weights = {name: FileStamp(**stamp) for name, stamp in content.get("weights", {}).items()}
    return IndexedTeacher(
        content["teacher"], content["digest"], organs, taps, dict(content["inputs"]),
        weights, _origin(content),
    )  # fmt: skip


def _stamp(content: Mapping[str, Any] | None) -> FileStamp | None:
    return None if content is None else FileStamp(**content)


def _origin(content: Mapping[str, Any]) -> Origin | None:
    said = content.get("origin")
    if said is None:
        return None
    registry, place = tuple(said["registry"]), tuple(said["place"])
    return Origin(registry, place, said["files"], said["host"])


@contextmanager
def _stale_if_unreadable(kind: str, name: str, work: Folder) -> Iterator[None]:
    """Absent, damaged, or written by a version with other fields: stage one writes it anew."""
    try:
        yield
    except _UNREADABLE as error:
        if _all_older(kind, name, work):
            raise CacheStale(
                f"{kind} {name} is in the index of the cache as an older version of organ-distill "
                f"wrote it (version 1 of the index, now {VERSION}): what it says of splits and "
                "files does not hold any more. The registry need not have changed.",
                where=work,
                fix="Run `pipeline cache-teachers` with this registry; no unit is made again.",
            ) from error
        raise CacheStale(
            f"{kind} {name} is not in the cache as the registry describes it now.",
            where=work,
            fix="Run `pipeline cache-teachers` with this registry; what is still valid is reused.",
        ) from error


def _all_older(kind: str, name: str, work: Folder) -> bool:
    """Whether there are entries of that name, and none that this version wrote."""
    entry = f"index/{kind}s/{name}.{'[0-9a-f]' * 16}"
    found = [path for tail in (".json", "/[!.]*.json") for path in matching(work, entry + tail)]
    versions = []
    for path in found:
        with suppress(*_UNREADABLE):
            versions.append(read_sealed(path).get("version", 1))
    return bool(versions) and all(version < VERSION for version in versions)


# JSON files that vouch for themselves: a number with one other digit would be believed.


def write_sealed(path: Folder, content: Mapping[str, Any]) -> None:
    """Writes content and, as the last field, the digest of all others; see `write_json`."""
    write_json(path, {**content, "seal": digest(content)})


def read_sealed(path: Folder) -> dict[str, Any]:
    """The content, without the seal.

    Raises:
        OSError: it cannot be read.
        ValueError, KeyError: it is not, byte by byte, what was written.
        StoreUnreachable: an object store does not answer.
    """
    try:
        text = read_text(path)
    except OSError as error:
        if not is_local(path) and not isinstance(error, FileNotFoundError):
            raise unreachable(path, error) from error
        raise
    content: dict[str, Any] = json.loads(text)
    seal = content.pop("seal")
    if seal != digest(content) or text != json_text({**content, "seal": seal}):
        raise ValueError("it has other bytes than were written")
    return content
