"""Jobs that were submitted for a work folder: their records, and what Slurm says of them now."""

from __future__ import annotations

import json
import subprocess
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from pipeline.cache.store import write_json
from pipeline.folder import Folder, matching, read_text

UNKNOWN = "unknown"
_PATIENCE_S = 20.0


@dataclass(frozen=True)
class Job:
    """One job, or one array of jobs.

    Attributes:
        job: its number, as Slurm gave it.
        stage: whose command it runs.
        submitted: when, UTC, ISO 8601.
        after: numbers of the jobs that it waits for.
        log: where its output goes, as Slurm writes such names.
    """

    job: str
    stage: str
    submitted: str
    after: tuple[str, ...] = ()
    log: str = ""


def record(work: Folder, job: Job) -> None:
    """Keeps it as `jobs/<number>-<stage>.json`.

    Raises:
        WorkFolderError: the folder cannot be written.
    """
    write_json(work / "jobs" / f"{job.job}-{job.stage}.json", asdict(job))


def recorded(work: Folder) -> list[Job]:
    """All jobs in the order in which they were submitted; a record that cannot be read is none."""
    found = []
    for path in matching(work / "jobs", "*.json"):
        try:
            values = json.loads(read_text(path))
            found.append(Job(**{**values, "after": tuple(values["after"])}))
        except (OSError, ValueError, KeyError, TypeError):
            continue
    return sorted(found, key=lambda job: (job.submitted, len(job.job), job.job))


def states(jobs: Sequence[str]) -> dict[str, str]:
    """Number -> state: what `squeue` says, else `sacct`, else "unknown".

    Of an array the number of elements in each state: "2 RUNNING, 6 PENDING".
    """
    elements = _ask("squeue", "--noheader", "--array", "--states=all", "--format=%i|%T", jobs=jobs)
    if unheard := [job for job in jobs if job not in elements]:
        elements |= _ask(
            "sacct", "--noheader", "--allocations", "--parsable2", "--format=JobID,State",
            jobs=unheard,
        )  # fmt: skip
    return {job: _in_words(elements.get(job, {})) for job in jobs}


def _ask(*command: str, jobs: Sequence[str]) -> dict[str, dict[str, str]]:
    """Number -> element -> state; empty where there is no Slurm, or it does not answer."""
    if not jobs:
        return {}
    words = [*command, f"--jobs={','.join(jobs)}"]
    try:
        asked = subprocess.run(
            words, capture_output=True, text=True, check=False, timeout=_PATIENCE_S
        )
    except (OSError, subprocess.TimeoutExpired):
        return {}
    found: dict[str, dict[str, str]] = {}
    for line in asked.stdout.splitlines() if asked.returncode == 0 else ():
        element, _, state = line.partition("|")
        if state:
            found.setdefault(element.partition("_")[0], {})[element] = state.split()[0]
    return found


def _in_words(elements: Mapping[str, str]) -> str:
    if len(elements) == 1:
        return next(iter(elements.values()))
    counts = Counter(elements.values())
    return ", ".join(f"{number} {state}" for state, number in counts.items()) or UNKNOWN


def with_states(work: Folder) -> list[dict[str, Any]]:
    """Records and states of a work folder's jobs."""
    jobs = recorded(work)
    now = states([job.job for job in jobs])
    return [{**asdict(job), "after": list(job.after), "state": now[job.job]} for job in jobs]
