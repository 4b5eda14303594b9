"""A case on a grid: NIfTI -> image and label at one spacing, checked against the registry, with
centres to sample patches at.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from pipeline.cache.index import IndexedCase, case_path
from pipeline.cache.reader import Unit
from pipeline.cache.receipt import Receipt, read_receipt
from pipeline.cache.schema import (
    CENTRES_PER_ORGAN,
    ArraySpec,
    StorageConfig,
    case_inputs,
    image_spec,
    label_spec,
)
from pipeline.cache.store import Made, add_notes, write_unit
from pipeline.config import digest, stamp_file
from pipeline.data.dicom import stamp_image
from pipeline.data.entries import CaseFiles
from pipeline.data.files import require_file
from pipeline.data.hounsfield import doubts_of
from pipeline.data.labels import map_labels
from pipeline.data.nifti import NiftiVolume, read_image, read_label
from pipeline.data.registry import Registry
from pipeline.data.resample import resample
from pipeline.data.volume import Volume
from pipeline.engine.here import do_one
from pipeline.errors import CacheError, GeometryError, PipelineError, RegistryError, named
from pipeline.folder import Folder


@dataclass(frozen=True)
class GridCase:
    """A case on its way onto a grid, and what is still to be done for it.

    Attributes:
        indexed: where it is in the cache.
        files: image and label, read if they are needed, until they are resampled.
        warnings: what is improbable in it, a sentence or two each.
        arrays: to be written; none where nothing is.
        attributes, notes: of the unit and its receipt.
        seconds: what reading and resampling took.
    """

    indexed: IndexedCase
    inputs: Mapping[str, Any]
    there: bool = False
    files: tuple[NiftiVolume, NiftiVolume] | None = None
    warnings: tuple[str, ...] = ()
    arrays: Sequence[ArraySpec] = ()
    attributes: Mapping[str, Any] = field(default_factory=dict)
    notes: Mapping[str, Any] = field(default_factory=dict)
    seconds: float = 0.0


@dataclass(frozen=True)
class StoredCase:
    """A case that is in the cache.

    Attributes:
        num_bytes: written; None: it was there already.
        warnings: what is improbable in it, a sentence or two each.
    """

    indexed: IndexedCase
    num_bytes: int | None
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True)
class CaseToGrid:
    """The steps (`engine.Steps`) that bring cases onto a grid, into `cases/`.

    Attributes:
        registry: says what the dataset's label values mean.
        spacing_mm: z, y, x of the grid.
        dry_run: write nothing, and read no voxel.
    """

    registry: Registry
    work: Folder
    storage: StorageConfig
    spacing_mm: Sequence[float]
    dry_run: bool = False

    def group(self, source: CaseFiles) -> str:
        """`dataset/case`."""
        return source.name

    def read(self, source: CaseFiles) -> GridCase:
        """Hashes the files of a case and, where the cache lacks it, reads them.

        Raises:
            GeometryError: files that cannot be trusted; see `pipeline.data.nifti`, image and label
                that do not lie on one grid, or an image that is no CT in HU although its dataset
                does not say so.
        """
        registry = self.registry
        indexed, inputs = identify_case(
            registry, source, spacing_mm=self.spacing_mm, storage=self.storage
        )
        path = case_path(self.work, indexed)
        try:
            receipt = read_receipt(path, expect=indexed.digest)
        except CacheError:
            if self.dry_run:
                return GridCase(indexed, inputs)
        else:
            if not self.dry_run:
                receipt = _with_file_voxels(registry, source, path, receipt)
            return GridCase(indexed, inputs, there=True, warnings=warnings_in(receipt.notes))
        began = time.monotonic()
        image, label = read_image(source.image), read_label(source.label)
        if (image.sha256, label.sha256) != (inputs["image_sha256"], inputs["label_sha256"]):
            raise GeometryError(
                "the files changed while they were read.",
                where=source.name,
                fix="Let nothing write to the dataset, then run the stage again.",
            )
        check_same_grid(image, label, source.name)
        warnings = [f"{read.path.name}: {read.note}" for read in (image, label) if read.note]
        if registry.datasets[source.dataset].units == "hu":
            warnings += check_hounsfield(image, source.name)
        seconds = time.monotonic() - began
        files = image, label
        return GridCase(indexed, inputs, files=files, warnings=tuple(warnings), seconds=seconds)

    def compute(self, source: CaseFiles, found: GridCase) -> GridCase:
        """Resamples image and label.

        Raises:
            GeometryError: label values that the registry does not name.
        """
        if found.files is None:
            return found
        began = time.monotonic()
        image, label = found.files
        entry = self.registry.datasets[source.dataset]
        ids = {organ: self.registry.organs[organ] for organ in entry.annotated}
        grid = image.volume.grid.with_spacing(self.spacing_mm)
        mapped = Volume(organ_labels(self.registry, source, label), image.volume.grid)
        stored_label = resample(mapped, grid, order=0).array
        in_file, on_grid = count_organs(mapped.array, ids), count_organs(stored_label, ids)
        seed = found.indexed.image_sha256
        attributes = {
            "case": source.name,
            "grid": grid.to_json(),
            "source_grid": image.volume.grid.to_json(),
            "source": {"image": source.image.name, "label": source.label.name},
            "organ_ids": ids,
            "organ_voxels": on_grid,
            "centres": {organ: centres(stored_label == ids[organ], seed=seed) for organ in ids},
        }
        arrays = [image_spec(resample(image.volume, grid, order=1).array), label_spec(stored_label)]
        notes: dict[str, Any] = _absent_organs(in_file, on_grid)
        if warnings := [*found.warnings, *few_voxels(in_file, on_grid).values()]:
            notes["warnings"] = warnings
        seconds = found.seconds + time.monotonic() - began
        # Without the files: the volumes on their own grid are not needed any more.
        return replace(
            found, files=None, arrays=arrays, attributes=attributes, notes=notes, seconds=seconds
        )

    def store(self, source: CaseFiles, case: GridCase) -> StoredCase:
        """Writes a case unless it is there."""
        if case.there:
            return StoredCase(case.indexed, None, case.warnings)
        num_bytes = 0
        if case.arrays:
            path, made = case_path(self.work, case.indexed), Made(case.seconds, notes=case.notes)
            num_bytes = write_unit(
                path, case.arrays, case.attributes, case.inputs, storage=self.storage, made=made
            ).num_bytes
        return StoredCase(case.indexed, num_bytes, warnings_in(case.notes))


def prepare_case(
    to_grid: CaseToGrid, source: CaseFiles, *, warn: Callable[[str], object]
) -> StoredCase:
    """One case through all steps; `warn` hears what is improbable in it. Raises what they raise."""
    stored = do_one(to_grid, source)
    for warning in stored.warnings:
        warn(f"{source.name}: {warning}")
    return stored


def warnings_in(notes: Mapping[str, Any]) -> tuple[str, ...]:
    """What the notes of a case's receipt have to tell, a sentence or two each."""
    lost = (swallowed(o, n) for o, n in notes.get("file_voxels", {}).items() if n)
    return (*notes.get("warnings", ()), *(f"{what} {FINER_GRID}" for what in lost))


