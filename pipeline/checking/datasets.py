"""Every case of a registry, in processes: what its files hold, and what is wrong with them."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from typing import Any

from pipeline.checking.case import CaseFacts, Task, look_at
from pipeline.checking.cohort import compare_cases
from pipeline.checking.findings import Finding, in_order, of_case, of_dataset
from pipeline.config import read_yaml
from pipeline.data.files import closed_cases
from pipeline.data.registry import Registry
from pipeline.data.registry_checks import check_files
from pipeline.errors import RegistryError
from pipeline.log import Log
from pipeline.volume import Index3

_MOST_JOBS = 16  # readers of one file system; more wait for it


@dataclass(frozen=True)
class DataReport:
    """What was found in datasets.

    Attributes:
        datasets: that were checked.
        cases: facts of each case whose files are there.
        num_cases: that the registry names.
        findings: errors first.
    """

    datasets: Sequence[str]
    cases: Sequence[CaseFacts]
    num_cases: int
    findings: Sequence[Finding]

    def to_json(self) -> dict[str, Any]:
        """Plain values; findings are not repeated case by case."""
        cases = [asdict(case) for case in self.cases]
        return {
            "datasets": list(self.datasets),
            "num_cases": self.num_cases,
            "cases": [{k: v for k, v in case.items() if k != "findings"} for case in cases],
        }


def check_datasets(
    registry: Registry,
    *,
    patch: Index3,
    log: Log,
    dataset: str | None = None,
    jobs: int | None = None,
) -> DataReport:
    """Reads each file of each case once and compares the cases.

    Args:
        registry: read without its files; what is wrong with them is part of the report.
        patch: of the student, in voxels of the student grid.
        log: where progress goes.
        dataset: one alone; None for all.
        jobs: processes; None for as many as there are cores, at most 16. Changes speed only.

    Raises:
        RegistryError: there is no such dataset.
    """
    if dataset is not None and dataset not in registry.datasets:
        known = ", ".join(registry.datasets)
        raise RegistryError(
            f"there is no dataset {dataset!r}.", where=registry.path, fix=f"Datasets: {known}."
        )
    entries = {d: e for d, e in registry.datasets.items() if dataset in (None, d)}
    findings = _file_findings(registry, entries)
    tasks, num_cases = [], 0
    for name, entry in entries.items():
        sources = registry.cases(name)
        if empty := registry.empty_split(name):
            findings.append(of_dataset("warning", "split", name, *empty))
        num_cases += len(sources)
        if entry.phantom is not None and len(closed_cases(sources)) == len(sources) > 0:
            what = f"none of its {len(sources)} made-up cases has been generated."
            findings.append(of_dataset("error", "file", name, what, "Run `pipeline phantom`."))
            continue
        tasks += [Task(s, entry, registry.grid.spacing_mm, patch) for s in sources]
    with log.progress("cases", len(tasks)) as advance:
        facts = look_at_all(tasks, jobs=jobs, advance=advance)
    findings += [finding for case in facts for finding in case.findings]
    findings += compare_cases(facts, entries)
    return DataReport(list(entries), facts, num_cases, in_order(findings))


def look_at_all(
    tasks: Sequence[Task], *, jobs: int | None = None, advance: Callable[[str], None]
) -> list[CaseFacts]:
    """`look_at` of each, in processes of their own unless one is enough.

    Processes that are killed (by lack of memory, say) cost no other case: what was left is done one
    case at a time, and a case whose process dies again is reported.
    """
    number = min(jobs or min(len(os.sched_getaffinity(0)), _MOST_JOBS), len(tasks))
    done: dict[str, CaseFacts] = {}

    def keep(facts: CaseFacts) -> None:
        done[facts.case] = facts
        advance(facts.case)

    if number <= 1:
        for task in tasks:
            keep(look_at(task))
    else:
        _in_pool(tasks, number, keep)
        for task in tasks:
            if task.source.name not in done and not _in_pool([task], 1, keep):
                keep(_died(task))
    return [done[task.source.name] for task in tasks]


def _in_pool(tasks: Sequence[Task], number: int, keep: Callable[[CaseFacts], None]) -> bool:
    """Whether all processes lived."""
    # A copy of this process (fork) would hold its threads' locks for ever.
    context = get_context("forkserver")
    context.set_forkserver_preload(["pipeline.checking.case"])
    with ProcessPoolExecutor(number, mp_context=context) as pool:
        futures = [pool.submit(look_at, task) for task in tasks]
        try:
            for future in as_completed(futures):
                keep(future.result())
        except BrokenProcessPool:
            return False
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    return True


def _died(task: Task) -> CaseFacts:
    source = task.source
    what = "the process that read it was killed, twice."
    fix = "Most likely memory: how large are its files? Try `--jobs 1` with more memory."
    finding = of_case("error", "file", source.name, what, fix)
    return CaseFacts(source.name, source.dataset, source.split, findings=(finding,))


def _file_findings(registry: Registry, entries: Mapping[str, Any]) -> list[Finding]:
    """What the registry's patterns and splits miss among the files."""
    found = []
    for problem in check_files(read_yaml(registry.path, error=RegistryError)):
        dataset = str(problem.location[1])
        if dataset in entries:
            found.append(of_dataset("error", "registry", dataset, problem.what, problem.fix))
    return found
