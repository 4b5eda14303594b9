"""Surfaces of masks: their areas and how far apart they are, in mm.

Numbers are those of MONAI, whose table of areas is Nikolov's too, within the rounding of float32.
MONAI itself is not imported for them: that takes longer than most evaluations.
"""

from __future__ import annotations

import math
from itertools import product
from typing import Final

import numpy as np
import numpy.typing as npt

from pipeline.data.volume import Grid

Mask = npt.NDArray[np.bool_]


def surface_scores(
    predicted: Mask, expected: Mask, grid: Grid, tolerance: float
) -> tuple[float, float]:
    """NSD and HD95 in mm of two masks (D, H, W), neither empty; see `metrics.score_case`. Of a
    slice, outlines are the surfaces."""
    from scipy.ndimage import binary_erosion

    predicted, expected = _crop(predicted, expected, grid)
    # Surface elements weighed by area are Nikolov's definition. Border voxels counted alike would
    # take a face of 5 x 1 mm for one of 1 x 1 mm.
    areas = _element_areas(grid)
    cubes_p, cubes_e = _cubes(predicted), _cubes(expected)
    edges_p, edges_e = ((cubes > 0) & (cubes < len(areas) - 1) for cubes in (cubes_p, cubes_e))
    # Distances are float32 and numpy compares them to a Python float in float32: 3 x 0.1 mm is
    # within 0.3 mm, although it is not in float64.
    near_p, near_e = (near <= tolerance for near in _both_ways(edges_p, edges_e, grid))
    area_p, area_e = areas[cubes_p[edges_p]], areas[cubes_e[edges_e]]
    nsd = (area_p[near_p].sum() + area_e[near_e].sum()) / (area_p.sum() + area_e.sum())

    borders_p, borders_e = (mask ^ binary_erosion(mask) for mask in (predicted, expected))
    apart = _both_ways(borders_p, borders_e, grid)
    hd95 = max(float(np.percentile(mm.astype(np.float64), 95)) for mm in apart)
    return float(nsd), hd95


def _measured_axes(grid: Grid) -> list[int]:
    """Those along which surfaces are: all three, or the two of a slice."""
    return [axis for axis in range(3) if axis != grid.slice_axis]


def _upright_mm(grid: Grid) -> tuple[float, ...] | None:
    """Spacing along the measured axes; None where it does not say how far apart voxels are."""
    if grid.is_sheared:
        return None
    return tuple(grid.spacing_mm[axis] for axis in _measured_axes(grid))


def diagonal_mm(grid: Grid) -> float:
    """The longest one, voxel edge to voxel edge; only on a sheared grid do they differ."""
    upright = _upright_mm(grid)
    if upright is not None:
        return math.hypot(*(np.array(grid.shape)[_measured_axes(grid)] * upright))
    edges = grid.matrix[:3, :3] * grid.shape
    return max(float(np.linalg.norm(edges @ (1, *signs))) for signs in product((1, -1), repeat=2))


def _crop(predicted: Mask, expected: Mask, grid: Grid) -> tuple[Mask, Mask]:
    """Both masks within their common bounding box, and one voxel of background around it; (H, W)
    of a slice.

    The voxel around is added, not cut out: an organ that touches the edge of the image must be
    closed there as well. Nothing else changes, for surfaces lie within the box.
    """
    box = []
    union = predicted | expected
    # Each axis in turn, shrinking as it goes, so that only the first pass reads the whole image.
    for axis in range(3):
        rest = tuple(other for other in range(3) if other != axis)
        inside = np.flatnonzero(union.any(axis=rest))
        part = slice(int(inside[0]), int(inside[-1]) + 1)
        union = union[(slice(None),) * axis + (part,)]
        box.append(part)
    cut: tuple[slice | int, ...] = tuple(box)
    if grid.slice_axis is not None:
        cut = (*cut[: grid.slice_axis], 0, *cut[grid.slice_axis + 1 :])
    return np.pad(predicted[cut], 1), np.pad(expected[cut], 1)


def _both_ways(
    one: Mask, other: Mask, grid: Grid
) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]:
    """Distance in mm from each element of one edge to the nearest of the other, and back."""
    from scipy.spatial import KDTree

    upright = _upright_mm(grid)
    a, b = (
        np.argwhere(edge) @ grid.matrix[:3, :3].T
        if upright is None
        else np.argwhere(edge) * np.asarray(upright)
        for edge in (one, other)
    )
    there, back = KDTree(b, leafsize=32).query(a)[0], KDTree(a, leafsize=32).query(b)[0]
    return there.astype(np.float32), back.astype(np.float32)


