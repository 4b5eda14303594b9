"""`pipeline submit`: batch scripts from templates, chained jobs, and what became of them."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import jinja2
import jinja2.meta
from pydantic import Field

from pipeline.cache.store import prepare_work_folder, write_json
from pipeline.engine.parts import Line, SlurmSettings, sbatch
from pipeline.errors import ConfigError, EngineError, WorkFolderError
from pipeline.folder import Folder, matching, read_text, replace_file, writing
from pipeline.log import Log

_HERE = "pipeline submit"


def in_order(stages: Sequence[str]) -> list[Stage]:
    """The stages as they depend on each other."""
    for name in stages:
        if name not in STAGES:
            fix = f"There are {', '.join(STAGES)}."
            raise ConfigError(f"no job can be made of {name!r}.", where=_HERE, fix=fix)
        if stages.count(name) > 1:
            raise ConfigError(f"{name} is there twice.", where=_HERE, fix="Name each stage once.")
    return [stage for stage in STAGES if stage in stages]


def scripts(
    stages: Sequence[Stage], settings: SubmitSettings, target: Target, templates: Path | None = None
) -> dict[str, str]:
    """Job -> what would be submitted, see `script`: a job for each stage; before an array of parts
    one for the gate, which they go by."""
    jobs: list[str] = []
    for stage in stages:
        parts = stage == "cache-teachers" and settings.of(stage).num_parts > 1
        jobs += [GATE_JOB, stage] if parts else [stage]
    return {job: script(job, settings.of(_stage_of(job)), target, templates) for job in jobs}


def submit(
    texts: Mapping[str, str],
    settings: SubmitSettings,
    target: Target,
    *,
    after: Sequence[str] = (),
    log: Log,
) -> list[Job]:
    """Tries all scripts, then submits them; each job waits until the one before it has ended well,
    the first one until those of `after` have. Each script is kept beside its job's record.

    After the gate's job parts begin however it ended: one bad case need not stop them, and they
    look themselves whether it has judged, and refused no teacher.

    Raises:
        ConfigError: Slurm refuses one of them, or there is no Slurm here; nothing was submitted.
        EngineError: Slurm refuses one only now; the message names what was submitted before.
        WorkFolderError: a folder cannot be written.
    """
    for name, text in texts.items():
        tried = sbatch(text, "--test-only", where=_HERE)
        if tried.returncode:
            raise ConfigError(
                f"Slurm refuses it ({tried.stderr.strip()}).",
                where=f"the job of {name}",
                fix="Change the file that --slurm-config names; `--print` shows the script.",
            )
    prepare_work_folder(target.work)
    logs = {name: target.work / settings.of(_stage_of(name)).logs for name in texts}
    with writing(target.work):
        for folder in (target.jobs, *logs.values()):  # Slurm makes none: a job without a log fails
            folder.mkdir(parents=True, exist_ok=True)
    jobs: list[Job] = []
    for name, text in texts.items():
        waits = (jobs[-1].job,) if jobs else tuple(after)
        how = "afterany" if jobs and jobs[-1].stage == GATE_JOB else "afterok"
        dependency = [f"--dependency={how}:{':'.join(waits)}", "--kill-on-invalid-dep=yes"]
        told = sbatch(text, "--parsable", *(dependency if waits else ()), where=_HERE)
        number = told.stdout.strip().partition(";")[0]
        if told.returncode or not number.isdecimal():
            before = ", ".join(f"{job.stage} is {job.job}" for job in jobs) or "nothing"
            raise EngineError(
                f"Slurm refuses it ({told.stderr.strip() or told.stdout.strip()}).",
                where=f"the job of {name}",
                fix=f"Submitted before: {before}. Submit the rest with --after.",
            )
        now = datetime.now(UTC).isoformat(timespec="milliseconds")
        elements = "_*" if "\n#SBATCH --array=" in text else ""
        output = logs[name] / f"{name}-{number}{elements}.log"
        jobs.append(Job(number, name, now, waits, str(output)))
        record(target.work, jobs[-1])
        fix = f"Job {number} was submitted and is not affected; `--print` shows the script."
        with writing(target.jobs, fix):
            replace_file(target.jobs / f"{number}-{name}.sh", text.encode())
        waiting = f", after {', '.join(waits)}" if waits else ""
        log.info(f"{name}: job {number}{waiting}; its output: {jobs[-1].log}")
    return jobs


# Jobs that were submitted for a work folder: their records, and what Slurm says of them now.

_PATIENCE_S = 20.0


@dataclass(frozen=True)
class Job:
    """One job, or one array of jobs, by its number.

    Attributes:
        stage: whose command it runs, or `GATE_JOB`.
        submitted: UTC, ISO 8601.
        after: numbers of the jobs that it waits for.
        log: where its output goes, as Slurm writes such names.
    """

    job: str
    stage: str
    submitted: str
    after: tuple[str, ...] = ()
    log: str = ""


def record(work: Folder, job: Job) -> None:
    """Keeps it as `jobs/<number>-<stage>.json`."""
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
    """Number -> state: what `squeue` says, else `sacct`, else "unknown"; of an array the number of
    elements in each: "2 RUNNING, 6 PENDING"."""
    elements = _ask("squeue", "--noheader", "--array", "--states=all", "--format=%i|%T", jobs=jobs)
    if unheard := [job for job in jobs if job not in elements]:
        elements |= _ask(
            "sacct", "--noheader", "--allocations", "--parsable2", "--format=JobID,State",
            jobs=unheard,
        )  # fmt: skip
    counts = {job: Counter(elements.get(job, {"": "unknown"}).values()) for job in jobs}
    return {
        job: ", ".join(f"{n} {state}" if found.total() > 1 else state for state, n in found.items())
        for job, found in counts.items()
    }


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


def with_states(work: Folder) -> list[dict[str, Any]]:
    """Records and states of a work folder's jobs."""
    jobs = recorded(work)
    now = states([job.job for job in jobs])
    return [{**asdict(job), "after": list(job.after), "state": now[job.job]} for job in jobs]


