"""One repetition: teachers, cache and students of one seed, by the project's own stages. What is
there is kept, so that a kill costs little."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.accuracy.cohort import raise_failed
from benchmarks.accuracy.configurations import merged
from benchmarks.real_slices.size import TAP, Size
from benchmarks.real_slices.slices import ORGANS, write_registry
from pipeline.cache.store import write_json
from pipeline.config import read_yaml
from pipeline.data.registry import Registry, load_registry
from pipeline.engine.here import Execution
from pipeline.errors import ConfigError, PipelineError
from pipeline.log import Log
from pipeline.student.settings import TrainingConfig
from pipeline.student.speed import TrainingExecution
from stages import cache_teachers, train_teachers
from stages.compare.plan import ComparisonSettings, plan_comparison
from stages.compare.results import Results
from stages.compare.run import compare
from stages.report import Scope
from stages.train_student import TrainStudentConfig

BASELINES = ("marginal", "pseudo_label")
METHOD = "ms_kd"
_SUPERVISIONS: Mapping[str, Mapping[str, Any]] = {
    **{kind: {"kind": kind} for kind in (*BASELINES, METHOD)},
    "with_features": {"kind": METHOD, "features": {"student_taps": [TAP]}},
}
KINDS = tuple(_SUPERVISIONS)
EQUAL_STEPS, EQUAL_TIME = "equal steps", "equal time"
_WINDOW_BATCH = 8
_SETTINGS = "See stages/train_student.yaml, below `training`."


@dataclass(frozen=True)
class Road:
    """What all repetitions share.

    Attributes:
        folder: of everything.
        size: of everything.
        configurations: what is compared.
        comparison: name of the settings that all students share; empty for those of `Size`.
        terms: `EQUAL_STEPS`, `EQUAL_TIME` or both.
        seconds: of training of each student at equal time.
        test: score the test set as well as the validation cases.
        device: auto, cpu, cuda, cuda:1.
        log: where progress goes.
    """

    folder: Path
    size: Size
    configurations: Sequence[TrainStudentConfig]
    comparison: str
    terms: Sequence[str]
    seconds: float | None
    test: bool
    device: str
    log: Log

    @property
    def slices(self) -> Path:
        """Where the cases are."""
        return self.folder / "slices"

    @property
    def out(self) -> Path:
        """Where tables and pictures go."""
        return self.folder / "results" / (self.comparison or "shipped")

    def place(self, seed: int) -> Path:
        """Of a repetition: registry, teachers and work folder."""
        return self.folder / f"seed{seed}"

    def repeat(self, seed: int) -> dict[tuple[str, str], Results]:
        """Makes what a repetition lacks.

        Returns:
            (terms, split) -> what was found, terms being `equal steps` or `equal time`.

        Raises:
            PipelineError: a stage failed; the message says what.
        """
        scope = self.cached(seed)
        found = {}
        for terms in self.terms:
            for test in (False, True)[: 1 + self.test]:
                results = self._compare(scope, seed, terms, test=test)
                found[terms, results.split] = results
        return found

    def cached(self, seed: int) -> Scope:
        """Teachers and cache of a repetition.

        Raises:
            PipelineError: a stage failed; the message says what.
        """
        registry = self._registry(seed)
        self._train_teachers(registry, seed)
        scope = Scope(registry, self.place(seed) / "work", self.log, tables=False)
        window = {"shape": self.size.window, "overlap": 0.5}
        storing = cache_teachers.CacheTeachersConfig.model_validate({"window": window})
        execution = Execution(device=self.device, window_batch=_WINDOW_BATCH)
        raise_failed(cache_teachers.run(storing, scope, execution))
        return scope

    def _registry(self, seed: int) -> Registry:
        place = self.place(seed)
        place.mkdir(parents=True, exist_ok=True)
        record, wanted = place / "size.json", self.size.to_json()
        plain = json.loads(json.dumps(wanted))
        if record.exists() and json.loads(record.read_text(encoding="utf-8")) != plain:
            raise ConfigError(
                "this folder was made with other numbers of benchmarks/real_slices/size.py.",
                where=record,
                fix="Name another FOLDER.",
            )
        write_json(record, wanted)
        path = place / "data_registry.yaml"
        write_registry(path, self.slices, self.size, place / "teachers")
        return load_registry(path)

    def _train_teachers(self, registry: Registry, seed: int) -> None:
        steps, places = self.size.teacher_steps, self.place(seed) / "teachers"
        # Once: settings that are new to a teacher's training since then change nothing.
        if all((places / f"{organ}.pt").exists() for organ in ORGANS):
            return
        settings: dict[str, Any] = {"steps": steps, "seed": seed, "validate_every": steps}
        if self.size.teacher_augment is not None:
            settings["augment"] = {"preset": self.size.teacher_augment}
        training = self.size.training(settings)
        del training["intensity"]  # a teacher's stands in its registry entry
        config = train_teachers.TrainTeachersConfig.model_validate({"training": training})
        scope = Scope(registry, self.place(seed) / "work", self.log, tables=False)
        raise_failed(train_teachers.run(config, scope, TrainingExecution(device=self.device)))

    def _compare(self, scope: Scope, seed: int, terms: str, *, test: bool) -> Results:
        budget: dict[str, Any] = {"steps": self.size.student_steps}
        if terms == EQUAL_TIME:
            budget = {"seconds": self.seconds}
            self._measured_once(seed)
        settings = ComparisonSettings(
            self._name(terms), (seed,), baseline=BASELINES[0], test=test, surface=False, **budget
        )
        execution = TrainingExecution(device=self.device)
        plan = plan_comparison(self.configurations, settings, scope, execution)
        results = compare(plan, scope, execution, window_batch=_WINDOW_BATCH)
        for run in results.failed:
            raise PipelineError(f"a student failed: {run.error}", where=run.folder)
        return results

    def _name(self, terms: str) -> str:
        return "-".join([*terms.split(), *([self.comparison] if self.comparison else [])])

    def _measured_once(self, seed: int) -> None:
        """Speeds measured in an earlier repetition hold for all, so that steps are equal."""
        part = Path("work", "students", self._name(EQUAL_TIME), "budget.json")
        here = self.place(seed) / part
        known = sorted(self.folder.glob(f"seed*/{part}"))
        if known and not here.exists():
            write_json(here, json.loads(known[0].read_text(encoding="utf-8")))


def configurations(
    size: Size, kinds: Sequence[str], folder: Path | None, base: Path | None
) -> list[TrainStudentConfig]:
    """The kinds of supervision with their defaults, and one configuration per YAML file of a
    folder, named by it: what it says of `training` is laid over what ms_kd has there.

    Args:
        size: of the trainings.
        kinds: of `KINDS`.
        folder: of such files.
        base: a YAML file that is laid over `training` of all.

    Raises:
        ConfigError: no file in the folder, or a mistake in one.
    """
    common = {} if base is None else _changes(base)
    found = [
        _configuration(size, kind, merged(common, {"supervision": _SUPERVISIONS[kind]}), base)
        for kind in kinds
    ]
    paths = [] if folder is None else sorted(folder.glob("*.yaml"))
    if folder is not None and not paths:
        raise ConfigError("there is no .yaml file.", where=folder, fix="Name another --configs.")
    for path in paths:
        settings = merged(merged(common, {"supervision": {"kind": METHOD}}), _changes(path))
        found.append(_configuration(size, path.stem, settings, path))
    return found


def _changes(path: Path) -> dict[str, Any]:
    changes = read_yaml(path).data
    if not isinstance(changes, dict):
        raise ConfigError("not a mapping of settings.", where=path, fix=_SETTINGS)
    return changes


def _configuration(
    size: Size, name: str, changes: Mapping[str, Any], where: object
) -> TrainStudentConfig:
    try:
        training = TrainingConfig.model_validate(size.training(changes))
    except ValueError as error:
        raise ConfigError(str(error), where=where, fix=_SETTINGS) from error
    # Validations of a training choose nothing here: one, at its end.
    training = training.model_copy(update={"validate_every": 10**9})
    return TrainStudentConfig(run=name, training=training)
