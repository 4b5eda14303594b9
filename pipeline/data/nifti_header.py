"""What a NIfTI header says that makes its geometry doubtful although it can be read."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product
from typing import Any

import numpy as np

_TOLERANCE_MM = 0.1


@dataclass(frozen=True)
class HeaderDoubt:
    """One doubt.

    Attributes:
        what: a sentence.
        fix: what to do.
        certain: whether the geometry is wrong for sure.
    """

    what: str
    fix: str
    certain: bool = False


def header_doubts(image: Any) -> tuple[HeaderDoubt, ...]:
    """Doubts about units, about a place that nobody recorded, and about two that contradict.

    Args:
        image: as nibabel loads it, NIfTI-1 or -2; its voxels are not read.
    """
    return tuple(_units(image.header) + _forms(image.header, image.shape))


def _units(header: Any) -> list[HeaderDoubt]:
    try:
        unit = str(header.get_xyzt_units()[0])
    except KeyError:  # a code that NIfTI does not define
        return []
    if unit not in ("meter", "micron"):
        return []
    what = f"the header gives lengths in {unit}s; they are read as mm."
    return [HeaderDoubt(what, "Write the file again in mm.", certain=True)]


def _forms(header: Any, shape: tuple[int, ...]) -> list[HeaderDoubt]:
    fix = "Export it again from its source, and look at it in a viewer that shows left and right."
    sform, qform = int(header["sform_code"]), int(header["qform_code"])
    if not sform and not qform:
        what = (
            "the header records no orientation (sform and qform codes are 0): which side is left "
            "is a guess."
        )
        return [HeaderDoubt(what, fix)]
    if not sform or not qform:
        return []
    try:
        apart = header.get_sform() - header.get_qform()
    except Exception as error:  # nibabel raises what it likes for a damaged quaternion
        return [HeaderDoubt(f"its qform cannot be read ({error}).", fix)]
    corners = np.array([[*c, 1] for c in product(*((0, n - 1) for n in shape[:3]))]).T
    most = float(np.linalg.norm((apart @ corners)[:3], axis=0).max())
    if not most > _TOLERANCE_MM:
        return []
    what = (
        f"sform and qform place its voxels up to {most:.1f} mm apart; the sform is used here, "
        "other tools may use the qform."
    )
    return [HeaderDoubt(what, "Find out which is right and save the file with that one alone.")]
