"""Cached cases in which every value says where it lies, so that nothing can be mixed up unseen.

With voxel (z, y, x) of a case of shape SHAPE:
    image               its linear index; `RAW` intensity keeps it, air is -1024
    label               id 1 (liver) in every third plane z, else 0; nowhere ignored
    log-odds of liver   32 z + y - 300      (by teacher `one`)
    log-odds of spleen  16 x - 200          (by teacher `two`)
    features of `one`   cell (z, y, x) of STRIDE voxels: (16 z + y, x), tap `deep`
All are exact in float16. `place` and `expected_odds` are the way back.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from pipeline.cache.reader import CachedCase, Unit
from pipeline.cache.schema import (
    ArraySpec,
    StorageConfig,
    feature_moments,
    features_spec,
    image_spec,
    label_spec,
    log_odds_spec,
)
from pipeline.cache.store import write_unit
from pipeline.data.labels import Intensity, LabelSpace
from pipeline.data.volume import Grid

SHAPE = (18, 20, 22)
STRIDE = (2, 2, 2)
CHANNELS = 2
TAP = ("one", "deep")
SPACE = LabelSpace({"liver": 1, "spleen": 2})
RAW = Intensity(kind="raw")
LIVER_PLANES = 3
EXACT = StorageConfig(chunk=16, log_odds_bits=10, feature_bits=10)


def write_case(
    folder: Path,
    name: str,
    *,
    annotated: Sequence[str] = ("liver",),
    teachers: Sequence[str] = ("one", "two"),
    shape: tuple[int, int, int] = SHAPE,
    split: str = "train",
) -> CachedCase:
    """Writes one case, and opens it."""
    z, y, x = np.meshgrid(*(np.arange(n) for n in shape), indexing="ij")
    image = (z * shape[1] + y) * shape[2] + x
    label = np.where(z % LIVER_PLANES == 0, 1, 0)
    centres = {"liver": np.argwhere(label == 1)[::7].tolist(), "spleen": []}
    case = _unit(
        folder / "cases" / f"{name}.zarr",
        [image_spec(image.astype(np.int16)), label_spec(label.astype(np.uint8))],
        shape,
        {"centres": {organ: centres[organ] for organ in annotated}},
    )
    units = {teacher: _teacher(folder, teacher, name, shape) for teacher in teachers}
    experts = {
        organ: [t] if t in units else [] for organ, t in {"liver": "one", "spleen": "two"}.items()
    }
    return CachedCase(name, split, tuple(annotated), case, units, experts)


def place(
    image: npt.NDArray[np.float32], shape: tuple[int, int, int] = SHAPE
) -> tuple[npt.NDArray[np.bool_], npt.NDArray[np.int64]]:
    """(D, H, W) image values -> whether inside the case, and (z, y, x) of those: (V, 3)."""
    inside = image >= 0
    return inside, np.stack(np.unravel_index(image[inside].astype(int), shape), axis=1)


def expected_odds(voxels: npt.NDArray[np.int64]) -> npt.NDArray[np.float32]:
    """(V, 3) places -> (2, V) log-odds of liver and spleen."""
    z, y, x = voxels.T
    return np.stack([32 * z + y - 300, 16 * x - 200]).astype(np.float32)


def expected_label(voxels: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """(V, 3) places -> classes (V,)."""
    return np.where(voxels[:, 0] % LIVER_PLANES == 0, 1, 0)


def _teacher(folder: Path, teacher: str, name: str, shape: tuple[int, int, int]) -> Unit:
    z, y, x = np.meshgrid(*(np.arange(n) for n in shape), indexing="ij")
    organ = {"one": "liver", "two": "spleen"}[teacher]
    odds = {"one": 32 * z + y - 300, "two": 16 * x - 200}[teacher].astype(np.float32)
    cells = [-(-n // s) for n, s in zip(shape, STRIDE, strict=True)]
    d, h, w = np.meshgrid(*(np.arange(n) for n in cells), indexing="ij")
    feature = np.stack([16 * d + h, w]).astype(np.float32)
    specs = [log_odds_spec(organ, odds, EXACT)]
    taps = {}
    if teacher == TAP[0]:
        specs.append(features_spec(TAP[1], feature, EXACT))
        taps = {TAP[1]: {"stride": list(STRIDE), "channels": CHANNELS, **feature_moments(feature)}}
    points = {organ: np.argwhere(odds > 0)[::11].tolist()}
    path = folder / "teachers" / teacher / f"{name}.zarr"
    return _unit(path, specs, shape, {"centres": points, "taps": taps})


def _unit(
    path: Path,
    specs: Sequence[ArraySpec],
    shape: tuple[int, int, int],
    attributes: Mapping[str, object],
) -> Unit:
    grid = Grid.axis_aligned(shape, (3.0, 3.0, 3.0))
    whole = {"grid": grid.to_json(), **attributes}
    write_unit(path, specs, whole, {"path": path.name}, storage=EXACT)
    return Unit.open(path)