def _absent_organs(in_file: Mapping[str, int], on_grid: Mapping[str, int]) -> dict[str, Any]:
    """What a receipt notes of organs without a voxel on the grid: how many the file has."""
    absent = {organ: in_file[organ] for organ, voxels in on_grid.items() if not voxels}
    return {"file_voxels": absent} if absent else {}


def _with_file_voxels(
    registry: Registry, source: CaseFiles, path: Folder, receipt: Receipt
) -> Receipt:
    """The receipt of a case that is there; one that was written before voxels of the file were
    noted, and that lacks an organ, gets the note: its numbers stay as they are."""
    if "file_voxels" in receipt.notes:
        return receipt
    try:
        on_grid = Unit(path, receipt).attributes["organ_voxels"]
    except CacheError:
        return receipt  # its damage is told where the case is needed
    if all(on_grid.values()):
        return receipt
    label = organ_labels(registry, source, read_label(source.label))
    in_file = count_organs(label, {organ: registry.organs[organ] for organ in on_grid})
    return add_notes(path, receipt, _absent_organs(in_file, on_grid))


def centres(
    mask: npt.NDArray[np.bool_], *, seed: str, most: int = CENTRES_PER_ORGAN
) -> list[list[int]]:
    """Up to `most` voxels (z, y, x) of a mask, drawn by the seed alone, in random order."""
    inside = np.flatnonzero(mask)
    if inside.size == 0:
        return []
    number = int.from_bytes(hashlib.sha256(seed.encode()).digest()[:8], "little")
    drawn = np.random.Generator(np.random.Philox(number)).permutation(inside)[:most]
    found: list[list[int]] = np.stack(np.unravel_index(drawn, mask.shape), axis=1).tolist()
    return found


