"""Reads units back from the cache and measures a teacher by them: scores, volumes, temperatures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from pipeline.cache.index import IndexedCase, IndexedTeacher, case_path, unit_digest, unit_path
from pipeline.cache.reader import Unit
from pipeline.cache.schema import IMAGE, LABEL, log_odds_name
from pipeline.consensus.evidence import (
    Circumstances,
    Counts,
    Evidence,
    GateCases,
    OrganEvidence,
    Region,
    Score,
    calibrate,
    count_log_odds,
    no_counts,
)
from pipeline.data.labels import IGNORE
from pipeline.data.registry import Registry
from pipeline.data.volume import Grid
from pipeline.errors import CacheError
from pipeline.folder import Folder

_PERCENTILES = (1, 99)


@dataclass
class _Tally:
    """What is collected of one organ, case by case."""

    scored: list[Score] = field(default_factory=list)
    elsewhere: list[Region] = field(default_factory=list)
    counts: Counts = field(default_factory=no_counts)


def measure(
    work: Folder, registry: Registry, teacher: IndexedTeacher, gate_cases: Sequence[GateCases]
) -> tuple[Evidence, Mapping[str, CacheError]]:
    """Measures one teacher by the units that are in the cache, one case in memory at a time.
    Returns the evidence, and the cases whose units could not be read -> why."""
    tallies = {one.organ: _Tally() for one in gate_cases}
    cases: dict[str, Circumstances] = {}
    unread: dict[str, CacheError] = {}
    for case in dict.fromkeys(c for one in gate_cases for c in (*one.scored, *one.elsewhere)):
        try:
            cases[case.name] = _measure_case(work, registry, teacher, case, gate_cases, tallies)
        except CacheError as error:
            unread[case.name] = error
    organs = {
        one.organ: OrganEvidence(
            split=one.split,
            scored=tuple(tallies[one.organ].scored),
            elsewhere=tuple(tallies[one.organ].elsewhere),
            label_ml=_label_range(work, one),
            calibration=calibrate(tallies[one.organ].counts),
        )
        for one in gate_cases
    }
    evidence = Evidence(
        teacher=teacher.teacher,
        teacher_digest=teacher.digest,
        spacing_mm=teacher.inputs["teacher"].get("spacing_mm"),
        organs=organs,
        cases=cases,
        unread=tuple(unread),
    )
    return evidence, unread


def _measure_case(
    work: Folder,
    registry: Registry,
    teacher: IndexedTeacher,
    case: IndexedCase,
    gate_cases: Sequence[GateCases],
    tallies: Mapping[str, _Tally],
) -> Circumstances:
    """Adds one case to the tallies of all organs that want it; all of it is read before any is."""
    unit = Unit.open(unit_path(work, teacher, case), expect=unit_digest(teacher, case))
    shown = Unit.open(case_path(work, case), expect=case.digest)
    wanted = [one for one in gate_cases if case in one.scored or case in one.elsewhere]
    odds = {one.organ: unit.read(log_odds_name(one.organ)) for one in wanted}
    label: npt.NDArray[np.uint8] = shown.read(LABEL)
    circumstances = _circumstances(shown)
    voxel_ml = Grid.from_json(shown.attributes["grid"]).voxel_ml
    for one in wanted:
        tally, values = tallies[one.organ], odds[one.organ]
        region_ml = round(float(np.count_nonzero(values > 0)) * voxel_ml, 3)
        if case in one.elsewhere:
            tally.elsewhere.append(Region(case=case.name, region_ml=region_ml))
            continue
        inside, known = label == registry.organs[one.organ], label != IGNORE
        dice, sensitivity = _overlap(values > 0, inside, known)
        tally.scored.append(
            Score(case=case.name, dice=dice, sensitivity=sensitivity, region_ml=region_ml)
        )
        if one.organ not in shown.receipt.swallowed:  # else nobody knows where it is
            tally.counts += count_log_odds(values, inside, known)
    return circumstances


def _overlap(
    region: npt.NDArray[np.bool_], inside: npt.NDArray[np.bool_], known: npt.NDArray[np.bool_]
) -> tuple[float | None, float | None]:
    """Dice and sensitivity over voxels that the label knows; an unseen voxel counts as a miss."""
    region = region & known
    num_inside = int(np.count_nonzero(inside))
    if num_inside == 0:
        return None, None
    hits = int(np.count_nonzero(region & inside))
    dice = 2 * hits / (int(np.count_nonzero(region)) + num_inside)
    return round(dice, 6), round(hits / num_inside, 6)


def _circumstances(case: Unit) -> Circumstances:
    image = case.read(IMAGE)[::2, ::2, ::2]
    low, high = np.percentile(image, _PERCENTILES)
    grid = Grid.from_json(case.attributes["source_grid"])
    z, y, x = (
        0.0 if axis == grid.slice_axis else round(float(mm), 4)
        for axis, mm in enumerate(grid.spacing_mm)
    )
    return Circumstances(spacing_mm=(z, y, x), hu=(round(float(low), 1), round(float(high), 1)))


def _label_range(work: Folder, one: GateCases) -> tuple[float, float] | None:
    """Smallest and largest organ in ml by the labels, those of volumes where there are any, as far
    as they can be read; no array is."""
    sizes: dict[bool, list[float]] = {False: [], True: []}  # of volumes, of slices
    for case in one.labelled:
        try:
            attributes = Unit.open(case_path(work, case), expect=case.digest).attributes
        except CacheError:
            continue  # the case is reported where it is needed
        voxels = attributes["organ_voxels"][one.organ]
        if voxels:
            grid = Grid.from_json(attributes["grid"])
            sizes[grid.slice_axis is not None].append(voxels * grid.voxel_ml)
    found = sizes[False] or sizes[True]
    return (round(min(found), 3), round(max(found), 3)) if found else None
