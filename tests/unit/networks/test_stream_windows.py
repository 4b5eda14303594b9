"""Slabs: what is handed out, when, and that it is the whole."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from monai.data.utils import compute_importance_map
from torch import Tensor, nn

from pipeline.data.patches import WindowConfig, padded_shape, windows
from pipeline.networks.windows import SlidingWindow

Array = npt.NDArray[np.float32]
shapes = st.tuples(*(st.integers(1, 21) for _ in range(3))).filter(lambda s: s.count(1) != 1)


class Spied(nn.Module):
    """Normalised by window, so that the same voxel differs from window to window."""

    def __init__(self) -> None:
        super().__init__()
        self.tap = nn.AvgPool3d(2)
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        y = (x - x.mean()) / (x.std() + 1)
        self.tap(y)
        return torch.cat([y, y**2, -y], dim=1)


def all_at_once(image: Array, config: WindowConfig, pad_value: float) -> tuple[Array, Array]:
    """Windows and blending, holding the whole volume."""
    window = padded_shape(config.shape, (1, 1, 1), (2, 2, 2))
    shape = padded_shape(image.shape, window, (2, 2, 2))
    padding = [(0, n - m) for n, m in zip(shape, image.shape, strict=True)]
    padded = torch.from_numpy(np.pad(image, padding, constant_values=pad_value))
    weight = compute_importance_map(window, mode="gaussian", sigma_scale=config.sigma).float()
    weight = weight.clamp(min=1e-3 * float(weight.max()))
    logits, norm = torch.zeros((3, *shape)), torch.zeros(shape)
    cells = [n // 2 for n in shape]
    features, cell_norm = torch.zeros(cells), torch.zeros(cells)
    halved = [n // 2 for n in window]
    deep = compute_importance_map(halved, mode="gaussian", sigma_scale=config.sigma).float()
    deep = deep.clamp(min=1e-3 * float(deep.max()))
    network = Spied()
    for patch in windows(shape, window, config.overlap, (2, 2, 2)):
        x = padded[patch.slices][None, None].contiguous()  # sums depend on strides
        logits[(slice(None), *patch.slices)] += weight * network(x)[0]
        norm[patch.slices] += weight
        at = patch.coarsen((2, 2, 2)).slices
        features[at] += deep * network.tap((x - x.mean()) / (x.std() + 1))[0, 0]
        cell_norm[at] += deep
    d, h, w = image.shape
    z, y, x_cells = (-(-n // 2) for n in image.shape)
    whole = (logits / norm)[:, :d, :h, :w].numpy()
    return whole, (features / cell_norm)[:z, :y, :x_cells].numpy()


@settings(max_examples=20, deadline=None)
@given(shapes, st.tuples(*(st.integers(2, 9) for _ in range(3))), st.sampled_from([0.0, 0.5, 0.7]))
def test_slabs_are_bit_by_bit_what_the_whole_volume_would_give(
    shape: tuple[int, int, int], window: tuple[int, int, int], overlap: float
) -> None:
    image = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    config = WindowConfig(shape=window, overlap=overlap)
    logits, features = SlidingWindow(
        Spied(), config, strides={"tap": (2, 2, 2)}, pad_value=-1.5
    ).run(image)
    right, cells = all_at_once(image, config, -1.5)
    assert logits.tobytes() == np.ascontiguousarray(right).tobytes()
    np.testing.assert_allclose(features["tap"][0], cells, atol=1e-6)


def test_rows_are_handed_out_as_soon_as_no_window_touches_them_any_more() -> None:
    """Of 40 rows no more than a window's 8 are ever held."""
    network = Spied()
    image = np.zeros((40, 8, 8), np.float32)
    told: list[tuple[str, int, int]] = []

    def sink(name: str) -> Any:
        return lambda slab: told.append((name, network.calls, slab.shape[1]))

    config = WindowConfig(shape=(8, 8, 8), overlap=0.5)
    windows = SlidingWindow(network, config, strides={"tap": (2, 2, 2)})
    windows.stream(image, sink("logits"), {"tap": sink("tap")})
    logits = [(calls, rows) for name, calls, rows in told if name == "logits"]
    # Windows begin at 0, 4 .. 32. When the second has been run, 4 rows are finished.
    assert logits == [*((n, 4) for n in range(2, 10)), (9, 8)]
    assert sum(rows for name, _, rows in told if name == "tap") == 20


def test_an_integer_image_is_scaled_window_by_window() -> None:
    image = np.random.default_rng(0).integers(-1000, 1000, (20, 9, 8)).astype(np.int16)
    sizes = []

    def scale(hu: npt.NDArray[Any]) -> Array:
        sizes.append(hu.size)
        return hu.astype(np.float32) / 500

    config = WindowConfig(shape=(8, 8, 8))
    found, _ = SlidingWindow(Spied(), config, scale=scale, pad_value=-2.0).run(image)
    assert max(sizes) <= 8**3
    right, _ = SlidingWindow(Spied(), config, pad_value=-2.0).run(image.astype(np.float32) / 500)
    np.testing.assert_array_equal(found, right)


def test_what_is_handed_out_is_not_written_to_again() -> None:
    slabs, copies = [], []

    def keep(slab: Array) -> None:
        slabs.append(slab)
        copies.append(slab.copy())

    image = np.random.default_rng(0).normal(size=(30, 8, 8)).astype(np.float32)
    windows = SlidingWindow(Spied(), WindowConfig(shape=(8, 8, 8)), strides={"tap": (2, 2, 2)})
    windows.stream(image, keep, {"tap": keep})
    for slab, copy in zip(slabs, copies, strict=True):
        np.testing.assert_array_equal(slab, copy)


@pytest.mark.parametrize("shape", [(3, 4, 5), (20, 3, 4), (3, 20, 30)])
def test_a_network_that_needs_more_than_the_case_sees_padding_that_is_cut_off(
    shape: tuple[int, int, int],
) -> None:
    """A network that insists on multiples of 16."""

    class Fussy(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            assert all(n % 16 == 0 for n in x.shape[2:])
            return x + 1

    image = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    logits, _ = SlidingWindow(Fussy(), WindowConfig(shape=(16, 16, 16)), pad_value=9.0).run(image)
    assert logits.shape == (1, *shape)
    np.testing.assert_allclose(logits[0], image + 1, rtol=1e-5, atol=1e-5)
