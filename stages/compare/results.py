"""All that a comparison found: scores of every run and case, and what follows from them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from statistics import median
from typing import Any

import numpy as np

from pipeline.comparison.configurations import differing_fields
from pipeline.comparison.plan import Plan
from pipeline.comparison.statistics import (
    CONFIDENCE,
    MIN_CASES,
    MIN_SEEDS,
    NUM_DRAWS,
    OVER_ORGANS,
    Difference,
    Estimate,
    Floats,
    differences,
    estimates,
)
from pipeline.folder import Folder

FORMAT_VERSION = 1
_NAMED = 5  # places, of each configuration


@dataclass(frozen=True)
class RunResult:
    """One configuration with one seed.

    Attributes:
        config: its name.
        seed: of the training.
        folder: of the run.
        rows: one per case and annotated organ: `case`, `organ`, `Dice`, `NSD`, `HD95_mm`, ...;
            none if the run failed.
        seconds_per_step: median, as this machine trained it; None if it was not seen.
        error: why it failed; None if it is finished.
    """

    config: str
    seed: int
    folder: Folder
    rows: Sequence[Mapping[str, Any]]
    seconds_per_step: float | None
    error: str | None


@dataclass(frozen=True, eq=False)
class Results:
    """What a comparison found.

    Attributes:
        plan: what was compared.
        organs: in the registry's order.
        runs: in the plan's order.
        scored_on_test: runs of this comparison that were ever scored on test cases.
    """

    plan: Plan
    organs: tuple[str, ...]
    runs: Sequence[RunResult]
    scored_on_test: Sequence[str]

    @property
    def configs(self) -> tuple[str, ...]:
        """Names, in the order given."""
        return tuple(config.run for config in self.plan.configs)

    @property
    def split(self) -> str:
        """Of the scored cases."""
        return "test" if self.plan.settings.test else "validation"

    @property
    def metrics(self) -> tuple[str, ...]:
        """Measured ones that are compared."""
        return ("Dice", "NSD") if self.plan.settings.surface else ("Dice",)

    @property
    def failed(self) -> list[RunResult]:
        """Runs without scores."""
        return [run for run in self.runs if run.error is not None]

    @property
    def exit_code(self) -> int:
        """1 if a run failed."""
        return 1 if self.failed else 0

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
            config: its name.
            metric: one of `metrics`.
            paired: leave out the Dice of 0 of organs that are predicted where the reference lacks
                them. Then scores lie in the same places for every configuration and seed: which
                case counts depends on the reference alone, and each score has its pair.
        """
        cases = {case.name: n for n, case in enumerate(self.plan.cases)}
        found = np.full((len(self.of(config)), len(cases), len(self.organs)), np.nan)
        for s, run in enumerate(self.of(config)):
            for row in run.rows:
                if row[metric] is not None and (row["n_ref"] or not paired):
                    found[s, cases[row["case"]], self.organs.index(row["organ"])] = row[metric]
        return found

    def estimates(self, config: str, metric: str) -> Mapping[str, Estimate]:
        """Organ, or `mean` over organs -> score."""
        found = estimates(self.scores(config, metric))
        return dict(zip([*self.organs, OVER_ORGANS], found, strict=True))

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
                by_organ = dict(zip([*self.organs, OVER_ORGANS], apart, strict=True))
                found[config, metric] = by_organ
        return found

    @property
    def notices(self) -> list[str]:
        """What a reader has to know, in sentences."""
        found = list(self.plan.notices)
        few: dict[str, dict[str, None]] = {}
        for config in self.configs:
            for organ, d in self.differences(config, "Dice").items():
                if config != self.plan.baseline and d.mean is not None and d.note:
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
                more = f" and {len(seen) - _NAMED} more" if len(seen) > _NAMED else ""
                found.append(f"{config}, {', '.join(sorted(seen)[:_NAMED])}{more}")
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
            "bootstrap": {
                "drawn": "cases and seeds, independently, with replacement",
                "draws": NUM_DRAWS,
                "confidence": CONFIDENCE,
                "min_seeds": MIN_SEEDS,
                "min_cases": MIN_CASES,
            },
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
