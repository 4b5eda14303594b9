"""Teachers that never err: what a student would learn of teachers that know all its organs.

The same student, patches, terms and cache; but the log-odds of a patch are those of the labels of
all organs. What is lost then against `full` is lost by the loss, not by the teachers.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from unittest.mock import patch

import numpy as np
from dask.delayed import Delayed, delayed

from pipeline.cache.reader import CachedCase
from pipeline.consensus.cohort import RegionRules, open_cohort
from pipeline.consensus.regions import FloatArray
from pipeline.data.labels import IGNORE, LabelSpace
from pipeline.data.patches import Patch
from pipeline.data.registry import Registry
from pipeline.folder import Folder
from pipeline.student import dataset

SURE = 6.0  # as labels that win


@contextmanager
def perfect_teachers(full: Registry, work: Folder) -> Iterator[None]:
    """While it is open, patches of this process read the labels of all organs for log-odds.

    Where patches are centred is still what the real teachers say.

    Args:
        full: the registry in which the training cases annotate every organ.
        work: the work folder.
    """
    truth = {case.name: case for case in open_cohort(work, full, splits=("train",)).cases}

    def said(
        case: CachedCase, space: LabelSpace, rules: RegionRules, box: Patch, *_: object
    ) -> Delayed:
        return delayed(odds_of)(case, space, box, pure=False)

    def odds_of(case: CachedCase, space: LabelSpace, box: Patch) -> FloatArray:
        classes = space.to_classes(truth[case.name].label(box, fill=IGNORE))
        numbers = np.arange(1, len(space.organs) + 1)[:, None, None, None]
        odds = np.where(classes == numbers, SURE, -SURE).astype(np.float32)
        odds[:, classes == IGNORE] = np.nan
        return odds

    with patch.object(dataset, "lazy_patch", said):
        yield
