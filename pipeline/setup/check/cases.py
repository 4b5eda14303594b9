"""One case, each file read once: whether it can be used, and numbers to hold against the others.

It runs in worker processes, so it loads no network library.
"""

from __future__ import annotations

import hashlib
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt

from pipeline.cache.cases import FINER_GRID, check_same_grid, few_voxels, swallowed
from pipeline.data.entries import CaseFiles, DatasetEntry
from pipeline.data.hounsfield import (
    Counts,
    Intensities,
    Severity,
    doubts,
    intensities,
    value_counts,
)
from pipeline.data.labels import NAME_THEM, some_values
from pipeline.data.nifti import NiftiVolume, read_image, read_label
from pipeline.data.patches import ENOUGH_IMAGE, FLAT_PATCH, check_slice, image_share
from pipeline.data.resample import resample
from pipeline.data.volume import Grid, Index3, Spacing, Volume
from pipeline.errors import GeometryError, PipelineError

# What is wrong, or may be: one finding each, with its place, its reason and its remedy.


@dataclass(frozen=True)
class Finding:
    """One thing that is wrong (an error) or improbable (a warning).

    Attributes:
        severity: an error makes `pipeline check` exit with 2.
        kind: what was looked at: registry, split, file, header, grid, values, organ, small, hu,
            patch, duplicate, volume, place, air, teacher.
        where: `dataset/case`, `dataset`, a teacher, or the registry.
    """

    severity: Severity
    kind: str
    where: str
    what: str
    fix: str
    dataset: str | None = None
    case: str | None = None


def of_case(severity: Severity, kind: str, case: str, what: str, fix: str) -> Finding:
    """A finding of one case, by its name `dataset/case`."""
    return Finding(severity, kind, case, what, fix, case.split("/")[0], case)


def of_dataset(severity: Severity, kind: str, dataset: str, what: str, fix: str) -> Finding:
    """A finding of a dataset as a whole."""
    return Finding(severity, kind, dataset, what, fix, dataset)


def in_order(findings: Sequence[Finding]) -> list[Finding]:
    """Errors first; else as they came."""
    return sorted(findings, key=lambda finding: finding.severity != "error")


def count(findings: Sequence[Finding], severity: Severity) -> int:
    """How many are of a severity."""
    return sum(finding.severity == severity for finding in findings)


_BODY_HU = -500
_MOST_SAMPLES = 96  # along each axis, for places


@dataclass(frozen=True)
class Task:
    """A case to look at.

    Attributes:
        patch: of the student, in voxels of that grid.
    """

    source: CaseFiles
    entry: DatasetEntry
    spacing_mm: Spacing
    patch: Index3


@dataclass(frozen=True)
class CaseFacts:
    """What one case showed; None and empty where its files did not let themselves be read.

    Attributes:
        split: of the case, or `fold 2`.
        shape: of the image in RAS+, z, y, x.
        stored: letters of the order that the image's file keeps its axes in, as `LPS`.
        image_key: SHA-256 of the image's voxels in RAS+, whatever file they were in.
        label_key: likewise of the label; None if it is empty.
        organ_ml: organ -> volume of its label; 0 where it is absent.
        grid_voxels: organ -> voxels that are left of it on the student grid.
        organ_place: organ -> centre along z, y, x: -1 and 1 are the ends of the body.
        organ_air: organ -> share of its voxels in air, below -500 HU.
    """

    case: str
    dataset: str
    split: str
    shape: Index3 | None = None
    spacing_mm: Spacing | None = None
    stored: str = ""
    image_key: str | None = None
    label_key: str | None = None
    hu: Intensities | None = None
    organ_ml: Mapping[str, float] = field(default_factory=dict)
    grid_voxels: Mapping[str, int] = field(default_factory=dict)
    organ_place: Mapping[str, tuple[float, float, float]] = field(default_factory=dict)
    organ_air: Mapping[str, float] = field(default_factory=dict)
    findings: tuple[Finding, ...] = ()

    @property
    def is_slice(self) -> bool:
        """Whether its image is one slice."""
        return self.shape is not None and self.shape.count(1) == 1


