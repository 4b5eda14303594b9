"""Stage one's wall time over the bare forward passes of its networks on the same windows.

Three things alternate in one run, so that a neighbour's load falls on all of them: the bare passes
(the windows in memory, nothing but the network), stage one as it ships, and stage one as a plain
loop. The ratio of the medians is what counts. On a busy machine wall time says little; the CPU time
of the calling thread, which runs the networks, is what wall time comes to where another core is
free for the rest.

    python -m benchmarks.stage_one FOLDER [--device cuda] [--rounds 3] [--json]

On the CPU torch gets one thread: reading and writing are to use the other cores. With --device
cuda the GPU's utilisation is sampled through nvidia-smi where it is installed.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.stage_one_cohort import cohort_of, settings_of, stage_one_options
from pipeline.data.registry import Registry
from pipeline.engine.here import Execution, Here
from pipeline.log import Log, print_table
from pipeline.networks import windows as window_passes
from pipeline.networks.by_name import pick_device
from pipeline.teachers.checkpoint import read_teacher
from stages import cache_teachers
from stages.report import Scope

WAYS = ("bare forward passes", "stage one", "stage one, plain loop")


def main() -> None:
    """Prints seconds per way and their ratio to the bare passes."""
    parser = stage_one_options(__doc__, num_cases=3)
    parser.add_argument("--window-batch", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    registry = cohort_of(arguments)
    bench = Bench(registry, arguments)
    windows = bench.record_windows()
    rows: dict[str, list[dict[str, float]]] = {way: [] for way in WAYS}
    for number in range(arguments.rounds):
        for way in WAYS:
            rows[way].append(bench.timed(bench.way(way, windows)))
            found = {key: round(value, 1) for key, value in rows[way][-1].items()}
            print(f"round {number + 1}, {way}: {found}", flush=True)
    report(rows, sum(len(w) for w in windows.values()), arguments)


class Bench:
    """One cohort, run in several ways."""

    def __init__(self, registry: Registry, arguments: argparse.Namespace) -> None:
        self.registry, self.arguments = registry, arguments
        self.device = pick_device(arguments.device)
        self.work = arguments.folder / "work"

    def stage(self, *, overlap: bool) -> None:
        """All of stage one, into an empty work folder."""
        shutil.rmtree(self.work, ignore_errors=True)
        report = cache_teachers.run(
            settings_of(self.arguments),
            Scope(self.registry, self.work, Log(quiet=True), tables=False),
            Execution(
                engine=Here(overlap), device=str(self.device),
                window_batch=self.arguments.window_batch, force=True,
            ),
        )  # fmt: skip
        assert report.exit_code == 0, report.failed

    def record_windows(self) -> Mapping[str, list[Tensor]]:
        """Teacher -> the very batches that stage one gives its network, on the CPU."""
        windows: dict[str, list[Tensor]] = {name: [] for name in self.registry.teachers}
        with _spied() as seen:
            self.stage(overlap=True)
        names = list(windows)
        networks: list[int] = []
        for network, batch in seen:
            if network not in networks:
                networks.append(network)
            windows[names[networks.index(network)]].append(batch)
        return windows

    def bare(self, windows: Mapping[str, list[Tensor]]) -> None:
        """Nothing but the networks."""
        half = self.arguments.precision == "bfloat16"
        with (
            torch.inference_mode(),
            torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=half),
        ):
            for name, batches in windows.items():
                network = self._network(name)
                for batch in batches:
                    network(batch.to(self.device))
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def _network(self, name: str) -> nn.Module:
        from pipeline.networks.by_name import build_network

        record, state = read_teacher(self.registry.resolve(self.registry.teachers[name].weights))
        network = build_network(record.network, in_channels=1, out_channels=2)
        network.load_state_dict(state)
        return network.eval().to(self.device)

    def way(self, name: str, windows: Mapping[str, list[Tensor]]) -> Callable[[], None]:
        """One of `WAYS`."""
        if name == WAYS[0]:
            return lambda: self.bare(windows)
        return lambda: self.stage(overlap=name == WAYS[1])

    def timed(self, way: Callable[[], None]) -> dict[str, float]:
        """Seconds of wall, of CPU in all threads and in the calling one, which runs the networks;
        on a GPU also its mean utilisation in per cent."""
        with _utilisation(self.device) as percent:
            began = time.monotonic(), time.process_time(), time.thread_time()
            way()
            ended = time.monotonic(), time.process_time(), time.thread_time()
            row = dict(
                zip(
                    ("wall", "cpu", "main"),
                    (b - a for a, b in zip(began, ended, strict=True)),
                    strict=True,
                )
            )
        return row | percent


@contextmanager
def _spied() -> Iterator[list[tuple[int, Tensor]]]:
    """Collects what networks are given inside of `WindowPasses`, and which network it was."""
    seen: list[tuple[int, Tensor]] = []
    real = window_passes.WindowPasses._forward

    def spy(self: Any, windows: Tensor) -> Any:
        seen.append((id(self._network), windows.unsqueeze(1).clone()))
        return real(self, windows)

    window_passes.WindowPasses._forward = spy  # type: ignore[method-assign]
    try:
        yield seen
    finally:
        window_passes.WindowPasses._forward = real  # type: ignore[method-assign]


@contextmanager
def _utilisation(device: torch.device) -> Iterator[dict[str, float]]:
    found: dict[str, float] = {}
    if device.type != "cuda" or shutil.which("nvidia-smi") is None:
        yield found
        return
    command = ["nvidia-smi", "--query-gpu=utilization.gpu", "--format=csv,noheader,nounits", "-l1"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as sampler:
        yield found
        sampler.terminate()
        text = sampler.communicate()[0]
    samples = [float(line) for line in text.split("\n") if line.strip().isdecimal()]
    found["gpu_percent"] = statistics.mean(samples) if samples else float("nan")


def report(
    rows: Mapping[str, list[dict[str, float]]], num_windows: int, arguments: argparse.Namespace
) -> None:
    """Medians over rounds, and their ratio to the bare passes."""
    medians = {
        way: {key: statistics.median(row[key] for row in found) for key in found[0]}
        for way, found in rows.items()
    }
    if arguments.json:
        print(json.dumps({"windows": num_windows, "rounds": rows, "medians": medians}, indent=1))
        return
    base = medians[WAYS[0]]
    columns = ["way", "wall s", "CPU s", "wall, ratio", "CPU, ratio", "main thread's CPU, ratio"]
    columns += ["GPU %"] if "gpu_percent" in base else []
    print_table(
        f"{arguments.cases} cases of {tuple(arguments.shape)}, {arguments.teachers} teachers, "
        f"{num_windows} windows, medians of {arguments.rounds} rounds",
        columns,
        [
            [
                way, f"{row['wall']:.1f}", f"{row['cpu']:.1f}",
                f"{row['wall'] / base['wall']:.3f}", f"{row['cpu'] / base['cpu']:.3f}",
                f"{row['main'] / base['main']:.3f}",
                *([f"{row['gpu_percent']:.0f}"] if "gpu_percent" in row else []),
            ]
            for way, row in medians.items()
        ],
    )  # fmt: skip


if __name__ == "__main__":
    main()
