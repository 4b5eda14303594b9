"""What was found: one JSON, one page of tables."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np

from benchmarks.accuracy.statistics import Floats, draws, interval, over_seeds, spread
from benchmarks.against_nnunet.cohorts import SETTINGS, Place
from benchmarks.against_nnunet.job import NNUNET, read, trained, variants
from benchmarks.real_slices.slices import patient_of
from pipeline.cache.store import write_json
from pipeline.folder import replace_file
from pipeline.log import print_table
from pipeline.review.statistics import OVER_ORGANS, differences
from stages.compare.results import Table

_DRAWS = 10_000
Key = tuple[str, str]  # row, variant


@dataclass(frozen=True)
class Found:
    """Everything of one setting.

    Attributes:
        organs: of the last axis.
        scores: (row, variant) -> (S, N, K) Dice, NaN where there is none; N are cases, or patients.
        training: row -> of each seed.
        seconds: (row, variant) -> per predicted case, of each seed.
        seeds: that have any score.
    """

    organs: Sequence[str]
    scores: Mapping[Key, Floats]
    training: Mapping[str, Sequence[Mapping[str, Any]]]
    seconds: Mapping[Key, Sequence[float]]
    seeds: Sequence[int]


def report(
    folder: Path,
    common: Mapping[str, Any],
    settings: Sequence[str],
    rows: Sequence[str],
    seeds: Sequence[int],
) -> list[Path]:
    """Tables on standard output, and `<split>.md` and `<split>.json`; returns these two."""
    split, slices = common["split"], common["cohort"] == "slices"
    tables: list[Table] = []
    content: dict[str, Any] = {"asked": dict(common), "settings": {}}
    for setting in settings:
        places = {s: Place(folder / f"seed{s}", setting, split) for s in seeds}
        found = _collect(places, rows, by_patient=slices)
        if not found.scores:
            continue
        tables += _tables(found, f"{SETTINGS[setting]}; {split}", same_cases=slices)
        content["settings"][setting] = {
            "seeds": list(found.seeds),
            "training": found.training,
            "seconds_per_case": {", ".join(key): s for key, s in found.seconds.items()},
            "dice": {
                ", ".join(key): np.where(np.isnan(a), None, a.round(5)).tolist()  # type: ignore[call-overload]
                for key, a in found.scores.items()
            },
        }
    for table in tables:
        print_table(table.title, table.columns, table.rows)
    write_json(folder / f"{split}.json", content)
    page = f"# nnU-Net beside our student: {common['cohort']}, {common['seconds']:g} s each\n\n"
    page += "\n".join(table.to_markdown() for table in tables)
    replace_file(folder / f"{split}.md", page.encode())
    return [folder / f"{split}.md", folder / f"{split}.json"]


def _collect(places: Mapping[int, Place], rows: Sequence[str], *, by_patient: bool) -> Found:
    keys = [(row, variant) for row in rows for variant in variants(row)]
    read_all = {key: {s: read(place, *key) for s, place in places.items()} for key in keys}
    there = {k: {s: r for s, r in by.items() if r is not None} for k, by in read_all.items()}
    there = {key: by for key, by in there.items() if by}
    seeds = [s for s in places if any(s in by for by in there.values())]
    every = [row for by in there.values() for result in by.values() for row in result["rows"]]
    organs = list(dict.fromkeys(row["organ"] for row in every))

    def unit(case: str) -> str:
        return patient_of(case) if by_patient else case

    units = sorted({unit(row["case"]) for row in every})
    scores = {}
    for key, by in there.items():
        values: dict[tuple[int, int, int], list[float]] = {}
        for s, result in by.items():
            for row in result["rows"]:
                at = seeds.index(s), units.index(unit(row["case"])), organs.index(row["organ"])
                values.setdefault(at, []).append(row["Dice"])
        scores[key] = np.full((len(seeds), len(units), len(organs)), np.nan)
        for at, dice in values.items():
            scores[key][at] = fmean(dice)
    told = {row: [t for p in places.values() if (t := trained(p, row)) is not None] for row in rows}
    seconds = {key: [r["seconds_per_case"] for r in by.values()] for key, by in there.items()}
    return Found(organs, scores, {r: t for r, t in told.items() if t}, seconds, seeds)


def _tables(found: Found, title: str, *, same_cases: bool) -> list[Table]:
    columns = [*found.organs, OVER_ORGANS]
    dice, cost = [], []
    for (row, variant), scores in found.scores.items():
        means = zip(over_seeds(scores), spread(scores), strict=True)
        words = [f"{m:.3f}" + ("" if np.isnan(s) else f" ± {s:.3f}") for m, s in means]
        dice.append([row, variant, str(_num(scores)), *words])
    for row, told in found.training.items():
        seconds = {v: found.seconds[row, v] for v in variants(row) if (row, v) in found.seconds}
        cost.append(
            [
                row,
                *(f"{fmean(t[key] for t in told):{spec}}" for key, spec in _COST.items()),
                f"{1 / fmean(t['seconds_per_step'] for t in told):.2f}",
                f"{fmean(t['bytes_kept'] for t in told) / 1e6:.1f}",
                "; ".join(f"{v} {fmean(s):.1f}" for v, s in seconds.items()),
            ]
        )
    heading = ["", "predicted", "seeds", *columns]
    tables = [Table(f"Dice, mean ± std over seeds. {title}", heading, dice)]
    usual = {row: (row, variants(row)[0]) for row, _ in found.scores}
    for baseline in (row for row in NNUNET if usual.get(row) in found.scores):
        apart = [
            [row, *_words(found, key, usual[baseline], same_cases)]
            for row, key in usual.items()
            if row != baseline and key in found.scores
        ]
        if apart:
            said = f"Dice minus that of {baseline}, each as it usually predicts [95 % interval]"
            tables.append(Table(f"{said}. {title}", ["", *columns], apart))
    gains = [
        [*key, *_words(found, key, usual[key[0]], same_cases)]
        for key in found.scores
        if key != usual[key[0]]
    ]
    if gains:
        said = "Dice minus that of the same row as it usually predicts [95 % interval]"
        tables.append(Table(f"{said}. {title}", ["", "predicted", *columns], gains))
    heading = ["", "steps", "s", "peak MiB", "steps/s", "MB kept", "s per case"]
    tables.append(Table(f"Cost, CPU seconds of one core. {title}", heading, cost))
    return tables


_COST = {"steps": ".0f", "seconds": ".0f", "peak_mib": ".0f"}


def _num(scores: Floats) -> int:
    return int((~np.isnan(scores).all(axis=(1, 2))).sum())


def _words(found: Found, key: Key, baseline: Key, same_cases: bool) -> list[str]:
    """Each organ's difference and that of the mean, over the seeds that have both."""
    first, other = found.scores[key], found.scores[baseline]
    both = ~(np.isnan(first).all(axis=(1, 2)) | np.isnan(other).all(axis=(1, 2)))
    if not both.any():
        return ["–"] * (len(found.organs) + 1)
    first, other = first[both], other[both]
    if same_cases:
        return [d.in_words() for d in differences(first, other, min_seeds=1)]
    apart = first - other
    drawn = draws(apart, np.random.default_rng(0), _DRAWS)
    words = []
    for mean, column in zip(over_seeds(apart), drawn.T, strict=True):
        i = interval(float(mean), column, len(apart))
        said = "" if i.low is None else f" [{i.low:+.3f}, {i.high:+.3f}]"
        words.append(f"{i.mean:+.3f}{said}")
    return words
