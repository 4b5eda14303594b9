"""The phantom's patient: a cartoon of an abdomen as smooth implicit shapes, painted one by one.

Everything is placed in millimetres in the frame of a reference body. The caller bends and scales
that frame to the case at hand; nothing of the anatomy knows about voxels, spacings or scanners.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Final

import numpy as np
import numpy.typing as npt
from scipy.interpolate import PchipInterpolator

# The four labelled organs, their vessels and their lesions.


def _organ(
    canvas: Canvas, box: Box, shape: Field, hu: float | Field, label: int, patient: Patient
) -> None:
    """Paints an organ with a sheath of fat that keeps it off what was painted before."""
    if patient.gap_mm > 0:
        near = canvas.label[box] > 0
        canvas.paint(box, np.where(near, FAR, shape - patient.gap_mm), -90.0)
    canvas.paint(box, shape, hu, label)


def liver(canvas: Canvas, inside: Field, patient: Patient, rng: Rng) -> None:
    """Right and left lobe with a hollow for kidney and gut, vessels, gall bladder beneath."""
    box, right = ellipsoid(
        canvas, near(rng, (28, -4, 82), 5), times(rng, (84, 76, 58), 0.08), 0.1, pad_mm=60
    )
    _, left = ellipsoid(
        canvas, near(rng, (58, 34, 6), 6), times(rng, (30, 38, 70), 0.13), 0.12, box=box
    )
    _, hollow = ellipsoid(
        canvas, near(rng, (-42, -46, 40), 5), times(rng, (84, 60, 52), 0.06), 0.0, box=box
    )
    shape = -blend(-blend(right, left, 24), hollow, 12)
    shape = np.maximum(shape, inside[box] + 3)
    hu = patient.hu["liver"]
    _organ(canvas, box, shape, hu + 5 * canvas.texture[box], LIVER, patient)
    trunks = [
        ("portal", [(36, 8, 56), (44, 0, 80), (30, -10, 105)], [7, 5, 3]),
        ("portal", [(38, 8, 58), (56, 26, 30), (58, 36, 0)], [6, 4, 3]),
        ("cava", [(84, -20, 30), (72, -12, 62), (50, -5, 100)], [6, 5, 3]),
        ("cava", [(84, -18, 30), (76, 12, 48), (62, 42, 60)], [6, 5, 3]),
    ]
    for vessel, points, radii in trunks:
        cut, tube = tube_along(canvas, [near(rng, p, 3) for p in points], radii)
        tube = np.where(canvas.label[cut] == LIVER, tube, FAR)
        canvas.paint(cut, tube, hu + 0.75 * (patient.hu[vessel] - hu))
    size = times(rng, (24, 14, 14), 0.2)
    cut, bladder = ellipsoid(canvas, near(rng, (-16, 40, 58), 5), size, 0.2)
    bladder = np.maximum(bladder, inside[cut] + 3)
    canvas.paint(cut, bladder, patient.hu["gut"])
    canvas.paint(cut, bladder + 2.5, rng.uniform(4, 22))
    canvas.label[cut][bladder < 0] = 0


def spleen(canvas: Canvas, inside: Field, patient: Patient, rng: Rng) -> None:
    """A crescent under the left ribs; mottled while the contrast is arterial."""
    radii = times(rng, (58, 50, 42), 0.1)
    box, outer = ellipsoid(canvas, near(rng, (44, -34, -96), 6), radii, -0.25, pad_mm=10)
    _, hollow = ellipsoid(canvas, near(rng, (46, 14, -48), 5), (74, 44, 34), 0.0, box=box)
    shape = -blend(-np.maximum(outer, inside[box] + 3), hollow, 8)
    mottle = 5 + rng.uniform(0, 22) * (patient.hu["cortex"] > patient.hu["medulla"] + 35)
    _organ(canvas, box, shape, patient.hu["spleen"] + mottle * canvas.texture[box], SPLEEN, patient)


def kidneys(canvas: Canvas, inside: Field, patient: Patient, rng: Rng) -> None:
    """Two beans with cortex, medulla and a sinus of fat; the right one lies lower."""
    size = times(rng, (56, 29, 30), 0.07)
    for side, height in ((1, -18), (-1, -4)):
        centre = near(rng, (height, -44, side * 66), 5)
        box, bean = ellipsoid(canvas, centre, times(rng, size, 0.05), -0.22 * side)
        hilum = np.add(centre, (2, 8, -side * 25)).tolist()
        _, sinus = ellipsoid(canvas, hilum, (17, 13, 18), 0.0, box=box)
        shape = -blend(-np.maximum(bean, inside[box] + 4), sinus, 6)
        canvas.paint(box, np.where(canvas.label[box] == 0, bean - 5, FAR), -98.0)
        _organ(canvas, box, shape, patient.hu["cortex"] + 4 * canvas.texture[box], KIDNEYS, patient)
        core = np.maximum(bean + 7, 2 - sinus) - 2 * canvas.texture[box]
        canvas.paint(box, core, patient.hu["medulla"])
        pelvis = np.maximum(np.maximum(sinus + 8, bean - 4), inside[box])
        canvas.paint(box, pelvis, rng.choice([8.0, 35.0, 260.0], p=[0.5, 0.35, 0.15]))


def pancreas(canvas: Canvas, inside: Field, patient: Patient, rng: Rng) -> None:
    """A thin lobulated curve from the duodenum across the midline towards the spleen."""
    lift, bow = rng.uniform(-8, 18), rng.uniform(-6, 8)
    points = [
        (-34, 2, 30), (-16, 8, 34), (0, 20 + bow, 16), (6 + 0.3 * lift, 28 + bow, -6),
        (14 + 0.7 * lift, 14 + bow, -36), (22 + lift, -14, -68),
    ]  # fmt: skip
    radii = np.array([11, 16, 12.5, 12, 12.5, 12]) * rng.uniform(0.85, 1.15)
    box, tube = tube_along(canvas, [near(rng, p, 3) for p in points], radii.tolist())
    fatty = rng.uniform(0, 1) ** 2
    tube = np.maximum(tube + (1 + 1.5 * fatty) * canvas.texture[box], inside[box] + 3)
    tube = np.where(canvas.label[box] > 0, FAR, tube)
    hu = patient.hu["pancreas"] - 22 * fatty + (5 + 12 * fatty) * canvas.texture[box]
    _organ(canvas, box, tube, hu, PANCREAS, patient)


def lesions(canvas: Canvas, inside: Field, patient: Patient, rng: Rng) -> None:
    """Cysts, metastases and bright nodules; each belongs to the organ that it sits in."""
    for organ, share in ((LIVER, 1.2), (SPLEEN, 0.4), (KIDNEYS, 0.8), (PANCREAS, 0.35)):
        spots = np.flatnonzero(canvas.label == organ)
        for _ in range(rng.poisson(share * patient.mean_lesions)):
            where, size = rng.random(), rng.uniform(6, 20 if organ in (LIVER, KIDNEYS) else 12)
            kind, stretch = rng.choice(3, p=[0.4, 0.4, 0.2]), rng.uniform(0.8, 1.25, 3)
            if not spots.size:
                continue
            spot = np.unravel_index(spots[int(where * spots.size)], canvas.label.shape)
            centre = [float(canvas.at[(a, *spot)]) for a in range(3)]
            box, shape = ellipsoid(canvas, centre, (size * stretch).tolist())
            own = np.isin(canvas.label[box], (0, organ))
            shape = np.where(own, np.maximum(shape, inside[box] + 3), FAR)
            hu = (8.0, float(np.median(canvas.hu.flat[spots])) - 35, 190.0)[kind]
            canvas.paint(box, shape, hu + 8 * canvas.texture[box], organ)


# A canvas of voxels in millimetres, and the implicit shapes that are painted on it.
#
# Every shape is a signed distance in millimetres, negative inside, in the frame of a reference
# body: z superior, y anterior, x right, origin in front of the first lumbar vertebra.

Field = npt.NDArray[np.float32]
Box = tuple[slice, slice, slice]
Rng = np.random.Generator
Point = Sequence[float]
FAR: Final = 1e3


@dataclass
class Canvas:
    """Position, intensity and label of every voxel, painted in place.

    Attributes:
        at: (3, D, H, W) float32, where each voxel lies in the reference body (z, y, x), mm.
        texture: (D, H, W) float32, smooth noise, standard deviation a half, scale a centimetre.
        edge_mm: width over which a border fades (partial volume).
        hu: (D, H, W) float32, Hounsfield units.
        label: (D, H, W) uint8, 0 or an organ's value.
    """

    at: Field
    texture: Field
    edge_mm: float
    hu: Field = field(init=False)
    label: npt.NDArray[np.uint8] = field(init=False)

    def __post_init__(self) -> None:
        self.hu = np.full(self.at.shape[1:], -1000.0, dtype=np.float32)
        self.label = np.zeros(self.at.shape[1:], dtype=np.uint8)
        others = ((1, 2), (0, 2), (0, 1))
        self._low = [self.at[a].min(axis=o) for a, o in enumerate(others)]
        self._high = [self.at[a].max(axis=o) for a, o in enumerate(others)]

    def box(self, low: Point, high: Point) -> Box:
        """The voxels that may lie between two reference points, (z, y, x) in mm, as slices along D,
        H, W: never too few, none where the scan does not reach."""
        cut = []
        for a in range(3):
            near = np.flatnonzero((self._high[a] >= low[a]) & (self._low[a] <= high[a]))
            cut.append(slice(near[0], near[-1] + 1) if near.size else slice(0, 0))
        return cut[0], cut[1], cut[2]

    def paint(self, box: Box, distance: Field, hu: float | Field, label: int | None = None) -> None:
        """Blends a tissue in where a distance (mm, float32 of the box's shape) is negative, fading
        over `edge_mm`; without a label, labels stay."""
        weight = np.clip(0.5 - distance / self.edge_mm, 0.0, 1.0)
        self.hu[box] += weight * (hu - self.hu[box])
        if label is not None:
            self.label[box][distance < 0] = label


def oval(at: Field, half_mm: tuple[float, float], power: float) -> Field:
    """Distance to an infinite cylinder along z whose section is a superellipse (y, x)."""
    y, x = np.abs(at[1]), np.abs(at[2])
    rho = ((y / half_mm[0]) ** power + (x / half_mm[1]) ** power) ** np.float32(1 / power)
    return np.asarray(np.hypot(y, x) * (1 - 1 / np.maximum(rho, 0.02)), dtype=np.float32)


def ellipsoid(
    canvas: Canvas,
    centre: Point,
    radii: Point,
    tilt: float = 0.0,
    *,
    box: Box | None = None,
    pad_mm: float = 8.0,
) -> tuple[Box, Field]:
    """Distance to an ellipsoid; `tilt` (radians) turns it about y, its top towards +x."""
    reach = np.abs(np.asarray(radii)) + pad_mm + canvas.edge_mm
    if tilt:
        reach[[0, 2]] = reach[[0, 2]].max()
    if box is None:
        box = canvas.box(np.subtract(centre, reach), np.add(centre, reach))
    z, y, x = (canvas.at[a][box] - np.float32(centre[a]) for a in range(3))
    if tilt:
        c, s = np.float32(np.cos(tilt)), np.float32(np.sin(tilt))
        z, x = c * z + s * x, c * x - s * z
    rz, ry, rx = (np.float32(r) for r in radii)
    k0 = np.sqrt((z / rz) ** 2 + (y / ry) ** 2 + (x / rx) ** 2)
    k1 = np.sqrt((z / rz**2) ** 2 + (y / ry**2) ** 2 + (x / rx**2) ** 2)
    return box, np.where(k0 > 0.05, k0 * (k0 - 1) / np.maximum(k1, 1e-6), -min(radii))


def tube_along(
    canvas: Canvas, points: Sequence[Point], radii: Sequence[float], segments_per_point: int = 4
) -> tuple[Box, Field]:
    """Distance to a round tube of changing radius along a smooth curve through `points`."""
    knots = np.arange(len(points))
    t = np.linspace(0, len(points) - 1, segments_per_point * (len(points) - 1) + 1)
    path = np.asarray(PchipInterpolator(knots, np.asarray(points, dtype=np.float64))(t))
    radius = np.asarray(PchipInterpolator(knots, np.asarray(radii, dtype=np.float64))(t))
    pad = radius.max() + 8 + canvas.edge_mm
    outer = canvas.box(path.min(axis=0) - pad, path.max(axis=0) + pad)
    distance = np.full(canvas.hu[outer].shape, FAR, dtype=np.float32)
    for a, b, r0, r1 in zip(path[:-1], path[1:], radius[:-1], radius[1:], strict=True):
        inner = canvas.box(np.minimum(a, b) - pad, np.maximum(a, b) + pad)
        local = tuple(
            slice(i.start - o.start, i.stop - o.start) for i, o in zip(inner, outer, strict=True)
        )
        if distance[local].size == 0:
            continue
        axis = (b - a).astype(np.float32)
        rel = [canvas.at[i][inner] - np.float32(a[i]) for i in range(3)]
        along = sum(rel[i] * axis[i] for i in range(3)) / np.float32(max(axis @ axis, 1e-6))
        along = np.clip(along, 0, 1)
        gap = np.sqrt(sum((rel[i] - along * axis[i]) ** 2 for i in range(3)))
        np.minimum(distance[local], gap - (r0 + along * (r1 - r0)), out=distance[local])
    return outer, distance


def blend(a: Field, b: Field, mm: float) -> Field:
    """Smooth union of two distances, rounded over `mm`."""
    h = np.maximum(mm - np.abs(a - b), 0) / mm
    return np.asarray(np.minimum(a, b) - h * h * (mm / 4), dtype=np.float32)


def near(rng: Rng, point: Point, sd_mm: float) -> list[float]:
    """A point drawn around another, two standard deviations away at most."""
    away = np.clip(rng.standard_normal(3), -2, 2) * sd_mm
    return [float(v) for v in np.asarray(point) + away]


def times(rng: Rng, values: Point, sd: float) -> list[float]:
    """Lengths scaled together by 1 +- sd, and each for itself by half as much."""
    common = 1 + sd * np.clip(rng.standard_normal(), -2, 2)
    each = 1 + 0.5 * sd * np.clip(rng.standard_normal(len(values)), -2, 2)
    return [float(v) for v in np.asarray(values) * common * each]


_EVERYWHERE: Final[Box] = (slice(None), slice(None), slice(None))
_CAVITY_MM: Final = (88.0, 132.0)


def draw(canvas: Canvas, patient: Patient, rng: Rng) -> None:
    """Paints a whole abdomen: intensity and label of every voxel of the canvas. What is drawn from
    `rng`, the anatomy, does not depend on the canvas's shape."""
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
        path = [(30, -58, 24), (-20, -52, 36), (-80, -48, 46), (-190, -42, 56)]
        path = [(z, y, side * x) for z, y, x in path]
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
        ("aorta", [(200, -30, -16), (60, -26, -10), (0, -22, -7), (-200, -24, -4)],
         [12, 11, 10, 8]),
        ("aorta", [(8, -14, -7), (0, 0, -7), (-40, 12, -4), (-120, 20, 5)], [4, 4, 4, 3]),
        ("portal", [(-120, 25, 18), (-40, 15, 12), (2, 10, 12), (22, 8, 36), (38, 8, 60)],
         [4, 6, 7, 8, 7]),
        ("portal", [(4, 9, 12), (8, 4, -20), (22, -22, -66), (36, -30, -92)], [5, 5, 5, 4]),
        ("cava", [(-6, -24, 24), (-8, -34, 48)], [6, 5]),
        ("cava", [(-6, -18, 16), (-4, -12, -7), (-6, -34, -48)], [5, 4, 5]),
    ]  # fmt: skip
    for vessel, points, radii in runs:
        box, tube = tube_along(canvas, [near(rng, p, 2) for p in points], [r * grow for r in radii])
        canvas.paint(box, np.where(canvas.label[box] > 1, FAR, tube), hu[vessel])


