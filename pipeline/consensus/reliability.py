"""Which word of which teacher counts in which case: pure functions of what stage one measured.

Two kinds of evidence. **Labels**: on labelled validation cases a teacher finds a share of its
organ (sensitivity), and a share of what it claims is the organ (precision); the worst dataset
counts, since a teacher is best where it was trained. **Plausibility**, where no label speaks: the
size of its region against what labels show, and the number of its parts.

Ours, not the paper's; see docs/method.md.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import fmean
from typing import Final

import numpy as np

from pipeline.cache.index import read_teacher_index
from pipeline.cache.reader import FULL, CachedCase, ReliabilityConfig, Trust, Unit
from pipeline.cache.schema import log_odds_name
from pipeline.consensus.evidence import OrganEvidence, Score, read_evidence
from pipeline.consensus.gate import VOLUME_FACTOR
from pipeline.data.registry import Registry
from pipeline.data.volume import Grid, coarse, large_components
from pipeline.errors import CacheMissing
from pipeline.folder import Folder
from pipeline.log import Log

# Ends of the labelled sizes that count as usual; one label that was cut or slipped does not.
QUANTILES: Final = (0.05, 0.95)
MOST_PARTS: Final = 2  # where no label tells: paired organs


@dataclass(frozen=True)
class ValidationScore:
    """What labels say of a teacher in one organ, on the dataset where it is worst.

    Attributes:
        found: mean sensitivity; None where no labelled case shows the organ.
        right: mean precision; None where it claimed nothing in any of them.
        found_on: the dataset of `found`.
        right_on: the dataset of `right`.
        num_cases: labelled cases that show the organ, of all datasets.
    """

    found: float | None
    right: float | None
    found_on: str = ""
    right_on: str = ""
    num_cases: int = 0


UNKNOWN: Final = ValidationScore(None, None)


def validation_score(evidence: OrganEvidence) -> ValidationScore:
    """The worst of each side over datasets."""
    shown = [score for score in evidence.scored if score.dice is not None]
    by_dataset: dict[str, list[Score]] = {}
    for score in shown:
        by_dataset.setdefault(score.case.split("/")[0], []).append(score)
    found = {d: fmean(s.sensitivity or 0.0 for s in scores) for d, scores in by_dataset.items()}
    precisions = {d: [p for s in scores if (p := precision(s)) is not None]
                  for d, scores in by_dataset.items()}  # fmt: skip
    right = {d: fmean(values) for d, values in precisions.items() if values}
    found_on = min(found, key=lambda d: found[d], default="")
    right_on = min(right, key=lambda d: right[d], default="")
    return ValidationScore(found.get(found_on), right.get(right_on), found_on, right_on, len(shown))


def precision(score: Score) -> float | None:
    """Share of the region that is the organ: P = D S / (2 S - D), from Dice D and sensitivity S;
    None for an empty region."""
    if score.dice is None or score.sensitivity is None or score.region_ml == 0:
        return None
    if score.sensitivity == 0:
        return 0.0
    return min(1.0, score.dice * score.sensitivity / (2 * score.sensitivity - score.dice))


@dataclass(frozen=True)
class ClaimedRegion:
    """What a teacher claims of a case: ml, and large connected parts."""

    ml: float
    parts: int


def region_of(unit: Unit, organ: str) -> ClaimedRegion:
    """As stage one noted it; of a unit that was written before it did, counted now."""
    grid = Grid.from_json(unit.noted["grid"])
    regions = unit.noted.get("regions")
    if regions is None:
        # Through a unit of its own: what is opened here for all cases is not kept open.
        mask = replace(unit).read(log_odds_name(organ)) > 0
        few = mask[coarse(grid.spacing_mm)]
        regions = {organ: {"voxels": int(np.count_nonzero(mask)), "parts": large_components(few)}}
    return ClaimedRegion(regions[organ]["voxels"] * grid.voxel_ml, regions[organ]["parts"])


def is_slice(case: CachedCase) -> bool:
    """Whether a case is one slice: it may show anything of an organ, from nothing to its largest
    section, in any number of pieces."""
    return Grid.from_json(case.case.noted["grid"]).slice_axis is not None


def usual_ml(
    cases: Sequence[CachedCase], organ: str, *, of_slices: bool = False
) -> tuple[float, float] | None:
    """5 % and 95 % quantile of an organ's size in the labels of volumes, or 0 and 95 % of that of
    its sections in those of slices; None without a label of it."""
    shown = (c for c in cases if organ in c.annotated and is_slice(c) == of_slices)
    sizes = [ml for case in shown if (ml := case.organ_ml(organ))]
    if not sizes:
        return None
    low, high = np.quantile(sizes, QUANTILES)
    return 0.0 if of_slices else float(low), float(high)


def trust_of(
    seen: ValidationScore,
    region: ClaimedRegion,
    usual: tuple[float, float] | None,
    config: ReliabilityConfig,
) -> Trust:
    """What counts of a teacher's word in one organ of one case without a label of it."""
    here, not_here, why = True, True, []
    if seen.found is not None and seen.found < config.least_found:
        not_here = False
        why.append(f"finds {seen.found:.0%} of it on {seen.found_on}")
    if seen.right is not None and seen.right < config.least_right:
        here = False
        why.append(f"{seen.right:.0%} of its claims are right on {seen.right_on}")
    if config.plausible and usual is not None:
        low, high = usual
        if region.ml < low / VOLUME_FACTOR:
            not_here = False
            why.append(f"claims {region.ml:.0f} ml, labels show {low:.0f} to {high:.0f}")
        if region.ml > high * VOLUME_FACTOR:
            here = False
            why.append(f"claims {region.ml:.0f} ml, labels show {low:.0f} to {high:.0f}")
    if config.plausible and region.parts > MOST_PARTS:
        here = False
        why.append(f"falls apart into {region.parts} parts")
    return Trust(here, not_here, "; ".join(why)) if why else FULL


