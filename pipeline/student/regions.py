"""Log-odds, organ regions and agreed background of one training patch, over all organs."""

from __future__ import annotations

from typing import Any

import dask.array as da
import numpy as np
import numpy.typing as npt

from pipeline.cache.reader import CachedCase
from pipeline.cohort import Temperatures, compute, known_organs, lazy_consensus
from pipeline.consensus import Consensus, consensus
from pipeline.labels import LabelSpace
from pipeline.patches import Patch
from pipeline.student.movement import Warp
from pipeline.student.supervision import SupervisionConfig

Arrays = dict[str, npt.NDArray[Any]]


def read_regions(
    case: CachedCase,
    space: LabelSpace,
    supervision: SupervisionConfig,
    temperatures: Temperatures,
    patch: Patch,
) -> Arrays:
    """What teachers and labels say on a patch, read and combined in one go.

    Returns:
        log_odds: float32 (K, D, H, W), NaN where nobody knows; organ: bool (K, D, H, W), the organ
        regions; background: bool (D, H, W), background as far as anybody speaks.
    """
    if not known_organs(case, space, use_labels=supervision.labels_win):
        return _nobody_knows(space, patch.shape)
    regions, known = lazy_consensus(
        case,
        space,
        patch=patch,
        margin=supervision.margin,
        use_labels=supervision.labels_win,
        confidence=supervision.confidence,
        temperatures=temperatures,
    )
    return _over_all_organs(regions, known, space)


def resampled_regions(
    case: CachedCase,
    space: LabelSpace,
    supervision: SupervisionConfig,
    temperatures: Temperatures,
    warp: Warp,
    classes: npt.NDArray[np.uint8],
) -> Arrays:
    """The same on a patch that an affine moved.

    The teachers' log-odds are resampled first, next to NaN to NaN. Then the label, resampled
    likewise, wins, and the regions are formed. So they are the regions of the log-odds that stand
    beside them, and no label is contradicted.

    Args:
        case: open for reading.
        space: the student's organs.
        supervision: margin, and how labels win.
        temperatures: as in `lazy_consensus`.
        warp: of the patch.
        classes: (D, H, W), the label of the moved patch.
    """
    known = known_organs(case, space, use_labels=supervision.labels_win)
    if not known:
        return _nobody_knows(space, classes.shape)
    odds = np.full((len(known), *classes.shape), np.nan, dtype=np.float32)
    taught = known_organs(case, space, use_labels=False)
    if taught:
        said, _ = lazy_consensus(
            case, space, patch=warp.box, use_labels=False, temperatures=temperatures
        )
        odds[[known.index(k) for k in taught]] = warp.linear(*compute(said.log_odds))
    annotated = [n for n, k in enumerate(known) if space.organs[k] in case.annotated]
    label = None
    if supervision.labels_win and annotated:
        # Classes of all organs -> 1 + position among the known ones.
        among_known = LabelSpace({space.organs[k]: k + 1 for k in known}).to_classes(classes)
        label = da.from_array(among_known, chunks=-1, name=False)
    regions = consensus(
        da.from_array(odds, chunks=-1, name=False),
        label,
        annotated,
        margin=supervision.margin,
        confidence=supervision.confidence,
    )
    return _over_all_organs(regions, known, space)


def _over_all_organs(regions: Consensus, known: list[int], space: LabelSpace) -> Arrays:
    log_odds, organ, background = compute(regions.log_odds, regions.organ, regions.unclaimed)
    found = _nobody_knows(space, background.shape)
    found["log_odds"][known], found["organ"][known] = log_odds, organ
    return {**found, "background": background}


def _nobody_knows(space: LabelSpace, shape: tuple[int, ...]) -> Arrays:
    all_organs = (len(space.organs), *shape)
    return {
        "log_odds": np.full(all_organs, np.nan, dtype=np.float32),
        "organ": np.zeros(all_organs, dtype=np.bool_),
        "background": np.zeros(shape, dtype=np.bool_),
    }
