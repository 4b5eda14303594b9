"""What a training step must hold (`pipeline.student.memory`), per settings file, without a GPU.

python -m benchmarks.training_memory [CONFIG.yaml ..] [--organs 15]
"""

from __future__ import annotations

import argparse
from dataclasses import astuple
from pathlib import Path

import torch

import stages
from pipeline.config import load_config
from pipeline.log import print_table
from pipeline.student.memory import step_memory
from stages.train_student import TrainStudentConfig


def main() -> None:
    """Prints gibibytes per settings file, in fp32 and bf16."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("configs", type=Path, nargs="*")
    parser.add_argument("--organs", type=int, default=15)
    arguments = parser.parse_args()
    paths = arguments.configs or sorted(Path(stages.__file__).parent.glob("train_student*.yaml"))
    rows = []
    for path in paths:
        training = load_config(path, TrainStudentConfig).training
        for dtype in (torch.float32, torch.bfloat16):
            found = step_memory(training, arguments.organs, dtype)
            kind = str(dtype).removeprefix("torch.")
            row = [path.name, kind, *(f"{n / 2**30:.2f}" for n in astuple(found))]
            rows.append([*row, f"{found.total / 2**30:.1f}"])
    parts = ["weights, gradients, optimiser", "activations", "loss", "batch", "sum"]
    columns = ["settings", "precision", *parts]
    print_table(f"GiB of one training step, {arguments.organs} organs", columns, rows)


if __name__ == "__main__":
    main()
