"""Our student: trained for so many seconds, predicted with by the product's own `predict`."""

from __future__ import annotations

import re
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks.accuracy.cohort import raise_failed
from benchmarks.accuracy.configurations import merged
from benchmarks.against_nnunet.cohorts import Place, Size
from benchmarks.against_nnunet.nnunet import plan_of, same_network
from benchmarks.real_slices.size import INTENSITY
from pipeline.cache.store import write_json
from pipeline.config import read_yaml
from pipeline.errors import ConfigError
from pipeline.folder import json_with
from pipeline.log import Advance, Log
from pipeline.student.inputs import open_inputs
from pipeline.student.resume import RunFolder
from pipeline.student.speed import TrainingExecution
from pipeline.student.training import train as train_steps
from stages import predict as predict_stage
from stages import train_student
from stages.predict import PredictConfig, PredictExecution
from stages.report import Scope
from stages.train_student import TrainStudentConfig

STUDENTS = Path(__file__).with_name("students.yaml")
_WARM_UP, _PROBED = 4, 12
_CPU = TrainingExecution(device="cpu")


def rows() -> dict[str, dict[str, Any]]:
    """Name -> `training`, `seed` and `with`, as `students.yaml` has them."""
    return dict(read_yaml(STUDENTS).data)


def student_file(place: Place, row: str) -> Path:
    """Where a row's student is."""
    return place.work / "students" / _run(place, row) / "student.pt"


def _run(place: Place, row: str) -> str:
    return f"{place.setting}/{re.sub('[^A-Za-z0-9]+', '-', row).strip('-')}"


class _Clock(Log):
    """Keeps this process's CPU time at the end of every step."""

    def __init__(self) -> None:
        super().__init__(quiet=True)
        self.times: list[float] = []

    @contextmanager
    def progress(self, what: str, total: int, *, done: int = 0) -> Iterator[Advance]:
        """See `Log.progress`; shows nothing."""

        def advance(note: str = "", steps: int = 1) -> None:
            if what == "steps" and note:  # without: steps that an earlier process made
                self.times.append(time.process_time())

        yield advance

    def seconds_per_step(self) -> float:
        """Their mean; 0 where fewer than two were made."""
        if len(self.times) < 2:
            return 0.0
        return (self.times[-1] - self.times[0]) / (len(self.times) - 1)


def config_of(place: Place, size: Size, row: str, seed: int) -> TrainStudentConfig:
    """Settings of a row, with one step."""
    wanted = rows()[row]
    base = same_network(plan_of(place, size), size) | {
        "supervision": {"kind": "ms_kd"}, "steps": 1, "seed": 100 * seed + wanted.get("seed", 0),
        "validate_every": 10**9,
    }  # fmt: skip
    changes: Mapping[str, Any] = wanted["training"]
    if "network" in changes:
        del base["network"]
    elif changes.get("deep_supervision"):
        # As many outputs as nnU-Net has, but for its coarsest, which it gives no weight.
        heads = max(1, len(base["network"]["args"]["filters"]) - 3)
        base["network"]["args"] |= {"deep_supervision": True, "deep_supr_num": heads}
    if size.configuration == "2d":
        base["intensity"] = INTENSITY
        changes = _flat(changes)
    training = merged(base, changes)
    return TrainStudentConfig.model_validate({"run": _run(place, row), "training": training})


def _flat(changes: Mapping[str, Any]) -> dict[str, Any]:
    """For patches of one slice."""
    found = merged({}, changes)
    if "flip_axes" in found.get("augment", {}):
        found["augment"] = found["augment"] | {"flip_axes": [1, 2]}
    if "network" in found:
        args = dict(found["network"]["args"])
        args |= {"strides": [[1, 2, 2]] * len(args["strides"])}
        found["network"] = found["network"] | {
            "args": args | {"kernel_size": [1, 3, 3], "up_kernel_size": [1, 3, 3]}
        }
    return found


def train(
    place: Place, size: Size, row: str, seconds: float, seed: int, record: Path
) -> dict[str, Any]:
    """As many steps as fit in `seconds` of CPU time, by a speed that is measured first: a schedule
    must know its last step. The speed is kept in `record`, so that a training that was killed goes
    on with as many.

    Returns:
        `steps`, `seconds` and `seconds_per_step`, as they came to be.
    """
    config = config_of(place, size, row, seed)
    registry, clock = place.registry(files=False), _Clock()
    measured = json_with(record, "seconds_per_step")
    if measured is None:
        measured = {"seconds_per_step": _probed(config, place, clock)}
        write_json(record, measured)
    steps = max(1, round(seconds / measured["seconds_per_step"]))
    training = config.training.model_copy(update={"steps": steps})
    scope = Scope(registry, place.work, clock, tables=False)
    raise_failed(train_student.run(config.model_copy(update={"training": training}), scope, _CPU))
    each = clock.seconds_per_step() or measured["seconds_per_step"]
    kept = student_file(place, row).stat().st_size
    return {"steps": steps, "seconds": each * steps, "seconds_per_step": each, "bytes_kept": kept}


def _probed(config: TrainStudentConfig, place: Place, clock: _Clock) -> float:
    """Seconds per step after a warm-up."""
    supervision, registry = config.training.supervision, place.registry(files=False)
    inputs = open_inputs(supervision, registry, place.work, allow_missing=False, log=clock)
    training = config.training.model_copy(update={"steps": _WARM_UP + _PROBED})
    with tempfile.TemporaryDirectory() as folder:
        files = RunFolder(Path(folder), pictures=False)
        train_steps(training, replace(inputs, validation=()), files, _CPU, clock)
    clock.times = clock.times[_WARM_UP - 1 :]
    found = clock.seconds_per_step()
    clock.times = []
    return found


def variants(row: str) -> dict[str, PredictConfig]:
    """Ways to predict with a row's student."""
    wanted = rows()[row]
    if "with" in wanted:
        return {"ensemble": PredictConfig()}
    found = {"plain": PredictConfig(), "unprocessed": PredictConfig(postprocessing=False)}
    if wanted["training"].get("augment", {}).get("flip_axes"):
        found["mirrored"] = PredictConfig(mirror=True)
    return found


def predict(place: Place, row: str, variant: str, output: Path, log: Log) -> dict[str, float]:
    """`output/<dataset>/<case>.nii.gz`.

    Raises:
        ConfigError: the row to predict with is not trained.
    """
    students = [student_file(place, row)]
    if variant == "ensemble":
        students.append(student_file(place, rows()[row]["with"]))
        if not students[1].exists():
            raise ConfigError(
                f"it is predicted together with {rows()[row]['with']!r}, which is not trained.",
                where=f"row {row!r}",
                fix="Name both in --rows.",
            )
    _, cases, inputs = place.scored()
    began = time.process_time()
    done = predict_stage.run(
        variants(row)[variant], students, inputs, output, PredictExecution("cpu"), log=log
    )
    raise_failed(done)
    return {"seconds_per_case": (time.process_time() - began) / len(cases)}
