"""A tiny cohort for tests: made once per session, copied for each test that wants one.

The fixtures are in `tests/conftest.py`:

    tiny_registry   path of a fresh `data_registry.yaml` with its own data and teachers; nothing
                    is cached yet. Damage what you like.
    tiny_cached     the same, with `work_of(path)` filled by `cache-teachers` (`cache_config()`).

The folder of a registry holds
    data_registry.yaml
    data/liver-ct, data/spleen-ct   one organ each; case_000 .. case_002: two train, one validates
    data/multi-ct                   both organs; case_000 validates, case_001 and case_002 test
    teachers/liver.pt, spleen.pt    two-channel UNets with seeded random weights, one tap
    work                            the work folder, by agreement
The student grid is 12 mm; volumes have about 24 x 28 x 32 voxels.
"""

from __future__ import annotations

import json
import os
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import torch
import yaml
from torch.optim.optimizer import register_optimizer_step_pre_hook

from pipeline.cache.index import read_sealed, write_sealed
from pipeline.cache.schema import Inputs, StorageConfig, case_inputs, teacher_inputs
from pipeline.data.entries import DatasetEntry, PhantomSpec, TeacherEntry
from pipeline.data.labels import Intensity
from pipeline.data.nifti import read_label, write_like
from pipeline.data.phantom.case import write_dataset
from pipeline.data.registry import Registry, load_registry
from pipeline.data.resample import resample
from pipeline.data.volume import Volume
from pipeline.engine.here import HERE, Engine, Execution, Here
from pipeline.folder import Folder
from pipeline.log import Log
from pipeline.networks.by_name import NetworkConfig, build_network
from pipeline.teachers.checkpoint import TeacherRecord, save_teacher
from stages import cache_teachers
from stages.report import Scope, StageReport

RunCli = Callable[..., tuple[int, str, str]]  # what the fixture `run_cli` is
ROOT = Path(__file__).resolve().parents[1]
ORGANS = ("liver", "spleen")
SHAPE = (24, 28, 32)
GRID_MM = (12.0, 12.0, 12.0)
WINDOW = (16, 16, 16)
TAP = "model.1.submodule.0"
NETWORK = NetworkConfig(
    name="UNet",
    args={"channels": [4, 8, 8], "strides": [2, 2], "num_res_units": 0, "norm": "instance"},
)


def cache_config(**changes: Any) -> cache_teachers.CacheTeachersConfig:
    """Stage one with windows that fit the tiny volumes."""
    values: dict[str, Any] = {"window": {"shape": WINDOW, "overlap": 0.25}}
    return cache_teachers.CacheTeachersConfig.model_validate(values | changes)


def training_settings(**changes: Any) -> dict[str, Any]:
    """Values of a `TrainingConfig` that takes well under a second: four steps of a small net."""
    values: dict[str, Any] = {
        "network": NETWORK.model_dump(),
        "patch": list(WINDOW),
        "batch_size": 1,
        "steps": 4,
    }
    return values | changes


def work_of(registry: Path) -> Path:
    """The work folder that belongs to a copy."""
    return registry.parent / "work"


def change_registry(registry: Path, change: Callable[[dict[str, Any]], object]) -> Path:
    """Applies a change to the registry's data and writes it back."""
    data = yaml.safe_load(registry.read_text(encoding="utf-8"))
    change(data)
    registry.write_text(yaml.safe_dump(data, sort_keys=False), encoding="utf-8")
    return registry


