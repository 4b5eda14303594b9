"""A case on a grid: NIfTI -> image and label at one spacing, checked against the registry, with
centres to sample patches at.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
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
from pipeline.cache.store import add_notes, write_unit
from pipeline.config import digest, stamp_file
from pipeline.data.dicom import stamp_image
from pipeline.data.entries import CaseFiles, is_absent, require_file
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


@dataclass(frozen=True)
class StoredCase:
    """A case that is in the cache.

    Attributes:
        indexed: where.
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
        work: the work folder.
        storage: how they are stored.
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

    def read(self, source: CaseFiles) -> FoundCase:
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
                return FoundCase(indexed, inputs, there=False)
        else:
            if not self.dry_run:
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
        warnings = [f"{read.path.name}: {read.note}" for read in (image, label) if read.note]
        if registry.datasets[source.dataset].units == "hu":
            warnings += check_hounsfield(image, source.name)
        seconds = time.monotonic() - began
        return FoundCase(indexed, inputs, False, (image, label), seconds, tuple(warnings))

    def compute(self, source: CaseFiles, found: FoundCase) -> FittedCase:
        """Resamples image and label.

        Raises:
            GeometryError: label values that the registry does not name.
        """
        if found.files is None:
            return FittedCase(found)
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
        return FittedCase(replace(found, files=None), arrays, attributes, notes, seconds)

    def store(self, source: CaseFiles, fitted: FittedCase) -> StoredCase:
        """Writes a case unless it is there.

        Raises:
            WorkFolderError: it cannot be written.
        """
        found = fitted.found
        if found.there:
            return StoredCase(found.indexed, None, found.warnings)
        num_bytes = 0
        if fitted.arrays:
            receipt = write_unit(
                case_path(self.work, found.indexed), fitted.arrays, fitted.attributes,
                found.inputs, storage=self.storage, seconds=fitted.seconds, notes=fitted.notes,
            )  # fmt: skip
            num_bytes = receipt.num_bytes
        return StoredCase(found.indexed, num_bytes, warnings_in(fitted.notes))


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
    inputs = case_inputs(
        image_sha256=hashes[0], label_sha256=hashes[1], values=entry.annotated,
        ids=registry.organs, ignore_values=entry.ignore_values,
        background_values=entry.background_values, spacing_mm=spacing_mm, storage=storage,
        units=entry.units,
    )  # fmt: skip
    case = IndexedCase(
        source.dataset, source.case, source.split, hashes[0], digest(inputs), fold=source.fold
    )
    return case, inputs


# Whether a case's files, and a dataset's cases, can be what the registry says they are.

GEOMETRY_TOLERANCE_MM = 0.1
SUFFIXES = (".nii.gz", ".nii")
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


@dataclass(frozen=True)
class ReadAs:
    """How a label map of a student was brought to the registry's ids.

    Attributes:
        mapped: whether its own ids are others: organs were found by their names.
        others: organs that it has and the registry has not; they became background.
    """

    mapped: bool
    others: tuple[str, ...]


def prediction_file(folder: Path, name: str) -> Path:
    """Where the label map of `dataset/case` is, or would be.

    Raises:
        GeometryError: it is there twice, packed and not.
    """
    paths = [folder / f"{name}{suffix}" for suffix in SUFFIXES]
    found = [path for path in paths if not is_absent(path)]
    if len(found) == 2:
        raise GeometryError(
            f"{found[0].name} and {found[1].name} are both there.",
            where=f"{name}, {folder / name}",
            fix="Remove the one that is not meant.",
        )
    return found[0] if found else paths[0]


def json_beside(prediction: Path) -> Path:
    """Where `pipeline predict` says which organs the values of a label map are."""
    name = next(
        prediction.name.removesuffix(s) for s in (*SUFFIXES, "") if prediction.name.endswith(s)
    )
    return prediction.with_name(f"{name}.json")


