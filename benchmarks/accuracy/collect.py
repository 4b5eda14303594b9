"""Scores of all jobs as arrays, and the record of every configuration that was ever scored."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.accuracy.plan import EQUAL_TIME, Job, parts_of_folder, read_rows
from benchmarks.accuracy.statistics import Floats
from pipeline.cache.store import write_json
from pipeline.data.entries import ORGANS

TRIED = "tried.json"
Key = tuple[str, str, str]


@dataclass(frozen=True, eq=False)
class Scores:
    """Dice of everything that is finished.

    Attributes:
        arrays: (regime, budget, name) -> (S, N, K), seeds in the order of `seeds`; NaN throughout
            for a seed that is not finished.
        seeds: of every regime.
        missing: runs that are not scored, `regime/seed: budget/name`.
        steps: (regime, budget, name) -> of each of its trainings.
    """

    arrays: Mapping[Key, Floats]
    seeds: Sequence[int]
    missing: Sequence[str]
    steps: Mapping[Key, int]

    @property
    def regimes(self) -> list[str]:
        """Those with any score."""
        return list(dict.fromkeys(regime for regime, _, _ in self.arrays))

    @property
    def budgets(self) -> list[str]:
        """Those with any score; without equal time."""
        found = dict.fromkeys(budget for _, budget, _ in self.arrays)
        return [budget for budget in found if EQUAL_TIME not in budget]

    def names(self, budget: str) -> list[str]:
        """Configurations of a budget."""
        return list(dict.fromkeys(name for _, b, name in self.arrays if b == budget))


def collect(jobs: Sequence[Job], split: str) -> Scores:
    """Reads the scores of a split."""
    seeds = list(dict.fromkeys(job.seed for job in jobs))
    rows: dict[Key, dict[int, list[dict[str, Any]]]] = {}
    missing, steps = [], {}
    for job in jobs:
        for run in job.runs:
            key = (job.regime.key, run.budget, run.name)
            found = read_rows(job, run, split)
            if found is None:
                missing.append(f"{job.name}: {run.budget}/{run.name}")
                continue
            rows.setdefault(key, {})[job.seed] = found
            steps[key] = run.steps
    return Scores({k: as_array(v, seeds) for k, v in rows.items()}, seeds, missing, steps)


def as_array(rows: Mapping[int, Sequence[Mapping[str, Any]]], seeds: Sequence[int]) -> Floats:
    """Seed -> rows (`case`, `organ`, `Dice`, `n_ref`) -> (S, N, K), cases by name; NaN where no row
    is or the reference lacks the organ, so that all students have scores in the same places."""
    cases = sorted({row["case"] for found in rows.values() for row in found})
    array = np.full((len(seeds), len(cases), len(ORGANS)), np.nan)
    for s, seed in enumerate(seeds):
        for row in rows.get(seed, ()):
            if row["n_ref"]:
                at = cases.index(row["case"]), ORGANS.index(row["organ"])
                array[(s, *at)] = row["Dice"]
    return array


def note_tried(folder: Path) -> dict[str, Any]:
    """Adds every configuration whose scores lie below a folder to its record, and returns that.

    Found by looking at all students there, whoever asked for them. What was noted once stays, even
    if its students are removed.

    Returns:
        `validation` and `test`: identity -> `names`, `budgets` (steps) and `jobs` it was scored in.
    """
    path = folder / TRIED
    tried: dict[str, Any] = {"validation": {}, "test": {}}
    if path.exists():
        tried = json.loads(path.read_text(encoding="utf-8"))
    for split in ("validation", "test"):
        for scored in sorted(folder.glob(f"*/seed*/work/students/*/*/scores_{split}.json")):
            name, steps, digits = parts_of_folder(scored.parent.name)
            entry = tried[split].setdefault(digits, {"names": [], "steps": [], "jobs": []})
            job = f"{scored.parents[5].name}/{scored.parents[4].name}"
            for known, value in (("names", name), ("steps", int(steps)), ("jobs", job)):
                if value not in entry[known]:
                    entry[known] = sorted([*entry[known], value])
    write_json(path, tried)
    return tried
