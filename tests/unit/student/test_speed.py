from __future__ import annotations

import math
import shutil
from contextlib import AbstractContextManager
from itertools import chain, repeat
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from pipeline.errors import ConfigError
from pipeline.log import Log
from pipeline.networks.by_name import NetworkConfig
from pipeline.student.network import CachedTap, seeded_network
from pipeline.student.settings import (
    FeaturesConfig,
    SupervisionConfig,
    TrainingConfig,
    build_optimiser,
)
from pipeline.student.speed import Speed, SpeedFlags, check_device
from pipeline.student.training import make_step
from tests.tiny import NETWORK
from tests.unit.student.fixed import changed_loss
from tests.unit.student.ranks import steep
from tests.unit.student.same import assert_same
from tests.unit.student.samples import state_of
from tests.unit.student.test_deep_supervision import batch
from tests.unit.student.test_training import newest, start
from tests.unit.student.test_training import settings as run_settings

CPU = torch.device("cpu")
CONFIG = TrainingConfig.model_validate(
    {"network": NETWORK.model_dump(), "patch": [8, 8, 8], "steps": 10}
)


class One:
    """A student, its optimiser and its flags."""

    def __init__(self, norm: str = "instance", **flags: Any) -> None:
        network = NetworkConfig(name="UNet", args={**NETWORK.args, "norm": norm})
        self.network = seeded_network(CONFIG.model_copy(update={"network": network}), 2).train()
        self.optimiser = build_optimiser(CONFIG.optimiser, self.network)
        self.speed = Speed(SpeedFlags(**flags), CPU)
        self.speed.prepare(self.network, self.network.network, Log(quiet=True))

    def step(self, number: int = 0) -> dict[str, Any]:
        return self.step_of(CONFIG, number)

    def step_of(self, config: TrainingConfig, number: int = 0) -> dict[str, Any]:
        state = state_of(config, self.network, self.optimiser, self.speed)
        return make_step(state, batch(), number)

    def weights(self) -> dict[str, torch.Tensor]:
        return {name: w.clone() for name, w in self.network.state_dict().items()}


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_half_precision_is_near_and_all_that_is_kept_is_float32(precision: str) -> None:
    exact, half = One(), One(precision=precision)
    seen: list[torch.dtype] = []
    layer = next(m for m in half.network.modules() if isinstance(m, nn.Conv3d))
    layer.register_forward_hook(lambda module, inputs, out: seen.append(out.dtype))
    there, here = exact.step(), half.step()
    assert seen == [torch.bfloat16 if precision == "bf16" else torch.float16]
    assert here["loss"] != there["loss"]
    assert here["loss"] == pytest.approx(there["loss"], rel=0.02)
    # Before clipping, and no longer scaled.
    assert here["gradient_norm"] == pytest.approx(there["gradient_norm"], rel=0.1)
    state = half.optimiser.state_dict()["state"][0]
    assert {w.dtype for w in half.weights().values()} == {torch.float32}
    assert state["exp_avg"].dtype == torch.float32


