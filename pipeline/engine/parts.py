"""Parts of stage one for jobs that know nothing of each other, `sbatch --array` and the like, after
a first job that does what must be done in one place; and what a job of Slurm asks for.
"""

from __future__ import annotations

import heapq
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Final, Literal

from pydantic import Field

from pipeline.config import Config
from pipeline.errors import ConfigError

# All cases onto the student grid, the units of the admission gate, the gate: an array's first job.
Gate = Literal["gate"]
GATE: Final[Gate] = "gate"

_HOW = 'Give both --num-parts N and --part-id I, for example --part-id "$SLURM_ARRAY_TASK_ID".'


@dataclass(frozen=True)
class Part:
    """One of several parts of the same work; they count from 0."""

    number: int
    of: int

    @property
    def tag(self) -> str:
        """For file names."""
        return f"part-{self.number:04d}-of-{self.of:04d}"

    def __str__(self) -> str:
        return f"part {self.number} of {self.of} (they count from 0)"


def chosen_part(
    num_parts: int | None,
    part_id: int | None,
    environment: Mapping[str, str],
    *,
    gate_only: bool = False,
) -> Part | Gate | None:
    """The part that the command line, or the job's place in its Slurm array, names; None, without
    parts or with one, is all.

    Only an array that has as many elements as there are parts tells which part a job is: after
    `--array=1-16`, resubmitting `--array=3,7` says 3 and 7, but no longer whether 0 or 1 was first.

    Raises:
        ConfigError: half of it is missing, or it does not fit.
    """
    if gate_only:
        if num_parts is not None or part_id is not None:
            raise ConfigError(
                "--gate-only with --num-parts or --part-id: the gate is no part of the cases.",
                fix="Run it first, for all parts together, without these two.",
            )
        return GATE
    if num_parts is None:
        if part_id is not None:
            raise ConfigError("--part-id without --num-parts.", fix=_HOW)
        return None
    if part_id is None:
        part_id = _place_in_array(num_parts, environment)
    if not 0 <= part_id < num_parts:
        raise ConfigError(
            f"--part-id {part_id}: parts of {num_parts} are 0 to {num_parts - 1}.", fix=_HOW
        )
    return Part(part_id, num_parts) if num_parts > 1 else None


def share(costs: Mapping[str, float], num_parts: int) -> list[list[str]]:
    """Deals things out so that parts cost about the same: the dearest first, each to the part that
    has least so far. The same costs give the same parts everywhere.

    No part costs more than 4/3 of what the best way of dealing could reach (Graham 1969).

    Returns:
        The names of each part, in the order they were given in.
    """
    place = {name: index for index, name in enumerate(costs)}
    loads = [(0.0, number) for number in range(num_parts)]
    parts: list[list[str]] = [[] for _ in range(num_parts)]
    for name in sorted(costs, key=lambda name: (-costs[name], name)):
        load, number = heapq.heappop(loads)
        parts[number].append(name)
        heapq.heappush(loads, (load + costs[name], number))
    return [sorted(part, key=place.__getitem__) for part in parts]


def _place_in_array(num_parts: int, environment: Mapping[str, str]) -> int:
    task = environment.get("SLURM_ARRAY_TASK_ID", "")
    count = environment.get("SLURM_ARRAY_TASK_COUNT", "")
    if not task:
        raise ConfigError("--num-parts without --part-id, and this is no Slurm array.", fix=_HOW)
    if count != str(num_parts):
        raise ConfigError(
            f"--num-parts {num_parts}, but this Slurm array has {count or 'some'} elements, so "
            "which part this one is cannot be told.",
            fix=_HOW,
        )
    first = int(environment.get("SLURM_ARRAY_TASK_MIN", "0"))
    step = int(environment.get("SLURM_ARRAY_TASK_STEP", "1")) or 1
    place, rest = divmod(int(task) - first, step)
    if rest or place >= num_parts:
        raise ConfigError(
            f"element {task} of this Slurm array is none of {num_parts} in a row.",
            where=f"--num-parts {num_parts}",
            fix=_HOW,
        )
    return place


# What a Slurm job with one worker asks for: the YAML of `--executor slurm`.

Line = Annotated[str, Field(pattern=r"^[^\n]+$")]


class SlurmSettings(Config):
    """How much one worker gets, and where. None of it changes a number.

    Attributes:
        partition: sbatch -p; None: the cluster's default.
        account: sbatch -A.
        walltime: of one job, as Slurm writes times; ended jobs are replaced.
        cores: per worker.
        memory: per worker, for example "16GB".
        gres: for example "gpu:1".
        directives: more lines for #SBATCH, for example "--qos=long".
        prologue: shell lines before the worker starts, for example "module load cuda".
        interface: network interface that the nodes reach this process by, for example "ib0".
        logs: folder for the jobs' output, relative to the work folder.
    """

    partition: Line | None = None
    account: Line | None = None
    walltime: Line = "08:00:00"
    cores: int = Field(default=4, ge=1)
    memory: Line = "16GB"
    gres: Line | None = None
    directives: tuple[Line, ...] = ()
    prologue: tuple[Line, ...] = ()
    interface: Line | None = None
    logs: Line = "logs/slurm"


def sbatch(script: str, *options: str, where: str) -> subprocess.CompletedProcess[str]:
    """Gives Slurm a script, with `--test-only` to ask whether it would take it; `where` is named.

    Raises:
        ConfigError: there is no Slurm here.
    """
    try:
        return subprocess.run(
            ["sbatch", *options], input=script, capture_output=True, text=True, check=False
        )
    except OSError as error:
        raise ConfigError(
            f"sbatch cannot be run ({error.strerror}).",
            where=where,
            fix="Start it where jobs can be submitted; `pipeline submit --print` only shows them.",
        ) from error