def read_validation_scores(
    work: Folder, registry: Registry, log: Log
) -> Mapping[tuple[str, str], ValidationScore]:
    """(teacher, organ) -> what labels say of it; of teachers that stage one has measured."""
    found = {}
    for name in registry.teachers:
        try:
            indexed = read_teacher_index(work, name, registry.teacher_key(name))
            evidence = read_evidence(work, registry, indexed)
        except CacheMissing as error:
            log.remark(f"teacher {name} is believed wherever it is plausible: {error}")
            continue
        for organ, seen in evidence.organs.items():
            found[name, organ] = validation_score(seen)
    return found


def reliable_cases(
    training: Sequence[CachedCase],
    validation: Sequence[CachedCase],
    registry: Registry,
    work: Folder,
    config: ReliabilityConfig,
    log: Log,
) -> list[CachedCase]:
    """Training cases that ignore what teachers cannot be relied on for; says what that is.

    Args:
        training: with the units of their teachers.
        validation: their labels say, with those of training cases, how large an organ is.
        log: hears in which cases a teacher is ignored, and why.
    """
    scores = read_validation_scores(work, registry, log)
    cases = trusting(training, [*training, *validation], scores, config)
    for remark in remarks(cases, scores):
        log.remark(remark)
    return cases


def ignored_claims(cases: Sequence[CachedCase]) -> dict[str, list[bool]]:
    """`teacher x case: organ` -> whether "here" and "not here" count, where one does not."""
    return {
        f"{teacher} x {case.name}: {organ}": [trust.here, trust.not_here]
        for case in cases
        for (teacher, organ), trust in case.trust.items()
    }


def remarks(
    cases: Sequence[CachedCase], scores: Mapping[tuple[str, str], ValidationScore]
) -> list[str]:
    """What a user should hear of teachers that are ignored somewhere, a sentence each."""
    found = []
    for (teacher, organ), seen in scores.items():
        asked = [c for c in cases if teacher in c.teachers and organ not in c.annotated]
        trusts = [c.trust.get((teacher, organ), FULL) for c in asked]
        ignored, no_here, no_not_here = (
            sum(t.ignored for t in trusts),
            sum(not t.here and t.not_here for t in trusts),
            sum(t.here and not t.not_here for t in trusts),
        )
        if not asked or not (ignored or no_here or no_not_here):
            continue
        what = f"teacher {teacher}, {organ}"
        measured = "" if seen.found is None else f" (finds {seen.found:.0%} on {seen.found_on})"
        if ignored == len(asked):
            found.append(
                f"{what}: adds nothing here{measured}; trained without it wherever no label "
                "speaks of the organ."
            )
            continue
        parts = [
            f"{count} {words}"
            for count, words in (
                (ignored, "without it"),
                (no_not_here, 'without its "not here"'),
                (no_here, 'without its "here"'),
            )
            if count
        ]
        by_dataset: dict[str, list[Trust]] = {}
        for case, trust in zip(asked, trusts, strict=True):
            by_dataset.setdefault(case.name.split("/")[0], []).append(trust)
        nothing = [name for name, said in by_dataset.items() if all(t.ignored for t in said)]
        if nothing:
            parts.append(f"so it adds nothing on {', '.join(nothing)}")
        found.append(f"{what}{measured}: of {len(asked)} cases, {', '.join(parts)}.")
    return found


def trusting(
    cases: Sequence[CachedCase],
    labelled: Sequence[CachedCase],
    scores: Mapping[tuple[str, str], ValidationScore],
    config: ReliabilityConfig,
) -> list[CachedCase]:
    """The same cases, without the claims of teachers that do not count.

    An organ that a case annotates is left alone: there labels win.

    Args:
        labelled: training and validation cases: how large is an organ?
        scores: of `read_validation_scores`.
    """
    organs = {organ for case in cases for organ in case.experts}
    usual, sections = (
        {organ: usual_ml(labelled, organ, of_slices=flat) for organ in organs}
        for flat in (False, True)
    )
    return [
        _with_trust(case, sections if is_slice(case) else usual, scores, config) for case in cases
    ]


def _with_trust(
    case: CachedCase,
    usual: Mapping[str, tuple[float, float] | None],
    scores: Mapping[tuple[str, str], ValidationScore],
    config: ReliabilityConfig,
) -> CachedCase:
    trust: dict[tuple[str, str], Trust] = {}
    experts: dict[str, Sequence[str]] = {}
    for organ, who in case.experts.items():
        kept = list(who)
        for teacher in who if organ not in case.annotated else ():
            region = region_of(case.teachers[teacher], organ)
            if is_slice(case):
                region = replace(region, parts=min(region.parts, MOST_PARTS))
            seen = scores.get((teacher, organ), UNKNOWN)
            found = trust_of(seen, region, usual[organ], config)
            if found != FULL:
                trust[teacher, organ] = found
            if found.ignored:
                kept.remove(teacher)
        experts[organ] = kept
    return replace(case, experts=experts, trust=trust)