def look_at(task: Task) -> CaseFacts:
    """Reads image and label of a case and says what they hold; never raises for a bad file."""
    facts = CaseFacts(task.source.name, task.source.dataset, task.source.place)
    try:
        return _look(task, facts)
    except Exception as error:  # nobody foresaw it: the other cases are looked at all the same
        what = "".join(traceback.format_exception(error))
        fix = "Export the case again; if it is fine, please report this."
        return replace(facts, findings=(of_case("error", "file", facts.case, what, fix),))


def _look(task: Task, facts: CaseFacts) -> CaseFacts:
    name = facts.case
    found: list[Finding] = []
    image = _read(task, read_image, task.source.image, found)
    label = _read(task, read_label, task.source.label, found)
    if image is not None:
        facts = _image_facts(task, facts, image, found)
    if label is None:
        return replace(facts, findings=tuple(found))
    counts = value_counts(label.volume.array)
    found += _unknown_values(task, counts)
    if label.note:
        fix = "Nothing need be done; save whole numbers to be rid of this."
        found.append(of_case("warning", "values", name, label.note, fix))
    voxel_ml, voxels = label.volume.grid.voxel_ml, _organ_voxels(task, counts)
    organ_ml = {organ: round(number * voxel_ml, 3) for organ, number in voxels.items()}
    label_key = _key(label.volume.array) if counts[1:].any() else None
    facts = replace(facts, organ_ml=organ_ml, label_key=label_key)
    if image is not None:
        try:
            check_same_grid(image, label, name)
        except GeometryError as error:
            apart = _apart(image, label)
            found.append(of_case("error", "grid", name, f"{error.what} {apart}".strip(), error.fix))
        else:
            facts = _places(task, facts, image, label)
            left = _on_grid(task, image.volume.grid, label)
            facts = replace(facts, grid_voxels=left)
            found += _lost(task, voxels, left)
    return replace(facts, findings=tuple(found))


def _organ_voxels(task: Task, counts: Counts) -> dict[str, int]:
    annotated = task.entry.annotated.items()
    return {organ: sum(int(counts[value]) for value in values) for organ, values in annotated}


def _on_grid(task: Task, grid: Grid, label: NiftiVolume) -> dict[str, int]:
    """Voxels of each organ on the student grid, as stage one puts them there."""
    there = Volume(label.volume.array, grid)
    array = resample(there, grid.with_spacing(task.spacing_mm), order=0).array
    return _organ_voxels(task, value_counts(array))


def _lost(task: Task, voxels: Mapping[str, int], left: Mapping[str, int]) -> list[Finding]:
    gone = [organ for organ in left if voxels[organ] and not left[organ]]
    said = [swallowed(organ, voxels[organ]) for organ in gone]
    said += few_voxels(voxels, left).values()
    return [of_case("warning", "small", task.source.name, what, FINER_GRID) for what in said]


def _read(
    task: Task, read: Callable[[Path], NiftiVolume], path: Path, found: list[Finding]
) -> NiftiVolume | None:
    try:
        return read(path)
    except PipelineError as error:
        what = error.what if error.where is None else f"{error.where}: {error.what}"
        found.append(of_case("error", "file", task.source.name, what, error.fix))
        return None


def _image_facts(
    task: Task, facts: CaseFacts, image: NiftiVolume, found: list[Finding]
) -> CaseFacts:
    name, volume = facts.case, image.volume
    if image.note:
        fix = "Nothing need be done; move it elsewhere to be rid of this."
        found.append(of_case("warning", "file", name, image.note, fix))
    found += [of_case(d.severity, "header", name, d.what, d.fix) for d in image.doubts]
    counts = value_counts(volume.array)
    seen = intensities(volume.array, counts)
    if task.entry.units == "hu":
        found += [of_case(d.severity, "hu", name, d.what, d.fix) for d in doubts(counts, seen)]
    found += _sizes(task, volume.grid) + _shear(task, volume.grid)
    z, y, x = (round(mm, 4) for mm in volume.spacing_mm)
    return replace(
        facts, shape=volume.grid.shape, spacing_mm=(z, y, x), stored=volume.stored.code,
        image_key=_key(volume.array), hu=seen,
    )  # fmt: skip


