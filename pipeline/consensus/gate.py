"""The admission gate: measures what is not on record, judges, tells, and says which teachers may
pass.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Final

import numpy as np

from pipeline.cache.index import IndexedTeacher
from pipeline.cache.store import write_json
from pipeline.consensus.evidence import (
    Circumstances,
    Evidence,
    GateCases,
    OrganEvidence,
    Score,
    by_teacher,
    read_evidence,
    write_evidence,
)
from pipeline.consensus.measure import measure
from pipeline.data.registry import Registry
from pipeline.errors import CacheMissing, ConfigError, TeacherError, WorkFolderError
from pipeline.folder import Folder
from pipeline.log import Log, number, print_table

# What follows from the evidence: pure functions of it and of the registry.
#
# A Dice below the threshold stops stage one: labels say that the teacher is wrong. What is
# implausible on datasets without a label of the organ only warns: nobody can say there that it is
# wrong, since the organ may be cut off, removed or ill in a few cases.

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

    Dice and sensitivity are means over the scored cases whose label is not empty. `accepted` are
    teachers that the user takes as they are.
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
    """Each teacher where nobody annotated its organ: how many cases look implausible, and why."""
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
                    "odd_volume": sum(
                        is_odd_volume(ml, seen.label_ml) and not case.one_slice
                        for ml, case in zip(sizes, cases, strict=True)
                    ),
                    "odd_spacing": sum(_is_coarse(c, found, own) for c in cases),
                    "odd_hu": sum(_is_odd_hu(c, own) for c in cases),
                }
                rows.append({**row, "flag": _elsewhere_flag(row)})
    return rows


def refusals(rows: Sequence[Row]) -> Mapping[str, TeacherError]:
    """Teacher -> why stage one does not go on with it, by rows of `score_rows`; those who passed or
    are accepted are absent."""
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
    """Teacher -> organ -> by how little it would have failed, by rows of `score_rows`; for the
    receipts. Of several poor datasets the worst counts."""
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
    frequent = any(2 * row[key] >= total for key in words)
    return f"IMPLAUSIBLE: {', '.join(found)}" if frequent else ", ".join(found)


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
    # How thick one slice is says nothing of how far apart slices are.
    spacings = zip(case.spacing_mm, usual, strict=True)
    return any(mm > SPACING_FACTOR * most for mm, most in spacings if most)


def _is_odd_hu(case: Circumstances, own: Sequence[Circumstances]) -> bool:
    """A percentile of its HU further than `HU_TOLERANCE` from all those of the scored cases: an
    offset of 1024, or values that were scaled or windowed."""
    for end in range(2):
        seen = [c.hu[end] for c in own]
        if seen and not (min(seen) - HU_TOLERANCE <= case.hu[end] <= max(seen) + HU_TOLERANCE):
            return True
    return False


@dataclass(frozen=True)
class GateResult:
    """What came of it.

    Attributes:
        scores: rows of teachers against labels.
        elsewhere: rows of teachers where there is no label.
        refused: teacher -> why stage one must not go on.
        accepted: teacher -> organ -> Dice, threshold and cases, for those that `--accept` lets by.
        problems: unit, or file -> why it could not be read or written.
        evidence: that it is judged by, one per teacher.
    """

    scores: Sequence[Row]
    elsewhere: Sequence[Row]
    refused: Mapping[str, TeacherError]
    accepted: Mapping[str, Mapping[str, Any]]
    problems: Mapping[str, Exception]
    evidence: Sequence[Evidence] = ()

    @property
    def failed(self) -> Mapping[str, Exception]:
        """All that goes into a stage's report: problems, and refusals as `teacher <name>`."""
        refused = {f"teacher {name}": error for name, error in self.refused.items()}
        return {**self.problems, **refused}

    @property
    def notes(self) -> Mapping[str, Mapping[str, Any]]:
        """Teacher -> what the receipts of its units note that are written from now on."""
        return {name: {"accepted": organs} for name, organs in self.accepted.items()}

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return {
            "teachers": list(self.scores),
            "elsewhere": list(self.elsewhere),
            "accepted": {name: dict(organs) for name, organs in self.accepted.items()},
            "refused": {name: str(error) for name, error in self.refused.items()},
        }


NOT_JUDGED = GateResult([], [], {}, {}, {})


def check_accepted(registry: Registry, accept: Iterable[str]) -> None:
    """Every name is a teacher of the registry."""
    unknown = [name for name in accept if name not in registry.teachers]
    if unknown:
        raise ConfigError(
            f"--accept {unknown[0]}: there is no such teacher.",
            where=registry.path,
            fix=f"Teachers are: {', '.join(registry.teachers) or 'none'}.",
        )


