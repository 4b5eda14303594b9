"""The plan against what stage one really takes, on a cohort of about 96^3 voxels a case."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from pipeline.data.entries import PhantomSpec
from pipeline.data.phantom.case import write_dataset
from pipeline.data.registry import load_registry
from pipeline.log import Log
from pipeline.setup.plan import make_plan
from pipeline.teachers.load import Teachers
from stages import cache_teachers
from tests.tiny import ORGANS, TAP, run_cache, teacher_data, write_teacher

pytestmark = pytest.mark.slow

SPACING_MM = (3.0, 3.5, 4.0)
CONFIG = cache_teachers.CacheTeachersConfig.model_validate(
    {"window": {"shape": (64, 64, 64), "overlap": 0.25}}
)


@pytest.fixture
def large_registry(tmp_path: Path) -> Path:
    datasets = {}
    for seed, organ in enumerate(ORGANS):
        spec = PhantomSpec(num_cases=3, seed=seed, annotated=(organ,), shape=(96, 96, 96))
        write_dataset(tmp_path / organ, spec)
        files = {"images": "images/{case}.nii.gz", "labels": "labels/{case}.nii.gz"}
        datasets[f"{organ}-ct"] = {"root": organ, **files, "annotated": {organ: 1}}
        weights = tmp_path / "teachers" / f"{organ}.pt"
        write_teacher(weights, organ, seed=seed, spacing_mm=SPACING_MM)
    registry = {
        "schema_version": 1,
        "organs": {organ: number + 1 for number, organ in enumerate(ORGANS)},
        "grid": {"spacing_mm": list(SPACING_MM)},
        "datasets": datasets,
        "teachers": {organ: teacher_data(organ, taps=[TAP]) for organ in ORGANS},
        "admission": {"dice": 0.0},  # random weights
    }
    path = tmp_path / "data_registry.yaml"
    path.write_text(yaml.safe_dump(registry, sort_keys=False), encoding="utf-8")
    return path


def test_bytes_and_files_are_within_a_quarter(large_registry: Path, tmp_path: Path) -> None:
    registry, work, log = load_registry(large_registry), tmp_path / "work", Log(quiet=True)
    teachers = Teachers(registry, CONFIG.window, CONFIG.storage, "cpu")
    plan = make_plan(teachers, CONFIG.splits, work, log=log)
    assert plan.total.units == 18
    assert all(size.voxels > 75**3 for size in plan.todo.cases)
    report = run_cache(CONFIG, registry, work, log=log, device="cpu", tables=False)
    assert not report.failed
    files = [p for p in work.rglob("*") if p.is_file()]
    num_bytes = sum(p.stat().st_size for p in files)
    assert plan.total.total_bytes == pytest.approx(num_bytes, rel=0.25)
    assert plan.total.files == pytest.approx(len(files), rel=0.25)
