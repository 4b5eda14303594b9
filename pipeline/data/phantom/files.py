"""A phantom dataset as NIfTI files in varied orientations; safe to interrupt and to repeat."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import nibabel as nib
import numpy as np
import numpy.typing as npt

from pipeline.data.nifti import write_image
from pipeline.data.phantom.case import FORMAT_VERSION, make_case
from pipeline.data.phantom_spec import ORGANS, PhantomSpec, case_names
from pipeline.errors import RegistryError
from pipeline.folder import refuse_foreign
from pipeline.volume import Grid, Volume

_ORIENTATIONS: Final = ("LPS", "RAS", "LAS", "PIR", "RPS", "LPI", "ASL", "RAI")
_MARKER: Final = "phantom.json"


def write_dataset(
    root: Path, spec: PhantomSpec, *, on_case: Callable[[str], None] | None = None
) -> None:
    """Writes a dataset as `root/images/<case>.nii.gz` and `root/labels/<case>.nii.gz`.

    The files' orientations, spacings and obliquity vary from case to case. `root/phantom.json`
    holds the spec and the SHA-256 of each file of every finished case. A second call rewrites only
    the cases whose files are missing or changed, so a call that was killed is simply repeated.

    Args:
        root: the dataset's folder, made if need be.
        spec: what to write.
        on_case: called with the case's name after each case, written or found complete.

    Raises:
        ConfigError: `root` holds images or labels that are no phantom's.
        RegistryError: `root` holds a phantom of another spec or format version.
    """
    marker = root / _MARKER
    identity = {"format_version": FORMAT_VERSION, "spec": spec.model_dump(mode="json")}
    done = _finished(marker, identity)
    if not marker.exists():
        cases = [root / p / f"{c}.nii.gz" for c in case_names(spec) for p in ("images", "labels")]
        refuse_foreign("phantom", [(path, False) for path in cases], fix="Choose another root.")
        root.mkdir(parents=True, exist_ok=True)
        _write_json(marker, {**identity, "cases": {}})  # from here on its files are ours
    for index, case in enumerate(case_names(spec)):
        files = {part: root / part / f"{case}.nii.gz" for part in ("images", "labels")}
        if case not in done or done[case] != _digests(files):
            _write_case(files, spec, index)
            done[case] = _digests(files)
            _write_json(marker, {**identity, "cases": done})
        if on_case is not None:
            on_case(case)


def _write_case(files: dict[str, Path], spec: PhantomSpec, index: int) -> None:
    case = make_case(spec, index)
    label = case.label.array
    if len(spec.annotated) == 1:
        label = (label == ORGANS.index(spec.annotated[0]) + 1).astype(np.uint8)
    else:
        keep = [0] + [ORGANS.index(organ) + 1 for organ in spec.annotated]
        label = np.where(np.isin(label, keep), label, 0).astype(np.uint8)
    turned = (spec.seed + index) % len(_ORIENTATIONS)
    affine = _file_affine(case.image.grid, _ORIENTATIONS[turned])
    write_image(files["images"], case.image, affine_xyz=affine)
    write_image(files["labels"], Volume(label, case.label.grid), affine_xyz=affine)


def _file_affine(grid: Grid, codes: str) -> npt.NDArray[np.float64]:
    """The affine (x, y, z order, RAS+ world) of the same voxels stored along `codes`."""
    order = [2, 1, 0, 3]
    matrix = grid.matrix[np.ix_(order, order)]
    turn = nib.orientations.axcodes2ornt(codes)
    return np.asarray(matrix @ nib.orientations.inv_ornt_aff(turn, grid.shape[::-1]))


def _digests(files: dict[str, Path]) -> dict[str, str]:
    return {
        part: hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else ""
        for part, path in files.items()
    }


def _finished(marker: Path, identity: dict[str, Any]) -> dict[str, dict[str, str]]:
    """The digests of the cases that an earlier call finished."""
    if not marker.is_file():
        return {}
    try:
        found = json.loads(marker.read_text())
        done: dict[str, dict[str, str]] = found.pop("cases")
    except (ValueError, KeyError, AttributeError):
        found, done = None, {}
    if found != identity:
        raise RegistryError(
            "the folder holds a phantom dataset of another spec or format version.",
            where=marker,
            fix="Remove the folder, or choose another root.",
        )
    return done


def _write_json(path: Path, content: dict[str, Any]) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(json.dumps(content, indent=1) + "\n")
    temporary.replace(path)
