"""`pipeline plan`: what stage one will take, measured on two cases."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any

from pipeline.cache.cases import CaseToGrid, prepare_case
from pipeline.cache.identity import claim_dataset, claim_teacher
from pipeline.cache.index import case_path, unit_path
from pipeline.cache.store import scratch_folder, write_json
from pipeline.data.nifti import read_image
from pipeline.data.sizes import CaseSize, case_sizes, two_cases
from pipeline.engine.processes import memory_bytes
from pipeline.errors import RegistryError
from pipeline.folder import Folder, remove, replace_file, sizes, temporary_name
from pipeline.log import Advance, Log, duration, print_table, size
from pipeline.setup import needs
from pipeline.teachers.load import LoadedTeacher, Teachers
from pipeline.teachers.units import run_teacher, store_unit

# The probe: two cases, really prepared and run through every teacher, then thrown away.

_WRITTEN_TO_MEASURE = 32 * 1024 * 1024


@dataclass(frozen=True)
class Probe:
    """What the probe measured.

    Attributes:
        memory_bytes: largest resident memory of this process, scaled to the largest case.
        write_bytes_per_s: of the work folder's disk, synced.
    """

    samples: Sequence[needs.Sample]
    memory_bytes: int
    write_bytes_per_s: float


def probe(work: Folder, todo: needs.Todo, teachers: Teachers, log: Log) -> Probe:
    """Makes the units of two cases in a scratch folder: the larger case first, so that what a
    first unit costs extra is small beside it.

    Raises:
        PipelineError: a case that cannot be read, or a teacher that cannot run on it.
    """
    chosen = sorted(two_cases(todo.cases), key=lambda case: -case.voxels)
    wanted = {name: loaded for name, loaded in teachers.loaded.items() if todo.missing[name]}
    storage, spacing_mm = teachers.storage, teachers.registry.grid.spacing_mm
    samples: list[needs.Sample] = []
    before = memory_bytes("VmRSS")
    with (
        scratch_folder(work) as scratch,
        log.progress("probe", len(chosen) * (1 + len(wanted))) as advance,
    ):
        speed = _write_speed(work)
        to_grid = CaseToGrid(teachers.registry, scratch, storage, spacing_mm)
        for case in chosen:
            samples += _probe_case(to_grid, case, wanted, log, advance)
    grown = max(0, memory_bytes("VmHWM") - before)
    largest = max(case.native_voxels + case.voxels for case in todo.cases)
    probed = max(case.native_voxels + case.voxels for case in chosen)
    return Probe(samples, round(before + grown * largest / probed), speed)


def _probe_case(
    to_grid: CaseToGrid,
    case: CaseSize,
    teachers: Mapping[str, LoadedTeacher],
    log: Log,
    advance: Advance,
) -> list[needs.Sample]:
    began = time.monotonic()
    scratch = to_grid.work
    indexed = prepare_case(to_grid, case.source, warn=log.remark).indexed
    path = case_path(scratch, indexed)
    samples = [_sample(needs.CASES, path, case, time.monotonic() - began)]
    advance(case.source.name)
    began = time.monotonic()
    native = read_image(case.source.image).volume
    # Read once per case, whatever the number of teachers.
    reading = (time.monotonic() - began) / max(1, len(teachers))
    for name, loaded in teachers.items():
        began = time.monotonic()
        path = unit_path(scratch, loaded.indexed, indexed)
        outputs = run_teacher(to_grid.registry, loaded, native, where=f"{name} x {indexed.name}")
        store_unit(loaded, outputs, indexed, path, storage=to_grid.storage)
        samples.append(_sample(name, path, case, time.monotonic() - began + reading))
        advance(f"{name} x {case.source.name}")
    return samples


def _sample(what: str, unit: Folder, case: CaseSize, seconds: float) -> needs.Sample:
    num_bytes = dict.fromkeys(needs.KINDS, 0)
    found = sizes(unit)
    for name, taken in found.items():
        num_bytes[_kind(name.split("/"))] += taken
    above = {parent for name in found for parent in PurePosixPath(name).parents}
    return needs.Sample(
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
        return needs.METADATA
    kinds = {"log_odds": needs.LOG_ODDS, "features": needs.FEATURES}
    return kinds.get(parts[0], needs.IMAGES)


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


@dataclass(frozen=True)
class Plan:
    """What is left to do and what it takes.

    Attributes:
        parts: `cases` and each teacher -> estimate of its missing units.
        probe: what was measured; None if nothing is left to do.
        problem: what does not fit; empty if all does.
        unreadable: cases without a readable header -> why; they are not in the numbers.
    """

    todo: needs.Todo
    parts: Mapping[str, needs.Cost]
    probe: Probe | None
    space: needs.Space
    problem: str
    unreadable: Mapping[str, Exception]

    @property
    def total(self) -> needs.Cost:
        """All parts together."""
        parts = list(self.parts.values())
        return needs.Cost(
            units=sum(part.units for part in parts),
            num_bytes={kind: sum(part.num_bytes[kind] for part in parts) for kind in needs.KINDS},
            files=sum(part.files for part in parts),
            folders=sum(part.folders for part in parts),
            seconds=sum(part.seconds for part in parts),
        )

    @property
    def rows(self) -> dict[str, needs.Cost]:
        """The parts, and their total: what the table and the JSON show."""
        return {**self.parts, "total": self.total}

    @property
    def bytes_on_disk(self) -> int:
        """See `on_disk`."""
        return needs.on_disk(self.parts.values(), self.space.block_bytes)

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        probe = self.probe
        return {
            "fits": not self.problem,
            "problem": self.problem,
            "units": {"to_make": self.todo.num_missing, "cached": self.todo.num_cached},
            "cached_bytes": self.todo.cached_bytes,
            "to_make": {what: part.to_json() for what, part in self.rows.items()},
            "bytes_on_disk": self.bytes_on_disk,
            "memory_bytes": probe and probe.memory_bytes,
            "write_bytes_per_s": probe and probe.write_bytes_per_s,
            "space": dict(vars(self.space)),
            "unreadable": {case: str(error) for case, error in self.unreadable.items()},
            "probe": [s.model_dump() for s in probe.samples] if probe else [],
        }


def make_plan(
    teachers: Teachers,
    splits: Sequence[str],
    work: Folder,
    *,
    log: Log,
    quota_bytes: int | None = None,
) -> Plan:
    """Measures two cases and estimates the rest from headers; what is cached is subtracted.

    The measured rates and the quota are kept in `reports/plan.json`, where stage one finds them.

    Raises:
        PipelineError: no readable case, a teacher that does not load, a probe that fails, or an
            entry of the index that is another project's.
    """
    registry = teachers.registry
    sizes, unreadable = case_sizes(registry, splits)
    if not sizes:
        first = next((f" The first: {case}, {why}" for case, why in unreadable.items()), "")
        raise RegistryError(
            f"no case of the splits {', '.join(splits)} has a readable header.{first}",
            where=registry.path,
            fix="Check `splits` and the datasets' files; a phantom is made by `pipeline phantom`.",
        )
    for case, error in unreadable.items():
        log.warn(f"{case} is left out: {error}")
    indexed = teachers.describe()
    for dataset in registry.datasets:
        claim_dataset(work, registry, dataset)
    for teacher in indexed.values():
        claim_teacher(work, registry, teacher)
    todo = needs.find_todo(work, registry, sizes, indexed, teachers.storage)
    measured = None
    if todo.num_missing:
        measured = probe(work, todo, teachers, log)
        record = needs.Record(
            storage=teachers.storage,
            teachers={name: teacher.digest for name, teacher in indexed.items()},
            samples=tuple(measured.samples),
            quota_bytes=quota_bytes,
        )
        write_json(work / needs.RECORD, record.model_dump(mode="json"))
    parts = needs.estimate_all(todo, measured.samples if measured else ())
    space = needs.space_of(work, quota_bytes)
    return Plan(todo, parts, measured, space, needs.shortfall(parts.values(), space), unreadable)


def print_plan(found: Plan) -> None:
    """Tables, for people."""
    rows = [
        [
            what,
            str(part.units),
            *(size(part.num_bytes[kind]) for kind in needs.KINDS),
            size(part.total_bytes),
            str(round(part.files)),
            str(part.inodes),
            duration(part.seconds),
        ]
        for what, part in found.rows.items()
    ]
    columns = ["to make", "units", *needs.KINDS, "bytes", "files", "inodes", "time"]
    print_table("Plan of stage one", columns, rows)
    space, need, probe = found.space, found.bytes_on_disk, found.probe
    blocks = f" (files end on blocks of {size(space.block_bytes)})" if space.block_bytes else ""
    free = "an object store does not fill; --quota sets a limit"
    if space.free_bytes is not None:
        inodes = "unlimited" if space.free_inodes is None else f"{space.free_inodes:,}"
        free = f"{size(space.free_bytes)}, {inodes} inodes"
    lines = [
        ["already there", f"{found.todo.num_cached} units, {size(found.todo.cached_bytes)}"],
        ["needed on disk", f"{size(need)}{blocks}"],
        ["free", free],
    ]
    if space.quota_bytes is not None:
        held = f"{size(space.quota_bytes)}, of which {size(space.used_bytes)} are used"
        lines.append(["quota", held])
    if probe is not None:
        speed, writing = size(probe.write_bytes_per_s), duration(need / probe.write_bytes_per_s)
        lines += [
            ["peak memory", f"{size(probe.memory_bytes)} (largest case, one process)"],
            ["disk", f"writes {speed}/s: {writing} of the time above"],
            ["probe", ", ".join(dict.fromkeys(s.case for s in probe.samples))],
        ]
    if found.unreadable:
        lines.append(["left out", f"{len(found.unreadable)} cases without a readable header"])
    print_table("Space, memory, disk", ["", ""], lines)
