"""A synthetic cohort to measure stage one with: CT-like files, blobs, networks of real cost.

Run by itself, it makes cases of one slice, three teachers and a small network, and measures what
stage one takes for them: into an empty work folder, then again with all units there. Imports and
loading MONAI are left out. With --against, other code (`git worktree add TREE COMMIT`) is measured
in turns with this one.

    OMP_NUM_THREADS=1 python -m benchmarks.stage_one_cohort FOLDER [--cases 1000] [--against TREE]
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from scipy import ndimage

from pipeline.data.labels import Intensity
from pipeline.data.nifti import write_image
from pipeline.data.patches import WindowConfig
from pipeline.data.registry import Registry, load_registry
from pipeline.data.volume import Grid, Volume
from pipeline.engine.here import Execution
from pipeline.log import Log, print_table
from pipeline.networks.by_name import NetworkConfig, build_network
from pipeline.teachers.checkpoint import TeacherRecord, save_teacher
from stages import cache_teachers
from stages.cache_teachers import CacheTeachersConfig
from stages.report import Scope

DATASET = "synthetic"
ORGANS = ("liver", "spleen", "pancreas")
NATIVE_MM, TEACHER_MM, STUDENT_MM = (1.5, 0.8, 0.8), (2.0, 1.6, 1.6), (3.0, 1.5, 1.5)


def stage_one_options(doc: str | None, *, num_cases: int) -> argparse.ArgumentParser:
    """Arguments of a benchmark of stage one: of its cohort, its teachers and its rounds."""
    parser = argparse.ArgumentParser(description=doc)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--cases", type=int, default=num_cases)
    parser.add_argument("--shape", type=int, nargs=3, default=[128, 224, 224], help="native voxels")
    parser.add_argument("--teachers", type=int, default=2, choices=range(1, 4))
    parser.add_argument("--filters", type=int, nargs="+", default=[16, 32, 64, 128, 256])
    parser.add_argument("--window", type=int, nargs=3, default=[96, 96, 96])
    parser.add_argument("--student-mm", type=float, nargs=3, default=list(STUDENT_MM))
    parser.add_argument("--precision", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", action="store_true")
    return parser


def cohort_of(arguments: argparse.Namespace) -> Registry:
    """Makes the cohort that these arguments are of."""
    return load_registry(
        make_cohort(
            arguments.folder, num_cases=arguments.cases, shape=arguments.shape,
            native_mm=NATIVE_MM, teacher_mm=TEACHER_MM,
            student_mm=arguments.student_mm,
            networks={o: dynunet(arguments.filters) for o in ORGANS[: arguments.teachers]},
            taps=["bottleneck"],
        )
    )  # fmt: skip


def settings_of(arguments: argparse.Namespace) -> CacheTeachersConfig:
    """How stage one computes: the window and the precision that these arguments name."""
    z, y, x = arguments.window
    return CacheTeachersConfig(window=WindowConfig(shape=(z, y, x), precision=arguments.precision))


def dynunet(filters: Sequence[int]) -> NetworkConfig:
    """An nnU-Net-like network, as many stages as filters."""
    stages = len(filters)
    args: dict[str, Any] = {
        "kernel_size": [[3, 3, 3]] * stages,
        "strides": [[1, 1, 1]] + [[2, 2, 2]] * (stages - 1),
        "upsample_kernel_size": [[2, 2, 2]] * (stages - 1),
        "filters": list(filters),
        "norm_name": "instance",
    }
    return NetworkConfig(name="DynUNet", args=args)


def make_cohort(
    folder: Path,
    *,
    num_cases: int,
    shape: Sequence[int],
    native_mm: Sequence[float],
    teacher_mm: Sequence[float],
    student_mm: Sequence[float],
    networks: Mapping[str, NetworkConfig],
    taps: Sequence[str],
) -> Path:
    """Writes cases, one teacher per organ and a registry; returns the registry's path."""
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        write = partial(
            _write_case, folder, shape=shape, spacing_mm=native_mm, organs=len(networks)
        )
        list(pool.map(write, range(num_cases)))
    for seed, (organ, network) in enumerate(networks.items()):
        _write_teacher(folder / f"{organ}.pt", organ, network, teacher_mm, seed)
    ids = {organ: number + 1 for number, organ in enumerate(networks)}
    registry = folder / "data_registry.yaml"
    registry.write_text(
        yaml.safe_dump(
            {
                "schema_version": 1,
                "organs": ids,
                "grid": {"spacing_mm": list(student_mm), "orientation": "RAS"},
                "admission": {"dice": 0.0, "cases": 2},  # random weights find no organ
                "datasets": {
                    DATASET: {
                        "root": ".",
                        "images": "images/{case}.nii.gz",
                        "labels": "labels/{case}.nii.gz",
                        "annotated": ids,
                        "split": {"validation": 0.0, "test": 0.0, "seed": 0},
                    }
                },
                "teachers": {
                    organ: {
                        "kind": "checkpoint",
                        "weights": f"{organ}.pt",
                        "organs": {organ: 1},
                        "num_channels": 2,
                        "taps": list(taps),
                        "trained_on": DATASET,
                    }
                    for organ in networks
                },
            }
        ),
        encoding="utf-8",
    )
    return registry


