"""How the processes of a training find each other, started by torchrun or srun."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from pipeline.errors import ConfigError, PipelineError
from pipeline.student.processes import ALONE, Processes

# Validation of one large case on the CPU must fit in: the others wait for it.
PATIENCE = timedelta(minutes=30)


def launched(environment: Mapping[str, str] = os.environ) -> Processes:
    """Who this process is, as torchrun or srun tells; alone if neither started it.

    Raises:
        ConfigError: a rank that cannot be.
    """
    if "WORLD_SIZE" in environment and "RANK" in environment:
        names = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
    elif "SLURM_STEP_NUM_TASKS" in environment and "SLURM_PROCID" in environment:
        # Set by srun alone; a batch script of many tasks that calls no srun is one process.
        names = ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID")
    else:
        return ALONE
    try:
        rank, size, local = (int(environment.get(name, "0")) for name in names)
    except ValueError:
        rank, size, local = 0, 0, 0
    if not 0 <= rank < size:
        told = ", ".join(f"{name}={environment.get(name)}" for name in names)
        raise ConfigError(
            "what the launcher says of this process cannot be.",
            where=told,
            fix="Start it by torchrun or srun, or unset these variables.",
        )
    return Processes(rank, size, local)


def refuse_several(command: str) -> None:
    """For what one process does: several would do it over each other.

    Raises:
        ConfigError: torchrun or srun started more than one process.
    """
    size = launched().size
    if size > 1:
        raise ConfigError(
            f"it runs in one process, and {size} were started.",
            where=command,
            fix="Start it without torchrun, or with srun --ntasks 1.",
        )


@contextmanager
def joined(*, patience: timedelta = PATIENCE) -> Iterator[Processes]:
    """Joins the processes that were launched with this one, until the end of the block.

    gloo carries what lies on the CPU, NCCL what lies on a GPU.

    Raises:
        ConfigError: the launcher does not say where the first process listens.
        PipelineError: another process ended or did not answer.
    """
    own = launched()
    if own.size == 1:
        yield own
        return
    _meeting_point(os.environ)
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    clean = False
    try:
        dist.init_process_group(backend, rank=own.rank, world_size=own.size, timeout=patience)
        yield own
        clean = True
    except PipelineError:
        clean = True
        raise
    except (dist.DistError, RuntimeError) as error:
        if not isinstance(error, dist.DistError) and "gloo" not in str(error).lower():
            raise
        first = str(error).strip().split("\n")[0]
        raise PipelineError(
            f"another process ended or did not answer ({first}).",
            where=f"process {own.rank} of {own.size}",
            fix="The first error in the output of the others says why. The last checkpoint is "
            "intact: run the same command again.",
        ) from error
    finally:
        # NCCL may wait for ever for the one that left; the end of this process tells it as well.
        if dist.is_initialized() and (clean or backend == "gloo"):
            dist.destroy_process_group()


def _meeting_point(environment: Any) -> None:
    """Where the first process listens; srun on one machine needs no telling."""
    if "MASTER_ADDR" not in environment:
        if environment.get("SLURM_STEP_NUM_NODES") != "1":
            raise ConfigError(
                "it is not set, and several machines take part.",
                where="MASTER_ADDR",
                fix="In the batch script: `export MASTER_ADDR="
                '$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)`.',
            )
        environment["MASTER_ADDR"] = "127.0.0.1"
    if "MASTER_PORT" not in environment:
        job = int(environment.get("SLURM_JOB_ID", "0")) + int(environment.get("SLURM_STEP_ID", "0"))
        environment["MASTER_PORT"] = str(20_000 + job % 20_000)
