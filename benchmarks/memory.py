"""Peak memory of stage one on large cases: 512 x 512 x 600 voxels, four teachers, one tap each.

The cohort is written first; stage one then runs in a process of its own, whose largest resident
memory the system reports. Networks are cheap (what a real one's activations take on top depends on
the window, not on the case), and run at the CT's own spacing, the largest grid that a teacher can
want, in windows that do not overlap. Two cases, so that one is read while a network runs on the
other.

    python -m benchmarks.memory FOLDER [--shape 600 512 512] [--teachers 4] [--no-overlap]
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time
from pathlib import Path

from benchmarks.stage_one_cohort import dynunet, make_cohort
from pipeline.data.patches import WindowConfig
from pipeline.data.registry import load_registry
from pipeline.engine.here import Execution, Here
from pipeline.log import Log
from stages import cache_teachers
from stages.cache_teachers import CacheTeachersConfig
from stages.report import Scope

ORGANS = ("liver", "spleen", "pancreas", "kidneys")
NATIVE_MM, STUDENT_MM = (1.0, 0.8, 0.8), (3.0, 1.5, 1.5)
LIMIT_GIB = 6.0


def main() -> None:
    """Prints the peak in GiB; exits with 1 if it is above the limit for the default case."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--cases", type=int, default=2)
    parser.add_argument("--shape", type=int, nargs=3, default=[600, 512, 512], help="z y x")
    parser.add_argument("--teachers", type=int, default=4, choices=range(1, 5))
    parser.add_argument("--window", type=int, nargs=3, default=[128, 128, 128])
    parser.add_argument("--filters", type=int, nargs="+", default=[2, 4, 8])
    parser.add_argument("--no-overlap", action="store_true")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        run(arguments)
        return
    make_cohort(
        arguments.folder, num_cases=arguments.cases, shape=arguments.shape,
        native_mm=NATIVE_MM, teacher_mm=NATIVE_MM, student_mm=STUDENT_MM,
        networks={organ: dynunet(arguments.filters) for organ in ORGANS[: arguments.teachers]},
        taps=["bottleneck"],
    )  # fmt: skip
    began = time.monotonic()
    subprocess.run(
        [sys.executable, "-m", "benchmarks.memory", *sys.argv[1:], "--child"], check=True
    )
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 2**20
    print(f"peak {peak:.2f} GiB (limit {LIMIT_GIB:g}), {time.monotonic() - began:.0f} s")
    if peak > LIMIT_GIB:
        sys.exit(1)


def run(arguments: argparse.Namespace) -> None:
    """Stage one on the cohort; a line when the cases are prepared says the peak so far."""
    import torch

    torch.set_num_threads(1)
    z, y, x = arguments.window
    log = Log(events=arguments.folder / "events.jsonl")
    began = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    report = cache_teachers.run(
        CacheTeachersConfig(window=WindowConfig(shape=(z, y, x), overlap=0)),
        Scope(
            load_registry(arguments.folder / "data_registry.yaml"), arguments.folder / "work", log,
            tables=False,
        ),
        Execution(engine=Here(not arguments.no_overlap), device="cpu", force=True),
    )  # fmt: skip
    assert report.exit_code == 0, report.failed
    print(json.dumps({"imports_gib": round(began, 2), "units": len(report.done)}))


if __name__ == "__main__":
    main()
