"""What everybody trains and is tested on: cases, teachers and cache of one repetition."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import yaml

from benchmarks.accuracy.cohort import make_cohort, raise_failed
from benchmarks.accuracy.regimes import REGIMES
from benchmarks.accuracy.size import TINY as TINY_PHANTOMS
from benchmarks.accuracy.size import Size as Phantoms
from benchmarks.real_slices.road import Road
from benchmarks.real_slices.size import SIZES as SLICES
from benchmarks.real_slices.size import Size as Slices
from benchmarks.real_slices.slices import convert
from pipeline.data.entries import CaseFiles
from pipeline.data.registry import Registry, load_registry
from pipeline.engine.here import Execution, Here
from pipeline.log import Log
from pipeline.student.images import Inputs, chosen_inputs
from stages import cache_teachers
from stages.report import Scope

MISSING = "pancreas"  # whose teacher is not there
SETTINGS: Mapping[str, str] = {
    "all": "a teacher of each organ",
    "missing": f"no teacher of the {MISSING}: outside its own dataset nobody knows it",
}
_GONE = ("missing", MISSING)


@dataclass(frozen=True)
class Size:
    """How large everything is.

    Attributes:
        name: in requests and records.
        cohort: of phantoms or slices, teachers and cache.
        base_features: of the first level of nnU-Net's network; its own choice is 32.
        memory_gb: `-gpu_memory_target`, by which nnU-Net chooses patch and batch.
    """

    name: str
    cohort: Phantoms | Slices
    base_features: int
    memory_gb: float

    @property
    def configuration(self) -> str:
        """Of nnU-Net."""
        return "2d" if isinstance(self.cohort, Slices) else "3d_fullres"

    @property
    def grid_mm(self) -> list[float]:
        """Spacing of the student grid, z, y, x, and nnU-Net's `-overwrite_target_spacing`: all see
        the same voxels."""
        cohort = self.cohort
        return cohort.spacing_mm if isinstance(cohort, Slices) else [cohort.spacing_mm] * 3

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)


_PHANTOMS = Phantoms(
    name="against_nnunet", shape=(64, 72, 84), spacing_mm=5.0, patch=(32, 48, 48),
    teacher_steps=250, validation_cases=1, test_cases=1, multi_validation_cases=3,
    multi_test_cases=4, most_cases=8,
)  # fmt: skip
SIZES = {
    ("phantoms", "full"): Size("full", _PHANTOMS, base_features=8, memory_gb=0.1),
    ("phantoms", "tiny"): Size("tiny", TINY_PHANTOMS, base_features=2, memory_gb=0.05),
    ("slices", "full"): Size("full", SLICES["full"], base_features=16, memory_gb=0.25),
    ("slices", "tiny"): Size("tiny", SLICES["tiny"], base_features=2, memory_gb=0.05),
}


@dataclass(frozen=True)
class Place:
    """The folder of one repetition.

    Attributes:
        folder: it.
        setting: of `SETTINGS`.
        split: whose cases are predicted and scored, `validation` or `test`.
    """

    folder: Path
    setting: str
    split: str

    @property
    def work(self) -> Path:
        """The work folder, of all settings."""
        return self.folder / "work"

    def registry(self, *, files: bool = True) -> Registry:
        """What is trained with."""
        return load_registry(self.folder / f"{self.setting}_registry.yaml", files=files)

    def scored(self) -> tuple[Registry, Sequence[CaseFiles], Inputs]:
        """A registry of the scored split, its cases, and their images for `predict`."""
        apart = self.folder / "test_registry.yaml"  # labels of all organs, of phantoms
        use = self.split == "test" and apart.exists()
        registry = load_registry(apart) if use else self.registry()
        cases = [c for d in registry.datasets for c in registry.cases(d) if c.split == self.split]
        return registry, cases, chosen_inputs(None, registry, [self.split])


def make(folder: Path, size: Size, data: Path | None, seed: int, log: Log) -> None:
    """Cases, teachers and cache, and one registry per setting; what is there is kept.

    Raises:
        PipelineError: a stage failed; the message says what.
    """
    cohort = size.cohort
    if isinstance(cohort, Phantoms):
        make_cohort(folder, REGIMES["a"], cohort, seed, log)
        source, window = folder / "student_registry.yaml", list(cohort.patch)
    else:
        road = Road(folder.parent, cohort, (), "", (), None, False, "cpu", log)
        if data is not None:
            convert(data, road.slices)
        road.cached(seed)
        source, window = folder / "data_registry.yaml", cohort.window
    content = yaml.safe_load(source.read_text(encoding="utf-8"))
    storing = {"window": {"shape": window, "overlap": 0.5}}
    for setting in SETTINGS:
        teachers = {n: t for n, t in content["teachers"].items() if (setting, n) != _GONE}
        path = folder / f"{setting}_registry.yaml"
        path.write_text(yaml.safe_dump({**content, "teachers": teachers}), encoding="utf-8")
        scope = Scope(load_registry(path), folder / "work", log, tables=False)
        config = cache_teachers.CacheTeachersConfig.model_validate(storing)
        execution = Execution(engine=Here(overlap=False), device="cpu", window_batch=4)
        raise_failed(cache_teachers.run(config, scope, execution))
