"""Whether a case's files, and a dataset's cases, can be what the registry says they are."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from pipeline.cache.index import IndexedCase, case_path
from pipeline.cache.reader import Unit
from pipeline.data.files import CaseFiles, is_absent
from pipeline.data.nifti import NiftiVolume
from pipeline.data.registry import Registry
from pipeline.errors import CacheError, GeometryError, PipelineError, RegistryError
from pipeline.folder import Folder
from pipeline.hounsfield import doubts_of
from pipeline.labels import map_labels

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
