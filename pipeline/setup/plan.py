"""`pipeline plan`: what stage one will take, and whether it fits."""

from __future__ import annotations

import os
import re
import resource
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any, Protocol

import numpy as np
from pydantic import Field, ValidationError

from pipeline.cache.cases import case_of_hashes, prepare_case
from pipeline.cache.identity import claim_dataset, claim_teacher
from pipeline.cache.index import IndexedTeacher, case_path, unit_path
from pipeline.cache.places import Place, find_units
from pipeline.cache.receipt import Receipt, read_receipt
from pipeline.cache.schema import IMAGE, LABEL, StorageConfig
from pipeline.cache.store import scratch_folder, write_json
from pipeline.config import Config
from pipeline.data.nifti import read_image
from pipeline.data.registry import Registry
from pipeline.data.sizes import CaseSize, case_sizes, two_cases
from pipeline.errors import CacheError, ConfigError, RegistryError, SpaceError
from pipeline.folder import Folder, is_local, read_text, remove, replace_file, sizes, temporary_name
from pipeline.log import Advance, Log, print_table, size
from pipeline.networks.windows import WindowConfig
from pipeline.teachers.units import LoadedTeacher, cache_unit, open_teacher

# Which units stage one has to make, by headers and receipts; no voxel and no file is hashed.

CASES = "cases"


