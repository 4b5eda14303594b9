"""The command: `python -m benchmarks.accuracy FOLDER ...`; see benchmarks/README.md."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Collection, Sequence
from pathlib import Path

from benchmarks.accuracy.configurations import BASELINES, METHOD, ROWS, screened
from benchmarks.accuracy.plan import Job, choose, equal_time_steps, plan_jobs, work_done
from benchmarks.accuracy.regimes import REGIMES
from benchmarks.accuracy.report import report
from benchmarks.accuracy.runner import Task, exit_code_of, run_tasks
from benchmarks.accuracy.size import BUDGETS, SIZES, Size
from benchmarks.accuracy.timing import seconds_per_step
from pipeline.cache.store import write_json
from pipeline.errors import ConfigError
from pipeline.log import Log

_SECONDS_BETWEEN_LINES = 60.0


def main(argv: Sequence[str] | None = None) -> int:
    """0 if all is done, 1 if a job failed, 2 for a wrong argument, 130 after a signal."""
    return exit_code_of(run, _parser().parse_args(argv))


def run(arguments: argparse.Namespace, log: Log) -> int:
    """Does what the arguments say."""
    size = SIZES[arguments.size]
    folder: Path = arguments.folder.resolve()
    split = "test" if arguments.test else "validation"
    regimes = [REGIMES[key] for key in _listed(arguments.regimes, REGIMES, "--regimes")]
    budgets = _listed(arguments.budgets, BUDGETS, "--budgets")
    kinds = _listed(arguments.kinds, ROWS, "--kinds") if arguments.kinds is not None else None
    others = screened(size, arguments.configs) if arguments.configs else []
    configurations = choose(size, budgets, kinds, others)
    if arguments.seeds < 1 or arguments.first_seed < 0:
        raise ConfigError("at least one seed, from 0 on.", where="--seeds", fix="Say 5.")
    seeds = range(arguments.first_seed, arguments.first_seed + arguments.seeds)
    extra: dict[tuple[str, str], int] = {}
    failed: list[str] = []
    folder.mkdir(parents=True, exist_ok=True)
    if arguments.equal_time:
        first = plan_jobs(folder, regimes[:1], seeds[:1], size, {})[0]
        if not arguments.report_only:
            failed += _make([first], size, split, 1, True, log)
        speeds = seconds_per_step(folder, first.folder, size, log)
        for kind in (*BASELINES, METHOD):
            log.info(f"{kind}: {1000 * speeds[kind]:.1f} ms a step")
        extra = equal_time_steps(size, budgets, speeds)
    jobs = plan_jobs(folder, regimes, seeds, size, configurations, extra)
    if not arguments.report_only:
        failed += _make(jobs, size, split, arguments.jobs, arguments.cohorts_only, log)
    if not arguments.cohorts_only:
        for path in report(folder, jobs, size, split, failed):
            log.info(f"written: {path}")
    return 1 if failed else 0


def _make(
    jobs: Sequence[Job], size: Size, split: str, num: int, cohorts_only: bool, log: Log
) -> list[str]:
    """Runs the jobs that lack something; the names of those that failed."""

    def work() -> tuple[int, int]:
        found = [work_done(job, size, split, cohorts_only) for job in jobs]
        return sum(done for done, _ in found), sum(total for _, total in found)

    tasks = []
    for job in jobs:
        done, total = work_done(job, size, split, cohorts_only)
        if done == total:
            continue
        request = job.folder / "request.json"
        write_json(request, job.request(size, split, cohorts_only))
        arguments = ["-m", "benchmarks.accuracy.job", str(request)]
        tasks.append(Task(job.name, arguments, job.folder / "job.log"))
    before, total = work()
    log.info(f"{len(tasks)} of {len(jobs)} jobs to do, {num} at a time; logs: */seed*/job.log")
    began = due = time.monotonic()

    def tick() -> None:
        nonlocal due
        if time.monotonic() < due + _SECONDS_BETWEEN_LINES:
            return
        due = time.monotonic()
        done, _ = work()
        spent = due - began
        left = "?" if done == before else f"{spent / (done - before) * (total - done) / 60:.0f}"
        log.info(f"{done / total:.0%} done, {spent / 60:.0f} min spent, {left} min left")

    return list(run_tasks(tasks, num, log=log, tick=tick))


def _listed(text: str, known: Collection[str], option: str) -> list[str]:
    wanted = list(dict.fromkeys(text.split(",")))
    for name in wanted:
        if name not in known:
            raise ConfigError(
                f"there is no {name!r}.", where=option, fix=f"Choose of {', '.join(known)}."
            )
    return wanted


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.accuracy", description="Supervisions compared on the phantom."
    )
    add = parser.add_argument
    add("folder", type=Path, help="where everything goes, and is found again")
    add("--regimes", default=",".join(REGIMES), help="letters, with commas")
    add("--seeds", type=int, default=5, help="how many")
    add("--first-seed", type=int, default=0)
    add("--budgets", default=",".join(BUDGETS), help="short,long")
    add(
        "--kinds",
        help="rows, with commas; default: all kinds at short, four at long, perfect_teachers",
    )
    add("--configs", type=Path, help="folder of YAML files that change ms_kd's `training`")
    add("--equal-time", action="store_true", help="also baselines with the steps of ms_kd's time")
    add("--jobs", type=int, default=1, help="processes, one thread each")
    add("--cohorts-only", action="store_true", help="phantoms, teachers and cache; no student")
    add("--report-only", action="store_true", help="tables of what there is")
    add("--test", action="store_true", help="score test cases: once, when all is chosen")
    add("--size", choices=SIZES, default="full", help="tiny: to try the command")
    return parser


if __name__ == "__main__":
    sys.exit(main())
