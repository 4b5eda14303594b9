"""The gate itself: measures what is not on record, judges, tells, and says who may pass."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pipeline.admission.evidence import Evidence, is_current, measured_of, write_evidence
from pipeline.admission.looks import Look, by_teacher
from pipeline.admission.measure import measure
from pipeline.admission.verdict import Row, acceptance, elsewhere_rows, refusals, score_rows
from pipeline.cache.index import IndexedTeacher
from pipeline.cache.store import write_json
from pipeline.data.registry import Registry
from pipeline.errors import ConfigError, TeacherError, WorkFolderError
from pipeline.folder import Folder
from pipeline.log import Log, print_table


@dataclass(frozen=True)
class Verdict:
    """What came of it.

    Attributes:
        scores: rows of teachers against labels.
        elsewhere: rows of teachers where there is no label.
        refused: teacher -> why stage one must not go on.
        accepted: teacher -> organ -> Dice, threshold and cases, for those that `--accept` lets by.
        problems: unit, or file -> why it could not be read or written.
    """

    scores: Sequence[Row]
    elsewhere: Sequence[Row]
    refused: Mapping[str, TeacherError]
    accepted: Mapping[str, Mapping[str, Any]]
    problems: Mapping[str, Exception]

    @property
    def failed(self) -> Mapping[str, Exception]:
        """All that goes into a stage's report: problems, and refusals as `teacher <name>`."""
        refused = {f"teacher {name}": error for name, error in self.refused.items()}
        return {**self.problems, **refused}

    def notes(self, teacher: str) -> Mapping[str, Any]:
        """For the receipts of units that are written from now on."""
        return {"accepted": self.accepted[teacher]} if teacher in self.accepted else {}

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return {
            "teachers": list(self.scores),
            "elsewhere": list(self.elsewhere),
            "accepted": {name: dict(organs) for name, organs in self.accepted.items()},
            "refused": {name: str(error) for name, error in self.refused.items()},
        }


NOT_JUDGED = Verdict([], [], {}, {}, {})


def check_accepted(registry: Registry, accept: Iterable[str]) -> None:
    """Every name is a teacher of the registry.

    Raises:
        ConfigError: one is not.
    """
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
    looks: Sequence[Look],
    *,
    accept: Sequence[str] = (),
    log: Log,
    show: bool = True,
) -> Verdict:
    """Judges every teacher by the units in the cache that `looks` names.

    What is on record for the same cases is not measured again. Units that could not be made or
    read are left out; a teacher without any is not scored, and passes.

    Args:
        registry: thresholds and organs.
        work: the work folder.
        teachers: as indexed now.
        looks: from `plan_looks`.
        accept: teachers to go on with all the same.
        log: hears of what is odd.
        show: also print the tables.
    """
    evidence: list[Evidence] = []
    problems: dict[str, Exception] = {}
    for name, own in by_teacher(looks).items():
        measured = measured_of(teachers[name], own)
        known = is_current(work, registry, teachers[name], measured)
        if known is None:
            known, unread = measure(work, registry, teachers[name], own)
            problems |= {f"{name} x {case}": error for case, error in unread.items()}
            try:
                write_evidence(work, registry, teachers[name], measured, known)
            except WorkFolderError as error:
                problems[f"evidence of teacher {name}"] = error
        evidence.append(known)
    scores = score_rows(registry, evidence, accept)
    verdict = Verdict(
        scores, elsewhere_rows(evidence), refusals(scores), acceptance(scores), problems
    )
    _tell(work, verdict, evidence, problems, log=log, show=show)
    return verdict


def _tell(
    work: Folder,
    verdict: Verdict,
    evidence: Sequence[Evidence],
    problems: dict[str, Exception],
    *,
    log: Log,
    show: bool,
) -> None:
    path = work / "reports" / "admission.json"
    try:
        write_json(path, verdict.to_json())
    except WorkFolderError as error:
        problems[path.name] = error
    log.event("admission", **verdict.to_json())
    if show:
        print_verdict(verdict, evidence)
    hopeful = [row["teacher"] for row in verdict.scores if row["split"] == "train"]
    if hopeful:
        log.warn(
            f"teachers {', '.join(dict.fromkeys(hopeful))}: no validation case has a label of "
            "their organ, so they are scored on training cases. A teacher that was trained on "
            "them is over-confident there: Dice and temperature may be too good."
        )
    for row in verdict.scores:
        if row["passed"] is None:
            log.warn(f"teacher {row['teacher']}, {row['organ']}: {row['flag']}; it passes unseen.")
        if row["accepted"]:
            log.warn(
                f"teacher {row['teacher']} is accepted with a Dice of {row['dice']:.3f} in "
                f"{row['organ']} on {row['dataset']}; receipts say so from now on."
            )
    for row in verdict.elsewhere:
        if row["flag"].startswith("ODD"):
            where = f"teacher {row['teacher']}, {row['organ']} on {row['dataset']}"
            log.warn(f"{where}: {row['flag'].removeprefix('ODD: ')}. Look at it before you train.")


def print_verdict(verdict: Verdict, evidence: Sequence[Evidence]) -> None:
    """Both tables and the temperatures, for people."""
    if not verdict.scores:
        return
    measured = {
        (found.teacher, organ): seen.calibration
        for found in evidence
        for organ, seen in found.organs.items()
    }
    rows = []
    for r in verdict.scores:
        known = measured.get((r["teacher"], r["organ"]))
        rows.append(
            [
                r["teacher"],
                r["organ"],
                r["dataset"] or "–",
                f"{r['num_cases']} ({r['split']})" if r["split"] else "0",
                _number(r["dice"]),
                _number(r["sensitivity"]),
                f"{r['threshold']:g}",
                "–" if known is None else f"{known.temperature:.2f}",
                r["flag"],
            ]
        )
    columns = ["teacher", "organ", "dataset", "cases", "Dice", "sensitivity", "least Dice", "T", ""]
    print_table("Teachers against the labels, read back from the cache", columns, rows)
    if verdict.elsewhere:
        rows = [
            [
                r["teacher"],
                r["organ"],
                r["dataset"],
                str(r["num_cases"]),
                f"{r['median_ml']:.0f}",
                "–" if r["label_ml"] is None else "{:.0f} to {:.0f}".format(*r["label_ml"]),
                r["flag"],
            ]
            for r in verdict.elsewhere
        ]
        columns = ["teacher", "organ", "dataset", "cases", "median ml", "labels, ml", ""]
        print_table("Teachers where nobody annotated their organ", columns, rows)


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}"
