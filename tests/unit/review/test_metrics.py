"""Scores against analytic solids and against a brute-force oracle that knows no MONAI."""

from __future__ import annotations

import json
import math
import warnings
from itertools import permutations, product
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from monai.metrics import (
    get_mask_edges,
    get_surface_distance,
)

from pipeline.data.volume import Grid
from pipeline.errors import GeometryError
from pipeline.review.metrics import ABSENT, EMPTY_PREDICTION, OrganScore, score_case, score_json

Mask = npt.NDArray[np.bool_]
ANISOTROPIC = (5.0, 1.0, 2.0)
# Columns: the steps along z, y and x in mm. No two of them are at a right angle.
SHEARED = np.array([[4.5, 0.0, 0.2], [2.1, 1.0, 0.0], [0.3, -0.4, 2.0]])


def score(prediction: Any, reference: Any, spacing_mm: Any, **options: Any) -> OrganScore:
    """On upright axes of that spacing, or on a grid."""
    shape = (*reference.shape, 1, 1, 1)[:3]
    grid = spacing_mm if isinstance(spacing_mm, Grid) else Grid.axis_aligned(shape, spacing_mm)
    (result,) = score_case(prediction, reference, {"liver": 1}, grid, **options)
    return result


def upright(labels: npt.NDArray[Any]) -> Grid:
    return Grid.axis_aligned(labels.shape, (1, 1, 1))


def grid_on(shape: tuple[int, ...], axes: npt.NDArray[np.float64]) -> Grid:
    matrix = np.eye(4)
    matrix[:3, :3] = axes
    return Grid.from_matrix(shape, matrix)


def box(shape: tuple[int, int, int], start: tuple[int, ...], size: tuple[int, ...]) -> Mask:
    mask = np.zeros(shape, dtype=bool)
    mask[tuple(slice(a, a + n) for a, n in zip(start, size, strict=True))] = True
    return mask


def ball(shape: tuple[int, int, int], spacing_mm: Any, radius_mm: float) -> Mask:
    axes = np.ogrid[tuple(slice(n) for n in shape)]
    middles = [(n - 1) / 2 for n in shape]
    squares = [((a - m) * s) ** 2 for a, m, s in zip(axes, middles, spacing_mm, strict=True)]
    return np.asarray(sum(squares) <= radius_mm**2)


def box_surface_mm2(size: tuple[int, ...], axes: npt.NDArray[np.float64]) -> float:
    """Area of the marching-cubes surface of a box: faces, 12 bevelled edges, 8 cut corners."""
    area = 0.0
    for i, j, k in ((0, 1, 2), (1, 2, 0), (2, 0, 1)):
        along, one, other = axes[:, i], axes[:, j], axes[:, k]
        num_along, num_one, num_other = size[i] - 1, size[j] - 1, size[k] - 1
        area += 2 * num_one * num_other * np.linalg.norm(np.cross(one, other))
        for bevel in (one + other, one - other):
            area += num_along * np.linalg.norm(np.cross(along, bevel))
    for signs in product((1, -1), repeat=3):
        a, b, c = (axes * signs / 2).T
        area += np.linalg.norm(np.cross(b - a, c - a)) / 2
    return float(area)


def border_voxels(mask: Mask) -> Mask:
    """Voxels of the mask with one of six neighbours outside it."""
    padded = np.pad(mask, 1)
    inside = padded.copy()
    for axis in range(3):
        for step in (-1, 1):
            inside &= np.roll(padded, step, axis)
    return (padded & ~inside)[1:-1, 1:-1, 1:-1]


def corners(mask: Mask) -> Mask:
    """Voxel corners between inside and outside: not all of the eight voxels around are alike."""
    padded = np.pad(mask, 1).astype(int)
    num = np.zeros([n - 1 for n in padded.shape], dtype=int)
    for z in (0, 1):
        for y in (0, 1):
            for x in (0, 1):
                d, h, w = num.shape
                num += padded[z : z + d, y : y + h, x : x + w]
    return (num > 0) & (num < 8)


