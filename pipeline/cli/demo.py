"""`pipeline demo`: the whole road on a synthetic cohort, each stage as a user would run it.

The registry and the configurations are written into the demo's folder first and read back from
there, so that every step can be repeated by hand with the commands that are printed.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml

from pipeline.config import load_config
from pipeline.consensus.cohort import RegionRules, compute, lazy_consensus, open_cohort
from pipeline.data.entries import PhantomSpec
from pipeline.data.phantom.case import write_dataset
from pipeline.data.registry import Registry, load_registry
from pipeline.engine.here import Execution
from pipeline.engine.processes import in_processes
from pipeline.errors import ConfigError, PipelineError
from pipeline.figures import BACKGROUND_COLOUR, Marked, hex_colour, save_planes
from pipeline.folder import refuse_foreign, replace_file, writing
from pipeline.log import Log, duration, number, print_table
from pipeline.review.metrics import organ_means, overall_means
from pipeline.student.speed import TrainingExecution
from stages import cache_teachers, evaluate, predict, train_teachers
from stages.compare.page import write_results
from stages.compare.plan import ComparisonSettings, load_configurations, plan_comparison
from stages.compare.results import Results, print_results
from stages.compare.run import compare
from stages.report import Scope, StageReport

_TITLES = {
    "ms_kd": "student: ms_kd (teachers' log-odds and features)",
    "pseudo_label": "student: pseudo_label (hard labels of the teachers)",
    "marginal": "student: marginal (partial labels alone)",
}
_COMPARISON = "kinds"
_BASELINE = "marginal"  # the method never to lose to


def generate_phantoms(registry: Registry, log: Log, *, dry_run: bool = False) -> StageReport:
    """Writes the datasets of a registry that have a `phantom` entry; what is there is kept.

    A unit is a dataset; `dry_run` says which would be looked at and, where need be, written.
    """
    specs = {
        name: (registry.resolve(entry.root), entry.phantom)
        for name, entry in registry.datasets.items()
        if entry.phantom
    }
    if not specs:
        raise ConfigError(
            "no dataset in this registry has a `phantom` entry.",
            where=registry.path,
            fix="Only synthetic datasets are generated; your own are already there.",
        )
    report = StageReport("phantom")
    if dry_run:
        report.done = list(specs)
        return report
    with report.timed(), log.progress("phantom datasets", len(specs)) as advance:
        made = in_processes(
            _generate, list(specs.items()), number=min(len(specs), os.cpu_count() or 1),
            name=lambda item: item[0], advance=advance,
        )  # fmt: skip
    for name, error in zip(specs, made, strict=True):
        if error is None:
            report.done.append(name)
        else:
            log.warn(f"dataset {name} failed: {error}")
            report.failed[name] = error
    return report


def run_demo(folder: Path, *, quick: bool, log: Log) -> Mapping[str, float]:
    """Runs phantom, teachers, cache, comparison of students, prediction, evaluation, picture;
    returns the mean test Dice over organs of each student.

    Everything is resumable: a second call goes on where the first one stopped. `quick` is a tiny
    cohort and a few steps, of meaningless quality.

    Raises:
        PipelineError: a stage failed; the message says which unit.
    """
    began = time.monotonic()
    # These networks are tiny: on shared cores a second thread waits more than it computes
    # (measured: 30 ms a step with one thread, 30 to 600 ms with two).
    torch.set_num_threads(1)
    work = folder / "work"
    registry, cached = fill_demo_cache(folder, quick=quick, log=log)
    compared = _compare_students(folder, registry, work, log)
    results = {kind: _test(kind, folder, registry, work, log) for kind in STUDENTS}
    figure = folder / "overlay.png"
    draw_overlay(registry, work, folder / "predictions" / "ms_kd", figure)
    print_results(compared)
    _print_results(registry, cached.details["teachers"], results)
    _say_where(folder, figure, quick, began)
    return {kind: result["foreground_mean"]["Dice"] for kind, result in results.items()}


def fill_demo_cache(folder: Path, *, quick: bool, log: Log) -> tuple[Registry, StageReport]:
    """The demo up to the cache: phantom, teachers, stage one; returns what stage one reports."""
    registry_path = write_settings(folder, quick=quick)
    _done(generate_phantoms(load_registry(registry_path, files=False), log), log)
    registry = load_registry(registry_path)
    scope = Scope(registry, folder / "work", log, tables=False)
    teach = load_config(folder / "train_teachers.yaml", train_teachers.TrainTeachersConfig)
    _done(train_teachers.run(teach, scope, TrainingExecution()), log)
    store = load_config(folder / "cache_teachers.yaml", cache_teachers.CacheTeachersConfig)
    cached = cache_teachers.run(store, scope, Execution(window_batch=4))
    _done(cached, log)
    return registry, cached


def draw_overlay(registry: Registry, work: Path, predictions: Path, path: Path) -> None:
    """CT, reference, student, each teacher's region and the agreed background of one test case, on
    the student grid."""
    from pipeline.data.nifti import read_label
    from pipeline.data.resample import resample

    space = registry.label_space
    cases = open_cohort(work, registry, teachers=list(registry.teachers), splits=("test",)).cases
    case = cases[0]
    regions, known = lazy_consensus(case, space, RegionRules(labels_win=False))
    organ, background = compute(regions.organ, regions.background)
    dataset, name = case.name.split("/")
    predicted = read_label(predictions / dataset / f"{name}.nii.gz").volume
    student = resample(predicted, case.grid, order=0).array
    label = case.label()
    panels = {
        "CT": {},
        "reference": {o: Marked(label, (i,)) for o, i in space.ids.items()},
        "student (ms_kd)": {o: Marked(student, (i,)) for o, i in space.ids.items()},
        **{
            f"teacher: {space.organs[k]}": {space.organs[k]: Marked(mask, (1,))}
            for k, mask in zip(known, organ, strict=True)
        },
        "agreed background": {"agreed background": Marked(background, (1,))},
    }
    title = f"{case.name}: student and teachers on a test case (synthetic CT)"
    colours = {organ: hex_colour(organ_id) for organ, organ_id in space.ids.items()}
    colours["agreed background"] = BACKGROUND_COLOUR
    save_planes(
        path, case.image(), panels, case.grid.spacing_mm,
        colours=colours, legend={name: name for name in colours}, title=[title],
    )  # fmt: skip


def _compare_students(folder: Path, registry: Registry, work: Path, log: Log) -> Results:
    """Trains the students on equal terms and scores them on validation cases: with one seed."""
    configs = load_configurations([folder / f"train_student_{kind}.yaml" for kind in STUDENTS])
    settings = ComparisonSettings(name=_COMPARISON, seeds=(0,), baseline=_BASELINE, surface=False)
    scope = Scope(registry, work, log)
    plan = plan_comparison(configs, settings, scope, None)
    # In --quick, starting a loader process would take longer than the training.
    workers = 0 if min(plan.steps.values()) < 100 else 1
    results = compare(plan, scope, TrainingExecution(workers=workers), window_batch=4)
    write_results(results, folder / _COMPARISON)
    if results.failed:
        first = results.failed[0]
        raise PipelineError(
            f"a student of the demo failed: {first.error}",
            where=first.folder,
            fix="Run the same command again: it goes on from there.",
        )
    return results


def _test(kind: str, folder: Path, registry: Registry, work: Path, log: Log) -> Mapping[str, Any]:
    student = work / "students" / _COMPARISON / f"{kind}-seed0" / "student.pt"
    output = folder / "predictions" / kind
    inputs = predict.chosen_inputs(None, registry, ["test"])
    how = predict.PredictExecution(window_batch=4)
    made = predict.run(predict.PredictConfig(), student, inputs, output, how, log=log)
    _done(made, log)
    _done(evaluate.run(evaluate.EvaluateConfig(), registry, output, log=log, table=False), log)
    summary: dict[str, Any] = json.loads((output / "summary.json").read_text(encoding="utf-8"))
    return summary


def _done(report: StageReport, log: Log) -> None:
    log.info(report.summary())
    if report.failed:
        unit, error = next(iter(report.failed.items()))
        if isinstance(error, PipelineError):
            raise error
        raise PipelineError(
            f"{report.stage} failed ({error}).",
            where=unit,
            fix="This was not foreseen: please report it with what stands above.",
        ) from error


def _print_results(
    registry: Registry, teachers: list[dict[str, Any]], results: Mapping[str, Mapping[str, Any]]
) -> None:
    organs = list(registry.label_space.organs)
    multi = [d for d, e in registry.datasets.items() if len(e.annotated) == len(organs)]
    own = {r["organ"]: r for r in teachers if r["dataset"] not in multi}
    shifted = {r["organ"]: r for r in teachers if r["dataset"] in multi}
    rows = []
    for dataset, of in {"their own dataset": own, "multi-organ-ct": shifted}.items():
        dice = [of[o]["dice"] if o in of else None for o in organs]
        mean = float(np.mean([d for d in dice if d is not None])) if any(dice) else None
        rows.append([f"teachers, validation cases of {dataset}", *map(number, [*dice, mean])])
    for kind, summary in results.items():
        means = organ_means(summary)
        dice = [means[organ]["Dice"] for organ in organs]
        rows.append([_TITLES[kind], *map(number, [*dice, overall_means(summary)["Dice"]])])
    print_table("Dice (students: test cases)", ["", *organs, "mean"], rows)


def _say_where(folder: Path, figure: Path, quick: bool, began: float) -> None:
    note = "\n(--quick: too little training for these numbers to mean anything)" if quick else ""
    students = folder / "train_student_*.yaml"
    print(  # noqa: T201
        f"{note}\n"
        f"picture       {figure}\n"
        f"registry      {folder / 'data_registry.yaml'}, settings beside it\n"
        f"cache         {folder / 'work' / 'cases'}, {folder / 'work' / 'teachers'}\n"
        f"students      {folder / 'work' / 'students' / _COMPARISON} (progress.png, "
        "metrics.jsonl, student.pt)\n"
        f"comparison    {folder / _COMPARISON} (validation.html, .png, .json, .csv)\n"
        f"predictions   {folder / 'predictions'} (summary.json beside the label maps)\n"
        f"again by hand, with three seeds:\n"
        f"pipeline compare {students} --seeds 0,1,2 --baseline {_BASELINE} \\\n"
        f"  -r {folder / 'data_registry.yaml'} -w {folder / 'work'} -o {folder / _COMPARISON}\n"
        f"took {duration(time.monotonic() - began)}"
    )


def _generate(item: tuple[str, tuple[Path, PhantomSpec]]) -> None:
    write_dataset(*item[1])


STUDENTS = ("ms_kd", "pseudo_label", "marginal")
_PATCH = [32, 40, 40]
_STUDENT_TAP = "model.1.submodule.0"


def write_settings(folder: Path, *, quick: bool) -> Path:
    """Writes registry and configurations of the demo; returns the registry's path."""
    data = yaml.safe_load(reference_registry().read_text(encoding="utf-8"))
    if quick:
        _shrink(data)
    registry = folder / "data_registry.yaml"
    if registry.exists() and yaml.safe_load(registry.read_text(encoding="utf-8")) != data:
        raise ConfigError(
            "there is a demo of another size or version in this folder.",
            where=folder,
            fix="Name another folder, or remove this one.",
        )
    if not registry.exists():
        named = ("phantom", "work", "kinds", "predictions", "overlay.png", *map(_student, STUDENTS))
        targets = [folder / name for name in (*named, "train_teachers.yaml", "cache_teachers.yaml")]
        refuse_foreign("demo", [(path, False) for path in targets], fix="Name another folder.")
    _write_yaml(registry, data)
    training = {"patch": _PATCH, "batch_size": 2, "validate_every": 100}
    training["optimiser"] = {"lr": 0.003}
    teacher = {**training, "steps": 8 if quick else 300}
    _write_yaml(folder / "train_teachers.yaml", {"training": teacher})
    window = {"shape": _PATCH, "overlap": 0.5}
    _write_yaml(folder / "cache_teachers.yaml", {"window": window})
    for kind in STUDENTS:
        supervision: dict[str, Any] = {"kind": kind}
        if kind == "ms_kd":
            supervision["features"] = {"student_taps": [_STUDENT_TAP]}
        student = {**training, "steps": 8 if quick else 450, "supervision": supervision}
        _write_yaml(folder / _student(kind), {"run": kind, "training": student})
    return registry


