"""What stage one measured of each teacher, kept in the index for whoever has neither labels nor
weights at hand: stage two reads temperatures from it.

One sealed JSON per teacher and registry. It holds what was found, no verdict: thresholds may change
without measuring anything again.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from pipeline.admission.looks import Look
from pipeline.cache.index import IndexedTeacher, read_teacher_index
from pipeline.cache.sealed import read_sealed, write_sealed
from pipeline.calibration import Calibration
from pipeline.config import Config, digest, short
from pipeline.data.registry import Registry
from pipeline.errors import CacheError, CacheMissing
from pipeline.folder import Folder, matching

# Raised when the same units would give other evidence.
_VERSION = 1
_FOLDER = "index/evidence"
_UNREADABLE = (OSError, ValueError, KeyError, TypeError, AttributeError)


class Score(Config):
    """One labelled case: {log-odds > 0} against the label, on the student grid.

    Attributes:
        case: `dataset/case`.
        dice: 0 where the prediction alone is empty, None where the label is.
        sensitivity: share of the label that was found; None where the label is empty.
        region_ml: size of {log-odds > 0}.
    """

    case: str
    dice: float | None
    sensitivity: float | None
    region_ml: float


class Region(Config):
    """One case without a label of the organ; `region_ml` as in `Score`."""

    case: str
    region_ml: float


class Circumstances(Config):
    """What a case is like: spacing (z, y, x) of its file, 1st and 99th percentile of its HU."""

    spacing_mm: tuple[float, float, float]
    hu: tuple[float, float]


class OrganEvidence(Config):
    """What was measured of a teacher in one organ.

    Attributes:
        split: of the scored cases; a teacher is over-confident on cases that it was trained on.
        scored: labelled cases.
        elsewhere: cases of datasets that do not annotate the organ.
        label_ml: smallest and largest organ in the labels of training and validation cases.
        calibration: over the scored cases; None if there was nothing to measure it on.
    """

    split: str | None
    scored: tuple[Score, ...]
    elsewhere: tuple[Region, ...]
    label_ml: tuple[float, float] | None
    calibration: Calibration | None


class Evidence(Config):
    """What was measured of a teacher.

    Attributes:
        teacher: its name.
        teacher_digest: that its units are stored under.
        spacing_mm: z, y, x that the network is given its images at; None: whatever they have.
        organs: organ -> what was measured.
        cases: `dataset/case` -> what the case is like.
        unread: cases that it could not be judged by: no unit, or a damaged one.
    """

    teacher: str
    teacher_digest: str
    spacing_mm: tuple[float, float, float] | None
    organs: dict[str, OrganEvidence]
    cases: dict[str, Circumstances]
    unread: tuple[str, ...]


def evidence_file(work: Folder, registry: Registry, teacher: IndexedTeacher) -> Folder:
    """Where it is kept: by the teacher's digest and by what the registry says of the datasets,
    so that two registries over one work folder do not take turns."""
    datasets = {dataset: registry.dataset_key(dataset) for dataset in registry.datasets}
    key = digest({"teacher_digest": teacher.digest, "datasets": datasets})
    return work / _FOLDER / f"{teacher.teacher}.{short(key)}.json"


def evidence_files(work: Folder) -> list[Folder]:
    """All that is kept, of whatever teacher and registry."""
    return matching(work / _FOLDER, "[!.]*.json")


def measured_of(teacher: IndexedTeacher, looks: Sequence[Look]) -> dict[str, Any]:
    """All that the evidence depends on: whoever finds the same need not measure again."""
    return {
        "version": _VERSION,
        "teacher_digest": teacher.digest,
        "organs": {look.organ: look.to_json() for look in looks},
    }


def write_evidence(
    work: Folder,
    registry: Registry,
    teacher: IndexedTeacher,
    measured: Mapping[str, Any],
    evidence: Evidence,
) -> None:
    """Records what was measured, and of what (`measured_of`).

    Raises:
        WorkFolderError: it cannot be written.
    """
    content = {"of": dict(measured), "evidence": evidence.model_dump(mode="json")}
    path = evidence_file(work, registry, teacher)
    write_sealed(path, content)


def read_evidence(
    work: Folder,
    registry: Registry,
    teacher: IndexedTeacher,
    *,
    measured: Mapping[str, Any] | None = None,
) -> Evidence:
    """What was measured of a teacher.

    Args:
        work: the work folder.
        registry: read with or without its files.
        teacher: as the index has it.
        measured: what it must have been measured of; None takes any.

    Raises:
        CacheMissing: it is absent, damaged, or of something else.
    """
    path = evidence_file(work, registry, teacher)
    try:
        content = read_sealed(path)
        if measured is not None and digest(content["of"]) != digest(measured):
            raise ValueError("it was measured on other cases")
        return Evidence.model_validate(content["evidence"])
    except _UNREADABLE as error:
        raise CacheMissing(
            f"what stage one measured of teacher {teacher.teacher} (Dice, temperature) is not in "
            "the cache.",
            where=path,
            fix="Run `pipeline cache-teachers` with this registry: it measures it on the cached "
            "validation cases.",
        ) from error


def unreadable_evidence(work: Folder) -> dict[Folder, str]:
    """Files that are not what was written -> why; stage one measures anew what they said."""
    found = {}
    for path in evidence_files(work):
        try:
            read_sealed(path)
        except _UNREADABLE as error:
            found[path] = f"{type(error).__name__}: {error}"
    return found


def temperatures(
    work: Folder, registry: Registry, teachers: Sequence[str]
) -> dict[tuple[str, str], float | None]:
    """(teacher, organ) -> its temperature; None where no label could tell.

    Raises:
        CacheMissing, CacheStale: stage one has not measured it.
    """
    found: dict[tuple[str, str], float | None] = {}
    for name in teachers:
        teacher = read_teacher_index(work, name, registry.teacher_key(name))
        for organ, evidence in read_evidence(work, registry, teacher).organs.items():
            known = evidence.calibration
            found[name, organ] = None if known is None else known.temperature
    return found


def is_current(
    work: Folder, registry: Registry, teacher: IndexedTeacher, measured: Mapping[str, Any]
) -> Evidence | None:
    """The evidence on record, if it is of exactly this and nothing was missing then."""
    try:
        evidence = read_evidence(work, registry, teacher, measured=measured)
    except CacheError:
        return None
    return None if evidence.unread else evidence