def nearest_mm(here: Mask, there: Mask, spacing_mm: Any) -> npt.NDArray[np.float64]:
    """All pairs: from each voxel of `here` to the nearest of `there`."""
    axes = np.asarray(spacing_mm) if np.ndim(spacing_mm) == 2 else np.diag(spacing_mm)
    one, other = np.argwhere(here) @ axes.T, np.argwhere(there) @ axes.T
    distances = np.linalg.norm(one[:, None] - other[None], axis=-1).min(axis=1)
    return np.asarray(distances, dtype=np.float64)


def oracle(p: Mask, r: Mask, spacing_mm: Any, tolerance_mm: float) -> tuple[float, float, float]:
    """Dice, NSD and HD95 by definition; the triangle areas alone are MONAI's (see the boxes)."""
    dice = 2 * (p & r).sum() / (p.sum() + r.sum())
    both = [(border_voxels(p), border_voxels(r)), (border_voxels(r), border_voxels(p))]
    hd95 = max(np.percentile(nearest_mm(a, b, spacing_mm), 95) for a, b in both)
    good = whole = 0.0
    for here, there in ((p, r), (r, p)):
        padded = torch.from_numpy(np.pad(here, 1))
        table = get_mask_edges(padded, padded, crop=False, spacing=spacing_mm)[2].numpy()
        areas = table[corners(here)]
        good += areas[nearest_mm(corners(here), corners(there), spacing_mm) <= tolerance_mm].sum()
        whole += areas.sum()
    return float(dice), good / whole, float(hd95)


