from __future__ import annotations

import numpy as np

from pipeline.data.volume import coarse, large_components

SHAPE = (12, 12, 12)


def test_large_components() -> None:
    mask = np.zeros(SHAPE, bool)
    assert large_components(mask) == 0
    mask[:4, :4, :4] = mask[8:, 8:, 8:] = True
    mask[0, 11, 0] = True  # a speck
    assert large_components(mask) == 2
    mask[4, 4, 4] = mask[5, 5, 5] = mask[6, 6, 6] = mask[7, 7, 7] = True  # corners touch
    assert large_components(mask) == 1


def test_parts_are_counted_on_voxels_about_six_millimetres_apart() -> None:
    every = coarse((2.0, 3.1, 9.0))
    assert [part.step for part in every] == [3, 2, 1]
