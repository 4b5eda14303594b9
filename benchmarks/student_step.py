"""A training step from the cache against one on tensors in memory, and one with teachers in it.

All ways alternate in one run, so that a neighbour's load falls on each of them; a way's number is
the median over rounds, and the ratios of medians are what counts. Every way makes the step that
`train-student` makes (`make_step`): the same network, optimiser and clipping.

    memory              tensors in memory, labels alone (kind marginal): no distillation, no loading
    memory, KIND        the same of pseudo_label and of ms_kd: what their arithmetic costs
    cache               ms_kd from the cache, loaded in this process or by --workers processes
    cache + features    the same with the feature term
    online              ms_kd; image and label from the cache, log-odds by the teachers, in the step
    online x WIDER      the same with teachers that many times as wide

    python -m benchmarks.student_step FOLDER
    python -m benchmarks.student_step FOLDER --network realistic --patch 48 48 48
    python -m benchmarks.student_step FOLDER --device cuda --precision bf16 --network dynunet \\
        --spacing-mm 2 2 2 --patch 128 128 128

Under torchrun the ways are others: a step of several processes that send their gradients in one
message, or in several while the backward pass runs, and one in which nobody sends anything.

    torchrun --nproc-per-node 2 -m benchmarks.student_step FOLDER --network realistic

FOLDER keeps the demo's cohort, teachers and cache (1.5 minutes); another for each --spacing-mm. On
the CPU torch gets one thread, so that loader processes have a core to work on.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor, nn

from benchmarks.stage_one_cohort import dynunet
from benchmarks.student_cohort import DEMO_MM, cached_cohort
from pipeline.consensus.cohort import open_cohort
from pipeline.data.registry import Registry
from pipeline.log import Log, print_table
from pipeline.networks.by_name import NetworkConfig, build_network, pick_device
from pipeline.student import distributed as sent
from pipeline.student.dataset import PatchDataset, loaded_batches, to_batch
from pipeline.student.distributed import ALONE, Processes, joined
from pipeline.student.inputs import TrainingInputs, cached_taps
from pipeline.student.network import StudentNetwork, seeded_network
from pipeline.student.resume import TrainingState
from pipeline.student.settings import TrainingConfig, build_optimiser
from pipeline.student.speed import Speed, SpeedFlags
from pipeline.student.supervision import Batch
from pipeline.student.training import make_step
from pipeline.teachers.checkpoint import read_teacher
from stages import train_student

SETTINGS_24GB = Path(train_student.__file__).parent / "train_student.24gb.yaml"
NETWORKS: Mapping[str, tuple[NetworkConfig, str]] = {
    "demo": (NetworkConfig(), "model.1.submodule.0"),
    "realistic": (dynunet([16, 32, 64, 128]), "upsamples.0"),
    "dynunet": (dynunet([32, 64, 128, 256, 320, 320]), "upsamples.2"),
}
NUM_BATCHES = 12
# What train_student.24gb.yaml sets beside the network and the patch.
LIKE_NNUNET = ("deep_supervision", "optimiser")


def options() -> argparse.ArgumentParser:
    """The arguments of this benchmark."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("--network", choices=[*NETWORKS, "24gb"], default="demo")
    parser.add_argument("--patch", type=int, nargs=3, default=[32, 40, 40])
    parser.add_argument("--batch-size", type=int, default=2)
    parser.add_argument("--spacing-mm", type=float, nargs=3, default=list(DEMO_MM))
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--wider", type=int, default=4)
    parser.add_argument("--ways", nargs="+", help="only these, as the table names them")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--steps", type=int, default=10, help="per way and round")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--precision", choices=["fp32", "bf16", "fp16"], default="fp32")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--channels-last", action="store_true")
    parser.add_argument("--json", action="store_true")
    return parser


def main() -> None:
    """Prints milliseconds per way and their ratios."""
    arguments = options().parse_args()
    torch.set_num_threads(1)
    with joined() as processes:
        made = partial(cached_cohort, arguments.folder, arguments.spacing_mm)
        processes.from_first(lambda: made() and None)
        rows = measure(made(), arguments, processes)
        if processes.is_first:
            report(rows, arguments)


def measure(
    registry: Registry, arguments: argparse.Namespace, processes: Processes = ALONE
) -> dict[str, list[dict[str, float]]]:
    """Way -> a row per round, on what is cached in `arguments.folder / "work"`."""
    rows: dict[str, list[dict[str, float]]] = {}
    with ExitStack() as stack:
        ways = Bench(registry, arguments, processes).ways(stack)
        for number in range(-1, arguments.rounds):
            for name, way in ways.items():
                row = way()
                if number >= 0:  # the round before the first warms up
                    rows.setdefault(name, []).append(row)
    return rows


