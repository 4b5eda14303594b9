"""The phantom's patient: a cartoon of an abdomen as smooth implicit shapes, painted one by one.

Everything is placed in millimetres in the frame of a reference body (see `shapes`). The caller
bends and scales that frame to the case at hand; nothing here knows about voxels, spacings or
scanners.
"""

from __future__ import annotations

from typing import Final

import numpy as np

from pipeline.data.phantom.organs import kidneys, lesions, liver, pancreas, spleen
from pipeline.data.phantom.patient import GUT_CONTENTS_HU, Patient
from pipeline.data.phantom.shapes import (
    FAR,
    Box,
    Canvas,
    Field,
    Point,
    Rng,
    ellipsoid,
    near,
    oval,
    tube_along,
)

_EVERYWHERE: Final[Box] = (slice(None), slice(None), slice(None))
_CAVITY_MM: Final = (88.0, 132.0)


def draw(canvas: Canvas, patient: Patient, rng: Rng) -> None:
    """Paints a whole abdomen: intensity and label of every voxel of the canvas.

    Args:
        canvas: painted in place, `hu` (float32, HU) and `label` (uint8), both (D, H, W).
        patient: tissue intensities and habitus.
        rng: source of the anatomy; what is drawn from it does not depend on the canvas's shape.
    """
    cavity, lung = _trunk(canvas, patient, rng)
    _skeleton(canvas, cavity, rng)
    inside = np.maximum(cavity, 3.0 - lung)
    _bowel(canvas, inside, patient, rng)
    _stomach(canvas, inside, patient, rng)
    liver(canvas, inside, patient, rng)
    spleen(canvas, inside, patient, rng)
    kidneys(canvas, inside, patient, rng)
    _great_vessels(canvas, patient, rng)
    pancreas(canvas, inside, patient, rng)
    lesions(canvas, inside, patient, rng)


# --- the frame: skin, fat, muscle, lungs, bones -------------------------------------------------


def _trunk(canvas: Canvas, patient: Patient, rng: Rng) -> tuple[Field, Field]:
    """Skin, fat, muscle wall, visceral fat, lungs and heart; distances to cavity and lungs."""
    at = canvas.at
    wall, fat = patient.wall_mm, patient.fat_mm
    cavity = oval(at, _CAVITY_MM, 2.4)
    skin_at = np.stack([at[0], at[1] + 0.15 * fat, at[2]])
    skin = oval(skin_at, (_CAVITY_MM[0] + wall + 0.9 * fat, _CAVITY_MM[1] + wall + fat), 2.3)
    table = np.abs(at[1] + 140 + 0.55 * fat - 0.0009 * at[2] ** 2) - 3
    canvas.paint(_EVERYWHERE, np.maximum(table, np.abs(at[2]) - 185), -150.0)
    canvas.paint(_EVERYWHERE, skin, 20.0)
    canvas.paint(_EVERYWHERE, skin + 3, -105 + 6 * canvas.texture)
    muscle = patient.hu["muscle"]
    canvas.paint(_EVERYWHERE, cavity - wall, muscle + 6 * canvas.texture)
    for side in (-1, 1):
        box, back = ellipsoid(canvas, (0, -88, side * 30), (500, 19, 26))
        canvas.paint(box, back, muscle - 8 + 12 * canvas.texture[box])
    canvas.paint(_EVERYWHERE, cavity, -95 + 10 * canvas.texture)
    top_right = 98 + 8 * rng.uniform(-1, 1)
    top_left = top_right - rng.uniform(4, 18)
    slope = np.float32(rng.uniform(0.0045, 0.006))
    y, x = at[1] - 5, at[2]
    right = top_right - slope * (y**2 + (x - 62) ** 2)
    left = top_left - slope * (y**2 + (x + 66) ** 2)
    lung = np.maximum(cavity + 3, np.maximum(right, left) - at[0])
    lung *= np.float32(0.8)
    canvas.paint(_EVERYWHERE, lung, -840 + 40 * canvas.texture)
    box, heart = ellipsoid(canvas, near(rng, (132, 28, -28), 6), (40, 45, 55), 0.3)
    heart = np.maximum(heart, cavity[box] + 4)
    canvas.paint(box, heart, patient.hu["heart"] + 5 * canvas.texture[box])
    return cavity, np.asarray(lung, dtype=np.float32)


