from __future__ import annotations

import json
import math
import multiprocessing
import os
import re
import signal
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from itertools import count, pairwise
from pathlib import Path
from threading import Thread
from typing import Any

import pytest
import torch
from torch.nn.modules.module import register_module_forward_pre_hook
from torch.optim.optimizer import register_optimizer_step_post_hook

from pipeline.errors import CheckpointError, ConfigError, PipelineError
from pipeline.log import Log
from pipeline.student.checkpoint import training_checkpoints
from pipeline.student.dataset import forks_of_a_server
from pipeline.student.inputs import TrainingInputs
from pipeline.student.network import CachedTap, StudentNetwork
from pipeline.student.progress import without_timing
from pipeline.student.resume import RunFolder, stop_signals
from pipeline.student.settings import OptimiserConfig, TrainingConfig, run_digest
from pipeline.student.speed import SpeedFlags, TrainingExecution
from pipeline.student.training import Trained, train
from tests.tiny import NETWORK, at_step
from tests.unit.student.coded import CHANNELS, SPACE, STRIDE, TAP, write_case
from tests.unit.student.fixed import changed_loss
from tests.unit.student.ranks import steep
from tests.unit.student.same import assert_same

STEPS = 8
STUDENT_TAP = "model.0.conv"
INPUTS = {"cases": {"liver-ct/a": "digest"}}
NEVER = 1e9
KeepBest = Callable[[Any, int, Mapping[str, float | None]], None]


def settings(*, features: bool = False, **changes: Any) -> TrainingConfig:
    """Eight steps of a network with dropout, whose masks come from the global random state."""
    values: dict[str, Any] = {
        "network": {"name": "UNet", "args": {**NETWORK.args, "dropout": 0.2}},
        "intensity": {"kind": "zscore", "window_hu": [-1024, 9000], "mean_hu": 4e3, "std_hu": 3e3},
        "patch": [8, 8, 8],
        "batch_size": 2,
        "steps": STEPS,
        "seed": 5,
        "validate_every": 3,
        "supervision": {"features": {"student_taps": [STUDENT_TAP] if features else []}},
    }
    return TrainingConfig.model_validate(values | changes)


class _Watched(RunFolder):
    """Tells what would be kept as best.pt."""

    keep_best: KeepBest

    def save_student(
        self, name: str, network: Any, step: int, scores: Mapping[str, float | None]
    ) -> None:
        self.keep_best(network, step, scores)


def start(
    cases: Path,
    folder: Path,
    *,
    features: bool = False,
    workers: int = 0,
    minutes: float = NEVER,
    config: TrainingConfig | None = None,
    inputs: Mapping[str, Any] = INPUTS,
    flags: SpeedFlags | None = None,
    keep_best: KeepBest | None = None,
    log: Log | None = None,
) -> Trained:
    """Trains, or goes on, with one thread, so that sums are made in one order everywhere."""
    torch.set_num_threads(1)
    found = [
        write_case(cases, "liver-ct/a"),
        write_case(cases, "spleen-ct/b", annotated=("spleen",)),
    ]
    taps = {TAP: CachedTap(CHANNELS, STRIDE, (0,))} if features else {}
    run = RunFolder(folder, pictures=False)
    if keep_best is not None:
        run = _Watched(
            folder, record=lambda step, scores: pytest.fail("not asked for"), pictures=False
        )
        run.keep_best = keep_best
    return train(
        config or settings(features=features),
        TrainingInputs(found, found[:1], SPACE, inputs, taps),
        run,
        TrainingExecution("cpu", workers, flags or SpeedFlags(), checkpoint_minutes=minutes),
        log or Log(quiet=True),
    )


@dataclass(frozen=True)
class Straight:
    """A run that nothing disturbed."""

    folder: Path
    trained: Trained


