"""`cache export`: what is cached of a case, as NIfTI files that any viewer lays over the CT."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from pipeline.cache.reader import CachedCase
from pipeline.cohort import compute, lazy_consensus, open_case
from pipeline.data.nifti import write_image
from pipeline.data.registry import Registry
from pipeline.errors import RegistryError
from pipeline.folder import Folder
from pipeline.labels import IGNORE, LabelSpace
from pipeline.volume import Volume

_SUFFIX = ".nii.gz"


def export_nifti(
    work: Folder,
    registry: Registry,
    case: str,
    teachers: Sequence[str],
    output: Path,
    *,
    regions: bool = False,
) -> list[Path]:
    """Writes `<case>/<teacher>_<organ>.nii.gz`: float32 log-odds on the student grid, NaN where the
    teacher did not see; an organ is where they are above 0.

    Args:
        work: the work folder.
        registry: read without its files.
        case: `dataset/case`.
        teachers: those whose log-odds are written.
        output: the folder.
        regions: also write `regions` (uint8: organ ids, 0 agreed background, 255 where teachers
            disagree or abstain), `agreed_background` and `conflict` (0 or 1), from all teachers of
            the registry and the case's label.

    Returns:
        The files.

    Raises:
        RegistryError: no such dataset or teacher.
        CacheStale, CacheMissing: the registry, the case or a unit is not in the cache.
    """
    for teacher in teachers:
        if teacher not in registry.teachers:
            known = ", ".join(registry.teachers)
            raise RegistryError(
                f"there is no teacher {teacher!r}.", where=registry.path, fix=f"Known: {known}."
            )
    found = open_case(work, registry, case, list(registry.teachers) if regions else teachers)
    folder = output / case
    written = []
    for teacher in teachers:
        for organ in registry.teachers[teacher].organs:
            odds = found.log_odds(teacher, organ).astype(np.float32)
            written.append(_write(folder / f"{teacher}_{organ}{_SUFFIX}", odds, found))
    if regions:
        for name, array in _regions(found, registry.label_space).items():
            written.append(_write(folder / f"{name}{_SUFFIX}", array, found))
    return written


def _regions(case: CachedCase, space: LabelSpace) -> dict[str, npt.NDArray[np.uint8]]:
    lazy, known = lazy_consensus(case, space)
    organ, background, conflict = compute(lazy.organ, lazy.background, lazy.conflict)
    regions = np.full(background.shape, IGNORE, dtype=np.uint8)
    regions[background] = 0
    for number, k in enumerate(known):
        regions[organ[number] & ~conflict] = space.ids[space.organs[k]]
    return {
        "regions": regions,
        "agreed_background": background.astype(np.uint8),
        "conflict": conflict.astype(np.uint8),
    }


def _write(path: Path, array: npt.NDArray[Any], case: CachedCase) -> Path:
    write_image(path, Volume(array, case.grid))
    return path