Stage = Literal["train-teachers", "cache-teachers", "train-student", "predict", "evaluate"]
STAGES: tuple[Stage, ...] = get_args(Stage)  # each waits for those before it
# The first job of cache-teachers where it is an array of several parts, with the same settings.
GATE_JOB = "cache-teachers-gate"


def _stage_of(job: str) -> Stage:
    return next(stage for stage in STAGES if stage == job.removesuffix("-gate"))


class JobSettings(SlurmSettings):
    """What one job gets, and how often it is put back. None of it changes a number.

    Of the fields of `SlurmSettings`, `cores` is for each task, `memory` and `gres` for each node.

    Attributes:
        nodes: of train-student; other stages take one.
        tasks_per_node: processes of train-student on each node.
        num_parts: elements of cache-teachers' array.
        num_restarts: how often a job may be put back into the queue.
        signal_seconds: SIGUSR1 comes so long before the time limit.
        arguments: more words for the stage's command, for example ["--workers", "3"].
        stage_to: train-student's --stage-to; the job's shell puts in variables as "$SLURM_TMPDIR".
    """

    nodes: int = Field(default=1, ge=1)
    tasks_per_node: int = Field(default=1, ge=1)
    num_parts: int = Field(default=1, ge=1)
    num_restarts: int = Field(default=20, ge=0)
    signal_seconds: int = Field(default=120, ge=1, le=65535)
    arguments: tuple[Line, ...] = ()
    stage_to: Annotated[str, Field(pattern=r'^[^\n"`\\]+$')] | None = None