def speckle(rng: np.random.Generator, shape: tuple[int, ...], share: float) -> Mask:
    mask = rng.random(shape) < share
    mask[tuple(n // 2 for n in shape)] = True
    return mask


@pytest.mark.parametrize("seed", range(12))
def test_equals_brute_force_on_arbitrary_masks(seed: int) -> None:
    rng = np.random.default_rng(seed)
    shape = tuple(rng.integers(3, 11, size=3))
    spacing = tuple(float(s) for s in rng.choice([0.7, 1.0, 1.5, 2.5, 5.0], size=3))
    p, r = speckle(rng, shape, rng.choice([0.02, 0.3, 0.8])), speckle(rng, shape, 0.2)
    # No distance on such grids is near this value: rounding cannot decide.
    result = score(p, r, spacing, tolerance_mm=1.6123)
    expected = oracle(p, r, spacing, 1.6123)
    assert (result.dice, result.nsd, result.hd95_mm) == pytest.approx(expected, abs=1e-5)


def test_equals_brute_force_on_solids_that_touch_the_image_edge() -> None:
    r = box((6, 12, 10), (0, 0, 0), (4, 9, 10))
    p = box((6, 12, 10), (2, 3, 0), (4, 9, 8))
    result = score(p, r, ANISOTROPIC, tolerance_mm=2.5)
    expected = oracle(p, r, ANISOTROPIC, 2.5)
    assert (result.dice, result.nsd, result.hd95_mm) == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("axis", [0, 1, 2])
@pytest.mark.parametrize("num_voxels", [1, 2, 3])
def test_shifted_cube_is_off_by_voxels_times_the_spacing_of_that_axis(
    axis: int, num_voxels: int
) -> None:
    spacing = (3.0, 0.8, 1.25)
    reference = box((20, 40, 30), (5, 12, 9), (8, 8, 8))
    shift_mm = num_voxels * spacing[axis]
    prediction = np.roll(reference, num_voxels, axis)

    exact = score(prediction, reference, spacing, tolerance_mm=shift_mm)
    assert exact.dice == pytest.approx((8 - num_voxels) / 8)
    assert exact.hd95_mm == pytest.approx(shift_mm, rel=1e-6)
    assert exact.nsd == 1.0
    assert score(prediction, reference, spacing, tolerance_mm=shift_mm - 0.01).nsd < 0.95


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_the_outlines_of_one_slice_are_its_surfaces(axis: int) -> None:
    """Closed in front and behind, every voxel of a slice would be surface: NSD .5 for these."""
    shape: list[int] = [60, 60, 60]
    spacing = [2.0, 2.0, 2.0]
    shape[axis], spacing[axis] = 1, 9.0
    z, y, x = shape
    inner, outer = ball((z, y, x), spacing, 20), ball((z, y, x), spacing, 36)
    found = score(inner, outer, spacing, tolerance_mm=10.0)
    assert found.nsd == 0
    assert found.hd95_mm == pytest.approx(16, abs=2.0)
    assert score(inner, outer, spacing, tolerance_mm=20.0).nsd == 1
    assert score(outer, outer, spacing).hd95_mm == 0
    assert score(outer & False, outer, spacing).hd95_mm == pytest.approx(math.hypot(120, 120))


def test_the_tilt_of_the_stack_of_a_slice_changes_nothing_and_a_skewed_slice_is_refused() -> None:
    mask, other = box((1, 20, 20), (0, 4, 4), (1, 9, 9)), box((1, 20, 20), (0, 5, 7), (1, 9, 9))
    tilted, skewed = np.diag([5.0, 1.0, 2.0]), np.diag([5.0, 1.0, 2.0])
    tilted[1, 0], skewed[1, 2] = 1.5, 0.5
    assert score(mask, other, grid_on(mask.shape, tilted)) == score(mask, other, ANISOTROPIC)
    with pytest.raises(GeometryError, match="not at right angles"):
        score(mask, other, grid_on(mask.shape, skewed))
    assert score(mask, other, grid_on(mask.shape, skewed), surface=False).dice > 0


def test_nsd_weighs_surface_by_its_area_in_mm2() -> None:
    # A perfect box and one lone voxel far away: the share that fails is the lone voxel's surface.
    shape, size = (14, 30, 30), (6, 7, 8)
    reference = box(shape, (1, 2, 3), size)
    prediction = reference | box(shape, (12, 25, 25), (1, 1, 1))
    for axes in (np.diag(ANISOTROPIC), SHEARED):
        good = 2 * box_surface_mm2(size, axes)
        expected = good / (good + box_surface_mm2((1, 1, 1), axes))
        found = score(prediction, reference, grid_on(shape, axes)).nsd
        assert found == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("seed", range(6))
def test_distances_on_a_sheared_grid_are_those_in_mm(seed: int) -> None:
    rng = np.random.default_rng(seed)
    shape = (7, 9, 8)
    p, r = speckle(rng, shape, 0.02), speckle(rng, shape, 0.05)
    both = [(border_voxels(p), border_voxels(r)), (border_voxels(r), border_voxels(p))]
    expected = max(np.percentile(nearest_mm(a, b, SHEARED), 95) for a, b in both)
    result = score(p, r, grid_on(shape, SHEARED), tolerance_mm=0.0)
    assert result.hd95_mm == pytest.approx(expected, rel=1e-6)
    # Areas are held against boxes; what lies within the tolerance is counted here.
    far = max(nearest_mm(corners(a), corners(b), SHEARED).max() for a, b in ((p, r), (r, p)))
    assert score(p, r, grid_on(shape, SHEARED), tolerance_mm=far + 1e-4).nsd == 1.0
    assert score(p, r, grid_on(shape, SHEARED), tolerance_mm=far - 1e-4).nsd < 1.0


def test_order_and_direction_of_sheared_axes_do_not_matter() -> None:
    shape = (12, 14, 13)
    z, y, x = np.indices(shape)
    # Prisms with a slanted face: its area tells the directions of the axes apart.
    p, r = ((z > n) & (y > 2) & (x > 2) & (x < 9) & (z + y < 12 + 2 * n) for n in (1, 2))
    straight = score(p, r, grid_on(shape, SHEARED), tolerance_mm=1.6)
    assert 0.3 < straight.nsd < 0.95
    for order in permutations(range(3)):
        for signs in product((1, -1), repeat=3):
            turn = tuple(slice(None, None, sign) for sign in signs)
            axes = (SHEARED * signs)[:, order]
            one, other = (mask[turn].transpose(order) for mask in (p, r))
            turned = score(one, other, grid_on(one.shape, axes), tolerance_mm=1.6)
            assert turned.hd95_mm == pytest.approx(straight.hd95_mm, rel=1e-6)
            assert turned.nsd == pytest.approx(straight.nsd, rel=1e-6)


def test_upright_axes_are_scored_by_their_spacing_bit_for_bit() -> None:
    """Turned in space or rounded as in a file, they give what monai gives for the spacing."""
    rng = np.random.default_rng(5)
    shape, spacing = (9, 10, 11), (2.5, 0.9765625, 0.7)
    p, r = speckle(rng, shape, 0.1), speckle(rng, shape, 0.2)
    turn = np.linalg.qr(rng.normal(size=(3, 3)))[0]
    for axes in (np.diag(spacing), turn @ np.diag(spacing), (turn * spacing).round(4)):
        grid = grid_on(shape, axes)
        assert grid.shear_degrees < 0.02
        mm = grid.spacing_mm
        one, other = (torch.from_numpy(np.pad(mask, 1)) for mask in (p, r))
        edges = get_mask_edges(one, other, crop=False)
        apart = (
            get_surface_distance(*edges, spacing=mm),
            get_surface_distance(*edges[::-1], spacing=mm),
        )
        hd95 = max(np.percentile(d.double().numpy(), 95) for d in apart)
        *surfaces, areas_p, areas_r = get_mask_edges(one, other, crop=False, spacing=mm)
        near = [
            (d <= 1.5).numpy()
            for d in (
                get_surface_distance(*surfaces, spacing=mm),
                get_surface_distance(*surfaces[::-1], spacing=mm),
            )
        ]
        areas = [a[s].double().numpy() for a, s in zip((areas_p, areas_r), surfaces, strict=True)]
        good = areas[0][near[0]].sum() + areas[1][near[1]].sum()
        found = score(p, r, grid, tolerance_mm=1.5)
        assert (found.hd95_mm, found.nsd) == (hd95, good / (areas[0].sum() + areas[1].sum()))


def test_a_distance_equal_to_the_tolerance_is_within_it() -> None:
    # 3 x 0.1 exceeds 0.3 in double precision.
    reference = box((20, 20, 20), (4, 4, 4), (8, 8, 8))
    prediction = np.roll(reference, 3, axis=2)
    assert score(prediction, reference, (1.0, 1.0, 0.1), tolerance_mm=0.3).nsd == 1.0


def test_missed_organ_gets_the_worst_values_and_never_nan() -> None:
    reference = box((10, 20, 30), (2, 3, 4), (2, 2, 2))
    result = score(np.zeros_like(reference), reference, (3.0, 2.0, 1.0))
    assert (result.dice, result.nsd) == (0.0, 0.0)
    assert result.hd95_mm == pytest.approx(math.sqrt(30**2 + 40**2 + 30**2))
    assert (result.num_reference, result.num_predicted) == (8, 0)
    assert result.reason == EMPTY_PREDICTION
    corner_to_corner = score(
        box((10, 20, 30), (0, 0, 0), (1, 1, 1)),
        box((10, 20, 30), (9, 19, 29), (1, 1, 1)),
        (3.0, 2.0, 1.0),
    )
    assert corner_to_corner.hd95_mm < result.hd95_mm


def test_a_missed_organ_on_a_sheared_grid_is_a_longest_diagonal_away() -> None:
    shape = (4, 5, 6)
    reference = box(shape, (0, 0, 0), (1, 1, 1))
    result = score(np.zeros_like(reference), reference, grid_on(shape, SHEARED))
    ends = np.array(list(product(*((0, n) for n in shape)))) @ SHEARED.T
    longest = np.linalg.norm(ends[:, None] - ends[None], axis=-1).max()
    assert result.hd95_mm == pytest.approx(longest)


@pytest.mark.parametrize("num_false_positives", [0, 8])
def test_organ_absent_from_the_reference_has_its_reason(num_false_positives: int) -> None:
    prediction = np.zeros((5, 6, 7), dtype=np.uint8)
    prediction.flat[:num_false_positives] = 1
    result = score(prediction, np.zeros_like(prediction), ANISOTROPIC)
    assert all(math.isnan(value) for value in (result.nsd, result.hd95_mm))
    # What is predicted where there is nothing counts, as in nnU-Net; nothing on both sides is none.
    assert result.dice == 0 if num_false_positives else math.isnan(result.dice)
    assert (result.num_reference, result.num_predicted) == (0, num_false_positives)
    assert result.reason == ABSENT


def test_ignored_voxels_count_on_neither_side() -> None:
    reference = box((8, 8, 8), (2, 2, 2), (4, 4, 4)).astype(np.uint8)
    prediction = reference.copy()
    reference[5:] = 255
    prediction[6:] = 1
    result = score(prediction, reference, (1, 1, 1))
    assert (result.dice, result.nsd, result.hd95_mm) == (1.0, 1.0, 0.0)
    assert (result.num_reference, result.num_predicted) == (48, 48)
    counted = score(prediction, reference, (1, 1, 1), ignore_value=None)
    assert counted.num_predicted == 64 + 128
    assert counted.dice < 0.5


def test_an_entirely_ignored_reference_has_no_organ() -> None:
    reference = np.full((4, 4, 4), 255, dtype=np.uint8)
    assert score(np.ones_like(reference), reference, (1, 1, 1)).reason == ABSENT


def test_without_surface_only_dice_is_computed() -> None:
    reference = box((8, 8, 8), (2, 2, 2), (4, 4, 4))
    result = score(reference, reference, (1, 1, 1), surface=False)
    assert (result.dice, result.reason) == (1.0, "")
    assert math.isnan(result.nsd)
    assert math.isnan(result.hd95_mm)


def test_organs_are_scored_apart_and_in_the_order_asked_for() -> None:
    reference = np.zeros((6, 10, 10), dtype=np.int16)
    reference[1:4, 1:5, 1:5], reference[1:4, 5:9, 5:9] = 7, 300
    prediction = np.where(reference == 300, 300, 0)
    scores = score_case(prediction, reference, {"spleen": 300, "liver": 7}, upright(reference))
    assert [(s.organ, s.dice) for s in scores] == [("spleen", 1.0), ("liver", 0.0)]


def test_scoring_emits_no_warning_and_leaves_its_input_alone() -> None:
    reference = box((8, 8, 8), (2, 2, 2), (4, 4, 4)).astype(np.uint8)
    prediction = np.roll(reference, 1, 0)
    for array in (reference, prediction):
        array.flags.writeable = False
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        score(prediction, reference, (1, 1, 1))


def test_a_grid_of_another_shape_is_refused() -> None:
    labels = np.zeros((2, 3, 4), int)
    with pytest.raises(GeometryError, match=r"shape \(2, 3, 4\), their grid \(2, 3, 5\)"):
        score(labels, labels, Grid.axis_aligned((2, 3, 5), (1, 1, 1)))


@pytest.mark.parametrize("tolerance_mm", [-1.0, math.nan, math.inf])
def test_a_tolerance_that_is_no_distance_is_refused(tolerance_mm: float) -> None:
    labels = np.zeros((2, 3, 4), int)
    with pytest.raises(ValueError, match="tolerance_mm"):
        score(labels, labels, (1, 1, 1), tolerance_mm=tolerance_mm)


def test_an_organ_cannot_have_the_ignored_value() -> None:
    labels = np.zeros((2, 3, 4), int)
    with pytest.raises(ValueError, match="255"):
        score_case(labels, labels, {"liver": 255}, upright(labels))


def test_a_score_as_json_has_no_nan() -> None:
    known = OrganScore("liver", 0.9, 1.0, 2.0, 100, 90)
    assert score_json(known) == {
        "Dice": 0.9, "NSD": 1.0, "HD95_mm": 2.0, "n_ref": 100, "n_pred": 90, "reason": "",
    }  # fmt: skip
    spurious = score_json(OrganScore.missing("liver", ABSENT, num_predicted=3))
    assert (spurious["Dice"], spurious["NSD"], spurious["HD95_mm"]) == (0.0, None, None)
    assert (spurious["n_pred"], spurious["reason"]) == (3, ABSENT)
    missing = score_json(OrganScore.missing("liver", ABSENT))
    assert (missing["Dice"], missing["NSD"], missing["HD95_mm"]) == (None, None, None)
    json.dumps([spurious, missing], allow_nan=False)
