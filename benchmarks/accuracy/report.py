"""Writes and prints what the jobs found so far."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.accuracy.cohort import read_cohort
from benchmarks.accuracy.collect import collect, note_tried
from benchmarks.accuracy.figure import draw
from benchmarks.accuracy.findings import find
from benchmarks.accuracy.plan import Job
from benchmarks.accuracy.size import Size
from benchmarks.accuracy.tables import all_tables, page
from pipeline.cache.store import write_json
from pipeline.folder import replace_file
from pipeline.log import print_table


def report(
    folder: Path, jobs: Sequence[Job], size: Size, split: str, failed: Sequence[str]
) -> list[Path]:
    """Tables on standard output, and `<split>/results.json`, `accuracy.md`, `accuracy.png`.

    Returns:
        What was written; nothing if nothing is scored.
    """
    tried = note_tried(folder)
    scores = collect(jobs, split)
    if not scores.arrays:
        return []
    cohorts = {job.name: read_cohort(job.folder) for job in jobs}
    content: dict[str, Any] = {
        "split": split,
        "size": size.to_json(),
        "seeds": list(scores.seeds),
        "regimes": scores.regimes,
        "steps": {"/".join(key): steps for key, steps in scores.steps.items()},
        "findings": find(scores, size.draws),
        "teachers": {n: c["teachers"] for n, c in cohorts.items() if c is not None},
        "cpu_seconds": _costs(jobs),
        "missing": list(scores.missing),
        "num_tried_on_validation": len(tried["validation"]),
        "num_scored_on_test": len(tried["test"]),
        "notes": _notes(scores.missing, failed, tried, split),
    }
    out = folder / split
    write_json(out / "results.json", content)
    draw(content, out / "accuracy.png")
    replace_file(out / "accuracy.md", page(content, "accuracy.png").encode())
    for table in all_tables(content):
        print_table(table.title, table.columns, table.rows)
    for note in content["notes"]:
        print(f"note: {note}")
    return [out / name for name in ("accuracy.md", "accuracy.png", "results.json")]


def _notes(
    missing: Sequence[str], failed: Sequence[str], tried: dict[str, Any], split: str
) -> list[str]:
    found = [
        f"{len(tried['validation'])} configurations were ever scored on validation cases in this "
        f"folder, {len(tried['test'])} on test cases (tried.json).",
        "Every seed draws phantoms, teachers and students anew. Intervals: seeds are drawn, and "
        "cases within a seed; over regimes, each regime by itself. With five seeds they are "
        "somewhat too narrow. They are not corrected for the number of comparisons.",
        "The better of both baselines is the one with the higher mean in that regime and budget, "
        "by the same scores: a little harder to beat than either.",
        "All sample as the product does: kinds that read teachers also centre patches where "
        "these see an organ that is not annotated. `full` has more labels to draw from.",
    ]
    if split == "validation":
        found.append(
            "Validation cases of single-organ datasets are judged on their own organ alone."
        )
    if missing:
        found.append(f"{len(missing)} runs are not scored, among them {missing[0]}.")
    if failed:
        found.append(f"failed: {', '.join(failed)}.")
    return found


def _costs(jobs: Sequence[Job]) -> dict[str, float]:
    """Part of a job -> median CPU seconds over jobs."""
    seen: dict[str, list[float]] = {}
    for job in jobs:
        cohort = read_cohort(job.folder)
        for part, seconds in (cohort or {"seconds": {}})["seconds"].items():
            seen.setdefault(f"{part}, regime {job.regime.key}", []).append(seconds)
        for run in job.runs:
            cost = _cost(job.run_folder(run) / "cost.json")
            if cost is not None:
                seen.setdefault(f"{run.name}, {run.budget}", []).append(cost)
    return {part: round(median(values), 2) for part, values in seen.items()}


def _cost(path: Path) -> float | None:
    try:
        return float(json.loads(path.read_text(encoding="utf-8"))["cpu_seconds"])
    except FileNotFoundError:
        return None
