"""What the lazy consensus costs per patch, against reading the slices and plain numpy.

One synthetic CT with four teachers: each one's log-odds are the signed distance to its organ with
smooth noise, rounded and written as stage one does. All ways compute the same log-odds, organ
regions and agreed background of the same random patches, interleaved in one run, and are checked
to agree; the ratios of the medians are what counts. `--steps` also times one training step of the
demo's network and says what part of it the consensus takes.

    python -m benchmarks.consensus FOLDER [--shape 192 192 192] [--patch 96 96 96] [--steps 20]
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy import ndimage

from pipeline.cache.reader import POOL, CachedCase, Unit
from pipeline.cache.schema import (
    StorageConfig,
    image_spec,
    label_spec,
    log_odds_spec,
)
from pipeline.cache.store import write_unit
from pipeline.consensus.cohort import (
    RegionRules,
    compute,
    lazy_consensus,
    lazy_patch,
    lazy_votes,
)
from pipeline.consensus.regions import above, consensus, spoken_below, stack_organs
from pipeline.data.entries import ORGANS, PhantomSpec
from pipeline.data.labels import IGNORE, LabelSpace
from pipeline.data.patches import Patch
from pipeline.data.phantom.case import make_case
from pipeline.log import print_table

Array = npt.NDArray[Any]
Found = Sequence[Array]
Way = Callable[[Patch], Found]
SPACE = LabelSpace({organ: k + 1 for k, organ in enumerate(ORGANS)})
ANNOTATED = ORGANS[0]
CONFIDENCE = 6.0
DIRECT, OURS = "direct: read + numpy", "each patch one task (ours)"
READING = "reading alone"
POOL_BYTES = 512_000_000
DEMO_SHAPE, DEMO_PATCH, DEMO_BATCH = (48, 56, 64), (32, 40, 40), 2


def main() -> None:
    """Prints both tables, or one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--shape", type=int, nargs=3, default=[192, 192, 192])
    parser.add_argument("--patch", type=int, nargs=3, default=[96, 96, 96])
    parser.add_argument("--patches", type=int, default=6, help="per round and way")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--steps", type=int, default=20, help="training steps to time; 0 for none")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    case = make_cached(options.folder / "case", options.shape)
    rows = measure(case, options.patch, options.patches, options.rounds)
    result: dict[str, Any] = {"shape": options.shape, "patch": options.patch, "ways": rows}
    if options.steps:
        small = make_cached(options.folder / "demo", DEMO_SHAPE)
        result["step"] = measure_step(small, options.steps)
    if options.json:
        print(json.dumps(result, indent=1))
        return
    show(result)


def make_cached(folder: Path, shape: Sequence[int]) -> CachedCase:
    """A case that annotates one organ, and a unit of each of four teachers."""
    d, h, w = shape
    spec = PhantomSpec(num_cases=1, seed=1, annotated=ORGANS, shape=(d, h, w))
    made = make_case(spec, 0)
    label, grid = made.label.array, made.label.grid
    storage = StorageConfig()
    attributes = {"grid": grid.to_json(), "centres": {organ: [] for organ in ORGANS}, "taps": {}}
    specs = [image_spec(made.image.array), label_spec(np.where(label == 1, label, 0))]
    rng = np.random.default_rng(2)
    units: dict[str, Unit] = {}
    for name, arrays in {
        "case": specs,
        **{organ: [odds_of(label == k + 1, organ, rng)] for k, organ in enumerate(ORGANS)},
    }.items():
        path = folder / f"{name}.zarr"
        if not path.exists():
            write_unit(path, arrays, attributes, {"of": name}, storage=storage)
        units[name] = Unit.open(path)
    shown = units.pop("case")
    experts = {organ: [organ] for organ in ORGANS}
    return CachedCase("phantom/case_000", "train", (ANNOTATED,), shown, units, experts)


