from __future__ import annotations

import json
import math
import multiprocessing
import os
import re
import signal
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from threading import Thread
from typing import Any

import matplotlib.image
import pytest
import torch

from pipeline.data.labels import LabelSpace
from pipeline.errors import CheckpointError, ConfigError, PipelineError
from pipeline.log import Log
from pipeline.student import resume, training
from pipeline.student.checkpoint import training_checkpoints
from pipeline.student.dataset import forks_of_a_server
from pipeline.student.inputs import TrainingInputs
from pipeline.student.network import CachedTap
from pipeline.student.progress import without_timing
from pipeline.student.resume import RunFolder, stop_signals
from pipeline.student.settings import OptimiserConfig, TrainingConfig, run_digest
from pipeline.student.speed import SpeedFlags, TrainingExecution
from pipeline.student.supervision import Batch
from pipeline.student.training import Trained, train
from tests.tiny import NETWORK
from tests.unit.student.coded import CHANNELS, SPACE, STRIDE, TAP, write_case
from tests.unit.student.ranks import steep
from tests.unit.student.same import assert_same

ROOT = Path(__file__).resolve().parents[3]
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
    run = RunFolder(folder)
    if keep_best is not None:
        run = _Watched(folder, record=lambda step, scores: pytest.fail("not asked for"))
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


@pytest.fixture(autouse=True)
def _no_pictures(straight: dict[bool, Straight], monkeypatch: pytest.MonkeyPatch) -> None:
    """Only the undisturbed runs draw theirs: a picture takes longer than eight steps."""
    monkeypatch.setattr(resume, "draw_progress", lambda *args: None)


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


def _signalled_with_its_loaders(cases: Path, folder: Path, number: int) -> None:
    """Trains with a loader process; in the fourth step both get the signal. Runs in a process of
    its own, which ends with the step that it came to."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    real, calls = training.make_step, []

    def fatal(*args: Any) -> dict[str, Any]:
        calls.append(1)
        if len(calls) == 4:
            (loader,) = multiprocessing.active_children()
            assert loader.pid is not None
            os.kill(loader.pid, number)
            os.kill(os.getpid(), number)
        return real(*args)

    training.make_step = fatal  # type: ignore[assignment]
    resume.draw_progress = lambda *args: None
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
        monkeypatch: pytest.MonkeyPatch,
        name: str,
        features: bool,
        workers: int,
    ) -> None:
        real, calls = training.make_step, []

        def signalled(*args: Any) -> dict[str, Any]:
            calls.append(1)
            if len(calls) == 4:
                os.kill(os.getpid(), signal.Signals[name])
            return real(*args)

        with monkeypatch.context() as context:
            context.setattr(training, "make_step", signalled)
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

    @pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
    def test_loader_processes_outlive_a_signal_to_the_whole_job(
        self, cases: Path, tmp_path: Path, number: int
    ) -> None:
        process = forks_of_a_server().Process(
            target=_signalled_with_its_loaders, args=(cases, tmp_path, number)
        )
        process.start()
        process.join(100)
        assert process.exitcode == 4
        assert newest(tmp_path)["step"] == 4

    def test_the_comparison_can_fail(self, cases: Path, tmp_path: Path) -> None:
        # Without the random state of the checkpoint, dropout would go other ways.
        start(cases, tmp_path / "a", config=settings(steps=2))
        start(cases, tmp_path / "b", config=settings(steps=2, seed=6))
        with pytest.raises(AssertionError):
            assert_same(newest(tmp_path / "a")["network"], newest(tmp_path / "b")["network"])
        with pytest.raises(AssertionError):
            assert_same(newest(tmp_path / "a")["rng"], newest(tmp_path / "b")["rng"])

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
        self, cases: Path, straight: dict[bool, Straight]
    ) -> None:
        folder, trained = straight[False].folder, straight[False].trained
        before = {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}
        again = start(cases, folder)
        assert (again.step, again.finished) == (STEPS, True)
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
        assert "config.optimiser.lr was 0.002, now 0.5" in text
        assert "config.patch was [8, 8, 8], now [8, 8, 12]" in text
        assert "steps was" not in text

    def test_other_data_are_refused(self, cases: Path, straight: dict[bool, Straight]) -> None:
        with pytest.raises(CheckpointError, match=r"inputs\.cases\.liver-ct/a was digest, now 2"):
            start(cases, straight[False].folder, inputs={"cases": {"liver-ct/a": "2"}})

    def test_a_run_killed_before_its_first_checkpoint_starts_over(
        self, cases: Path, straight: dict[bool, Straight], tmp_path: Path
    ) -> None:
        (tmp_path / "config.json").write_text("{}")
        (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 9, "terms": {}}\n{"step": 2, ')
        start(cases, tmp_path)
        assert numbers_of(tmp_path) == numbers_of(straight[False].folder)


class TestWhatARunLeaves:
    def test_the_last_two_checkpoints(self, cases: Path, tmp_path: Path) -> None:
        start(cases, tmp_path, minutes=0.0, config=settings(steps=5))
        names = sorted(p.name for p in (tmp_path / "checkpoints").iterdir())
        assert names == ["step_00000004.pt", "step_00000005.pt"]

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

    def test_the_best_is_told_whenever_the_mean_dice_is_higher_than_ever(
        self, cases: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        dice = iter([0.2, 0.5, 0.4, 0.5, 0.6])
        monkeypatch.setattr(
            training, "validate", lambda *args: {"liver": next(dice), "spleen": None}
        )
        told: list[tuple[int, Any]] = []

        def keep(network: Any, step: int, scores: Mapping[str, float | None]) -> None:
            told.append((step, scores["liver"]))

        config = settings(steps=5, validate_every=1)
        with monkeypatch.context() as context:  # what was the best outlives a stop
            real = training.make_step
            context.setattr(
                training,
                "make_step",
                lambda *args: (
                    (os.kill(os.getpid(), signal.SIGTERM), real(*args))[1]
                    if args[-1] == 2
                    else real(*args)
                ),
            )
            assert start(cases, tmp_path, config=config, keep_best=keep).step == 3
        start(cases, tmp_path, config=config, keep_best=keep)
        assert told == [(1, 0.2), (2, 0.5), (5, 0.6)]

    def test_a_picture(self, straight: dict[bool, Straight]) -> None:
        picture = matplotlib.image.imread(straight[True].folder / "progress.png")
        assert picture.std() > 0.01

    def test_its_settings(self, straight: dict[bool, Straight]) -> None:
        written = json.loads((straight[True].folder / "config.json").read_text())
        assert TrainingConfig.model_validate(written["config"]) == settings(features=True)
        assert written["inputs"] == INPUTS

    def test_validation_dice_of_the_organs_that_are_shown(
        self, straight: dict[bool, Straight]
    ) -> None:
        found = straight[False].trained.validation_dice
        assert set(found) == {"liver", "spleen"}
        assert found["liver"] is not None
        assert 0 <= found["liver"] <= 1
        assert found["spleen"] is None

    def test_weights_moved_and_adapters_too(
        self, cases: Path, straight: dict[bool, Straight]
    ) -> None:
        folder = straight[True].folder
        weights = newest(folder)["network"]
        assert any(name.startswith("adapters") for name in weights)
        first = newest(straight[False].folder)["network"]
        assert not torch.equal(
            first["network.model.0.conv.weight"], weights["network.model.0.conv.weight"]
        )


def test_features_of_hardly_any_weight_change_nothing(
    cases: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Which patches are drawn, and where they begin, is not for a term of the loss to say."""
    real, seen = training.make_step, []

    def watched(state: Any, batch: Batch, step: int) -> dict[str, Any]:
        seen.append(batch.image)
        return real(state, batch, step)

    monkeypatch.setattr(training, "make_step", watched)
    found = []
    for weight in (0, 1e-12):
        features = {"student_taps": [STUDENT_TAP], "weight": weight}
        config = settings(supervision={"features": features}, augment={"flip_axes": [0, 1]})
        folder = tmp_path / f"{weight}"
        found.append(start(cases, folder, features=weight > 0, config=config).network.network)
    without, with_them = seen[:STEPS], seen[STEPS:]
    assert all(torch.equal(a, b) for a, b in zip(without, with_them, strict=True))
    for before, after in zip(*(network.parameters() for network in found), strict=True):
        torch.testing.assert_close(after, before, rtol=1e-4, atol=1e-6)


