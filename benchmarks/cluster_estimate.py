"""A cluster on paper: what stage one, and stage two after it, ask of each part, and which is full
first. All rates are arguments; the defaults are those of docs/cluster.md, which says where each
comes from. Nothing is measured here.

    python -m benchmarks.cluster_estimate --gpu-seconds 20 [--json]

Give your own: bytes, files and CPU seconds of a unit by `pipeline plan` on a node, the store's by
what its keepers say.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import dataclass

from pipeline.log import print_table

# Name, default, meaning.
RATES: tuple[tuple[str, float, str], ...] = (
    ("cases", 10_000, "CTs"),
    ("teachers", 10, "each gives one unit per case"),
    ("gpus", 64, "one worker each"),
    ("gpus-per-node", 8, ""),
    ("cores-per-gpu", 8, ""),
    ("gpu-seconds", 20.0, "of a unit: the network's passes"),
    ("cpu-seconds", 5.3, "of a unit: all else, on one core"),
    ("longest-thread", 0.5, "share of cpu-seconds in the busiest of a worker's three threads"),
    ("ct-mb", 54.0, "of a CT as .nii.gz; it is read once for all teachers"),
    ("case-mb", 13.4, "of image and label on the student grid"),
    ("unit-mb", 8.2, "of a unit: log-odds of one organ, features of one tap"),
    ("unit-inodes", 19, "files and folders of a unit: each is made and synced"),
    ("store-mb-s", 2000.0, "the shared store reads or writes, all clients together"),
    ("store-ops-s", 2000.0, "files it makes, opens or looks at per second, all clients together"),
    ("looks-per-unit", 9, "files that a rerun opens or looks at, to know that a unit is done"),
    ("scheduler-tasks-s", 100.0, "cases that the Dask scheduler can hand out"),
    ("samples-per-gpu-s", 4.0, "of stage two: what one GPU trains on"),
    ("sample-mb", 19.2, "of stage two: compressed chunks that a patch touches"),
    ("sample-cpu-seconds", 0.24, "of stage two: decoding them, without the pool's hits"),
    ("node-disk-mb-s", 3000.0, "a node's own disk reads"),
    ("node-disk-tb", 3.0, "room on it"),
)


@dataclass(frozen=True)
class Demand:
    """What the job asks of a part.

    Attributes:
        part: of the cluster.
        asked: in all, in its own unit.
        offered: per second.
        unit: of both.
    """

    part: str
    asked: float
    offered: float
    unit: str

    @property
    def hours(self) -> float:
        """That it is busy, if nothing else held it up."""
        return self.asked / self.offered / 3600


def stage_one(rate: dict[str, float]) -> list[Demand]:
    """By part, the busiest first."""
    cases, units = rate["cases"], rate["cases"] * rate["teachers"]
    gpus = rate["gpus"]
    megabytes = cases * (rate["ct_mb"] + rate["case_mb"]) + units * rate["unit_mb"]
    thread = rate["cpu_seconds"] * rate["longest_thread"]
    found = [
        Demand("GPUs", units * rate["gpu_seconds"], gpus, "GPU s"),
        Demand("busiest thread of the workers", units * thread, gpus, "CPU s"),
        Demand("all cores", units * rate["cpu_seconds"], gpus * rate["cores_per_gpu"], "CPU s"),
        Demand("store, bytes", megabytes, rate["store_mb_s"], "MB"),
        Demand("store, files", 2 * units * rate["unit_inodes"], rate["store_ops_s"], "operations"),
        Demand("Dask scheduler", cases, rate["scheduler_tasks_s"], "cases"),
    ]
    return sorted(found, key=lambda demand: -demand.hours)


def stage_two(rate: dict[str, float], *, staged: bool) -> list[Demand]:
    """Of an hour of training on all GPUs, by part, the busiest first."""
    samples = 3600 * rate["gpus"] * rate["samples_per_gpu_s"]
    nodes = rate["gpus"] / rate["gpus_per_node"]
    disks = nodes * rate["node_disk_mb_s"]
    cores = rate["gpus"] * rate["cores_per_gpu"]
    where = ("nodes' own disks", disks) if staged else ("store, bytes", rate["store_mb_s"])
    found = [
        Demand("GPUs", samples, rate["gpus"] * rate["samples_per_gpu_s"], "samples"),
        Demand("all cores", samples * rate["sample_cpu_seconds"], cores, "CPU s"),
        Demand(where[0], samples * rate["sample_mb"], where[1], "MB"),
    ]
    return sorted(found, key=lambda demand: -demand.hours)


def saturation(rate: dict[str, float]) -> list[tuple[str, float]]:
    """Part -> GPU seconds of a unit below which it, and no longer the GPUs, sets the pace."""
    others = [demand for demand in stage_one(rate) if demand.part != "GPUs"]
    units = rate["cases"] * rate["teachers"]
    return [(d.part, d.hours * 3600 * rate["gpus"] / units) for d in others]


def remarks(rate: dict[str, float]) -> list[str]:
    """What is in no row."""
    units = rate["cases"] * rate["teachers"]
    cache_tb = (rate["cases"] * rate["case_mb"] + units * rate["unit_mb"]) / 1e6
    looks = rate["looks_per_unit"] * (units + rate["cases"])
    nodes = rate["gpus"] / rate["gpus_per_node"]
    copying = nodes * cache_tb * 1e6 / rate["store_mb_s"] / 3600
    fits = "fits" if cache_tb < rate["node_disk_tb"] * 0.95 else "does not fit"
    tail = rate["teachers"] * max(rate["gpu_seconds"], rate["cpu_seconds"])
    return [
        f"cache: {cache_tb:.2f} TB in {units + rate['cases']:,.0f} units, "
        f"{rate['unit_inodes'] * (units + rate['cases']) / 1e6:.1f} million inodes",
        f"a rerun that finds all done: {looks / rate['store_ops_s'] / 60:.0f} min in one process",
        f"the last case holds one GPU for {tail / 60:.1f} min while the others are idle",
        f"--stage-to: a copy on each of {nodes:.0f} nodes takes {copying:.1f} h of the store once, "
        f"and {fits} on {rate['node_disk_tb']:g} TB",
    ]


def print_demands(title: str, demands: Sequence[Demand]) -> None:
    """A table; the first row is what is full first."""
    longest = demands[0].hours
    print_table(
        title,
        ["part", "asked", "offered per s", "busy, h", "share of the pace"],
        [
            [
                d.part, f"{d.asked:,.0f} {d.unit}", f"{d.offered:,.0f}", f"{d.hours:.2f}",
                f"{d.hours / longest:.1%}",
            ]
            for d in demands
        ],
    )  # fmt: skip


def main() -> None:
    """Prints the tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    for name, default, meaning in RATES:
        parser.add_argument(
            f"--{name}", type=float, default=default, help=f"{meaning} [{default:g}]"
        )
    parser.add_argument("--json", action="store_true")
    rate = vars(parser.parse_args())
    as_json = rate.pop("json")
    tables = {
        f"Stage one: {rate['cases']:,.0f} cases x {rate['teachers']:g} teachers, "
        f"{rate['gpus']:g} GPUs, {rate['gpu_seconds']:g} s a unit": stage_one(rate),
        "Stage two, an hour, from the store": stage_two(rate, staged=False),
        "Stage two, an hour, with --stage-to": stage_two(rate, staged=True),
    }
    if as_json:
        rows = {
            title: {d.part: {"hours": d.hours, "asked": d.asked} for d in found}
            for title, found in tables.items()
        }
        print(json.dumps({"rates": rate, "tables": rows, "saturation": saturation(rate)}, indent=1))
        return
    for title, found in tables.items():
        print_demands(title, found)
    print_table(
        "Stage one keeps its GPUs busy until a unit takes less than",
        ["part that sets the pace then", "GPU s"],
        [[part, f"{seconds:.2f}"] for part, seconds in saturation(rate)],
    )
    print("\n".join(remarks(rate)))


if __name__ == "__main__":
    main()