def _sizes(task: Task, grid: Grid) -> list[Finding]:
    shape, patch = grid.with_spacing(task.spacing_mm).shape, task.patch
    try:
        check_slice(shape, patch, FLAT_PATCH)
    except GeometryError as error:
        return [of_case("error", "patch", task.source.name, error.what, error.fix)]
    if (filled := image_share(shape, patch)) >= ENOUGH_IMAGE:
        return []
    what = (
        f"on the student grid it has {_by(shape)} voxels, far less than the student's patch "
        f"of {_by(patch)}: at most {filled:.0%} of a patch is image, the rest padding."
    )
    fix = "Choose a smaller `patch` or a finer `grid.spacing_mm`, or leave such cases out."
    return [of_case("warning", "patch", task.source.name, what, fix)]


def _shear(task: Task, grid: Grid) -> list[Finding]:
    if not grid.is_sheared:
        return []
    what = (
        f"its grid is sheared by {grid.shear_degrees:.1f} degrees, as by a tilted gantry: its axes "
        "are not at right angles. Places, volumes and distances are right, but teachers and "
        "student see the body leaning by that angle."
    )
    fix = (
        "If the teachers were trained on upright scans, resample image and label onto upright axes "
        "together; else leave it."
    )
    return [of_case("warning", "grid", task.source.name, what, fix)]


def _unknown_values(task: Task, counts: Counts) -> list[Finding]:
    entry = task.entry
    known = {0, *entry.ignore_values, *entry.background_values}
    known |= {value for values in entry.annotated.values() for value in values}
    unknown = [int(value) for value in np.flatnonzero(counts) if int(value) not in known]
    if not unknown:
        return []
    shown, more = some_values(unknown)
    each = ", ".join(f"{value} ({counts[value]:,} voxels)" for value in shown)
    what = f"label values that the registry does not name: {each}{more}."
    return [of_case("error", "values", task.source.name, what, NAME_THEM)]


def _apart(image: NiftiVolume, label: NiftiVolume) -> str:
    """What two grids differ in, in words."""
    a, b = image.volume.grid, label.volume.grid
    said = []
    if not np.allclose(a.spacing_mm, b.spacing_mm, rtol=1e-3):
        said.append(f"spacing {_by(b.spacing_mm)} mm against {_by(a.spacing_mm)} mm")
    turned = a.matrix[:3, :3] / a.spacing_mm - b.matrix[:3, :3] / b.spacing_mm
    if np.abs(turned).max() > 1e-3:
        said.append("other directions of the axes")
    moved = float(np.linalg.norm(a.matrix[:3, 3] - b.matrix[:3, 3]))
    if moved > 0.05:
        said.append(f"first voxels {moved:.1f} mm apart")
    stored = image.volume.stored.code, label.volume.stored.code
    if stored[0] != stored[1]:
        said.append(f"stored as {stored[1]} against {stored[0]}")
    return f"Label against image: {', '.join(said)}." if said else ""


def _places(task: Task, facts: CaseFacts, image: NiftiVolume, label: NiftiVolume) -> CaseFacts:
    """Where organs lie in the body and how much of them is in air, on every n-th voxel."""
    step = tuple(slice(None, None, -(-n // _MOST_SAMPLES)) for n in label.volume.grid.shape)
    hu, values = image.volume.array[step], label.volume.array[step]
    body = np.nonzero(hu > _BODY_HU)
    if not body[0].size:
        return facts
    ends = np.array([np.percentile(axis, (2, 98)) for axis in body])
    middle, half = ends.mean(axis=1), np.maximum(np.diff(ends, axis=1)[:, 0] / 2, 1.0)
    place, air = {}, {}
    for organ, meanings in task.entry.annotated.items():
        inside = np.isin(values, meanings)
        if inside.any():
            centre = np.array([axis.mean() for axis in np.nonzero(inside)])
            z, y, x = ((centre - middle) / half).round(3).tolist()
            place[organ] = (z, y, x)
            air[organ] = round(float((hu[inside] <= _BODY_HU).mean()), 3)
    return replace(facts, organ_place=place, organ_air=air)


def _key(array: npt.NDArray[np.generic]) -> str:
    found = hashlib.sha256(str((array.shape, array.dtype.str)).encode())
    found.update(np.ascontiguousarray(array).data)
    return found.hexdigest()


def _by(numbers: tuple[float, ...] | tuple[int, ...]) -> str:
    return " x ".join(f"{number:.4g}" for number in numbers)
