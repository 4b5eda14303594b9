"""`cache export`: what is cached of a case, as NIfTI files that any viewer lays over the CT."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from pipeline.cache.reader import CachedCase
from pipeline.consensus.cohort import compute, lazy_consensus, open_case
from pipeline.data.labels import IGNORE, LabelSpace
from pipeline.data.nifti import read_header, write_image
from pipeline.data.registry import Registry
from pipeline.data.volume import Volume
from pipeline.errors import GeometryError, RegistryError
from pipeline.folder import Folder, refuse_foreign, writing

_SUFFIX = ".nii.gz"
_REGIONS = ("regions", "agreed_background", "conflict")
_MARK = "organ-distill, cache export"  # in the NIfTI header: what has it may be replaced


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
    teacher did not see; an organ is where they are above 0. `<teacher>=<organ>.nii.gz` where the
    registry has two pairs that would share a name, `k` with `left_x` and `k_left` with `x`.

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
        ConfigError: files are there that `cache export` did not write.
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
    names = _names(registry)
    odds = {
        folder / f"{names[teacher, organ]}{_SUFFIX}": (teacher, organ)
        for teacher in teachers
        for organ in registry.teachers[teacher].organs
    }
    others = [folder / f"{name}{_SUFFIX}" for name in (_REGIONS if regions else ())]
    refuse_foreign("cache export", [(path, _is_ours(path)) for path in (*odds, *others)])
    with writing(folder):
        for path, (teacher, organ) in odds.items():
            _write(path, found.log_odds(teacher, organ).astype(np.float32), found)
        if regions:
            arrays = _regions(found, registry.label_space)
            for path, array in zip(others, arrays, strict=True):
                _write(path, array, found)
    return [*odds, *others]


def _names(registry: Registry) -> dict[tuple[str, str], str]:
    """Of each teacher and organ; names hold no `=`. Whatever teachers are exported: a file of one
    call is not replaced by another array in the next."""
    pairs = [(t, organ) for t, entry in registry.teachers.items() for organ in entry.organs]
    taken = Counter([*map("_".join, pairs), *_REGIONS])
    return {pair: ("_" if taken["_".join(pair)] == 1 else "=").join(pair) for pair in pairs}


def _regions(case: CachedCase, space: LabelSpace) -> list[npt.NDArray[np.uint8]]:
    """In the order of `_REGIONS`."""
    lazy, known = lazy_consensus(case, space)
    organ, background, conflict = compute(lazy.organ, lazy.background, lazy.conflict)
    regions = np.full(background.shape, IGNORE, dtype=np.uint8)
    regions[background] = 0
    for number, k in enumerate(known):
        regions[organ[number] & ~conflict] = space.ids[space.organs[k]]
    return [regions, background.astype(np.uint8), conflict.astype(np.uint8)]


def _write(path: Path, array: npt.NDArray[Any], case: CachedCase) -> None:
    write_image(path, Volume(array, case.grid), description=_MARK)


def _is_ours(path: Path) -> bool:
    try:
        return bool(read_header(path)[1]["descrip"].item().decode() == _MARK)
    except (GeometryError, UnicodeDecodeError):
        return False
