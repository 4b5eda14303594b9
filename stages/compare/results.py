"""All that a comparison found: scores of every run and case, what follows from them, and tables."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from itertools import product
from pathlib import Path
from statistics import median, stdev
from typing import Any

import numpy as np

from pipeline.errors import counted, listed
from pipeline.folder import json_with, refuse_foreign
from pipeline.log import number, print_table
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
from stages.compare.plan import Comparison, differing_fields
from stages.compare.scoring import RunResult

FORMAT_VERSION = 1


@dataclass(frozen=True, eq=False)
class Results:
    """What a comparison found.

    Attributes:
        scored_on_test: runs of this comparison that were ever scored on test cases.
    """

    plan: Comparison
    organs: tuple[str, ...]
    runs: Sequence[RunResult]
    scored_on_test: Sequence[str]

    @property
    def configs(self) -> tuple[str, ...]:
        """Names, in the order given."""
        return tuple(config.run for config in self.plan.configs)

    @property
    def others(self) -> list[str]:
        """All but the baseline."""
        return [config for config in self.configs if config != self.plan.baseline]

    @property
    def rows(self) -> list[str]:
        """What there is a number of: each organ, and `mean` over them."""
        return [*self.organs, OVER_ORGANS]

    @property
    def split(self) -> str:
        """Of the scored cases."""
        return self.plan.settings.split

    @property
    def metrics(self) -> tuple[str, ...]:
        """Measured ones that are compared."""
        return ("Dice", "NSD") if self.plan.settings.surface else ("Dice",)

    @property
    def failed(self) -> list[RunResult]:
        """Runs without scores."""
        return [run for run in self.runs if run.error is not None]

    def of(self, config: str) -> list[RunResult]:
        """The runs of a configuration, in the order of the seeds."""
        return [run for run in self.runs if run.config == config]

    def seconds_per_step(self, config: str) -> float | None:
        """The median over its runs."""
        known = [r.seconds_per_step for r in self.of(config) if r.seconds_per_step is not None]
        return median(known) if known else None

    def scores(self, config: str, metric: str, *, paired: bool = False) -> Floats:
        """(S, N, K): seeds, cases, organs; NaN where there is no score.

        Args:
            paired: leave out the Dice of 0 of organs that are predicted where the reference lacks
                them. Then scores lie in the same places for every configuration and seed: which
                case counts depends on the reference alone, and each score has its pair.
        """
        cases = {case.name: n for n, case in enumerate(self.plan.cases)}
        seeds = self.plan.settings.seeds
        found = np.full((len(seeds), len(cases), len(self.organs)), np.nan)
        incomplete = {run.seed for run in self.of(config) if run.error is not None}
        for run in self.of(config):
            s = seeds.index(run.seed)
            for row in run.rows if run.seed not in incomplete else ():
                if row[metric] is not None and (row["n_ref"] or not paired):
                    found[s, cases[row["case"]], self.organs.index(row["organ"])] = row[metric]
        return found

    def estimates(self, config: str, metric: str) -> Mapping[str, Estimate]:
        """Organ, or `mean` over organs -> score; its std is over folds, where there are any."""
        scores = self.scores(config, metric)
        found = estimates(scores)
        ends = np.cumsum([len(own) for own in self.plan.scored.values()])
        if len(ends) > 1:
            by_fold = zip(*map(estimates, np.split(scores, ends[:-1], axis=1)), strict=True)
            means = [[e.mean for e in folds if e.mean is not None] for folds in by_fold]
            found = [
                replace(e, std=stdev(own) if len(own) > 1 else None)
                for e, own in zip(found, means, strict=True)
            ]
        return dict(zip(self.rows, found, strict=True))

    def differences(self, config: str, metric: str) -> Mapping[str, Difference]:
        """Organ, or `mean` over organs -> difference to the baseline."""
        return self._differences[config, metric]

    @cached_property
    def _differences(self) -> dict[tuple[str, str], Mapping[str, Difference]]:
        found: dict[tuple[str, str], Mapping[str, Difference]] = {}
        for metric in self.metrics:
            baseline = self.scores(self.plan.baseline, metric, paired=True)
            for config in self.configs:
                apart = differences(self.scores(config, metric, paired=True), baseline)
                found[config, metric] = dict(zip(self.rows, apart, strict=True))
        return found

    @property
    def notices(self) -> list[str]:
        """What a reader has to know, in sentences."""
        found = list(self.plan.notices)
        few: dict[str, dict[str, None]] = {}
        for config in self.others:
            for organ, d in self.differences(config, "Dice").items():
                if d.mean is not None and d.note:
                    few.setdefault(d.note, {})[organ] = None
        found += [f"{note}: {', '.join(organs)}." for note, organs in few.items()]
        if spurious := self._spurious():
            found.append(
                "Predicted although the reference lacks it, which is a Dice of 0 in the scores, as "
                f"nnU-Net counts it, and no part of the differences: {'; '.join(spurious)}."
            )
        found += [
            f"{run.config}, seed {run.seed} failed and is in no number: {run.error}"
            for run in self.failed
        ]
        if self.plan.settings.test:
            found.append(
                f"{len(self.configs)} configurations were scored on the test cases. A choice that "
                "is made by this table is no longer tested by it."
            )
        return found

    def _spurious(self) -> list[str]:
        """What a configuration predicted where there is nothing, in words."""
        found = []
        for config in self.configs:
            rows = [row for run in self.of(config) for row in run.rows]
            seen = {f"{r['case']} ({r['organ']})" for r in rows if r["n_pred"] and not r["n_ref"]}
            if seen:
                found.append(f"{config}, {listed(sorted(seen))}")
        return found

    def to_json(self) -> dict[str, Any]:
        """Plain values: all of the tables, and what is needed to read them."""
        plan, settings = self.plan, self.plan.settings
        return {
            "format_version": FORMAT_VERSION,
            "comparison": settings.name,
            "split": self.split,
            "test_cases_were_scored": settings.test,
            "num_configurations": len(self.configs),
            "runs_ever_scored_on_test": list(self.scored_on_test),
            "baseline": plan.baseline,
            "seeds": list(settings.seeds),
            "budget": {"steps": dict(plan.steps), "seconds": settings.seconds},
            "cases": [case.name for case in plan.cases],
            "organs": list(self.organs),
            "differing_fields": differing_fields(plan.configs),
            "notices": self.notices,
            "bootstrap": bootstrap("cases and seeds, independently, with replacement", seeds=True),
            "configurations": [self._config_json(config) for config in self.configs],
        }

    def _config_json(self, config: str) -> dict[str, Any]:
        return {
            "name": config,
            "parameters": self.plan.parameters[config],
            "seconds_per_step": self.seconds_per_step(config),
            "runs": [
                {"seed": run.seed, "folder": str(run.folder), "error": run.error}
                for run in self.of(config)
            ],
            "scores": {
                metric: {o: asdict(e) for o, e in self.estimates(config, metric).items()}
                for metric in self.metrics
            },
            "difference_to_baseline": {
                metric: {o: asdict(d) for o, d in self.differences(config, metric).items()}
                for metric in self.metrics
                if config != self.plan.baseline
            },
        }


# A comparison as tables: for a terminal, a page and as CSV.

_SCORE_COLUMNS = ("case", "organ", "Dice", "NSD", "HD95_mm", "n_ref", "n_pred", "reason")


@dataclass(frozen=True)
class Table:
    """A title, a header and rows of text; a cell may have two lines."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]

    def to_markdown(self) -> str:
        """Title, table, blank line."""
        lines = [list(self.columns), ["---"] * len(self.columns), *map(list, self.rows)]
        cells = [[c.replace("|", "\\|").replace("\n", " ") for c in line] for line in lines]
        body = "\n".join(f"| {' | '.join(line)} |" for line in cells)
        return f"**{self.title}**\n\n{body}\n"


