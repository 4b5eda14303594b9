"""What holds for any pair of grids."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.data.resample import resample, same_grid
from pipeline.data.volume import Grid, Volume

SIZES = st.tuples(*[st.integers(1, 9)] * 3)
SPACINGS = st.tuples(*[st.floats(0.3, 8.0)] * 3)
POINTS = st.tuples(*[st.floats(-100, 100)] * 3)
ANGLES = st.tuples(*[st.floats(-3.2, 3.2)] * 3)


def turn(angles: tuple[float, float, float]) -> npt.NDArray[np.float64]:
    """Rotations about the three axes, one after the other."""
    result = np.eye(3)
    for axis, angle in enumerate(angles):
        step = np.eye(3)
        a, b = [i for i in range(3) if i != axis]
        step[[a, a, b, b], [a, b, a, b]] = (
            np.cos(angle),
            -np.sin(angle),
            np.sin(angle),
            np.cos(angle),
        )
        result = result @ step
    return result


@st.composite
def grids(draw: st.DrawFn) -> Grid:
    """Any shape, spacing and place; axis-aligned in about half of the cases."""
    matrix = np.eye(4)
    direction = turn(draw(ANGLES)) if draw(st.booleans()) else np.eye(3)
    matrix[:3, :3] = direction @ np.diag(draw(SPACINGS))
    matrix[:3, 3] = draw(POINTS)
    return Grid.from_matrix(draw(SIZES), matrix)


def world(grid: Grid) -> npt.NDArray[np.float64]:
    """(D, H, W, 3) voxel centres in mm."""
    index = np.moveaxis(np.indices(grid.shape), 0, -1)
    return np.asarray(index @ grid.matrix[:3, :3].T + grid.matrix[:3, 3])


def position(grid: Grid, points: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """mm -> fractional indices."""
    inverse = np.linalg.inv(grid.matrix)
    return np.asarray(points @ inverse[:3, :3].T + inverse[:3, 3])


@settings(deadline=None)
@given(grids(), SPACINGS)
def test_another_spacing_keeps_the_centre_and_stays_in_the_field_of_view(
    grid: Grid, spacing: tuple[float, float, float]
) -> None:
    new = grid.with_spacing(spacing)
    if grid.slice_axis is not None:  # stays one slice
        assert new.shape[grid.slice_axis] == 1
        kept = enumerate(zip(grid.spacing_mm, spacing, strict=True))
        z, y, x = (old if axis == grid.slice_axis else wanted for axis, (old, wanted) in kept)
        spacing = (z, y, x)
    np.testing.assert_allclose(new.spacing_mm, spacing)
    middle, old_middle = (g.matrix @ [*((np.array(g.shape) - 1) / 2), 1] for g in (new, grid))
    np.testing.assert_allclose(middle, old_middle, atol=1e-9)
    inside = position(grid, world(new))
    assert (inside >= -0.5 - 1e-9).all()
    assert (inside <= np.array(grid.shape) - 0.5 + 1e-9).all()
    # As many voxels as fit, to the nearest whole one.
    extent = np.array(grid.shape) * grid.spacing_mm
    wanted = np.maximum(1, extent / np.array(spacing))
    assert (np.abs(np.array(new.shape) - wanted) <= 0.5 + 1e-9).all()
    found = resample(
        Volume(np.zeros(grid.shape, np.float32), grid), new, order=1, outside=float("nan")
    )
    assert not np.isnan(found.array).any()


@settings(deadline=None)
@given(grids())
def test_its_own_spacing_changes_nothing(grid: Grid) -> None:
    assert same_grid(grid.with_spacing(grid.spacing_mm), grid)


@settings(deadline=None)
@given(grids(), grids(), POINTS)
def test_a_linear_ramp_is_exact_between_the_outermost_centres(
    source: Grid, shape_and_spacing: Grid, slope: tuple[float, float, float]
) -> None:
    # The target is put where the source is, so that they meet.
    matrix = shape_and_spacing.matrix
    matrix[:3, 3] = source.matrix[:3, 3]
    target = Grid.from_matrix(shape_and_spacing.shape, matrix)
    ramp = world(source) @ slope + 5
    found = resample(Volume(ramp, source), target, order=1).array
    expected = world(target) @ slope + 5
    index = position(source, world(target))
    between = ((index >= 0) & (index <= np.array(source.shape) - 1)).all(axis=-1)
    # Grids whose corners lie within 1e-4 mm of each other count as one: no value moves further.
    off = 1e-4 * np.linalg.norm(slope) if same_grid(source, target) else 1e-6
    np.testing.assert_allclose(found[between], expected[between], rtol=1e-9, atol=off)


@settings(deadline=None)
@given(grids(), grids(), st.integers(0, 1000))
def test_nearest_invents_no_value_and_linear_none_beyond_the_extremes(
    source: Grid, target: Grid, seed: int
) -> None:
    label = np.random.default_rng(seed).choice([0, 3, 77, 255], source.shape).astype(np.uint8)
    nearest = resample(Volume(label, source), target, order=0).array
    assert set(np.unique(nearest)) <= set(np.unique(label))
    linear = resample(Volume(label, source), target, order=1).array
    assert label.min() <= linear.min()
    assert linear.max() <= label.max()


@settings(deadline=None)
@given(grids(), grids())
def test_what_lies_outside_is_marked_and_nothing_else(source: Grid, target: Grid) -> None:
    index = position(source, world(target))
    size = np.array(source.shape)
    volume = Volume(np.zeros(source.shape, np.float32), source)
    found = np.asarray(np.isnan(resample(volume, target, order=1, outside=float("nan")).array))
    if same_grid(source, target):
        assert not found.any()
        return
    outside = np.any((index < -0.5) | (index > size - 0.5), axis=-1)
    from_border = np.minimum(np.abs(index + 0.5), np.abs(index - size + 0.5))
    clear = np.all(from_border > 1e-5, axis=-1)
    np.testing.assert_array_equal(found[clear], outside[clear])


@settings(deadline=None)
@given(grids(), st.tuples(*[st.integers(-2, 6)] * 3), SIZES, st.booleans())
def test_a_shift_by_whole_voxels_copies(
    source: Grid, start: tuple[int, int, int], shape: tuple[int, int, int], nearest: bool
) -> None:
    array = np.random.default_rng(0).normal(size=source.shape)
    target = source.crop(start, shape)
    found = resample(Volume(array, source), target, order=0 if nearest else 1).array
    axes = [
        np.clip(np.arange(s, s + n), 0, size - 1)
        for s, n, size in zip(start, shape, source.shape, strict=True)
    ]
    np.testing.assert_allclose(found, array[np.ix_(*axes)], atol=1e-9)
