"""What a Slurm job with one worker asks for: the YAML of `--executor slurm`."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from pipeline.config import Config

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
