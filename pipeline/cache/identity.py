"""Whether an entry of the index speaks of the files that a registry leads to, and whose it is.

Keys of the index hold what a registry means and no place, so that a dataset or weights that moved
are found. Two projects with the same text come to the same entry by that: whoever reads it compares
the files, where they can be read, and whoever writes it must be of the project that wrote it first.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Collection, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import cache
from pathlib import Path

from pipeline.cache.index import (
    IndexedCase,
    IndexedDataset,
    IndexedTeacher,
    IndexFile,
    Origin,
    dataset_entries,
    dataset_folder,
    read_index,
    read_indexed_dataset,
    read_teacher_index,
    teacher_file,
)
from pipeline.config import FileStamp, digest
from pipeline.data.dicom import stamp_image
from pipeline.data.entries import CaseFiles
from pipeline.data.registry import Registry, load_registry
from pipeline.data.splits import SPLITS, in_words, role
from pipeline.data.weights import digest_of, stamp_weights
from pipeline.errors import (
    CacheMissing,
    CacheStale,
    PipelineError,
    TeacherError,
    WorkFolderError,
    listed,
)
from pipeline.folder import Folder, is_local, matching
from pipeline.log import Log

_NAMED = 3


def read_dataset(
    work: Folder,
    registry: Registry,
    dataset: str,
    *,
    splits: Collection[str] = SPLITS,
    compare: bool = True,
) -> tuple[list[IndexedCase], dict[str, CacheMissing]]:
    """The cases of a dataset that are in the cache; and of the others that the registry calls for,
    as far as that can be told, `dataset/case` -> why. With `compare` off nobody asks for these.

    Files that lie where stage one read them, with the size and time that they had, are not read;
    others are hashed. Where no file can be listed, the entry is taken as it is.

    Raises:
        CacheStale: stage one has not seen this registry entry, or other files, or the entry lacks
            records, or has cases that are gone or in another split; in another project's entry also
            cases that it lacks.
    """
    mine, sources = _origin(work, registry, dataset), _listed(registry, dataset)
    try:
        found = read_indexed_dataset(work, dataset, registry.dataset_key(dataset))
    except CacheStale:
        of_it = f"{dataset}.{'[0-9a-f]' * 16}*"
        if not compare or not sources or matching(work / "index" / "datasets", of_it):
            raise
        found = IndexedDataset([], frozenset(), ())  # new, or wrong as a whole: cases are missing
    seen = [
        case if case.fold is None else replace(case, split=role(case.fold, registry.fold))
        for case in found.cases
    ]
    found = replace(found, cases=seen)
    cases = [case for case in found.cases if case.split in splits]
    if not compare:
        return cases, {}
    stranger = _stranger(found, mine)
    wrong = [] if found.whole else ["records of some of its cases are missing"]
    wrong += _differences(found, sources, mine, splits)
    if stranger:
        wrong += _not_cached(found, sources, splits)
    if wrong:
        cached = f", for {stranger.registry[0]}," if stranger else ""
        raise CacheStale(
            f"dataset {dataset} is in the cache{cached} with other cases or files than this "
            f"registry leads to: {listed(wrong, _NAMED, '; ')}.",
            where=f"{registry.path}, {work}",
            fix="Run `pipeline cache-teachers` with this registry; what is still valid is reused.",
        )
    # Where no file can be listed, the index and the registry say which cases there are.
    called = (
        {case: source.split for case, source in sources.items()}
        if sources
        else registry.splits(dataset, {*found.left_out, *(case.case for case in found.cases)})
    )
    absent = {*called} - {case.case for case in found.cases}
    missing = {}
    for case in sorted(absent):
        if called[case] in splits:
            name = f"{dataset}/{case}"
            missing[name] = CacheMissing(
                "stage one left this case out: it could not be read, or its split was not asked "
                "for."
                if case in found.left_out
                else "this case has not been cached.",
                where=f"{name}, {work}",
                fix="`pipeline cache-teachers` makes it, or says what is wrong with it.",
            )
    return cases, missing


def read_teacher(
    work: Folder, registry: Registry, teacher: str, *, compare: bool = True
) -> IndexedTeacher:
    """A teacher that stage one has seen with the weights that the registry names now.

    Weights that cannot be read here are known by the last part of their path.

    Raises:
        CacheStale: stage one has not seen this registry entry, or other weights.
    """
    found = read_teacher_index(work, teacher, registry.teacher_key(teacher))
    if not compare:
        return found
    path = registry.resolve(registry.teachers[teacher].weights)
    here = _weights_here(work, registry, found)
    name = path.name if found.origin is None else Path(found.origin.place[0]).name
    if here == found.inputs["weights_sha256"] or (here is None and name == path.name):
        return found
    wrong = (
        f"its units were made by weights that are named {name}, and {path}, which the registry "
        "names now, cannot be read here to compare them"
        if here is None
        else f"{path} holds other bytes than the weights that its units were made by"
    )
    raise CacheStale(
        f"teacher {teacher} is not in the cache as the registry describes it now: {wrong}.",
        where=f"{registry.path}, {work}",
        fix="Run `pipeline cache-teachers` with this registry where the weights are; units "
        "that were made by the same bytes are reused.",
    )


def unchecked(work: Folder, registry: Registry, teachers: Iterable[str]) -> list[str]:
    """What could not be compared with the index, a sentence each; call it after reading both.

    Raises:
        CacheStale: stage one has not seen this registry.
    """
    said, names = [], []
    for teacher in teachers:
        indexed = read_teacher_index(work, teacher, registry.teacher_key(teacher))
        if _weights_here(work, registry, indexed) is None:
            names.append(f"{teacher} ({registry.teachers[teacher].weights})")
    if names:
        said.append(
            "weights that cannot be read here are taken, by their name alone, for those that the "
            f"cached units were made by: {', '.join(names)}."
        )
    for dataset in registry.datasets:
        try:
            found = read_indexed_dataset(work, dataset, registry.dataset_key(dataset))
        except CacheStale:  # none of its cases has been cached yet
            continue
        stranger = _stranger(found, _origin(work, registry, dataset))
        files = [source.image for source in _listed(registry, dataset).values()]
        if stranger is not None and not any(file.is_file() for file in files):
            said.append(
                f"dataset {dataset} was cached for {stranger.registry[0]}; its files cannot be "
                "read here, so nothing tells whether it is the dataset that this registry means."
            )
    return said


def claim_dataset(
    work: Folder, registry: Registry, dataset: str, *, log: Log | None = None
) -> Origin:
    """Makes sure that stage one may write a dataset's entry; returns for whom. `registry` is read
    with its files, `log` hears of an entry that is taken over.

    Raises:
        WorkFolderError: the entry is another project's, and speaks of other files.
    """
    key, mine = registry.dataset_key(dataset), _origin(work, registry, dataset)
    try:
        found = read_indexed_dataset(work, dataset, key)
    except CacheStale:
        return mine
    sources = _listed(registry, dataset)
    owner = next((o for o in found.origins if o.same_project(mine)), None)
    known = owner or next(iter(found.origins), None)
    if known is None:
        return mine
    # A path says who somebody is on one host only: containers give many the same one.
    trusted = known.host == mine.host or _share_a_case(found, sources, known.same_place(mine))
    if owner is not None and trusted:
        return mine
    if trusted and not _calls_for(known, key, dataset=dataset):
        _remark_taken(log, f"dataset {dataset}", known, registry)
        return mine
    wrong = _differences(found, sources, mine, SPLITS) + _not_cached(found, sources, SPLITS)
    if not wrong:
        return known
    entry = dataset_folder(work, dataset, key)
    raise _refusal(f"dataset {dataset}", listed(wrong, _NAMED, "; "), known, entry, registry)


def claim_teacher(
    work: Folder, registry: Registry, teacher: IndexedTeacher, *, log: Log | None = None
) -> Origin:
    """`claim_dataset` for a teacher, as stage one has just opened it.

    Raises:
        WorkFolderError: the entry is another project's, with other weights or settings.
    """
    name = teacher.teacher
    key, mine = registry.teacher_key(name), _origin_of_weights(work, registry, name)
    try:
        found = read_teacher_index(work, name, key)
    except CacheStale:
        return mine
    known = found.origin
    if known is None or known.same_project(mine):
        return mine
    if not _calls_for(known, key, teacher=name):
        _remark_taken(log, f"teacher {name}", known, registry)
        return mine
    if found.digest == teacher.digest:
        return known
    same = found.inputs["weights_sha256"] == teacher.inputs["weights_sha256"]
    wrong = (
        "it is run with other settings of stage one"
        if same
        else f"its weights are {known.place[0]} there and {mine.place[0]} here, with other bytes"
    )
    entry = teacher_file(work, name, key).with_suffix("")
    raise _refusal(f"teacher {name}", wrong, known, entry, registry)


def held_out_since(registry: Registry, work: Folder, files: Sequence[CaseFiles]) -> str:
    """What is said of validation and test cases that trained when another registry filled this
    work folder; empty without any, and once this registry is in the index.

    Raises:
        WorkFolderError: the index cannot be listed.
    """
    keys = {dataset: registry.dataset_key(dataset) for dataset in registry.datasets}
    new = {d for d, key in keys.items() if not dataset_entries(work, d, key)}
    known = [case for file in read_index(work)[0] for case in file.cases or ()] if new else []
    trained = {case.name for case in known if case.split == "train" or case.fold is not None}
    held_out = [c for c in files if c.dataset in new and c.split != "train"]
    seen = [case.name for case in held_out if case.name in trained]
    if not seen:
        return ""
    return (
        "these validation and test cases were training cases when this work folder was filled "
        f"before: {listed(seen)}. What was trained then has seen them: "
        "train it again, or keep the splits of then (docs/registry.md, Registries from before)."
    )


def entries_of_others(
    work: Folder, registries: Iterable[Registry], files: Iterable[IndexFile]
) -> list[IndexFile]:
    """Those of some entries that were written for none of these registries, but for one that calls
    for them still, as far as that can be told: another host may have files that are not here."""
    named = {path for registry in registries for path in _spelled(work, registry)}
    here, asked = socket.gethostname(), dict[tuple[str, str, str], bool]()
    found = []
    for file in files:
        if (origin := file.origin) is None or named & {*origin.registry}:
            continue
        what = "dataset" if file.teacher is None else "teacher"
        who = (origin.registry[0], file.name, file.key)
        if who not in asked:
            away = origin.host != here and not Path(who[0]).exists()
            asked[who] = away or _calls_for(origin, file.key, **{what: file.name})
        if asked[who]:
            found.append(file)
    return found


def _refusal(
    what: str, wrong: str, known: Origin, entry: Folder, registry: Registry
) -> WorkFolderError:
    kind = what.split()[0]
    return WorkFolderError(
        f"{what} of this registry is not the one that the work folder {entry.parents[2]} "
        f"holds by that name, for {known.registry[0]} on {known.host}: {wrong}. Nothing was "
        "changed.",
        where=registry.path,
        fix=f"Give this registry a work folder of its own (--work), or its {kind} another name. "
        f"Only if the other project has given up its {kind}, remove {entry}* first.",
    )


def _remark_taken(log: Log | None, what: str, known: Origin, registry: Registry) -> None:
    if log is not None:
        log.remark(
            f"{what} was cached for {known.registry[0]}, which is no longer there or does not call "
            f"for it any more; from now on it is that of {registry.path}."
        )


def _origin(work: Folder, registry: Registry, dataset: str) -> Origin:
    entry = registry.datasets[dataset]
    files = digest({"images": entry.images, "labels": entry.labels, "pairs": entry.pairs})
    return _origin_at(work, registry, registry.resolve(entry.root).resolve(), files)


def _origin_of_weights(work: Folder, registry: Registry, teacher: str) -> Origin:
    # Under the name that the registry gives them, whatever a link leads to.
    path = registry.resolve(registry.teachers[teacher].weights)
    return _origin_at(work, registry, path.parent.resolve() / path.name, "")


def _origin_at(work: Folder, registry: Registry, place: Path, files: str) -> Origin:
    return Origin(_spelled(work, registry), _spelled(work, place), files, socket.gethostname())


def _spelled(work: Folder, what: Registry | Path) -> tuple[str, ...]:
    """A registry's file is where it is named: its paths begin there, whatever a link leads to."""
    path = what.path.parent.resolve() / what.path.name if isinstance(what, Registry) else what
    return (str(path), *((os.path.relpath(path, work.resolve()),) if is_local(work) else ()))


