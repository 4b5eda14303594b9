from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from pipeline.errors import ConfigError
from pipeline.networks.by_name import NetworkConfig, build_network, pick_device, tap_shapes, tapped
from pipeline.student.network import (
    CachedTap,
    StudentNetwork,
    StudentTaps,
    build_student,
    pair_taps,
    seeded_network,
)
from pipeline.student.settings import TrainingConfig
from tests.tiny import NETWORK

PATCH = (16, 16, 16)
NUM_ORGANS = 2
CACHED = {
    ("liver", "a"): CachedTap(6, (2, 2, 2), (0,)),
    ("both", "b"): CachedTap(3, (2, 2, 2), (0, 1)),
}


def settings(*taps: str, **changes: Any) -> TrainingConfig:
    values = {"network": NETWORK.model_dump(), "patch": PATCH}
    supervision = {"features": {"student_taps": taps}}
    return TrainingConfig.model_validate({**values, "supervision": supervision, **changes})


def student(tap: str = "", *, seed: int = 0, cached: bool = False) -> StudentNetwork:
    config = settings(*([tap] if tap else []), seed=seed)
    return seeded_network(config, NUM_ORGANS, CACHED if cached else None)


def stride_two(network: torch.nn.Module) -> str:
    """A layer whose cells have two voxels a side."""
    names = [n for n, m in network.named_modules() if isinstance(m, torch.nn.Conv3d)]
    shapes = tap_shapes(network, names, PATCH)
    return next(name for name, (_, stride) in shapes.items() if stride == (2, 2, 2))


@pytest.fixture(scope="module")
def tap() -> str:
    return stride_two(build_network(NETWORK, in_channels=1, out_channels=3))


class TestSeeds:
    def test_adapters_do_not_change_the_first_weights(self, tap: str) -> None:
        plain, tapped_ = student().network, student(tap, cached=True).network
        assert plain.state_dict().keys() == tapped_.state_dict().keys()
        for name, weights in plain.state_dict().items():
            assert torch.equal(weights, tapped_.state_dict()[name]), name

    def test_the_seed_decides_whatever_ran_before(self) -> None:
        first = student().state_dict()
        torch.rand(17)
        second, other = student().state_dict(), student(seed=1).state_dict()
        assert all(torch.equal(first[name], second[name]) for name in first)
        assert not all(torch.equal(first[name], other[name]) for name in first)

    def test_the_global_random_state_is_left_alone(self) -> None:
        before = torch.get_rng_state()
        student()
        assert torch.equal(torch.get_rng_state(), before)


class TestTaps:
    def test_feature_and_adapters_fit_the_cache(self, tap: str) -> None:
        network = student(tap, cached=True)
        image = torch.randn(2, 1, *PATCH)
        logits, features = network(image)
        assert logits.shape == (2, NUM_ORGANS + 1, *PATCH)
        assert network.adapt(("liver", "a"), features).shape == (2, 6, 8, 8, 8)
        assert network.adapt(("both", "b"), features).shape == (2, 3, 8, 8, 8)
        assert all(adapter.bias is None for adapter in network.adapters)
        with tapped(network.network, [tap]) as kept:
            network(image)
        assert torch.equal(kept[tap], features[tap])

    def test_logits_are_those_of_the_network_alone(self, tap: str) -> None:
        image = torch.randn(1, 1, *PATCH)
        logits, none = student()(image)
        assert none == {}
        assert torch.equal(student(tap, cached=True)(image)[0], logits)

    def test_the_feature_is_not_kept_beyond_the_pass(self, tap: str) -> None:
        network = student(tap, cached=True)
        network(torch.randn(1, 1, *PATCH))
        assert network._features == {}

    def test_a_layer_whose_cells_do_not_divide_the_patch_is_refused(self) -> None:
        network = torch.nn.Sequential(torch.nn.Conv3d(1, 2, 3, stride=2))
        with pytest.raises(ConfigError, match=r"'0' gives \(7, 7, 7\) cells for a patch"):
            tap_shapes(network, ["0"], PATCH)

    def test_a_patch_that_the_network_cannot_take_is_refused_before_training(self) -> None:
        with pytest.raises(ConfigError, match=r"patch: .*cannot take a patch of \(16, 16, 18\)"):
            seeded_network(settings(patch=(16, 16, 18)), NUM_ORGANS)


FINE, COARSE = "fine", "coarse"
STRIDES = {FINE: (2, 2, 2), COARSE: (4, 4, 4)}
BOTH_STRIDES = {
    ("liver", "a"): CachedTap(6, (2, 2, 2), (0,)),
    ("liver", "deep"): CachedTap(5, (4, 4, 4), (0,)),
    ("both", "a"): CachedTap(3, (4, 4, 4), (0, 1)),
}


