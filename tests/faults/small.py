"""A cohort of a few thousand voxels with teachers that need no network, so that a run of stage one
is mostly writing: faults are tried on it hundreds of times.

Dataset `liver-ct` with cases case_000 .. ; teachers `one`, `two`: made_teachers.threshold, each
with a tap. Everything lies beside the registry, as in `tests/tiny.py`.
"""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from pipeline.cache.places import Place, find_units
from pipeline.cache.receipt import RECEIPT
from pipeline.config import digest
from pipeline.data.nifti import write_image
from pipeline.data.registry import load_registry
from pipeline.data.volume import Grid, Volume
from pipeline.folder import Folder
from pipeline.log import Log
from stages import cache_teachers
from stages.report import StageReport
from tests.tiny import copy_cohort, placeless_entry, run_cache, work_of

SPACING_MM = (6.0, 6.0, 6.0)
SHAPE = (12, 14, 16)
DATASET = "liver-ct"
TEACHERS = {"one": 0.0, "two": 80.0}


def build_small(folder: Path, *, num_cases: int = 3, seed: int = 0) -> Path:
    """Writes images, labels and the registry; returns the registry's path."""
    rng = np.random.default_rng(seed)
    grid = Grid.axis_aligned(SHAPE, SPACING_MM)
    waves = np.add.outer(np.add.outer(*(np.sin(np.arange(n) / 3) for n in SHAPE[:2])),
                         np.sin(np.arange(SHAPE[2]) / 3))  # fmt: skip
    for number in range(num_cases):
        hu = (100 * waves + rng.normal(0, 20, SHAPE)).astype(np.int16)
        data = folder / "data" / DATASET
        for part, array in (("images", hu), ("labels", (hu > 50).astype(np.uint8))):
            path = data / part / f"case_{number:03}.nii.gz"
            path.parent.mkdir(parents=True, exist_ok=True)
            write_image(path, Volume(array, grid))
    weights = folder / "teachers" / "none.pt"
    weights.parent.mkdir()
    weights.write_bytes(b"no weights")
    registry = folder / "data_registry.yaml"
    write_registry(registry, {name: teacher(hu) for name, hu in TEACHERS.items()})
    return registry


def write_registry(path: Path, teachers: Mapping[str, Mapping[str, Any]]) -> None:
    """The registry with these teachers."""
    data = {
        "schema_version": 1,
        "organs": {"liver": 1},
        "grid": {"spacing_mm": list(SPACING_MM), "orientation": "RAS"},
        "datasets": {
            DATASET: {
                "root": f"data/{DATASET}",
                "images": "images/{case}.nii.gz",
                "labels": "labels/{case}.nii.gz",
                "annotated": {"liver": 1},
                "split": {"validation": 0.2, "test": 0.0, "seed": 0},
            }
        },
        "teachers": {name: dict(entry) for name, entry in teachers.items()},
        "admission": {"dice": 0.0},  # thresholds of the HU are no good teachers
    }
    path.write_text(yaml.safe_dump(data, sort_keys=False), encoding="utf-8")


def teacher(hu: float, **changes: Any) -> dict[str, Any]:
    """A registry entry; teachers of another threshold say other numbers."""
    values: dict[str, Any] = {
        "kind": "factory",
        "factory": "tests.unit.teachers.made_teachers:threshold",
        "weights": "teachers/none.pt",
        "organs": {"liver": 1},
        "args": {"hu": hu},
        "taps": ["cells"],
    }
    return values | changes


def settings(bits: int = 5) -> cache_teachers.CacheTeachersConfig:
    """Small chunks, so that a shard holds many."""
    return cache_teachers.CacheTeachersConfig.model_validate(
        {"storage": {"chunk": 8, "log_odds_bits": bits}}
    )


def run_stage(
    registry: Path, *, bits: int = 5, work: Folder | None = None, **options: Any
) -> StageReport:
    """Stage one in this process; `work`: another work folder than the copy's own."""
    work = work or work_of(registry)
    log = Log(quiet=True, events=work / "events.jsonl")
    return run_cache(
        settings(bits), load_registry(registry), work, log=log,
        device="cpu", tables=False, **options,
    )  # fmt: skip


def cached_copy(original: Path, folder: Path) -> Path:
    """The registry of a copy of a cohort that this process alone has cached; nothing failed."""
    registry = copy_cohort(original, folder)
    assert run_stage(registry).exit_code == 0
    return registry


def unit_names(registry: Path) -> set[str]:
    """Names of all units that a registry calls for, as the report names them."""
    loaded = load_registry(registry)
    cases = [case.name for dataset in loaded.datasets for case in loaded.cases(dataset)]
    return {*cases, *(f"{name} x {case}" for name in loaded.teachers for case in cases)}


def place_named(work: Path, name: str) -> Place:
    """The one unit of that name."""
    (place,) = (place for place in find_units(work) if place.name == name)
    return place


def content(folder: Path) -> dict[str, str]:
    """File, relative -> digest of its bytes, of a receipt without its times, of an index entry
    without places and times of files; without reports."""
    found = {}
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        name = path.relative_to(folder).as_posix()
        if name.startswith("reports/") or name == "events.jsonl":
            continue
        if path.name == RECEIPT:
            data = json.loads(path.read_text(encoding="utf-8"))
            timeless = {k: v for k, v in data.items() if k not in ("seconds", "written", "seal")}
            found[name] = digest(timeless)
        elif name.startswith(("index/datasets/", "index/teachers/")):
            found[name] = digest(placeless_entry(path))
        else:
            found[name] = hashlib.sha256(path.read_bytes()).hexdigest()
    return found


def hidden(folder: Path) -> list[Path]:
    """Temporaries: their names begin with a dot."""
    return sorted(folder.rglob(".*"))


def files_of(unit: Path, pattern: str = "*") -> list[Path]:
    """The files of a unit whose paths in it match."""
    return sorted(p for p in unit.rglob(pattern) if p.is_file())


def flip(path: Path, rng: random.Random) -> bytes:
    """Changes one byte of a file; returns what it held before."""
    before = path.read_bytes()
    at, bits = rng.randrange(len(before)), rng.randrange(1, 256)
    path.write_bytes(before[:at] + bytes([before[at] ^ bits]) + before[at + 1 :])
    return before


def truncate(path: Path, rng: random.Random) -> bytes:
    """Cuts a file short, perhaps to nothing; returns what it held before."""
    before = path.read_bytes()
    path.write_bytes(before[: rng.randrange(len(before))])
    return before
