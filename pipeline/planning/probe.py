"""The probe: two cases, really prepared and run through every teacher, then thrown away."""

from __future__ import annotations

import os
import resource
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from pipeline.cache.index import case_path, unit_path
from pipeline.cache.schema import IMAGE, LABEL, StorageConfig
from pipeline.cache.store import scratch_folder
from pipeline.case_sizes import CaseSize, two_cases
from pipeline.data.nifti import read_image
from pipeline.data.registry import Registry
from pipeline.folder import Folder, remove, replace_file, sizes, temporary_name
from pipeline.log import Advance, Log
from pipeline.planning.rates import FEATURES, IMAGES, LOG_ODDS, METADATA, Sample
from pipeline.planning.todo import CASES, Todo
from pipeline.prepare import prepare_case
from pipeline.units import LoadedTeacher, cache_unit

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
    for name, size in found.items():
        num_bytes[_kind(name.split("/"))] += size
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
