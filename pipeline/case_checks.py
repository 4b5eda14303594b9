"""Whether a case's files, and a dataset's cases, can be what the registry says they are."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt

from pipeline.cache.index import IndexedCase, case_path
from pipeline.cache.reader import Unit
from pipeline.data.files import CaseFiles
from pipeline.data.nifti import NiftiVolume
from pipeline.data.registry import Registry
from pipeline.errors import CacheError, GeometryError, PipelineError, RegistryError
from pipeline.folder import Folder
from pipeline.hounsfield import doubts_of
from pipeline.labels import map_labels

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