# The surface through a cube of 2 x 2 x 2 voxels is up to four triangles. Of each the normal, as
# long as the triangle is large, in eighths and without its sign; for each of the 256 cubes four
# letters. From Nikolov et al., https://github.com/google-deepmind/surface-distance (Apache 2.0).
_NORMALS: Final = {
    ".": (0, 0, 0), "a": (0, 0, 4), "b": (0, 2, -2), "c": (0, 2, 2), "d": (0, 4, 0),
    "e": (1, -1, -1), "f": (1, -1, 1), "g": (1, 1, -1), "h": (1, 1, 1), "i": (2, -2, -2),
    "j": (2, -2, 0), "k": (2, -2, 2), "l": (2, 0, -2), "m": (2, 0, 2), "n": (2, 2, -2),
    "o": (2, 2, 0), "p": (2, 2, 2), "q": (3, -3, -3), "r": (3, -3, 3), "s": (3, 3, -3),
    "t": (3, 3, 3), "u": (4, 0, 0),
}  # fmt: skip
_ELEMENTS: Final = (
    "....h...g...oo..f...mm..fg..uph.e...he..ll..ung.jj..ukf.uie.uu..e...cc..ge..dph.fe..aph."
    "gfe.hpphee..cce.lle.htblejj.tbhjuhphuhp.f...hf..bb..dgn.ff..fmm.bbf.scgmef..hfe.ang.nngg"
    "fjj.ukffbqeoung.jj..die.dfk.dd..jjf.tlhjhdphdph.ejj.dnggrofldng.jjjjoog.hoo.oo..g...hg.."
    "gg..goo.bb..akf.bbg.rcfoge..hge.gll.unggdkf.kkffmqbeukf.ll..aie.gll.mqoeang.aa..hhpahpa."
    "lle.akffllllfmm.msjgakf.hmm.mm..gf..hgf.gbb.dgngbbf.akffbbbbcce.efg.efghangghfe.dkffhge."
    "cch.he..uie.ieiercfldie.sjcgeia.hcc.cc..uphhfgh.mmh.hf..ooh.hg..hh..h...h...hh..hg..ooh."
    "hf..mmh.fgh.uphhcc..hcc.eia.sjcgdie.rcflieieuie.he..cch.hge.dkffhfe.anggefghefg.cce.cccc"
    "akffbbf.dgnggbb.hgf.gf..mm..hmm.akf.msjgfmm.mmmmakfflle.hpa.hhpaaa..ang.mqoegll.aie.ll.."
    "ukf.mqbekkffdkf.ungggll.hge.ge..rcfobbg.akf.bb..goo.gg..hg..g...oo..hoo.oog.oooodng.rofl"
    "dnggejj.dph.hdphtlhjjjf.dd..dfk.die.jj..ung.bqeoukfffjj.nnggang.hfe.ef..scgmbbf.fmm.ff.."
    "dgn.bb..hf..f...uhp.uhphtbhjejj.htbllle.cce.ee..hpphgfe.aph.fe..dph.ge..cc..e...uu..uie."
    "ukf.jj..ung.ll..he..e...uph.fg..mm..h...oo..h...h......."
)  # fmt: skip


def _cubes(mask: Mask) -> npt.NDArray[np.uint8]:
    """Which of the 256 cubes lies on each voxel corner inside the mask (D, H, W): (D-1, H-1, W-1).
    Its first voxel is the highest bit. Of a slice (H, W), which of 16 squares: (H-1, W-1)."""
    cubes = np.zeros([n - 1 for n in mask.shape], dtype=np.uint8)
    for offset in product((0, 1), repeat=mask.ndim):
        corner = tuple(slice(o, o + n) for o, n in zip(offset, cubes.shape, strict=True))
        cubes <<= 1
        cubes |= mask[corner]
    return cubes


def _element_areas(grid: Grid) -> npt.NDArray[np.float64]:
    """Area in mm² of the surface through each of the 256 cubes: normals are mapped by the cofactors
    of the axes. Of a slice, length in mm of the outline through each of 16 squares."""
    upright = _upright_mm(grid)
    if upright is not None and len(upright) == 2:
        h, w = upright
        d = math.hypot(h, w) / 2  # cuts off a corner
        return np.array([0, d, d, w, d, h, 2 * d, d, d, 2 * d, h, d, w, d, d, 0])
    normals = np.array([_NORMALS[letter] for letter in "".join(_ELEMENTS)], dtype=np.float32) / 8
    if upright is None:
        axes = grid.matrix[:3, :3]
        vectors = normals @ (np.linalg.det(axes) * np.linalg.inv(axes).T).T
    else:
        z, y, x = upright
        vectors = normals * np.array((y * x, z * x, z * y), dtype=np.float32)
    areas = np.linalg.norm(vectors.reshape(256, 4, 3), axis=-1).sum(axis=-1)
    return np.asarray(areas, dtype=np.float64)