def test_channels_last_gives_the_same_numbers_in_another_memory_order() -> None:
    plain, last = One("batch"), One("batch", channels_last=True)
    seen: list[bool] = []
    layer = [m for m in last.network.modules() if isinstance(m, nn.Conv3d)][-1]

    def keep(module: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        seen.append(inputs[0].is_contiguous(memory_format=torch.channels_last_3d))

    layer.register_forward_pre_hook(keep)
    for number in range(3):
        there, here = plain.step(number), last.step(number)
        assert here["loss"] == pytest.approx(there["loss"], rel=1e-4)
    assert seen == [True] * 3
    assert layer.weight.is_contiguous(memory_format=torch.channels_last_3d)
    assert last.weights().keys() == plain.weights().keys()


class TestScaler:
    def test_an_overflow_leaves_the_step_out_and_halves_the_scale(self) -> None:
        one = One(precision="fp16")
        one.step()
        before, scale = one.weights(), one.speed.scaler.get_scale()
        with steeper(1e36):
            assert one.step(1)["gradient_norm"] is None
        assert_same(one.weights(), before)
        assert one.speed.scaler.get_scale() == scale / 2
        assert one.step(2)["gradient_norm"] > 0
        assert not all(torch.equal(w, before[n]) for n, w in one.weights().items())

    def test_what_no_scale_can_mend_stops_the_training(self) -> None:
        one = One(precision="fp16")
        before = one.weights()

        def poisoned(loss: torch.Tensor, terms: Any, network: nn.Module) -> Any:
            return loss + steep(next(network.parameters())), terms

        with changed_loss(poisoned):
            while one.speed.scaler.get_scale() > 1:
                assert one.step(1)["gradient_norm"] is None
            with pytest.raises(FloatingPointError, match="gradient became NaN"):
                one.step(1)
        assert one.speed.scaler.get_scale() <= 1
        assert_same(one.weights(), before)

    def test_clipping_sees_the_gradient_as_it_is(self) -> None:
        config = CONFIG.model_copy(
            update={"optimiser": CONFIG.optimiser.model_copy(update={"clip_norm": 0.01})}
        )
        one = One(precision="fp16")
        one.step_of(config)
        norms = [w.grad.norm() for w in one.network.parameters() if w.grad is not None]
        assert float(torch.stack(norms).norm()) == pytest.approx(0.01, rel=1e-3)

    def test_its_state_is_in_the_checkpoint_and_comes_back(self, tmp_path: Path) -> None:
        """Killed after 3 of 4 steps, the first of which overflowed, and gone on: as if
        undisturbed."""
        config = run_settings(steps=4, validate_every=4)
        flags = SpeedFlags(precision="fp16")
        with steeper(1e36):
            start(tmp_path / "cases", tmp_path / "a", config=config, flags=flags)
        undisturbed = newest(tmp_path / "a")
        assert undisturbed["speed"]["scaler"]["scale"] == 2.0**15
        assert undisturbed["speed"]["scaler"]["_growth_tracker"] == 3
        with steeper(1e36):
            start(tmp_path / "cases", tmp_path / "b", config=config, flags=flags, minutes=0.0)
        checkpoints = tmp_path / "b" / "checkpoints"
        (checkpoints / "step_00000004.pt").unlink()
        start(tmp_path / "cases", tmp_path / "b", config=config, flags=flags)
        assert_same(newest(tmp_path / "b"), undisturbed)

    def test_a_run_may_go_on_with_other_flags(self) -> None:
        half, full = One(precision="fp16"), One()
        half.step()
        assert full.speed.state_dict()["scaler"] == {}
        half.speed.load_state_dict(full.speed.state_dict())
        full.speed.load_state_dict(half.speed.state_dict())
        assert full.speed.resumed_flags == SpeedFlags(precision="fp16")
        assert full.step()["gradient_norm"] > 0


def test_going_on_with_other_flags_is_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = run_settings(steps=2, validate_every=2)
    start(tmp_path / "cases", tmp_path / "a", config=config, minutes=0.0)
    (tmp_path / "a" / "checkpoints" / "step_00000002.pt").unlink()
    log = Log()
    start(tmp_path / "cases", tmp_path / "a", config=config, flags=SpeedFlags(), log=log)
    assert "not bit for bit" not in capsys.readouterr().err
    (tmp_path / "a" / "checkpoints" / "step_00000002.pt").unlink()
    flags = SpeedFlags(channels_last=True)
    start(tmp_path / "cases", tmp_path / "a", config=config, flags=flags, log=log)
    assert "with fp32 and goes on with fp32, channels last: not bit" in capsys.readouterr().err


class TestCompile:
    def test_a_compiled_network_gives_the_same_and_its_feature_is_tapped(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Traced as ever, but not turned into C++, which takes twenty seconds."""
        real, compiled = nn.Module.compile, []

        def compile_(network: nn.Module) -> None:
            compiled.append(network)
            real(network, backend="eager")

        monkeypatch.setattr(nn.Module, "compile", compile_)
        monkeypatch.setattr(shutil, "which", lambda name: "/usr/bin/" + name)
        cached = {("one", "deep"): CachedTap(3, (2, 2, 2), (0,))}
        features = FeaturesConfig(student_taps=("model.0.conv",))
        supervision = SupervisionConfig(features=features)
        config = CONFIG.model_copy(update={"supervision": supervision})
        found = []
        for flags in (SpeedFlags(), SpeedFlags(compile=True)):
            network = seeded_network(config, 2, cached)
            Speed(flags, CPU).prepare(network, network.network, Log(quiet=True))
            logits, features = network(batch().image)
            found.append((logits, features["model.0.conv"]))
        assert compiled == [network.network]
        assert network.state_dict().keys() == seeded_network(config, 2, cached).state_dict().keys()
        for eager, traced in zip(*found, strict=True):
            torch.testing.assert_close(traced, eager, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_half_precision_on_a_cpu_is_refused(precision: Any) -> None:
    with pytest.raises(ConfigError, match=f"{precision} on a CPU .*Leave --precision out"):
        check_device(SpeedFlags(precision=precision), CPU)
    check_device(SpeedFlags(precision=precision), torch.device("cuda"))
    check_device(SpeedFlags(channels_last=True), CPU)
    check_device(None, CPU)


def steeper(factor: float) -> AbstractContextManager[None]:
    """The first loss is the same to look at, with a gradient that many times as large."""
    factors = chain([factor], repeat(1))

    def change(loss: torch.Tensor, terms: Any, network: nn.Module) -> Any:
        assert math.isfinite(float(loss.detach()))
        return loss.detach() + next(factors) * (loss - loss.detach()), terms

    return changed_loss(change)