def check_place(folder: Path, split: str) -> None:
    """Before anything is computed: that `write_results` may write."""
    files = files_of(folder, split)
    is_ours = json_with(files[1], "comparison", "split") is not None
    refuse_foreign("compare", [(path, is_ours) for path in files])


def files_of(folder: Path, split: str) -> list[Path]:
    """Page, data, picture, table and scores."""
    ends = (".html", ".json", ".png", "_table.csv", "_scores.csv")
    return [folder / f"{split}{end}" for end in ends]


def print_results(results: Results) -> None:
    """All tables and notices on standard output; of the metrics Dice alone."""
    for table in all_tables(results, ["Dice"]):
        print_table(table.title, table.columns, table.rows)
    for notice in results.notices:
        print(f"note: {notice}")  # noqa: T201


def all_tables(results: Results, metrics: Sequence[str]) -> list[Table]:
    """What was compared; then, of each metric, scores and differences."""
    tables = [configurations_table(results)]
    for metric in metrics:
        tables.append(scores_table(results, metric))
        if results.others:
            tables.append(differences_table(results, metric))
    return tables


def configurations_table(results: Results) -> Table:
    """What differs, and what each took."""
    fields = differing_fields(results.plan.configs)
    rows = []
    for config in results.configs:
        runs = results.of(config)
        done = sum(run.error is None for run in runs)
        own = [_value(values[config]) for values in fields.values()]
        made = f"{done}/{len(runs)}" + ("" if done == len(runs) else " FAILED")
        counts = [f"{n:,}" for n in (results.plan.steps[config], results.plan.parameters[config])]
        rows.append([config, *own, *counts, number(results.seconds_per_step(config)), made])
    names = [field.removeprefix("supervision.") for field in fields]
    columns = ["configuration", *names, "steps", "parameters", "s/step", "runs"]
    return Table(f"{results.plan.settings.name}: what was compared", columns, rows)