class SubmitSettings(JobSettings):
    """The YAML of `pipeline submit`: for all stages, and under `stages` what differs for one."""

    stages: dict[Stage, JobSettings] = Field(default_factory=dict)

    def of(self, stage: Stage) -> JobSettings:
        """What a stage's job asks for.

        Raises:
            ConfigError: what `_ONLY` another stage knows.
        """
        values: dict[str, Any] = self.model_dump(exclude={"stages"})
        if stage in self.stages:
            values |= self.stages[stage].model_dump(exclude_unset=True)
        settings = JobSettings.model_validate(values)
        for name, only in _ONLY.items():
            value = getattr(settings, name)
            if stage != only and value != JobSettings.model_fields[name].default:
                raise ConfigError(
                    f"{stage} has no use for `{name}: {value}`.",
                    where="the settings of Slurm",
                    fix=f"Write it under `stages: {{{only}: ...}}`.",
                )
        return settings

    def with_parts(self, num_parts: int) -> SubmitSettings:
        """The same, with another number of elements of cache-teachers' array."""
        own = self.stages.get("cache-teachers", JobSettings())
        changed = {"cache-teachers": own.model_copy(update={"num_parts": num_parts})}
        return self.model_copy(update={"stages": {**self.stages, **changed}})


_ONLY: dict[str, Stage] = {
    **dict.fromkeys(("nodes", "tasks_per_node", "stage_to"), "train-student"),
    "num_parts": "cache-teachers",
}


# Batch scripts: a template per stage, a file of shell with places in double braces.

TEMPLATES = Path(__file__).parent / "templates"
ELEMENT = "%element%"  # the number of an array's element: the job's shell puts it in
# Shell has {% and {# too (`${#names[@]}`): only double braces are Jinja's here.
_JINJA = jinja2.Environment(
    block_start_string="{{%", block_end_string="%}}",
    comment_start_string="{{#", comment_end_string="#}}",
    undefined=jinja2.StrictUndefined, keep_trailing_newline=True,
)  # fmt: skip
_JINJA.globals.clear()


@dataclass(frozen=True)
class Target:
    """What the jobs of a chain work on; all paths absolute, on a disk that the nodes share.

    Attributes:
        splits: that are evaluated, and so predicted.
        folds: that the registry has: a student for each, whose predictions of them are evaluated.
        configs: settings of stages, where not all are the defaults.
    """

    registry: Path
    work: Path
    run: str = "student"
    teachers: tuple[str, ...] = ()
    splits: tuple[str, ...] = ("test",)
    folds: int = 0
    configs: Mapping[Stage, Path] = field(default_factory=dict)

    @property
    def jobs(self) -> Path:
        """Folder of the records of jobs."""
        return self.work / "jobs"

    @property
    def run_folder(self) -> Path:
        """Of the student, in folds of that of the array's element."""
        return self.work / "students" / (f"{self.run}-fold{ELEMENT}" if self.folds else self.run)

    def words(self, stage: Stage, settings: JobSettings) -> list[str]:
        """The stage's command; what differs between the elements of an array is the template's."""
        words = [sys.executable, "-m", "pipeline.cli", stage]
        predictions = self.work / "predictions" / self.run
        registry, work = ["--registry", str(self.registry)], ["--work", str(self.work)]
        fold = ["--fold", ELEMENT] if self.folds else []
        match stage:
            case "predict":
                student = self.run_folder / "student.pt"
                words += [str(student), *registry, "--output", str(predictions)]
                words += fold or [word for split in self.splits for word in ("--split", split)]
            case "evaluate":
                words += [str(predictions), *registry, *(["--folds"] if self.folds else [])]
            case _:
                words += [*registry, *work, *(fold if stage == "train-student" else [])]
        if stage in self.configs:
            words += ["--config", str(self.configs[stage])]
        return [*words, *settings.arguments]


