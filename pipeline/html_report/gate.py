"""What the admission gate measured of the run's teachers, and its verdicts by the registry's
thresholds as they are now."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from pipeline.admission.evidence import Evidence, read_evidence
from pipeline.admission.verdict import Row, elsewhere_rows, score_rows
from pipeline.data.registry import Registry
from pipeline.errors import PipelineError
from pipeline.folder import Folder
from pipeline.html_report.lineage import TracedTeacher


@dataclass(frozen=True)
class Gate:
    """Verdicts on the run's teachers.

    Attributes:
        scores: rows of teachers against labels; see `score_rows`. With `temperature`.
        elsewhere: rows of teachers where there is no label; see `elsewhere_rows`.
        unknown: teacher -> why there is no verdict on it.
    """

    scores: Sequence[Row]
    elsewhere: Sequence[Row]
    unknown: Mapping[str, str]


def read_gate(work: Folder, registry: Registry, teachers: Sequence[TracedTeacher]) -> Gate:
    """Reads what stage one measured of exactly these teachers."""
    found: list[Evidence] = []
    unknown: dict[str, str] = {}
    for teacher in teachers:
        if teacher.name not in registry.teachers:
            unknown[teacher.name] = "the registry no longer has this teacher, nor its threshold"
        elif teacher.indexed is None:
            unknown[teacher.name] = "the cache's index no longer knows this digest"
        else:
            try:
                found.append(read_evidence(work, registry, teacher.indexed))
            except PipelineError as error:
                unknown[teacher.name] = error.what
    accepted = [teacher.name for teacher in teachers if teacher.accepted]
    measured = {
        (evidence.teacher, organ): seen.calibration
        for evidence in found
        for organ, seen in evidence.organs.items()
    }
    scores = []
    for row in score_rows(registry, found, accepted):
        known = measured[row["teacher"], row["organ"]]
        scores.append({**row, "temperature": None if known is None else known.temperature})
    return Gate(scores, elsewhere_rows(found), unknown)