def scores_table(results: Results, metric: str) -> Table:
    """Mean and standard deviation over seeds, or folds, by organ."""
    seeds, folds = len(results.plan.settings.seeds), len(results.plan.scored)
    spread = f", mean ± std over {seeds} seeds" if seeds > 1 else ", 1 seed"
    if folds > 1:
        spread = f", mean ± std over {folds} folds, {counted(seeds, 'seed')}"
    cases = f"{len(results.plan.cases)} {results.split} cases"
    rows = [
        [config, *(e.in_words() for e in results.estimates(config, metric).values())]
        for config in results.configs
    ]
    return Table(f"{metric}, {cases}{spread}", ["configuration", *results.rows], rows)


def differences_table(results: Results, metric: str) -> Table:
    """Paired differences to the baseline with their intervals, by organ."""
    rows = [
        [config, *(d.in_words(apart="\n") for d in results.differences(config, metric).values())]
        for config in results.others
    ]
    title = (
        f"{metric}: difference to {results.plan.baseline}, paired by case and seed "
        f"[{CONFIDENCE:.0%} interval]"
    )
    return Table(title, ["configuration", *results.rows], rows)


def table_rows(results: Results) -> list[dict[str, Any]]:
    """One row per configuration, metric and organ (or `mean`), of plain numbers."""
    rows = []
    for config, metric in product(results.configs, results.metrics):
        apart = results.differences(config, metric)
        for organ, e in results.estimates(config, metric).items():
            d = apart[organ] if config in results.others else None
            rows.append(
                {
                    "config": config,
                    "metric": metric,
                    "organ": organ,
                    "mean": e.mean,
                    "std": e.std,
                    "num_runs": sum(value is not None for value in e.per_seed),
                    "baseline": results.plan.baseline,
                    "difference": d and d.mean,
                    "low": d and d.low,
                    "high": d and d.high,
                    "num_cases": apart[organ].num_cases,
                    "note": d.note if d else "",
                }
            )
    return rows


def score_rows(results: Results) -> list[dict[str, Any]]:
    """One row per run, case and organ, from which all statistics can be done again."""
    return [
        {
            "config": run.config,
            "seed": run.seed,
            **({} if run.fold is None else {"fold": run.fold}),
            **{key: row[key] for key in _SCORE_COLUMNS},
        }
        for run in results.runs
        for row in run.rows
    ]


def _value(value: Any) -> str:
    """Of a setting; lists without brackets and quotes."""
    if isinstance(value, list):
        return ", ".join(map(str, value)) or "–"
    return "–" if value is None else str(value) if value != "" else '""'