class Bench:
    """One cached cohort, and steps of several kinds on it."""

    def __init__(
        self, registry: Registry, arguments: argparse.Namespace, processes: Processes = ALONE
    ) -> None:
        self.registry, self.arguments, self.processes = registry, arguments, processes
        self.device = pick_device(arguments.device)
        self.space = registry.label_space
        cohort = open_cohort(
            arguments.folder / "work", registry, teachers=list(registry.teachers), splits=("train",)
        )
        assert not cohort.problems, cohort.problems
        self.cases = cohort.cases
        self.more: dict[str, Any] = {}
        if arguments.network == "24gb":
            settings = yaml.safe_load(SETTINGS_24GB.read_text(encoding="utf-8"))["training"]
            self.network, self.tap = NetworkConfig(**settings["network"]), "upsamples.1"
            self.more = {name: settings[name] for name in LIKE_NNUNET}
        else:
            self.network, self.tap = NETWORKS[arguments.network]

    def ways(self, stack: ExitStack) -> dict[str, Callable[[], dict[str, float]]]:
        """Name -> a block of steps that says how long one took."""
        workers = self.arguments.workers
        make: dict[str, Callable[[], Callable[[], dict[str, float]]]] = {
            "memory": lambda: self._way(stack, "marginal", 0, in_memory=True),
        }
        for kind in ("pseudo_label", "ms_kd"):
            make[f"memory, {kind}"] = partial(self._way, stack, kind, 0, in_memory=True)
        for features in (False, True):
            for number in (0, workers):
                name = f"cache{' + features' if features else ''}, {number} workers"
                make[name] = partial(self._way, stack, "ms_kd", number, features=features)
        for wider in (1, self.arguments.wider):
            make["online" if wider == 1 else f"online x {wider}"] = partial(
                self._way, stack, "ms_kd", 0, wider=wider
            )
        if self.processes.size > 1:
            shared = self._way(stack, "marginal", 0, in_memory=True)
            return {
                "memory, gradients are not sent": self._way(
                    stack, "marginal", 0, in_memory=True, alone=True
                ),
                "memory, one message after the pass": partial(_with_buckets, 1 << 40, shared),
                "memory, buckets of 1 MB": partial(_with_buckets, 1 << 20, shared),
                "memory, buckets as shipped": shared,
            }
        return {name: make[name]() for name in self.arguments.ways or make}

    def _way(
        self,
        stack: ExitStack,
        kind: str,
        workers: int,
        *,
        features: bool = False,
        in_memory: bool = False,
        wider: int = 0,
        alone: bool = False,
    ) -> Callable[[], dict[str, float]]:
        teachers = Teachers(self.registry, wider, self.device) if wider else None
        config = self._config(kind, features)
        taps = cached_taps(self.cases, self.space) if features else {}
        network = seeded_network(config, len(self.space.organs), taps).to(self.device).train()
        optimiser = build_optimiser(config.optimiser, network)
        told = self.arguments
        speed = Speed(SpeedFlags(told.precision, told.channels_last, told.compile), self.device)
        speed.prepare(network, network.network, Log(quiet=True))
        batches = self._batches(stack, config, network, workers, in_memory, teachers)
        inputs = TrainingInputs(self.cases, [], self.space, {}, network.cached)
        processes = ALONE if alone else self.processes
        state = TrainingState(config, inputs, network, optimiser, speed, processes)
        count = iter(range(config.steps))

        def one() -> float:
            began = time.perf_counter()
            batch = next(batches)
            waited = time.perf_counter() - began
            if teachers is not None:
                with speed.autocast():
                    batch = teachers.asked(batch)
            make_step(state, batch, next(count))
            return waited

        def block() -> dict[str, float]:
            for _ in range(2 * workers):  # what was loaded while others were timed
                one()
            return self._timed(one)

        return block

    def _timed(self, one: Callable[[], float]) -> dict[str, float]:
        steps = self.arguments.steps
        self._synchronise()
        began = time.perf_counter(), time.process_time()
        waited = sum(one() for _ in range(steps))
        self._synchronise()
        wall, cpu = time.perf_counter() - began[0], time.process_time() - began[1]
        return {"wall": 1e3 * wall / steps, "cpu": 1e3 * cpu / steps, "wait": waited / wall}

    def _synchronise(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def _batches(
        self,
        stack: ExitStack,
        config: TrainingConfig,
        network: StudentNetwork,
        workers: int,
        in_memory: bool,
        teachers: Teachers | None,
    ) -> Iterator[Batch]:
        # Online, nothing of the teachers is read: what they say is computed.
        reads = self._config("marginal", features=False) if teachers is not None else config
        inputs = TrainingInputs(self.cases, [], self.space, {}, network.cached)
        data = PatchDataset(reads, inputs, self.processes, pool_bytes=512_000_000)
        loader = stack.enter_context(loaded_batches(data, 0, workers))
        taps = list(network.cached)

        def loaded() -> Iterator[Batch]:
            for collated in loader:
                assert isinstance(collated, dict), collated
                yield to_batch(collated, taps, self.device)

        if not in_memory:
            return loaded()
        kept = [next(loader) for _ in range(NUM_BATCHES)]

        def repeated() -> Iterator[Batch]:
            while True:
                for collated in kept:
                    assert isinstance(collated, dict), collated
                    yield to_batch(collated, taps, self.device)

        return repeated()

    def _config(self, kind: str, features: bool) -> TrainingConfig:
        supervision: dict[str, Any] = {"kind": kind}
        if features:
            supervision["features"] = {"student_taps": [self.tap]}
        return TrainingConfig.model_validate(
            {
                "supervision": supervision,
                "network": self.network.model_dump(),
                "patch": self.arguments.patch,
                "batch_size": self.arguments.batch_size,
                "steps": 100_000,
                **self.more,
            }
        )


def _with_buckets(num_bytes: int, way: Callable[[], dict[str, float]]) -> dict[str, float]:
    """A block of steps with another size of the messages that gradients travel in."""
    shipped, sent._BUCKET_BYTES = sent._BUCKET_BYTES, num_bytes
    try:
        return way()
    finally:
        sent._BUCKET_BYTES = shipped


class Teachers:
    """The cohort's teachers in the loop: images in, log-odds out.

    Kinder to online distillation than its use would be: a teacher sees the student's very patch, on
    the student's grid, without resampling, context or overlapping windows.
    """

    def __init__(self, registry: Registry, wider: int, device: torch.device) -> None:
        self.networks = []
        for entry in registry.teachers.values():
            record, state = read_teacher(registry.resolve(entry.weights))
            args = dict(record.network.args)
            if wider != 1:
                args["channels"] = [wider * n for n in args["channels"]]
            config = NetworkConfig(name=record.network.name, args=args)
            network: nn.Module = build_network(config, in_channels=1, out_channels=2)
            if wider == 1:
                network.load_state_dict(state)
            self.networks.append(network.eval().to(device))

    def asked(self, batch: Batch) -> Batch:
        """The batch with log-odds (labels win)."""
        with torch.no_grad():
            logits = [network(batch.image).float() for network in self.networks]
        d = torch.stack([s[:, 1] - s[:, 0] for s in logits], dim=1)
        d = self._labels_win(d, batch)
        known = torch.ones_like(batch.annotated)
        return replace(batch, known=known, log_odds=d)

    def _labels_win(self, d: Tensor, batch: Batch) -> Tensor:
        """As `consensus.labels_win`, with 6 log-odds; ignored voxels stay."""
        numbers = torch.arange(1, d.shape[1] + 1, device=d.device)[None, :, None, None, None]
        classes = batch.classes[:, None]
        seen, sure = classes != 255, d.abs().clamp(min=6)
        says_no = (classes != numbers) & seen & batch.annotated[:, :, None, None, None]
        elsewhere = (classes != numbers) & (classes > 0) & seen
        d = torch.where(says_no | elsewhere, -sure, d)
        return torch.where(classes == numbers, sure, d)


def report(rows: Mapping[str, list[dict[str, float]]], arguments: argparse.Namespace) -> None:
    """Medians over rounds, and their ratios to the step in memory and to the cached one."""
    medians = {
        way: {key: statistics.median(row[key] for row in found) for key in found[0]}
        for way, found in rows.items()
    }
    if arguments.json:
        print(json.dumps({"rounds": rows, "medians": medians}, indent=1))
        return
    memory = next(iter(medians.values()))
    cache = next((row for way, row in medians.items() if way.startswith("cache")), memory)
    print_table(
        f"{arguments.network} network, patch {tuple(arguments.patch)}, batch "
        f"{arguments.batch_size}, {arguments.device} {arguments.precision}, medians of "
        f"{arguments.rounds} rounds of {arguments.steps} steps",
        ["way", "wall ms", "CPU ms, this process", "wall / memory", "CPU / memory",
         "wall / first cache", "CPU / first cache", "data-wait %"],
        [
            [
                way, f"{row['wall']:.1f}", f"{row['cpu']:.1f}",
                f"{row['wall'] / memory['wall']:.2f}", f"{row['cpu'] / memory['cpu']:.2f}",
                f"{row['wall'] / cache['wall']:.2f}", f"{row['cpu'] / cache['cpu']:.2f}",
                f"{100 * row['wait']:.1f}",
            ]
            for way, row in medians.items()
        ],
    )  # fmt: skip


if __name__ == "__main__":
    main()
