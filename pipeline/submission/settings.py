"""What the jobs of the stages ask for: the YAML of `pipeline submit`."""

from __future__ import annotations

from typing import Annotated, Any, Literal, get_args

from pydantic import Field

from pipeline.engine.slurm_settings import Line, SlurmSettings
from pipeline.errors import ConfigError

Stage = Literal["train-teachers", "cache-teachers", "train-student", "predict", "evaluate"]
STAGES: tuple[Stage, ...] = get_args(Stage)  # each waits for those before it


class JobSettings(SlurmSettings):
    """What one job gets, and how often it is put back. None of it changes a number.

    The fields of `SlurmSettings` are those of `--executor slurm`; `cores` is for each task,
    `memory` and `gres` are for each node.

    Attributes:
        nodes: of train-student; other stages take one.
        tasks_per_node: processes of train-student on each node.
        num_parts: elements of cache-teachers' array.
        num_restarts: how often a job may be put back into the queue.
        signal_seconds: SIGUSR1 comes so long before the time limit.
        arguments: more words for the stage's command, for example ["--workers", "3"].
        stage_to: train-student's --stage-to, for example "$SLURM_TMPDIR". The job's shell puts
            variables in.
    """

    nodes: int = Field(default=1, ge=1)
    tasks_per_node: int = Field(default=1, ge=1)
    num_parts: int = Field(default=1, ge=1)
    num_restarts: int = Field(default=20, ge=0)
    signal_seconds: int = Field(default=120, ge=1, le=65535)
    arguments: tuple[Line, ...] = ()
    stage_to: Annotated[str, Field(pattern=r'^[^\n"`\\]+$')] | None = Field(
        default=None, description="train-student's --stage-to; the job's shell puts variables in"
    )


class SubmitSettings(JobSettings):
    """For all stages, and under `stages` what differs for one of them."""

    stages: dict[Stage, JobSettings] = Field(default_factory=dict)

    def of(self, stage: Stage) -> JobSettings:
        """What a stage's job asks for.

        Raises:
            ConfigError: several nodes, tasks or parts, or a folder for copies, for a stage that
                knows none.
        """
        values: dict[str, Any] = self.model_dump(exclude={"stages"})
        if stage in self.stages:
            values |= self.stages[stage].model_dump(exclude_unset=True)
        settings = JobSettings.model_validate(values)
        for name, only in _ONLY.items():
            ordinary = JobSettings.model_fields[name].default
            if stage != only and getattr(settings, name) != ordinary:
                raise ConfigError(
                    f"{stage} has no use for `{name}: {getattr(settings, name)}`.",
                    where="the settings of Slurm",
                    fix=f"Write it under `stages: {{{only}: ...}}`.",
                )
        return settings

    def with_parts(self, num_parts: int) -> SubmitSettings:
        """The same, with another number of elements of cache-teachers' array."""
        own = {**self.stages.get("cache-teachers", JobSettings()).model_dump(exclude_unset=True)}
        changed = JobSettings.model_validate({**own, "num_parts": num_parts})
        return self.model_copy(update={"stages": {**self.stages, "cache-teachers": changed}})


_ONLY: dict[str, Stage] = {
    "nodes": "train-student",
    "tasks_per_node": "train-student",
    "num_parts": "cache-teachers",
    "stage_to": "train-student",
}