@pytest.fixture(scope="module", autouse=True)
def _threads_as_before() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def cases(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cases")


@pytest.fixture(scope="module")
def straight(cases: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[bool, Straight]:
    """Without and with features."""
    found = {}
    for features in (False, True):
        folder = tmp_path_factory.mktemp("straight")
        found[features] = Straight(folder, start(cases, folder, features=features))
    return found


def newest(folder: Path) -> dict[str, Any]:
    content: dict[str, Any] = torch.load(
        training_checkpoints(folder / "checkpoints")[-1], weights_only=True
    )
    return content


def _signalled_with_its_loaders(cases: Path, folder: Path) -> None:
    """Trains with a loader process; in the fourth step both get SIGTERM. Runs in a process of its
    own, which ends with the step that it came to."""

    def fatal() -> None:
        (loader,) = multiprocessing.active_children()
        assert loader.pid is not None
        os.kill(loader.pid, signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)

    with at_step(4, fatal):
        raise SystemExit(start(cases, folder, workers=1).step)


def lines_of(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def numbers_of(folder: Path) -> list[dict[str, Any]]:
    """What must be the same in an interrupted and an undisturbed run."""
    return without_timing(lines_of(folder))


@pytest.mark.usefixtures("ctrl_c")
class TestResume:
    """Kills are the self-test's, and its negative controls' (tests/unit/cli/test_self_test.py)."""

    @pytest.mark.parametrize(
        ("name", "features", "workers"),
        [("SIGTERM", True, 0), ("SIGUSR1", False, 1), ("SIGINT", False, 0)],
    )
    def test_stopped_by_a_signal_and_gone_on_is_bit_for_bit_the_undisturbed_run(
        self,
        cases: Path,
        straight: dict[bool, Straight],
        tmp_path: Path,
        name: str,
        features: bool,
        workers: int,
    ) -> None:
        with at_step(4, lambda: os.kill(os.getpid(), signal.Signals[name])):
            stopped = start(cases, tmp_path, features=features)
        assert (stopped.step, stopped.finished) == (4, False)
        assert newest(tmp_path)["step"] == 4
        torch.manual_seed(999)
        trained = start(cases, tmp_path, features=features, workers=workers)
        undisturbed = straight[features]
        assert trained.finished
        assert_same(newest(tmp_path), newest(undisturbed.folder))
        assert_same(
            dict(trained.network.state_dict()), dict(undisturbed.trained.network.state_dict())
        )
        assert trained.validation_dice == undisturbed.trained.validation_dice
        assert numbers_of(tmp_path) == numbers_of(undisturbed.folder)

    def test_loader_processes_outlive_a_signal_to_the_whole_job(
        self, cases: Path, tmp_path: Path
    ) -> None:
        """SIGTERM; what Ctrl-C does to them is in tests/stages/test_train_student.py."""
        process = forks_of_a_server().Process(
            target=_signalled_with_its_loaders, args=(cases, tmp_path)
        )
        process.start()
        process.join(100)
        assert process.exitcode == 4
        assert newest(tmp_path)["step"] == 4

    def test_a_damaged_newest_checkpoint_costs_only_its_steps(
        self,
        cases: Path,
        straight: dict[bool, Straight],
        tmp_path: Path,
        capsys: pytest.CaptureFixture[str],
    ) -> None:
        start(cases, tmp_path, minutes=0.0)
        paths = training_checkpoints(tmp_path / "checkpoints")
        assert [p.name for p in paths] == ["step_00000007.pt", "step_00000008.pt"]
        paths[-1].write_bytes(paths[-1].read_bytes()[:-100])
        capsys.readouterr()
        trained = start(cases, tmp_path)
        warning = capsys.readouterr().err
        assert "step_00000008.pt" in warning
        assert "The checkpoint before it is used." in warning
        assert trained.finished
        assert_same(newest(tmp_path), newest(straight[False].folder))
        assert numbers_of(tmp_path) == numbers_of(straight[False].folder)

    def test_a_finished_run_is_left_as_it_is(
        self, cases: Path, straight: dict[bool, Straight], reads: list[tuple[str, int]]
    ) -> None:
        folder, trained = straight[False].folder, straight[False].trained
        before = {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}
        again = start(cases, folder)
        assert (again.step, again.finished) == (STEPS, True)
        assert not reads  # no validation case is predicted again: without a student, no rules
        assert again.validation_dice == trained.validation_dice
        assert_same(dict(again.network.state_dict()), dict(trained.network.state_dict()))
        assert {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()} == before

    def test_other_settings_are_refused_naming_what_differs(
        self, cases: Path, straight: dict[bool, Straight]
    ) -> None:
        other = settings(optimiser={"lr": 0.5}, patch=[8, 8, 12])
        with pytest.raises(CheckpointError) as caught:
            start(cases, straight[False].folder, config=other)
        text = str(caught.value)
        assert "config.optimiser.lr: 0.002 -> 0.5" in text
        assert "config.patch: [8, 8, 8] -> [8, 8, 12]" in text
        assert "steps was" not in text

    def test_other_data_are_refused(self, cases: Path, straight: dict[bool, Straight]) -> None:
        with pytest.raises(CheckpointError, match=r"inputs\.cases\.liver-ct/a: digest -> 2"):
            start(cases, straight[False].folder, inputs={"cases": {"liver-ct/a": "2"}})

    def test_a_run_killed_before_its_first_checkpoint_starts_over(
        self, cases: Path, straight: dict[bool, Straight], tmp_path: Path
    ) -> None:
        (tmp_path / "config.json").write_text("{}")
        (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 9, "terms": {}}\n{"step": 2, ')
        start(cases, tmp_path)
        assert numbers_of(tmp_path) == numbers_of(straight[False].folder)


class TestWhatARunLeaves:
    def test_only_a_checkpoint_at_the_end_if_none_was_due(
        self, straight: dict[bool, Straight]
    ) -> None:
        names = [p.name for p in (straight[False].folder / "checkpoints").iterdir()]
        assert names == [f"step_{STEPS:08d}.pt"]

    def test_a_line_for_every_step_and_validation(self, straight: dict[bool, Straight]) -> None:
        lines = lines_of(straight[True].folder)
        steps = [line["step"] for line in lines if "loss" in line]
        assert steps == list(range(1, STEPS + 1))
        validated = [line["step"] for line in lines if "validation_dice" in line]
        assert validated == [3, 6, 8]
        terms = {"cross_entropy", "dice"}
        assert set(lines[0]["terms"]) == terms  # the weight of features begins at 0
        assert set(lines[1]["terms"]) == {*terms, "features"}
        assert lines[1]["loss"] == pytest.approx(sum(lines[1]["terms"].values()), rel=1e-6)
        lrs = [line["lr"] for line in lines if "loss" in line]
        config = settings().optimiser
        assert lrs == [config.lr_at(step, STEPS) for step in range(STEPS)]

    def test_times_under_one_key(self, straight: dict[bool, Straight]) -> None:
        lines = lines_of(straight[False].folder)
        timed = [line["timing"] for line in lines if "loss" in line and "timing" in line]
        # The lines up to each validation are one window.
        assert [timing["steps"] for timing in timed] == [3, 3, 2]
        for timing in timed:
            assert 0 < timing["data_wait"] < 1
            rate = 2 * timing["steps"] / timing["seconds"]
            assert timing["samples_per_second"] == pytest.approx(rate, rel=0.01)
        validations = [line["timing"] for line in lines if "validation_dice" in line]
        assert all(timing["seconds"] > 0 for timing in validations)


def test_features_of_hardly_any_weight_change_nothing(cases: Path, tmp_path: Path) -> None:
    """Which patches are drawn, and where they begin, is not for a term of the loss to say."""
    seen: list[torch.Tensor] = []

    def watch(network: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        if isinstance(network, StudentNetwork) and network.training:
            seen.append(inputs[0])

    hook = register_module_forward_pre_hook(watch)
    found = []
    for weight in (0, 1e-12):
        features = {"student_taps": [STUDENT_TAP], "weight": weight}
        config = settings(supervision={"features": features}, augment={"flip_axes": [0, 1]})
        folder = tmp_path / f"{weight}"
        found.append(start(cases, folder, features=weight > 0, config=config).network.network)
    hook.remove()
    without, with_them = seen[:STEPS], seen[STEPS:]
    assert all(torch.equal(a, b) for a, b in zip(without, with_them, strict=True))
    for before, after in zip(*(network.parameters() for network in found), strict=True):
        torch.testing.assert_close(after, before, rtol=1e-4, atol=1e-6)


def poisoned(how: str) -> AbstractContextManager[None]:
    """In the third step the loss is NaN in a term, or its gradient alone."""
    calls = count(1)

    def poison(loss: torch.Tensor, terms: Any, network: Any) -> Any:
        if next(calls) != 3:
            return loss, terms
        if how == "loss":
            return loss * math.nan, {**terms, "dice": math.nan}
        return loss + steep(next(network.parameters())), terms

    return changed_loss(poison)


class TestNotFinite:
    @pytest.mark.parametrize(
        ("how", "says"),
        [
            ("loss", "the loss became NaN in dice"),
            ("gradient", "the gradient became NaN, although the loss is finite"),
        ],
    )
    def test_it_stops_naming_step_cases_and_term_and_keeps_what_was_good(
        self,
        cases: Path,
        tmp_path: Path,
        how: str,
        says: str,
    ) -> None:
        with poisoned(how), pytest.raises(PipelineError) as caught:
            start(cases, tmp_path, minutes=0.0)
        text = str(caught.value)
        assert re.search(r"step 3, with cases (liver-ct/a|spleen-ct/b), \S+:", text)
        assert says in text
        assert caught.value.exit_code == 1
        kept = newest(tmp_path)
        assert kept["step"] == 2
        assert all(torch.isfinite(w).all() for w in kept["network"].values())
        assert [line["step"] for line in lines_of(tmp_path)] == [1, 2]

    @pytest.mark.parametrize("signalled", [False, True])
    def test_weights_that_are_not_finite_are_never_written(
        self, cases: Path, tmp_path: Path, signalled: bool
    ) -> None:
        best: list[Any] = []
        steps = count(1)

        def overflow(optimiser: torch.optim.Optimizer, *_: object) -> None:
            if next(steps) == 3:  # also a step of validation
                optimiser.param_groups[0]["params"][0].data[0] = math.inf
                if signalled:
                    os.kill(os.getpid(), signal.SIGTERM)

        hook = register_optimizer_step_post_hook(overflow)
        minutes = NEVER if signalled else 0.0
        with pytest.raises(PipelineError, match=r"network\.\S+ is not finite after step 3"):
            start(cases, tmp_path, minutes=minutes, keep_best=lambda *args: best.append(args))
        hook.remove()
        assert best == []
        names = [p.name for p in training_checkpoints(tmp_path / "checkpoints")]
        assert names == ([] if signalled else ["step_00000001.pt", "step_00000002.pt"])

    def test_it_goes_on_as_if_nothing_had_been(
        self,
        cases: Path,
        straight: dict[bool, Straight],
        tmp_path: Path,
    ) -> None:
        with poisoned("gradient"), pytest.raises(PipelineError):
            start(cases, tmp_path, minutes=0.0)
        start(cases, tmp_path)
        assert_same(newest(tmp_path), newest(straight[False].folder))


class TestRefusals:
    def test_no_case(self, tmp_path: Path) -> None:
        with pytest.raises(ConfigError, match="no case to train on"):
            train(
                settings(), TrainingInputs([], [], SPACE, {}), RunFolder(tmp_path),
                TrainingExecution(device="cpu"), Log(quiet=True),
            )  # fmt: skip
        assert list(tmp_path.iterdir()) == []


class TestLearningRate:
    @pytest.mark.parametrize("schedule", ["cosine", "poly"])
    def test_warm_up_then_down_to_nearly_zero(self, schedule: str) -> None:
        config = OptimiserConfig.model_validate({"lr": 1.0, "warmup": 0.1, "schedule": schedule})
        rates = [config.lr_at(step, 100) for step in range(100)]
        assert rates[:3] == pytest.approx([1 / 11, 2 / 11, 3 / 11])
        assert max(rates) == rates[10] == pytest.approx(1.0)
        assert all(a < b for a, b in pairwise(rates[:11]))
        assert all(a > b for a, b in pairwise(rates[10:]))
        assert 0 < rates[-1] < 0.02

    def test_cosine_and_poly_as_their_formulas(self) -> None:
        cosine = OptimiserConfig(lr=0.4, warmup=0)
        poly = OptimiserConfig(lr=0.4, warmup=0, schedule="poly")
        for step in (0, 25, 50, 99):
            half = 0.5 * (1 + math.cos(math.pi * step / 100))
            assert cosine.lr_at(step, 100) == pytest.approx(0.4 * half)
            assert poly.lr_at(step, 100) == pytest.approx(0.4 * (1 - step / 100) ** 0.9)

    def test_one_step_in_all(self) -> None:
        for schedule in ("cosine", "poly"):
            config = OptimiserConfig.model_validate({"schedule": schedule})
            assert 0 < config.lr_at(0, 1) <= config.lr

    def test_sgd_trains_too(self, cases: Path, tmp_path: Path) -> None:
        optimiser = {"name": "sgd", "lr": 0.01, "schedule": "poly"}
        start(cases, tmp_path, config=settings(steps=2, optimiser=optimiser))
        state = newest(tmp_path)["optimiser"]
        assert all("momentum_buffer" in entry for entry in state["state"].values())
        assert state["param_groups"][0]["nesterov"]


class TestIdentity:
    def test_a_whole_number_may_be_written_either_way(self) -> None:
        one, same = (settings(optimiser={"clip_norm": value}) for value in (12, 12.0))
        assert run_digest(one, {}) == run_digest(same, {})


@pytest.fixture
def ctrl_c() -> Iterator[None]:
    """As in a terminal: a background job begins without it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


class TestStopSignals:
    def test_handlers_are_put_back(self) -> None:
        numbers = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
        before = [signal.getsignal(s) for s in numbers]
        with stop_signals() as stopping:
            assert not stopping()
            os.kill(os.getpid(), signal.SIGUSR1)
            assert stopping()
        assert [signal.getsignal(s) for s in numbers] == before

    @pytest.mark.usefixtures("ctrl_c")
    def test_a_second_ctrl_c_ends_at_once(
        self, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
    ) -> None:
        now = 100.0
        monkeypatch.setattr(time, "monotonic", lambda: now)
        with stop_signals(answered=True) as stopping:
            os.kill(os.getpid(), signal.SIGINT)
            assert stopping()
            now = 100.5  # the same one, handed on by torchrun
            os.kill(os.getpid(), signal.SIGINT)
            assert capfd.readouterr().err == (
                "\nCtrl-C: stopping after this step, with a checkpoint. Once more ends at once, "
                "without one.\n"
            )
            now = 101.5
            with pytest.raises(KeyboardInterrupt):
                os.kill(os.getpid(), signal.SIGINT)
        assert capfd.readouterr().err == ""
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler

    def test_a_background_job_goes_on_without_ctrl_c(self) -> None:
        before = signal.signal(signal.SIGINT, signal.SIG_IGN)
        try:
            with stop_signals() as stopping:
                os.kill(os.getpid(), signal.SIGINT)
                assert not stopping()
        finally:
            signal.signal(signal.SIGINT, before)

    def test_a_thread_cannot_and_does_not(self) -> None:
        seen: list[bool] = []

        def work() -> None:
            with stop_signals() as stopping:
                seen.append(stopping())

        thread = Thread(target=work)
        thread.start()
        thread.join()
        assert seen == [False]
