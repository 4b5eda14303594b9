"""A case on a grid: NIfTI -> image and label at one spacing, with centres to sample patches at."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from pipeline.cache.index import IndexedCase, case_path
from pipeline.cache.provenance import case_inputs
from pipeline.cache.reader import Unit
from pipeline.cache.receipt import Receipt, read_receipt
from pipeline.cache.schema import (
    CENTRES_PER_ORGAN,
    ArraySpec,
    StorageConfig,
    image_spec,
    label_spec,
)
from pipeline.cache.store import add_notes, write_unit
from pipeline.case_checks import (
    FINER_GRID,
    check_hounsfield,
    check_same_grid,
    count_organs,
    few_voxels,
    organ_labels,
    swallowed,
)
from pipeline.config import digest, stamp_file
from pipeline.data.files import CaseFiles, require_file
from pipeline.data.nifti import NiftiVolume, read_image, read_label
from pipeline.data.registry import Registry
from pipeline.data.resample import resample
from pipeline.errors import CacheError, GeometryError, named
from pipeline.folder import Folder
from pipeline.volume import Volume


@dataclass(frozen=True)
class FoundCase:
    """A case as its files say, and what is still to be done for it.

    Attributes:
        indexed: where it is in the cache.
        inputs: what its digest is of.
        there: it is in the cache already.
        files: image and label, read if they are needed.
        seconds: what reading took.
        warnings: what is improbable in it, a sentence or two each.
    """

    indexed: IndexedCase
    inputs: Mapping[str, Any]
    there: bool
    files: tuple[NiftiVolume, NiftiVolume] | None = None
    seconds: float = 0.0
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True)
class FittedCase:
    """A case on its grid; `arrays` is empty where nothing is to be written, `notes` are those of
    its receipt."""

    found: FoundCase
    arrays: Sequence[ArraySpec] = ()
    attributes: Mapping[str, Any] = field(default_factory=dict)
    notes: Mapping[str, Any] = field(default_factory=dict)
    seconds: float = 0.0

    @property
    def warnings(self) -> tuple[str, ...]:
        """All that a user should hear of the case."""
        return self.found.warnings if self.found.there else warnings_in(self.notes)


def prepare_case(
    registry: Registry,
    work: Folder,
    source: CaseFiles,
    *,
    spacing_mm: Sequence[float],
    storage: StorageConfig,
    dry_run: bool = False,
    warn: Callable[[str], object],
) -> tuple[IndexedCase, int | None]:
    """Makes sure that a case is in `cases/` at a spacing: `find_case`, `fit_case`, `store_case`.

    Args:
        registry: says what the dataset's label values mean.
        work: the work folder.
        source: the case's files.
        spacing_mm: z, y, x of the grid.
        storage: how it is stored.
        dry_run: write nothing.
        warn: told what is improbable in it.

    Returns:
        Where the case is, and the bytes written; None if it was there already.

    Raises:
        GeometryError: files that cannot be trusted; see `pipeline.data.nifti`, and label values
            that the registry does not name, image and label that do not lie on one grid, or an
            image that is no CT in HU although its dataset does not say so.
    """
    found = find_case(
        registry, work, source, spacing_mm=spacing_mm, storage=storage, dry_run=dry_run
    )
    fitted = fit_case(registry, source, found, spacing_mm)
    for warning in fitted.warnings:
        warn(f"{source.name}: {warning}")
    return store_case(work, fitted, storage)


def find_case(
    registry: Registry,
    work: Folder,
    source: CaseFiles,
    *,
    spacing_mm: Sequence[float],
    storage: StorageConfig,
    dry_run: bool = False,
) -> FoundCase:
    """Hashes the files of a case and, where the cache lacks it, reads them.

    Raises:
        GeometryError: as `prepare_case`.
    """
    indexed, inputs = identify_case(registry, source, spacing_mm=spacing_mm, storage=storage)
    path = case_path(work, indexed)
    try:
        receipt = read_receipt(path, expect=indexed.digest)
    except CacheError:
        if dry_run:
            return FoundCase(indexed, inputs, there=False)
    else:
        if not dry_run:
            receipt = _with_file_voxels(registry, source, path, receipt)
        return FoundCase(indexed, inputs, there=True, warnings=warnings_in(receipt.notes))
    began = time.monotonic()
    image, label = read_image(source.image), read_label(source.label)
    if (image.sha256, label.sha256) != (inputs["image_sha256"], inputs["label_sha256"]):
        raise GeometryError(
            "the files changed while they were read.",
            where=source.name,
            fix="Let nothing write to the dataset, then run the stage again.",
        )
    check_same_grid(image, label, source.name)
    warnings = [f"{label.path.name}: {label.note}"] if label.note else []
    if registry.datasets[source.dataset].units == "hu":
        warnings += check_hounsfield(image, source.name)
    seconds = time.monotonic() - began
    return FoundCase(indexed, inputs, False, (image, label), seconds, tuple(warnings))


def fit_case(
    registry: Registry, source: CaseFiles, found: FoundCase, spacing_mm: Sequence[float]
) -> FittedCase:
    """Resamples image and label.

    Raises:
        GeometryError: label values that the registry does not name.
    """
    if found.files is None:
        return FittedCase(found)
    began = time.monotonic()
    image, label = found.files
    entry = registry.datasets[source.dataset]
    ids = {organ: registry.organs[organ] for organ in entry.annotated}
    grid = image.volume.grid.with_spacing(spacing_mm)
    mapped = Volume(organ_labels(registry, source, label), image.volume.grid)
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
    return FittedCase(replace(found, files=None), arrays, attributes, notes, seconds)


def store_case(
    work: Folder, fitted: FittedCase, storage: StorageConfig
) -> tuple[IndexedCase, int | None]:
    """Writes a case unless it is there; returns as `prepare_case`."""
    found = fitted.found
    if found.there:
        return found.indexed, None
    if not fitted.arrays:
        return found.indexed, 0
    receipt = write_unit(
        case_path(work, found.indexed), fitted.arrays, fitted.attributes, found.inputs,
        storage=storage, seconds=fitted.seconds, notes=fitted.notes,
    )  # fmt: skip
    return found.indexed, receipt.num_bytes


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
    registry: Registry,
    source: CaseFiles,
    *,
    spacing_mm: Sequence[float],
    storage: StorageConfig,
) -> tuple[IndexedCase, Mapping[str, Any]]:
    """Hashes the files of a case; returns where its unit is, and what the unit's digest is of.

    Raises:
        GeometryError: a file that cannot be read.
    """
    with named(source.name):
        require_file(source.image)
        require_file(source.label)
    try:
        image, label = stamp_file(source.image), stamp_file(source.label)
    except OSError as error:
        raise GeometryError(
            f"the file cannot be read ({error.strerror}).",
            where=f"{source.name}, {error.filename}",
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
    inputs = case_inputs(
        image_sha256=hashes[0],
        label_sha256=hashes[1],
        values=entry.annotated,
        ids=registry.organs,
        ignore_values=entry.ignore_values,
        background_values=entry.background_values,
        spacing_mm=spacing_mm,
        storage=storage,
        units=entry.units,
    )
    case = IndexedCase(source.dataset, source.case, source.split, hashes[0], digest(inputs))
    return case, inputs
