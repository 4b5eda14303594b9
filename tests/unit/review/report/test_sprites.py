"""Sheets of tiles: what lies where, what is outlined, how they fit into a page."""

from __future__ import annotations

import base64
import io
from typing import Any

import numpy as np
import pytest
from PIL import Image

from pipeline.review.report.pictures import (
    SIZE_STEPS,
    CaseLayers,
    Layer,
    Plane,
    fitting_planes,
    planes_of,
)

SHAPE = (6, 8, 10)
# Voxels at the most superior, anterior and right end; x grows to the right, y to the front.
CORNER = (5, 7, 9)


def volume(*voxels: tuple[int, int, int], value: int = 1, dtype: Any = np.uint8) -> Any:
    found = np.zeros(SHAPE, dtype=dtype)
    for voxel in voxels:
        found[voxel] = value
    return found


def made(
    *layers: Layer, image: Any = None, wrong: Any = None, spacing: Any = (1.0, 1.0, 1.0)
) -> CaseLayers:
    hu = np.full(SHAPE, -1000, dtype=np.int16) if image is None else image
    errors = np.zeros(hu.shape, dtype=np.bool_) if wrong is None else wrong
    return CaseLayers("a/b", "test", hu, spacing, layers, errors, ())


def layer(values: Any, style: Any = "fill", key: str = "student") -> Layer:
    return Layer(key, key, values, {7: "#ff0000", 9: "#0000ff"}, style, True)


def pixels(uri: str, mode: str) -> Any:
    kind, _, data = uri.partition(";base64,")
    assert kind in ("data:image/png", "data:image/jpeg")
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(data))).convert(mode)).astype(int)


def tile(plane: Plane, uri: str, number: int, mode: str = "RGBA") -> Any:
    row, column = divmod(number, plane.columns)
    top, left = row * plane.height, column * plane.width
    return pixels(uri, mode)[top : top + plane.height, left : left + plane.width]


def test_right_is_on_the_left_and_anterior_and_superior_are_at_the_top() -> None:
    case = made(layer(volume(CORNER, value=7)))
    planes = planes_of(case, 48, 10)
    assert [(p.name, p.ends) for p in planes] == [
        ("axial", ("R", "L", "A", "P")),
        ("coronal", ("R", "L", "S", "I")),
        ("sagittal", ("A", "P", "S", "I")),
    ]
    for plane, index in zip(planes, CORNER, strict=True):
        (sheet,) = plane.sheets
        shown = tile(plane, sheet.uri, index)
        assert shown[0, 0].tolist() == [255, 0, 0, 115]
        assert np.count_nonzero(shown[..., 3]) == 1
        assert not tile(plane, sheet.uri, 0)[..., 3].any()


@pytest.mark.parametrize(("axis", "name"), [(0, "axial"), (1, "coronal"), (2, "sagittal")])
def test_one_slice_is_shown_in_its_own_plane_alone(axis: int, name: str) -> None:
    shape = list(SHAPE)
    shape[axis] = 1
    image = np.full(shape, -1000, dtype=np.int16)
    values = np.full(shape, 7, dtype=np.uint8)
    (plane,) = planes_of(made(layer(values), image=image), 48, 60)
    assert (plane.name, plane.slices, max(plane.width, plane.height)) == (name, (1,), 60)


def test_the_ct_lies_as_its_layers_do() -> None:
    image = np.full(SHAPE, -1000, dtype=np.int16)
    image[:3, :4, :5] = 1000
    planes = planes_of(made(layer((image > 0).astype(np.uint8) * 9), image=image), 48, 80)
    for plane in planes:
        for number in (0, len(plane.slices) - 1):
            grey = tile(plane, plane.image, number, "L")
            mask = tile(plane, plane.sheets[0].uri, number)[..., 3] > 0
            # Interpolation and JPEG blur the edge by a voxel of eight pixels.
            assert ((grey > 128) != mask).mean() < 0.1
            assert mask.any() == (number == 0)


