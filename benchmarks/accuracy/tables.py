"""Findings as tables: for a terminal and as a Markdown page."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from benchmarks.accuracy.configurations import METHOD
from benchmarks.accuracy.findings import BETTER, COLUMNS
from benchmarks.accuracy.plan import EQUAL_TIME
from benchmarks.accuracy.regimes import REGIMES
from benchmarks.accuracy.statistics import CONFIDENCE
from stages.compare.results import Table


def all_tables(content: Mapping[str, Any]) -> list[Table]:
    """Every table of a results file, in the order in which they are read."""
    split, found = content["split"], content["findings"]
    tables = [_headline(content), _overview(content)]
    for terms, by_budget in found["differences"].items():
        tables += [_differences(terms, budget, rows) for budget, rows in by_budget.items()]
    tables += [_worst(found, budget) for budget in found["worst_organ"]]
    for budget, by_regime in found["dice"].items():
        tables.append(_dice(split, budget, by_regime, content["steps"]))
    tables.append(_teachers(content["teachers"]))
    return tables


def page(content: Mapping[str, Any], picture: str) -> str:
    """The page: what was done, a picture, tables, and what to know of them."""
    body = "\n".join(table.to_markdown() for table in all_tables(content))
    notes = "".join(f"- {note}\n" for note in content["notes"])
    title = f"# Accuracy of supervisions, {content['split']} cases"
    return f"{title}\n\n![Mean Dice by regime]({picture})\n\n{body}\n{notes}"


def _headline(content: Mapping[str, Any]) -> Table:
    """The method against the better baseline, equal steps and equal time beside each other."""
    by_terms = content["findings"]["differences"]
    rows = []
    for budget in by_terms.get("equal steps", {}):
        found = [
            by_terms.get(terms, {}).get(budget, {}).get(METHOD, {}).get(BETTER, {})
            for terms in ("equal steps", EQUAL_TIME)
        ]
        for regime in found[0]:
            cells = [
                f"{_interval(of[regime]['mean'])} ({of[regime].get('against', 'each its own')})"
                if regime in of
                else "–"
                for of in found
            ]
            rows.append([budget, regime, *cells])
    return Table(f"{METHOD} - {BETTER}", ["", "regime", "equal steps", EQUAL_TIME], rows)


def _overview(content: Mapping[str, Any]) -> Table:
    """Mean over organs, all regimes beside each other."""
    regimes = content["regimes"]
    rows = []
    for budget, by_regime in content["findings"]["dice"].items():
        names = list(dict.fromkeys(n for of in by_regime.values() for n in of))
        for name in names:
            cells = [_estimate(by_regime[r].get(name, {}).get("mean")) for r in regimes]
            rows.append([f"{name}, {budget}", *cells])
    title = (
        f"Dice over organs, {content['split']} cases, mean ± sd over {len(content['seeds'])} seeds"
    )
    return Table(title, ["", *(f"{r}: {REGIMES[r].title}" for r in regimes)], rows)


def _differences(terms: str, budget: str, by_name: Mapping[str, Any]) -> Table:
    rows = []
    for name, by_baseline in by_name.items():
        for versus, by_regime in by_baseline.items():
            for regime, row in by_regime.items():
                against = row.get("against", versus)
                said = versus if against == versus else f"{versus} ({against})"
                cells = [_interval(row[organ]) for organ in COLUMNS]
                rows.append([f"{name} - {said}", regime, *cells])
    title = f"Difference in Dice at {terms}, {budget} [{CONFIDENCE:.0%}]"
    return Table(title, ["", "regime", *COLUMNS], rows)


def _worst(found: Mapping[str, Any], budget: str) -> Table:
    rows = []
    for name, by_regime in found["worst_organ"][budget].items():
        for regime, worst in by_regime.items():
            gap = found["gap_closed"][budget].get(name, {}).get(regime)
            share = "–" if gap is None else f"{gap:.0%}"
            rows.append([name, regime, worst["organ"], _interval(worst), share])
    columns = ["", "regime", "worst organ", "its difference to marginal", "gap closed"]
    title = (
        f"Worst organ against marginal, and share of the gap between the better baseline and full "
        f"labels that is closed, {budget}"
    )
    return Table(title, columns, rows)


def _dice(split: str, budget: str, by_regime: Mapping[str, Any], steps: Mapping[str, Any]) -> Table:
    rows = [
        [
            f"{regime}: {name}",
            str(steps[f"{regime}/{budget}/{name}"]),
            *(_estimate(organs[organ]) for organ in COLUMNS),
        ]
        for regime, by_name in by_regime.items()
        for name, organs in by_name.items()
    ]
    return Table(f"Dice, {split} cases, {budget}", ["", "steps", *COLUMNS], rows)


def _teachers(teachers: Mapping[str, Any]) -> Table:
    rows = []
    for job, by_organ in teachers.items():
        cells = [
            f"{_two(t['recall'])} / {_two(t['precision'])} / {_two(t['dice'])}"
            for t in by_organ.values()
        ]
        rows.append([job, *cells])
    title = "Teachers on the student's training cases of other datasets: recall / precision / Dice"
    return Table(title, ["job", *COLUMNS[:-1]], rows)


def _estimate(row: Mapping[str, Any] | None) -> str:
    if row is None or row["mean"] is None:
        return "–"
    sd = "" if row["sd"] is None else f" ± {row['sd']:.3f}"
    return f"{row['mean']:.3f}{sd}"


def _interval(row: Mapping[str, Any]) -> str:
    if row["low"] is None:
        return f"{row['mean']:+.3f}"
    return f"{row['mean']:+.3f}\n[{row['low']:+.3f}, {row['high']:+.3f}]"


def _two(value: float | None) -> str:
    return "–" if value is None else f"{value:.2f}"
