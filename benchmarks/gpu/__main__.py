"""Both stages on one GPU, in a few minutes, without a network: one JSON and one table.

    python -m benchmarks.gpu --carry            # what has to be brought along, and how large it is
    python -m benchmarks.gpu FOLDER             # measures; FOLDER/gpu.json and FOLDER/gpu.md
    python -m benchmarks.gpu FOLDER --tiny      # the same code on a CPU, in seconds

Parts run in the order of what they tell. One that would not end in time is left out and named, one
that fails says why, and the JSON is written after each. Times are of `benchmarks.stage_one` and
`benchmarks.student_step`, on the student grid, teachers and cache that this makes first.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import signal
import statistics
import sys
import time
import tomllib
from argparse import Namespace
from collections.abc import Callable, Mapping
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import Any

import torch

from benchmarks import student_step
from benchmarks.stage_one import WAYS, Bench
from benchmarks.stage_one_cohort import cohort_of, stage_one_options
from pipeline.data.registry import Registry
from pipeline.log import Log
from pipeline.student import training
from pipeline.student.inputs import TrainingInputs
from pipeline.student.resume import RunFolder
from pipeline.student.speed import SpeedFlags, TrainingExecution

Row = dict[str, Any]
STAGE_ONE = """--cases 20 --shape 160 256 256 --teachers 3 --filters 32 64 128 256 320
    --student-mm 1.5 1.5 1.5 --rounds 1 --device cuda --window-batch 4"""
STAGE_TWO = """--network 24gb --patch 128 128 128 --rounds 2 --steps 10 --workers 8
    --device cuda --precision bf16 --wider 1"""
TINY_ONE = """--cases 2 --shape 24 32 32 --teachers 2 --filters 4 8 8 --window 16 16 16
    --student-mm 1.5 0.8 0.8 --rounds 1"""
TINY_TWO = "--patch 16 16 16 --rounds 1 --steps 1 --workers 0 --wider 1"
# A part is begun if so many seconds are left.
LEAST = {
    "stage one, fp32": 120,
    "stage one, bf16": 60,
    "resume": 30,
    "stage two": 60,
    "channels-last": 40,
    "compile": 120,
}
STEPS, STOP_AFTER = 8, 4


def main() -> None:
    """Runs all parts that fit into the time."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("folder", type=Path, nargs="?")
    parser.add_argument("--minutes", type=float, default=7.5)
    parser.add_argument("--tiny", action="store_true", help="on a CPU: does it run?")
    parser.add_argument("--carry", action="store_true")
    arguments = parser.parse_args()
    if arguments.carry or arguments.folder is None:
        carry()
        return
    gpu = Gpu(arguments.folder, tiny=arguments.tiny)
    gpu.run(time.monotonic() + 60 * arguments.minutes)
    gpu.show()


