"""From a few measured units to all units: bytes by kind of array, files, seconds."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from pydantic import Field

from pipeline.case_sizes import CaseSize
from pipeline.config import Config
from pipeline.planning.todo import CASES, Todo

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