class TestNotFinite:
    def _poison(self, monkeypatch: pytest.MonkeyPatch, how: str) -> None:
        real, calls = training.batch_loss, []

        def poisoned(config: Any, network: Any, *rest: Any) -> Any:
            calls.append(1)
            loss, terms = real(config, network, *rest)
            if len(calls) != 3:
                return loss, terms
            if how == "loss":
                return loss * math.nan, {**terms, "dice": math.nan}
            # In no term.
            return loss + steep(next(network.parameters())), terms

        monkeypatch.setattr(training, "batch_loss", poisoned)

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
        monkeypatch: pytest.MonkeyPatch,
        how: str,
        says: str,
    ) -> None:
        self._poison(monkeypatch, how)
        with pytest.raises(PipelineError) as caught:
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
        self, cases: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, signalled: bool
    ) -> None:
        real, calls, best = training.make_step, [], []

        def overflowing(state: Any, *rest: Any) -> dict[str, Any]:
            line = real(state, *rest)
            calls.append(1)
            if len(calls) == 3:  # also a step of validation
                next(state.network.parameters()).data[0] = math.inf
                if signalled:
                    os.kill(os.getpid(), signal.SIGTERM)
            return line

        monkeypatch.setattr(training, "make_step", overflowing)
        minutes = NEVER if signalled else 0.0
        with pytest.raises(PipelineError, match=r"network\.\S+ is not finite after step 3"):
            start(cases, tmp_path, minutes=minutes, keep_best=lambda *args: best.append(args))
        assert best == []
        names = [p.name for p in training_checkpoints(tmp_path / "checkpoints")]
        assert names == ([] if signalled else ["step_00000001.pt", "step_00000002.pt"])

    def test_it_goes_on_as_if_nothing_had_been(
        self,
        cases: Path,
        straight: dict[bool, Straight],
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        with monkeypatch.context() as context:
            self._poison(context, "gradient")
            with pytest.raises(PipelineError):
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

    def test_a_patch_that_the_network_cannot_take(self, cases: Path, tmp_path: Path) -> None:
        with pytest.raises(ConfigError, match="cannot take a patch"):
            start(cases, tmp_path, config=settings(patch=[8, 8, 10]))
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
    def test_whatever_changes_numbers_changes_the_digest(self) -> None:
        here = run_digest(settings(), INPUTS)
        assert here == run_digest(settings(), dict(INPUTS))
        assert here != run_digest(settings(seed=6), INPUTS)
        assert here != run_digest(settings(features=True), INPUTS)
        assert here != run_digest(settings(), {"cases": {}})

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
        monkeypatch.setattr("pipeline.student.resume.time.monotonic", lambda: now)
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


def test_organs_decide_the_channels(cases: Path, tmp_path: Path) -> None:
    trained = start(cases, tmp_path, config=settings(steps=1))
    out = trained.network(torch.zeros(1, 1, 8, 8, 8))[0]
    assert out.shape[1] == len(LabelSpace(SPACE.ids).organs) + 1
    assert not trained.network.training
