"""The command: `python -m benchmarks.real_slices DATA FOLDER ...`; see README.md beside this."""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks.real_slices.report import report
from benchmarks.real_slices.road import EQUAL_STEPS, EQUAL_TIME, KINDS, Road, configurations
from benchmarks.real_slices.size import SIZES
from benchmarks.real_slices.slices import convert, missing_sets
from pipeline.errors import ConfigError, PipelineError, listed
from pipeline.log import Log


def main(argv: Sequence[str] | None = None) -> int:
    """0 if all is done or there are no slices; else the exit code of what went wrong."""
    arguments = _parser().parse_args(argv)
    log = Log()
    try:
        return run(arguments, log)
    except PipelineError as error:
        log.warn(str(error))
        return error.exit_code


def run(arguments: argparse.Namespace, log: Log) -> int:
    """Does what the arguments say."""
    size = SIZES[arguments.size]
    folder: Path = arguments.folder.resolve()
    kinds = arguments.kinds.split(",")
    for kind in kinds:
        if kind not in KINDS:
            raise ConfigError(
                f"there is no {kind!r}.", where="--kinds", fix=f"Choose of {', '.join(KINDS)}."
            )
    if arguments.seeds < 1 or arguments.first_seed < 0:
        raise ConfigError("at least one seed, from 0 on.", where="--seeds", fix="Say 5.")
    seconds = arguments.seconds
    if seconds is not None and not 0 < seconds < math.inf:
        raise ConfigError("must be more than 0.", where="--seconds", fix="Say 300.")
    if arguments.only_equal_time and seconds is None:
        fix = "Say --seconds too."
        raise ConfigError("of how many seconds?", where="--only-equal-time", fix=fix)
    terms = [] if arguments.only_equal_time else [EQUAL_STEPS]
    terms += [] if seconds is None else [EQUAL_TIME]
    base: Path | None = arguments.training
    wanted = configurations(size, kinds, arguments.configs, base)
    comparison = base.stem if base is not None else ""
    road = Road(
        folder, size, wanted, comparison, terms, seconds, arguments.test, arguments.device, log
    )
    if missing := missing_sets(arguments.data, road.slices):
        log.warn(f"skipped: there are no slices, {listed(missing, 2)} are not there")
        return 0
    convert(arguments.data, road.slices)
    seeds = range(arguments.first_seed, arguments.first_seed + arguments.seeds)
    for path in report(road, {seed: road.repeat(seed) for seed in seeds}):
        log.info(f"written: {path}")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.real_slices", description="Supervisions compared on real slices."
    )
    add = parser.add_argument
    add("data", type=Path, help="folder of slices")
    add("folder", type=Path, help="where everything goes, and is found again")
    add("--seeds", type=int, default=5, help="how many")
    add("--first-seed", type=int, default=0)
    add("--kinds", default=",".join(KINDS), help="supervisions, with commas")
    add("--configs", type=Path, help="folder of YAML files that change ms_kd's `training`")
    add("--training", type=Path, help="YAML file that changes `training` of all students")
    add("--seconds", type=float, help="also at equal time: seconds of training of each student")
    add("--only-equal-time", action="store_true", help="no students of equal steps")
    add("--test", action="store_true", help="score the test set: once, when all is chosen")
    add("--device", default="cpu", help="auto, cpu, cuda, cuda:1")
    add(
        "--size",
        choices=SIZES,
        default="full",
        help="experts: longer trainings, of better teachers; tiny: to try",
    )
    return parser


if __name__ == "__main__":
    sys.exit(main())
