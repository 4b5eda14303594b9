"""What the scores say: everything that tables, the page and the picture show, as plain values."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np

from benchmarks.accuracy.collect import Scores
from benchmarks.accuracy.configurations import BASELINES, KINDS, METHOD, UPPER
from benchmarks.accuracy.plan import EQUAL_TIME
from benchmarks.accuracy.statistics import (
    Floats,
    better,
    draws,
    gap_closed,
    interval,
    over_seeds,
    seed_means,
    spread,
    stratified,
)
from pipeline.data.entries import ORGANS

COLUMNS = (*ORGANS, "mean")
BETTER = "the better of both"
_SEED = 0


def find(scores: Scores, num_draws: int) -> dict[str, Any]:
    """All findings.

    Returns:
        `dice`: budget -> regime -> name -> organ -> mean, sd, per_seed.
        `differences`: terms -> budget -> name -> baseline -> regime or `all` -> organ -> mean, low,
        high. Terms are `equal steps` and, where it was trained, `equal time`.
        `worst_organ`, `gap_closed`: budget -> name -> regime -> .. of equal steps.
    """
    found: dict[str, Any] = {"dice": {}, "differences": {}, "worst_organ": {}, "gap_closed": {}}
    for budget in dict.fromkeys(b for _, b, _ in scores.arrays):
        found["dice"][budget] = {
            regime: {
                name: _dice(scores.arrays[regime, budget, name])
                for name in scores.names(budget)
                if (regime, budget, name) in scores.arrays
            }
            for regime in scores.regimes
        }
    for terms in ("equal steps", EQUAL_TIME):
        apart = {b: _differences(scores, b, terms, num_draws) for b in scores.budgets}
        apart = {b: d for b, d in apart.items() if d}
        if apart:
            found["differences"][terms] = apart
    for budget, candidates in found["differences"].get("equal steps", {}).items():
        found["worst_organ"][budget] = {
            name: _worst_organ(by_baseline.get("marginal", {}))
            for name, by_baseline in candidates.items()
        }
        found["gap_closed"][budget] = {name: _gaps(scores, budget, name) for name in candidates}
    return found


def candidates(scores: Scores, budget: str) -> list[str]:
    """What is compared with the baselines: the method, and whatever was screened beside it."""
    return [n for n in scores.names(budget) if n == METHOD or n not in KINDS]


def baseline_of(scores: Scores, regime: str, budget: str, name: str, terms: str) -> Floats | None:
    """What is compared with; on equal time its longer training, if it has one."""
    longer = (regime, f"{budget}, {EQUAL_TIME}", name)
    if terms == EQUAL_TIME and longer in scores.arrays:
        return scores.arrays[longer]
    return scores.arrays.get((regime, budget, name))


def _differences(scores: Scores, budget: str, terms: str, num: int) -> dict[str, Any]:
    if terms == EQUAL_TIME and f"{budget}, {EQUAL_TIME}" not in {b for _, b, _ in scores.arrays}:
        return {}
    found: dict[str, Any] = {}
    for name in candidates(scores, budget):
        for versus in (*BASELINES, BETTER, *([METHOD] if name != METHOD else [])):
            parts: dict[str, tuple[Floats, Floats]] = {}
            rows: dict[str, Any] = {}
            for number, regime in enumerate(scores.regimes):
                pair = _pair(scores, regime, budget, name, versus, terms)
                if pair is None:
                    continue
                apart, against = pair
                rng = np.random.default_rng([_SEED, number])  # regimes apart
                parts[regime] = over_seeds(apart), draws(apart, rng, num)
                rows[regime] = _intervals(*parts[regime], len(apart)) | {"against": against}
            if len(parts) > 1 and len(parts) == len(scores.regimes):
                fewest = min(rows[regime]["num_seeds"] for regime in parts)
                rows["all"] = _intervals(*stratified(list(parts.values())), fewest)
            if rows:
                found.setdefault(name, {})[versus] = rows
    return found


def _pair(
    scores: Scores, regime: str, budget: str, name: str, versus: str, terms: str
) -> tuple[Floats, str] | None:
    """Differences (S, N, K) of the seeds that are finished in both, and what was compared with."""
    ours = scores.arrays.get((regime, budget, name))
    if ours is None:
        return None
    if versus == BETTER:
        first, second = (baseline_of(scores, regime, budget, b, terms) for b in BASELINES)
        if first is None or second is None:
            return None
        number = better(first, second)
        theirs, against = (first, second)[number], BASELINES[number]
    else:
        found, against = baseline_of(scores, regime, budget, versus, terms), versus
        if found is None:
            return None
        theirs = found
    apart = ours - theirs
    finished = ~np.isnan(apart).all(axis=(1, 2))
    return (apart[finished], against) if finished.any() else None


def _intervals(means: Floats, drawn: Floats, num_seeds: int) -> dict[str, Any]:
    found: dict[str, Any] = {
        organ: asdict(interval(float(means[k]), drawn[:, k], num_seeds))
        for k, organ in enumerate(COLUMNS)
    }
    return found | {"num_seeds": num_seeds}


def _dice(scores: Floats) -> dict[str, Any]:
    means, sds, seeds = over_seeds(scores), spread_of_finished(scores), seed_means(scores)
    return {
        organ: {
            "mean": _plain(means[k]),
            "sd": _plain(sds[k]),
            "per_seed": [_plain(v) for v in seeds[:, k]],
        }
        for k, organ in enumerate(COLUMNS)
    }


def spread_of_finished(scores: Floats) -> Floats:
    """`spread` over the seeds that have any score."""
    return spread(scores[~np.isnan(scores).all(axis=(1, 2))])


def _worst_organ(rows: Mapping[str, Any]) -> dict[str, Any]:
    """Regime -> the organ that lost most against marginal, or won least."""
    found = {}
    for regime, row in rows.items():
        organ = min(ORGANS, key=lambda o: row[o]["mean"])
        found[regime] = {"organ": organ, **row[organ]}
    return found


def _gaps(scores: Scores, budget: str, name: str) -> dict[str, float | None]:
    found: dict[str, float | None] = {}
    for regime in scores.regimes:
        wanted: Sequence[Floats | None] = [
            scores.arrays.get((regime, budget, n)) for n in (name, *BASELINES, UPPER)
        ]
        if any(array is None for array in wanted):
            continue
        ours, first, second, upper = (array for array in wanted if array is not None)
        best = (first, second)[better(first, second)]
        found[regime] = gap_closed(ours, best, upper)
    return found


def _plain(value: float) -> float | None:
    return None if np.isnan(value) else round(float(value), 6)
