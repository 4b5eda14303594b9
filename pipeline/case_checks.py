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
from pipeline.labels import map_labels

GEOMETRY_TOLERANCE_MM = 0.1


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


def check_organs(
    registry: Registry, work: Folder, cases: Sequence[IndexedCase]
) -> dict[str, PipelineError]:
    """Datasets whose organ is empty in every stored case: a wrong label value, or wrong files.

    Returns:
        `dataset <name>` -> what is wrong; and cases whose damage only reading finds.
    """
    found: dict[str, PipelineError] = {}
    for dataset, entry in registry.datasets.items():
        counts = []
        for case in cases:
            if case.dataset == dataset and case_path(work, case).exists():
                try:
                    counts.append(organ_voxels(case_path(work, case)))
                except CacheError as error:
                    found[case.name] = error
        for organ, values in entry.annotated.items():
            if counts and not any(count.get(organ, 0) for count in counts):
                found[f"dataset {dataset}"] = RegistryError(
                    f"{organ} is empty in all {len(counts)} cases that could be read.",
                    where=f"{registry.path}, datasets.{dataset}.annotated.{organ}",
                    fix=f"Is {list(values)} really the label value of {organ} in these files?",
                )
    return found


def organ_voxels(path: Folder) -> Mapping[str, int]:
    """Voxels per annotated organ of a stored case."""
    counts: Mapping[str, int] = Unit.open(path).attributes["organ_voxels"]
    return counts