def predicted_labels(
    found: NiftiVolume, ids: Mapping[str, int], wanted: Collection[str], *, where: str
) -> tuple[npt.NDArray[np.uint8], ReadAs]:
    """A prediction by the registry's ids, (D, H, W).

    What its values mean is said by the JSON beside it or by its header; of a file about which
    nobody says anything, they are taken for the registry's ids.

    Args:
        found: the label map.
        ids: organ -> id, of the registry.
        wanted: organs that it must have been made for.
        where: named in errors.

    Raises:
        GeometryError: JSON and header disagree, it was not made for an organ that is wanted, or it
            holds values that no organ has.
    """
    said = _said(found, where)
    names = {value: organ for organ, value in ids.items()} if said is None else said
    missing = [organ for organ in wanted if organ not in names.values()]
    if missing:
        raise GeometryError(
            f"the organs of this prediction are {_listed(names)}; not among them: "
            f"{', '.join(missing)}.",
            where=where,
            fix="Evaluate with a registry that names organs as the student does, and whose "
            "datasets annotate only what it was taught.",
        )
    table = np.full(1 << 16, -1, dtype=np.int16)
    table[0] = 0
    for value, organ in names.items():
        table[value] = ids.get(organ, 0)
    labels = table[found.volume.array]
    if labels.min() < 0:
        raise _unknown(found, labels < 0, names, said is not None, where)
    return labels.astype(np.uint8), ReadAs(
        any(ids.get(organ, value) != value for value, organ in names.items()),
        tuple(organ for organ in names.values() if organ not in ids),
    )


def _said(found: NiftiVolume, where: str) -> Mapping[int, str] | None:
    """Label value -> organ; None where neither JSON nor header say it."""
    beside = json_beside(found.path)
    said = [("its header", names) for names in found.names]
    in_json = _read_organs(beside, where)
    if in_json is not None:
        said.insert(0, (beside.name, in_json))
    for source, names in said[1:]:
        if names != said[0][1]:
            raise GeometryError(
                f"{said[0][0]} says that its values are {_listed(said[0][1])}, {source} that they "
                f"are {_listed(names)}.",
                where=where,
                fix="One of the two belongs to another prediction: predict the case again.",
            )
    return said[0][1] if said else None


def _read_organs(beside: Path, where: str) -> Mapping[int, str] | None:
    try:
        content = json.loads(beside.read_text(encoding="utf-8"))
        if not isinstance(content, dict) or "organs" not in content:
            return None  # of another program
        organs: Mapping[str, int] = content["organs"]
        names = {int(value): organ for organ, value in organs.items()}
        whole = all(isinstance(value, int) and 0 < value < 1 << 16 for value in organs.values())
        if len(names) < len(organs) or not whole:
            raise ValueError("ids are whole numbers from 1 to 65535, each once")
    except FileNotFoundError:
        return None
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise GeometryError(
            f"{beside.name} does not say which organs its values are ({error}).",
            where=where,
            fix="Predict the case again, or remove that file.",
        ) from error
    return names


def _unknown(
    found: NiftiVolume, where_not: npt.NDArray[np.bool_], names: Mapping[int, str], said: bool,
    where: str,
) -> GeometryError:  # fmt: skip
    values, counts = np.unique(found.volume.array[where_not], return_counts=True)
    each = ", ".join(f"{v} ({n:,} voxels)" for v, n in zip(values, counts, strict=True))
    who = "it says" if said else "nothing says what its values mean, and the registry has"
    return GeometryError(
        f"label values that are no organ's: {each}; {who} {_listed(names)}.",
        where=where,
        fix=f"Set them to 0, or write what all values mean into {json_beside(found.path).name}, as "
        '{"organs": {"liver": 1}}.',
    )


def _listed(names: Mapping[int, str]) -> str:
    return ", ".join(f"{organ} {value}" for value, organ in sorted(names.items()))


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
                    _swallowed_everywhere(organ, len(counts), where)
                    if organ in lost
                    else RegistryError(
                        f"{organ} is empty in all {len(counts)} cases that could be read.",
                        where=where,
                        fix=f"Is {list(values)} really the label value of {organ} in these files?",
                    )
                )
    return found


def _swallowed_everywhere(organ: str, num_cases: int, where: str) -> RegistryError:
    return RegistryError(
        f"{organ} has no voxel left on the student grid in any of {num_cases} cases, though their "
        "labels show it.",
        where=where,
        fix=f"Choose a finer `grid.spacing_mm`, or take {organ} out of `annotated`.",
    )


def organ_voxels(path: Folder) -> Mapping[str, int]:
    """Voxels per annotated organ of a stored case."""
    counts: Mapping[str, int] = Unit.open(path).attributes["organ_voxels"]
    return counts
