"""What was found, by patient: one JSON, one page of tables, one picture of slices."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.real_slices.figure import draw_slices
from benchmarks.real_slices.road import BASELINES, Road
from benchmarks.real_slices.slices import ORGANS, patient_of
from pipeline.cache.reader import CachedCase
from pipeline.cache.store import write_json
from pipeline.consensus.cohort import open_cohort
from pipeline.data.registry import load_registry
from pipeline.folder import replace_file
from pipeline.log import print_table
from pipeline.review.statistics import (
    CONFIDENCE,
    OVER_ORGANS,
    Difference,
    Estimate,
    Floats,
    bootstrap,
    differences,
    estimates,
)
from stages.compare.results import Results, Table

TEACHERS = "its teacher"
COLUMNS = (*ORGANS, OVER_ORGANS)
Found = Mapping[tuple[str, str], Results]
NOTES = (
    "Dice of each slice that shows the organ, its mean over the slices of a patient, then over "
    "patients: a patient with many slices counts as much as one with few.",
    "A seed is a whole repetition: teachers, cache and students. Intervals draw patients and "
    "seeds, independently, with replacement. With few patients they are somewhat too narrow.",
    "Slices are 8-bit, two-dimensional and of nominal spacing: no distance, no volume and nothing "
    "about clinical accuracy follows.",
)


@dataclass(frozen=True)
class Scores:
    """Dice by patient under one name of terms and split.

    Attributes:
        patients: names, in the order of the arrays.
        seeds: likewise.
        arrays: configuration, or `TEACHERS` -> (S, P, K); NaN where a patient has no slice that
            shows the organ.
    """

    patients: Sequence[str]
    seeds: Sequence[int]
    arrays: Mapping[str, Floats]

    def estimates(self, name: str) -> Mapping[str, Estimate]:
        """Organ, or `mean` -> score."""
        return dict(zip(COLUMNS, estimates(self.arrays[name]), strict=True))

    def differences(self, name: str, baseline: str) -> Mapping[str, Difference]:
        """Organ, or `mean` -> difference, paired by seed and patient."""
        apart = differences(self.arrays[name], self.arrays[baseline])
        return dict(zip(COLUMNS, apart, strict=True))


def report(road: Road, found: Mapping[int, Found]) -> list[Path]:
    """Tables on standard output, and `results.json`, `results.md` and `slices.png`.

    Args:
        road: what was done.
        found: seed -> what `Road.repeat` gave.

    Returns:
        What was written.
    """
    seeds = list(found)
    content: dict[str, Any] = {
        "size": road.size.to_json(),
        "seeds": seeds,
        "seconds": road.seconds,
        "bootstrap": bootstrap("patients and seeds, independently, with replacement", seeds=True),
        "notes": list(NOTES),
        "scores": {},
    }
    tables = []
    for terms, split in next(iter(found.values())):
        of = {seed: found[seed][terms, split] for seed in seeds}
        scores = by_patient(of, {seed: teacher_rows(road, seed, split) for seed in seeds})
        content["scores"][f"{terms}, {split}"] = _to_json(scores, of)
        tables += _tables(scores, of, f"{split}, {terms}")
    split = list(next(iter(found.values())))[-1][1]
    picture = road.out / "slices.png"
    drawn = draw_slices(picture, road, seeds[0], found[seeds[0]], split)
    page = "# Supervisions on real slices\n\n" + "\n".join(table.to_markdown() for table in tables)
    page += f"\n![{drawn}](slices.png)\n\n" + "".join(f"- {note}\n" for note in NOTES)
    write_json(road.out / "results.json", content)
    replace_file(road.out / "results.md", page.encode())
    for table in tables:
        print_table(table.title, table.columns, table.rows)
    return [road.out / "results.md", road.out / "results.json", picture]


def by_patient(
    of: Mapping[int, Results], teachers: Mapping[int, Sequence[Mapping[str, Any]]]
) -> Scores:
    """Rows of all seeds as arrays.

    Args:
        of: seed -> its comparison.
        teachers: seed -> rows as the students have them.
    """
    configs = next(iter(of.values())).configs
    rows = {
        name: [[row for run in results.of(name) for row in run.rows] for results in of.values()]
        for name in configs
    } | {TEACHERS: list(teachers.values())}
    patients = sorted({patient_of(row["case"]) for row in rows[configs[0]][0] if row["n_ref"]})
    arrays = {name: np.stack([_means(r, patients) for r in each]) for name, each in rows.items()}
    return Scores(patients, list(of), arrays)


def _means(rows: Iterable[Mapping[str, Any]], patients: Sequence[str]) -> Floats:
    """(P, K)."""
    values: dict[tuple[int, int], list[float]] = {}
    for row in rows:
        if row["n_ref"]:
            at = patients.index(patient_of(row["case"])), list(ORGANS).index(row["organ"])
            values.setdefault(at, []).append(row["Dice"])
    means = np.full((len(patients), len(ORGANS)), np.nan)
    for at, dices in values.items():
        means[at] = np.mean(dices)
    return means


def teacher_rows(road: Road, seed: int, split: str) -> list[dict[str, Any]]:
    """Dice of each teacher's region {log-odds > 0} where its own organ is annotated."""
    registry = load_registry(road.place(seed) / "data_registry.yaml", files=False)
    cases = open_cohort(
        road.place(seed) / "work", registry, teachers=list(registry.teachers), splits=(split,)
    ).cases
    return [_teacher_row(case, organ) for case in cases for organ in case.annotated]


