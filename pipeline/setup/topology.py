"""Grid, patch and stages of a network that fit a cohort: nnU-Net's rules, as pure functions.

Sources: Isensee et al. 2021; nnU-Net 2.8, `ExperimentPlanner` and `get_pool_and_conv_props`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from pipeline.data.volume import Grid, Index3, Spacing
from pipeline.errors import ConfigError

# Spacing of the coarsest axis over that of the next from which on a cohort counts as anisotropic,
# and size of the smallest axis over that of the next: nnU-Net's ANISO_THRESHOLD.
ANISOTROPIC = 3.0
_FINE_PERCENTILE = 10
_FAR = 2.0  # a case that is resampled by more along an axis is told


@dataclass(frozen=True)
class StudentGrid:
    """A proposed grid.

    Attributes:
        axes: that have more than one voxel: all three, or the two of slices.
        median_shape: of the cases on that grid.
        far: share of the cases that are resampled by more than 2 along one of the axes.
    """

    spacing_mm: Spacing
    why: str
    axes: tuple[int, ...]
    median_shape: Index3
    far: float


def propose_grid(grids: Sequence[Grid], spacing_mm: Spacing | None = None) -> StudentGrid:
    """The median spacing of each axis; of a coarse axis with few voxels the 10th percentile, but
    not finer than the other axes (nnU-Net 2.8, `determine_fullres_target_spacing`).

    Args:
        grids: of the cases as stored; at least one.
        spacing_mm: a grid that is chosen already: only what it means is looked at.

    Raises:
        ConfigError: slices and volumes in one cohort, slices along several axes, or no spacing.
    """
    if spacing_mm is not None and min(spacing_mm) <= 0:
        raise ConfigError(
            f"{spacing_mm} mm must be positive.", where="--spacing-mm", fix="Give z y x, 3 1.5 1.5."
        )
    axes = _axes(grids)
    spacings = np.array([grid.spacing_mm for grid in grids])
    shapes = np.array([grid.shape for grid in grids])
    if spacing_mm is None:
        chosen, why = _target(spacings, shapes, axes)
    else:
        chosen, why = np.array(spacing_mm), "as you said"
    z, y, x = (float(f"{mm:.6g}") for mm in chosen)
    on_grid = np.median([grid.with_spacing((z, y, x)).shape for grid in grids], axis=0)
    factors = np.maximum(spacings / chosen, chosen / spacings)[:, axes].max(axis=1)
    d, h, w = (int(n) for n in np.rint(on_grid))
    return StudentGrid((z, y, x), why, axes, (d, h, w), float((factors > _FAR).mean()))


def _axes(grids: Sequence[Grid]) -> tuple[int, ...]:
    flat = [grid.slice_axis for grid in grids]
    kinds = set(flat)
    if len(kinds) > 1:
        slices = sum(axis is not None for axis in flat)
        raise ConfigError(
            f"{slices} of {len(flat)} cases are one slice, and not all along one axis: no patch "
            "and no network fits them all.",
            where="student grid",
            fix="Give them registries of their own, or leave one kind out by lists in `split`.",
        )
    return tuple(axis for axis in range(3) if axis not in kinds)


def _target(
    spacings: npt.NDArray[np.float64], shapes: npt.NDArray[np.int64], axes: tuple[int, ...]
) -> tuple[npt.NDArray[np.float64], str]:
    target, sizes = np.median(spacings, axis=0), np.median(shapes, axis=0)
    why = f"median spacing of {len(spacings)} cases"
    if len(axes) < 3:
        return target, f"{why}; one slice stays one, as thick as it is"
    coarse = int(np.argmax(target))
    others = [axis for axis in axes if axis != coarse]
    next_mm = float(target[others].max())
    if target[coarse] > ANISOTROPIC * next_mm:
        name = "zyx"[coarse]
        if sizes[coarse] * ANISOTROPIC < sizes[others].min():
            fine = float(np.percentile(spacings[:, coarse], _FINE_PERCENTILE))
            # 1e-5 as nnU-Net has it: this axis stays the coarsest.
            target[coarse] = fine if fine >= next_mm else next_mm + 1e-5
            why += f"; {name} is coarse and has few voxels: its 10th percentile"
            why += "" if fine >= next_mm else ", but not finer than the others"
        else:
            why += f"; {name} is coarse and stays so"
    return target, why


# Patch and network: nnU-Net's topology.

_SMALLEST_MAP = 4  # cells along an axis, of the deepest stage
MIN_STAGES = 3  # of DynUNet


@dataclass(frozen=True)
class Topology:
    """A U-Net's stages, the finest first.

    Attributes:
        patch: voxels z, y, x.
        strides: of each stage against the one before; that of the first is 1, 1, 1.
        kernels: of each stage's convolutions.
    """

    patch: Index3
    strides: tuple[Index3, ...]
    kernels: tuple[Index3, ...]

    @property
    def cells(self) -> Index3:
        """Voxels per cell of the deepest stage: the patch is a multiple of them."""
        z, y, x = (math.prod(axis) for axis in zip(*self.strides, strict=True))
        return z, y, x


def topology(spacing_mm: Spacing, patch: Sequence[int], axes: Sequence[int]) -> Topology:
    """Halves each axis while its spacing is within a factor of 2 of the finest and its map has 8
    cells; kernels reach along an axis from where its spacing is within that factor (nnU-Net 2.8,
    `get_pool_and_conv_props`). The patch is padded to whole cells.

    Args:
        axes: that there is something along; the others keep 1 voxel, kernels and strides of 1.
    """
    spacing, cells = list(spacing_mm), [float(n) for n in patch]
    kernel, pooled = [1, 1, 1], [0, 0, 0]
    strides, kernels = [(1, 1, 1)], []
    while True:
        large = [a for a in axes if cells[a] >= 2 * _SMALLEST_MAP]
        halved = [a for a in large if spacing[a] / min(spacing[b] for b in large) < 2]
        if not halved or (len(halved) == 1 and cells[halved[0]] < 3 * _SMALLEST_MAP):
            break
        finest = min(spacing[a] for a in axes)
        for a in axes:
            if spacing[a] / finest < 2:
                kernel[a] = 3
        kernels.append((kernel[0], kernel[1], kernel[2]))
        for a in halved:
            pooled[a] += 1
            spacing[a] *= 2
            cells[a] = math.ceil(cells[a] / 2)
        z, y, x = (2 if a in halved else 1 for a in range(3))
        strides.append((z, y, x))
    z, y, x = (3 if a in axes else 1 for a in range(3))
    kernels.append((z, y, x))
    d, h, w = (
        math.ceil(n / 2**p) * 2**p if a in axes else 1
        for a, (n, p) in enumerate(zip(patch, pooled, strict=True))
    )
    return Topology((d, h, w), tuple(strides), tuple(kernels))


def largest_patch(grid: StudentGrid, fits: Callable[[Topology], bool]) -> tuple[Topology, bool]:
    """The patch that is about a cube in mm, no larger than the median case, and fits; with its
    network. It begins at the size of 256^3 (slices: 2048^2) and the axis that covers most of the
    median case gives way, as in nnU-Net 2.8's `get_plans_for_configuration`.

    Returns:
        The patch and whether it fits. One that does not is the smallest with three stages.
    """
    axes, shape = grid.axes, grid.median_shape
    per_mm = {a: 1 / grid.spacing_mm[a] for a in axes}
    cells = 256**3 if len(axes) == 3 else 2048**2
    scale = (cells / math.prod(per_mm.values())) ** (1 / len(axes))
    d, h, w = (min(round(per_mm[a] * scale), shape[a]) if a in axes else 1 for a in range(3))
    found = topology(grid.spacing_mm, (d, h, w), axes)
    while not fits(found):
        smaller = _smaller(grid, found)
        if len(smaller.strides) < MIN_STAGES:
            return found, False
        found = smaller
    return found, True


def _smaller(grid: StudentGrid, top: Topology) -> Topology:
    """One step down along the axis that covers most of the median case. The step is that of the
    smaller patch: with fewer stages there are finer ones."""
    axis = max(grid.axes, key=lambda a: (top.patch[a] / grid.median_shape[a], a))
    patch = list(top.patch)
    patch[axis] -= top.cells[axis]
    step = topology(grid.spacing_mm, patch, grid.axes).cells[axis]
    patch[axis] = top.patch[axis] - step
    return topology(grid.spacing_mm, patch, grid.axes)


def dynunet(top: Topology, num_heads: int) -> dict[str, Any]:
    """Arguments of MONAI's DynUNet of that topology; features as nnU-Net has them.

    Args:
        num_heads: outputs under deep supervision beside the full-size one; 0: none.
    """
    most = 512 if 1 in top.patch else 320
    heads = {"deep_supervision": True, "deep_supr_num": num_heads} if num_heads else {}
    return {
        "kernel_size": [list(kernel) for kernel in top.kernels],
        "strides": [list(stride) for stride in top.strides],
        "upsample_kernel_size": [list(stride) for stride in top.strides[1:]],
        "filters": [min(most, 32 * 2**stage) for stage in range(len(top.strides))],
        **heads,
    }


def plain_conv_unet(of_dynunet: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of nnU-Net's own PlainConvUNet of the same stages, as its planner writes them."""
    stages = len(of_dynunet["filters"])
    return {
        "n_stages": stages,
        "features_per_stage": of_dynunet["filters"],
        "kernel_sizes": of_dynunet["kernel_size"],
        "strides": of_dynunet["strides"],
        "n_conv_per_stage": [2] * stages,
        "n_conv_per_stage_decoder": [2] * (stages - 1),
        "conv_bias": True,
        "deep_supervision": "deep_supr_num" in of_dynunet,
    }