def _skeleton(canvas: Canvas, cavity: Field, rng: Rng) -> None:
    """Vertebrae with discs, canal and spinous processes; ribs; psoas muscles."""
    marrow = rng.uniform(130, 240)
    for side in (-1, 1):
        path = [
            (30, -58, side * 24),
            (-20, -52, side * 36),
            (-80, -48, side * 46),
            (-190, -42, side * 56),
        ]
        box, psoas = tube_along(canvas, path, [4, 13, 19, 22])
        canvas.paint(box, psoas, 56 + 5 * canvas.texture[box])
    box = canvas.box((-400, -130, -60), (400, -25, 60))
    z, y, x = canvas.at[(slice(None), *box)]
    phase = np.float32(rng.uniform(0, 34))
    along = np.abs((z + phase) % 34 - 17)
    spine = np.sqrt(((y + 52) / 0.85) ** 2 + x**2) - 22
    disc = 5 - along
    canvas.paint(box, spine, np.where(disc > 0, 85, marrow + 220 * (spine > -4)).astype(np.float32))
    arch = np.maximum(np.hypot(y + 78, x) - 14, along - 24)
    process = np.maximum(np.maximum(np.abs(x) - 3.5, np.abs(y + 95) - 16), 14 - along)
    lateral = np.maximum(np.maximum(np.abs(x) - 42, np.abs(y + 74) - 4), 13 - along)
    canvas.paint(box, np.minimum(arch, np.minimum(process, lateral)), marrow + 150)
    canvas.paint(box, np.hypot((y + 78) * 1.1, x) - 9, 28.0)
    turn = np.arctan2(canvas.at[2] / 150, -canvas.at[1] / 100)
    fall = canvas.at[0] + 34 * np.abs(turn) - 6 * turn**2
    level = (fall + phase) % 30 - 15
    shaft = np.sqrt(level**2 + (cavity - 7) ** 2) - 5
    floor = 20 + 12 * np.abs(turn) - canvas.at[0] + 40 * np.maximum(np.abs(turn) - 1.9, 0)
    cartilage = np.abs(turn) > 2.2
    bone = np.where(cartilage, 110, 420 - 170 * (shaft < -2.5)).astype(np.float32)
    canvas.paint(_EVERYWHERE, np.maximum(shaft, 0.5 * floor), bone)


# --- distractors --------------------------------------------------------------------------------


def _hollow(
    canvas: Canvas, box: Box, tube: Field, inside: Field, wall_mm: float, patient: Patient, rng: Rng
) -> None:
    """A piece of gut: a wall around fluid, food, stool, positive contrast or gas."""
    tube = np.maximum(tube, inside[box] + 2)
    canvas.paint(box, tube, patient.hu["gut"] + 8 * canvas.texture[box])
    lumen = tube + wall_mm
    base, rough = GUT_CONTENTS_HU[int(rng.choice(5, p=patient.contents))]
    canvas.paint(box, lumen, base + rough * canvas.texture[box])
    if rng.random() < 0.55 and lumen.size and lumen.min() < 0:
        y = canvas.at[1][box]
        low, high = y[lumen < 0].min(), y[lumen < 0].max()
        gas = np.maximum(lumen + 1, low + (high - low) * np.float32(rng.uniform(0.55, 0.9)) - y)
        canvas.paint(box, gas, -880.0)


