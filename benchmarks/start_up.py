"""CPU seconds and modules of each command, from its start to its answer.

    python -m benchmarks.start_up FOLDER [--rounds 3] [--only evaluate inspect] [--against TREE]

FOLDER is a finished `pipeline demo --quick FOLDER`. `train-student` and `cache-teachers` are
measured up to the first pass of a network over numbers. With --against, other code (`git worktree
add TREE COMMIT`) is measured in turns with this one.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from pipeline.log import print_table

HERE = Path(__file__).resolve().parents[1]
COMMANDS = (
    "--help", "plan --help", "info", "status", "check --no-teachers --jobs 1", "inspect",
    "report RUN -p predictions/ms_kd --no-regions", "evaluate predictions/ms_kd --dry-run",
    "evaluate predictions/ms_kd", "predict work/students/RUN/student.pt -r data_registry.yaml "
    "-o predictions/ms_kd --dry-run", "cache verify", "cache gc data_registry.yaml --dry-run",
    "cache diff work work", "train-student -c train_student_ms_kd.yaml",
    "cache-teachers -c cache_teachers.yaml -w NEW",
)  # fmt: skip
# What it prints last: CPU seconds and modules. The first pass that is no pass of shapes ends it.
_MEASURE = """
import os, sys, time
def tell(*_):
    print("\\nMEASURED", time.process_time(), len(sys.modules), file=sys.stderr, flush=True)
def first_pass(module, inputs):
    if inputs and getattr(inputs[0], "device", None) is not None and not inputs[0].is_meta:
        tell()
        os._exit(0)
sys.argv = ["pipeline", *sys.argv[1:]]
from pipeline.cli import main
if sys.argv[1] in ("train-student", "cache-teachers"):
    from torch.nn.modules.module import register_module_forward_pre_hook
    register_module_forward_pre_hook(first_pass)
try:
    main()
finally:
    tell()
"""


def main() -> None:
    """Prints a table, medians over rounds."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", nargs="+", default=[""], help="commands that hold one of these")
    parser.add_argument("--against", type=Path)
    arguments = parser.parse_args()
    folder = arguments.folder.resolve()
    run = next(folder.glob("work/students/**/student.pt")).parent
    names = {"RUN": str(run.relative_to(folder / "work" / "students"))}
    trees = [HERE, *([arguments.against.resolve()] if arguments.against else [])]
    chosen = [c for c in COMMANDS if any(part in c for part in arguments.only)]
    found: dict[str, list[list[tuple[float, int]]]] = {c: [[] for _ in trees] for c in chosen}
    for _ in range(arguments.rounds):
        for command in chosen:
            for number, tree in enumerate(trees):
                found[command][number].append(measure(command, folder, tree, names))
    columns = ["command", *["CPU s", "modules"] * len(trees), *["ratio"] * (len(trees) - 1)]
    rows = []
    for command, taken in found.items():
        seconds = [statistics.median(s for s, _ in of_tree) for of_tree in taken]
        cells = [
            cell
            for s, of_tree in zip(seconds, taken, strict=True)
            for cell in (f"{s:.2f}", str(of_tree[0][1]))
        ]
        rows.append([command, *cells, *(f"{seconds[0] / other:.2f}" for other in seconds[1:])])
    print_table(f"medians of {arguments.rounds} rounds", columns, rows)


def measure(command: str, folder: Path, tree: Path, names: dict[str, str]) -> tuple[float, int]:
    """CPU seconds of a command and the modules that it imports."""
    with tempfile.TemporaryDirectory(dir=folder) as new:
        words = command.replace("NEW", new)
        for name, value in names.items():
            words = words.replace(name, value)
        if "train-student" in command:
            words += f" -w {new}/work"
            (Path(new) / "work").mkdir()
            for part in ("cases", "teachers", "index"):
                (Path(new) / "work" / part).symlink_to(folder / "work" / part)
        done = subprocess.run(
            [sys.executable, "-c", _MEASURE, *words.split()],
            cwd=folder,
            env={**os.environ, "PYTHONPATH": str(tree), "OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
            check=False,
        )
    assert "MEASURED" in done.stderr, done.stderr
    _, seconds, modules = done.stderr.rpartition("MEASURED")[2].rpartition("\n")[0].split(" ")
    return float(seconds), int(modules)


if __name__ == "__main__":
    main()
