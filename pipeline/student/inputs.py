"""What a student is trained from: the cases and units of a cache that one supervision needs.

Everything here is checked before the first step, and everything that determines a training's
outcome beside its settings is named here, for the run's digest.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from pipeline.cache.identity import unchecked
from pipeline.cache.reader import CachedCase
from pipeline.consensus.cohort import Cohort, Temperatures, open_cohort
from pipeline.consensus.evidence import temperatures
from pipeline.consensus.reliability import ignored_claims, reliable_cases
from pipeline.data.labels import LabelSpace
from pipeline.data.registry import Registry
from pipeline.errors import CacheError, CacheMissing, CheckpointError, ConfigError, counted, listed
from pipeline.folder import Folder, matching, read_text
from pipeline.log import Log
from pipeline.student.settings import SupervisionConfig

if TYPE_CHECKING:
    from pipeline.student.network import CachedTap, TapKey

_NAMED = 4


@dataclass(frozen=True)
class TrainingInputs:
    """What a network is trained from.

    Attributes:
        training: cases to train on, each with the units that exist.
        validation: labelled cases; their teachers' units are not opened, since nobody reads them.
        identity: all of this by digest, for the run's digest. `missing_units`, teacher -> training
            cases, is in it only where units are missing, `missing_cases` only where cases are, and
            `fold` only of a registry in folds.
        taps: cached taps of the feature term; empty without one.
        temperatures: (teacher, organ) -> T of a calibrated supervision; empty for others.
    """

    training: Sequence[CachedCase]
    validation: Sequence[CachedCase]
    space: LabelSpace
    identity: Mapping[str, Any]
    taps: Mapping[TapKey, CachedTap] = field(default_factory=dict)
    temperatures: Temperatures = field(default_factory=dict)


def open_inputs(
    supervision: SupervisionConfig,
    registry: Registry,
    work: Folder,
    *,
    allow_missing: bool,
    log: Log,
) -> TrainingInputs:
    """Opens what the cache holds for a supervision.

    Args:
        registry: read without its files.

    Raises:
        CacheMissing: stage one has not run here, or the cache lacks units or temperatures.
        CacheStale: stage one has not seen the registry, or its files, as they are now.
        ConfigError: no teacher, no fully labelled case, or taps that do not fit.
    """
    teachers = list(registry.teachers) if supervision.uses_teachers else []
    if supervision.uses_teachers and not teachers:
        raise ConfigError(
            f"supervision {supervision.kind} needs teachers and the registry has none.",
            where=registry.path,
            fix="Add teachers, or choose kind marginal.",
        )
    _check_stage_one(work)
    cohort = open_cohort(work, registry, teachers=teachers, splits=("train",))
    labelled = open_cohort(work, registry, splits=("validation",))
    for remark in unchecked(work, registry, teachers):
        log.remark(remark)
    _check_complete({**cohort.problems, **labelled.problems}, work, allow_missing, log)
    space = registry.label_space
    training = list(cohort.cases)
    if teachers and training and not any(case.teachers for case in training):
        raise CacheMissing(
            "no training case has a unit of any teacher.",
            where=work,
            fix="Run `pipeline cache-teachers`, or choose a supervision by labels alone.",
        )
    if supervision.kind == "full":
        training = [c for c in training if set(space.organs) <= set(c.annotated)]
        if not training:
            raise ConfigError(
                "supervision full needs training cases in which every organ is annotated.",
                where=registry.path,
                fix="Choose ms_kd or marginal, which are made for partial labels.",
            )
    taps = cached_taps(training, space) if supervision.uses_features else {}
    calibration = (
        _temperatures(work, registry, teachers, log) if supervision.uses_temperatures else {}
    )
    identity = _identity(cohort, training, labelled.cases, space)
    if registry.fold is not None:
        identity["fold"] = registry.fold
        seen = {organ for case in labelled.cases for organ in case.annotated}
        if unseen := [organ for organ in space.organs if organ not in seen]:
            log.remark(
                f"no case of fold {registry.fold} annotates {listed(unseen)}: nothing tells how "
                "well the student of this fold finds it."
            )
    if gone := sorted(unit for unit in {*cohort.problems, *labelled.problems} if " x " not in unit):
        identity["missing_cases"] = gone  # only where there are some, as with units
    _warn_of_unknown_organs(training, log)
    if supervision.uses_reliability and supervision.reliability is not None:
        training = reliable_cases(
            training, labelled.cases, registry, work, supervision.reliability, log
        )
        if doubts := ignored_claims(training):
            identity["doubted"] = doubts
    if calibration:
        identity["temperatures"] = {
            f"{teacher}: {organ}": t for (teacher, organ), t in calibration.items()
        }
    return TrainingInputs(training, labelled.cases, space, identity, taps, calibration)


def check_same_units(folder: Folder, identity: Mapping[str, Any]) -> None:
    """Refuses to go on with a run that was started while the cache held other units.

    Args:
        folder: of the run; one that was never started may be absent.

    Raises:
        CheckpointError: units are there that were missing then, or the other way round.
    """
    if not matching(folder / "checkpoints", "step_*.pt"):
        return  # no step was made: it begins anew
    try:
        before = json.loads(read_text(folder / "config.json"))["inputs"]
        gone = before.get("missing_units", {})
        then = {(teacher, case) for teacher, cases in gone.items() for case in cases}
        if any(before[name] != identity[name] for name in ("cases", "teachers")):
            return  # another difference, which resuming names
    except (OSError, ValueError, KeyError, AttributeError, TypeError):
        return
    missing = identity.get("missing_units", {})
    now = {(teacher, case) for teacher, cases in missing.items() for case in cases}
    fix = "Name another `run` to train with the cache as it is now"
    if then - now:
        raise CheckpointError(
            "this run was started without units that the cache has by now: "
            f"{_grouped(then - now)}. With them it is another run.",
            where=folder,
            fix=f"{fix}.",
        )
    if now - then:
        raise CheckpointError(
            "this run was started with units that the cache no longer has: "
            f"{_grouped(now - then)}.",
            where=folder,
            fix=f"Run `pipeline cache-teachers` to go on with it. {fix}.",
        )


def cached_taps(cases: Sequence[CachedCase], space: LabelSpace) -> Mapping[TapKey, CachedTap]:
    """What the units of these cases say of their taps; mean and variance are over all their cells.

    Raises:
        ConfigError: no tap is cached, or one has another shape in another case.
    """
    from pipeline.student.network import CachedTap

    found: dict[TapKey, CachedTap] = {}
    moments: dict[TapKey, list[Mapping[str, Any]]] = {}
    for case in cases:
        for teacher, unit in case.teachers.items():
            organs = tuple(
                k for k, organ in enumerate(space.organs) if teacher in case.experts[organ]
            )
            for tap, entry in unit.noted["taps"].items():
                z, y, x = entry["stride"]
                cached = CachedTap(entry["channels"], (z, y, x), organs)
                if found.setdefault((teacher, tap), cached) != cached:
                    raise ConfigError(
                        f"tap {tap!r} of teacher {teacher} has other cells or channels in "
                        f"{case.name} than in the cases before it.",
                        where="supervision.features",
                        fix="Set features.weight to 0, or give the teacher a fixed spacing_mm.",
                    )
                moments.setdefault((teacher, tap), []).append(entry)
    if not found:
        raise ConfigError(
            "the feature term needs cached features and the cache holds none.",
            where="supervision.features",
            fix="Name `taps` in the registry and run cache-teachers, or set features.weight to 0.",
        )
    # The order of the adapters' weights; that of teachers in the registry is in no digest.
    return {key: _with_moments(found[key], moments[key]) for key in sorted(found)}


def _with_moments(tap: CachedTap, units: Sequence[Mapping[str, Any]]) -> CachedTap:
    cells = np.array([unit["cells"] for unit in units])[:, None] / sum(u["cells"] for u in units)
    means, stds = (np.array([unit[name] for unit in units]) for name in ("mean", "std"))
    mean = (cells * means).sum(axis=0)
    std = np.sqrt((cells * (stds**2 + (means - mean) ** 2)).sum(axis=0))
    return replace(tap, mean=tuple(mean.tolist()), std=tuple(std.tolist()))


def _identity(
    cohort: Cohort,
    training: Sequence[CachedCase],
    validation: Sequence[CachedCase],
    space: LabelSpace,
) -> dict[str, Any]:
    identity: dict[str, Any] = {
        "cases": {c.name: c.case.receipt.digest for c in training},
        "validation": {c.name: c.case.receipt.digest for c in validation},
        "teachers": {name: teacher.digest for name, teacher in cohort.teachers.items()},
        "organs": dict(space.ids),
    }
    missing = {t: [c.name for c in training if t not in c.teachers] for t in cohort.teachers}
    # Only where there is something to say: a complete cache keeps the digest it always had.
    if any(missing.values()):
        identity["missing_units"] = {t: cases for t, cases in missing.items() if cases}
    return identity | swallowed_organs([*training, *validation])


def swallowed_organs(cases: Sequence[CachedCase]) -> dict[str, Any]:
    """What a run's identity says of organs that the grid swallows; the digests of cases do not."""
    found = {c.name: list(c.case.receipt.swallowed) for c in cases if c.case.receipt.swallowed}
    return {"swallowed_organs": found} if found else {}


