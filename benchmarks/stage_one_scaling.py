"""How much faster stage one is on two Dask workers than on one, against what the machine allows.

Four things alternate in one run: plain processes that run the same networks on windows in memory,
without this project's engine, Dask or files, once one and once two of them (the ceiling: two cores
share caches, memory and clock); and stage one with `--executor local`, on one worker and on two.
One of either has one core of the machine, two have two: a worker alone would use both, for its
network, and for reading and writing beside it. Efficiency is T1 / (2 T2). Engines are open before
the clock starts; loading the teachers, reading, the gate and writing are within. The gate looks at
two cases, and nothing else begins before it has: let --cases be even, so that two workers share.

    OMP_NUM_THREADS=1 python -m benchmarks.stage_one_scaling FOLDER [--rounds 3] [--json]
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import shutil
import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from multiprocessing.synchronize import Barrier
from pathlib import Path
from typing import Any

import torch

from benchmarks.stage_one_cohort import cohort_of, dynunet, settings_of, stage_one_options
from pipeline.data.registry import Registry
from pipeline.engine.choose import open_engine
from pipeline.engine.here import Engine, Execution
from pipeline.log import Log, print_table
from pipeline.networks.by_name import build_network
from stages import cache_teachers
from stages.report import Scope

PLAIN, STAGE = "plain processes", "stage one"
NUMBERS = (1, 2)


def main() -> None:
    """Prints seconds of each way, and the two efficiencies."""
    parser = stage_one_options(__doc__, num_cases=8)
    parser.add_argument("--plain-windows", type=int, default=16, help="of all plain processes")
    arguments = parser.parse_args()
    if os.environ.get("OMP_NUM_THREADS") != "1":
        parser.error("set OMP_NUM_THREADS=1: one worker would use both cores.")
    registry = cohort_of(arguments)
    ways = [(what, number) for number in NUMBERS for what in (PLAIN, STAGE)]
    seconds: dict[tuple[str, int], list[float]] = {way: [] for way in ways}
    for round_ in range(arguments.rounds):
        for what, number in ways if round_ % 2 == 0 else ways[::-1]:  # drifts cancel
            with _cores(number):
                took = (plain if what == PLAIN else partial(stage, registry))(arguments, number)
            seconds[what, number].append(took)
            print(f"round {round_ + 1}, {what}, {number}: {took:.1f} s", flush=True)
    report(seconds, arguments)


@contextmanager
def _cores(number: int) -> Iterator[None]:
    """So many cores for this process and all that it starts."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, sorted(before)[:number])
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


def plain(arguments: argparse.Namespace, number: int) -> float:
    """Seconds of so many processes that share the windows between them."""
    context = multiprocessing.get_context("spawn")
    ready, done = context.Barrier(number + 1), context.Barrier(number + 1)
    share = arguments.plain_windows // number
    processes = [
        context.Process(
            target=_passes, args=(arguments.filters, arguments.window, share, ready, done)
        )
        for _ in range(number)
    ]
    for process in processes:
        process.start()
    ready.wait()
    began = time.monotonic()
    done.wait()
    took = time.monotonic() - began
    for process in processes:
        process.join()
    return took


def _passes(
    filters: Sequence[int], window: Sequence[int], number: int, ready: Barrier, done: Barrier
) -> None:
    torch.set_num_threads(1)
    network = build_network(dynunet(filters), in_channels=1, out_channels=2).eval()
    batch = torch.randn(1, 1, *window)
    with torch.inference_mode():
        network(batch)
        ready.wait()
        for _ in range(number):
            network(batch)
    done.wait()


def stage(registry: Registry, arguments: argparse.Namespace, number: int) -> float:
    """Seconds of stage one into an empty work folder, on so many workers."""
    work = arguments.folder / "work"
    shutil.rmtree(work, ignore_errors=True)
    with _engine(number, work) as engine:
        began = time.monotonic()
        report = cache_teachers.run(
            settings_of(arguments), Scope(registry, work, Log(quiet=True), tables=False),
            Execution(engine=engine, device="cpu", force=True),
        )  # fmt: skip
        took = time.monotonic() - began
    assert report.exit_code == 0, report.failed
    assert len(report.done) == arguments.cases * (1 + arguments.teachers), report.done
    return took


@contextmanager
def _engine(number: int, work: Path) -> Iterator[Engine]:
    with open_engine(
        "local", workers=number, slurm_config=None, device="cpu", work=work, log=Log(quiet=True)
    ) as engine:
        yield engine


def efficiencies(medians: Mapping[tuple[str, int], float]) -> dict[str, float]:
    """T1 / (2 T2) of each way, and their quotient."""
    found = {
        what: medians[what, 1] / (NUMBERS[1] * medians[what, NUMBERS[1]]) for what in (PLAIN, STAGE)
    }
    return {**found, "stage one / plain": found[STAGE] / found[PLAIN]}


def report(seconds: Mapping[tuple[str, int], list[float]], arguments: argparse.Namespace) -> None:
    """Medians over rounds, all rounds, efficiencies."""
    medians = {way: statistics.median(found) for way, found in seconds.items()}
    found = efficiencies(medians)
    if arguments.json:
        rounds: dict[str, Any] = {f"{what}, {n}": took for (what, n), took in seconds.items()}
        print(json.dumps({"seconds": rounds, "efficiency": found}, indent=1))
        return
    print_table(
        f"{arguments.cases} cases of {tuple(arguments.shape)}, {arguments.teachers} teachers, "
        f"medians of {arguments.rounds} rounds",
        ["way", "1: s", "2: s", "efficiency", "all rounds"],
        [
            [
                what, *(f"{medians[what, n]:.1f}" for n in NUMBERS), f"{found[what]:.3f}",
                "; ".join(" ".join(f"{s:.1f}" for s in seconds[what, n]) for n in NUMBERS),
            ]
            for what in (PLAIN, STAGE)
        ],
    )  # fmt: skip
    print(f"stage one reaches {found['stage one / plain']:.1%} of what two plain processes do.")


if __name__ == "__main__":
    main()