def _bowel(canvas: Canvas, inside: Field, patient: Patient, rng: Rng) -> None:
    """Loops of small bowel and the frame of the colon."""
    for _ in range(9):
        start = np.array([rng.uniform(-150, -15), rng.uniform(5, 65), rng.uniform(-85, 85)])
        steps = rng.standard_normal((5, 3)) * (16, 14, 34)
        path = np.clip(start + np.cumsum(steps, axis=0), (-190, -15, -95), (0, 75, 95))
        box, tube = tube_along(canvas, path.tolist(), rng.uniform(9, 15, 5).tolist(), 3)
        _hollow(canvas, box, tube, inside, 2.5, patient, rng)
    sag = rng.uniform(-35, 5)
    frame: list[list[Point]] = [
        [(-190, -25, 98), (-120, -15, 108), (-70, 0, 104), (-50, 25, 96)],
        [(-48, 35, 90), (sag - 22, 66, 50), (sag - 30, 72, 0), (sag - 10, 68, -50), (12, 30, -92)],
        [(15, 15, -100), (-20, -25, -112), (-80, -30, -112), (-190, -20, -104)],
    ]
    for piece in frame:
        points = [near(rng, p, 6) for p in piece]
        box, tube = tube_along(canvas, points, rng.uniform(16, 25, len(points)).tolist())
        tube += (2.5 * np.sin((canvas.at[0] + canvas.at[2])[box] / 5)).astype(np.float32)
        _hollow(canvas, box, tube, inside, 2.5, patient, rng)


def _stomach(canvas: Canvas, inside: Field, patient: Patient, rng: Rng) -> None:
    """Stomach from fundus to antrum, then the duodenum around the pancreatic head."""
    full = rng.uniform(0.65, 1.15)
    points = [(80, -15, -62), (55, 8, -66), (22, 38, -58), (2, 50, -25), (2, 42, 12), (8, 30, 34)]
    radii = (np.array([30, 36, 30, 24, 18, 11]) * full).tolist()
    box, tube = tube_along(canvas, [near(rng, p, 5) for p in points], radii)
    _hollow(canvas, box, tube, inside, 4.0, patient, rng)
    loop = [(8, 30, 36), (2, 12, 54), (-28, 0, 56), (-48, -5, 40), (-50, -8, 8), (-35, 5, -24)]
    box, tube = tube_along(canvas, [near(rng, p, 3) for p in loop], rng.uniform(9, 13, 6).tolist())
    _hollow(canvas, box, tube, inside, 2.5, patient, rng)


def _great_vessels(canvas: Canvas, patient: Patient, rng: Rng) -> None:
    """Aorta, vena cava, portal, splenic, mesenteric and renal vessels."""
    hu = patient.hu
    grow = rng.uniform(0.85, 1.2)
    runs = [
        ("cava", [(200, -20, 30), (70, -22, 28), (0, -24, 24), (-200, -28, 22)], [12, 12, 10, 10]),
        (
            "aorta",
            [(200, -30, -16), (60, -26, -10), (0, -22, -7), (-200, -24, -4)],
            [12, 11, 10, 8],
        ),
        ("aorta", [(8, -14, -7), (0, 0, -7), (-40, 12, -4), (-120, 20, 5)], [4, 4, 4, 3]),
        (
            "portal",
            [(-120, 25, 18), (-40, 15, 12), (2, 10, 12), (22, 8, 36), (38, 8, 60)],
            [4, 6, 7, 8, 7],
        ),
        ("portal", [(4, 9, 12), (8, 4, -20), (22, -22, -66), (36, -30, -92)], [5, 5, 5, 4]),
        ("cava", [(-6, -24, 24), (-8, -34, 48)], [6, 5]),
        ("cava", [(-6, -18, 16), (-4, -12, -7), (-6, -34, -48)], [5, 4, 5]),
    ]
    for vessel, points, radii in runs:
        box, tube = tube_along(canvas, [near(rng, p, 2) for p in points], [r * grow for r in radii])
        canvas.paint(box, np.where(canvas.label[box] > 1, FAR, tube), hu[vessel])