def _write_case(
    folder: Path, number: int, shape: Sequence[int], spacing_mm: Sequence[float], organs: int
) -> None:
    """Smooth tissue with scanner noise in a cylinder of air, so that gzip has real work to do."""
    rng = np.random.default_rng(number)
    coarse = rng.normal(size=[-(-n // 16) + 1 for n in shape]).astype(np.float32)
    axes = [np.linspace(-1, 1, n, dtype=np.float32) if n > 1 else np.zeros(1) for n in shape]
    inside = np.hypot(axes[1][:, None], axes[2][None]) < 0.9
    image = np.empty(shape, dtype=np.int16)
    label = np.zeros(shape, dtype=np.uint8)
    for z in range(shape[0]):  # slice by slice: a float copy of a large case would not fit
        at = z / 16
        low = int(at)
        plane = coarse[low] * (1 - at + low) + coarse[low + 1] * (at - low)
        zoomed = ndimage.zoom(plane, 16, order=1)[: shape[1], : shape[2]]
        noise = rng.standard_normal(shape[1:], dtype=np.float32)
        values = np.where(inside, 40 * zoomed + 15 * noise, -1000 + 5 * noise)
        image[z] = np.rint(values)
        for organ in range(organs):
            y, x = np.cos(2.4 * organ) * 0.4, np.sin(2.4 * organ) * 0.4
            room = 0.04 - 0.1 * axes[0][z] ** 2
            near = (axes[1][:, None] - y) ** 2 + (axes[2][None] - x) ** 2 < room
            label[z][near] = organ + 1
    grid = Grid.axis_aligned(shape, spacing_mm)
    for kind, array in (("images", image), ("labels", label)):
        write_image(folder / kind / f"case_{number:03d}.nii.gz", Volume(array, grid))


def _write_teacher(
    path: Path, organ: str, config: NetworkConfig, spacing_mm: Sequence[float], seed: int
) -> None:
    torch.manual_seed(seed)
    network = build_network(config, in_channels=1, out_channels=2)
    z, y, x = spacing_mm
    record = TeacherRecord(
        network=config,
        num_channels=2,
        channels={organ: (1,)},
        spacing_mm=(z, y, x),
        intensity=Intensity(),
        validation_dice={organ: None},
        num_validation_cases=0,
        trained_on=DATASET,
        trained_on_cases=(),
        training_digest="",
    )
    save_teacher(path, record, network.state_dict())


# Many cases of one slice.

RUNS = ("all to be made", "all there")
_SLICE_MM = (5.0, 2.0, 2.0)
_FLAT: Mapping[str, Any] = {
    "channels": [8, 16, 32],
    "strides": [[1, 2, 2], [1, 2, 2]],
    "kernel_size": [1, 3, 3],
    "up_kernel_size": [1, 3, 3],
    "norm": "instance",
}


def main() -> None:
    """Prints seconds of either run, medians over rounds."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--cases", type=int, default=1000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--against", type=Path)
    parser.add_argument("--once", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    registry = arguments.folder / "data_registry.yaml"
    if arguments.once:
        build_network(NetworkConfig(), in_channels=1, out_channels=2)  # imports MONAI
        print(json.dumps([_timed(registry, arguments.folder / "work") for _ in RUNS]))
        return
    if not registry.exists():
        network = NetworkConfig(name="UNet", args=dict(_FLAT))
        make_cohort(
            arguments.folder, num_cases=arguments.cases, shape=(1, 96, 96),
            native_mm=(5.0, 1.5, 1.5), teacher_mm=_SLICE_MM, student_mm=_SLICE_MM,
            networks=dict.fromkeys(ORGANS, network), taps=[],
        )  # fmt: skip
    trees = [Path(__file__).parents[1], *([arguments.against] if arguments.against else [])]
    taken: list[list[list[tuple[float, float]]]] = [[] for _ in trees]
    for _ in range(arguments.rounds):
        for number, tree in enumerate(trees):
            shutil.rmtree(arguments.folder / "work", ignore_errors=True)
            done = subprocess.run(
                [sys.executable, "-P", __file__, str(arguments.folder), "--once"],
                env={**os.environ, "PYTHONPATH": str(tree.resolve())},
                stdout=subprocess.PIPE, text=True, check=True,
            )  # fmt: skip
            taken[number].append(json.loads(done.stdout.splitlines()[-1]))
    num_units = len(ORGANS) * len(list((arguments.folder / "images").iterdir()))
    rows = []
    for run, name in enumerate(RUNS):
        cpu, wall = (
            [statistics.median(times[run][kind] for times in of_tree) for of_tree in taken]
            for kind in (0, 1)
        )
        for tree, c, w in zip(trees, cpu, wall, strict=True):
            rates = f"{num_units / c:.0f}", f"{num_units / w:.0f}"
            rows.append([name, str(tree), f"{c:.1f}", f"{w:.1f}", *rates, f"{c / cpu[0]:.2f}"])
    columns = ["run", "code", "CPU s", "wall s", "units / CPU s", "units / s", "CPU, ratio"]
    print_table(f"{num_units} units, medians of {arguments.rounds} rounds", columns, rows)


def _timed(registry: Path, work: Path) -> tuple[float, float]:
    """CPU and wall seconds of stage one."""
    torch.set_num_threads(1)
    cpu, wall = time.process_time(), time.perf_counter()
    report = cache_teachers.run(
        CacheTeachersConfig(window=WindowConfig(shape=(1, 64, 64))),
        Scope(load_registry(registry), work, Log(quiet=True), tables=False),
        Execution(device="cpu", force=True),
    )
    assert report.exit_code == 0, report.failed
    return time.process_time() - cpu, time.perf_counter() - wall


if __name__ == "__main__":
    main()