def identify_case(
    registry: Registry, source: CaseFiles, *, spacing_mm: Sequence[float], storage: StorageConfig
) -> tuple[IndexedCase, Mapping[str, Any]]:
    """Hashes the files of a case; returns where its unit is, and what the unit's digest is of.

    Raises:
        GeometryError: a file that cannot be read.
    """
    with named(source.name):
        require_file(source.image)
        require_file(source.label)
    try:
        image, label = stamp_image(source.image), stamp_file(source.label)
    except OSError as error:
        raise GeometryError(
            f"the file cannot be read ({error.strerror}).",
            where=f"{source.name}, {error.filename or source.image}",
            fix="Check the disk that it lies on.",
        ) from error
    hashes = image.sha256, label.sha256
    case, inputs = case_of_hashes(registry, source, hashes, spacing_mm=spacing_mm, storage=storage)
    return replace(case, image=image, label=label), inputs


def case_of_hashes(
    registry: Registry,
    source: CaseFiles,
    hashes: tuple[str, str],
    *,
    spacing_mm: Sequence[float],
    storage: StorageConfig,
) -> tuple[IndexedCase, Mapping[str, Any]]:
    """`identify_case` for files whose SHA-256 (of image, of label) are known; none is read."""
    entry = registry.datasets[source.dataset]
    inputs = case_inputs(entry, registry.organs, hashes, spacing_mm=spacing_mm, storage=storage)
    case = IndexedCase(
        source.dataset, source.case, source.split, hashes[0], digest(inputs), fold=source.fold
    )
    return case, inputs


# Whether a case's files, and a dataset's cases, can be what the registry says they are.

GEOMETRY_TOLERANCE_MM = 0.1
FEW_VOXELS = 10
FINER_GRID = "A finer `grid.spacing_mm` would keep it."


def organ_labels(
    registry: Registry, source: CaseFiles, label: NiftiVolume
) -> npt.NDArray[np.uint8]:
    """A dataset's own label map -> organ ids (D, H, W), 0 background, 255 ignore.

    Raises:
        GeometryError: a value that the registry does not name.
    """
    entry = registry.datasets[source.dataset]
    return map_labels(
        label.volume.array,
        entry.annotated,
        {organ: registry.organs[organ] for organ in entry.annotated},
        entry.ignore_values,
        entry.background_values,
        where=f"{source.name}, {source.label}",
    )