class Gpu:
    """The parts, each a row or several of numbers.

    Args:
        folder: of everything that is made; `work` in it is stage one's, and stage two's source.
        tiny: a CPU, and sizes that tell nothing but that it runs.
    """

    def __init__(self, folder: Path, *, tiny: bool) -> None:
        self.folder, self.tiny = folder, tiny
        one = stage_one_options(None, num_cases=2)
        one.add_argument("--window-batch", type=int, default=1)
        one.add_argument("--device", default="cpu")
        self.one = one.parse_args([str(folder), *(TINY_ONE if tiny else STAGE_ONE).split()])
        two = [str(folder), *(TINY_TWO if tiny else STAGE_TWO).split()]
        self.two = student_step.options().parse_args(two)
        self.registry: Registry | None = None
        self.found: Row = {"machine": machine(), "tiny": tiny, "parts": {}}

    def run(self, deadline: float) -> None:
        """All parts; what is left out or fails is named in `found`."""
        self.folder.mkdir(parents=True, exist_ok=True)
        parts: dict[str, Callable[[], Mapping[str, Row]]] = {
            "stage one, fp32": lambda: self.stage_one("float32"),
            "stage one, bf16": lambda: self.stage_one("bfloat16"),
            "resume": self.resume,
            "stage two": lambda: self.stage_two(),
            "channels-last": lambda: self.stage_two(channels_last=True),
            "compile": lambda: self.stage_two(compile=True),
        }
        if self.tiny:  # half precision and compiling are for GPUs
            parts = {n: p for n, p in parts.items() if n not in ("stage one, bf16", "compile")}
        for name, part in parts.items():
            began = time.monotonic()
            rows: Mapping[str, Row] = {}
            why = ""
            if deadline - began < (0 if self.tiny else LEAST[name]):
                why = f"left out: {deadline - began:.0f} seconds were left"
            else:
                try:
                    rows = _without_nan(self._with_memory(part))
                except Exception as error:
                    why = f"failed: {type(error).__name__}: {error}"
            seconds = round(time.monotonic() - began, 1)
            self.found["parts"][name] = {"seconds": seconds, "why": why, "rows": rows}
            text = json.dumps(self.found, indent=1, allow_nan=False, default=str)
            (self.folder / "gpu.json").write_text(text, encoding="utf-8")
            print(f"{name}: {seconds} s {why}", file=sys.stderr, flush=True)

    def stage_one(self, precision: str) -> Mapping[str, Row]:
        """Bare passes and stage one, once each; the cohort is made by the first call."""
        arguments = Namespace(**{**vars(self.one), "precision": precision})
        if self.registry is None:
            self.registry = cohort_of(arguments)
        bench = Bench(self.registry, arguments)
        windows = bench.record_windows()
        rows = {way: bench.timed(bench.way(way, windows)) for way in WAYS[:2]}
        for row in rows.values():
            row["wall / bare"] = row["wall"] / rows[WAYS[0]]["wall"]
        return rows

    def stage_two(self, **flags: bool) -> Mapping[str, Row]:
        """Medians of a step, in milliseconds, and their ratios."""
        workers = self.two.workers
        ways = ["memory", "memory, ms_kd", f"cache, {workers} workers"]
        ways = ways[1:] if flags else [*ways, "online"]
        arguments = Namespace(**{**vars(self.two), "ways": ways, **flags})
        assert self.registry is not None, "stage one made no cache"
        rounds = student_step.measure(self.registry, arguments)
        medians: dict[str, Row] = {
            way: {key: statistics.median(row[key] for row in rows) for key in rows[0]}
            for way, rows in rounds.items()
        }
        for row in medians.values():
            row["wall / in memory"] = row["wall"] / medians["memory, ms_kd"]["wall"]
            row["wall / cache"] = row["wall"] / medians[f"cache, {workers} workers"]["wall"]
        return medians

    def resume(self) -> Mapping[str, Row]:
        """A run that a signal stops and that goes on, against one that nothing disturbs; and
        against a second such, which tells what the GPU itself does not repeat."""
        straight, again = self._trained("straight"), self._trained("again")
        self._trained("resumed", stop=True)
        resumed = self._trained("resumed")
        return {
            "resumed against undisturbed": difference(straight, resumed),
            "undisturbed against undisturbed": difference(straight, again),
        }

    def _trained(self, name: str, *, stop: bool = False) -> Mapping[str, torch.Tensor]:
        assert self.registry is not None, "stage one made no cache"
        bench = student_step.Bench(self.registry, self.two)
        config = bench._config("ms_kd", features=False)
        config = config.model_copy(update={"steps": STEPS, "validate_every": STEPS})
        real, made = training.make_step, iter(range(1, STEPS + 1))

        def stopping(*given: Any) -> Any:
            if stop and next(made) == STOP_AFTER:
                os.kill(os.getpid(), signal.SIGUSR1)
            return real(*given)

        training.make_step = stopping  # type: ignore[assignment]
        try:
            trained = training.train(
                config,
                TrainingInputs(bench.cases, [], bench.space, {}),
                RunFolder(self.folder / "runs" / name, pictures=False),
                TrainingExecution(
                    device=self.two.device, flags=SpeedFlags(self.two.precision),
                    checkpoint_minutes=1e9,
                ),
                Log(quiet=True),
            )  # fmt: skip
        finally:
            training.make_step = real
        assert trained.finished is not stop
        weights: Mapping[str, torch.Tensor] = trained.network.state_dict()
        return weights

    def _with_memory(self, part: Callable[[], Mapping[str, Row]]) -> Mapping[str, Row]:
        """Adds the most that torch held on the GPU in this part to its rows."""
        if not torch.cuda.is_available():
            return part()
        torch.cuda.reset_peak_memory_stats()
        rows = part()
        peak = torch.cuda.max_memory_allocated() / 2**30
        return {name: {**row, "peak GiB of the part": round(peak, 2)} for name, row in rows.items()}

    def show(self) -> None:
        """FOLDER/gpu.md, and the same on the screen."""
        lines = [", ".join(f"{k}: {v}" for k, v in self.found["machine"].items()), ""]
        lines += ["| part | what | numbers |", "| --- | --- | --- |"]
        for name, part in self.found["parts"].items():
            title = f"{name} ({part['seconds']} s)"
            if part["why"]:
                lines.append(f"| {title} | | {part['why']} |")
            for what, row in part["rows"].items():
                numbers = ", ".join(f"{key} {_short(value)}" for key, value in row.items())
                lines.append(f"| {title} | {what} | {numbers} |")
        (self.folder / "gpu.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
        print("\n".join(lines))


def difference(one: Mapping[str, torch.Tensor], other: Mapping[str, torch.Tensor]) -> Row:
    """Of two networks' weights."""
    largest = max(float((one[n].double() - other[n].double()).abs().max()) for n in one)
    return {"largest difference": largest, "same bits": all(one[n].equal(other[n]) for n in one)}


def machine() -> Row:
    """What the numbers are of."""
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    return {
        "device": name,
        "cores": os.cpu_count(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "python": platform.python_version(),
    }


def carry() -> None:
    """Every distribution that this needs, with its size as it is installed here."""
    found: dict[str, Any] = {}
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
    left = list(project["dependencies"])
    while left:
        name = re.split(r"[^A-Za-z0-9._-]", left.pop())[0]
        try:
            dist = distribution(name)
        except PackageNotFoundError:
            continue
        key = re.sub(r"[-_.]+", "-", dist.metadata["Name"]).lower()
        if key in found:
            continue
        found[key] = dist
        left += [need for need in dist.requires or () if "extra ==" not in need]
    rows = []
    for name, dist in sorted(found.items()):
        files = [Path(str(dist.locate_file(file))) for file in dist.files or ()]
        size = sum(file.stat().st_size for file in files if file.is_file()) / 1e6
        rows.append([name, dist.version, f"{size:.1f}"])
    for row in rows:
        print("  ".join(row))
    print(f"{len(rows)} distributions, {sum(float(row[2]) for row in rows):.0f} MB installed")
    print(f"Python {platform.python_version()}, {platform.machine()}; see benchmarks/gpu/README.md")


def _without_nan(rows: Mapping[str, Row]) -> Mapping[str, Row]:
    """JSON has none: null."""
    return {
        name: {key: None if value != value else value for key, value in row.items()}
        for name, row in rows.items()
    }


def _short(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


if __name__ == "__main__":
    main()
