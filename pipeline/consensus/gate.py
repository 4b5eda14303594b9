"""What follows from the evidence: pure functions of it and of the registry.

A Dice below the threshold stops stage one: labels say that the teacher is wrong. What is odd on
datasets without a label of the organ only warns: nobody can say there that it is wrong, since the
organ may be cut off, removed or ill in a few cases.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

import numpy as np

from pipeline.admission.evidence import Circumstances, Evidence, OrganEvidence, Score
from pipeline.data.registry import Registry
from pipeline.errors import TeacherError

# Around what labels, and what the teacher was trained at, show. Coarse on purpose: only warnings
# hang on them, and one that cries often is not heard.
VOLUME_FACTOR: Final = 2.0
SPACING_FACTOR: Final = 2.0
HU_TOLERANCE: Final = 300.0

Row = dict[str, Any]


def score_rows(
    registry: Registry, evidence: Sequence[Evidence], accepted: Sequence[str] = ()
) -> list[Row]:
    """Each teacher against the labels: one row per organ and dataset that annotates it.

    Dice and sensitivity are means over the scored cases whose label is not empty.

    Args:
        registry: thresholds.
        evidence: one per teacher.
        accepted: teachers that the user takes as they are.
    """
    rows = []
    for found in evidence:
        least = registry.least_dice(found.teacher)
        for organ, seen in found.organs.items():
            here: Row = {"teacher": found.teacher, "organ": organ}
            by_dataset: dict[str, list[Score]] = {}
            for score in seen.scored:
                by_dataset.setdefault(score.case.split("/")[0], []).append(score)
            for dataset, scores in by_dataset.items():
                row = {**here, "dataset": dataset, **_means(seen, scores), "threshold": least}
                low = row["dice"] is not None and row["dice"] < least
                row["passed"] = None if row["dice"] is None else not low
                row["accepted"] = low and found.teacher in accepted
                rows.append({**row, "flag": _score_flag(row)})
            if not by_dataset:
                nothing: Row = {"dataset": None, "split": seen.split, "num_cases": 0, "dice": None}
                nothing |= {"sensitivity": None, "threshold": least, "passed": None}
                why = "its cases could not be read" if seen.split else "no labelled case"
                rows.append({**here, **nothing, "accepted": False, "flag": f"not scored: {why}"})
    return rows


def elsewhere_rows(evidence: Sequence[Evidence]) -> list[Row]:
    """Each teacher where nobody annotated its organ: how many cases look odd, and in what."""
    rows = []
    for found in evidence:
        for organ, seen in found.organs.items():
            own = [found.cases[score.case] for score in seen.scored]
            for dataset in dict.fromkeys(r.case.split("/")[0] for r in seen.elsewhere):
                regions = [r for r in seen.elsewhere if r.case.startswith(f"{dataset}/")]
                cases = [found.cases[r.case] for r in regions]
                sizes = [r.region_ml for r in regions]
                row: Row = {
                    "teacher": found.teacher,
                    "organ": organ,
                    "dataset": dataset,
                    "num_cases": len(regions),
                    "median_ml": round(float(np.median(sizes)), 1),
                    "label_ml": None if seen.label_ml is None else list(seen.label_ml),
                    "empty": sum(ml == 0 for ml in sizes),
                    "odd_volume": sum(is_odd_volume(ml, seen.label_ml) for ml in sizes),
                    "odd_spacing": sum(_is_coarse(c, found, own) for c in cases),
                    "odd_hu": sum(_is_odd_hu(c, own) for c in cases),
                }
                rows.append({**row, "flag": _elsewhere_flag(row)})
    return rows


def refusals(rows: Sequence[Row]) -> Mapping[str, TeacherError]:
    """Teacher -> why stage one does not go on with it; those who passed or are accepted are absent.

    Args:
        rows: of `score_rows`.
    """
    poor: dict[str, list[Row]] = {}
    for row in rows:
        if row["passed"] is False and not row["accepted"]:
            poor.setdefault(row["teacher"], []).append(row)
    return {
        name: TeacherError(
            "; ".join(_in_words(row) for row in found) + ".",
            where=f"admission gate, teacher {name}",
            fix="Check its channels (`organs`), spacing, orientation and intensity; or go on with "
            f"it as it is: --accept {name}; or take it out of the registry. What is cached stays.",
        )
        for name, found in poor.items()
    }


def acceptance(rows: Sequence[Row]) -> Mapping[str, Mapping[str, Any]]:
    """Teacher -> organ -> by how little it would have failed; for the receipts.

    Args:
        rows: of `score_rows`; of several poor datasets the worst counts.
    """
    found: dict[str, dict[str, Any]] = {}
    for row in sorted(rows, key=lambda r: 1.0 if r["dice"] is None else r["dice"]):
        if row["accepted"]:
            keys = ("dice", "threshold", "dataset", "split", "num_cases")
            organs = found.setdefault(row["teacher"], {})
            organs.setdefault(row["organ"], {key: row[key] for key in keys})
    return found


def _means(seen: OrganEvidence, scores: Sequence[Score]) -> Row:
    known = [s for s in scores if s.dice is not None]
    dice = [s.dice for s in known if s.dice is not None]
    found = [s.sensitivity for s in known if s.sensitivity is not None]
    return {
        "split": seen.split,
        "num_cases": len(known),
        "dice": round(float(np.mean(dice)), 4) if dice else None,
        "sensitivity": round(float(np.mean(found)), 4) if found else None,
    }


def _score_flag(row: Row) -> str:
    if row["passed"] is None:
        return "not scored: the label is empty"
    if row["passed"]:
        return ""
    return f"POOR: Dice below {row['threshold']:g}" + (", accepted" if row["accepted"] else "")


def _elsewhere_flag(row: Row) -> str:
    """What at least half of the cases show."""
    words = {
        "empty": "no organ found",
        "odd_volume": "size beyond what labels show",
        "odd_spacing": "coarser than it was trained at",
        "odd_hu": "other HU than where it was scored",
    }
    total = row["num_cases"]
    found = [f"{what} in {row[key]} of {total}" for key, what in words.items() if row[key]]
    loud = any(2 * row[key] >= total for key in words)
    return f"ODD: {', '.join(found)}" if loud else ", ".join(found)


def _in_words(row: Row) -> str:
    cases = f"{row['num_cases']} {'training' if row['split'] == 'train' else 'validation'} case"
    cases += "" if row["num_cases"] == 1 else "s"
    return (
        f"{row['organ']} has a mean Dice of {row['dice']:.3f} (sensitivity "
        f"{row['sensitivity']:.3f}) over {cases} of {row['dataset']}, below {row['threshold']:g}"
    )


def is_odd_volume(ml: float, label_ml: tuple[float, float] | None) -> bool:
    """Whether a region lies beyond twice the largest, or below half the smallest labelled organ."""
    if label_ml is None or ml == 0:
        return False
    return not label_ml[0] / VOLUME_FACTOR <= ml <= label_ml[1] * VOLUME_FACTOR


def _is_coarse(case: Circumstances, found: Evidence, own: Sequence[Circumstances]) -> bool:
    """Coarser along an axis than the spacing that the network is given, or, where it takes any,
    than the coarsest case that it was scored on. Finer is resampled without a loss."""
    usual = found.spacing_mm
    if usual is None:
        if not own:
            return False
        z, y, x = (max(c.spacing_mm[axis] for c in own) for axis in range(3))
        usual = (z, y, x)
    return any(mm > SPACING_FACTOR * most for mm, most in zip(case.spacing_mm, usual, strict=True))


def _is_odd_hu(case: Circumstances, own: Sequence[Circumstances]) -> bool:
    """A percentile of its HU further than `HU_TOLERANCE` from all those of the scored cases: an
    offset of 1024, or values that were scaled or windowed."""
    for end in range(2):
        seen = [c.hu[end] for c in own]
        if seen and not (min(seen) - HU_TOLERANCE <= case.hu[end] <= max(seen) + HU_TOLERANCE):
            return True
    return False