def check_same_grid(image: NiftiVolume, label: NiftiVolume, name: str) -> None:
    """Image and label must lie on one grid, within `GEOMETRY_TOLERANCE_MM` at every corner.

    Raises:
        GeometryError: says by how much they differ and how to mend it.
    """
    where = f"{name}, {label.path}"
    a, b = image.volume.grid, label.volume.grid
    if a.shape != b.shape:
        raise GeometryError(
            f"the label has shape {b.shape} (z, y, x), the image {a.shape}.",
            where=where,
            fix="They must be of one case; resample the label onto the image's grid.",
        )
    apart = a.largest_corner_distance_mm(b)
    if apart > GEOMETRY_TOLERANCE_MM:
        raise GeometryError(
            f"the label's affine places its voxels up to {apart:.2f} mm away from the image's "
            f"(tolerance {GEOMETRY_TOLERANCE_MM} mm).",
            where=where,
            fix="If they are known to match voxel by voxel, copy the image's affine to the label; "
            "else resample the label.",
        )


def check_hounsfield(image: NiftiVolume, name: str) -> list[str]:
    """What makes it doubtful that an image is CT in HU, a sentence or two each.

    Raises:
        GeometryError: it certainly is not.
    """
    found = doubts_of(image.volume.array)
    for doubt in found:
        if doubt.severity == "error":
            raise GeometryError(
                f"it cannot be CT in HU: {doubt.what}",
                where=f"{name}, {image.path}",
                fix=f"{doubt.fix} If its dataset is meant to be something else, say `units: other` "
                "there in the registry.",
            )
    return [str(doubt) for doubt in found]


def count_organs(label: npt.NDArray[np.uint8], ids: Mapping[str, int]) -> dict[str, int]:
    """Organ -> its voxels in a map of organ ids."""
    counts = np.zeros(256, dtype=np.int64)
    for part in label:  # slice by slice: bincount makes int64 of all that it is given
        counts += np.bincount(part.reshape(-1), minlength=256)
    return {organ: int(counts[organ_id]) for organ, organ_id in ids.items()}


def swallowed(organ: str, in_file: int) -> str:
    """What is said of an organ that has no voxel left on the student grid."""
    return (
        f"{organ} has {voxels_of(in_file)} in the label's file and none on the student grid: here "
        "it counts as not annotated, not as absent."
    )


def few_voxels(in_file: Mapping[str, int], on_grid: Mapping[str, int]) -> dict[str, str]:
    """Organs of which the student grid leaves some, but fewer than `FEW_VOXELS` voxels -> what is
    said of them."""
    return {
        organ: f"{organ} keeps {left} of {voxels_of(in_file[organ])} on the student grid."
        for organ, left in on_grid.items()
        if 0 < left < min(FEW_VOXELS, in_file[organ])
    }


def voxels_of(number: int) -> str:
    """A number of voxels in words."""
    return f"{number:,} voxel{'' if number == 1 else 's'}"


def check_organs(
    registry: Registry, work: Folder, cases: Sequence[IndexedCase]
) -> dict[str, PipelineError]:
    """Datasets whose organ is empty in every stored case: a wrong label value, or wrong files.

    Returns:
        `dataset <name>` -> what is wrong; and cases whose damage only reading finds.
    """
    found: dict[str, PipelineError] = {}
    for dataset, entry in registry.datasets.items():
        counts, lost = [], set()
        for case in cases:
            if case.dataset == dataset and case_path(work, case).exists():
                try:
                    unit = Unit.open(case_path(work, case))
                    counts.append(unit.attributes["organ_voxels"])
                    lost |= set(unit.receipt.swallowed)
                except CacheError as error:
                    found[case.name] = error
        for organ, values in entry.annotated.items():
            if counts and not any(count.get(organ, 0) for count in counts):
                where = f"{registry.path}, datasets.{dataset}.annotated.{organ}"
                found[f"dataset {dataset}"] = (
                    RegistryError(
                        f"{organ} has no voxel left on the student grid in any of {len(counts)} "
                        "cases, though their labels show it.",
                        where=where,
                        fix=f"Choose a finer `grid.spacing_mm`, or take {organ} out of "
                        "`annotated`.",
                    )
                    if organ in lost
                    else RegistryError(
                        f"{organ} is empty in all {len(counts)} cases that could be read.",
                        where=where,
                        fix=f"Is {list(values)} really the label value of {organ} in these files?",
                    )
                )
    return found