@dataclass(frozen=True)
class Todo:
    """What is left of a run of stage one.

    Attributes:
        missing: `cases`, and each teacher -> the cases whose unit is still to be made.
        num_cached: units that are there already.
        cached_bytes: what those take.
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
        found = {CASES: unit}
        for name, teacher in teachers.items():
            receipts = there.get((name, dataset, case), ())
            found[name] = _teacher_unit(teacher, receipts, unit)
        for what, receipt in found.items():
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
        found.setdefault(_key(place), []).append(receipt)
    return found


def _key(place: Place) -> tuple[str, str, str]:
    return place.teacher or CASES, place.dataset, place.case


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
        files: number of files.
        folders: number of folders.
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
class Estimate:
    """What some units take.

    Attributes:
        units: how many.
        num_bytes: kind -> bytes.
        files: regular files.
        folders: folders, the units' own included.
        seconds: wall time of one process.
    """

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

    def add(self, other: Estimate) -> None:
        """Sums up."""
        self.units += other.units
        for kind, value in other.num_bytes.items():
            self.num_bytes[kind] += value
        self.files += other.files
        self.folders += other.folders
        self.seconds += other.seconds


def estimate_all(todo: Todo, samples: Sequence[Sample]) -> dict[str, Estimate]:
    """`cases` and each teacher -> what its missing units will take."""
    by_what = {what: [s for s in samples if s.what == what] for what in todo.missing}
    return {what: estimate(cases, by_what[what]) for what, cases in todo.missing.items()}


def estimate(cases: Sequence[CaseSize], samples: Sequence[Sample]) -> Estimate:
    """What the units of one teacher, or the cases themselves, will take.

    Arrays: bytes per voxel, interpolated between the samples' sizes and held beyond them.
    Metadata and files: per unit, likewise. Seconds: per voxel of the CT as stored for cases, of
    the student grid for teachers.
    """
    found = Estimate(units=len(cases))
    if not cases or not samples:
        return found
    for kind in KINDS:
        if kind == METADATA:
            per_unit = _interpolated(samples, _metadata)
            found.num_bytes[kind] = sum(per_unit(case.voxels) for case in cases)
        else:
            per_voxel = _interpolated(samples, _per_voxel(kind))
            found.num_bytes[kind] = sum(per_voxel(case.voxels) * case.voxels for case in cases)
    found.files = len(cases) * float(np.mean([s.files for s in samples]))
    found.folders = len(cases) * float(np.mean([s.folders for s in samples]))
    native = samples[0].what == CASES
    pace = _interpolated(samples, lambda s: s.seconds / (s.native_voxels if native else s.voxels))
    found.seconds = sum(
        pace(case.voxels) * (case.native_voxels if native else case.voxels) for case in cases
    )
    return found


def _interpolated(
    samples: Sequence[Sample], value: Callable[[Sample], float]
) -> Callable[[int], float]:
    ordered = sorted(samples, key=lambda s: s.voxels)
    sizes, values = [s.voxels for s in ordered], [value(s) for s in ordered]
    return lambda voxels: float(np.interp(voxels, sizes, values))


def _per_voxel(kind: str) -> Callable[[Sample], float]:
    return lambda sample: sample.num_bytes.get(kind, 0) / sample.voxels


def _metadata(sample: Sample) -> float:
    return sample.num_bytes[METADATA]


def least(todo: Todo, organs: Mapping[str, int]) -> dict[str, Estimate]:
    """What the missing units will take at the least, where nothing has been measured.

    Args:
        todo: the units.
        organs: teacher -> number of organs. Features do not count: only a probe knows them.
    """
    found = {}
    for what, cases in todo.missing.items():
        kind, rate = (
            (IMAGES, _LEAST_IMAGE) if what == CASES else (LOG_ODDS, _LEAST_LOG_ODDS * organs[what])
        )
        part = Estimate(units=len(cases))
        part.num_bytes[kind] = rate * sum(case.voxels for case in cases)
        part.num_bytes[METADATA] = _LEAST_METADATA * len(cases)
        part.files, part.folders = 5.0 * len(cases), 5.0 * len(cases)
        found[what] = part
    return found


# Bytes per voxel and bytes per unit: a little below the least that was seen, on real CT and on the
# phantom (`benchmarks/tune`): this is to refuse what cannot fit, not to foretell.
_LEAST_IMAGE = 0.5
_LEAST_LOG_ODDS = 0.1
_LEAST_METADATA = 4000


# The probe: two cases, really prepared and run through every teacher, then thrown away.

_WRITTEN_TO_MEASURE = 32 * 1024 * 1024


@dataclass(frozen=True)
class Probe:
    """What the probe measured.

    Attributes:
        samples: one per unit made.
        memory_bytes: largest resident memory of this process, scaled to the largest case.
        write_bytes_per_s: of the work folder's disk, synced.
    """

    samples: Sequence[Sample]
    memory_bytes: int
    write_bytes_per_s: float


def probe(
    registry: Registry,
    work: Folder,
    todo: Todo,
    teachers: Mapping[str, LoadedTeacher],
    *,
    storage: StorageConfig,
    log: Log,
) -> Probe:
    """Makes the units of two cases in a scratch folder: the larger case first, so that what a
    first unit costs extra is small beside it.

    Raises:
        PipelineError: a case that cannot be read, or a teacher that cannot run on it.
    """
    chosen = sorted(two_cases(todo.cases), key=lambda case: -case.voxels)
    wanted = {name: loaded for name, loaded in teachers.items() if todo.missing[name]}
    samples: list[Sample] = []
    before = _resident_bytes()
    with (
        scratch_folder(work) as scratch,
        log.progress("probe", len(chosen) * (1 + len(wanted))) as advance,
    ):
        speed = _write_speed(work)
        for case in chosen:
            samples += _probe_case(
                registry, scratch, case, wanted,
                storage=storage, advance=advance, warn=log.remark,
            )  # fmt: skip
    grown = max(0, _peak_bytes() - before)
    largest = max(case.native_voxels + case.voxels for case in todo.cases)
    probed = max(case.native_voxels + case.voxels for case in chosen)
    return Probe(samples, round(before + grown * largest / probed), speed)


def _probe_case(
    registry: Registry,
    scratch: Path,
    case: CaseSize,
    teachers: Mapping[str, LoadedTeacher],
    *,
    storage: StorageConfig,
    advance: Advance,
    warn: Callable[[str], object],
) -> list[Sample]:
    began = time.monotonic()
    indexed, _ = prepare_case(
        registry, scratch, case.source,
        spacing_mm=registry.grid.spacing_mm, storage=storage, warn=warn,
    )  # fmt: skip
    path = case_path(scratch, indexed)
    samples = [_sample(CASES, path, case, time.monotonic() - began)]
    advance(case.source.name)
    began = time.monotonic()
    native = read_image(case.source.image).volume
    # Read once per case, whatever the number of teachers.
    reading = (time.monotonic() - began) / max(1, len(teachers))
    for name, loaded in teachers.items():
        began = time.monotonic()
        path = unit_path(scratch, loaded.indexed, indexed)
        cache_unit(registry, loaded, native, indexed, path, storage=storage)
        samples.append(_sample(name, path, case, time.monotonic() - began + reading))
        advance(f"{name} x {case.source.name}")
    return samples


def _sample(what: str, unit: Folder, case: CaseSize, seconds: float) -> Sample:
    num_bytes = dict.fromkeys((IMAGES, LOG_ODDS, FEATURES, METADATA), 0)
    found = sizes(unit)
    for name, taken in found.items():
        num_bytes[_kind(name.split("/"))] += taken
    above = {parent for name in found for parent in PurePosixPath(name).parents}
    return Sample(
        what=what,
        case=case.source.name,
        voxels=case.voxels,
        native_voxels=case.native_voxels,
        num_bytes=num_bytes,
        files=len(found),
        folders=len(above),
        seconds=round(seconds, 4),
    )


def _kind(parts: Sequence[str]) -> str:
    """Chunks lie in a folder `c` below their array; all else describes."""
    if "c" not in parts[1:]:
        return METADATA
    kinds = {IMAGE: IMAGES, LABEL: IMAGES, "log_odds": LOG_ODDS, "features": FEATURES}
    return kinds[parts[0]]


def _write_speed(work: Folder) -> float:
    path = work / temporary_name("speed")
    data = os.urandom(_WRITTEN_TO_MEASURE)
    began = time.monotonic()
    try:
        replace_file(path, data)
    finally:
        seconds = time.monotonic() - began
        remove(path)
    return len(data) / max(seconds, 1e-6)


def _peak_bytes() -> int:
    """Largest resident memory so far."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _resident_bytes() -> int:
    """Resident memory now; the largest so far where the system does not say."""
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
    except (OSError, ValueError, IndexError):
        return _peak_bytes()
    return pages * os.sysconf("SC_PAGE_SIZE")


