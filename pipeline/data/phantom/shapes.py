"""A canvas of voxels in millimetres, and the implicit shapes that are painted on it.

Every shape is a signed distance in millimetres, negative inside, in the frame of a reference body:
z superior, y anterior, x right, origin in front of the first lumbar vertebra.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Final

import numpy as np
import numpy.typing as npt
from scipy.interpolate import PchipInterpolator

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
        """The voxels that may lie between two reference points, (z, y, x) in mm.

        Returns:
            Slices along D, H, W: never too few voxels, empty where the scan does not reach.
        """
        cut = []
        for a in range(3):
            near = np.flatnonzero((self._high[a] >= low[a]) & (self._low[a] <= high[a]))
            cut.append(slice(near[0], near[-1] + 1) if near.size else slice(0, 0))
        return cut[0], cut[1], cut[2]

    def paint(self, box: Box, distance: Field, hu: float | Field, label: int | None = None) -> None:
        """Blends a tissue in where a distance is negative, fading over `edge_mm`.

        Args:
            box: the voxels that `distance` covers.
            distance: float32 of the box's shape, mm.
            hu: Hounsfield units, one number or one per voxel of the box.
            label: set where `distance` is negative; None leaves the labels alone.
        """
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
