"""Where else than in metrics.jsonl the numbers of a training go, by name: the one interface of
loggers, how a training is kept safe from them, TensorBoard, MLflow, Weights & Biases.
"""

from __future__ import annotations

import json
import os
import re
import secrets
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

from pipeline.errors import ConfigError


@dataclass(frozen=True)
class LoggedRun:
    """What a logger is told of a run when it starts or goes on.

    Attributes:
        folder: of the run, on this machine; a logger keeps here what it must find after a resume.
        settings: what the run's YAML may say, nested; its inputs are in config.json.
        resumed_from: step of the checkpoint; 0 at the start. What was logged of later steps, before
            a kill, comes again.
    """

    name: str
    folder: Path
    settings: Mapping[str, Any]
    resumed_from: int


class RunLogger(Protocol):
    """A place for the numbers of one run at a time. It may raise anything: see `Loggers`."""

    name: str

    def start(self, run: LoggedRun) -> None:
        """Before the first step of this process."""

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Means over the steps that end with `step`, or the scores of a validation."""

    def finish(self, picture: Path, *, well: bool) -> None:
        """After the last step of this process.

        Args:
            picture: progress.png; may be absent.
            well: whether no error ended it; a run that a signal stopped ended well.
        """


class Loggers:
    """Several loggers as one that never raises.

    A full disk or a lost network costs one warning; that logger is then left out, and the training
    goes on.
    """

    def __init__(self, loggers: Iterable[RunLogger], warn: Callable[[str], None]) -> None:
        self._loggers = list(loggers)
        self._warn = warn

    def start(self, run: LoggedRun) -> None:
        """See `RunLogger.start`."""
        self._each(lambda logger: logger.start(run))

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """See `RunLogger.scalars`."""
        self._each(lambda logger: logger.scalars(step, values))

    def finish(self, picture: Path, *, well: bool) -> None:
        """See `RunLogger.finish`."""
        self._each(lambda logger: logger.finish(picture, well=well))

    def _each(self, tell: Callable[[RunLogger], None]) -> None:
        for logger in list(self._loggers):
            try:
                tell(logger)
            except Exception as error:  # whatever a package of somebody else raises
                self._loggers.remove(logger)
                self._warn(
                    f"logger {logger.name} failed ({type(error).__name__}: {error}). The training "
                    "goes on without it; metrics.jsonl has all numbers."
                )


def flat_settings(settings: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """`{"a": {"b": 1}}` -> ("a.b", "1"): as most loggers want settings."""
    for key, value in settings.items():
        if isinstance(value, Mapping) and value:
            yield from flat_settings(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", str(value)


# Event files for TensorBoard, in `tensorboard/` of the run's folder.


class TensorBoardLogger:
    """Writes event files; nothing leaves the machine."""

    name = "tensorboard"

    def start(self, run: LoggedRun) -> None:
        """Another event file; it tells readers to forget what older ones say of later steps."""
        from torch.utils.tensorboard.writer import SummaryWriter

        self._writer = SummaryWriter(
            run.folder / "tensorboard", purge_step=run.resumed_from + 1, flush_secs=30
        )
        if run.resumed_from == 0:
            text = json.dumps(run.settings, indent=1, default=str).replace("\n", "\n    ")
            self._writer.add_text("settings", f"    {text}")

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """One point each."""
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def finish(self, picture: Path, *, well: bool) -> None:
        """All is on the disk."""
        self._writer.close()


# MLflow, into a database in the run's folder unless MLflow's own variable names a server.

EXPERIMENT = "organ-distill"
# Nothing is told to MLflow's makers; a lost server costs half a minute of training, not many.
_DEFAULTS = {
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",
}
_MOST_PARAMETERS, _LONGEST = 100, 500  # what MLflow takes in one request, in one value


class MlflowLogger:
    """One MLflow run per run; after a resume it is the same one."""

    name = "mlflow"

    def start(self, run: LoggedRun) -> None:
        """Opens the MLflow run of this folder, or makes one."""
        for name, value in _DEFAULTS.items():  # read when it is imported
            os.environ.setdefault(name, value)
        from mlflow.entities import Param
        from mlflow.tracking import MlflowClient

        folder, server = run.folder.resolve(), os.environ.get("MLFLOW_TRACKING_URI")
        own = f"sqlite:///{folder / 'mlflow.db'}"  # of files alone, MLflow 3 wants no new ones
        self._client: Any = MlflowClient(tracking_uri=server or own)
        marker = run.folder / "mlflow_run_id"
        self._known = -1
        if marker.exists() and run.resumed_from:
            self._id = marker.read_text(encoding="utf-8").strip()
            self._client.set_terminated(self._id, status="RUNNING")
            # Points cannot be taken back: of steps that come again, the first ones stay.
            points = self._client.get_metric_history(self._id, "loss/total")
            self._known = max((point.step for point in points), default=-1)
            return
        experiment = self._client.get_experiment_by_name(EXPERIMENT)
        if experiment is None:
            place = None if server else (folder / "mlflow_files").as_uri()
            number = self._client.create_experiment(EXPERIMENT, artifact_location=place)
        else:
            number = experiment.experiment_id
        made = self._client.create_run(number, tags={"mlflow.runName": run.name})
        self._id = made.info.run_id
        marker.write_text(self._id + "\n", encoding="utf-8")
        parameters = [Param(_legal(k), v[:_LONGEST]) for k, v in flat_settings(run.settings)]
        for first in range(0, len(parameters), _MOST_PARAMETERS):
            some = parameters[first : first + _MOST_PARAMETERS]
            self._client.log_batch(self._id, params=some)

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """One request for all."""
        from mlflow.entities import Metric

        if step > self._known:
            now = int(time.time() * 1000)
            metrics = [Metric(_legal(name), value, now, step) for name, value in values.items()]
            self._client.log_batch(self._id, metrics=metrics)

    def finish(self, picture: Path, *, well: bool) -> None:
        """The picture, and the state of the run."""
        if picture.exists():
            self._client.log_artifact(self._id, str(picture))
        self._client.set_terminated(self._id, status="FINISHED" if well else "FAILED")


def _legal(name: str) -> str:
    """With what MLflow takes in a name; an organ's may have more."""
    return re.sub(r"[^\w .:/-]", "_", name)


