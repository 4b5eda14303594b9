"""MLflow, into files of the run's folder unless MLflow's own variable names a server."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pipeline.student.loggers.run_logger import LoggedRun, flat_settings

EXPERIMENT = "organ-distill"
_MOST_PARAMETERS, _LONGEST = 100, 500  # what MLflow takes in one request, in one value


class MlflowLogger:
    """One MLflow run per run; after a resume it is the same one."""

    name = "mlflow"

    def start(self, run: LoggedRun) -> None:
        """Opens the MLflow run of this folder, or makes one."""
        from mlflow.entities import Param
        from mlflow.tracking import MlflowClient

        self._client: Any = MlflowClient(tracking_uri=_tracking_uri(run.folder))
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
        number = experiment.experiment_id if experiment else self._make_experiment()
        made = self._client.create_run(number, tags={"mlflow.runName": run.name})
        self._id = made.info.run_id
        marker.write_text(self._id + "\n", encoding="utf-8")
        parameters = [Param(k, v[:_LONGEST]) for k, v in flat_settings(run.settings)]
        for first in range(0, len(parameters), _MOST_PARAMETERS):
            some = parameters[first : first + _MOST_PARAMETERS]
            self._client.log_batch(self._id, params=some)

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """One request for all."""
        from mlflow.entities import Metric

        if step > self._known:
            now = int(time.time() * 1000)
            metrics = [Metric(name, value, now, step) for name, value in values.items()]
            self._client.log_batch(self._id, metrics=metrics)

    def finish(self, picture: Path, *, well: bool) -> None:
        """The picture, and the state of the run."""
        if picture.exists():
            self._client.log_artifact(self._id, str(picture))
        self._client.set_terminated(self._id, status="FINISHED" if well else "FAILED")

    def _make_experiment(self) -> str:
        made: str = self._client.create_experiment(EXPERIMENT)
        return made


def _tracking_uri(folder: Path) -> str:
    return os.environ.get("MLFLOW_TRACKING_URI") or (folder.resolve() / "mlruns").as_uri()
