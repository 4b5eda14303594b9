"""The feature-wise term, and regions on the feature grid."""

from __future__ import annotations

import math
from itertools import product

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from pipeline.student import losses
from tests.unit.student.terms import gradient

seeds = st.integers(0, 10_000)


class TestFeatureCosine:
    SIZE = (2, 5, 2, 3, 2)

    def _features(self, seed: int) -> tuple[Tensor, Tensor, Tensor]:
        generator = torch.Generator().manual_seed(seed)
        a, t = (torch.randn(self.SIZE, generator=generator, dtype=torch.float64) for _ in range(2))
        cells = torch.rand((2, 2, 3, 2), generator=generator, dtype=torch.float64)
        return a, t, cells * (cells > 0.3)

    @given(seeds)
    @settings(max_examples=20, deadline=None)
    def test_against_a_sum_by_hand(self, seed: int) -> None:
        a, t, cells = self._features(seed)
        t[1, 2, 0, 1, 0] = math.nan
        other = torch.zeros_like(cells)
        other[:, 0] = 1
        expected = []
        for region in (cells, other):
            total, weight = 0.0, 0.0
            for n, z, y, x in product(range(2), range(2), range(3), range(2)):
                u, v = a[n, :, z, y, x].numpy(), t[n, :, z, y, x].numpy()
                if np.isfinite(v).all():
                    share = float(region[n, z, y, x])
                    total += share * (1 - u @ v / np.linalg.norm(u) / np.linalg.norm(v))
                    weight += share
            expected.append(total / weight)
        found = losses.feature_cosine(a, t, cells, other)
        assert found.tolist() == pytest.approx(expected, rel=1e-9)

    @pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
    def test_cells_that_nobody_saw_teach_nothing_and_spread_nothing(self, bad: float) -> None:
        a, t, cells = self._features(1)
        cells[:] = 1
        t[0, :, 1, 2, 1] = bad
        found = gradient(lambda x: losses.feature_cosine(x, t, cells).sum(), a)
        assert torch.isfinite(found).all()
        assert not found[0, :, 1, 2, 1].any()
        assert found[0, :, 0, 0, 0].any()

    def test_no_cells_is_zero_and_a_zero_feature_is_no_nan(self) -> None:
        a, t, cells = self._features(3)
        assert float(losses.feature_cosine(a, t, torch.zeros_like(cells))) == 0
        found = gradient(
            lambda x: losses.feature_cosine(x, t, torch.ones_like(cells)).sum(), torch.zeros_like(a)
        )
        assert torch.isfinite(found).all()

    def test_gradcheck(self) -> None:
        a, t, _ = self._features(4)
        a, t = a[:, :3, :, :1], t[:, :3, :, :1].clone()
        t[0, 0, 0, 0, 0] = math.nan
        cells = torch.linspace(0, 1, 8, dtype=torch.float64).reshape(2, 2, 1, 2)
        point = a.clone().requires_grad_()
        assert torch.autograd.gradcheck(
            lambda x: losses.feature_cosine(x, t, cells, 1 - cells), (point,)
        )


class TestCells:
    @given(seeds, st.sampled_from([(1, 1, 1), (2, 2, 2), (1, 2, 4), (3, 2, 1)]))
    @settings(max_examples=30, deadline=None)
    def test_against_brute_force(self, seed: int, stride: tuple[int, int, int]) -> None:
        size = tuple(2 * s for s in stride)
        generator = torch.Generator().manual_seed(seed)
        region = torch.rand((2, *size), generator=generator) < 0.7
        shares = losses.share_of_cells(region, stride)
        assert shares.shape == (2, 2, 2, 2)
        for n, z, y, x in product(range(2), repeat=4):
            corner = [i * s for i, s in zip((z, y, x), stride, strict=True)]
            box = tuple(slice(c, c + s) for c, s in zip(corner, stride, strict=True))
            assert float(shares[n, z, y, x]) == pytest.approx(float(region[n][box].float().mean()))
