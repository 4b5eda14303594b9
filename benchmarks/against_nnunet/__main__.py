"""The command: `python -m benchmarks.against_nnunet FOLDER ...`; see README.md beside this."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from benchmarks.accuracy.runner import Task, exit_code_of, run_tasks
from benchmarks.against_nnunet import nnunet, ours
from benchmarks.against_nnunet.cohorts import SETTINGS, SIZES, Place
from benchmarks.against_nnunet.job import NNUNET, done_file, read, row_folder, trained, variants
from benchmarks.against_nnunet.report import report
from benchmarks.real_slices.slices import missing_sets
from pipeline.cache.store import write_json
from pipeline.errors import ConfigError, listed
from pipeline.folder import json_with
from pipeline.log import Log


def main(argv: Sequence[str] | None = None) -> int:
    """0 if all is done or there are no slices, 1 if a part failed, 2 for a wrong argument, 130
    after a signal."""
    return exit_code_of(run, _parser().parse_args(argv))


def run(arguments: argparse.Namespace, log: Log) -> int:
    """Does what the arguments say."""
    cohort = "phantoms" if arguments.slices is None else "slices"
    folder: Path = arguments.folder.resolve() / cohort
    known = [*NNUNET, *ours.rows()]
    rows = known if arguments.rows is None else arguments.rows.split(";")
    settings = arguments.settings.split(",")
    for option, wanted, there in (("--rows", rows, known), ("--settings", settings, SETTINGS)):
        for name in wanted:
            if name not in there:
                fix = f"Choose of {'; '.join(there)}."
                raise ConfigError(f"there is no {name!r}.", where=option, fix=fix)
    if arguments.seeds < 1 or arguments.first_seed < 0 or not 0 < arguments.seconds < 1e9:
        raise ConfigError(
            "at least one seed, from 0 on, and more than 0 seconds.",
            where="--seeds, --first-seed, --seconds",
            fix="Say --seeds 3 --seconds 240.",
        )
    if cohort == "slices":
        missing = missing_sets(arguments.slices, folder / "slices")
        if missing:
            log.warn(f"skipped: there are no slices, {listed(missing, 2)} are not there")
            return 0
    asked = {"cohort": cohort, "size": arguments.size, "seconds": arguments.seconds}
    _settle(folder, asked | {"numbers": SIZES[cohort, arguments.size].to_json()})
    common = asked | {
        "split": "test" if arguments.test else "validation",
        "data": str(arguments.slices.resolve()) if arguments.slices else None,
    }
    seeds = range(arguments.first_seed, arguments.first_seed + arguments.seeds)
    failed: dict[str, str] = {}
    if not arguments.report_only:
        for seed in seeds:
            for setting in settings:
                request = {**common, "seed": seed, "setting": setting}
                failed |= _made(folder / f"seed{seed}", request, rows, log)
    for path in report(folder, common, settings, rows, seeds):
        log.info(f"written: {path}")
    return 1 if failed else 0


def _made(folder: Path, request: dict[str, Any], rows: Sequence[str], log: Log) -> dict[str, str]:
    """Makes what one setting of one repetition lacks, one process after the other."""
    place = Place(folder, request["setting"], request["split"])
    failed: dict[str, str] = {}
    for name, told in _parts(place, rows):
        path = folder / "requests" / f"{place.setting}-{name}.json"
        write_json(path, {**request, **told, "folder": str(folder)})
        what = f"seed {request['seed']}, {place.setting}: {told.get('row', told['part'])}"
        log.info(what)
        task = Task(
            what, ["-m", "benchmarks.against_nnunet.job", str(path)], path.with_suffix(".log")
        )
        failed |= run_tasks([task], 1, log=log, tick=lambda: None)
        if failed and told["part"] != "row":
            break
    return failed


def _parts(place: Place, rows: Sequence[str]) -> Iterator[tuple[str, dict[str, Any]]]:
    """What is to be done, in this order; found while it is being done."""
    for part in ("cohort", "dataset"):
        if not done_file(place, part).exists():
            yield part, {"part": part}
    there = nnunet.kinds_of_labels(place)
    for row in rows:
        if row in NNUNET and NNUNET[row].labels not in there:
            continue
        whole = trained(place, row) and all(read(place, row, v) for v in variants(row))
        if not whole:
            yield row_folder(place, row).name, {"part": "row", "row": row}


def _settle(folder: Path, wanted: dict[str, Any]) -> None:
    """Refuses a folder of other numbers."""
    path, wanted = folder / "bench.json", json.loads(json.dumps(wanted))
    before = json_with(path, "seconds")
    if before is not None and before != wanted:
        raise ConfigError(
            "this folder was made with another --size or --seconds, or other numbers of "
            "benchmarks/against_nnunet/cohorts.py.",
            where=path,
            fix="Name another FOLDER.",
        )
    write_json(path, wanted)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.against_nnunet", description="nnU-Net beside our student."
    )
    add = parser.add_argument
    add("folder", type=Path, help="where everything goes, and is found again")
    add("--slices", type=Path, help="folder of real slices, instead of phantoms")
    add("--settings", default=",".join(SETTINGS), help="who has a teacher, with commas")
    add("--rows", help="with semicolons; default: all")
    add("--seconds", type=float, default=240.0, help="CPU seconds of each training")
    add("--seeds", type=int, default=3, help="how many")
    add("--first-seed", type=int, default=0)
    add("--report-only", action="store_true", help="tables of what there is")
    add("--test", action="store_true", help="score test cases: once, when all is chosen")
    add("--size", choices=["full", "tiny"], default="full", help="tiny: to try the command")
    return parser


if __name__ == "__main__":
    sys.exit(main())
