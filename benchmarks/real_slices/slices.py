"""The user's folder of slices as NIfTI cases and a registry.

A folder of this form holds, for each set of `SETS`, `<set>/slices.npz` (`image` and `label`, uint8
(N, H, W)) and `<set>/meta.csv` (a line per slice, with its `patient`).
"""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import numpy.typing as npt
import yaml

from benchmarks.real_slices.size import INTENSITY, PIXEL_MM, SLICES, TAP, Size
from pipeline.cache.store import write_json
from pipeline.config import file_sha256
from pipeline.errors import ConfigError
from pipeline.folder import json_with

ORGANS: Mapping[str, int] = {"liver": 1, "kidneys": 2, "pancreas": 3}
# Label values: right and left kidney and kidney tumour are one organ, as the side is derived.
VALUES: Mapping[str, Sequence[int]] = {"liver": [1], "kidneys": [2, 3, 12], "pancreas": [5]}
OWN: Mapping[str, str] = {
    "liver": "msd_liver", "kidneys": "kits19_kidney", "pancreas": "nih_pancreas",
}  # fmt: skip
TEST = "curvas_multiorgan"
SETS = (*OWN.values(), TEST)
VALIDATION = 0.25  # of the patients of a set
# Column, and what its value begins with, of slices that are left out. Part B of KiTS19 numbers its
# patients in another way than part A: one of them may be in both, and so in two splits.
_LEFT_OUT = {"kits19_kidney": ("label_source", "B")}


@dataclass(frozen=True)
class Slices:
    """A set.

    Attributes:
        images: uint8 (N, H, W), grey values: Hounsfield units clipped to 0 .. 255.
        labels: uint8 (N, H, W).
        cases: names, `<patient>.<line of meta.csv>`.
    """

    images: npt.NDArray[np.uint8]
    labels: npt.NDArray[np.uint8]
    cases: Sequence[str]


def missing_sets(data: Path, folder: Path) -> list[str]:
    """Files of a folder of slices that are neither there nor converted before."""
    return [
        str(data / name / file)
        for name in SETS
        for file in ("slices.npz", "meta.csv")
        if not (data / name / file).is_file() and _converted(folder, name) is None
    ]


def patient_of(case: str) -> str:
    """Of a case's name, with or without its dataset."""
    return case.rsplit("/", 1)[-1].rsplit(".", 1)[0]


def convert(data: Path, folder: Path) -> None:
    """Writes every set that is there as NIfTI below `folder`; what was written from the same files
    is kept, and a set that is not there stays as it is.

    Raises:
        ConfigError: a set that is not of this form.
    """
    for name in SETS:
        files = [data / name / file for file in ("slices.npz", "meta.csv")]
        if not all(file.is_file() for file in files):
            continue
        source = {f.name: file_sha256(f) for f in files} | {"slices_of_a_case": SLICES}
        if (_converted(folder, name) or {}).get("source") == source:
            continue
        found = read_set(data, name)
        for kind in ("images", "labels"):
            (folder / name / kind).mkdir(parents=True, exist_ok=True)
        for n, case in enumerate(found.cases):
            _write(folder / name / "images" / f"{case}.nii.gz", found.images[n].astype(np.int16))
            _write(folder / name / "labels" / f"{case}.nii.gz", found.labels[n])
        write_json(_record(folder, name), {"source": source, "cases": list(found.cases)})


def read_set(data: Path, name: str) -> Slices:
    """Reads a set.

    Raises:
        ConfigError: it is not of this form.
    """
    path = data / name / "slices.npz"
    try:
        with np.load(path) as arrays:
            images, labels = arrays["image"], arrays["label"]
        with (data / name / "meta.csv").open(encoding="utf-8", newline="") as file:
            rows = list(csv.DictReader(file))
        patients = [row["patient"] for row in rows]
    except (OSError, ValueError, KeyError) as error:
        raise _not_of_this_form(path, f"it cannot be read ({error!r})") from error
    if images.shape != labels.shape or images.shape[:1] != (len(rows),) or images.ndim != 3:
        shapes = f"images {images.shape}, labels {labels.shape}, {len(rows)} lines of meta.csv"
        raise _not_of_this_form(path, f"shapes do not agree: {shapes}")
    if images.dtype != np.uint8 or labels.dtype != np.uint8:
        raise _not_of_this_form(path, f"it holds {images.dtype} and {labels.dtype}, not uint8")
    column, begins = _LEFT_OUT.get(name, ("patient", "\0"))
    kept = [n for n, row in enumerate(rows) if not (row.get(column) or "").startswith(begins)]
    cases = [f"{patients[n]}.{n:04d}" for n in kept]
    return Slices(images[kept], labels[kept], cases)


def _not_of_this_form(path: Path, why: str) -> ConfigError:
    return ConfigError(
        f"this set has another form: {why}.",
        where=path,
        fix="benchmarks/real_slices/README.md describes the folder.",
    )


def _write(path: Path, picture: npt.NDArray[Any]) -> None:
    """Rows run to the back and columns to the patient's left: RAS+ runs the other way along both.
    No slice is beside another, so that their place in space is made up."""
    affine = np.diag([-PIXEL_MM, -PIXEL_MM, 2 * PIXEL_MM, 1.0])
    volume = np.repeat(picture.T[:, :, None], SLICES, axis=2)
    nib.save(nib.Nifti1Image(volume, affine), path)


def _record(folder: Path, name: str) -> Path:
    return folder / name / "set.json"


def _converted(folder: Path, name: str) -> dict[str, Any] | None:
    return json_with(_record(folder, name), "source", "cases")


def write_registry(path: Path, slices: Path, size: Size, teachers: Path) -> None:
    """The registry of one repetition.

    Args:
        path: of the registry.
        slices: what `convert` filled.
        size: says grid and networks' spacing.
        teachers: where trained ones are put.
    """
    datasets: dict[str, Any] = {}
    for organ, name in OWN.items():
        datasets[name] = _dataset(slices, name, [organ])
        datasets[name]["split"] = {"validation": VALIDATION, "group": r"(.+)\.\d+$"}
    datasets[TEST] = _dataset(slices, TEST, list(ORGANS))
    cases = (_converted(slices, TEST) or {"cases": []})["cases"]
    datasets[TEST]["split"] = {"train": [], "validation": [], "test": cases}
    content = {
        "schema_version": 1,
        "organs": dict(ORGANS),
        "grid": {"spacing_mm": size.spacing_mm},
        "datasets": datasets,
        "teachers": {organ: _teacher(organ, name, size, teachers) for organ, name in OWN.items()},
        # Bad teachers are what this is about; the gate would stop there.
        "admission": {"dice": 0.0},
    }
    path.write_text(yaml.safe_dump(content, sort_keys=False), encoding="utf-8")


def _dataset(slices: Path, name: str, organs: Sequence[str]) -> dict[str, Any]:
    others = [v for organ, values in VALUES.items() if organ not in organs for v in values]
    return {
        "root": str(slices / name),
        "images": "images/{case}.nii.gz",
        "labels": "labels/{case}.nii.gz",
        "annotated": {organ: list(VALUES[organ]) for organ in organs},
        "background_values": [4, *others],
        "units": "other",
    }


def _teacher(organ: str, name: str, size: Size, teachers: Path) -> dict[str, Any]:
    return {
        "kind": "checkpoint",
        "weights": str(teachers / f"{organ}.pt"),
        "organs": {organ: 1},
        "num_channels": 2,
        "spacing_mm": size.spacing_mm,
        "intensity": dict(INTENSITY),
        "trained_on": name,
        "taps": [TAP],
    }
