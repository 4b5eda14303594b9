"""Parts of an organ that are too small to be it are removed, where that raised Dice on validation
cases.

Source: keeping the largest component where it helps is nnU-Net's (Isensee et al. 2021, Nature
Methods 18). The second rule, of a least size, is for organs of several parts, as kidneys are.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any, Final, Literal

import numpy as np
import numpy.typing as npt

from pipeline.data.labels import LabelSpace
from pipeline.data.volume import TOUCHING

# `largest`, or ml that a part must have; the largest part stays whatever its size.
Rule = Literal["largest"] | float
ClassArray = npt.NDArray[np.integer[Any]]
BoolArray = npt.NDArray[np.bool_]

LEAST_CASES: Final = 3
LEAST_GAIN: Final = 0.001
# Of the smallest organ that a validation label shows: below it a part is no organ.
_SHARE: Final = 0.1


def kept_parts(mask: BoolArray, rule: Rule, voxel_ml: float) -> BoolArray:
    """The connected parts (26 neighbours) of an organ (D, H, W) that stay."""
    from scipy import ndimage

    parts: Any = ndimage.label(mask, structure=TOUCHING)[0]
    sizes = np.bincount(parts.ravel())
    sizes[0] = 0
    if len(sizes) < 3:
        return mask
    stays = sizes == sizes.max() if rule == "largest" else sizes * voxel_ml >= rule
    stays[sizes.argmax()] = True
    stays[0] = False
    kept: BoolArray = stays[parts]
    return kept


def postprocess(
    classes: npt.NDArray[np.uint8], space: LabelSpace, rules: Mapping[str, Rule], voxel_ml: float
) -> dict[str, float]:
    """Removes parts in place, (D, H, W): they become background.

    Returns:
        organ -> ml removed, of each organ with a rule.
    """
    from scipy import ndimage

    removed = {}
    boxes = ndimage.find_objects(classes, max_label=len(space.organs))
    for organ, rule in rules.items():
        number = space.index(organ) + 1
        box = boxes[number - 1]
        removed[organ] = 0.0
        if box is not None:
            within = classes[box]
            mask = within == number
            lost = mask & ~kept_parts(mask, rule, voxel_ml)
            within[lost] = 0
            removed[organ] = round(float(np.count_nonzero(lost)) * voxel_ml, 3)
    return removed


def candidates(volumes_ml: Sequence[float]) -> list[Rule]:
    """Rules to try, from an organ's sizes in validation labels."""
    return ["largest", round(_SHARE * min(volumes_ml), 3)]


def dice_by_rule(
    predicted: BoolArray, reference: BoolArray, rules: Sequence[Rule], voxel_ml: float
) -> list[float]:
    """Dice of one organ in one case as it is predicted, and by each rule."""
    theirs = np.count_nonzero(reference)
    found: list[float] = []
    for mask in (predicted, *(kept_parts(predicted, rule, voxel_ml) for rule in rules)):
        both = float(np.count_nonzero(mask & reference))
        found.append(2 * both / float(theirs + np.count_nonzero(mask)))
    return found


def best_rule(rules: Sequence[Rule], dice: Sequence[Sequence[float]]) -> Rule | None:
    """The rule that raises the mean most.

    Args:
        dice: of each case, as `dice_by_rule` gives it.

    Returns:
        None where none raises it by `LEAST_GAIN`, or fewer than `LEAST_CASES` show the organ.
    """
    if len(dice) < LEAST_CASES:
        return None
    before, *after = (fmean(column) for column in zip(*dice, strict=True))
    gain = max(after) - before
    return rules[int(np.argmax(after))] if gain >= LEAST_GAIN else None
