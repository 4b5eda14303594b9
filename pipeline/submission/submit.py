"""Scripts to Slurm: all are tried, then submitted, each to wait for the one before."""

from __future__ import annotations

import subprocess
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path

from pipeline.cache.store import prepare_work_folder
from pipeline.errors import ConfigError, EngineError, WorkFolderError
from pipeline.folder import replace_file
from pipeline.log import Log
from pipeline.submission.jobs import Job, record
from pipeline.submission.script import Target, script
from pipeline.submission.settings import STAGES, Stage, SubmitSettings


def in_order(stages: Sequence[str]) -> list[Stage]:
    """The stages as they depend on each other.

    Raises:
        ConfigError: one that is unknown, or twice there.
    """
    for name in stages:
        if name not in STAGES:
            raise ConfigError(
                f"no job can be made of {name!r}.",
                where="pipeline submit",
                fix=f"There are {', '.join(STAGES)}.",
            )
        if stages.count(name) > 1:
            raise ConfigError(
                f"{name} is there twice.", where="pipeline submit", fix="Name each stage once."
            )
    return [stage for stage in STAGES if stage in stages]


def scripts(
    stages: Sequence[Stage],
    settings: SubmitSettings,
    target: Target,
    templates: Path | None = None,
) -> dict[Stage, str]:
    """Stage -> what would be submitted.

    Raises:
        ConfigError, WorkFolderError: as `script`.
    """
    return {stage: script(stage, settings.of(stage), target, templates) for stage in stages}


def submit(
    texts: Mapping[Stage, str],
    settings: SubmitSettings,
    target: Target,
    *,
    after: Sequence[str] = (),
    log: Log,
) -> list[Job]:
    """Submits the scripts; each job waits until the one before it has ended well.

    Each script is kept beside its job's record.

    Args:
        texts: stage -> script, in order.
        settings: they were made from.
        target: what they work on.
        after: jobs that the first one waits for.
        log: told of each job.

    Raises:
        ConfigError: Slurm refuses one of them, or there is no Slurm here; nothing was submitted.
        EngineError: Slurm refuses one only now; the message names what was submitted before.
        WorkFolderError: a folder cannot be written.
    """
    for stage, text in texts.items():
        _try(stage, text)
    prepare_work_folder(target.work)
    try:
        target.jobs.mkdir(exist_ok=True)
        for stage in texts:  # Slurm makes no folder, and a job without its log fails
            (target.work / settings.of(stage).logs).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise WorkFolderError(
            f"cannot be written ({error.strerror}).",
            where=target.work,
            fix="Check free space and permissions.",
        ) from error
    jobs: list[Job] = []
    for stage, text in texts.items():
        waits = (jobs[-1].job,) if jobs else tuple(after)
        told = _sbatch(text, "--parsable", *_dependency(waits))
        number = told.stdout.strip().partition(";")[0]
        if told.returncode or not number.isdecimal():
            before = ", ".join(f"{job.stage} is {job.job}" for job in jobs) or "nothing"
            raise EngineError(
                f"Slurm refuses it ({told.stderr.strip() or told.stdout.strip()}).",
                where=f"the job of {stage}",
                fix=f"Submitted before: {before}. Submit the rest with --after.",
            )
        jobs.append(_kept(number, stage, text, waits, target, settings))
        waiting = f", after {', '.join(waits)}" if waits else ""
        log.info(f"{stage}: job {number}{waiting}; its output: {jobs[-1].log}")
    return jobs


def _kept(
    number: str,
    stage: Stage,
    text: str,
    waits: tuple[str, ...],
    target: Target,
    settings: SubmitSettings,
) -> Job:
    logs = target.work / settings.of(stage).logs
    now = datetime.now(UTC).isoformat(timespec="milliseconds")
    is_array = "\n#SBATCH --array=" in text
    log = str(logs / f"{stage}-{number}{'_*' if is_array else ''}.log")
    job = Job(number, stage, now, waits, log)
    record(target.work, job)
    try:
        replace_file(target.jobs / f"{number}-{stage}.sh", text.encode())
    except OSError as error:
        raise WorkFolderError(
            f"job {number} was submitted, but its script cannot be kept ({error.strerror}).",
            where=target.jobs,
            fix="The job is not affected. Make room; `pipeline submit --print` shows the script.",
        ) from error
    return job


def _dependency(jobs: Sequence[str]) -> list[str]:
    if not jobs:
        return []
    return [f"--dependency=afterok:{':'.join(jobs)}", "--kill-on-invalid-dep=yes"]


def _try(stage: Stage, text: str) -> None:
    told = _sbatch(text, "--test-only")
    if told.returncode:
        raise ConfigError(
            f"Slurm refuses it ({told.stderr.strip()}).",
            where=f"the job of {stage}",
            fix="Change the file that --slurm-config names; `--print` shows the script.",
        )


def _sbatch(text: str, *options: str) -> subprocess.CompletedProcess[str]:
    try:
        return subprocess.run(
            ["sbatch", *options], input=text, capture_output=True, text=True, check=False
        )
    except OSError as error:
        raise ConfigError(
            f"sbatch cannot be run ({error.strerror}).",
            where="pipeline submit",
            fix="Submit where Slurm's commands are, or use --print.",
        ) from error