def script(job: str, settings: JobSettings, target: Target, templates: Path | None = None) -> str:
    """The text that `sbatch` gets; from built-in templates where the folder has none.

    Raises:
        ConfigError: no teacher to train, or a template with an unknown place.
        WorkFolderError: the template cannot be read.
    """
    array = settings.num_parts if job == "cache-teachers" else None
    if job == "train-teachers" and not (array := len(target.teachers)):
        raise ConfigError(
            "no teacher to train.",
            where=target.registry,
            fix="Leave train-teachers out, or name a dataset in a teacher's `trained_on`.",
        )
    if job in ("train-student", "predict") and target.folds:
        array = target.folds
    command = " ".join(map(_in_shell, target.words(_stage_of(job), settings)))
    if settings.stage_to is not None:  # the job's shell, on the node, is to put variables in
        command += f' --stage-to "{settings.stage_to}"'
    log = f"{job}-{'%j' if array is None else '%A_%a'}.log"
    folder = str(target.work / settings.logs).replace("%", "%%")
    return fill(
        _template(job, templates),
        {
            "name": job,
            "directives": "\n".join(directives(settings, array)),
            "log": f'"{folder}/{log}"',
            "signal_seconds": str(settings.signal_seconds),
            "num_restarts": str(settings.num_restarts),
            "num_parts": str(settings.num_parts),
            "prologue": "\n".join(settings.prologue),
            "command": command,
            "teachers": shlex.join(target.teachers),
            "run_folder": _in_shell(str(target.run_folder)),
            "training_folder": shlex.quote(str(target.work / "teachers-in-training")),
            "jobs": shlex.quote(str(target.jobs)),
        },
    )


def _in_shell(word: str) -> str:
    quoted = shlex.quote(word)
    mark = "" if quoted == word else "'"
    return quoted.replace(ELEMENT, f'{mark}"$SLURM_ARRAY_TASK_ID"{mark}')


def directives(settings: JobSettings, array: int | None = None) -> list[str]:
    """The lines for `sbatch` that follow from settings; `array`: number of elements."""
    options = {
        "partition": settings.partition,
        "account": settings.account,
        "time": settings.walltime,
        "nodes": settings.nodes,
        "ntasks-per-node": settings.tasks_per_node,
        "cpus-per-task": settings.cores,
        "mem": re.sub(r"(?i)(?<=[kmgt])i?b$", "", settings.memory.replace(" ", "")),
        "gres": settings.gres,
        "array": None if array is None else f"0-{array - 1}",
    }
    given = [f"--{name}={value}" for name, value in options.items() if value is not None]
    return [f"#SBATCH {line}" for line in (*given, *settings.directives)]


def fill(template: str, values: Mapping[str, str]) -> str:
    """A template with its places filled; all else, `$` too, stays as it is."""
    where = "a template of `pipeline submit`"
    there = f"There are {', '.join(sorted(values))}."
    try:
        parsed = _JINJA.parse(template)
        unknown = sorted(jinja2.meta.find_undeclared_variables(parsed) - values.keys())
        if not unknown:
            return _JINJA.from_string(parsed).render(values)
    except Exception as error:  # what an expression raises is of any kind
        line = f", line {error.lineno}" if isinstance(error, jinja2.TemplateSyntaxError) else ""
        why = str(getattr(error, "message", error)).rstrip(".")
        raise ConfigError(
            f"double braces cannot be filled in{line} ({why}).",
            where=where,
            fix=f"Write a name between them. {there}",
        ) from error
    named = ", ".join(f"{{{{{name}}}}}" for name in unknown)
    raise ConfigError(f"nothing is known of {named}.", where=where, fix=there)


def copy_templates(folder: Path) -> Sequence[Path]:
    """Writes the built-in templates where they can be changed.

    Raises:
        ConfigError: they are there already.
        WorkFolderError: they cannot be written.
    """
    paths = [folder / f"{job}.sh" for job in (*STAGES, GATE_JOB)]
    if there := [path.name for path in paths if path.exists()]:
        raise ConfigError(
            f"it holds {', '.join(there)} already.", where=folder, fix="Name another folder."
        )
    with writing(folder):
        for path in paths:
            replace_file(path, (TEMPLATES / path.name).read_bytes())
    return paths


def _template(job: str, folder: Path | None) -> str:
    own = None if folder is None else folder / f"{job}.sh"
    path = own if own is not None and own.exists() else TEMPLATES / f"{job}.sh"
    try:
        if folder is not None and not folder.is_dir():
            raise ConfigError("no such folder of templates.", where=folder, fix="Check the path.")
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise WorkFolderError(
            f"the template cannot be read ({error}).",
            where=path,
            fix="It is a text file in UTF-8: check the path and its permissions.",
        ) from error
