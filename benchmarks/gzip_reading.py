"""Decompressing a CT: Python's gzip against python-isal and zlib-ng, alternated in one run.

    python -m benchmarks.gzip_reading FOLDER [--file ct.nii.gz] [--rounds 5] [--json]

Without --file a CT-like case of 512 x 512 x 200 is made: smooth tissue with scanner noise. zlib-ng
is no dependency of this project; install it to compare (`pip install zlib-ng`).
"""

from __future__ import annotations

import argparse
import gzip
import importlib
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

from isal import igzip

from benchmarks.stage_one_cohort import make_cohort
from pipeline.data.nifti import read_image
from pipeline.log import print_table

SHAPE = (200, 512, 512)


def main() -> None:
    """Prints MB per CPU second of decompressed bytes, and the ratio to Python's gzip."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--file", type=Path)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    path = arguments.file or make_ct(arguments.folder)
    data = path.read_bytes()
    ways = all_ways()
    results = {name: way(data) for name, way in ways.items()}
    size = len(gzip.decompress(data))
    assert all(result == results["gzip"] for result in results.values())
    del results
    ways["read_image, all of it"] = lambda _: read_image(path)
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(arguments.rounds):
        for name, way in ways.items():
            began = time.process_time()
            way(data)
            seconds[name].append(time.process_time() - began)
    medians = {name: statistics.median(found) for name, found in seconds.items()}
    if arguments.json:
        print(json.dumps({"bytes": [len(data), size], "cpu_seconds": medians}, indent=1))
        return
    print_table(
        f"{path.name}: {len(data) / 1e6:.0f} -> {size / 1e6:.0f} MB, {arguments.rounds} rounds",
        ["way", "CPU s", "MB per CPU s", "times gzip"],
        [
            [name, f"{s:.2f}", f"{size / s / 1e6:.0f}", f"{medians['gzip'] / s:.2f}"]
            for name, s in medians.items()
        ],
    )


def all_ways() -> dict[str, Callable[[bytes], object]]:
    """Those that are installed."""
    ways: dict[str, Callable[[bytes], object]] = {
        "gzip": gzip.decompress,
        "isal": igzip.decompress,
    }
    try:
        ways["zlib-ng"] = importlib.import_module("zlib_ng.gzip_ng").decompress
    except ModuleNotFoundError:
        print("zlib-ng is not installed: left out")
    return ways


def make_ct(folder: Path) -> Path:
    """One case of the cohort that stage one is measured with."""
    spacing = (2.5, 0.8, 0.8)
    make_cohort(
        folder, num_cases=1, shape=SHAPE, native_mm=spacing, teacher_mm=spacing,
        student_mm=spacing, networks={}, taps=[],
    )  # fmt: skip
    return folder / "images" / "case_000.nii.gz"


if __name__ == "__main__":
    main()
