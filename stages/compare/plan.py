"""What a comparison will do: every configuration with every seed, checked before the first step."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any

from pipeline.cache.reader import CachedCase
from pipeline.cache.store import prepare_work_folder
from pipeline.config import digest, load_config
from pipeline.data.registry import Registry
from pipeline.errors import ConfigError
from pipeline.folder import Folder, matching, read_text
from pipeline.student.inputs import TrainingInputs, check_same_units, open_inputs
from pipeline.student.network import build_student
from pipeline.student.resume import check_same
from pipeline.student.settings import TrainingConfig, run_digest
from pipeline.student.speed import TrainingExecution
from stages.compare.budget import equal_steps, steps_for_seconds, without_seed_and_steps
from stages.compare.scoring import cases_to_score, organs_without_cases
from stages.report import Scope
from stages.train_student import (
    RUN_NAME,
    TrainStudentConfig,
    check_own_files,
    is_finished,
    run_name,
)


@dataclass(frozen=True)
class ComparisonSettings:
    """What a comparison is of, beside its configurations.

    Attributes:
        name: its folder below WORK/students.
        steps: of every run; None: those of the configurations, which must then agree.
        seconds: of training of every run, instead of steps.
        baseline: the configuration that others are compared with; None: the first.
        test: score the test cases instead of the validation cases.
    """

    name: str
    seeds: tuple[int, ...] = (0, 1, 2)
    steps: int | None = None
    seconds: float | None = None
    baseline: str | None = None
    test: bool = False
    surface: bool = True
    allow_missing: bool = False

    @property
    def split(self) -> str:
        """Of the cases that are scored."""
        return "test" if self.test else "validation"


def check_settings(settings: ComparisonSettings) -> None:
    """Whether a comparison can be of this at all."""
    if not re.fullmatch(RUN_NAME, settings.name):
        raise ConfigError(
            f"{settings.name!r} cannot name a comparison.",
            where="--name",
            fix="Use letters, digits, dots, dashes and underscores.",
        )
    if not settings.seeds or len(set(settings.seeds)) < len(settings.seeds):
        raise ConfigError(
            "seeds must be at least one, and each another.", where="--seeds", fix="Say 0,1,2."
        )
    if min(settings.seeds) < 0:
        raise ConfigError("a seed is negative.", where="--seeds", fix="Say 0,1,2.")
    if settings.steps is not None and settings.seconds is not None:
        raise ConfigError(
            "--steps and --seconds are two budgets.", where="--seconds", fix="Give one of them."
        )
    if settings.steps is not None and settings.steps < 1:
        raise ConfigError("there must be at least one step.", where="--steps", fix="Give more.")
    if settings.seconds is not None and not 0 < settings.seconds < math.inf:
        raise ConfigError("must be more than 0.", where="--seconds", fix="Give more.")


@dataclass(frozen=True)
class Run:
    """One configuration with one seed, on one fold if there are any.

    Attributes:
        config: with seed and steps as they will be trained.
        fold: that is held out; None: the registry has none.
        folder: WORK/students/<comparison>/<name>-seed<seed>[-fold<fold>].
    """

    config: TrainStudentConfig
    name: str
    fold: int | None
    folder: Folder
    finished: bool

    @property
    def seed(self) -> int:
        """Of the training."""
        return self.config.training.seed


@dataclass(frozen=True)
class Comparison:
    """A comparison, checked.

    Attributes:
        runs: in the order in which they are made.
        steps: configuration -> steps of each of its runs.
        parameters: configuration -> weights of its network.
        scored: fold, or None -> the cases that its students are scored on.
        notices: what a reader of the table has to know.
    """

    settings: ComparisonSettings
    configs: Sequence[TrainStudentConfig]
    baseline: str
    runs: Sequence[Run]
    steps: Mapping[str, int]
    parameters: Mapping[str, int]
    scored: Mapping[int | None, Sequence[CachedCase]]
    notices: Sequence[str]

    @property
    def cases(self) -> list[CachedCase]:
        """All that are scored; in folds each by the student that did not see it."""
        return [case for own in self.scored.values() for case in own]


def plan_comparison(
    configs: Sequence[TrainStudentConfig],
    settings: ComparisonSettings,
    scope: Scope,
    execution: TrainingExecution | None,
) -> Comparison:
    """Checks everything before the first step; with `seconds`, measures unless that was done.

    Args:
        scope: the registry may be read without its files; stage one filled the work folder.
        execution: of what is measured. None, for a look, takes what was measured before; a
            configuration that was not is as if its runs were new.

    Raises:
        ConfigError: configurations that cannot stand in one table, or nothing to score them on.
        CacheMissing, CacheStale: the cache lacks what one of them needs.
        CheckpointError: a run of this comparison was started with other units of the cache.
    """
    baseline = settings.baseline or (configs[0].run if configs else "")
    check_configurations(configs, baseline)
    check_settings(settings)
    registry, work = scope.registry, scope.work
    if settings.test and registry.num_folds:
        raise ConfigError(
            "students of folds are compared on the cases that they did not see, not on test cases.",
            where="--test",
            fix="Average them: `pipeline predict --with`, then `pipeline evaluate --against`.",
        )
    views = [registry.on_fold(fold) for fold in range(registry.num_folds)] or [registry]
    scored: dict[int | None, Sequence[CachedCase]] = {}
    notices = [note] if registry.num_folds and (note := registry.teachers_know()) else []
    for view in views:
        scored[view.fold], unscored = cases_to_score(
            replace(scope, registry=view), settings.split, allow_missing=settings.allow_missing
        )
        notices += unscored
    inputs: dict[str, dict[int | None, TrainingInputs]] = {}
    parameters: dict[str, int] = {}
    for config in configs:
        allowed = settings.allow_missing or config.allow_missing
        supervision = config.training.supervision
        inputs[config.run] = {
            view.fold: open_inputs(supervision, view, work, allow_missing=allowed, log=scope.log)
            for view in views
        }
        num_organs = len(registry.label_space.organs)
        network = build_student(config.training.network, num_organs, supervision.head)
        parameters[config.run] = sum(weights.numel() for weights in network.parameters())
    group = work / "students" / settings.name
    if settings.seconds is None:
        steps = equal_steps(configs, settings.steps)
    else:
        if execution is not None:
            prepare_work_folder(work)
        first = {name: found[views[0].fold] for name, found in inputs.items()}
        record = group / "budget.json"
        steps = steps_for_seconds(configs, first, settings.seconds, record, execution, scope.log)
    runs = _runs(configs, settings, steps, inputs, group)
    notices += _notices(configs, [c for own in scored.values() for c in own], registry, settings)
    return Comparison(settings, configs, baseline, runs, steps, parameters, scored, notices)


def _runs(
    configs: Sequence[TrainStudentConfig],
    settings: ComparisonSettings,
    steps: Mapping[str, int],
    inputs: Mapping[str, Mapping[int | None, TrainingInputs]],
    group: Folder,
) -> list[Run]:
    """Seed by seed, so that whoever stops early has whole rows, and the time left is soon known."""
    runs = []
    for seed, config in product(settings.seeds, configs):
        training = config.training.model_copy(update={"seed": seed, "steps": steps[config.run]})
        name = f"{settings.name}/{config.run}-seed{seed}"
        allowed = settings.allow_missing or config.allow_missing
        changed = config.model_copy(
            update={"run": name, "training": training, "allow_missing": allowed}
        )
        for fold, found in inputs[config.run].items():
            folder = group.parent / run_name(name, fold)
            done = is_finished(folder, run_digest(training, found.identity))
            if not done:
                check_same_units(folder, found.identity)
                check_own_files(folder, run_digest(training, found.identity))
                _check_same_settings(folder, training, found.identity)
            runs.append(Run(changed, config.run, fold, folder, done))
    return runs


def _check_same_settings(
    folder: Folder, training: TrainingConfig, identity: Mapping[str, Any]
) -> None:
    """What resuming would refuse, refused before any run has trained for hours."""
    if not matching(folder / "checkpoints", "step_*.pt"):
        return
    try:
        before = json.loads(read_text(folder / "config.json"))
    except (OSError, ValueError):
        return  # resuming looks into the checkpoint itself
    now = {"config": training.model_dump(mode="json"), "inputs": dict(identity)}
    fix = "Use the same settings to go on, or name another comparison (--name)."
    check_same(before, now, folder, fix)


def _notices(
    configs: Sequence[TrainStudentConfig],
    cases: Sequence[CachedCase],
    registry: Registry,
    settings: ComparisonSettings,
) -> list[str]:
    found = [
        f"no {settings.split} case annotates {organ}: it cannot be compared, and is in no mean."
        for organ in organs_without_cases(cases, registry.label_space)
    ]
    parts = {field.partition(".")[0] for field in differing_fields(configs)}
    if unequal := [name for name in _COMPUTE if name in parts]:
        budget = "steps" if settings.seconds is None else "seconds of training"
        found.append(
            f"not an equal budget in compute: {', '.join(unequal)} differ. {budget} are equal; "
            "parameters and seconds per step are in the table of configurations."
        )
    kinds = {config.training.supervision.uses_teachers for config in configs}
    where = {config.training.sampling.organs_from for config in configs}
    if len(kinds) > 1 and "labels_and_teachers" in where:
        found.append(
            "configurations that read teachers also draw patches where these see organs; "
            "sampling.organs_from: labels would draw the same patches for all."
        )
    if settings.seconds is not None:
        found.append(
            f"steps are those that fit in {settings.seconds:g} s of training, by a speed measured "
            "before the first run; each schedule ends at its own last step."
        )
    if len(settings.seeds) == 1:
        found.append(
            "one seed: another seed alone may turn a difference round. It shows no significance."
        )
    return found


# Configurations side by side: their names, what differs, and whether they can be compared.

# Where these differ, steps are not equal amounts of work.
_COMPUTE = ("network", "patch", "batch_size")


def load_configurations(paths: Sequence[Path]) -> list[TrainStudentConfig]:
    """Reads `train-student` settings; one that names no `run` is named by its file."""
    found = []
    for path in paths:
        config = load_config(path, TrainStudentConfig)
        if "run" not in config.model_fields_set:
            name = re.sub(r"[^A-Za-z0-9_.-]", "-", path.stem).lstrip("_.-") or "student"
            config = config.model_copy(update={"run": name})
        found.append(config)
    return found


def check_configurations(configs: Sequence[TrainStudentConfig], baseline: str) -> None:
    """Makes sure that configurations can stand in one table."""
    if not configs:
        raise ConfigError(
            "no configuration to compare is named.",
            where="pipeline compare",
            fix="Name at least one YAML file of train-student.",
        )
    names = [config.run for config in configs]
    contents: dict[str, str] = {}
    for config in configs:
        if not re.fullmatch(RUN_NAME, config.run):
            raise ConfigError(
                f"{config.run!r} is a run of another comparison.",
                where="run",
                fix="Give the configuration a `run` without a slash.",
            )
        if names.count(config.run) > 1:
            raise ConfigError(
                f"{names.count(config.run)} configurations are called {config.run!r}.",
                where="run",
                fix="Give each its own `run`, or leave it out: the file's name is taken then.",
            )
        key = digest(without_seed_and_steps(config.training))
        if key in contents:
            raise ConfigError(
                f"configurations {contents[key]!r} and {config.run!r} have the same content "
                "(seed and steps are set by the comparison).",
                where="training",
                fix="Leave one out, or change what you want to compare.",
            )
        contents[key] = config.run
    if baseline not in names:
        raise ConfigError(
            f"there is no configuration {baseline!r} to compare with.",
            where="--baseline",
            fix=f"Choose one of {', '.join(names)}.",
        )


def differing_fields(configs: Sequence[TrainStudentConfig]) -> dict[str, dict[str, Any]]:
    """Dotted field of `training` -> configuration -> its value, where not all are equal."""
    contents = {c.run: flat(without_seed_and_steps(c.training)) for c in configs}
    fields = dict.fromkeys(name for values in contents.values() for name in values)
    return {
        field: {run: values.get(field) for run, values in contents.items()}
        for field in fields
        if len({repr(values.get(field)) for values in contents.values()}) > 1
    }


def flat(value: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mappings as one, with dotted names."""
    found: dict[str, Any] = {}
    for key, inner in value.items():
        if isinstance(inner, dict) and inner:
            found |= flat(inner, f"{prefix}{key}.")
        else:
            found[f"{prefix}{key}"] = inner
    return found
