"""All that `pipeline check` found: for people, for machines, and as an exit code."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from statistics import median
from typing import Any

from pipeline.consensus.cohort import in_ml
from pipeline.data.registry import Registry
from pipeline.data.splits import SPLITS
from pipeline.errors import counted, kind_of, listed
from pipeline.log import print_table
from pipeline.setup.check.cases import CaseFacts, Finding, count, in_order
from pipeline.setup.check.cohort import DataReport
from pipeline.setup.check.teachers import CheckReport, print_check

FORMAT_VERSION = 1
_DOUBT = "Look at it before you run `cache-teachers`."
_SHOWN = 3
_MOST_ROWS = 40


@dataclass(frozen=True)
class Report:
    """Datasets and teachers."""

    registry: Registry
    data: DataReport
    teachers: CheckReport | None

    @property
    def findings(self) -> list[Finding]:
        """Of datasets and teachers, errors first."""
        rows = self.teachers.teachers if self.teachers else ()
        failed = [
            Finding("error", "teacher", f"teacher {row.teacher}", row.problem, row.fix)
            for row in rows
            if row.problem is not None
        ]
        doubts = [
            Finding("warning", "teacher", f"teacher {row.teacher}", text, _DOUBT)
            for row in rows
            for text in row.warnings
        ]
        given = [row.teacher for row in rows if row.orientation == "stored"]
        return in_order([*self.data.findings, *failed, *doubts, *several_orders(given, self.data)])

    @property
    def exit_code(self) -> int:
        """2 if there is an error; warnings alone are none."""
        return 2 if count(self.findings, "error") else 0

    def to_json(self) -> dict[str, Any]:
        """For machines: every finding, every case, every teacher."""
        return {
            "format_version": FORMAT_VERSION,
            "registry": str(self.registry.path),
            "num_errors": count(self.findings, "error"),
            "num_warnings": count(self.findings, "warning"),
            "findings": [asdict(finding) for finding in self.findings],
            **self.data.to_json(),
            "teachers": self.teachers.to_json() if self.teachers else None,
        }


def several_orders(teachers: Sequence[str], data: DataReport) -> list[Finding]:
    """Of teachers that are given images in the order of axes of their files, and know only one."""
    orders: dict[str, set[str]] = {}
    for case in data.cases:
        if case.stored:
            orders.setdefault(case.dataset, set()).add(case.stored)
    if len(set().union(*orders.values())) < 2:
        return []
    each = ", ".join(f"{dataset} {' and '.join(sorted(own))}" for dataset, own in orders.items())
    what = (
        "nnU-Net does not reorient, so it is given images with their axes in the order of their "
        f"files, and that differs: {each}. A network knows the order of its training files alone."
    )
    fix = "Name the order of its training files, for example `nnunet: {orientation: LPS}`."
    return [Finding("warning", "teacher", f"teacher {name}", what, fix) for name in teachers]


def print_report(report: Report) -> None:
    """Tables of datasets, teachers and findings, and a last line that counts."""
    _print_datasets(report)
    if report.teachers is not None:
        print_check(report.teachers)
    rows = _grouped(report.findings)
    if rows:
        more = f", first {_MOST_ROWS} of {len(rows)} rows" if len(rows) > _MOST_ROWS else ""
        columns = ["", "where", "what was found", "what to do"]
        print_table(f"Findings{more}", columns, rows[:_MOST_ROWS], num_text=4)
    errors, warnings = (count(report.findings, s) for s in ("error", "warning"))
    teachers = f", {len(report.teachers.teachers)} teachers" if report.teachers else ""
    read = len(report.data.cases)
    print(  # noqa: T201
        f"{counted(errors, 'error')}, {counted(warnings, 'warning')} in "
        f"{counted(read, 'case')}{teachers}."
        + (" All of them: --json." if len(rows) < errors + warnings else "")
    )


def _print_datasets(report: Report) -> None:
    rows = []
    for name in report.data.datasets:
        cases = [case for case in report.data.cases if case.dataset == name]
        organs = report.registry.datasets[name].annotated
        rows.append(
            [
                name,
                _counts([case.split for case in cases]),
                _range([case.spacing_mm for case in cases if case.spacing_mm]),
                _range([case.shape for case in cases if case.shape]),
                _range(
                    [(case.hu.soft_tissue,) for case in cases if case.hu and case.hu.soft_tissue]
                ),
                "\n".join(organs),
                "\n".join(_volumes(cases, organ) for organ in organs),
            ]
        )
    splits = " / ".join(SPLITS)
    columns = [
        "dataset", splits, "spacing z, y, x in mm", "voxels z, y, x", "HU peak", "organ",
        "ml: median (range)",
    ]  # fmt: skip
    print_table(f"Datasets of {report.registry.path}", columns, rows)


def _counts(splits: Sequence[str]) -> str:
    """`12 / 3 / 5`; in folds `3 + 3 + 3 / 5`: each validates once, then those that test."""
    folds = sorted({split for split in splits if split not in SPLITS})
    dealt = [" + ".join(str(splits.count(fold)) for fold in folds)] if folds else []
    return " / ".join([*dealt, *(str(splits.count(s)) for s in SPLITS[2 * bool(folds) :])])


def _volumes(cases: Sequence[CaseFacts], organ: str) -> str:
    sizes = [case.organ_ml[organ] for case in cases if case.organ_ml.get(organ)]
    if not sizes:
        return "–"
    return f"{in_ml(median(sizes))} ({in_ml(min(sizes))} to {in_ml(max(sizes))})"


def _range(values: Sequence[Sequence[float]]) -> str:
    """Smallest and largest along each axis, a line each."""
    lines = []
    for axis in zip(*values, strict=True):
        low, high = min(axis), max(axis)
        lines.append(f"{low:.4g}" if low == high else f"{low:.4g} to {high:.4g}")
    return "\n".join(lines)


def _grouped(findings: Sequence[Finding]) -> list[list[str]]:
    """A row per finding; findings of one kind in one dataset share a row where they are many."""
    groups: dict[tuple[object, ...], list[Finding]] = {}
    for finding in findings:
        groups.setdefault(_alike(finding), []).append(finding)
    rows = []
    for alike in groups.values():
        first, *others = alike
        where, what = first.where, first.what
        if others:
            where += f", {listed([finding.where for finding in others], _SHOWN)}"
            if any(finding.what != what for finding in others):
                what += " (This is the first; the others are alike.)"
        rows.append([first.severity, where, what, first.fix])
    return rows


def _alike(finding: Finding) -> tuple[object, ...]:
    """What findings in one row share. Organs have rows of their own: they lead the sentence."""
    of_organ = finding.kind in ("organ", "volume", "place", "small")
    organ = finding.what.split(" ")[0] if of_organ else ""
    if finding.case is None or finding.kind == "duplicate":
        where = "" if finding.kind == "teacher" else finding.where
        return (finding.severity, finding.kind, where, finding.what)
    dataset = None if finding.kind == "patch" else finding.dataset
    # Much can be wrong with a file, and the remedy is the same.
    what = kind_of(finding.what, finding.case) if finding.kind == "file" else ""
    return (
        finding.severity, finding.kind, dataset, kind_of(finding.fix, finding.case), organ, what,
    )  # fmt: skip
