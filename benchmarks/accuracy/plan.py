"""What there is to do: jobs, and the runs of each; nothing is done here."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks.accuracy.cohort import COHORT
from benchmarks.accuracy.configurations import (
    BASELINES,
    GENERATION,
    KINDS_OF_BUDGET,
    METHOD,
    ORACLE,
    ROWS,
    Configuration,
    Teachers,
    identity,
    named,
)
from benchmarks.accuracy.regimes import Regime, drawn_seed
from benchmarks.accuracy.size import Size
from pipeline.errors import ConfigError

EQUAL_TIME = "equal time"


@dataclass(frozen=True)
class Run:
    """One student: a configuration with a budget, in a job.

    Attributes:
        name: of the configuration.
        budget: `short`, `long`, or one of them with `, equal time`.
        registry: which of the job's registries it is trained with.
        folder: below `work/students` of the job; its digits are of the configuration and steps.
        is_baseline: whether its folder's name says all that counts, whatever the method's settings.
        training: settings, plain values.
        teachers: see `Configuration`.
    """

    name: str
    budget: str
    registry: str
    folder: str
    is_baseline: bool
    training: Mapping[str, Any]
    teachers: Teachers = "cached"

    @property
    def steps(self) -> int:
        """Of the training."""
        return int(self.training["steps"])


@dataclass(frozen=True)
class Job:
    """A regime with a seed, and its runs."""

    regime: Regime
    seed: int
    folder: Path
    runs: Sequence[Run]

    @property
    def name(self) -> str:
        """For people."""
        return f"{self.regime.key}/seed{self.seed}"

    def run_folder(self, run: Run) -> Path:
        """Where a student is."""
        return self.folder / "work" / "students" / run.folder

    def request(self, size: Size, split: str, cohorts_only: bool) -> dict[str, Any]:
        """What the job's process is told, as plain values."""
        runs = [] if cohorts_only else [asdict(run) for run in self.runs]
        return {
            "folder": str(self.folder), "regime": self.regime.key, "seed": self.seed,
            "size": size.name, "split": split, "runs": runs,
        }  # fmt: skip


def plan_jobs(
    folder: Path,
    regimes: Sequence[Regime],
    seeds: Sequence[int],
    size: Size,
    configurations: Mapping[str, Sequence[Configuration]],
    extra_steps: Mapping[tuple[str, str], int] | None = None,
) -> list[Job]:
    """Seed by seed, so that whoever stops early has all regimes.

    Args:
        folder: of everything.
        regimes: to make.
        seeds: of each regime.
        size: of everything.
        configurations: budget -> what is trained with it.
        extra_steps: (budget, baseline) -> steps that fit in the method's time.
    """
    jobs = []
    for seed in seeds:
        for regime in regimes:
            drawn = drawn_seed(regime, seed, "students")
            runs = [
                _run(configuration, budget, size.steps(budget), drawn)
                for budget, wanted in configurations.items()
                for configuration in wanted
            ]
            for (budget, name), steps in (extra_steps or {}).items():
                found = [c for c in configurations.get(budget, ()) if c.name == name]
                runs += [_run(c, f"{budget}, {EQUAL_TIME}", steps, drawn) for c in found]
            jobs.append(Job(regime, seed, folder / regime.key / f"seed{seed}", runs))
    return jobs


def choose(
    size: Size,
    budgets: Sequence[str],
    kinds: Sequence[str] | None,
    others: Sequence[Configuration],
) -> dict[str, list[Configuration]]:
    """Budget -> configurations: its kinds, or those named, and all others.

    Raises:
        ConfigError: the second generation without the first.
    """
    if kinds and GENERATION in kinds and METHOD not in kinds:
        raise ConfigError(
            f"{GENERATION} is taught by the student of {METHOD}.",
            where="--kinds",
            fix=f"Name {METHOD} as well.",
        )
    found = {}
    for budget in budgets:
        wanted = [row for row in ROWS if row in (kinds or (*KINDS_OF_BUDGET[budget], ORACLE))]
        found[budget] = [*named(size, wanted), *others]
    return found


def equal_time_steps(
    size: Size, budgets: Sequence[str], seconds_per_step: Mapping[str, float]
) -> dict[tuple[str, str], int]:
    """(budget, baseline) -> the steps that fit in the method's time, where that is more.

    Args:
        size: says the steps of a budget.
        budgets: short, long.
        seconds_per_step: kind -> as measured.
    """
    found = {}
    for budget in budgets:
        for name in BASELINES:
            steps = round(size.steps(budget) * seconds_per_step[METHOD] / seconds_per_step[name])
            if steps > size.steps(budget):
                found[budget, name] = steps
    return found


def work_done(job: Job, size: Size, split: str, cohorts_only: bool) -> tuple[int, int]:
    """Units of work that are done and that there are, in steps of a student; read from the disk."""
    cohort = 8 * size.teacher_steps  # four teachers, and as long again for the rest (measured)
    done = cohort if (job.folder / COHORT).exists() else 0
    if cohorts_only:
        return done, cohort
    for run in job.runs:
        if (job.run_folder(run) / f"scores_{split}.json").exists():
            done += run.steps
    return done, cohort + sum(run.steps for run in job.runs)


def read_rows(job: Job, run: Run, split: str) -> list[dict[str, Any]] | None:
    """One row per case and organ; None if the run has not been scored."""
    path = job.run_folder(run) / f"scores_{split}.json"
    try:
        rows: list[dict[str, Any]] = json.loads(path.read_text(encoding="utf-8"))["rows"]
    except FileNotFoundError:
        return None
    return rows


def parts_of_folder(name: str) -> tuple[str, str, str]:
    """Configuration, steps and digits of the name of a run's folder, as `_run` makes it."""
    found = re.fullmatch(r"(.+)-(\d+)-([0-9a-f]+(?:-online|-perfect|-and-student)?)", name)
    assert found is not None, name
    return found[1], found[2], found[3]


def _run(configuration: Configuration, budget: str, steps: int, seed: int) -> Run:
    # The one validation of a training is its last step.
    changes = {"steps": steps, "seed": seed, "validate_every": steps}
    training = configuration.training.model_copy(update=changes)
    digits = identity(configuration.training)[:10]
    if configuration.teachers != "cached":
        digits += f"-{configuration.teachers}"
    return Run(
        name=configuration.name,
        budget=budget,
        registry=configuration.registry,
        folder=f"{budget.split(',')[0]}/{configuration.name}-{steps}-{digits}",
        is_baseline=configuration.training.supervision.kind != METHOD,
        training=training.model_dump(mode="json"),
        teachers=configuration.teachers,
    )