def run_gate(
    registry: Registry,
    work: Folder,
    teachers: Mapping[str, IndexedTeacher],
    gate_cases: Sequence[GateCases],
    *,
    accept: Sequence[str] = (),
    log: Log,
) -> GateResult:
    """Judges every teacher by the units in the cache that the gate looks at.

    What is on record for the same cases is not measured again. Units that could not be made or
    read are left out; a teacher without any is not scored, and passes. `accept` are teachers to go
    on with all the same.
    """
    evidence: list[Evidence] = []
    problems: dict[str, Exception] = {}
    for name, own in by_teacher(gate_cases).items():
        known = None
        with suppress(CacheMissing):
            known = read_evidence(work, registry, teachers[name], gate_cases=own)
        if known is None or known.unread:  # what could not be read then may be there now
            known, unread = measure(work, registry, teachers[name], own)
            problems |= {f"{name} x {case}": error for case, error in unread.items()}
            try:
                write_evidence(work, registry, teachers[name], own, known)
            except WorkFolderError as error:
                problems[f"evidence of teacher {name}"] = error
        evidence.append(known)
    result = _judge(registry, evidence, accept, problems)
    _report(work, result, problems, log)
    return result


def read_gate_result(
    registry: Registry,
    work: Folder,
    teachers: Mapping[str, IndexedTeacher],
    gate_cases: Sequence[GateCases],
    accept: Sequence[str],
) -> GateResult:
    """What follows from what `run_gate` has measured of these very teachers on these very cases,
    units that were missing then or not; measures nothing. The arguments are those of `run_gate`.

    Raises:
        CacheMissing: it has not.
    """
    evidence = []
    for name, own in by_teacher(gate_cases).items():
        try:
            evidence.append(read_evidence(work, registry, teachers[name], gate_cases=own))
        except CacheMissing as error:
            raise CacheMissing(
                f"the admission gate has not judged teacher {name} on the cases that are in the "
                "cache now, and no part of a job array judges.",
                where=work,
                fix="Run `pipeline cache-teachers --gate-only` with this registry and these "
                "settings, then the parts; `pipeline submit` makes such a chain.",
            ) from error
    return _judge(registry, evidence, accept, {})


def _judge(
    registry: Registry,
    evidence: Sequence[Evidence],
    accept: Sequence[str],
    problems: Mapping[str, Exception],
) -> GateResult:
    scores = score_rows(registry, evidence, accept)
    return GateResult(
        scores, elsewhere_rows(evidence), refusals(scores), acceptance(scores), problems, evidence
    )


def _report(work: Folder, result: GateResult, problems: dict[str, Exception], log: Log) -> None:
    path = work / "reports" / "admission.json"
    try:
        write_json(path, result.to_json())
    except WorkFolderError as error:
        problems[path.name] = error
    log.event("admission", **result.to_json())
    on_training = [row["teacher"] for row in result.scores if row["split"] == "train"]
    if on_training:
        log.warn(
            f"teachers {', '.join(dict.fromkeys(on_training))}: no validation case has a label of "
            "their organ, so they are scored on training cases. A teacher that was trained on "
            "them is over-confident there: Dice and temperature may be too good."
        )
    for row in result.scores:
        if row["passed"] is None:
            log.warn(f"teacher {row['teacher']}, {row['organ']}: {row['flag']}; it passes unseen.")
        if row["accepted"]:
            log.warn(
                f"teacher {row['teacher']} is accepted with a Dice of {row['dice']:.3f} in "
                f"{row['organ']} on {row['dataset']}; receipts say so from now on."
            )
    for row in result.elsewhere:
        if row["flag"].startswith("IMPLAUSIBLE"):
            where = f"teacher {row['teacher']}, {row['organ']} on {row['dataset']}"
            flag = row["flag"].removeprefix("IMPLAUSIBLE: ")
            log.warn(f"{where}: {flag}. Look at it before you train.")


def print_gate_result(result: GateResult) -> None:
    """Both tables and the temperatures, for people."""
    if not result.scores:
        return
    temperatures = {
        (found.teacher, organ): None if seen.calibration is None else seen.calibration.temperature
        for found in result.evidence
        for organ, seen in found.organs.items()
    }
    rows = [
        [
            r["teacher"], r["organ"], r["dataset"] or "–",
            f"{r['num_cases']} ({r['split']})" if r["split"] else "0",
            number(r["dice"]), number(r["sensitivity"]), f"{r['threshold']:g}",
            number(temperatures.get((r["teacher"], r["organ"])), ".2f"), r["flag"],
        ]
        for r in result.scores
    ]  # fmt: skip
    columns = ["teacher", "organ", "dataset", "cases", "Dice", "sensitivity", "least Dice", "T", ""]
    print_table("Teachers against the labels, read back from the cache", columns, rows)
    rows = [
        [
            r["teacher"], r["organ"], r["dataset"], str(r["num_cases"]), f"{r['median_ml']:.0f}",
            "–" if r["label_ml"] is None else "{:.0f} to {:.0f}".format(*r["label_ml"]), r["flag"],
        ]
        for r in result.elsewhere
    ]  # fmt: skip
    if rows:
        columns = ["teacher", "organ", "dataset", "cases", "median ml", "labels, ml", ""]
        print_table("Teachers where nobody annotated their organ", columns, rows)
