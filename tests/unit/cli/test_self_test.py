"""The self-test: that an exact resume passes, and that it sees each way of not being exact."""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from pipeline.cli import app as cli
from pipeline.cli import self_test as tested
from pipeline.cli.self_test import (
    Attempt,
    Setup,
    metrics_difference,
    self_test,
    state_digests,
    train_until_killed,
)
from pipeline.errors import CacheMissing, PipelineError
from pipeline.log import Log
from pipeline.student import resume, training
from pipeline.student.resume import RunFolder
from pipeline.student.speed import TrainingExecution
from stages.train_student import TrainStudentConfig
from tests.stages.stage_contract import snapshot
from tests.tiny import NETWORK, TAP, training_settings, work_of

STEPS = 7


@pytest.fixture(scope="module")
def setup(built_cache: Path) -> Setup:
    """Steps with features and with dropout, whose masks come from the global random state."""
    values = training_settings(
        steps=STEPS,
        batch_size=2,
        validate_every=3,
        network={"name": "UNet", "args": {**NETWORK.args, "dropout": 0.2}},
        supervision={"features": {"student_taps": [TAP]}},
    )
    config = TrainStudentConfig.model_validate({"training": values})
    return Setup(config, built_cache, str(work_of(built_cache)), TrainingExecution("cpu"))


def without_random_state(attempt: Attempt) -> None:
    resume.set_random_state = lambda *args: None
    train_until_killed(attempt)


def without_optimiser_state(attempt: Attempt) -> None:
    real = RunFolder.restore

    def restore(run: RunFolder, state: Any, log: Log) -> int:
        fresh = state.optimiser.state_dict()
        step = real(run, state, log)
        state.optimiser.load_state_dict(fresh)
        return step

    RunFolder.restore = restore  # type: ignore[method-assign]
    train_until_killed(attempt)


def with_another_batch(attempt: Attempt) -> None:
    real = training.loaded_batches

    def batches(data: Any, start: int, *rest: Any) -> Any:
        return real(data, 0 if start else start, *rest)

    training.loaded_batches = batches
    train_until_killed(attempt)


def failing(attempt: Attempt) -> None:
    train_until_killed(
        replace(attempt, setup=replace(attempt.setup, execution=TrainingExecution("cuda:99")))
    )


def test_an_exact_resume_passes_and_leaves_the_work_folder_alone(setup: Setup) -> None:
    before = snapshot(Path(setup.work))
    rows = self_test(setup, kills=2, seed=3, log=Log(quiet=True))
    assert [row.difference for row in rows] == ["", "", "", ""]
    assert [row.killed for row in rows] == [False, True, True, False]
    assert rows[0].reached == rows[-1].reached == STEPS
    assert len({row.workers for row in rows}) > 1
    for earlier, later in pairwise(rows[1:]):
        assert later.resumed_from == earlier.reached
        assert 0 < later.resumed_from < STEPS
    assert snapshot(Path(setup.work)) == before


@pytest.mark.parametrize(
    "train_once", [without_random_state, without_optimiser_state, with_another_batch]
)
def test_what_is_not_exact_is_named(
    setup: Setup, monkeypatch: pytest.MonkeyPatch, train_once: Any
) -> None:
    monkeypatch.setattr(tested, "WORKERS", (0,))
    monkeypatch.setattr(tested, "_repeats", lambda *args: True)  # the one above is run for real
    short = setup.config.training.model_copy(update={"steps": 4})
    setup = replace(setup, config=setup.config.model_copy(update={"training": short}))
    rows = self_test(setup, kills=1, seed=3, log=Log(quiet=True), train_once=train_once)
    difference = rows[-1].difference
    assert difference.startswith("network.network.model.")
    assert f"after step {rows[-1].resumed_from + 1}" in difference


def test_a_training_that_fails_says_why(setup: Setup) -> None:
    with pytest.raises(PipelineError, match="torch sees no CUDA GPU"):
        self_test(setup, kills=1, seed=0, log=Log(quiet=True), train_once=failing)


