"""Label maps that a student wrote, or somebody else: where they are, and what their values mean."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from pipeline.data.files import is_absent
from pipeline.data.nifti import NiftiVolume
from pipeline.errors import GeometryError

SUFFIXES = (".nii.gz", ".nii")


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
        wanted: organs that it must have been made for.

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