def _teacher_row(case: CachedCase, organ: str) -> dict[str, Any]:
    there, said = case.label() == ORGANS[organ], case.log_odds(organ, organ) > 0
    total = int(there.sum() + said.sum())
    dice = 2 * int((there & said).sum()) / total if total else None
    return {"case": case.name, "organ": organ, "n_ref": int(there.sum()), "Dice": dice}


def _tables(scores: Scores, of: Mapping[int, Results], title: str) -> list[Table]:
    names = list(scores.arrays)
    first = next(iter(of.values()))
    seeds = f"{len(scores.seeds)} seed{'s' if len(scores.seeds) > 1 else ''}"
    rows = [
        [
            name,
            f"{first.plan.steps[name]:,}" if name in first.plan.steps else "–",
            *(e.in_words() for e in scores.estimates(name).values()),
        ]
        for name in names
    ]
    heading = f"Dice, {title}: {len(scores.patients)} patients, mean ± std over {seeds}"
    tables = [Table(heading, ["", "steps", *COLUMNS], rows)]
    for baseline in (*(b for b in BASELINES if b in names), TEACHERS):
        rows = [
            [n, *(d.in_words(apart="\n") for d in scores.differences(n, baseline).values())]
            for n in names
            if n != baseline
        ]
        heading = f"Dice minus {baseline}, {title} [{CONFIDENCE:.0%} interval]"
        tables.append(Table(heading, ["", *COLUMNS], rows))
    return tables


def _to_json(scores: Scores, of: Mapping[int, Results]) -> dict[str, Any]:
    names = list(scores.arrays)
    return {
        "patients": list(scores.patients),
        "organs": list(ORGANS),
        "by_seed_and_patient": {
            name: np.where(np.isnan(a), None, a.round(6)).tolist()  # type: ignore[call-overload]
            for name, a in scores.arrays.items()
        },
        "steps": {seed: dict(results.plan.steps) for seed, results in of.items()},
        "seconds_per_step": {
            seed: {name: results.seconds_per_step(name) for name in results.configs}
            for seed, results in of.items()
        },
        "estimates": {
            name: {organ: asdict(e) for organ, e in scores.estimates(name).items()}
            for name in names
        },
        "differences": {
            baseline: {
                name: {o: asdict(d) for o, d in scores.differences(name, baseline).items()}
                for name in names
                if name != baseline
            }
            for baseline in (*(b for b in BASELINES if b in names), TEACHERS)
        },
        "runs_ever_scored_on_test": {s: list(r.scored_on_test) for s, r in of.items()},
    }
