from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from pipeline.data.patches import WindowConfig, windows
from pipeline.errors import GeometryError
from pipeline.networks.windows import SlidingWindow

RNG = np.random.default_rng(0)
shapes = st.tuples(*(st.integers(1, 13) for _ in range(3)))


class Echo(nn.Module):
    """Its input and its negative: nothing that a window could change."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([x, -x], dim=1)


class Position(nn.Module):
    """Says where in the window a voxel is, whatever is there: blending shows."""

    def forward(self, x: Tensor) -> Tensor:
        n = x[0, 0].numel()
        return (x * 0 + torch.arange(n, dtype=x.dtype).reshape(x.shape[2:])) ** 0.5


class Local(nn.Module):
    """A strided convolution without overlap: each cell sees its own voxels only."""

    def __init__(self, stride: tuple[int, int, int]) -> None:
        super().__init__()
        self.cells = nn.Conv3d(1, 3, stride, stride=stride)
        self.head = nn.Conv3d(1, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        self.cells(x)
        out: Tensor = self.head(x)
        return out


def run(
    network: nn.Module, image: npt.NDArray[np.float32], config: WindowConfig, **more: Any
) -> Any:
    return SlidingWindow(network.eval(), config, **more).run(image)


def seeded(stride: tuple[int, int, int]) -> Local:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Local(stride).eval()


@settings(max_examples=30, deadline=None)
@given(shapes, shapes, st.sampled_from([0.0, 0.25, 0.5, 0.8]), st.integers(1, 5))
def test_a_network_that_returns_its_input_gives_it_back(
    shape: tuple[int, int, int], window: tuple[int, int, int], overlap: float, batch: int
) -> None:
    if shape.count(1) == 1:  # of one slice, windows are one slice too
        z, y, x = (1 if n == 1 else w for n, w in zip(shape, window, strict=True))
        window = (z, y, x)
    image = RNG.normal(size=shape).astype(np.float32)
    config = WindowConfig(shape=window, overlap=overlap)
    logits, _ = run(Echo(), image, config, batch_size=batch)
    assert logits.dtype == np.float32
    np.testing.assert_allclose(logits, np.stack([image, -image]), rtol=1e-5, atol=1e-6)


def test_one_slice_takes_flat_windows_alone() -> None:
    """A network would see padding but for one row, and normalise with it."""
    image = np.ones((1, 9, 9), np.float32)
    with pytest.raises(GeometryError, match=r"1 x 9 x 9 .* patches of 4 x 8 x 8"):
        run(Echo(), image, WindowConfig(shape=(4, 8, 8)))
    thick = {"strides": {"cells": (2, 2, 2)}}
    with pytest.raises(GeometryError, match="patches of 2 x 8 x 8"):
        run(seeded((2, 2, 2)), image, WindowConfig(shape=(1, 8, 8)), **thick)
    flat = {"strides": {"cells": (1, 2, 2)}}
    _, features = run(seeded((1, 2, 2)), image, WindowConfig(shape=(1, 8, 8)), **flat)
    assert features["cells"].shape == (3, 1, 5, 5)


def test_gaussian_blending_against_an_obvious_loop() -> None:
    image = np.ones((9, 8, 7), np.float32)
    window, sigma = (6, 5, 4), 0.2
    axes = []
    for n in window:
        offset = np.arange(n) - (n - 1) / 2
        axes.append(np.exp(-0.5 * (offset / (sigma * n)) ** 2))
    weight = axes[0][:, None, None] * axes[1][None, :, None] * axes[2][None, None, :]
    weight = np.maximum(weight, 1e-3 * weight.max())
    says = np.sqrt(np.arange(np.prod(window))).reshape(window)
    total, norm = np.zeros(image.shape), np.zeros(image.shape)
    for patch in windows(image.shape, window, 0.5):
        total[patch.slices] += weight * says
        norm[patch.slices] += weight
    logits, _ = run(Position(), image, WindowConfig(shape=window, overlap=0.5, sigma=sigma))
    np.testing.assert_allclose(logits[0], total / norm, rtol=1e-3)


def test_the_blending_weight_is_not_flat() -> None:
    image = np.ones((9, 8, 7), np.float32)
    narrow, wide = (
        run(Position(), image, WindowConfig(shape=(6, 6, 6), sigma=sigma))[0]
        for sigma in (0.125, 5.0)
    )
    assert np.abs(narrow - wide).max() > 0.5


@pytest.mark.parametrize("shape", [(12, 16, 8), (13, 9, 7), (4, 3, 20), (5, 5, 5)])
@pytest.mark.parametrize("stride", [(1, 1, 1), (2, 2, 2), (1, 4, 2)])
def test_features_of_a_local_network_are_those_of_the_whole_volume(
    shape: tuple[int, int, int], stride: tuple[int, int, int]
) -> None:
    image = RNG.normal(size=shape).astype(np.float32)
    network = seeded(stride)
    config = WindowConfig(shape=(8, 8, 8), overlap=0.5)
    pad_value = -1.5
    logits, features = run(network, image, config, strides={"cells": stride}, pad_value=pad_value)
    cells = [-(-n // s) for n, s in zip(shape, stride, strict=True)]
    padding = [(0, c * s - n) for n, c, s in zip(shape, cells, stride, strict=True)]
    padded = torch.from_numpy(np.pad(image, padding, constant_values=pad_value))[None, None]
    with torch.no_grad():
        whole = network.cells(padded)[0].numpy()
        head = network.head(torch.from_numpy(image)[None, None])[0].numpy()
    assert features["cells"].shape == (3, *cells)
    np.testing.assert_allclose(features["cells"], whole, atol=1e-6)
    np.testing.assert_allclose(logits, head, rtol=1e-4, atol=1e-5)


def test_features_are_blended_as_logits_are() -> None:
    class WindowNumber(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.tap = nn.Identity()
            self.calls = 0

        def forward(self, x: Tensor) -> Tensor:
            y = x * 0 + self.calls
            self.tap(y[:, :, ::2])
            self.calls += 1
            return torch.cat([y, y], dim=1)

    image = np.zeros((16, 4, 4), np.float32)
    config = WindowConfig(shape=(8, 4, 4), overlap=0.5)
    logits, features = run(WindowNumber(), image, config, strides={"tap": (2, 1, 1)})
    # Windows begin at 0, 4 and 8: what two of them see lies between their numbers.
    found = features["tap"][0, :, 2, 2]
    assert found[:2].tolist() == [0, 0]
    assert found[6:].tolist() == [2, 2]
    assert (np.diff(found[1:7]) > 0).all()
    np.testing.assert_allclose(found, logits[0, :, 2, 2].reshape(8, 2).mean(axis=1), atol=0.1)


def test_taps_of_different_strides_go_together() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fine, self.coarse = nn.AvgPool3d(2), nn.AvgPool3d(4)

        def forward(self, x: Tensor) -> Tensor:
            self.fine(x)
            self.coarse(x)
            return x

    image = RNG.normal(size=(10, 9, 8)).astype(np.float32)
    _, features = run(
        Two(), image, WindowConfig(shape=(6, 6, 6)),
        strides={"fine": (2, 2, 2), "coarse": (4, 4, 4)},
    )  # fmt: skip
    assert features["fine"].shape == (1, 5, 5, 4)
    assert features["coarse"].shape == (1, 3, 3, 2)
    assert features["fine"][0, 0, 0, 0] == pytest.approx(image[:2, :2, :2].mean(), abs=1e-6)
    assert features["coarse"][0, 1, 1, 1] == pytest.approx(image[4:8, 4:8, 4:8].mean(), abs=1e-6)


def test_a_small_volume_is_padded_with_air() -> None:
    seen: list[Tensor] = []

    class Spy(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            seen.append(x.clone())
            return x

    image = np.ones((3, 4, 5), np.float32)
    logits, _ = run(Spy(), image, WindowConfig(shape=(6, 6, 6)), pad_value=-7.0)
    (window,) = seen
    assert window.shape == (1, 1, 6, 6, 6)
    assert torch.all(window[0, 0, :3, :4, :5] == 1)
    assert int((window == -7).sum()) == 6**3 - 3 * 4 * 5
    assert logits.shape == (1, 3, 4, 5)


def test_a_network_of_half_precision_is_accumulated_in_float32() -> None:
    class Half(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.half()

    image = np.full((8, 8, 8), 1000.0, np.float32)
    logits, _ = run(Half(), image, WindowConfig(shape=(4, 4, 4), overlap=0.5))
    assert logits.dtype == np.float32
    np.testing.assert_allclose(logits[0], 1000.0, rtol=1e-6)


def test_of_several_outputs_the_first_is_taken() -> None:
    class Deep(nn.Module):
        def forward(self, x: Tensor) -> list[Tensor]:
            return [x * 2, x[..., ::2, ::2, ::2]]

    image = RNG.normal(size=(6, 6, 6)).astype(np.float32)
    logits, _ = run(Deep(), image, WindowConfig(shape=(4, 4, 4)))
    np.testing.assert_allclose(logits[0], image * 2, rtol=1e-5, atol=1e-6)


def test_hooks_are_gone_afterwards() -> None:
    network = seeded((2, 2, 2))
    run(network, np.zeros((4, 4, 4), np.float32), WindowConfig(shape=(4, 4, 4)),
        strides={"cells": (2, 2, 2)})  # fmt: skip
    assert not network.cells._forward_hooks
