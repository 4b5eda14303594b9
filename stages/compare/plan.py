"""What a comparison will do: every configuration with every seed, checked before the first step."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.cache.reader import CachedCase
from pipeline.cache.store import prepare_work_folder
from pipeline.cohort import open_cohort
from pipeline.comparison.budget import equal_steps, recorded_steps, steps_for_seconds
from pipeline.comparison.configurations import (
    check_configurations,
    differing_fields,
    flat,
    unequal_compute,
)
from pipeline.comparison.scoring import organs_without_cases
from pipeline.comparison.settings import Settings, check_settings
from pipeline.config import canonical_json
from pipeline.data.registry import Registry
from pipeline.errors import CacheMissing, CheckpointError, ConfigError
from pipeline.folder import Folder, matching, read_text
from pipeline.log import Log
from pipeline.network import pick_device
from pipeline.student.network import build_student
from pipeline.student.settings import TrainingConfig, run_digest
from pipeline.student.speed import SpeedFlags
from pipeline.student_inputs import StudentInputs, check_same_units, open_inputs
from stages.train_student import TrainStudentConfig, is_finished


@dataclass(frozen=True)
class Run:
    """One configuration with one seed.

    Attributes:
        config: with seed and steps as they will be trained.
        name: of the configuration.
        folder: WORK/students/<comparison>/<name>-seed<seed>.
        finished: whether it was finished before.
    """

    config: TrainStudentConfig
    name: str
    folder: Folder
    finished: bool

    @property
    def seed(self) -> int:
        """Of the training."""
        return self.config.training.seed


@dataclass(frozen=True)
class Plan:
    """A comparison, checked.

    Attributes:
        settings: what it is of.
        configs: as they were given.
        baseline: the name of the one that the others are compared with.
        runs: in the order in which they are made.
        steps: configuration -> steps of each of its runs.
        parameters: configuration -> weights of its network.
        cases: that students are scored on.
        notices: what a reader of the table has to know.
    """

    settings: Settings
    configs: Sequence[TrainStudentConfig]
    baseline: str
    runs: Sequence[Run]
    steps: Mapping[str, int]
    parameters: Mapping[str, int]
    cases: Sequence[CachedCase]
    notices: Sequence[str]


def plan_comparison(
    configs: Sequence[TrainStudentConfig],
    registry: Registry,
    work: Folder,
    settings: Settings,
    *,
    log: Log,
    device: str = "auto",
    workers: int = 0,
    flags: SpeedFlags | None = None,
    measure: bool = True,
    stage_to: Path | None = None,
) -> Plan:
    """Checks everything before the first step; with `seconds`, measures unless that was done.

    Args:
        configs: `run` is each one's name.
        registry: read without its files.
        work: the work folder that stage one filled.
        settings: see there.
        log: where progress goes.
        device: auto, cpu, cuda, cuda:1.
        workers: loader processes.
        flags: precision, memory format, compiling; for measuring.
        measure: False takes what was measured before; a configuration that was not is as if its
            runs were new. For a look.
        stage_to: for measuring; see `train_student.run`.

    Raises:
        ConfigError: configurations that cannot stand in one table, or nothing to score them on.
        CacheMissing, CacheStale: the cache lacks what one of them needs.
        CheckpointError: a run of this comparison was started with other units of the cache.
    """
    baseline = settings.baseline or (configs[0].run if configs else "")
    check_configurations(configs, baseline)
    check_settings(settings)
    cases = _scored_cases(registry, work, settings, log)
    space = registry.label_space
    inputs: dict[str, StudentInputs] = {}
    parameters: dict[str, int] = {}
    for config in configs:
        allowed = settings.allow_missing or config.allow_missing
        supervision = config.training.supervision
        inputs[config.run] = open_inputs(
            supervision, registry, work, allow_missing=allowed, log=log
        )
        network = build_student(config.training.network, len(space.organs), supervision.head)
        parameters[config.run] = sum(weights.numel() for weights in network.parameters())
    group = work / "students" / settings.name
    if settings.seconds is None:
        steps = equal_steps(configs, settings.steps)
    elif not measure:
        steps = recorded_steps(configs, settings.seconds, group / "budget.json")
    else:
        prepare_work_folder(work)
        steps = steps_for_seconds(
            configs, inputs, space, settings.seconds, group / "budget.json",
            log=log, device=pick_device(device), workers=workers, flags=flags,
            stage_to=stage_to,
        )  # fmt: skip
    identities = {name: found.identity for name, found in inputs.items()}
    runs = _runs(configs, settings, steps, identities, group)
    notices = _notices(configs, cases, registry, settings)
    return Plan(settings, configs, baseline, runs, steps, parameters, cases, notices)


def _runs(
    configs: Sequence[TrainStudentConfig],
    settings: Settings,
    steps: Mapping[str, int],
    identities: Mapping[str, Mapping[str, Any]],
    group: Folder,
) -> list[Run]:
    """Seed by seed, so that whoever stops early has whole rows, and the time left is soon known."""
    runs = []
    for seed in settings.seeds:
        for config in configs:
            name, identity = f"{config.run}-seed{seed}", identities[config.run]
            training = config.training.model_copy(update={"seed": seed, "steps": steps[config.run]})
            changed = config.model_copy(
                update={
                    "run": f"{settings.name}/{name}",
                    "training": training,
                    "allow_missing": settings.allow_missing or config.allow_missing,
                }
            )
            done = is_finished(group / name, run_digest(training, identity))
            if not done:
                check_same_units(group / name, identity)
                _check_same_settings(group / name, training, identity)
            runs.append(Run(changed, config.run, group / name, done))
    return runs


def _check_same_settings(
    folder: Folder, training: TrainingConfig, identity: Mapping[str, Any]
) -> None:
    """What resuming would refuse, refused before any run has trained for hours."""
    if not matching(folder / "checkpoints", "step_*.pt"):
        return
    try:
        before = json.loads(canonical_json(json.loads(read_text(folder / "config.json"))))
    except (OSError, ValueError):
        return  # resuming looks into the checkpoint itself
    now = {"config": training.model_dump(mode="json"), "inputs": dict(identity)}
    old, new = flat(before), flat(json.loads(canonical_json(now)))
    fields = [name for name in {**old, **new} if old.get(name) != new.get(name)]
    if fields:
        said = "; ".join(f"{f} was {old.get(f)}, now {new.get(f)}" for f in fields[:6])
        raise CheckpointError(
            f"this run was started with other settings: {said}.",
            where=folder,
            fix="Use the same settings to go on, or name another comparison (--name).",
        )


def _scored_cases(
    registry: Registry, work: Folder, settings: Settings, log: Log
) -> Sequence[CachedCase]:
    split = "test" if settings.test else "validation"
    cohort = open_cohort(work, registry, splits=(split,))
    if cohort.problems and not settings.allow_missing:
        first, error = next(iter(cohort.problems.items()))
        raise CacheMissing(
            f"{len(cohort.problems)} {split} cases are not in the cache, {first} among them. "
            f"{error}",
            where=work,
            fix="Run `pipeline cache-teachers`, or give --allow-missing.",
        )
    if not cohort.cases or not any(case.annotated for case in cohort.cases):
        raise ConfigError(
            f"there is no {split} case to compare on.",
            where=registry.path,
            fix="Set `split` in the registry and run `pipeline cache-teachers`.",
        )
    if cohort.problems:
        log.warn(f"{split} cases that are left out: {', '.join(cohort.problems)}")
    return cohort.cases


def _notices(
    configs: Sequence[TrainStudentConfig],
    cases: Sequence[CachedCase],
    registry: Registry,
    settings: Settings,
) -> list[str]:
    split = "test" if settings.test else "validation"
    found = [
        f"no {split} case annotates {organ}: it cannot be compared, and is in no mean."
        for organ in organs_without_cases(cases, registry.label_space)
    ]
    unequal = unequal_compute(differing_fields(configs))
    if unequal:
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