# Whether what stage one will write fits: free space, free inodes, a quota.

_SIZE = re.compile(r"\s*([0-9]*\.?[0-9]+(?:e[0-9]+)?)\s*([kmgtp]?)(i?)b?\s*", re.IGNORECASE)


@dataclass(frozen=True)
class Space:
    """What a work folder's disk has left.

    Attributes:
        free_bytes: for this user; None in an object store, which does not fill.
        free_inodes: for this user; None where the file system does not say.
        block_bytes: smallest piece that a file takes; 0 in an object store.
        used_bytes: what the work folder takes now; 0 if there is no quota to hold it against.
        quota_bytes: what it may hold; None for no quota.
    """

    free_bytes: int | None
    free_inodes: int | None
    block_bytes: int
    used_bytes: int
    quota_bytes: int | None

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return dict(vars(self))


def look_at(work: Folder, quota_bytes: int | None) -> Space:
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


def on_disk(parts: Iterable[Estimate], block_bytes: int) -> int:
    """Bytes that are really taken: half a block is lost per file, a folder takes a whole one."""
    return round(sum(p.total_bytes + block_bytes * (0.5 * p.files + p.folders) for p in parts))


def shortfall(parts: Iterable[Estimate], space: Space) -> str:
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


def parse_size(text: str) -> int:
    """`2 TB`, `500GB`, `1.5TiB`, `1e12` -> bytes.

    Raises:
        ConfigError: it is no size.
    """
    match = _SIZE.fullmatch(text)
    if match is None or (match[3] and not match[2]):
        raise ConfigError(
            f"{text!r} is no size.", where="--quota", fix='Write bytes, or for example "2 TB".'
        )
    power = " kmgtp".index(match[2].lower() or " ")
    base = 1024.0 if match[3] else 1000.0
    return round(float(match[1]) * base**power)


class Settings(Protocol):
    """What a plan needs to know of stage one's configuration."""

    @property
    def splits(self) -> Sequence[str]:
        """Cases of other splits are left out."""

    @property
    def window(self) -> WindowConfig:
        """How teachers run."""

    @property
    def storage(self) -> StorageConfig:
        """How arrays are stored."""