def _stranger(found: IndexedDataset, mine: Origin) -> Origin | None:
    """The other project that an entry was written for; None if it was for this one."""
    if any(origin.same_project(mine) for origin in found.origins):
        return None
    return next(iter(found.origins), None)


def _calls_for(origin: Origin, key: str, *, dataset: str = "", teacher: str = "") -> bool:
    """Whether the registry that an entry was written for is still there and means it; if that
    cannot be told, it does."""
    path = Path(origin.registry[0])
    try:
        if not path.is_file():
            return False
        other = load_registry(path, files=False)
        if dataset:
            return dataset in other.datasets and other.dataset_key(dataset) == key
        return teacher in other.teachers and other.teacher_key(teacher) == key
    except (OSError, PipelineError):
        return True


def _listed(registry: Registry, dataset: str) -> dict[str, CaseFiles]:
    """The cases that the registry leads to; none where their folder is not."""
    try:
        return {source.case: source for source in registry.cases(dataset)}
    except OSError:
        return {}


def _differences(
    found: IndexedDataset, sources: Mapping[str, CaseFiles], mine: Origin, splits: Collection[str]
) -> list[str]:
    """What of the index is otherwise in the files, a few words each; nothing if there are none."""
    if not sources:
        return []
    wrong = []
    trusted = any(origin.same_place(mine) for origin in found.origins)
    for case in found.cases:
        source = sources.get(case.case)
        if source is None:
            if case.split in splits:
                wrong.append(f"{case.case} is no longer in the dataset")
        elif {case.split, source.split} & {*splits}:
            if (case.split, case.fold) != (source.split, source.fold):
                was, now = (x.split if x.fold is None else in_words(x.fold) for x in (case, source))
                wrong.append(f"{case.case} was in split {was} and is in {now}")
            elif other := _other_file(case, source, trusted):
                wrong.append(f"the {other} of {case.case} has other bytes")
    return wrong