def odds_of(inside: npt.NDArray[np.bool_], organ: str, rng: np.random.Generator) -> Any:
    """Log-odds that grow with the depth in the organ, -20 to 12, with noise of 16 voxels' size."""
    depth = ndimage.distance_transform_edt(inside) - ndimage.distance_transform_edt(~inside)
    coarse = rng.normal(scale=3.0, size=[-(-n // 16) for n in inside.shape])
    noise = ndimage.zoom(coarse, 16, order=1)[tuple(slice(n) for n in inside.shape)]
    odds = np.clip(0.8 * depth, -20, 12) + noise
    odds += 0.05 * odds * rng.normal(size=inside.shape)
    return log_odds_spec(organ, odds.astype(np.float32), StorageConfig())


# --- the ways -------------------------------------------------------------------------------------


def reading(case: CachedCase) -> Way:
    """The slices that every way needs, and nothing else."""

    def read(patch: Patch) -> Found:
        odds = [case.log_odds(organ, organ, patch) for organ in ORGANS]
        return [*odds, case.label(patch, fill=IGNORE)]

    return read


def direct(case: CachedCase) -> Way:
    """What one would write without Dask."""
    read = reading(case)

    def run(patch: Patch) -> Found:
        *odds, label = read(patch)
        d = np.stack(odds).astype(np.float32)
        classes = SPACE.to_classes(label)
        known, inside = classes != IGNORE, classes == 1
        strong = np.fmax(np.abs(d), np.float32(CONFIDENCE))
        d[0] = np.where(known, np.where(inside, strong[0], -strong[0]), d[0])
        d[1:] = np.where(inside, -strong[1:], d[1:])
        return d, d > 0, np.asarray((d < 0).all(axis=0))

    return run


def ours(case: CachedCase) -> Way:
    """As a training sample is made."""

    def run(patch: Patch) -> Found:
        classes = SPACE.to_classes(case.label(patch, fill=IGNORE))
        (d,) = compute(lazy_patch(case, SPACE, RegionRules(), patch, classes))
        return d, above(d, 0.0), spoken_below(d, 0.0)

    return run


def sliced_from_the_case(case: CachedCase) -> Way:
    """Chunked as stored; the consensus of the whole case, built once and sliced per patch."""
    whole, _ = lazy_consensus(case, SPACE)

    def run(patch: Patch) -> Found:
        box = patch.slices
        parts = whole.log_odds[(..., *box)], whole.organ[(..., *box)], whole.background[box]
        return compute(*parts)

    return run


def built_after_slicing(case: CachedCase) -> Way:
    """Chunked as stored; each array sliced, then the consensus of the patch built."""
    votes = lazy_votes(case, SPACE)

    def run(patch: Patch) -> Found:
        box = patch.slices
        stack = stack_organs([d[box] for who in votes.experts for d in who.values()])
        found = consensus(stack, votes.classes[box], votes.annotated)
        return compute(found.log_odds, found.organ, found.background)

    return run


def _all(way: Way, patches: Sequence[Patch]) -> None:
    for patch in patches:
        way(patch)


# --- measuring ------------------------------------------------------------------------------------


def measure(
    case: CachedCase, patch: Sequence[int], num_patches: int, rounds: int
) -> list[dict[str, Any]]:
    """Medians over rounds, with and without the pool of decoded chunks."""
    ways: dict[str, tuple[Way, int]] = {
        READING: (reading(case), 0),
        DIRECT: (direct(case), 0),
        OURS: (ours(case), 0),
        "chunked as stored, built per patch": (built_after_slicing(case), 0),
        "chunked as stored, built per case": (sliced_from_the_case(case), 0),
        f"{READING}, pool": (reading(case), POOL_BYTES),
        f"{DIRECT}, pool": (direct(case), POOL_BYTES),
        f"{OURS}, pool": (ours(case), POOL_BYTES),
    }
    shape = case.case.array("image").shape
    check({name: way for name, (way, _) in ways.items() if READING not in name}, shape, patch)
    rng = np.random.default_rng(1)
    taken: dict[str, list[tuple[float, float]]] = {way: [] for way in ways}
    for _ in range(rounds):
        patches = [draw(rng, shape, patch) for _ in range(num_patches)]
        for name, (way, pool) in ways.items():
            POOL.resize(0)  # what another way pooled must not help this one
            POOL.resize(pool)
            taken[name].append(timed(partial(_all, way, patches)))
    medians = {
        name: [statistics.median(t[i] for t in times) / num_patches for i in (0, 1)]
        for name, times in taken.items()
    }
    return [
        {
            "way": name,
            "wall_ms": 1000 * wall,
            "cpu_ms": 1000 * cpu,
            "wall_ratio": wall / medians[base(name)][0],
            "cpu_ratio": cpu / medians[base(name)][1],
        }
        for name, (wall, cpu) in medians.items()
    ]


def base(name: str) -> str:
    """What a way is held against: the direct way with the same pool."""
    return f"{DIRECT}, pool" if name.endswith(", pool") else DIRECT


def check(ways: Mapping[str, Way], shape: Sequence[int], patch: Sequence[int]) -> None:
    """Every way computes the same numbers."""
    where = draw(np.random.default_rng(0), shape, patch)
    wanted = ways[DIRECT](where)
    for name, way in ways.items():
        for one, other in zip(way(where), wanted, strict=True):
            assert np.array_equal(one, other, equal_nan=one.dtype.kind == "f"), name


def measure_step(case: CachedCase, steps: int) -> dict[str, float]:
    """Medians in CPU ms: a training step of the demo's network (`ms_kd`, features off; samples
    made in this process from a warm pool), and what the consensus of its patches takes of it,
    beyond reading the log-odds and the label."""
    import torch
    from torch.utils.data import default_collate

    from pipeline.student.dataset import PatchDataset, to_batch
    from pipeline.student.inputs import TrainingInputs
    from pipeline.student.network import seeded_network
    from pipeline.student.resume import TrainingState
    from pipeline.student.settings import TrainingConfig, build_optimiser
    from pipeline.student.speed import Speed
    from pipeline.student.training import make_step

    torch.set_num_threads(1)
    config = TrainingConfig.model_validate(
        {
            "patch": DEMO_PATCH,
            "batch_size": DEMO_BATCH,
            "steps": steps,
            "supervision": {"features": {"weight": 0.0}},
        }
    )
    network = seeded_network(config, len(ORGANS))
    optimiser = build_optimiser(config.optimiser, network)
    inputs = TrainingInputs([case], [], SPACE, {})
    state = TrainingState(config, inputs, network, optimiser, Speed())
    data = PatchDataset(config, inputs, pool_bytes=POOL_BYTES)
    ways = {READING: reading(case), DIRECT: direct(case), OURS: ours(case)}
    rng, shape = np.random.default_rng(3), case.case.array("image").shape
    taken: dict[str, list[float]] = {name: [] for name in ("step", *ways)}
    for step in range(steps):

        def make(step: int = step) -> None:
            samples = [data[step * DEMO_BATCH + n] for n in range(DEMO_BATCH)]
            batch = to_batch(default_collate(samples), [], torch.device("cpu"))
            make_step(state, batch, step)

        taken["step"].append(timed(make)[1])
        patches = [draw(rng, shape, DEMO_PATCH) for _ in range(DEMO_BATCH)]
        for name, way in ways.items():
            taken[name].append(timed(partial(_all, way, patches))[1])
    found = {name: 1000 * statistics.median(times[1:]) for name, times in taken.items()}
    return {
        "step_ms": found["step"],
        "consensus_ms": found[OURS],
        "direct_ms": found[DIRECT],
        "reading_ms": found[READING],
        "share": (found[OURS] - found[READING]) / found["step"],
    }


def draw(rng: np.random.Generator, shape: Sequence[int], patch: Sequence[int]) -> Patch:
    """A patch anywhere inside."""
    z, y, x = (int(rng.integers(0, n - p + 1)) for n, p in zip(shape, patch, strict=True))
    d, h, w = patch
    return Patch((z, y, x), (d, h, w))


def timed(work: Callable[[], object]) -> tuple[float, float]:
    """Wall and CPU seconds."""
    wall, cpu = time.perf_counter(), time.process_time()
    work()
    return time.perf_counter() - wall, time.process_time() - cpu


def show(result: Mapping[str, Any]) -> None:
    """The tables, for people."""
    rows = [
        [
            row["way"],
            f"{row['wall_ms']:.2f}",
            f"{row['cpu_ms']:.2f}",
            f"{row['wall_ratio']:.2f}",
            f"{row['cpu_ratio']:.2f}",
        ]
        for row in result["ways"]
    ]
    title = f"One patch {tuple(result['patch'])} of a case {tuple(result['shape'])}, 4 teachers"
    print_table(title, ["way", "wall ms", "CPU ms", "wall ratio", "CPU ratio"], rows)
    if "step" in result:
        step = result["step"]
        print(
            f"a training step of the demo takes {step['step_ms']:.1f} ms CPU, the consensus of its "
            f"{DEMO_BATCH} patches {100 * step['share']:.1f} % of it: {step['consensus_ms']:.2f} "
            f"ms, less {step['reading_ms']:.2f} ms of reading (read + numpy: "
            f"{step['direct_ms']:.2f} ms)"
        )


if __name__ == "__main__":
    main()