def _warn_of_unknown_organs(cases: Sequence[CachedCase], log: Log) -> None:
    """Cases that were cached before voxels of the label's file were noted: where the grid has none
    of an organ, they cannot tell an absent organ from one that is too small for it."""
    unknown = [
        case.name
        for case in cases
        if "file_voxels" not in case.case.receipt.notes
        and not all(case.case.noted.get("organ_voxels", {}).get(o, 1) for o in case.annotated)
    ]
    if unknown:
        log.remark(
            f"{len(unknown)} cases have no voxel of an annotated organ on the student grid, the "
            f"first {unknown[0]}; they were cached before the program asked whether their labels "
            "have any. `pipeline cache-teachers` finds out without making a unit again."
        )


def _check_stage_one(work: Folder) -> None:
    if not matching(work / "index", "*/*"):
        raise CacheMissing(
            "there is no cache here: `pipeline cache-teachers` has not run in this work folder.",
            where=work,
            fix="Run it first, with this --work and registry, or name another --work.",
        )


def _check_complete(
    problems: Mapping[str, CacheError], work: Folder, allow_missing: bool, log: Log
) -> None:
    if not problems:
        return
    # `open_cohort` names a unit "teacher x case" and a case on the student grid by its name.
    parts = [name.rpartition(" x ") for name in problems]
    text = _grouped({(teacher, case) for teacher, _, case in parts})
    if allow_missing:
        log.remark(
            f"not usable and left out: {text}. Where a teacher is missing, its organ is unknown in "
            "that case unless the label annotates it."
        )
        return
    raise CacheMissing(
        f"{len(problems)} units are missing or damaged: {text}. "
        f"First reason: {next(iter(problems.values()))}",
        where=work,
        fix="Run `pipeline cache-teachers`, or give --allow-missing (allow_missing: true in the "
        "settings) to train with the terms that exist.",
    )


def _grouped(units: set[tuple[str, str]]) -> str:
    """`teacher liver in 3 cases (a, b, c), 1 case itself (d)`."""
    groups: dict[str, list[str]] = {}
    for teacher, case in sorted(units, key=lambda unit: (unit[0] == "", unit)):
        groups.setdefault(teacher, []).append(case)
    said = []
    for teacher, cases in groups.items():
        number = counted(len(cases), "case")
        who = f"teacher {teacher} in {number}" if teacher else f"{number} on the student grid"
        said.append(f"{who} ({listed(cases, _NAMED)})")
    return "; ".join(said)


def _temperatures(
    work: Folder, registry: Registry, teachers: Sequence[str], log: Log
) -> dict[tuple[str, str], float]:
    """What stage one measured; 1, with a remark, where no label could tell."""
    found = temperatures(work, registry, teachers)
    for (teacher, organ), value in found.items():
        if value is None:
            log.remark(
                f"teacher {teacher}: no case in the registry has a label of {organ} to calibrate "
                "it by; its log-odds stay as they are."
            )
    return {who: 1.0 if value is None else value for who, value in found.items()}
