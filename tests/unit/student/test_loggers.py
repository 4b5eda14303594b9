"""Loggers beside metrics.jsonl: TensorBoard by its own reader, the others by fake packages."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from pipeline.student.loggers import (
    _DEFAULTS,
    LOGGERS,
    LoggedRun,
    MlflowLogger,
    TensorBoardLogger,
    WandbLogger,
    open_loggers,
)
from pipeline.student.progress import followed

SETTINGS = {
    "config": {"steps": 4, "patch": [8, 8, 8], "none": {}},
    "inputs": {"cases": {"a (b)": "1"}},
}


class Recorder:
    """A logger that keeps what it hears, and breaks when told to."""

    name = "recorder"

    def __init__(self, breaks_at: str = "") -> None:
        self.heard: list[Any] = []
        self._breaks_at = breaks_at

    def _hear(self, what: str, *more: Any) -> None:
        self.heard.append((what, *more))
        if what == self._breaks_at:
            raise ConnectionError("the network is gone")

    def start(self, run: LoggedRun) -> None:
        self._hear("start", run)

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        self._hear("scalars", step, dict(values))

    def finish(self, picture: Path, *, well: bool) -> None:
        self._hear("finish", picture, well)


def train_a_little(folder: Path, *loggers: Any, start: int = 0, until: int = 4) -> list[str]:
    """Steps with loss 1/step, a validation every second one; returns the warnings."""
    said: list[str] = []
    run = LoggedRun(folder.name, folder, SETTINGS, start)
    with followed(run, 2, said.append, loggers) as metrics:
        for step in range(start + 1, until + 1):
            loss = 1 / step
            metrics.add(step, loss=loss, terms={"dice": loss}, lr=0.1, gradient_norm=1.0)
            if step % 2 == 0:
                metrics.add_validation(step, {"liver": step / 10, "spleen": None})
    return said


class TestFollowed:
    def test_a_logger_hears_means_of_windows_and_validations(self, tmp_path: Path) -> None:
        recorder = Recorder()
        assert train_a_little(tmp_path, recorder) == []
        start, *scalars, finish = recorder.heard
        assert start == ("start", LoggedRun(tmp_path.name, tmp_path, SETTINGS, 0))
        assert [step for _, step, _ in scalars] == [2, 2, 4, 4]
        assert scalars[0][2] == pytest.approx(
            {"loss/dice": 0.75, "loss/total": 0.75, "gradient_norm": 1.0, "lr": 0.1}
        )
        assert scalars[1][2] == {"dice/liver": 0.2, "dice/mean": 0.2}
        assert finish == ("finish", tmp_path / "progress.png", True)

    @pytest.mark.parametrize("where", ["start", "scalars", "finish"])
    def test_one_that_breaks_costs_one_warning_and_nothing_else(
        self, tmp_path: Path, where: str
    ) -> None:
        broken, good = Recorder(where), Recorder()
        (warning,) = train_a_little(tmp_path, broken, good)
        assert "logger recorder failed (ConnectionError: the network is gone)" in warning
        assert sum(what == where for what, *_ in broken.heard) == 1
        assert broken.heard[-1][0] == where
        assert [what for what, *_ in good.heard] == ["start", *["scalars"] * 4, "finish"]
        assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 6

    def test_an_error_in_the_training_is_told_and_its_lines_are_kept(self, tmp_path: Path) -> None:
        recorder = Recorder()

        def train() -> None:
            run = LoggedRun("run", tmp_path, {}, 0)
            with followed(run, 1, print, [recorder]) as metrics:
                metrics.add(1, loss=1.0, terms={}, lr=0.1, gradient_norm=1.0)
                raise KeyError

        with pytest.raises(KeyError):
            train()
        assert recorder.heard[-1] == ("finish", tmp_path / "progress.png", False)
        assert '"step": 1' in (tmp_path / "metrics.jsonl").read_text()


class TestByName:
    def test_each_once_in_their_order(self) -> None:
        found = open_loggers(["tensorboard", "tensorboard"])
        assert [logger.name for logger in found] == ["tensorboard"]
        assert all(make().name == name for name, make in LOGGERS.items())


class TestTensorBoard:
    def read(self, folder: Path) -> dict[str, list[tuple[int, float]]]:
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

        events = EventAccumulator(str(folder / "tensorboard"), size_guidance={"scalars": 0})
        events.Reload()
        return {
            tag: [(point.step, round(point.value, 5)) for point in events.Scalars(tag)]
            for tag in events.Tags()["scalars"]
        }

    def test_its_own_reader_finds_the_numbers(self, tmp_path: Path) -> None:
        assert train_a_little(tmp_path, TensorBoardLogger()) == []
        found = self.read(tmp_path)
        assert found["loss/total"] == [(2, 0.75), (4, 0.29167)]
        assert found["dice/liver"] == [(2, 0.2), (4, 0.4)]
        assert set(found) == {
            "loss/total", "loss/dice", "dice/liver", "dice/mean", "lr", "gradient_norm",
        }  # fmt: skip

    @pytest.mark.parametrize("start", [0, 2])
    def test_steps_that_come_again_after_a_kill_are_there_once(
        self, tmp_path: Path, start: int
    ) -> None:
        train_a_little(tmp_path, TensorBoardLogger(), until=4)
        train_a_little(tmp_path, TensorBoardLogger(), start=start, until=6)
        assert [step for step, _ in self.read(tmp_path)["dice/liver"]] == [2, 4, 6]
        assert len(list((tmp_path / "tensorboard").iterdir())) == 2


class FakeMlflow:
    """As much of MLflow's client as is used, in memory."""

    def __init__(self) -> None:
        self.uris: list[str] = []
        self.places: list[str | None] = []
        self.runs: dict[str, dict[str, Any]] = {}
        self.experiment: SimpleNamespace | None = None

    def install(self, monkeypatch: pytest.MonkeyPatch) -> None:
        entities, tracking = ModuleType("mlflow.entities"), ModuleType("mlflow.tracking")
        entities.Param = lambda key, value: (key, value)  # type: ignore[attr-defined]
        entities.Metric = lambda key, value, time, step: SimpleNamespace(  # type: ignore[attr-defined]
            key=key, value=value, step=step
        )
        tracking.MlflowClient = self.client  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, "mlflow", ModuleType("mlflow"))
        monkeypatch.setitem(sys.modules, "mlflow.entities", entities)
        monkeypatch.setitem(sys.modules, "mlflow.tracking", tracking)

    def client(self, tracking_uri: str) -> FakeMlflow:
        self.uris.append(tracking_uri)
        return self

    def get_experiment_by_name(self, name: str) -> SimpleNamespace | None:
        return self.experiment

    def create_experiment(self, name: str, artifact_location: str | None) -> str:
        self.places.append(artifact_location)
        self.experiment = SimpleNamespace(experiment_id="7")
        return "7"

    def create_run(self, experiment: str, tags: Mapping[str, str]) -> SimpleNamespace:
        run_id = f"run{len(self.runs)}"
        self.runs[run_id] = {"tags": tags, "params": [], "metrics": [], "status": "RUNNING"}
        return SimpleNamespace(info=SimpleNamespace(run_id=run_id))

    def log_batch(self, run_id: str, metrics: Any = (), params: Any = ()) -> None:
        assert len(params) <= 100
        self.runs[run_id]["metrics"] += list(metrics)
        self.runs[run_id]["params"] += list(params)

    def get_metric_history(self, run_id: str, key: str) -> list[Any]:
        return [point for point in self.runs[run_id]["metrics"] if point.key == key]

    def set_terminated(self, run_id: str, status: str) -> None:
        self.runs[run_id]["status"] = status

    def log_artifact(self, run_id: str, path: str) -> None:
        self.runs[run_id]["artifact"] = path


