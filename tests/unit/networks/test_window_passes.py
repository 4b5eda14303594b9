"""Batches, memory, precision and mirroring of forward passes."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from monai.networks import nets
from torch import Tensor, nn

from pipeline.data.patches import WindowConfig
from pipeline.errors import ConfigError
from pipeline.networks import windows
from pipeline.networks.windows import (
    SlidingWindow,
    WindowPasses,
    check_precision,
    is_out_of_memory,
)

CPU = torch.device("cpu")
RNG = np.random.default_rng(0)
IMAGE = RNG.normal(size=(21, 18, 24)).astype(np.float32)


def net(name: str) -> tuple[nn.Module, str]:
    """A network and a layer of stride 2 in it."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        shape: dict[str, Any] = {"spatial_dims": 3, "in_channels": 1, "out_channels": 3}
        match name:
            case "UNet":
                made: nn.Module = nets.UNet(
                    **shape, channels=(8, 16, 16), strides=(2, 2), norm="instance"
                )
                return made.eval(), "model.0"
            case "DynUNet":
                made = nets.DynUNet(
                    **shape, kernel_size=[3, 3, 3], strides=[1, 2, 2], filters=[8, 16, 16],
                    upsample_kernel_size=[2, 2],
                )  # fmt: skip
                return made.eval(), "downsamples.0"
            case _:
                made = nets.SegResNet(**shape, init_filters=8, blocks_down=(1, 1), blocks_up=(1,))
                return made.eval(), "down_layers.1"


def said(
    network: nn.Module, tap: str, batch: int, image: npt.NDArray[Any] = IMAGE, **window: Any
) -> list[npt.NDArray[Any]]:
    config = WindowConfig(shape=(16, 16, 16), **window)
    logits, features = SlidingWindow(
        network, config, strides={tap: (2, 2, 2)}, batch_size=batch, device=CPU
    ).run(image)
    return [logits, features[tap]]


@pytest.mark.parametrize(
    ("name", "mirror"), [("UNet", ()), ("UNet", ("x",)), ("DynUNet", ()), ("SegResNet", ())]
)
def test_the_window_batch_does_not_change_a_bit(name: str, mirror: tuple[str, ...]) -> None:
    """Kernels differ by the size of the batch, in the last bits; a cache must not."""
    network, tap = net(name)
    row = RNG.normal(size=(16, 14, 48)).astype(np.float32)  # of five windows
    one = said(network, tap, 1, row, mirror=mirror)
    for batch in (2, 3, 5):
        many = said(network, tap, batch, row, mirror=mirror)
        for found, expected in zip(many, one, strict=True):
            assert found.tobytes() == expected.tobytes()


# --- memory ---------------------------------------------------------------------------------------


class Greedy(nn.Module):
    """Too large for more than so many windows at a time."""

    def __init__(self, room: int, error: Exception) -> None:
        super().__init__()
        self.room, self.error = room, error
        self.tried: list[int] = []

    def forward(self, x: Tensor) -> Tensor:
        self.tried.append(x.shape[0])
        if x.shape[0] > self.room:
            raise self.error
        return torch.cat([x, -x], dim=1)


ERRORS = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB"),
    MemoryError("Unable to allocate 20. GiB"),
    RuntimeError("[enforce fail at alloc_cpu.cpp:124] DefaultCPUAllocator: not enough memory"),
    RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 bytes."),
]


@pytest.fixture
def batches(monkeypatch: pytest.MonkeyPatch) -> None:
    """Batches as on a GPU."""
    monkeypatch.setattr(windows, "largest_batch", lambda asked, device: asked)


@pytest.mark.parametrize("error", ERRORS)
def test_out_of_memory_halves_the_batch_and_says_so_once(batches: None, error: Exception) -> None:
    network = Greedy(2, error)
    config = WindowConfig(shape=(8, 8, 8))
    with pytest.warns(RuntimeWarning, match="out of memory with 9 windows") as caught:
        found, _ = SlidingWindow(network, config, batch_size=9, device=CPU).run(IMAGE)
    assert network.tried[:3] == [9, 4, 2]
    assert set(network.tried[3:-1]) == {2}  # and not tried again
    assert "--window-batch" in str(caught[0].message)
    right, _ = SlidingWindow(Greedy(99, error), config, batch_size=1, device=CPU).run(IMAGE)
    np.testing.assert_array_equal(found, right)


def test_out_of_memory_with_one_window_is_for_the_caller(batches: None) -> None:
    with pytest.warns(RuntimeWarning), pytest.raises(MemoryError):
        SlidingWindow(
            Greedy(0, MemoryError()), WindowConfig(shape=(8, 8, 8)), batch_size=4, device=CPU
        ).run(IMAGE)


def test_another_error_is_not_taken_for_a_lack_of_memory(batches: None) -> None:
    network = Greedy(0, RuntimeError("mat1 and mat2 shapes cannot be multiplied"))
    with pytest.raises(RuntimeError, match="mat1"):
        SlidingWindow(network, WindowConfig(shape=(8, 8, 8)), batch_size=4, device=CPU).run(IMAGE)
    assert network.tried == [4]


