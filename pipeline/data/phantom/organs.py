"""The four labelled organs, their vessels and their lesions."""

from __future__ import annotations

import numpy as np

from pipeline.data.phantom.patient import KIDNEYS, LIVER, PANCREAS, SPLEEN, Patient
from pipeline.data.phantom.shapes import (
    FAR,
    Box,
    Canvas,
    Field,
    Rng,
    blend,
    ellipsoid,
    near,
    times,
    tube_along,
)


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
        (-34, 2, 30),
        (-16, 8, 34),
        (0, 20 + bow, 16),
        (6 + 0.3 * lift, 28 + bow, -6),
        (14 + 0.7 * lift, 14 + bow, -36),
        (22 + lift, -14, -68),
    ]
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
