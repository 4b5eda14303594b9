"""Random patches of one case, image and all teachers' log-odds: Zarr against a memory-mapped npy.

The case is made up: smooth blobs with noise, rounded and written as stage one does. All ways read
the same patches, interleaved in one run, so that a neighbour's load falls on all of them; the
ratios of the medians are what counts.

    python -m benchmarks.reading FOLDER [--shape 192 192 192] [--patches 12] [--rounds 5] [--json]
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import zarr
from scipy import ndimage

from pipeline.cache.reader import POOL, Unit
from pipeline.cache.schema import (
    IMAGE,
    ArraySpec,
    StorageConfig,
    image_spec,
    log_odds_name,
    log_odds_spec,
)
from pipeline.cache.staged import Copy
from pipeline.cache.store import write_unit
from pipeline.data.patches import Patch
from pipeline.log import print_table

Array = npt.NDArray[Any]
Read = Callable[[Patch], list[Array]]
ORGANS = ("liver", "spleen", "kidneys", "pancreas")
NAMES = (IMAGE, *(log_odds_name(organ) for organ in ORGANS))
CHUNKS = (32, 64, 128)
BASE = "npy, memory-mapped"


def main() -> None:
    """Prints wall and CPU milliseconds per patch, and both as a ratio to the memory-mapped npy."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--shape", type=int, nargs=3, default=[192, 192, 192])
    parser.add_argument("--patch", type=int, default=96)
    parser.add_argument("--patches", type=int, default=12, help="per round and way")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    arrays = make_case(arguments.shape)
    sizes = write_all(arguments.folder, arrays)
    ways = all_ways(arguments.folder)
    check(ways, arrays, arguments.patch)
    rows = measure(ways, arguments.shape, arguments.patch, arguments.patches, arguments.rounds)
    if arguments.json:
        print(json.dumps({"shape": arguments.shape, "bytes": sizes, "ways": rows}, indent=1))
        return
    show(rows, sizes, arguments.shape, arguments.patch)


