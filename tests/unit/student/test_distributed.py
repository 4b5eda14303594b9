"""Several processes: their arithmetic in one process, and two of them over gloo."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from pipeline.errors import ConfigError
from pipeline.log import Log
from pipeline.networks.tensor_file import load_sealed
from pipeline.student import distributed
from pipeline.student.checkpoint import training_checkpoints
from pipeline.student.distributed import ALONE, Processes, Silent, launched, refuse_several
from pipeline.student.progress import metric_lines, without_timing
from tests.unit.student.ranks import STEPS, Scenario, Told, start, together
from tests.unit.student.same import assert_same


def newest(folder: str) -> dict[str, Any]:
    state: dict[str, Any] = load_sealed(training_checkpoints(Path(folder) / "checkpoints")[-1])
    return state


def losses(folder: str) -> list[float]:
    lines = (Path(folder) / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line)["loss"] for line in lines if "loss" in json.loads(line)]


def numbers_of(folder: str) -> list[dict[str, Any]]:
    return without_timing(metric_lines(Path(folder) / "metrics.jsonl"))


@dataclass(frozen=True)
class Straight:
    """Two processes that nothing disturbed, with dropout."""

    scenario: Scenario
    told: list[Told]


@pytest.fixture(scope="module")
def scene(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Scenario]:
    """A scenario in a folder of its own, on the same cases."""
    cases = tmp_path_factory.mktemp("cases")

    def make(**what: Any) -> Scenario:
        return Scenario(str(cases), str(tmp_path_factory.mktemp("run") / "run"), **what)

    start(make(every_step=True))  # the cases are there before two processes want to write them
    return make


@pytest.fixture(scope="module")
def straight(scene: Callable[..., Scenario]) -> Straight:
    scenario = scene(dropout=0.2)
    return Straight(scenario, together(scenario))


class TestTwoProcesses:
    def test_both_finish_and_one_writes(self, straight: Straight) -> None:
        assert [told.code for told in straight.told] == [0, 0], straight.told
        assert [told.step for told in straight.told] == [STEPS, STEPS]
        assert "metrics.jsonl" in straight.told[0].wrote
        assert straight.told[1].wrote == ()

    def test_losses_and_weights_are_those_of_one_process(
        self, scene: Callable[..., Scenario]
    ) -> None:
        two, one = scene(sgd=True), scene(sgd=True)
        assert [told.code for told in together(two)] == [0, 0]
        start(one)
        assert losses(two.folder) == pytest.approx(losses(one.folder), rel=1e-5)
        ours, theirs = newest(two.folder)["network"], newest(one.folder)["network"]
        for name in theirs:
            assert torch.allclose(ours[name], theirs[name], rtol=1e-4, atol=1e-6), name
        dice = [
            [line["validation_dice"] for line in numbers_of(s.folder) if "loss" not in line]
            for s in (two, one)
        ]
        assert len(dice[0]) == 2
        assert dice[0] == dice[1]

    def test_a_signal_to_one_stops_both_and_a_kill_of_one_ends_both_and_they_resume_exactly(
        self, scene: Callable[..., Scenario], straight: Straight
    ) -> None:
        scenario = scene(dropout=0.2, signal=(1, 2))
        stopped = together(scenario)
        assert [(told.code, told.step) for told in stopped] == [(0, 2), (0, 2)]
        names = [p.name for p in training_checkpoints(Path(scenario.folder) / "checkpoints")]
        assert names == ["step_00000002.pt"]
        killed = together(replace(scenario, signal=None, kill=(1, 4), every_step=True))
        assert killed[1].code == -9
        assert killed[0].code == 1
        assert "process 0 of 2: another process ended or did not answer" in killed[0].error
        assert killed[0].seconds < 20
        assert newest(scenario.folder)["step"] == 3
        assert [told.code for told in together(replace(scenario, signal=None))] == [0, 0]
        assert_same(newest(scenario.folder), newest(straight.scenario.folder))
        assert len(newest(scenario.folder)["rng"]) == 2
        assert numbers_of(scenario.folder) == numbers_of(straight.scenario.folder)

    def test_nan_in_one_stops_both_naming_the_cases_of_both(
        self, scene: Callable[..., Scenario]
    ) -> None:
        scenario = scene(nan=(1, 3), every_step=True)
        told = together(scenario)
        assert [t.code for t in told] == [1, 1]
        for one in told:
            assert "step 3, with cases " in one.error
            assert one.error.split("with cases ")[1].split(": ")[0].count("-ct/") == 2
            assert "the loss became NaN in" in one.error
        state = newest(scenario.folder)
        assert state["step"] == 2
        assert all(torch.isfinite(w).all() for w in state["network"].values())

    def test_a_gradient_of_nan_in_one_stops_both(self, scene: Callable[..., Scenario]) -> None:
        told = together(scene(steep=(1, 2)))
        assert [t.code for t in told] == [1, 1]
        for one in told:
            assert ": the gradient became NaN, although the loss is finite." in one.error

    def test_a_sample_that_one_cannot_read_stops_both(self, scene: Callable[..., Scenario]) -> None:
        told = together(scene(error=(1, 2)))
        assert [t.code for t in told] == [1, 1]
        assert told[1].error == "liver-ct/a: a chunk cannot be decoded."
        assert told[0].error == "liver-ct/a: process 1 of 2 failed: a chunk cannot be decoded."

    def test_another_number_of_processes_goes_on_and_says_not_bit_for_bit(
        self, scene: Callable[..., Scenario], capsys: pytest.CaptureFixture[str]
    ) -> None:
        scenario = scene(signal=(0, 5))
        together(scenario)
        assert start(replace(scenario, signal=None)).finished
        assert "of 2 processes, now there are 1" in capsys.readouterr().err


class TestAveraging:
    """The other process has the same gradients plus 2."""

    @pytest.fixture
    def sent(self, monkeypatch: pytest.MonkeyPatch) -> list[int]:
        """Numbers in each message, as it is sent."""
        numel: list[int] = []

        def all_reduce(flat: torch.Tensor, async_op: bool) -> SimpleNamespace:
            numel.append(flat.numel())
            return SimpleNamespace(wait=lambda: flat.mul_(2).add_(2))

        monkeypatch.setattr(torch.distributed, "all_reduce", all_reduce)
        monkeypatch.setattr(distributed, "_BUCKET_BYTES", 1)  # a bucket for each weight
        return numel

    def test_gradients_travel_while_the_first_layers_have_none_yet(self, sent: list[int]) -> None:
        first, last = nn.Linear(3, 2, bias=False), nn.Linear(2, 4, bias=False)
        unused = nn.Parameter(torch.ones(5))
        seen: list[list[int]] = []
        first.register_full_backward_pre_hook(lambda *_: seen.append(list(sent)))
        loss = last(first(torch.ones(1, 3))).sum()
        with Processes(0, 2).averaging([last.weight, first.weight, unused]):
            loss.backward()
        assert seen == [[1 + 8]]
        assert sent == [1 + 8, 1 + 6, 1 + 5]

    def test_mean_over_all_and_one_without_a_gradient_counts_as_0(self, sent: list[int]) -> None:
        used, unused, fixed = (nn.Parameter(torch.ones(2)) for _ in range(3))
        fixed.requires_grad_(False)
        with Processes(0, 2).averaging([unused, used, fixed]):
            (3 * used).sum().backward()
        assert used.grad.tolist() == [4.0, 4.0]
        assert unused.grad.tolist() == [1.0, 1.0]
        assert fixed.grad is None

    def test_nothing_is_sent_after_an_error_and_no_hook_stays(self, sent: list[int]) -> None:
        weight = nn.Parameter(torch.ones(2))
        with pytest.raises(ValueError, match="no"), Processes(0, 2).averaging([weight]):
            raise ValueError("no")
        weight.sum().backward()
        assert sent == []


class TestLaunched:
    def test_alone(self) -> None:
        assert launched({}) == ALONE
        # A batch script of four tasks that calls no srun.
        assert launched({"SLURM_PROCID": "0", "SLURM_NTASKS": "4", "SLURM_LOCALID": "0"}) == ALONE

    def test_torchrun(self) -> None:
        found = launched({"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1"})
        assert found == Processes(3, 4, 1)

    def test_srun(self) -> None:
        environment = {"SLURM_PROCID": "1", "SLURM_STEP_NUM_TASKS": "2", "SLURM_LOCALID": "1"}
        assert launched(environment) == Processes(1, 2, 1)

    def test_torchrun_within_srun(self) -> None:
        srun = {"SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "1", "SLURM_LOCALID": "0"}
        assert launched({**srun, "RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1"}).size == 2

    def test_what_one_process_does_is_refused_to_several(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        refuse_several("train-teachers")
        monkeypatch.setenv("RANK", "0")
        monkeypatch.setenv("WORLD_SIZE", "2")
        with pytest.raises(ConfigError, match="train-teachers: it runs in one process, and 2"):
            refuse_several("train-teachers")


class TestRefusals:
    def test_batch_norm(self) -> None:
        network = nn.Sequential(nn.Conv3d(1, 2, 1), nn.BatchNorm3d(2))
        ALONE.check_network(network)
        with pytest.raises(ConfigError, match="batch norm"):
            Processes(0, 2).check_network(network)
        Processes(0, 2).check_network(nn.Sequential(nn.InstanceNorm3d(2)))

    def test_the_others_are_silent(self, capsys: pytest.CaptureFixture[str]) -> None:
        log = Log(quiet=False)
        assert Processes(0, 2).log(log) is log
        silent = Processes(1, 2).log(log)
        silent.info("info")
        silent.warn("warning")
        assert isinstance(silent, Silent)
        assert capsys.readouterr().err == ""