def change_json(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Applies a change to the content of a JSON file."""
    content = json.loads(path.read_text(encoding="utf-8"))
    change(content)
    path.write_text(json.dumps(content), encoding="utf-8")


def in_two_folds(registry: Path) -> Path:
    """The cohort with its cases in folds: three cases each of liver-ct and spleen-ct, two of
    multi-ct, whose third one tests."""

    def change(data: dict[str, Any]) -> None:
        for name in ("liver-ct", "spleen-ct"):
            data["datasets"][name]["split"] = {"folds": 2}
        lists = {"folds": [["case_000"], ["case_001"]], "test": ["case_002"]}
        data["datasets"]["multi-ct"]["split"] = lists

    return change_registry(registry, change)


def placeless_entry(path: Path) -> dict[str, Any]:
    """An entry of the index without what two runs over the same bytes need not have in common:
    where files lay, for whom, and when they were written."""
    entry: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    for name in ("origin", "weights", "seal"):
        entry.pop(name, None)
    for case in entry.get("cases", ()):
        case.pop("image", None)
        case.pop("label", None)
    return entry


def case_digested(
    image_sha256: str,
    label_sha256: str,
    ids: Mapping[str, int],
    spacing_mm: Any,
    storage: StorageConfig,
    **entry: Any,
) -> Inputs:
    """`case_inputs` of a dataset's entry with these fields alone."""
    plain = DatasetEntry.model_construct(**entry)
    hashes = image_sha256, label_sha256
    return case_inputs(plain, ids, hashes, spacing_mm=spacing_mm, storage=storage)


def teacher_digested(
    weights_sha256: str,
    description: Mapping[str, Any],
    spacing_mm: Any,
    storage: StorageConfig,
    **entry: Any,
) -> Inputs:
    """`teacher_inputs` of a teacher's entry with these fields alone."""
    plain = TeacherEntry.model_construct(**{"activation": "softmax", **entry})
    return teacher_inputs(
        plain, description, weights_sha256=weights_sha256, spacing_mm=spacing_mm, storage=storage
    )


def as_one_file(records: Path) -> Path:
    """A dataset's records in the index -> the one file that earlier versions wrote of all cases."""
    entries = [read_sealed(path) for path in sorted(records.iterdir(), reverse=True)]
    together = {n: [one for e in entries for one in e[n]] for n in ("cases", "left_out")}
    file = records.with_name(f"{records.name}.json")
    write_sealed(file, entries[0] | together)
    shutil.rmtree(records)
    return file


def first_voxel(array: Any) -> Any:
    """Another one there."""
    array.flat[0] += 1
    return array


def repaint(path: Path, change: Callable[[Any], Any] = first_voxel) -> None:
    """Rewrites a NIfTI file with other voxels in the same geometry."""
    image = nib.load(path)
    voxels = change(np.asanyarray(image.dataobj).copy())
    nib.save(nib.Nifti1Image(voxels, image.affine, image.header), path)


def shrink_organ(label: Path, value: int, spacing_mm: float) -> None:
    """Leaves one voxel of a label value, one that a grid of that spacing passes by."""
    volume = read_label(label).volume
    number = np.arange(volume.array.size, dtype=np.int32).reshape(volume.array.shape)
    grid = volume.grid.with_spacing([spacing_mm] * 3)
    seen = resample(Volume(number, volume.grid), grid, order=0).array
    passed_by = (volume.array == value) & ~np.isin(number, seen)
    kept = np.where(volume.array == value, 0, volume.array).astype(np.uint8)
    kept[tuple(np.argwhere(passed_by)[0])] = value
    write_like(label, Volume(kept, volume.grid), label)


def run_python(
    *arguments: object, cwd: Path = ROOT, timeout: float = 120, **environment: str
) -> subprocess.CompletedProcess[str]:
    """Python in a process of its own; what it printed."""
    known = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    return subprocess.run(
        [sys.executable, *map(str, arguments)], cwd=cwd, env={**known, **environment},
        capture_output=True, text=True, check=False, timeout=timeout,
    )  # fmt: skip


@contextmanager
def file_limit(num_bytes: int) -> Iterator[None]:
    """No file can grow beyond so many bytes: what a full disk does, to any writer."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@contextmanager
def at_step(number: int, act: Callable[[], object]) -> Iterator[None]:
    """Before the optimiser's step of that number, counted from 1 within the block, something
    happens: a signal, an error."""
    steps = count(1)

    def hook(*_: object) -> None:
        if next(steps) == number:
            act()

    handle = register_optimizer_step_pre_hook(hook)
    try:
        yield
    finally:
        handle.remove()


def copy_cohort(source: Path, folder: Path) -> Path:
    """A copy of everything beside a registry; returns the registry of the copy."""
    shutil.copytree(source.parent, folder)
    return folder / source.name


def build_cohort(folder: Path) -> Path:
    """Generates data, teachers and registry; returns the registry's path."""
    for seed, (name, organs) in enumerate(_datasets().items()):
        spec = PhantomSpec(num_cases=3, seed=seed + 1, annotated=organs, shape=SHAPE)
        write_dataset(folder / "data" / name, spec)
    for seed, organ in enumerate(ORGANS):
        write_teacher(folder / "teachers" / f"{organ}.pt", organ, seed=seed)
    registry = folder / "data_registry.yaml"
    registry.write_text(yaml.safe_dump(registry_data(), sort_keys=False), encoding="utf-8")
    return registry


def run_cache(
    config: cache_teachers.CacheTeachersConfig,
    registry: Registry,
    work: Folder,
    *,
    log: Log,
    tables: bool = True,
    engine: Engine = HERE,
    overlap: bool = True,
    device: str = "auto",
    window_batch: int = 1,
    force: bool = False,
    **options: Any,
) -> StageReport:
    """Stage one; `options`: part, accept, dry_run."""
    engine = engine if overlap else Here(overlap=False)
    execution = Execution(engine=engine, device=device, window_batch=window_batch, force=force)
    return cache_teachers.run(config, Scope(registry, work, log, tables), execution, **options)


def fill_cache(registry: Path) -> None:
    """Runs stage one over a copy."""
    report = run_cache(
        cache_config(),
        load_registry(registry),
        work_of(registry),
        log=Log(quiet=True),
        device="cpu",
        window_batch=8,
        tables=False,
    )
    assert not report.failed, report.failed


def write_teacher(path: Path, organ: str, *, seed: int, **changes: Any) -> None:
    """A teacher file with seeded random weights; `changes` are fields of its `TeacherRecord`."""
    values: dict[str, Any] = {
        "network": NETWORK,
        "num_channels": 2,
        "channels": {organ: (1,)},
        "spacing_mm": GRID_MM,
        "intensity": Intensity(),
        "validation_dice": {organ: None},
        "num_validation_cases": 0,
        "trained_on": f"{organ}-ct",
        "trained_on_cases": (),
        "training_digest": f"seed {seed}",
    }
    record = TeacherRecord.model_validate(values | changes)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        network = build_network(record.network, in_channels=1, out_channels=record.num_channels)
    save_teacher(path, record, network.state_dict())


def registry_data() -> dict[str, Any]:
    """What the registry says, as plain data."""
    datasets: dict[str, Any] = {}
    for name, organs in _datasets().items():
        datasets[name] = {
            "root": f"data/{name}",
            "images": "images/{case}.nii.gz",
            "labels": "labels/{case}.nii.gz",
            "annotated": {organ: number + 1 for number, organ in enumerate(organs)},
            "split": {"validation": 0.2, "test": 0.0, "seed": 0},
        }
    datasets["multi-ct"]["split"] = {
        "train": [],
        "validation": ["case_000"],
        "test": ["case_001", "case_002"],
    }
    return {
        "schema_version": 1,
        "organs": {organ: number + 1 for number, organ in enumerate(ORGANS)},
        "grid": {"spacing_mm": list(GRID_MM), "orientation": "RAS"},
        "datasets": datasets,
        "teachers": {organ: teacher_data(organ) for organ in ORGANS},
        # Random weights find no organ, and the admission gate is not what most tests are about.
        "admission": {"dice": 0.0},
    }


def teacher_data(organ: str, **changes: Any) -> dict[str, Any]:
    """A registry entry for a teacher that `write_teacher` wrote."""
    values: dict[str, Any] = {
        "kind": "checkpoint",
        "weights": f"teachers/{organ}.pt",
        "organs": {organ: 1},
        "num_channels": 2,
        "taps": [TAP],
        "trained_on": f"{organ}-ct",
    }
    return values | changes


def _datasets() -> Mapping[str, tuple[str, ...]]:
    return {"liver-ct": ("liver",), "spleen-ct": ("spleen",), "multi-ct": ORGANS}