@dataclass(frozen=True)
class Plan:
    """What is left to do and what it takes.

    Attributes:
        todo: units there and to make.
        parts: `cases` and each teacher -> estimate of its missing units.
        probe: what was measured; None if nothing is left to do.
        space: free space and quota.
        problem: what does not fit; empty if all does.
        unreadable: cases without a readable header -> why; they are not in the numbers.
    """

    todo: Todo
    parts: Mapping[str, Estimate]
    probe: Probe | None
    space: Space
    problem: str
    unreadable: Mapping[str, Exception]

    @property
    def total(self) -> Estimate:
        """All parts together."""
        total = Estimate()
        for part in self.parts.values():
            total.add(part)
        return total

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        rows = {**self.parts, "total": self.total}
        return {
            "fits": not self.problem,
            "problem": self.problem,
            "units": {"to_make": self.todo.num_missing, "cached": self.todo.num_cached},
            "cached_bytes": self.todo.cached_bytes,
            "to_make": {what: _plain(part) for what, part in rows.items()},
            "bytes_on_disk": on_disk(self.parts.values(), self.space.block_bytes),
            "memory_bytes": None if self.probe is None else self.probe.memory_bytes,
            "write_bytes_per_s": None if self.probe is None else self.probe.write_bytes_per_s,
            "space": self.space.to_json(),
            "unreadable": {case: str(error) for case, error in self.unreadable.items()},
            "probe": [] if self.probe is None else [s.model_dump() for s in self.probe.samples],
        }


def make_plan(
    settings: Settings,
    registry: Registry,
    work: Folder,
    *,
    log: Log,
    quota_bytes: int | None = None,
    device: str = "auto",
    window_batch: int = 1,
) -> Plan:
    """Measures two cases and estimates the rest from headers; what is cached is subtracted.

    The measured rates and the quota are kept in `reports/plan.json`, where stage one finds them.

    Args:
        settings: of stage one.
        registry: read with its files.
        work: the work folder; the probe is made, and removed, on its disk.
        log: where progress goes.
        quota_bytes: what the work folder may hold.
        device: auto, cpu, cuda, cuda:1.
        window_batch: windows per forward pass.

    Raises:
        PipelineError: no readable case, a teacher that does not load, a probe that fails, or an
            entry of the index that is another project's.
    """
    sizes, unreadable = case_sizes(registry, settings.splits)
    if not sizes:
        first = next((f" The first: {case}, {why}" for case, why in unreadable.items()), "")
        raise RegistryError(
            f"no case of the splits {', '.join(settings.splits)} has a readable header.{first}",
            where=registry.path,
            fix="Check `splits` and the datasets' files; a phantom is made by `pipeline phantom`.",
        )
    for case, error in unreadable.items():
        log.warn(f"{case} is left out: {error}")
    teachers = {
        name: open_teacher(
            name, registry, window=settings.window, storage=settings.storage,
            device=device, window_batch=window_batch,
        )
        for name in registry.teachers
    }  # fmt: skip
    indexed = {name: loaded.indexed for name, loaded in teachers.items()}
    for dataset in registry.datasets:
        claim_dataset(work, registry, dataset)
    for teacher in indexed.values():
        claim_teacher(work, registry, teacher)
    todo = find_todo(work, registry, sizes, indexed, settings.storage)
    measured = None
    if todo.num_missing:
        measured = probe(
            registry, work, todo, teachers,
            storage=settings.storage, log=log,
        )  # fmt: skip
        write_record(work, measured.samples, settings.storage, indexed, quota_bytes)
    parts = estimate_all(todo, measured.samples if measured else ())
    space = look_at(work, quota_bytes)
    return Plan(todo, parts, measured, space, shortfall(parts.values(), space), unreadable)


