"""Batch scripts: a template per stage, a file of shell with places in double braces."""

from __future__ import annotations

import re
import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from pipeline.errors import ConfigError, WorkFolderError
from pipeline.submission.settings import STAGES, JobSettings, Stage

TEMPLATES = Path(__file__).parent / "templates"
_PLACE = re.compile(r"\{\{(.*?)\}\}")


@dataclass(frozen=True)
class Target:
    """What the jobs of a chain work on; all paths absolute.

    Attributes:
        registry: data_registry.yaml.
        work: the work folder, on a disk that the nodes share.
        run: of the student, as its settings name it.
        teachers: names of those to train.
        splits: that are evaluated, and so predicted.
        configs: settings of stages, where not all are the defaults.
    """

    registry: Path
    work: Path
    run: str = "student"
    teachers: tuple[str, ...] = ()
    splits: tuple[str, ...] = ("test",)
    configs: Mapping[Stage, Path] = field(default_factory=dict)

    @property
    def jobs(self) -> Path:
        """Folder of the records of jobs."""
        return self.work / "jobs"

    def words(self, stage: Stage, settings: JobSettings) -> list[str]:
        """The stage's command; what differs between the elements of an array is the template's."""
        words = [sys.executable, "-m", "pipeline.cli", stage]
        predictions = self.work / "predictions" / self.run
        registry, work = ["--registry", str(self.registry)], ["--work", str(self.work)]
        match stage:
            case "predict":
                student = self.work / "students" / self.run / "student.pt"
                words += [str(student), *registry, "--output", str(predictions)]
                words += [word for split in self.splits for word in ("--split", split)]
            case "evaluate":
                words += [str(predictions), *registry]
            case _:
                words += [*registry, *work]
        if stage in self.configs:
            words += ["--config", str(self.configs[stage])]
        return [*words, *settings.arguments]


def script(
    stage: Stage, settings: JobSettings, target: Target, templates: Path | None = None
) -> str:
    """The text that `sbatch` gets.

    Args:
        stage: its command's name.
        settings: what the job asks for.
        target: what it works on.
        templates: a folder with changed templates; those that it lacks are the built-in ones.

    Raises:
        ConfigError: no teacher to train, or a template with an unknown place.
        WorkFolderError: the template cannot be read.
    """
    array = None
    if stage == "cache-teachers":
        array = settings.num_parts
    if stage == "train-teachers":
        array = len(target.teachers)
        if not array:
            raise ConfigError(
                "no teacher to train.",
                where=target.registry,
                fix="Leave train-teachers out, or name a dataset in a teacher's `trained_on`.",
            )
    log = f"{stage}-{'%j' if array is None else '%A_%a'}.log"
    folder = str(target.work / settings.logs).replace("%", "%%")
    return fill(
        _template(stage, templates),
        {
            "name": stage,
            "directives": "\n".join(directives(settings, array)),
            "log": f'"{folder}/{log}"',
            "signal_seconds": str(settings.signal_seconds),
            "num_restarts": str(settings.num_restarts),
            "num_parts": str(settings.num_parts),
            "prologue": "\n".join(settings.prologue),
            "command": shlex.join(target.words(stage, settings)) + _stage_to(settings),
            "teachers": shlex.join(target.teachers),
            "run_folder": shlex.quote(str(target.work / "students" / target.run)),
            "training_folder": shlex.quote(str(target.work / "teachers-in-training")),
            "jobs": shlex.quote(str(target.jobs)),
        },
    )


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
    """A template with its places filled; all else, `$` too, stays as it is.

    Raises:
        ConfigError: a place with an unknown name.
    """
    unknown = sorted({name for name in _PLACE.findall(template) if name not in values})
    if unknown:
        raise ConfigError(
            f"nothing is known of {', '.join(f'{{{{{name}}}}}' for name in unknown)}.",
            where="a template of `pipeline submit`",
            fix=f"There are {', '.join(sorted(values))}.",
        )
    return _PLACE.sub(lambda match: values[match[1]], template)


def copy_templates(folder: Path) -> Sequence[Path]:
    """Writes the built-in templates where they can be changed; returns what was written.

    Raises:
        ConfigError: one of them is there already.
        WorkFolderError: the folder cannot be written.
    """
    paths = [folder / f"{stage}.sh" for stage in STAGES]
    if there := [path.name for path in paths if path.exists()]:
        raise ConfigError(
            f"it holds {', '.join(there)} already.", where=folder, fix="Name another folder."
        )
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for path in paths:
            path.write_text((TEMPLATES / path.name).read_text(encoding="utf-8"), encoding="utf-8")
    except OSError as error:
        raise WorkFolderError(
            f"templates cannot be written ({error.strerror}).", where=folder, fix="Check the path."
        ) from error
    return paths


def _stage_to(settings: JobSettings) -> str:
    """In double quotes: the job's shell, on the node, is to put variables in."""
    return "" if settings.stage_to is None else f' --stage-to "{settings.stage_to}"'


def _template(stage: Stage, folder: Path | None) -> str:
    own = None if folder is None else folder / f"{stage}.sh"
    path = own if own is not None and own.exists() else TEMPLATES / f"{stage}.sh"
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