def test_each_style_has_its_pixels() -> None:
    values = np.zeros(SHAPE, dtype=np.uint8)
    values[1:5, 2:7, 2:8] = 7
    fill, solid, outline = (
        planes_of(made(layer(values, style)), 48, 10)[0] for style in ("fill", "solid", "outline")
    )
    inside = np.flip(values[3] > 0)
    assert ((tile(fill, fill.sheets[0].uri, 3)[..., 3] > 0) == inside).all()
    assert tile(solid, solid.sheets[0].uri, 3)[..., 3].max() == 215
    edge = tile(outline, outline.sheets[0].uri, 3)[..., 3] == 255
    expected = inside.copy()
    expected[2:5, 3:7] = False  # one pixel in from the 5 x 6 rectangle, flipped
    assert (edge == expected).all()


def test_neighbouring_organs_are_outlined_against_each_other() -> None:
    values = np.full(SHAPE, 7, dtype=np.uint8)
    values[:, :, 5:] = 9
    plane = planes_of(made(layer(values, "outline")), 48, 10)[0]
    row = tile(plane, plane.sheets[0].uri, 2)[4]
    assert np.flatnonzero(row[:, 3]).tolist() == [0, 4, 5, 9]
    assert row[4].tolist() == [0, 0, 255, 255]
    assert row[5].tolist() == [255, 0, 0, 255]


def test_a_layer_that_is_nowhere_has_no_sheet() -> None:
    case = made(layer(volume()), layer(volume(CORNER, value=9), key="conflict"))
    for plane in planes_of(case, 48, 10):
        assert [sheet.key for sheet in plane.sheets] == ["conflict"]


def test_planes_open_where_the_student_errs_most() -> None:
    wrong = np.zeros(SHAPE, dtype=np.bool_)
    wrong[4, 1, 2:6] = True
    wrong[2, 1, 3] = True
    planes = planes_of(made(layer(volume((0, 6, 9), value=7)), wrong=wrong), 48, 10)
    assert [p.slices[p.start] for p in planes] == [5, 2, 4]
    # Without errors: where there is something to see; the agreed background is everywhere.
    case = made(layer(volume((0, 6, 9), value=7)), layer(volume(CORNER, value=7), key="background"))
    assert [p.slices[p.start] for p in planes_of(case, 48, 10)] == [1, 7, 10]


def test_pixels_follow_millimetres() -> None:
    planes = planes_of(made(spacing=(5.0, 1.0, 1.0)), 48, 60)
    assert [(p.height, p.width) for p in planes] == [(16, 20), (60, 20), (60, 16)]


def test_few_slices_are_spread_from_end_to_end() -> None:
    plane = planes_of(made(), 4, 20)[2]
    assert plane.slices == (1, 4, 7, 10)
    assert plane.num_slices == 10
    assert (plane.columns, plane.rows) == (2, 2)
    assert pixels(plane.image, "L").shape == (2 * plane.height, 2 * plane.width)


def test_pictures_are_made_smaller_until_they_fit() -> None:
    noise = np.random.default_rng(0).integers(-200, 300, (60, 60, 60)).astype(np.int16)
    case = made(image=noise)
    sizes = [sum(p.num_bytes for p in planes_of(case, *step)) for step in SIZE_STEPS]
    assert sizes == sorted(sizes, reverse=True)
    assert fitting_planes([case], sizes[0])[1] == SIZE_STEPS[0]
    planes, step = fitting_planes([case, case], 2 * sizes[2])
    assert step == SIZE_STEPS[2]
    assert sum(p.num_bytes for found in planes for p in found) == 2 * sizes[2]
    # Nothing fits: the smallest is taken all the same.
    assert fitting_planes([case], 10)[1] == SIZE_STEPS[-1]


@pytest.mark.parametrize("step", SIZE_STEPS)
def test_sheets_stay_small_enough_for_any_browser(step: tuple[int, int]) -> None:
    side = int(np.ceil(np.sqrt(step[0]))) * step[1]
    assert side <= 4096
