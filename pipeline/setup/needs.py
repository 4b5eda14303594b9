"""What stage one has still to make, what that takes, and whether it fits: by headers, receipts and
what `pipeline plan` measured.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
from pydantic import Field

from pipeline.cache.cases import case_of_hashes
from pipeline.cache.index import IndexedTeacher
from pipeline.cache.places import find_units
from pipeline.cache.receipt import Receipt, read_receipt
from pipeline.cache.schema import StorageConfig
from pipeline.config import Config
from pipeline.data.registry import Registry
from pipeline.data.sizes import CaseSize, case_sizes
from pipeline.errors import CacheError, SpaceError
from pipeline.folder import Folder, is_local, read_text, sizes
from pipeline.log import Log, size

RECORD = "reports/plan.json"

# Which units stage one has to make, by headers and receipts; no voxel and no file is hashed.

CASES = "cases"


@dataclass(frozen=True)
class Todo:
    """What is left of a run of stage one.

    Attributes:
        missing: `cases`, and each teacher -> the cases whose unit is still to be made.
    """

    missing: Mapping[str, Sequence[CaseSize]]
    num_cached: int
    cached_bytes: int

    @property
    def num_missing(self) -> int:
        """Units to make."""
        return sum(len(cases) for cases in self.missing.values())

    @property
    def cases(self) -> list[CaseSize]:
        """The cases of which anything is missing."""
        found = {case.source.name: case for cases in self.missing.values() for case in cases}
        return list(found.values())


def find_todo(
    work: Folder,
    registry: Registry,
    sizes: Sequence[CaseSize],
    teachers: Mapping[str, IndexedTeacher],
    storage: StorageConfig,
) -> Todo:
    """Takes a unit as cached if its receipt is in order and names the settings of now.

    The files of datasets are not hashed here, which would read all of them: a CT that changed
    since it was cached counts as cached, though stage one will notice and do it again.
    """
    there = _receipts(work)
    missing: dict[str, list[CaseSize]] = {CASES: [], **{name: [] for name in teachers}}
    cached: list[Receipt] = []
    for known in sizes:
        case, dataset = known.source.case, known.source.dataset
        unit = _case_unit(registry, known, there.get((CASES, dataset, case), ()), storage)
        of_teachers = {
            name: _teacher_unit(teacher, there.get((name, dataset, case), ()), unit)
            for name, teacher in teachers.items()
        }
        for what, receipt in {CASES: unit, **of_teachers}.items():
            if receipt is None:
                missing[what].append(known)
            else:
                cached.append(receipt)
    return Todo(missing, len(cached), sum(receipt.num_bytes for receipt in cached))


def _receipts(work: Folder) -> dict[tuple[str, str, str], list[Receipt]]:
    """(`cases` or teacher, dataset, case) -> the receipts that are in order."""
    found: dict[tuple[str, str, str], list[Receipt]] = {}
    for place in find_units(work):
        try:
            receipt = read_receipt(place.path)
        except CacheError:
            continue
        key = place.teacher or CASES, place.dataset, place.case
        found.setdefault(key, []).append(receipt)
    return found


def _case_unit(
    registry: Registry, size: CaseSize, receipts: Sequence[Receipt], storage: StorageConfig
) -> Receipt | None:
    for receipt in receipts:
        hashes = str(receipt.inputs["image_sha256"]), str(receipt.inputs["label_sha256"])
        spacing = registry.grid.spacing_mm
        case, _ = case_of_hashes(registry, size.source, hashes, spacing_mm=spacing, storage=storage)
        if case.digest == receipt.digest:
            return receipt
    return None


def _teacher_unit(
    teacher: IndexedTeacher, receipts: Sequence[Receipt], case: Receipt | None
) -> Receipt | None:
    for receipt in receipts:
        same_image = case is None or (receipt.inputs["image_sha256"] == case.inputs["image_sha256"])
        if receipt.inputs["teacher_digest"] == teacher.digest and same_image:
            return receipt
    return None


# From a few measured units to all units: bytes by kind of array, files, seconds.

IMAGES, LOG_ODDS, FEATURES, METADATA = "image and label", "log-odds", "features", "metadata"
KINDS = (IMAGES, LOG_ODDS, FEATURES, METADATA)


class Sample(Config):
    """One unit that was really made.

    Attributes:
        what: `cases`, or the teacher.
        case: `dataset/case`.
        voxels: of the case on the student grid.
        native_voxels: of the CT as stored.
        num_bytes: kind -> bytes.
        seconds: wall time from reading the CT to the unit being on disk.
    """

    what: str
    case: str
    voxels: int = Field(ge=1)
    native_voxels: int = Field(ge=1)
    num_bytes: dict[str, int]
    files: int
    folders: int
    seconds: float


@dataclass
class Cost:
    """What some units take: bytes by kind, files, folders (the units' own included), and the wall
    time of one process."""

    units: int = 0
    num_bytes: dict[str, float] = field(default_factory=lambda: dict.fromkeys(KINDS, 0.0))
    files: float = 0.0
    folders: float = 0.0
    seconds: float = 0.0

    @property
    def total_bytes(self) -> int:
        """All kinds together."""
        return round(sum(self.num_bytes.values()))

    @property
    def inodes(self) -> int:
        """Files and folders."""
        return round(self.files + self.folders)

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return {
            "units": self.units,
            "bytes": {kind: round(value) for kind, value in self.num_bytes.items()},
            "total_bytes": self.total_bytes,
            "files": round(self.files),
            "inodes": self.inodes,
            "hours": round(self.seconds / 3600, 4),
        }


def estimate_all(todo: Todo, samples: Sequence[Sample]) -> dict[str, Cost]:
    """`cases` and each teacher -> what its missing units will take."""
    by_what = {what: [s for s in samples if s.what == what] for what in todo.missing}
    return {what: estimate(cases, by_what[what]) for what, cases in todo.missing.items()}


def estimate(cases: Sequence[CaseSize], samples: Sequence[Sample]) -> Cost:
    """What the units of one teacher, or the cases themselves, will take.

    Arrays: bytes per voxel, interpolated between the samples' sizes and held beyond them.
    Metadata and files: per unit, likewise. Seconds: per voxel of the CT as stored for cases, of
    the student grid for teachers.
    """
    if not cases or not samples:
        return Cost(units=len(cases))
    measured = sorted(samples, key=lambda sample: sample.voxels)
    voxels = np.array([case.voxels for case in cases])
    timed, steps = voxels, [sample.voxels for sample in measured]
    if measured[0].what == CASES:
        timed = np.array([case.native_voxels for case in cases])
        steps = [sample.native_voxels for sample in measured]

    def rate(values: Sequence[float]) -> npt.NDArray[np.float64]:
        return np.asarray(np.interp(voxels, [sample.voxels for sample in measured], values))

    num_bytes = {
        kind: float(rate([s.num_bytes.get(kind, 0) / s.voxels for s in measured]) @ voxels)
        for kind in KINDS
    }
    num_bytes[METADATA] = float(rate([s.num_bytes[METADATA] for s in measured]).sum())
    return Cost(
        units=len(cases),
        num_bytes=num_bytes,
        files=len(cases) * float(np.mean([s.files for s in measured])),
        folders=len(cases) * float(np.mean([s.folders for s in measured])),
        seconds=float(rate([s.seconds / n for s, n in zip(measured, steps, strict=True)]) @ timed),
    )


def least(todo: Todo, organs: Mapping[str, int]) -> dict[str, Cost]:
    """What the missing units will take at the least, where nothing has been measured. Features do
    not count: only a probe knows them."""
    found = {}
    for what, cases in todo.missing.items():
        kind, rate = IMAGES, _LEAST_IMAGE
        if what != CASES:
            kind, rate = LOG_ODDS, _LEAST_LOG_ODDS * organs[what]
        part = Cost(units=len(cases), files=5.0 * len(cases), folders=5.0 * len(cases))
        part.num_bytes[kind] = rate * sum(case.voxels for case in cases)
        part.num_bytes[METADATA] = _LEAST_METADATA * len(cases)
        found[what] = part
    return found


# Bytes per voxel and bytes per unit: a little below the least that was seen, on real CT and on the
# phantom (`benchmarks/tune`): this is to refuse what cannot fit, not to foretell.
_LEAST_IMAGE = 0.5
_LEAST_LOG_ODDS = 0.1
_LEAST_METADATA = 4000


# Whether what stage one will write fits: free space, free inodes, a quota.


@dataclass(frozen=True)
class Space:
    """What a work folder's disk has left.

    Attributes:
        free_bytes: for this user; None in an object store, which does not fill.
        free_inodes: for this user; None where the file system does not say.
        block_bytes: smallest piece that a file takes; 0 in an object store.
        used_bytes: what the work folder takes now; 0 if there is no quota to hold it against.
    """

    free_bytes: int | None
    free_inodes: int | None
    block_bytes: int
    used_bytes: int
    quota_bytes: int | None


def space_of(work: Folder, quota_bytes: int | None) -> Space:
    """Asks the file system that a work folder is on, or will be."""
    if not is_local(work):
        used = 0 if quota_bytes is None else sum(sizes(work).values())
        return Space(None, None, 0, used, quota_bytes)
    there = work.absolute()
    while not there.exists():
        there = there.parent
    found = os.statvfs(there)
    used = 0
    if quota_bytes is not None and work.exists():
        found_files = (path.stat() for path in work.rglob("*") if path.is_file())
        used = sum(max(file.st_size, 512 * file.st_blocks) for file in found_files)
    return Space(
        free_bytes=found.f_bavail * found.f_frsize,
        free_inodes=found.f_favail if found.f_files else None,
        block_bytes=found.f_frsize,
        used_bytes=used,
        quota_bytes=quota_bytes,
    )


def on_disk(parts: Iterable[Cost], block_bytes: int) -> int:
    """Bytes that are really taken: half a block is lost per file, a folder takes a whole one."""
    return round(sum(p.total_bytes + block_bytes * (0.5 * p.files + p.folders) for p in parts))


def shortfall(parts: Iterable[Cost], space: Space) -> str:
    """What does not fit, as a sentence; empty if all does."""
    wanted = list(parts)
    need, inodes = on_disk(wanted, space.block_bytes), sum(p.inodes for p in wanted)
    if space.free_bytes is not None and need > space.free_bytes:
        return f"stage one needs about {size(need)} more, and {size(space.free_bytes)} are free."
    if space.free_inodes is not None and inodes > space.free_inodes:
        return (
            f"stage one makes about {inodes} more files and folders, and the file system takes "
            f"{space.free_inodes}."
        )
    if space.quota_bytes is not None and space.used_bytes + need > space.quota_bytes:
        return (
            f"stage one needs about {size(need)} more; with the {size(space.used_bytes)} that the "
            f"work folder holds this passes the quota of {size(space.quota_bytes)}."
        )
    return ""


# What a plan measured, kept beside the cache for stage one's own check; and that check.


class Record(Config):
    """`reports/plan.json`: the units of the probe, and what they hold for: storage, teacher ->
    digest."""

    storage: StorageConfig
    teachers: dict[str, str]
    samples: tuple[Sample, ...]
    quota_bytes: int | None

    def valid_samples(
        self, storage: StorageConfig, teachers: Mapping[str, IndexedTeacher]
    ) -> list[Sample]:
        """Those that hold for storage and teachers of now."""
        if self.storage != storage:
            return []
        same = {name for name, t in teachers.items() if self.teachers.get(name) == t.digest}
        return [s for s in self.samples if s.what == CASES or s.what in same]


def check_space(
    registry: Registry,
    work: Folder,
    teachers: Mapping[str, IndexedTeacher],
    *,
    splits: Sequence[str],
    storage: StorageConfig,
    log: Log,
    force: bool,
) -> None:
    """Refuses what will not fit, by headers and receipts alone; with `force` it only warns.

    A plan with the same storage and teachers gives the rates, and any plan the quota; without one
    only what the units take at the least is held against the free space.

    Raises:
        SpaceError: what stage one has still to make does not fit.
    """
    sizes, _ = case_sizes(registry, splits)
    todo = find_todo(work, registry, sizes, teachers, storage)
    try:
        record = Record.model_validate_json(read_text(work / RECORD))
    except (OSError, ValueError):  # none, or none that this program can read
        record = None
    samples = [] if record is None else record.valid_samples(storage, teachers)
    if {what for what, cases in todo.missing.items() if cases} <= {s.what for s in samples}:
        parts, basis = estimate_all(todo, samples), "Measured by `pipeline plan`."
    else:
        parts = least(todo, {name: len(teacher.organs) for name, teacher in teachers.items()})
        basis = "This is the least that it can be; `pipeline plan` measures."
    space = space_of(work, None if record is None else record.quota_bytes)
    problem = shortfall(parts.values(), space)
    if not problem:
        return
    error = SpaceError(
        f"{problem} {basis}",
        where=work,
        fix="Make room, choose another --work, leave out `splits` or `taps`, plan again with "
        "another --quota, or start anyway with --force; units that are done stay done.",
    )
    if not force:
        raise error
    log.warn(str(error))