def test_digests_name_every_tensor_and_tell_a_bit() -> None:
    state = {"a": {"b": [torch.zeros(3), 1.5]}, "c": torch.zeros(2, dtype=torch.uint8)}
    found = dict(state_digests(state))
    assert set(found) == {"a.b[0]", "a.b[1]", "c"}
    state["a"]["b"][0][1] = -0.0  # type: ignore[index]
    changed = dict(state_digests(state))
    assert [name for name in found if found[name] != changed[name]] == ["a.b[0]"]


class TestTheCommand:
    def _run(self, monkeypatch: pytest.MonkeyPatch, *arguments: str) -> None:
        monkeypatch.setattr("sys.argv", ["pipeline", "train-student", "-q", *arguments])
        cli.app(standalone_mode=False)

    def _rows(self, monkeypatch: pytest.MonkeyPatch, difference: str) -> list[Setup]:
        seen: list[Setup] = []

        def found(setup: Setup, **rest: Any) -> list[tested.Row]:
            seen.append(setup)
            return [
                tested.Row(0, 0, setup.config.training.steps, killed=False),
                tested.Row(2, 0, 3, killed=True, difference=difference),
            ]

        monkeypatch.setattr(tested, "self_test", found)
        return seen

    def test_it_prints_a_table_of_the_users_own_setup(
        self,
        built_cache: Path,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
        capsys: pytest.CaptureFixture[str],
    ) -> None:
        seen = self._rows(monkeypatch, "")
        config = tmp_path / "student.yaml"
        config.write_text(yaml.safe_dump({"training": training_settings(seed=17)}))
        work = str(work_of(built_cache))
        self._run(
            monkeypatch, "--self-test", "--steps", "9", "--seed", "5", "--workers", "2",
            "-r", str(built_cache), "-w", work, "-c", str(config),
        )  # fmt: skip
        assert seen[0].config.training.seed == 17
        assert (seen[0].config.training.steps, seen[0].execution.workers) == (9, 2)
        assert seen[0].work == work
        out = capsys.readouterr().out
        assert "9 steps, seed 5" in out
        assert "SIGKILL" in out

    def test_a_difference_is_an_error_that_names_it(
        self, built_cache: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        self._rows(monkeypatch, "network.a.weight after step 4")
        with pytest.raises(PipelineError, match=r"network\.a\.weight after step 4") as caught:
            self._run(
                monkeypatch, "--self-test", "-r", str(built_cache), "-w", str(work_of(built_cache))
            )
        assert caught.value.exit_code == 1

    def test_settings_without_a_cache_are_not_tried_on_another(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        config = tmp_path / "student.yaml"
        config.write_text("run: x\n")
        with pytest.raises(CacheMissing, match="no cache to try these settings on"):
            self._run(
                monkeypatch, "--self-test", "-c", str(config), "-w", str(tmp_path / "nowhere")
            )

    def test_without_a_cache_one_is_made_up(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        seen = self._rows(monkeypatch, "")
        self._run(monkeypatch, "--self-test", "-w", str(tmp_path / "nowhere"))
        assert not Path(seen[0].registry).exists()
        assert list(tmp_path.iterdir()) == []


def test_wall_clock_fields_may_differ(tmp_path: Path) -> None:
    for name, seconds in (("a", 1.0), ("b", 2.0)):
        line = {"step": 1, "loss": 0.5, "timing": {"seconds": seconds}}
        (tmp_path / name).mkdir()
        (tmp_path / name / "metrics.jsonl").write_text(json.dumps(line) + "\n")
    assert metrics_difference(tmp_path / "a", tmp_path / "b") == ""
    (tmp_path / "b" / "metrics.jsonl").write_text(json.dumps({"step": 1, "loss": 0.6}) + "\n")
    assert metrics_difference(tmp_path / "a", tmp_path / "b") == "metrics.jsonl, line 1"
