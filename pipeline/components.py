"""How many connected parts a mask has: an organ that falls apart is improbable."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

import numpy as np
import numpy.typing as npt
from scipy import ndimage

# Parts are counted on voxels so far apart: a whole mask at full size is not kept for it.
COMPONENT_MM: Final = 6.0
# A part is large if it has this share of all of the mask.
LARGE_SHARE: Final = 0.1
_TOUCHING: Final = np.ones((3, 3, 3), dtype=np.bool_)


def coarse(spacing_mm: Sequence[float]) -> tuple[slice, slice, slice]:
    """Every how manieth voxel along z, y, x is looked at."""
    z, y, x = (max(1, round(COMPONENT_MM / mm)) for mm in spacing_mm)
    return slice(None, None, z), slice(None, None, y), slice(None, None, x)


def large_components(mask: npt.NDArray[np.bool_]) -> int:
    """How many connected parts (26 neighbours) have a tenth of the mask (D, H, W) or more."""
    parts: Any = ndimage.label(mask, structure=_TOUCHING)[0]
    sizes = np.bincount(parts.ravel())[1:]
    return int(np.count_nonzero(sizes >= LARGE_SHARE * max(1, sizes.sum())))