def reference_registry() -> Path:
    """The annotated one: beside the packages in a checkout, within them in a wheel."""
    package = Path(__file__).parents[1]
    for path in (package.parent / "data_registry.yaml", package / "data" / "data_registry.yaml"):
        if path.is_file():
            return path
    raise ConfigError(
        "the reference registry is not installed.",
        where="data_registry.yaml",
        fix="Install organ-distill again.",
    )


def _shrink(data: dict[str, Any]) -> None:
    # After eight steps no teacher finds its organ: any threshold of the gate would stop the demo.
    data["admission"]["dice"] = 0.0
    for entry in data["datasets"].values():
        entry["phantom"] |= {"num_cases": 3, "shape": [24, 28, 32]}
        if "train" in entry["split"]:
            entry["split"] = {"train": [], "validation": ["case_000"], "test": ["case_001"]}
    data["grid"]["spacing_mm"] = [12.0, 12.0, 12.0]
    data["teachers"]["liver"]["spacing_mm"] = [12.0, 12.0, 12.0]


def _student(kind: str) -> str:
    return f"train_student_{kind}.yaml"


def _write_yaml(path: Path, data: Any) -> None:
    """One that somebody changed to try other settings stays."""
    text = yaml.safe_dump(data, sort_keys=False)
    if not path.exists():
        with writing(path):
            replace_file(path, text.encode())
    elif yaml.safe_load(path.read_text(encoding="utf-8")) != data:
        raise ConfigError(
            "these are not the settings of this demo, and they are not replaced.",
            where=path,
            fix="Run the stages by hand with them, or name another folder.",
        )
