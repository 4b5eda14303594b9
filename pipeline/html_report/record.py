"""What a run's folder says of it: settings, inputs, marker, curves, files; nothing is loaded."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pydantic import ValidationError

from pipeline.config import digest
from pipeline.errors import CheckpointError, ConfigError
from pipeline.folder import Folder, read_bytes, read_text, sizes
from pipeline.inspection.looks import View
from pipeline.inventory.students import run_folders
from pipeline.labels import LabelSpace
from pipeline.student.history import History
from pipeline.student.metrics_file import parsed
from pipeline.student.supervision import SupervisionConfig

_KNOWN = 8


@dataclass(frozen=True)
class Training:
    """metrics.jsonl, and what a clock measured in it.

    Attributes:
        history: its curves and scores.
        seconds: of the steps, as far as they are in the file; None if no clock is.
        validation_seconds: of the validations, likewise.
        data_wait: share of the steps' time in which the loop waited for data, 0 to 1; or None.
    """

    history: History
    seconds: float | None
    validation_seconds: float | None
    data_wait: float | None


@dataclass(frozen=True)
class RunRecord:
    """A run as its folder records it.

    Attributes:
        run: its name.
        folder: of the run.
        settings: `training` of its configuration, as written in config.json.
        inputs: cases, teachers and organs by digest, likewise.
        digest: of both; the run's digest.
        marker: content of finished.json; None for a run that is not finished.
        training: from metrics.jsonl; None if that cannot be read.
        files: name -> bytes, of every file of the run, earlier pages left out.
    """

    run: str
    folder: Folder
    settings: Mapping[str, Any]
    inputs: Mapping[str, Any]
    digest: str
    marker: Mapping[str, Any] | None
    training: Training | None
    files: Mapping[str, int]

    @property
    def space(self) -> LabelSpace:
        """The organs that it was trained for."""
        return LabelSpace(self.inputs["organs"])

    @property
    def cases(self) -> Mapping[str, str]:
        """`dataset/case` -> digest, of the training cases."""
        return dict(self.inputs["cases"])

    @property
    def validation(self) -> Mapping[str, str]:
        """`dataset/case` -> digest, of the validation cases."""
        return dict(self.inputs["validation"])

    @property
    def teachers(self) -> Mapping[str, str]:
        """Teacher -> digest."""
        return dict(self.inputs["teachers"])

    @property
    def student(self) -> str | None:
        """The file with its weights: student.pt, else best.pt, else None."""
        return next((name for name in ("student.pt", "best.pt") if name in self.files), None)

    @property
    def view(self) -> View:
        """How its training formed regions; by default where its settings are of another version."""
        try:
            chosen = SupervisionConfig.model_validate(self.settings["supervision"])
        except (KeyError, ValidationError):
            return View()
        heat = {}
        for who, value in self.inputs.get("temperatures", {}).items():
            teacher, _, organ = who.partition(": ")
            heat[teacher, organ] = float(value)
        return View(chosen.margin, chosen.labels_win, chosen.confidence, heat)


def read_run(work: Folder, run: str) -> RunRecord:
    """Reads a run's folder.

    Args:
        work: the work folder.
        run: its name; of a comparison's run `<comparison>/<run>`.

    Raises:
        ConfigError: there is no such run.
        CheckpointError: its config.json cannot be read.
    """
    known = run_folders(work)
    if run not in known:
        more = f" and {len(known) - _KNOWN} more" if len(known) > _KNOWN else ""
        names = ", ".join(list(known)[:_KNOWN]) + more
        raise ConfigError(
            f"there is no run {run!r}.",
            where=work / "students",
            fix=f"Runs here: {names}." if known else "Run `pipeline train-student` first.",
        )
    folder = known[run]
    path = folder / "config.json"
    try:
        content = json.loads(read_text(path))
        settings, inputs = dict(content["config"]), dict(content["inputs"])
        record = RunRecord(
            run=run,
            folder=folder,
            settings=settings,
            inputs=inputs,
            digest=digest({"config": settings, "inputs": inputs}),
            marker=_marker(folder),
            training=_training(folder / "metrics.jsonl"),
            files={n: s for n, s in sorted(sizes(folder).items()) if not n.endswith(".html")},
        )
        _ = record.space, record.cases, record.validation, record.teachers
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(
            f"the run's record cannot be read ({type(error).__name__}: {error}).",
            where=path,
            fix="`pipeline train-student` writes it when a run begins; without it nobody knows "
            "what the run was trained from.",
        ) from error
    return record


def _marker(folder: Folder) -> Mapping[str, Any] | None:
    try:
        return dict(json.loads(read_text(folder / "finished.json")))
    except (OSError, ValueError, TypeError):
        return None


def _training(path: Folder) -> Training | None:
    """Lines up to one that a kill cut short; None without a line."""
    try:
        text = read_bytes(path)
    except OSError:
        return None
    history = History()
    seconds: list[float] = []
    waits: list[float] = []
    validations: list[float] = []
    for line in map(parsed, text.splitlines()):
        if line is None:
            break
        history.add(line)
        timing = line.get("timing", {})
        if "loss" in line and timing:
            seconds.append(float(timing["seconds"]))
            waits.append(float(timing["seconds"]) * float(timing["data_wait"]))
        elif timing:
            validations.append(float(timing["seconds"]))
    if not history.step:
        return None
    total = sum(seconds)
    return Training(
        history,
        total if seconds else None,
        sum(validations) if validations else None,
        sum(waits) / total if total else None,
    )
