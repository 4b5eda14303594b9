"""Slices of a case as few pictures: per plane one sheet of tiles for the CT, one for each layer.

A sheet compresses better than single slices, and a page needs no code to show the tile that it
opens at. CT sheets are JPEG, layers PNG with a palette and transparency.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageColor

from pipeline.figures import PLANE_ENDS, WINDOW_HU
from pipeline.html_report.case_layers import CaseLayers, Layer

Array = npt.NDArray[Any]
# (slices per plane, pixels of the longest side), the first that fits is taken.
LADDER = ((48, 240), (36, 240), (24, 208), (16, 176), (8, 144), (4, 112))
IMAGE_BYTES = 11_000_000
_JPEG_QUALITY = 80
_ALPHA = {"fill": 115, "solid": 215, "outline": 255}


@dataclass(frozen=True)
class Sheet:
    """One layer of one plane as a data URI."""

    key: str
    uri: str


@dataclass(frozen=True)
class Plane:
    """One plane of a case.

    Attributes:
        name: axial, coronal or sagittal.
        ends: what lies left, right, at the top and at the bottom.
        slices: numbers of the slices shown, from 1, of `num_slices`.
        num_slices: that the case has.
        step_mm: between neighbouring slices of the case.
        start: which of `slices` is shown first, from 0.
        columns: of each sheet.
        rows: of each sheet.
        width: of a tile, in pixels.
        height: of a tile, in pixels.
        image: the CT.
        sheets: of the layers that show anything, lowest first.
    """

    name: str
    ends: tuple[str, str, str, str]
    slices: tuple[int, ...]
    num_slices: int
    step_mm: float
    start: int
    columns: int
    rows: int
    width: int
    height: int
    image: str
    sheets: Sequence[Sheet]

    @property
    def num_bytes(self) -> int:
        """Of all its pictures, as they stand in the page."""
        return len(self.image) + sum(len(sheet.uri) for sheet in self.sheets)


def fitting_planes(
    cases: Sequence[CaseLayers], most_bytes: int = IMAGE_BYTES
) -> tuple[list[list[Plane]], tuple[int, int]]:
    """All planes of all cases, with as many slices and pixels as the page has room for.

    Args:
        cases: to be shown.
        most_bytes: of all pictures together; the last step of `LADDER` is taken in any case.

    Returns:
        Planes of each case, and (slices, pixels) that it came to.
    """
    planes: list[list[Plane]] = []
    for step in LADDER:
        planes = [planes_of(case, *step) for case in cases]
        if sum(plane.num_bytes for found in planes for plane in found) <= most_bytes:
            break
    return planes, step


def planes_of(case: CaseLayers, most_slices: int, side: int) -> list[Plane]:
    """Axial, coronal and sagittal, all at one scale.

    Args:
        case: what is shown.
        most_slices: per plane, evenly through the case.
        side: pixels of the case's longest edge.
    """
    edges_mm = [n * mm for n, mm in zip(case.image.shape, case.spacing_mm, strict=True)]
    pixels = [max(1, round(side * mm / max(edges_mm))) for mm in edges_mm]
    low, high = WINDOW_HU
    grey = np.clip((case.image.astype(np.float32) - low) / (high - low) * 255, 0, 255)
    grey = np.rint(grey).astype(np.uint8)
    busy = _busy(case)
    planes = []
    for axis, name in enumerate(PLANE_ENDS):
        height, width = (n for a, n in enumerate(pixels) if a != axis)
        total = case.image.shape[axis]
        chosen = np.unique(np.linspace(0, total - 1, min(total, most_slices)).round().astype(int))
        areas = busy.sum(axis=tuple(a for a in range(3) if a != axis))[chosen]
        start = int(areas.argmax()) if areas.any() else len(chosen) // 2
        columns = int(np.ceil(np.sqrt(len(chosen))))
        rows = int(np.ceil(len(chosen) / columns))
        shape = (rows, columns, height, width)
        sheets = [
            Sheet(layer.key, _layer_uri(layer, axis, chosen, shape))
            for layer in case.layers
            if layer.values.any()
        ]
        planes.append(
            Plane(
                name,
                PLANE_ENDS[name],
                tuple(int(i) + 1 for i in chosen),
                total,
                case.spacing_mm[axis],
                start,
                columns,
                rows,
                width,
                height,
                _image_uri(grey, axis, chosen, shape),
                sheets,
            )
        )
    return planes


def _busy(case: CaseLayers) -> npt.NDArray[np.bool_]:
    """What a plane opens at: the most errors of the student, else the most of any organ."""
    if case.wrong.any():
        return case.wrong
    found = np.zeros(case.image.shape, dtype=np.bool_)
    for layer in case.layers:
        if layer.key != "background":
            found |= layer.values > 0
    return found


def _tile(volume: Array, axis: int, index: int) -> Array:
    """As radiologists look: right on the left, anterior or superior at the top."""
    return np.asarray(np.take(volume, index, axis=axis)[::-1, ::-1])


def _image_uri(grey: Array, axis: int, chosen: Array, shape: tuple[int, ...]) -> str:
    tiles = [_scaled(_tile(grey, axis, i), shape, Image.Resampling.BILINEAR) for i in chosen]
    return _uri(Image.fromarray(_montage(tiles, shape)), "jpeg", quality=_JPEG_QUALITY)


def _layer_uri(layer: Layer, axis: int, chosen: Array, shape: tuple[int, ...]) -> str:
    numbers = np.zeros(256, dtype=np.uint8)
    for number, value in enumerate(layer.colours, start=1):
        numbers[value] = number
    tiles = []
    for index in chosen:
        values = numbers[_tile(layer.values, axis, index)]
        tile = _scaled(values, shape, Image.Resampling.NEAREST)
        tiles.append(_outline(tile) if layer.style == "outline" else tile)
    sheet = Image.fromarray(_montage(tiles, shape), mode="P")
    colours = [ImageColor.getrgb(colour)[:3] for colour in layer.colours.values()]
    sheet.putpalette([0, 0, 0, *(part for colour in colours for part in colour)])
    transparency = bytes([0] + [_ALPHA[layer.style]] * len(layer.colours))
    return _uri(sheet, "png", optimize=True, transparency=transparency)


def _scaled(tile: Array, shape: tuple[int, ...], how: Image.Resampling) -> Array:
    height, width = shape[2:]
    return np.asarray(Image.fromarray(np.ascontiguousarray(tile)).resize((width, height), how))


def _montage(tiles: Sequence[Array], shape: tuple[int, ...]) -> Array:
    rows, columns, height, width = shape
    sheet = np.zeros((rows * height, columns * width), dtype=np.uint8)
    for number, tile in enumerate(tiles):
        top, left = number // columns * height, number % columns * width
        sheet[top : top + height, left : left + width] = tile
    return sheet


def _outline(tile: Array) -> Array:
    """The pixels of each value that have a neighbour of another one; beyond the tile is 0."""
    padded = np.pad(tile, 1)
    inner = np.ones(tile.shape, dtype=np.bool_)
    for rows, columns in ((0, 1), (2, 1), (1, 0), (1, 2)):
        height, width = tile.shape
        inner &= padded[rows : rows + height, columns : columns + width] == tile
    return np.where(inner, 0, tile).astype(np.uint8)


def _uri(image: Image.Image, kind: str, **options: Any) -> str:
    buffer = io.BytesIO()
    image.save(buffer, format=kind.upper(), **options)
    return f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode('ascii')}"