def print_plan(found: Plan) -> None:
    """Tables, for people."""
    rows = [
        [
            what,
            str(part.units),
            *(size(part.num_bytes[kind]) for kind in KINDS),
            size(part.total_bytes),
            str(round(part.files)),
            str(part.inodes),
            _time(part.seconds),
        ]
        for what, part in {**found.parts, "total": found.total}.items()
    ]
    columns = ["to make", "units", *KINDS, "bytes", "files", "inodes", "time"]
    print_table("Plan of stage one", columns, rows)
    space, need = found.space, on_disk(found.parts.values(), found.space.block_bytes)
    lines = [
        ["already there", f"{found.todo.num_cached} units, {size(found.todo.cached_bytes)}"],
        ["needed on disk", _needed(need, space)],
        ["free", _free(space)],
    ]
    if space.quota_bytes is not None:
        held = f"{size(space.quota_bytes)}, of which {size(space.used_bytes)} are used"
        lines.append(["quota", held])
    if found.probe is not None:
        writing = need / found.probe.write_bytes_per_s
        speed = size(found.probe.write_bytes_per_s)
        lines += [
            ["peak memory", f"{size(found.probe.memory_bytes)} (largest case, one process)"],
            ["disk", f"writes {speed}/s: {_time(writing)} of the time above"],
            ["probe", ", ".join(dict.fromkeys(s.case for s in found.probe.samples))],
        ]
    if found.unreadable:
        lines.append(["left out", f"{len(found.unreadable)} cases without a readable header"])
    print_table("Space, memory, disk", ["", ""], lines)


def _plain(part: Estimate) -> dict[str, Any]:
    return {
        "units": part.units,
        "bytes": {kind: round(value) for kind, value in part.num_bytes.items()},
        "total_bytes": part.total_bytes,
        "files": round(part.files),
        "inodes": part.inodes,
        "hours": round(part.seconds / 3600, 4),
    }


def _time(seconds: float) -> str:
    if seconds >= 5400:
        return f"{seconds / 3600:.1f} h"
    return f"{seconds / 60:.1f} min" if seconds >= 90 else f"{seconds:.0f} s"


def _needed(need: int, space: Space) -> str:
    blocks = f" (files end on blocks of {size(space.block_bytes)})" if space.block_bytes else ""
    return f"{size(need)}{blocks}"


def _free(space: Space) -> str:
    if space.free_bytes is None:
        return "an object store does not fill; --quota sets a limit"
    return f"{size(space.free_bytes)}, {_count(space.free_inodes)} inodes"


def _count(number: int | None) -> str:
    return "unlimited" if number is None else f"{number:,}"


# What a plan measured, kept beside the cache for stage one's own check; and that check.

_FILE = "reports/plan.json"


class Record(Config):
    """`reports/plan.json`.

    Attributes:
        storage: that the samples were made with.
        teachers: teacher -> digest.
        samples: the units of the probe.
        quota_bytes: what the work folder may hold.
    """

    storage: StorageConfig
    teachers: dict[str, str]
    samples: tuple[Sample, ...]
    quota_bytes: int | None


def write_record(
    work: Folder,
    samples: Sequence[Sample],
    storage: StorageConfig,
    teachers: Mapping[str, IndexedTeacher],
    quota_bytes: int | None,
) -> None:
    """Keeps what was measured."""
    digests = {name: teacher.digest for name, teacher in teachers.items()}
    record = Record(
        storage=storage, teachers=digests, samples=tuple(samples), quota_bytes=quota_bytes
    )
    write_json(work / _FILE, record.model_dump(mode="json"))


def read_record(work: Folder) -> Record | None:
    """The latest plan; None if there is none, or none that this program can read."""
    try:
        return Record.model_validate_json(read_text(work / _FILE))
    except (OSError, ValueError, ValidationError):
        return None


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
    record = read_record(work)
    samples = [] if record is None else _valid_samples(record, storage, teachers)
    if _covers(todo, samples):
        parts, basis = estimate_all(todo, samples), "Measured by `pipeline plan`."
    else:
        organs = {name: len(teacher.organs) for name, teacher in teachers.items()}
        parts = least(todo, organs)
        basis = "This is the least that it can be; `pipeline plan` measures."
    space = look_at(work, None if record is None else record.quota_bytes)
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


def _valid_samples(
    record: Record, storage: StorageConfig, teachers: Mapping[str, IndexedTeacher]
) -> list[Sample]:
    if record.storage != storage:
        return []
    same = {name for name, t in teachers.items() if record.teachers.get(name) == t.digest}
    return [s for s in record.samples if s.what == CASES or s.what in same]


def _covers(todo: Todo, samples: Sequence[Sample]) -> bool:
    measured = {sample.what for sample in samples}
    return all(what in measured for what, cases in todo.missing.items() if cases)