def test_on_the_cpu_a_network_sees_one_window_at_a_time() -> None:
    network = Greedy(1, MemoryError())
    SlidingWindow(network, WindowConfig(shape=(8, 8, 8)), batch_size=4, device=CPU).run(IMAGE)
    assert set(network.tried) == {1}


@pytest.mark.parametrize("error", ERRORS)
def test_what_is_out_of_memory(error: Exception) -> None:
    assert is_out_of_memory(error)
    assert not is_out_of_memory(ValueError("out of memory"))


# --- precision ------------------------------------------------------------------------------------


@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
def test_mixed_precision_is_for_a_gpu(precision: Any) -> None:
    config = WindowConfig(shape=(8, 8, 8), precision=precision)
    with pytest.raises(ConfigError, match="CUDA GPU") as caught:
        SlidingWindow(Greedy(9, MemoryError()), config, device=CPU).run(IMAGE)
    assert caught.value.where == "window.precision"
    check_precision(precision, torch.device("cuda:1"))
    check_precision("float32", CPU)


def test_a_network_runs_in_the_precision_that_is_set(monkeypatch: pytest.MonkeyPatch) -> None:
    """No GPU here: autocast is asked for the CPU instead, which rounds just as well."""
    entered: list[tuple[str, torch.dtype]] = []
    real = torch.autocast

    def cast(device: str, dtype: torch.dtype) -> Any:
        entered.append((device, dtype))
        return real("cpu", dtype=dtype)

    monkeypatch.setattr(windows.torch, "autocast", cast)
    monkeypatch.setattr(windows, "check_precision", lambda precision, device: None)
    network, tap = net("UNet")
    exact, rounded = said(network, tap, 1), said(network, tap, 1, precision="bfloat16")
    assert entered[0] == ("cuda", torch.bfloat16)
    assert all(array.dtype == np.float32 for array in rounded)
    apart = float(np.abs(exact[0] - rounded[0]).max())
    assert 1e-4 < apart < 0.1
    # Blending stays float32: a mean of bfloat16 values need not be one.
    as_bfloat16 = torch.from_numpy(rounded[0]).bfloat16().float().numpy()
    assert np.any(rounded[0] != as_bfloat16)


# --- mirroring ------------------------------------------------------------------------------------


class Sloped(nn.Module):
    """Adds where in the window a voxel lies along x, and along z times 100; taps its input."""

    def __init__(self) -> None:
        super().__init__()
        self.tap = nn.Identity()
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        z = torch.arange(x.shape[2], dtype=x.dtype)[:, None, None]
        out: Tensor = self.tap(x) + torch.arange(x.shape[4], dtype=x.dtype) + 100 * z
        return out


@pytest.mark.parametrize(
    ("mirror", "passes", "z", "x"),
    [((), 1, "own", "own"), (("x",), 2, "own", "mean"), (("z", "x"), 4, "mean", "mean")],
)
def test_logits_are_averaged_over_mirror_images(
    mirror: tuple[str, ...], passes: int, z: str, x: str
) -> None:
    network = Sloped().eval()
    image = RNG.normal(size=(4, 5, 6)).astype(np.float32)
    config = WindowConfig(shape=(4, 5, 6), mirror=mirror)
    logits, features = SlidingWindow(network, config, strides={"tap": (1, 1, 1)}).run(image)
    along_z = np.arange(4.0) if z == "own" else np.full(4, 1.5)
    along_x = np.arange(6.0) if x == "own" else np.full(6, 2.5)
    expected = image + 100 * along_z[:, None, None] + along_x
    np.testing.assert_allclose(logits[0], expected, rtol=1e-5)
    assert network.calls == passes
    np.testing.assert_allclose(features["tap"][0], image, rtol=1e-5)  # of the image as it is


def test_axes_mean_the_same_in_any_order() -> None:
    assert WindowConfig(mirror=("x", "z", "x")) == WindowConfig(mirror=("z", "x"))  # type: ignore[arg-type]


def test_defaults_of_later_fields_leave_digests_alone() -> None:
    assert WindowConfig().model_dump(mode="json") == {
        "shape": [96, 96, 96], "overlap": 0.5, "sigma": 0.125,
    }  # fmt: skip
    changed = WindowConfig(precision="float16", mirror=("y",))
    assert changed.model_dump(mode="json")["mirror"] == ["y"]
    assert WindowConfig.model_validate(changed.model_dump(mode="json")) == changed


def test_windows_come_in_order_and_nothing_is_patched_outside_a_pass() -> None:
    network, tap = net("UNet")
    passes = WindowPasses(
        network, [tap], precision="float32", mirror=(), batch_size=2, device=CPU
    )  # fmt: skip
    found = []
    for window, _, features in passes.run([3, 1, 2], lambda n: torch.full((16, 16, 16), float(n))):
        found.append(window)
        assert set(features) == {tap}
        assert not torch.is_inference_mode_enabled()
        assert not dict(network.named_modules())[tap]._forward_hooks
    assert found == [3, 1, 2]