# Weights & Biases, offline unless its own variable WANDB_MODE says otherwise.


class WandbLogger:
    """One W&B run per run; after a resume it has the same id."""

    name = "wandb"

    def start(self, run: LoggedRun) -> None:
        """Opens the W&B run of this folder, or makes one; files go to `wandb/` there."""
        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")  # read when it is imported
        import wandb

        marker = run.folder / "wandb_run_id"
        if not (marker.exists() and run.resumed_from):
            marker.write_text(secrets.token_hex(8) + "\n", encoding="utf-8")
        self._run: Any = wandb.init(
            project=os.environ.get("WANDB_PROJECT", "organ-distill"),
            name=run.name,
            id=marker.read_text(encoding="utf-8").strip(),
            resume="allow",
            dir=str(run.folder),
            mode=os.environ.get("WANDB_MODE", "offline"),
            config=dict(run.settings),
            settings=wandb.Settings(console="off", silent=True),  # standard error has our lines
        )
        # A step of its own: W&B's only grows, and steps after a kill come again.
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """One row."""
        self._run.log({"step": step, **values})

    def finish(self, picture: Path, *, well: bool) -> None:
        """All is on the disk, or sent."""
        self._run.finish(exit_code=0 if well else 1)


# By the names that the command line takes.
LOGGERS: dict[str, Callable[[], RunLogger]] = {
    logger.name: logger for logger in (TensorBoardLogger, MlflowLogger, WandbLogger)
}


def open_loggers(names: Sequence[str]) -> list[RunLogger]:
    """Loggers of these names, each once; nothing is written yet.

    Raises:
        ConfigError: no such logger, or its package is not installed.
    """
    wanted = list(dict.fromkeys(names))
    for name in wanted:
        if name not in LOGGERS:
            raise ConfigError(
                f"there is no logger {name!r}.",
                where="--logger",
                fix=f"Choose among {', '.join(LOGGERS)}; metrics.jsonl is always written.",
            )
        if find_spec(name) is None:  # each is named as the package that it needs
            raise ConfigError(
                f"logger {name} needs a package that is not installed.",
                where="--logger",
                fix=f"Install it: pip install 'organ-distill[{name}]'.",
            )
    return [LOGGERS[name]() for name in wanted]