def _not_cached(
    found: IndexedDataset, sources: Mapping[str, CaseFiles], splits: Collection[str]
) -> list[str]:
    """Likewise of the cases that the index does not have, nor says that they were left out."""
    seen = found.left_out.union(case.case for case in found.cases)
    return [
        f"{name} has not been cached"
        for name, source in sources.items()
        if name not in seen and source.split in splits
    ]


def _share_a_case(found: IndexedDataset, sources: Mapping[str, CaseFiles], trusted: bool) -> bool:
    """Whether any case has the same bytes here and there; a dataset without cases has none to
    differ in."""
    pairs = [(case, sources[case.case]) for case in found.cases if case.case in sources]
    return not found.cases or any(not _other_file(*pair, trusted) for pair in pairs)


def _other_file(case: IndexedCase, source: CaseFiles, trusted: bool) -> str:
    """Which file of a case is another than stage one read; empty if none is. One that cannot be
    read says nothing."""
    files = {"image": (source.image, case.image), "label": (source.label, case.label)}
    for what, (path, stamp) in files.items():
        with suppress(OSError):
            if stamp is not None and _stamped(path, stamp, trusted).sha256 != stamp.sha256:
                return what
    return ""


def _weights_here(work: Folder, registry: Registry, found: IndexedTeacher) -> str | None:
    """The digest of the weights that the registry names; None where they cannot be read."""
    entry = registry.teachers[found.teacher]
    mine = _origin_of_weights(work, registry, found.teacher)
    trusted = found.origin is not None and found.origin.same_place(mine)
    try:
        return digest_of(entry, stamp_weights(
            entry, registry.resolve(entry.weights),
            lambda name, file: _stamped(file, found.weights.get(name), trusted),
        ))  # fmt: skip
    except TeacherError:
        return None


def _stamped(path: Path, known: FileStamp | None, trusted: bool) -> FileStamp:
    """`stamp_file`. What lies where it was hashed, with its size and time, is not read again;
    elsewhere these prove nothing, and it is read, once a process."""
    if trusted:
        return stamp_image(path, known)
    status = path.stat()
    return _hashed(path, status.st_size, status.st_mtime_ns)


@cache
def _hashed(path: Path, size: int, mtime_ns: int) -> FileStamp:
    return stamp_image(path)
