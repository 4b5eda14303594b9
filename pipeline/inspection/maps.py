"""One case as NIfTI files on the student grid, that any viewer lays over each other."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import dask
import dask.array as da
import numpy as np
import numpy.typing as npt

from pipeline.cache.reader import CachedCase
from pipeline.data.nifti import write_image
from pipeline.folder import replace_files
from pipeline.inspection.looks import CaseLook
from pipeline.label_tables import colour_of, hex_colour
from pipeline.volume import Volume

Array = npt.NDArray[Any]
_SNAP_LABELS, _SLICER_COLOURS = "organs.label.txt", "organs.ctbl"


@dataclass(frozen=True)
class CaseMaps:
    """What is written of a case, (D, H, W) each.

    Attributes:
        image: int16 HU.
        label: uint8 organ ids, 255 ignore.
        maps: file name -> map; see `lazy_maps`.
    """

    image: Array
    label: Array
    maps: Mapping[str, Array]


def lazy_maps(look: CaseLook) -> Mapping[str, da.Array]:
    """Each map by the name of its file; those of split experts only where an organ has several.

    - `regions`: organ ids; in a conflict the organ with the larger log-odds; 0 elsewhere.
    - `agreed_background`, `abstained`: 0 or 1.
    - `unclaimed`: 0 or 1, background as far as anybody speaks; only where a teacher is doubted.
    - `conflicts`: in how many organ regions, where that is two or more.
    - `against_label`: 1 false positive, 2 miss, 3 both (`pipeline.inspection.looks`).
    - `split_experts`: of how many organs the experts decide differently.
    - `spread`: the largest spread of any organ's experts, float32 log-odds.
    """
    maps = {
        "regions": look.region_ids(),
        "agreed_background": look.regions.background.view(np.uint8),
        "conflicts": look.num_claims(),
        "abstained": look.regions.abstained.view(np.uint8),
        "against_label": look.against_label(),
    }
    if look.is_doubted:
        maps["unclaimed"] = look.regions.unclaimed.view(np.uint8)
    if look.has_rivals:
        maps |= {"split_experts": look.num_split(), "spread": look.spread()}
    return maps


def compute_maps(
    case: CachedCase, look: CaseLook, also: Sequence[da.Array] = ()
) -> tuple[CaseMaps, tuple[Array, ...]]:
    """Every map in one pass: at no time are more log-odds in memory than those of a few chunks.

    Args:
        case: the case.
        look: at it.
        also: other arrays of the same look, computed in the same pass.

    Raises:
        CacheError: damage that only reading finds.
    """
    lazy = lazy_maps(look)
    maps = {name: np.empty(array.shape, array.dtype) for name, array in lazy.items()}
    stored = da.store(list(lazy.values()), list(maps.values()), lock=False, compute=False)
    # As it was built, like `cohort.compute`: fusing thousands of tasks takes longer than it saves.
    _, *others = dask.compute(stored, *also, scheduler="synchronous", optimize_graph=False)
    return CaseMaps(case.image(), case.label(), maps), tuple(others)


def files_of(look: CaseLook) -> list[str]:
    """Names of all that `write_maps` writes."""
    maps = [f"{name}.nii.gz" for name in ("image", "label", *lazy_maps(look))]
    return [*maps, _SNAP_LABELS, _SLICER_COLOURS]


def write_maps(folder: Path, case: CachedCase, look: CaseLook, found: CaseMaps) -> list[Path]:
    """Writes the CT, the label and every map as `.nii.gz`, and the organs' names and colours for
    ITK-SNAP (`organs.label.txt`) and 3D Slicer (`organs.ctbl`).

    Raises:
        OSError: it cannot be written.
    """
    written = []
    for name, array in {"image": found.image, "label": found.label, **found.maps}.items():
        path = folder / f"{name}.nii.gz"
        write_image(path, Volume(array, case.grid))
        written.append(path)
    tables = {_SNAP_LABELS: snap_labels(look), _SLICER_COLOURS: slicer_colours(look)}
    replace_files({folder / name: text.encode() for name, text in tables.items()})
    return [*written, *(folder / name for name in tables)]


def organ_colours(look: CaseLook) -> dict[str, str]:
    """Organ -> its colour, in files and in the figure."""
    return {o: hex_colour(i) for o, i in zip(look.organs, look.ids, strict=True)}


def snap_labels(look: CaseLook) -> str:
    """ITK-SNAP's label description: id, R, G, B, opacity, visibility, mesh visibility, name."""
    rows = ['0 0 0 0 0 0 0 "background"']
    for organ, organ_id in zip(look.organs, look.ids, strict=True):
        red, green, blue = colour_of(organ_id)
        rows.append(f'{organ_id} {red} {green} {blue} 1 1 1 "{organ}"')
    rows.append('255 128 128 128 1 1 0 "ignored"')
    return "\n".join(rows) + "\n"


def slicer_colours(look: CaseLook) -> str:
    """3D Slicer's colour table: id, name, R, G, B, A."""
    rows = ["# Color table of organ ids", "0 background 0 0 0 0"]
    for organ, organ_id in zip(look.organs, look.ids, strict=True):
        red, green, blue = colour_of(organ_id)
        rows.append(f"{organ_id} {organ} {red} {green} {blue} 255")
    rows.append("255 ignored 128 128 128 255")
    return "\n".join(rows) + "\n"