def make_case(shape: Sequence[int]) -> dict[str, Array]:
    """Image int16 HU, and float16 log-odds of one blob per organ, rounded as they are stored."""
    rng = np.random.default_rng(0)
    tissue = ndimage.zoom(rng.normal(size=[-(-n // 16) for n in shape]), 16, order=1)
    tissue = tissue[: shape[0], : shape[1], : shape[2]]
    image = np.rint(40 * tissue + 15 * rng.normal(size=shape)).astype(np.int16)
    grid = np.stack(np.meshgrid(*[np.linspace(-1, 1, n) for n in shape], indexing="ij"))
    image[np.hypot(grid[1], grid[2]) > 0.9] = -1000  # air around the body
    arrays: dict[str, Array] = {IMAGE: image}
    for organ in ORGANS:
        centre = rng.uniform(-0.4, 0.4, size=3)[:, None, None, None]
        distance = np.sqrt(np.sum((grid - centre) ** 2, axis=0))
        odds = np.clip(40 * (0.3 - distance), -20, 12) + 0.3 * tissue
        odds += 0.02 * np.abs(odds) * rng.normal(size=shape)
        arrays[log_odds_name(organ)] = log_odds_spec(
            organ, odds.astype(np.float32), StorageConfig()
        ).values
    return arrays


def write_all(folder: Path, arrays: Mapping[str, Array]) -> dict[str, int]:
    """The same arrays in every way; returns bytes per way."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, values in arrays.items():
        np.save(folder / f"{name.replace('/', '_')}.npy", values)
    sizes = {BASE: sum(values.nbytes for values in arrays.values())}
    specs = [image_spec(arrays[IMAGE])]
    specs += [ArraySpec(n, arrays[n], ("z", "y", "x"), float("nan")) for n in NAMES[1:]]
    for chunk in CHUNKS:
        storage = StorageConfig(chunk=chunk)
        path = folder / f"chunk{chunk}.zarr"
        receipt = write_unit(path, specs, {}, {"chunk": chunk}, storage=storage)
        sizes[f"zarr, chunk {chunk}"] = receipt.num_bytes
    return sizes


def all_ways(folder: Path) -> dict[str, Read]:
    """Way -> a function that reads one patch of all arrays."""
    maps = {n: np.load(folder / f"{n.replace('/', '_')}.npy", mmap_mode="r") for n in NAMES}
    ways: dict[str, Read] = {BASE: lambda patch: [maps[n][patch.slices].copy() for n in NAMES]}
    for chunk in CHUNKS:
        path = folder / f"chunk{chunk}.zarr"
        unit = Unit.open(path)
        ways[f"cache, chunk {chunk}"] = _through_cache(unit, 0)
        ways[f"cache, chunk {chunk}, pool"] = _through_cache(unit, 1 << 30)
        ways[f"zarr-python, chunk {chunk}"] = _zarr(path)
        ways[f"tensorstore, chunk {chunk}"] = _tensorstore(path)
    copy = Copy(Unit.open(folder / "chunk64.zarr"), folder / "copies", NAMES, decoded=True)
    (folder / "copies").mkdir(exist_ok=True)
    copy.make()
    ways["decoded copy (--stage-to)"] = _through_cache(copy.open(), 0)
    return ways


def measure(
    ways: Mapping[str, Read], shape: Sequence[int], side: int, num_patches: int, rounds: int
) -> list[dict[str, Any]]:
    """Medians over rounds; each round every way reads the same patches, drawn anew."""
    rng = np.random.default_rng(1)
    taken: dict[str, list[tuple[float, float]]] = {way: [] for way in ways}
    for _ in range(rounds):
        starts = [[int(rng.integers(0, n - side + 1)) for n in shape] for _ in range(num_patches)]
        patches = [Patch((z, y, x), (side, side, side)) for z, y, x in starts]
        for way, read in ways.items():
            POOL.resize(0)  # what another way pooled must not help this one
            wall, cpu = time.perf_counter(), time.process_time()
            for patch in patches:
                read(patch)
            spent = time.perf_counter() - wall, time.process_time() - cpu
            taken[way].append((spent[0] / num_patches, spent[1] / num_patches))
    medians = {
        way: tuple(statistics.median(t[i] for t in times) for i in (0, 1))
        for way, times in taken.items()
    }
    return [
        {
            "way": way,
            "wall_ms": 1000 * wall,
            "cpu_ms": 1000 * cpu,
            "wall_ratio": wall / medians[BASE][0],
            "cpu_ratio": cpu / medians[BASE][1],
        }
        for way, (wall, cpu) in medians.items()
    ]


def check(ways: Mapping[str, Read], arrays: Mapping[str, Array], side: int) -> None:
    """Every way reads the same numbers."""
    patch = Patch((1, 2, 3), (side, side, side))
    for way, read in ways.items():
        for name, found in zip(NAMES, read(patch), strict=True):
            assert np.array_equal(found, arrays[name][patch.slices]), (way, name)


def show(
    rows: Sequence[Mapping[str, Any]], sizes: Mapping[str, int], shape: Sequence[int], side: int
) -> None:
    """The table, and bytes per voxel of each file."""
    table = [
        [
            row["way"],
            f"{row['wall_ms']:.1f}",
            f"{row['cpu_ms']:.1f}",
            f"{row['wall_ratio']:.1f}",
            f"{row['cpu_ratio']:.1f}",
        ]
        for row in rows
    ]
    columns = ["way", "wall ms", "CPU ms", "wall ratio", "CPU ratio"]
    title = f"One {side}^3 patch of image and {len(ORGANS)} log-odds, case {tuple(shape)}, warm"
    print_table(title, columns, table)
    voxels = int(np.prod(shape))
    print("; ".join(f"{name}: {n / voxels:.2f} B/voxel" for name, n in sizes.items()))


def _through_cache(unit: Unit, pool_bytes: int) -> Read:
    def read(patch: Patch) -> list[Array]:
        if POOL.max_bytes != pool_bytes:
            POOL.resize(pool_bytes)
        return [unit.read(name, patch) for name in NAMES]

    return read


def _zarr(path: Path) -> Read:
    group = zarr.open_group(path, mode="r", zarr_format=3)
    arrays: list[Any] = [group[name] for name in NAMES]
    return lambda patch: [np.asarray(array[patch.slices]) for array in arrays]


def _tensorstore(path: Path) -> Read:
    import tensorstore

    arrays = []
    for name in NAMES:
        kvstore = {"driver": "file", "path": f"{(path / name).resolve()}/"}
        spec = {"driver": "zarr3", "kvstore": kvstore, "recheck_cached_data": False}
        arrays.append(tensorstore.open(spec, read=True).result())

    def read(patch: Patch) -> list[Array]:
        futures = [array[patch.slices].read() for array in arrays]
        return [np.asarray(future.result()) for future in futures]

    return read


if __name__ == "__main__":
    main()
