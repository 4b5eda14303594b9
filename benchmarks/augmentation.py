"""What augmentation costs per sample: CPU time of one core, medians, in one process.

    OMP_NUM_THREADS=1 python -m benchmarks.augmentation [EDGE]

EDGE: voxels of a cubic patch, 96 by default. No data are needed.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from functools import partial

import numpy as np
import torch

from pipeline.data.patches import Patch
from pipeline.data.volume import Grid
from pipeline.student.augment import (
    Affine,
    AppearanceConfig,
    AugmentConfig,
    Movement,
    Warp,
    change_intensity,
    draw_movement,
)

CHANGES = ("noise", "blur", "brightness", "contrast", "low_resolution", "gamma")
NUM_ORGANS = 4
SPACING_MM = (1.0, 1.0, 1.0)


def measure(what: str, step: Callable[[], object], *, mean_of: int = 0) -> None:
    """Prints the median of 15 calls, or the mean of more where calls differ by chance."""
    step()
    seconds = []
    for _ in range(mean_of or 15):
        began = time.process_time()
        step()
        seconds.append(time.process_time() - began)
    found = np.mean(seconds) if mean_of else np.median(seconds)
    print(f"{what:48s}{1e3 * found:8.1f} ms")


def box_volumes(degrees: float, scale: tuple[float, float], patch: Patch) -> None:
    """Prints how much more an affine reads."""
    affine = {"probability": 1.0, "degrees": [degrees] * 3, "scale": list(scale)}
    config = AugmentConfig.model_validate({"affine": affine})
    rng = np.random.default_rng(0)
    boxes = []
    grid = Grid.axis_aligned(patch.shape, SPACING_MM)
    for _ in range(60):
        warp = draw_movement(config, patch.shape, rng).warp(patch, grid)
        assert warp is not None
        boxes.append(np.prod(warp.box.shape) / np.prod(patch.shape))
    print(
        f"affine of up to {degrees:g} degrees, scale {scale}: reads {np.mean(boxes):.1f} times "
        f"the patch's volume, at most {np.max(boxes):.1f} in 60 draws"
    )


def main() -> None:
    """All steps, one after the other."""
    torch.set_num_threads(1)
    edge = int(sys.argv[1]) if len(sys.argv) > 1 else 96
    rng = np.random.default_rng(0)
    image = rng.uniform(-1, 1, (1, edge, edge, edge)).astype(np.float32)
    off = {name: {"probability": 0.0} for name in CHANGES}
    for name in CHANGES:
        alone = AppearanceConfig.model_validate(off | {name: {"probability": 1.0}})
        measure(name, partial(change_intensity, image, alone, rng))
    measure(
        "all of them, as drawn by default (mean of 150)",
        lambda: change_intensity(image, AppearanceConfig(), rng),
        mean_of=150,
    )
    odds = np.repeat(image, NUM_ORGANS, axis=0)
    movement = Movement((0, 2), (1, 1, 1))
    arrays = (image, odds, image[0].astype(np.uint8), odds > 0, image[0] > 0)
    measure(
        f"two flips, three turns: all arrays of {NUM_ORGANS} organs",
        lambda: [movement.apply(array) for array in arrays],
    )
    patch = Patch((50, 50, 50), (edge, edge, edge))
    affine = Affine((8.0, 8.0, 8.0), 1.0)
    warp = Warp(affine, patch, SPACING_MM)
    box = rng.uniform(-1, 1, (NUM_ORGANS, *warp.box.shape)).astype(np.float32)
    label = box[0].astype(np.uint8)
    measure("affine: its grid", lambda: Warp(affine, patch, SPACING_MM))
    measure("affine: image", lambda: warp.linear(box[:1]))
    measure("affine: label", lambda: warp.nearest(label))
    measure(f"affine: log-odds of {NUM_ORGANS} organs", lambda: warp.linear(box))
    box_volumes(15.0, (0.8, 1.25), patch)
    box_volumes(30.0, (0.7, 1.4), patch)


if __name__ == "__main__":
    main()
