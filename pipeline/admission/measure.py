"""Reads units back from the cache and measures a teacher by them: scores, volumes, temperatures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from pipeline.admission.evidence import (
    Circumstances,
    Evidence,
    OrganEvidence,
    Region,
    Score,
)
from pipeline.admission.looks import Look
from pipeline.cache.index import IndexedCase, IndexedTeacher, case_path, unit_digest, unit_path
from pipeline.cache.reader import Unit
from pipeline.cache.schema import IMAGE, LABEL, log_odds_name
from pipeline.calibration import Counts, calibrate, count_log_odds, no_counts
from pipeline.data.registry import Registry
from pipeline.errors import CacheError
from pipeline.folder import Folder
from pipeline.labels import IGNORE
from pipeline.volume import Grid

_PERCENTILES = (1, 99)


@dataclass
class _Tally:
    """What is collected of one organ, case by case."""

    scored: list[Score] = field(default_factory=list)
    elsewhere: list[Region] = field(default_factory=list)
    counts: Counts = field(default_factory=no_counts)


def measure(
    work: Folder, registry: Registry, teacher: IndexedTeacher, looks: Sequence[Look]
) -> tuple[Evidence, Mapping[str, CacheError]]:
    """Measures one teacher by the units that are in the cache, one case in memory at a time.

    Args:
        work: the work folder.
        registry: ids of the organs.
        teacher: as the index has it.
        looks: which cases, organ by organ.

    Returns:
        The evidence, and the units that could not be read -> why.
    """
    tallies = {look.organ: _Tally() for look in looks}
    cases: dict[str, Circumstances] = {}
    unread: dict[str, CacheError] = {}
    for case in dict.fromkeys(c for look in looks for c in (*look.scored, *look.elsewhere)):
        try:
            cases[case.name] = _look_at(work, registry, teacher, case, looks, tallies)
        except CacheError as error:
            unread[case.name] = error
    organs = {
        look.organ: OrganEvidence(
            split=look.split,
            scored=tuple(tallies[look.organ].scored),
            elsewhere=tuple(tallies[look.organ].elsewhere),
            label_ml=_label_range(work, look),
            calibration=calibrate(tallies[look.organ].counts),
        )
        for look in looks
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


def _look_at(
    work: Folder,
    registry: Registry,
    teacher: IndexedTeacher,
    case: IndexedCase,
    looks: Sequence[Look],
    tallies: Mapping[str, _Tally],
) -> Circumstances:
    """Adds one case to the tallies of all organs that want it; all of it is read before any is."""
    unit = Unit.open(unit_path(work, teacher, case), expect=unit_digest(teacher, case))
    shown = Unit.open(case_path(work, case), expect=case.digest)
    wanted = [look for look in looks if case in look.scored or case in look.elsewhere]
    odds = {look.organ: unit.read(log_odds_name(look.organ)) for look in wanted}
    label: npt.NDArray[np.uint8] = shown.read(LABEL)
    circumstances = _circumstances(shown)
    voxel_ml = Grid.from_json(shown.attributes["grid"]).voxel_ml
    for look in wanted:
        tally, values = tallies[look.organ], odds[look.organ]
        region_ml = round(float(np.count_nonzero(values > 0)) * voxel_ml, 3)
        if case in look.elsewhere:
            tally.elsewhere.append(Region(case=case.name, region_ml=region_ml))
            continue
        inside, known = label == registry.organs[look.organ], label != IGNORE
        dice, sensitivity = _overlap(values > 0, inside, known)
        tally.scored.append(
            Score(case=case.name, dice=dice, sensitivity=sensitivity, region_ml=region_ml)
        )
        if look.organ not in shown.receipt.swallowed:  # else nobody knows where it is
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
    z, y, x = (
        round(float(mm), 4) for mm in Grid.from_json(case.attributes["source_grid"]).spacing_mm
    )
    return Circumstances(spacing_mm=(z, y, x), hu=(round(float(low), 1), round(float(high), 1)))


def _label_range(work: Folder, look: Look) -> tuple[float, float] | None:
    """Smallest and largest organ in ml by the labels, as far as they can be read; no array is."""
    sizes = []
    for case in look.labelled:
        try:
            attributes = Unit.open(case_path(work, case), expect=case.digest).attributes
        except CacheError:
            continue  # the case is reported where it is needed
        voxels = attributes["organ_voxels"][look.organ]
        if voxels:
            sizes.append(voxels * Grid.from_json(attributes["grid"]).voxel_ml)
    return (round(min(sizes), 3), round(max(sizes), 3)) if sizes else None
