"""MLflow, into a database in the run's folder unless MLflow's own variable names a server."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pipeline.student.loggers.run_logger import LoggedRun, flat_settings

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
