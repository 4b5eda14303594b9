"""What holds for any two masks and any spacing."""

from __future__ import annotations

from itertools import permutations

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from pipeline.data.volume import Grid
from pipeline.review.metrics import OrganScore, score_case

Mask = npt.NDArray[np.bool_]
Spacing = tuple[float, float, float]
Pair = tuple[Mask, Mask]

# Multiples of 1/8 keep all products exact, so that a distance equal to the tolerance is not a
# matter of rounding.
EIGHTHS = st.integers(3, 40).map(lambda n: n / 8)
SPACINGS = st.tuples(EIGHTHS, EIGHTHS, EIGHTHS)


@st.composite
def pairs(draw: st.DrawFn) -> Pair:
    """A prediction, perhaps empty, and a reference with at least one voxel."""
    shape = draw(hnp.array_shapes(min_dims=3, max_dims=3, min_side=1, max_side=6))
    prediction = draw(hnp.arrays(np.bool_, shape))
    reference = draw(hnp.arrays(np.bool_, shape))
    reference[tuple(draw(st.integers(0, n - 1)) for n in shape)] = True
    return prediction, reference


def score(
    prediction: Mask, reference: Mask, spacing_mm: Spacing, tolerance_mm: float = 3.0
) -> OrganScore:
    grid = Grid.axis_aligned(reference.shape, spacing_mm)
    (result,) = score_case(prediction, reference, {"liver": 1}, grid, tolerance_mm=tolerance_mm)
    return result


def values(result: OrganScore) -> tuple[float, float, float]:
    return result.dice, result.nsd, result.hd95_mm


quick = settings(max_examples=30, deadline=None)


@quick
@given(pairs(), SPACINGS)
def test_ranges_and_agreement_with_the_counts(pair: Pair, spacing_mm: Spacing) -> None:
    prediction, reference = pair
    result = score(prediction, reference, spacing_mm)
    slice_axis = Grid.axis_aligned(reference.shape, spacing_mm).slice_axis
    edges = [n * mm for n, mm in zip(reference.shape, spacing_mm, strict=True)]
    diagonal = float(np.linalg.norm([mm for axis, mm in enumerate(edges) if axis != slice_axis]))
    assert 0 <= result.dice <= 1
    assert 0 <= result.nsd <= 1
    assert 0 <= result.hd95_mm <= diagonal * (1 + 1e-6)
    assert (result.hd95_mm == pytest.approx(diagonal)) == (result.num_predicted == 0)
    assert (result.num_reference, result.num_predicted) == (reference.sum(), prediction.sum())


@quick
@given(pairs(), SPACINGS)
def test_prediction_and_reference_are_interchangeable(pair: Pair, spacing_mm: Spacing) -> None:
    prediction, reference = pair
    prediction[0, 0, 0] = True
    there, back = score(prediction, reference, spacing_mm), score(reference, prediction, spacing_mm)
    assert values(there) == pytest.approx(values(back), rel=1e-6)


@quick
@given(pairs(), SPACINGS, st.sampled_from([0.0, 3.0]))
def test_identical_masks_are_perfect(pair: Pair, spacing_mm: Spacing, tolerance_mm: float) -> None:
    assert values(score(pair[1], pair[1], spacing_mm, tolerance_mm)) == (1.0, 1.0, 0.0)


@quick
@given(pairs(), SPACINGS, st.sampled_from(list(permutations(range(3)))))
def test_axes_and_spacing_permute_together(
    pair: Pair, spacing_mm: Spacing, order: tuple[int, int, int]
) -> None:
    prediction, reference = pair
    z, y, x = (spacing_mm[axis] for axis in order)
    permuted = score(prediction.transpose(order), reference.transpose(order), (z, y, x))
    straight = score(prediction, reference, spacing_mm)
    assert values(permuted) == pytest.approx(values(straight), rel=1e-5)


@quick
@given(pairs(), SPACINGS)
def test_distances_scale_with_the_spacing(pair: Pair, spacing_mm: Spacing) -> None:
    z, y, x = spacing_mm
    single = score(*pair, spacing_mm, tolerance_mm=3.0)
    double = score(*pair, (2 * z, 2 * y, 2 * x), tolerance_mm=6.0)
    assert double.hd95_mm == pytest.approx(2 * single.hd95_mm, rel=1e-6)
    assert double.nsd == pytest.approx(single.nsd, rel=1e-5)
    assert double.dice == single.dice


@quick
@given(pairs(), SPACINGS)
def test_nsd_grows_with_the_tolerance(pair: Pair, spacing_mm: Spacing) -> None:
    rising = [score(*pair, spacing_mm, tolerance_mm).nsd for tolerance_mm in (0.0, 1.0, 4.0)]
    assert rising == sorted(rising)


@quick
@given(pairs(), SPACINGS, st.tuples(*[st.integers(0, 3)] * 6))
def test_background_around_changes_only_the_worst_distance(
    pair: Pair, spacing_mm: Spacing, around: tuple[int, ...]
) -> None:
    prediction, reference = pair
    prediction[0, 0, 0] = True
    # Slices beside one slice would make it a volume, which has other surfaces.
    sides = zip(reference.shape, around[:3], around[3:], strict=True)
    width = [(before, after) if n > 1 else (0, 0) for n, before, after in sides]
    padded = score(np.pad(prediction, width), np.pad(reference, width), spacing_mm)
    assert values(padded) == values(score(prediction, reference, spacing_mm))
