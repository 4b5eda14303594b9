"""What is wrong, or may be: one finding each, with its place, its reason and its remedy."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from pipeline.hounsfield import Severity


@dataclass(frozen=True)
class Finding:
    """One thing that is wrong (an error) or improbable (a warning).

    Attributes:
        severity: an error makes `pipeline check` exit with 2.
        kind: what was looked at: registry, split, file, header, grid, values, organ, small, hu,
            patch, duplicate, volume, place, air, teacher.
        where: `dataset/case`, `dataset`, a teacher, or the registry.
        what: what was found, as a sentence.
        fix: what to do about it.
        dataset: that it belongs to; None for none.
        case: `dataset/case`, if it is of one case.
    """

    severity: Severity
    kind: str
    where: str
    what: str
    fix: str
    dataset: str | None = None
    case: str | None = None


def of_case(severity: Severity, kind: str, case: str, what: str, fix: str) -> Finding:
    """A finding of one case, by its name `dataset/case`."""
    return Finding(severity, kind, case, what, fix, case.split("/")[0], case)


def of_dataset(severity: Severity, kind: str, dataset: str, what: str, fix: str) -> Finding:
    """A finding of a dataset as a whole."""
    return Finding(severity, kind, dataset, what, fix, dataset)


def in_order(findings: Sequence[Finding]) -> list[Finding]:
    """Errors first; else as they came."""
    return sorted(findings, key=lambda finding: finding.severity != "error")


def count(findings: Sequence[Finding], severity: Severity) -> int:
    """How many are of a severity."""
    return sum(finding.severity == severity for finding in findings)