# What a synthetic patient is made of: tissues in Hounsfield units, and what is drawn once a case.

LIVER, SPLEEN, KIDNEYS, PANCREAS = 1, 2, 3, 4
PHASES: Final = ("native", "arterial", "portal")
TISSUE_HU: Final[dict[str, tuple[float, float, float]]] = {
    "liver": (56, 70, 106),
    "spleen": (48, 112, 114),
    "cortex": (34, 160, 165),
    "medulla": (32, 80, 150),
    "pancreas": (40, 95, 86),
    "aorta": (42, 290, 150),
    "cava": (42, 75, 138),
    "portal": (42, 115, 158),
    "muscle": (52, 58, 64),
    "gut": (38, 72, 84),
    "heart": (42, 190, 130),
}
GUT_CONTENTS_HU: Final = ((12, 6), (45, 18), (75, 25), (10, 70), (230, 50))


@dataclass(frozen=True)
class Patient:
    """What is drawn once per case and is no shape.

    Attributes:
        hu: tissue -> Hounsfield units, the keys of `TISSUE_HU`.
        fat_mm: thickness of the fat under the skin.
        gap_mm: thickness of the fat between organs; 0 where organs touch.
        wall_mm: thickness of the muscle wall.
        mean_lesions: how diseased: 1 stands for about three lesions in a case.
        contents: share of fluid, food, dense food, stool and positive contrast in the gut.
    """

    hu: dict[str, float]
    fat_mm: float
    gap_mm: float
    wall_mm: float
    mean_lesions: float
    contents: tuple[float, ...]
