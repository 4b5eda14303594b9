"""Scans of organs in soft tissue, stored as any archive might: order of axes, spacing, tilt."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]


def write_blobs(
    path: Path,
    *,
    shape: Sequence[int] = (48, 44, 40),
    spacing: Sequence[float] = (2.0, 2.0, 2.0),
    code: str = "LPS",
    border: int = 0,
    seed: int = 0,
    tilt: float = 0.0,
    organs: int = 2,
) -> Array:
    """Writes a NIfTI of ellipsoids in soft tissue; returns their labels (i, j, k).

    Args:
        path: of the image.
        shape: voxels along the file's axes.
        spacing: mm along the file's axes.
        code: where they point to.
        border: so many voxels at every face are 0 HU, which nnU-Net crops away.
        seed: of noise and places.
        tilt: degrees that the scan is turned by.
        organs: 2, or 3: one more, brighter still.
    """
    rng = np.random.default_rng(seed)
    size = np.array(shape) * spacing
    axes = [(np.arange(n) + 0.5) * mm for n, mm in zip(shape, spacing, strict=True)]
    places = np.stack(np.meshgrid(*axes, indexing="ij"), -1)

    def ellipsoid(centre: Sequence[float], radii: Sequence[float]) -> Array:
        middle = size * (np.array(centre) + rng.uniform(-0.03, 0.03, 3))
        return (((places - middle) / (size * radii)) ** 2).sum(-1) < 1

    label = np.zeros(shape, np.uint8)
    hu = np.full(shape, 50.0)
    # One brighter and one darker than what is around them, so that no border between two looks like
    # the third, and interpolating a softmax of three is almost linear.
    for value, centre, radii, mean in (
        (1, (0.36, 0.45, 0.5), (0.2, 0.24, 0.28), 250),
        (2, (0.74, 0.6, 0.55), (0.16, 0.2, 0.24), -150),
        (3, (0.7, 0.2, 0.3), (0.2, 0.16, 0.22), 450),
    )[:organs]:
        inside = ellipsoid(centre, radii)
        label[inside], hu[inside] = value, mean
    hu = np.rint(hu + rng.normal(0, 15, shape))
    hu[hu == 0] = 1
    if border:
        inner = np.zeros(shape, bool)
        inner[(slice(border, -border),) * 3] = True
        hu[~inner], label[~inner] = 0, 0
    image = nib.Nifti1Image(hu.astype(np.int16), affine(code, shape, spacing, tilt))
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(image, path)
    return label


def affine(code: str, shape: Sequence[int], spacing: Sequence[float], tilt: float = 0.0) -> Array:
    """(i, j, k) -> RAS+ mm, axes pointing where `code` says, turned about the R axis by `tilt`."""
    matrix = np.eye(4)
    matrix[:3, :3] = 0
    for axis, letter in enumerate(code):
        world = next(n for n, pair in enumerate(("RL", "AP", "SI")) if letter in pair)
        matrix[world, axis] = spacing[axis] * (1 if letter in "RAS" else -1)
    angle = np.deg2rad(tilt)
    turn = np.eye(3)
    turn[1:, 1:] = [[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]]
    matrix[:3, :3] = turn @ matrix[:3, :3]
    matrix[:3, 3] = (11.0, -7.0, 23.0)
    return matrix
