from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from monai.inferers.utils import sliding_window_inference
from torch import Tensor, nn

from pipeline.data.labels import Intensity
from pipeline.errors import GeometryError
from pipeline.networks.by_name import build_network
from pipeline.networks.windows import first_output
from pipeline.student.inference import StudentWindows, running_argmax
from tests.tiny import NETWORK

RAW = Intensity(kind="raw")


class Pointwise(nn.Module):
    """Three channels, each a function of the voxel alone; windows cannot matter."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[int, ...]] = []

    def forward(self, image: Tensor) -> Tensor:
        self.seen.append(tuple(image.shape))
        return torch.cat([image, -2 * image, image.square() / 100], dim=1)


def hu(shape: tuple[int, int, int], seed: int = 0) -> npt.NDArray[np.int16]:
    return np.random.default_rng(seed).integers(-1024, 1500, shape).astype(np.int16)


class TestRunningArgmax:
    @given(
        hnp.arrays(
            np.float32,
            st.tuples(st.integers(1, 5), st.integers(1, 3), st.integers(1, 3), st.integers(1, 3)),
            elements=st.sampled_from([-1.0, 0.0, 0.5, 1.0]),
        )
    )
    @settings(max_examples=100, deadline=None)
    def test_is_argmax_with_ties_to_the_first(self, logits: npt.NDArray[np.float32]) -> None:
        found = running_argmax(iter(logits))
        assert found.dtype == np.uint8
        assert np.array_equal(found, logits.argmax(axis=0))

    def test_the_channels_are_left_alone(self) -> None:
        logits = np.random.default_rng(0).normal(size=(3, 2, 2, 2)).astype(np.float32)
        before = logits.copy()
        running_argmax(iter(logits))
        assert np.array_equal(logits, before)


class TestPredictLogits:
    @pytest.mark.parametrize("shape", [(16, 16, 16), (9, 5, 16), (17, 30, 21), (40, 8, 16)])
    @pytest.mark.parametrize("overlap", [0.0, 0.25, 0.5])
    def test_a_pointwise_network_gives_its_function_of_every_voxel(
        self, shape: tuple[int, int, int], overlap: float
    ) -> None:
        image = hu(shape)
        found = StudentWindows(Pointwise(), RAW, (16, 16, 16), overlap=overlap).logits(image)
        values = image.astype(np.float32)
        assert found.dtype == np.float32
        assert found.shape == (3, *shape)
        expected = np.stack([values, -2 * values, values**2 / 100])
        assert np.allclose(found, expected, rtol=1e-4, atol=1e-2)

    @pytest.mark.parametrize("shape", [(40, 24, 18), (9, 30, 16), (16, 16, 16), (61, 5, 17)])
    @pytest.mark.parametrize("overlap", [0.0, 0.3, 0.5])
    @pytest.mark.parametrize("window_batch", [1, 3])
    def test_is_monais_sliding_window_to_the_bit(
        self, shape: tuple[int, int, int], overlap: float, window_batch: int
    ) -> None:
        torch.manual_seed(0)
        network = build_network(NETWORK, in_channels=1, out_channels=3).eval()
        image, intensity, patch = hu(shape), Intensity(), (16, 8, 16)
        windows = StudentWindows(
            network, intensity, patch, overlap=overlap, window_batch=window_batch
        )
        found = windows.logits(image)
        with torch.inference_mode():
            expected = sliding_window_inference(
                torch.from_numpy(intensity.apply(image))[None, None], patch, window_batch, network,
                overlap=overlap, mode="gaussian", padding_mode="constant", cval=intensity.air,
            )  # fmt: skip
        assert isinstance(expected, Tensor)
        assert np.array_equal(found, expected[0].numpy())


class TestStreaming:
    def test_no_more_than_a_windows_depth_is_handed_out_at_once(self) -> None:
        image = hu((90, 9, 10))
        told: list[tuple[int, int]] = []
        windows = StudentWindows(Pointwise(), RAW, (16, 16, 16))
        slabs = list(windows.slabs(image, tell=lambda *n: told.append(n)))
        assert [slab.shape[2:] for slab in slabs] == [(9, 10)] * len(slabs)
        assert max(slab.shape[1] for slab in slabs) <= 16
        assert sum(slab.shape[1] for slab in slabs) == 90
        assert told == [(n + 1, 11) for n in range(11)]


def test_one_slice_takes_a_student_of_flat_patches_alone() -> None:
    image = hu((1, 20, 20))
    with pytest.raises(GeometryError, match="one slice, 1 x 20 x 20 voxels"):
        StudentWindows(Pointwise(), RAW, (8, 16, 16)).logits(image)
    assert StudentWindows(Pointwise(), RAW, (1, 16, 16)).logits(image).shape == (3, 1, 20, 20)
    thick = StudentWindows(Pointwise(), RAW, (8, 16, 16)).logits(hu((3, 20, 20)))
    assert thick.shape[1] == 3


def test_the_first_of_several_outputs() -> None:
    a, b = torch.zeros(1), torch.ones(1)
    assert first_output([a, b]) is a
    assert first_output((b, a)) is b
    assert first_output(b) is b
