"""What holds for any window, patch and volume."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.data.patches import Patch, padded_shape, patch_at, window_starts

SIZES = st.integers(1, 40)
SIZES3 = st.tuples(SIZES, SIZES, SIZES)


@st.composite
def axes(draw: st.DrawFn) -> tuple[int, int, float, int]:
    """size, window, overlap, align of a layout that is possible."""
    align = draw(st.integers(1, 8))
    window = draw(st.integers(align, 24))
    size = window + align * draw(st.integers(0, 30))
    overlap = draw(st.sampled_from([0.0, 0.1, 0.25, 0.3, 0.5, 0.7, 0.75, 0.9]))
    return size, window, overlap, align


@given(axes())
def test_windows_cover_every_voxel_aligned_inside_and_without_repetition(
    axis: tuple[int, int, float, int],
) -> None:
    size, window, overlap, align = axis
    starts = window_starts(size, window, overlap, align)
    assert set().union(*(range(s, s + window) for s in starts)) == set(range(size))
    assert all(s % align == 0 for s in starts)
    assert starts == sorted(set(starts))


@given(axes())
def test_neighbours_overlap_by_what_was_asked_or_are_as_close_as_alignment_allows(
    axis: tuple[int, int, float, int],
) -> None:
    size, window, overlap, align = axis
    starts = window_starts(size, window, overlap, align)
    for a, b in pairwise(starts):
        assert a + window - b >= overlap * window - 1e-9 or b - a == align


@given(axes())
def test_windows_are_as_few_as_the_overlap_allows(axis: tuple[int, int, float, int]) -> None:
    size, window, overlap, align = axis
    step = max(align, int(window * (1 - overlap) + 1e-9) // align * align)
    fewest = -(-(size - window) // step) + 1
    # A fraction just below a whole number of voxels may cost one voxel of step.
    found = len(window_starts(size, window, overlap, align))
    assert found >= fewest
    if int(window * (1 - overlap)) == int(window * (1 - overlap) + 1e-9):
        assert found == fewest


@given(SIZES3, SIZES3, st.tuples(*[st.integers(1, 8)] * 3))
def test_a_padded_shape_is_the_smallest_of_whole_cells_that_holds_window_and_volume(
    shape: tuple[int, int, int], cells: tuple[int, int, int], align: tuple[int, int, int]
) -> None:
    window = [n * a for n, a in zip(cells, align, strict=True)]
    for n, p, w, a in zip(shape, padded_shape(shape, window, align), window, align, strict=True):
        assert p % a == 0
        assert p - a < max(n, w) <= p


@given(st.tuples(*[st.integers(-30, 30)] * 3), SIZES3, SIZES3)
def test_clip_and_pad_is_the_patch_of_an_endlessly_padded_volume(
    start: tuple[int, int, int], shape: tuple[int, int, int], size: tuple[int, int, int]
) -> None:
    # One axis at a time is enough, since axes are independent.
    for axis in range(3):
        n = size[axis]
        patch = Patch(start, shape)
        inside, missing = patch.clip(size)
        volume = np.arange(1, n + 1)
        found = np.pad(volume[inside[axis]], missing[axis])
        index = np.arange(start[axis], start[axis] + shape[axis])
        expected = np.where((index >= 0) & (index < n), index + 1, 0)
        np.testing.assert_array_equal(found, expected)


@given(st.data(), SIZES3, SIZES3)
def test_patch_at(
    data: st.DataObject, volume: tuple[int, int, int], shape: tuple[int, int, int]
) -> None:
    centre = tuple(data.draw(st.integers(0, n - 1)) for n in volume)
    patch = patch_at(centre, shape, volume)
    assert patch.shape == shape
    for c, start, n, size in zip(centre, patch.start, shape, volume, strict=True):
        assert start <= c < start + n
        allowed = range(max(0, size - n) + 1)
        assert start in allowed
        assert abs(start - (c - n // 2)) == min(abs(s - (c - n // 2)) for s in allowed)


@given(
    st.tuples(*[st.integers(1, 8)] * 3),
    st.tuples(*[st.integers(-5, 5)] * 3),
    st.tuples(*[st.integers(1, 5)] * 3),
)
def test_coarsen_undoes_scaling(
    stride: tuple[int, int, int], start: tuple[int, int, int], shape: tuple[int, int, int]
) -> None:
    fine = Patch(
        tuple(a * s for a, s in zip(start, stride, strict=True)),  # type: ignore[arg-type]
        tuple(n * s for n, s in zip(shape, stride, strict=True)),  # type: ignore[arg-type]
    )
    assert fine.coarsen(stride) == Patch(start, shape)
    if stride[0] > 1:
        off = Patch((fine.start[0] + 1, *fine.start[1:]), fine.shape)
        with pytest.raises(ValueError, match="cells"):
            off.coarsen(stride)
