"""A teacher that kills its own process on a marked case, as often as it is told to, or takes its
time, or stops at a case until it is let go. It says none of this in its description: the numbers
are those of a threshold."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from pipeline.data.nifti import read_image, write_image
from pipeline.data.volume import Volume
from pipeline.teachers.teacher import Prediction
from tests.faults.small import DATASET, TEACHERS, build_small, teacher, write_registry
from tests.unit.teachers.made_teachers import Threshold

MARK = 2345
_ORDERS = "orders.json"


class Deadly(Threshold):
    """Reads its orders (`arm`) for each case; leaves a file for each death."""

    def __init__(self, taps: Sequence[str], hu: float, grave: Path) -> None:
        super().__init__(taps, hu, None)
        self.grave = grave

    def predict(self, image: Volume) -> Prediction:
        """Numbers, or death."""
        orders = json.loads((self.grave / _ORDERS).read_text())
        number = len(deaths(self.grave))
        if number < orders["times"] and np.any(image.array == MARK):
            (self.grave / f"{number}.{os.getpid()}").touch()
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(orders["seconds"])
        if orders["hold"]:
            held = self.grave.with_name(f"held.{os.getpid()}")
            held.touch()
            while held.exists():
                time.sleep(0.05)
        return super().predict(image)


def deadly(weights: Path, *, taps: Sequence[str], device: str, hu: float = 0.0) -> Deadly:
    """The factory that a registry names."""
    assert weights.is_file()
    return Deadly(taps, hu, weights.parents[1] / "grave")


def build_deadly(folder: Path, *, num_cases: int, marked: int) -> Path:
    """The small cohort with one marked case; returns the registry's path."""
    registry = build_small(folder, num_cases=num_cases)
    path = folder / "data" / DATASET / "images" / f"case_{marked:03}.nii.gz"
    volume = read_image(path).volume
    array = volume.array.copy()
    array.flat[0] = MARK
    write_image(path, Volume(array, volume.grid))
    first, second = TEACHERS
    mortal = teacher(TEACHERS[first], factory="tests.faults.deadly:deadly")
    write_registry(registry, {first: mortal, second: teacher(TEACHERS[second])})
    (folder / "grave").mkdir()
    arm(registry)
    return registry


def arm(registry: Path, *, times: int = 0, seconds: float = 0.0, hold: bool = False) -> None:
    """Orders the first teacher to kill so often, to take so long for each case, and to stop at one
    until its `held` file is gone."""
    orders = {"times": times, "seconds": seconds, "hold": hold}
    (registry.parent / "grave" / _ORDERS).write_text(json.dumps(orders))


def deaths(grave: Path) -> list[Path]:
    """One file each, `<number>.<pid>`."""
    return sorted(path for path in grave.iterdir() if path.name != _ORDERS)


def held(registry: Path) -> list[int]:
    """Processes that were stopped at a case; `let_go` lets one of them go on."""
    return [int(path.suffix[1:]) for path in registry.parent.glob("held.*")]


def let_go(registry: Path, pid: int) -> None:
    """Lets a held process go on, if it lives."""
    (registry.parent / f"held.{pid}").unlink()
