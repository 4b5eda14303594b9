"""The process of one job: cohort, students, scores. `python -m benchmarks.accuracy.job REQUEST`.

REQUEST is the JSON that the bench writes into the job's folder.
"""

from __future__ import annotations

import fcntl
import json
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch

from benchmarks.accuracy.cohort import make_cohort, next_generation
from benchmarks.accuracy.configurations import METHOD
from benchmarks.accuracy.online import teachers_in_the_loop
from benchmarks.accuracy.oracle import perfect_teachers
from benchmarks.accuracy.regimes import REGIMES
from benchmarks.accuracy.size import SIZES
from pipeline.cache.reader import CachedCase
from pipeline.cache.store import write_json
from pipeline.consensus.cohort import open_cohort
from pipeline.data.registry import Registry, load_registry
from pipeline.errors import PipelineError, Stopped
from pipeline.log import Log
from pipeline.student.speed import TrainingExecution
from stages import train_student
from stages.compare.scoring import ScoringSettings, score_student
from stages.report import Scope
from stages.train_student import TrainStudentConfig

FAILED = 1
BUSY = 4


def main(path: Path) -> int:
    """Does what a request says; the exit code is 0 if all of it is done."""
    torch.set_num_threads(1)
    request = json.loads(path.read_text(encoding="utf-8"))
    folder = Path(request["folder"])
    log = Log()
    with (folder / "lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            log.warn(f"another process works on {folder}; wait for it, or end it")
            return BUSY
        try:
            make_cohort(
                folder, REGIMES[request["regime"]], SIZES[request["size"]], request["seed"], log
            )
            return make_students(folder, request, log)
        except PipelineError as error:
            log.warn(str(error))
            return FAILED


def make_students(folder: Path, request: Mapping[str, Any], log: Log) -> int:
    """Trains what is not trained and scores what is not scored; a failure leaves the others, a
    signal does not."""
    runs, split, size = request["runs"], request["split"], SIZES[request["size"]]
    if not runs:
        return 0
    work = folder / "work"
    registries = {
        name: load_registry(folder / f"{name}_registry.yaml", files=False)
        for name in ("student", "full", "test")
    }
    cases = scored_cases(registries, work, split)
    failed = []
    for run in runs:
        place = work / "students" / str(run["folder"])
        try:
            registry = registries[run["registry"]]
            if run["teachers"] == "and-student":
                registry = next_generation(folder, _first(run, runs, work), size, log)
            _train(run, registries["full"], Scope(registry, work, log))
            with log.progress(f"scoring {run['folder']}", len(cases)) as advance:
                score_student(
                    place, cases, ScoringSettings(split=split, surface=False),
                    device="cpu", window_batch=4, advance=advance,
                )  # fmt: skip
        except Stopped as error:
            log.warn(str(error))
            return FAILED
        except PipelineError as error:
            failed.append(str(run["folder"]))
            log.warn(f"{run['folder']} failed, the others go on: {error}")
    if failed:
        log.warn(f"failed: {', '.join(failed)}")
    return FAILED if failed else 0


def scored_cases(
    registries: Mapping[str, Registry], work: Path, split: str
) -> Sequence[CachedCase]:
    """Of the split; test cases stand in a registry of their own."""
    registry = registries["test" if split == "test" else "student"]
    return open_cohort(work, registry, splits=(split,)).cases


def _first(run: Mapping[str, Any], runs: Sequence[Mapping[str, Any]], work: Path) -> Path:
    """The student.pt of the method in the same budget."""
    wanted = (METHOD, run["budget"])
    found = next(other for other in runs if (other["name"], other["budget"]) == wanted)
    return work / "students" / str(found["folder"]) / "student.pt"


def _train(run: Mapping[str, Any], full: Registry, scope: Scope) -> None:
    place = scope.work / "students" / str(run["folder"])
    # The folder's name says all that counts for it (see `identity`).
    if run["is_baseline"] and (place / "finished.json").exists():
        return
    config = TrainStudentConfig.model_validate({"run": run["folder"], "training": run["training"]})
    speaking: dict[str, Callable[[], AbstractContextManager[None]]] = {
        "cached": nullcontext,
        "and-student": nullcontext,
        "online": lambda: teachers_in_the_loop(scope.registry),
        "perfect": lambda: perfect_teachers(full, scope.work),
    }
    began = time.process_time()
    with speaking[run["teachers"]]():
        report = train_student.run(config, scope, TrainingExecution(device="cpu"))
    for error in report.failed.values():
        raise error
    if report.done:
        cost = {"cpu_seconds": round(time.process_time() - began, 2)}
        write_json(place / "cost.json", cost)
    if report.signalled:
        raise Stopped(
            "stopped after its last step.", where=place, fix="The same command goes on from there."
        )


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