class TestPairing:
    def test_each_cached_tap_gets_the_layer_of_its_stride(self) -> None:
        assert pair_taps([COARSE, FINE], STRIDES, BOTH_STRIDES) == {
            ("liver", "a"): FINE,
            ("liver", "deep"): COARSE,
            ("both", "a"): COARSE,
        }

    def test_a_mapping_leaves_out_what_it_does_not_name(self) -> None:
        found = pair_taps({"deep": COARSE}, STRIDES, BOTH_STRIDES)
        assert found == {("liver", "deep"): COARSE}

    @pytest.mark.parametrize("taps", [[FINE], {"deep": FINE}])
    def test_cells_of_another_size_are_refused_naming_both(self, taps: StudentTaps) -> None:
        with pytest.raises(ConfigError) as caught:
            pair_taps(taps, STRIDES, BOTH_STRIDES)
        for part in ("'fine'", "(2, 2, 2)", "'deep'", "teacher liver", "(4, 4, 4)", "student_taps"):
            assert part in str(caught.value)

    def test_a_tap_that_is_not_cached_is_refused_listing_what_is(self) -> None:
        with pytest.raises(ConfigError, match=r"student_taps: the cache has no tap 'b'.*a, deep"):
            pair_taps({"b": FINE}, STRIDES, BOTH_STRIDES)

    def test_two_layers_of_one_stride_are_refused(self) -> None:
        strides = {**STRIDES, "other": (2, 2, 2)}
        with pytest.raises(ConfigError, match=r"'fine' and 'other' .* same stride; tap 'a'"):
            pair_taps([FINE, COARSE, "other"], strides, BOTH_STRIDES)

    def test_a_layer_for_no_cached_tap_is_refused(self) -> None:
        one = {("liver", "a"): BOTH_STRIDES["liver", "a"]}
        with pytest.raises(ConfigError, match="no cached tap has the cells of layer 'coarse'"):
            pair_taps([FINE, COARSE], STRIDES, one)

    def test_two_layers_are_tapped_in_one_pass(self, tap: str) -> None:
        deep = "model.1.submodule.1.submodule"
        network = seeded_network(settings(tap, deep), NUM_ORGANS, BOTH_STRIDES)
        _, features = network(torch.randn(1, 1, *PATCH))
        assert network.adapt(("liver", "a"), features).shape == (1, 6, 8, 8, 8)
        assert network.adapt(("liver", "deep"), features).shape == (1, 5, 4, 4, 4)
        assert network.adapt(("both", "a"), features).shape == (1, 3, 4, 4, 4)


class TestSigmoidHead:
    def test_background_is_a_logit_of_zero_before_one_channel_per_organ(self) -> None:
        network = seeded_network(settings(supervision={"kind": "masked_bce"}), NUM_ORGANS)
        alone = build_network(NETWORK, in_channels=1, out_channels=NUM_ORGANS)
        state = network.network.state_dict()
        alone.load_state_dict({name.removeprefix("organs."): w for name, w in state.items()})
        image = torch.randn(2, 1, *PATCH)
        logits, _ = network(image)
        assert logits.shape == (2, NUM_ORGANS + 1, *PATCH)
        assert not logits[:, 0].any()
        assert torch.equal(logits[:, 1:], alone(image))

    def test_so_has_each_output_of_deep_supervision(self) -> None:
        several = NetworkConfig(
            name="SegResNetDS", args={"init_filters": 4, "blocks_down": [1, 1, 1], "dsdepth": 2}
        )
        student = build_student(several, NUM_ORGANS, "sigmoid")
        outputs = student(torch.randn(1, 1, *PATCH))
        assert [out.shape[1] for out in outputs] == [NUM_ORGANS + 1] * 2
        assert not any(out[:, 0].any() for out in outputs)
        assert all(out[:, 1:].any() for out in outputs)
        assert student.eval()(torch.randn(1, 1, *PATCH)).shape == (1, NUM_ORGANS + 1, *PATCH)


class TestBuilding:
    @pytest.mark.parametrize("name", ["__doc__", "torch", "ABC", "Sequence"])
    def test_what_is_no_network_is_refused(self, name: str) -> None:
        with pytest.raises(ConfigError, match="has no network"):
            build_network(NetworkConfig(name=name), in_channels=1, out_channels=2)

    def test_arguments_it_does_not_take_are_refused_with_its_signature(self) -> None:
        config = NetworkConfig(args={"chanels": [4, 8], "strides": [2]})
        with pytest.raises(ConfigError, match=r"network\.args: .*It takes .*channels"):
            build_network(config, in_channels=1, out_channels=2)

    def test_arguments_that_contradict_each_other_are_refused(self) -> None:
        config = NetworkConfig(args={"channels": [4], "strides": [2, 2]})
        with pytest.raises(ConfigError, match=r"network\.args"):
            build_network(config, in_channels=1, out_channels=2)


class TestDevice:
    def test_by_name(self) -> None:
        assert pick_device("cpu") == torch.device("cpu")
        assert pick_device("auto").type in ("cpu", "cuda")


class Watched(nn.Module):
    """Says where it was run; `looks` at a value, as no network on the meta device can."""

    def __init__(self, *, looks: bool) -> None:
        super().__init__()
        self.down = nn.Conv3d(1, 2, 2, stride=2)
        self.looks, self.devices = looks, []

    def __deepcopy__(self, memo: dict[int, Any]) -> Watched:
        other = Watched(looks=self.looks)
        other.devices = self.devices
        return other

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.devices.append(x.device.type)
        out: torch.Tensor = self.down(x)
        if self.looks and float(out.sum()) > 1e9:
            return out * 0
        return out


@pytest.mark.parametrize(("looks", "devices"), [(False, ["meta"]), (True, ["meta", "cpu"])])
def test_shapes_take_no_arithmetic_where_they_need_none(looks: bool, devices: list[str]) -> None:
    """One pass over a window of a real network is seconds, per teacher and start."""
    network = Watched(looks=looks)
    assert tap_shapes(network, ["down"], PATCH) == {"down": (2, (2, 2, 2))}
    assert network.devices == devices
