"""All cases of a cohort: measured in processes by Dask, judged together, told as a table."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import dask
import dask.multiprocessing
from dask.callbacks import Callback

from pipeline.cache.reader import CachedCase
from pipeline.errors import PipelineError
from pipeline.inspection.improbable import Usual, flagged, usual_of
from pipeline.inspection.looks import View
from pipeline.inspection.measure import CaseNumbers, OrganNumbers, measure_case
from pipeline.labels import LabelSpace
from pipeline.log import Log, print_table
from pipeline.tables import in_ml

_MOST_ROWS = 60
_MOST_PAIRS = 20
_NOBODY = OrganNumbers(region_ml=0.0, components=0)


@dataclass(frozen=True)
class CohortNumbers:
    """What came of all cases.

    Attributes:
        cases: with flags; improbable ones first, those with most reasons before others.
        usual: organ -> what its labels look like.
        failed: case -> why it could not be measured.
    """

    cases: Sequence[CaseNumbers]
    usual: Mapping[str, Usual]
    failed: Mapping[str, PipelineError]

    @property
    def num_improbable(self) -> int:
        """Cases with at least one reason."""
        return sum(bool(case.flags) for case in self.cases)

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return {
            "cases": [case.model_dump(mode="json") for case in self.cases],
            "usual": {
                organ: {
                    "label_ml": usual.label_ml and list(usual.label_ml),
                    "components": usual.components,
                    "num_cases": usual.num_cases,
                }
                for organ, usual in self.usual.items()
            },
            "pairs": pair_rows(self.cases),
            "doubts": doubt_rows(self.cases),
            "failed": {name: str(error) for name, error in self.failed.items()},
        }


def measure_cohort(
    cases: Sequence[CachedCase], space: LabelSpace, view: View, *, workers: int, log: Log
) -> CohortNumbers:
    """Measures every case, one case in memory per process, and flags them.

    Args:
        cases: open for reading.
        space: the organs.
        view: how regions are formed.
        workers: processes; 0 for this one. Changes speed only.
        log: where progress goes.
    """
    graph = {case.name: (partial(_try, case, space, view),) for case in cases}
    get: Callable[..., Any] = dask.get
    if workers:
        get = partial(dask.multiprocessing.get, num_workers=workers, chunksize=1)
    with log.progress("cases", len(graph)) as advance:

        def told(key: Any, *_: object) -> None:
            # In this process Dask also tells of the tasks inside a case.
            if key in graph:
                advance(key)

        with Callback(posttask=told), dask.config.set({"multiprocessing.context": "forkserver"}):
            results = dict(zip(graph, get(graph, list(graph)), strict=True))
    failed = {name: r for name, r in results.items() if isinstance(r, PipelineError)}
    found = [r for r in results.values() if isinstance(r, CaseNumbers)]
    usual = usual_of(found)
    rows = [flagged(case, usual) for case in found]
    return CohortNumbers(sorted(rows, key=lambda r: (-len(r.flags), r.case)), usual, failed)


def pair_rows(cases: Sequence[CaseNumbers]) -> list[dict[str, Any]]:
    """Each pair of teachers over all cases, most conflict first: in all, cases, the worst."""
    found: dict[tuple[str, str], list[tuple[float, str]]] = {}
    for case in cases:
        for pair in case.pairs:
            found.setdefault(pair.teachers, []).append((pair.conflict_ml, case.case))
    rows = []
    for teachers, seen in found.items():
        worst_ml, worst = max(seen)
        rows.append(
            {
                "teachers": list(teachers),
                "conflict_ml": round(sum(ml for ml, _ in seen), 3),
                "num_cases": sum(ml > 0 for ml, _ in seen),
                "worst_ml": worst_ml,
                "worst_case": worst if worst_ml else None,
            }
        )
    return sorted(rows, key=lambda row: (-row["conflict_ml"], row["teachers"]))


def doubt_rows(cases: Sequence[CaseNumbers]) -> list[dict[str, Any]]:
    """Each teacher and organ that is doubted anywhere: in how many of the cases that do not
    annotate the organ, on which side, and why in one of them."""
    rows: dict[tuple[str, str], dict[str, Any]] = {}
    for case in cases:
        for doubt in case.doubts:
            row = rows.setdefault(
                (doubt.teacher, doubt.organ),
                {"teacher": doubt.teacher, "organ": doubt.organ, "num_cases": 0, "no_here": 0,
                 "no_not_here": 0, "silent": 0, "why": doubt.why},
            )  # fmt: skip
            side = "no_not_here" if doubt.here else "no_here" if doubt.not_here else "silent"
            row[side] += 1
    for row in rows.values():
        row["num_cases"] = sum(
            case.organs.get(row["organ"], _NOBODY).label_ml is None for case in cases
        )
    return list(rows.values())


def print_cohort(found: CohortNumbers) -> None:
    """Cases, pairs of teachers, and the reasons, for people."""
    cases = found.cases[:_MOST_ROWS]
    organs = list(dict.fromkeys(name for case in cases for name in case.organs))
    rows = [[case.case, *_cells(case, organs), str(len(case.flags) or "")] for case in cases]
    more = f", first {_MOST_ROWS} of {len(found.cases)}" if len(found.cases) > _MOST_ROWS else ""
    columns = ["case", *organs, "agreed", "conflict", "abstained", "not seen", "odd"]
    print_table(
        f"Regions in ml, agreed background in %, improbable cases first{more}", columns, rows
    )
    doubts = doubt_rows(found.cases)
    if doubts:
        cells = [
            [
                row["teacher"],
                row["organ"],
                str(row["num_cases"]),
                *(str(row[side] or "") for side in ("no_here", "no_not_here", "silent")),
                row["why"],
            ]
            for row in doubts
        ]
        title = "Teachers that are not believed everywhere: cases in which"
        columns = ["teacher", "organ", "asked", 'no "here"', 'no "not here"', "silent", "such as"]
        print_table(title, columns, cells)
    pairs = [row for row in pair_rows(found.cases) if row["conflict_ml"]]
    if pairs:
        cells = [
            [
                " and ".join(row["teachers"]),
                in_ml(row["conflict_ml"]),
                str(row["num_cases"]),
                f"{row['worst_case']} ({in_ml(row['worst_ml'])})",
            ]
            for row in pairs[:_MOST_PAIRS]
        ]
        title = "Teachers that claim the same voxels for different organs, in ml"
        print_table(title, ["teachers", "all cases", "in cases", "worst case"], cells)
    reasons = [[case.case, reason] for case in cases for reason in case.flags]
    if reasons:
        print_table("Improbable: look at these before you train", ["case", "why"], reasons)


def to_csv(found: CohortNumbers) -> str:
    """One row per case, one column per number; ml, and shares from 0 to 1."""
    rows = [_flat(case) for case in found.cases]
    columns = list(dict.fromkeys(key for row in rows for key in row if key != "improbable"))
    text = io.StringIO()
    writer = csv.DictWriter(text, [*columns, "improbable"], lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def _flat(case: CaseNumbers) -> dict[str, Any]:
    row: dict[str, Any] = {"case": case.case, "split": case.split}
    row |= {"agreed_background": case.agreed_background, "unclaimed": case.unclaimed}
    row |= {"conflict_ml": case.conflict_ml, "abstained_ml": case.abstained_ml}
    row |= {"unseen": case.unseen}
    for organ, numbers in case.organs.items():
        known = numbers.model_dump(exclude_none=True)
        row |= {f"{organ}: {name}": value for name, value in known.items()}
    for one in case.teachers:
        row[f"{one.teacher} on {one.organ}: claimed_ml"] = one.claimed_ml
        row[f"{one.teacher} on {one.organ}: unseen"] = one.unseen
    for doubt in case.doubts:
        row[f"{doubt.teacher} on {doubt.organ}: doubted"] = doubt.why
    for pair in case.pairs:
        row[f"{' and '.join(pair.teachers)}: conflict_ml"] = pair.conflict_ml
    return row | {"improbable": "; ".join(case.flags)}


def _cells(case: CaseNumbers, organs: Sequence[str]) -> list[str]:
    sizes = [case.organs[name].region_ml if name in case.organs else None for name in organs]
    rest = [in_ml(case.conflict_ml), in_ml(case.abstained_ml), f"{case.unseen:.1%}"]
    return [*(in_ml(ml) for ml in sizes), f"{case.agreed_background:.1%}", *rest]


def _try(case: CachedCase, space: LabelSpace, view: View) -> CaseNumbers | PipelineError:
    """One case that cannot be read does not stop the others."""
    try:
        return measure_case(case, space, view)
    except PipelineError as error:
        return error
