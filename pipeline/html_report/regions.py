"""Regions and conflicts of the run's cases, by the functions of `pipeline inspect`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from pipeline.html_report.lineage import Lineage
from pipeline.html_report.record import RunRecord
from pipeline.inspection.cohort_table import measure_cohort, pair_rows
from pipeline.inspection.measure import CaseNumbers
from pipeline.log import Log


@dataclass(frozen=True)
class OrganRegions:
    """One organ over all cases, in ml: 0, 25, 50, 75 and 100 % quantiles of its region."""

    organ: str
    num_cases: int
    quantiles_ml: tuple[float, ...]
    empty: int
    label_ml: tuple[float, float] | None


@dataclass(frozen=True)
class Regions:
    """What a student of these settings is taught, as numbers.

    Attributes:
        cases: training and validation cases, improbable ones first.
        organs: over all of them.
        pairs: of teachers, most conflict first.
        failed: case -> why it has no numbers.
        absent: why there are none at all; else empty.
    """

    cases: Sequence[CaseNumbers] = ()
    organs: Sequence[OrganRegions] = ()
    pairs: Sequence[Mapping[str, Any]] = ()
    failed: Mapping[str, str] | None = None
    absent: str = ""

    @property
    def num_improbable(self) -> int:
        """Cases with at least one reason."""
        return sum(bool(case.flags) for case in self.cases)


def measure_regions(record: RunRecord, lineage: Lineage, *, workers: int, log: Log) -> Regions:
    """Measures every case of the run that the cache still has, as its training saw it.

    Args:
        record: of the run.
        lineage: its units.
        workers: processes; 0 for this one. Changes speed only.
        log: where progress goes.
    """
    if not record.teachers:
        return Regions(
            absent="This run's supervision uses no teacher, so there are no regions: it was "
            "trained from labels alone."
        )
    cases, failed = [], {}
    for traced in lineage.cases:
        case = lineage.open(traced)
        if case is None:
            failed[traced.name] = f"the case itself: {traced.case.problem}"
        elif not case.teachers:
            failed[traced.name] = "no teacher's unit of it can be read"
        else:
            cases.append(case)
    if not cases:
        return Regions(
            failed=failed,
            absent="The cache no longer has any case of this run with a teacher's unit.",
        )
    found = measure_cohort(cases, record.space, record.view, workers=workers, log=log)
    failed |= {name: error.what for name, error in found.failed.items()}
    organs = []
    for organ in record.space.organs:
        sizes = [c.organs[organ].region_ml for c in found.cases if organ in c.organs]
        if sizes:
            usual = found.usual.get(organ)
            ends = tuple(float(q) for q in np.quantile(sizes, (0, 0.25, 0.5, 0.75, 1)))
            empty = sum(ml == 0 for ml in sizes)
            label_ml = None if usual is None else usual.label_ml
            organs.append(OrganRegions(organ, len(sizes), ends, empty, label_ml))
    pairs = [row for row in pair_rows(found.cases) if row["conflict_ml"]]
    return Regions(found.cases, organs, pairs, failed)