class TestMlflow:
    @pytest.fixture
    def fake(self, monkeypatch: pytest.MonkeyPatch) -> FakeMlflow:
        monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
        for name in _DEFAULTS:
            monkeypatch.setenv(name, "")  # so that what is set is taken back
            monkeypatch.delenv(name)
        fake = FakeMlflow()
        fake.install(monkeypatch)
        return fake

    def test_files_of_the_run_unless_a_server_is_named(
        self, fake: FakeMlflow, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        train_a_little(tmp_path / "a", MlflowLogger())
        monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://there:5000")
        train_a_little(tmp_path / "b", MlflowLogger())
        assert fake.uris == [f"sqlite:///{tmp_path / 'a' / 'mlflow.db'}", "http://there:5000"]
        assert fake.places == [(tmp_path / "a" / "mlflow_files").as_uri()]
        assert os.environ["MLFLOW_DISABLE_TELEMETRY"] == "true"

    def test_one_run_through_a_resume_with_every_step_once(
        self, fake: FakeMlflow, tmp_path: Path
    ) -> None:
        (tmp_path / "progress.png").write_bytes(b"png")
        assert train_a_little(tmp_path, MlflowLogger(), until=4) == []
        assert train_a_little(tmp_path, MlflowLogger(), start=2, until=6) == []
        (run,) = fake.runs.values()
        assert [p.step for p in run["metrics"] if p.key == "dice/liver"] == [2, 4, 6]
        assert [p.step for p in run["metrics"] if p.key == "loss/total"] == [2, 4, 6]
        assert ("config.steps", "4") in run["params"]
        assert ("inputs.cases.a _b_", "1") in run["params"]  # brackets are refused by MLflow
        assert run["status"] == "FINISHED"
        assert run["artifact"].endswith("progress.png")

    def test_a_run_that_starts_over_is_another_one(self, fake: FakeMlflow, tmp_path: Path) -> None:
        train_a_little(tmp_path, MlflowLogger(), until=2)
        train_a_little(tmp_path, MlflowLogger(), until=2)
        assert len(fake.runs) == 2


class TestWandb:
    def test_offline_with_one_id_through_a_resume(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        for name in ("WANDB_MODE", "WANDB_PROJECT", "WANDB_ERROR_REPORTING"):
            monkeypatch.setenv(name, "")  # so that what is set is taken back
            monkeypatch.delenv(name)
        opened: list[dict[str, Any]] = []
        rows: list[dict[str, Any]] = []
        ends: list[int] = []
        fake = ModuleType("wandb")

        def init(**options: Any) -> SimpleNamespace:
            opened.append(options)
            return SimpleNamespace(
                log=rows.append,
                define_metric=lambda *args, **more: None,
                finish=lambda exit_code: ends.append(exit_code),
            )

        fake.Settings = SimpleNamespace  # type: ignore[attr-defined]
        fake.init = init  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, "wandb", fake)
        assert train_a_little(tmp_path, WandbLogger(), until=2) == []
        assert train_a_little(tmp_path, WandbLogger(), start=2, until=4) == []
        assert [options["mode"] for options in opened] == ["offline"] * 2
        assert opened[0]["id"] == opened[1]["id"]
        assert opened[0]["config"] == SETTINGS
        assert [row["step"] for row in rows if "dice/liver" in row] == [2, 4]
        assert ends == [0, 0]
