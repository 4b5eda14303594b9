"""Procedural abdominal CT: synthetic cases, and datasets of NIfTI files, on which every stage can
run without real data.

A dataset is a pure function of its `PhantomSpec`, a case of the spec and the case's index. The
anatomy is drawn in millimetres (`body`); here it is bent and scanned.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import nibabel as nib
import numpy as np
import numpy.typing as npt
from scipy import ndimage

from pipeline.config import file_sha256
from pipeline.data.entries import ORGANS, PhantomSpec, case_names
from pipeline.data.nifti import file_affine, write_image
from pipeline.data.phantom.body import PHASES, TISSUE_HU, Canvas, Patient, draw
from pipeline.data.volume import Grid, Volume
from pipeline.errors import RegistryError
from pipeline.folder import refuse_foreign, replace_file

FORMAT_VERSION: Final = 2  # raise it whenever the numbers of a case change
_FIELD_OF_VIEW_MM: Final = (288.0, 336.0, 384.0)

Rng = np.random.Generator
FloatField = npt.NDArray[np.float32]


@dataclass(frozen=True)
class PhantomCase:
    """One synthetic case.

    Attributes:
        image: int16 Hounsfield units, (D, H, W).
        label: uint8 on the same grid, 0 or the position of an organ in `ORGANS` plus 1.
    """

    image: Volume
    label: Volume


@dataclass(frozen=True)
class _Scanner:
    """What the cases of one dataset have in common; the middle values when `shift` is 0."""

    noise_hu: float
    grain_mm: float
    sharpness: float
    blur_mm: float
    offset_hu: float
    gain: float
    phases: tuple[float, ...]
    contents: tuple[float, ...]
    lesions: float
    fatty_livers: float
    fat_mm: float
    body_scale: float
    field_of_view: float
    centre_z_mm: float
    slices: float


def _scanner(spec: PhantomSpec) -> _Scanner:
    """The dataset's domain, a function of (seed, shift): values move in proportion to shift.

    The phase that a shifted dataset prefers is `seed` modulo their number, so that datasets with
    neighbouring seeds differ.
    """
    rng = _rng(spec.seed, 0)
    move = spec.shift * rng.uniform(0.5, 1, 13) * rng.choice([-1, 1], 13)
    mixed = (1 - spec.shift) ** 3
    phases = np.full(len(PHASES), mixed / len(PHASES))
    phases[spec.seed % len(PHASES)] += 1 - mixed
    contents = np.array([0.28, 0.27, 0.2, 0.15, 0.1])
    contents += spec.shift * (rng.dirichlet(np.full(len(contents), 0.5)) - contents)
    return _Scanner(
        noise_hu=float(14 * 5.0 ** move[0]),
        grain_mm=float(3.5 * 2.0 ** move[1]),
        sharpness=float(max(1.8 * move[12], -0.6)),
        blur_mm=float(2.4 * 2.5 ** move[2]),
        offset_hu=float(35 * move[3]),
        gain=float(1 + 0.3 * move[4]),
        phases=tuple(float(p) for p in phases / phases.sum()),
        contents=tuple(float(p) for p in contents / contents.sum()),
        lesions=float(0.9 * 3.0 ** move[10]),
        fatty_livers=float(0.2 * 5.0 ** move[11]),
        fat_mm=float(19 + 14 * move[5]),
        body_scale=float(1 + 0.15 * move[6]),
        field_of_view=float(1 + 0.05 * move[7]),
        centre_z_mm=float(30 * move[8]),
        slices=float(0.9 * 1.35 ** move[9]),
    )


def make_case(spec: PhantomSpec, index: int) -> PhantomCase:
    """Makes one case, by its index from 0; a pure function of its arguments, the same in every
    process. Neither `num_cases` nor `annotated` of the spec changes a case.

    Returns:
        Image (int16, HU) and label (uint8, all of `ORGANS`) of one shape (D, H, W) around
        `spec.shape`, on a grid in mm whose axes point superior, anterior and right.

    Raises:
        IndexError: `index` is not one of the dataset's cases.
    """
    if not 0 <= index < spec.num_cases:
        raise IndexError(f"case {index} of a phantom dataset of {spec.num_cases} cases")
    scanner = _scanner(spec)
    body, anatomy, noise = (_rng(spec.seed, 1, index, part) for part in range(3))
    grid = _draw_grid(spec, scanner, index, body)
    patient = _draw_patient(scanner, body)
    spacing = np.asarray(grid.spacing_mm)
    at = _positions(grid, scanner, body)
    texture = _smooth_noise(grid, body, 12.0)
    canvas = Canvas(at, texture, edge_mm=float(spacing.mean()))
    draw(canvas, patient, anatomy)
    image = _scan(canvas.hu, spacing, scanner, noise)
    return PhantomCase(Volume(image, grid), Volume(canvas.label, grid))


def _rng(*key: int) -> Rng:
    return np.random.Generator(np.random.Philox(np.random.SeedSequence(key)))


def _draw_grid(spec: PhantomSpec, scanner: _Scanner, index: int, rng: Rng) -> Grid:
    """Anisotropic, somewhere in the scanner's room, every third case turned (oblique)."""
    size = np.asarray(_FIELD_OF_VIEW_MM) * scanner.field_of_view * rng.uniform(0.96, 1.04, 3)
    plane = rng.uniform(1.02, 1.25)
    slices = min(scanner.slices * rng.uniform(0.85, 1.1), 0.9 * plane)
    factor = np.array([slices, plane, plane])
    centre = np.array([scanner.centre_z_mm + rng.uniform(-14, 14), *rng.uniform(-6, 6, 2)])
    cut = rng.random()
    if cut < 0.3:  # the scan ends within the liver, or within the kidneys
        lost = rng.uniform(40, 85)
        size[0] -= lost
        centre[0] += lost / 2 * (1 if cut < 0.15 else -1)
    shape = np.maximum(np.rint(np.asarray(spec.shape) * factor * size / _FIELD_OF_VIEW_MM), 12)
    angles = np.radians(rng.uniform(5, 11, 3) * rng.choice([-1, 1], 3) * (1, 0.3, 0.6))
    turn = _rotation(angles) if index % 3 == 1 else np.eye(3)
    matrix = np.eye(4)
    matrix[:3, :3] = turn * (size / shape)
    matrix[:3, 3] = centre - matrix[:3, :3] @ ((shape - 1) / 2)
    return Grid.from_matrix([int(n) for n in shape], matrix)


def _rotation(angles: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """A rotation of (z, y, x): about x, then y, then z, by radians."""
    turn = np.eye(3)
    for angle, (i, j) in zip(angles, ((0, 1), (0, 2), (1, 2)), strict=True):
        step = np.eye(3)
        step[[i, j], [i, j]] = np.cos(angle)
        step[i, j], step[j, i] = -np.sin(angle), np.sin(angle)
        turn = step @ turn
    return turn


def _draw_patient(scanner: _Scanner, rng: Rng) -> Patient:
    phase = rng.choice(len(PHASES), p=scanner.phases)
    strength = rng.uniform(0.7, 1.15)
    hu = {}
    for tissue, row in TISSUE_HU.items():
        hu[tissue] = row[0] + strength * (row[phase] - row[0]) + float(rng.normal(0, 5))
    if rng.random() < scanner.fatty_livers:
        hu["liver"] -= rng.uniform(25, 60)
    fat = float(np.clip(scanner.fat_mm + rng.normal(0, 6), 5, 38))
    return Patient(
        hu=hu,
        fat_mm=fat,
        gap_mm=max(0.0, 0.16 * fat - 0.8),
        wall_mm=rng.uniform(10, 15),
        mean_lesions=scanner.lesions,
        contents=scanner.contents,
    )


def _positions(grid: Grid, scanner: _Scanner, rng: Rng) -> FloatField:
    """(3, D, H, W) position of each voxel in the reference body, mm: scaled, moved and bent."""
    scale = scanner.body_scale * (1 + np.clip(rng.normal(0, (0.05, 0.06, 0.05)), -0.1, 0.1))
    axes = [np.arange(n, dtype=np.float32) for n in grid.shape]
    index = np.meshgrid(*axes, indexing="ij", sparse=True)
    at = np.empty((3, *grid.shape), dtype=np.float32)
    for a in range(3):
        row = (grid.matrix[a] / scale[a]).astype(np.float32)
        at[a] = row[0] * index[0] + row[1] * index[1] + row[2] * index[2] + row[3]
        at[a] += np.float32(11.0) * _smooth_noise(grid, rng, 75.0)
    return at


def _smooth_noise(grid: Grid, rng: Rng, cell_mm: float) -> FloatField:
    """(D, H, W) noise smooth over `cell_mm`, standard deviation a half, fixed in the world."""
    nodes = int(np.ceil(560 / cell_mm)) + 4
    lattice = rng.standard_normal((nodes,) * 3, dtype=np.float32) * np.float32(1.5)
    matrix = grid.matrix
    matrix[:3] /= cell_mm
    out = ndimage.affine_transform(
        lattice, matrix[:3, :3], matrix[:3, 3] + (nodes - 1) / 2, output_shape=grid.shape,
        order=3, mode="mirror", prefilter=False,
    )  # fmt: skip
    return np.asarray(out, dtype=np.float32)


def _scan(
    hu: FloatField, spacing_mm: npt.NDArray[np.float64], scanner: _Scanner, rng: Rng
) -> npt.NDArray[np.int16]:
    """Point spread, noise (more in the middle of the body), kernel, offset, quantisation."""
    blur = scanner.blur_mm * rng.uniform(0.85, 1.15)
    image = ndimage.gaussian_filter(hu, blur / spacing_mm * (1.2, 1, 1))
    white = rng.standard_normal(hu.shape, dtype=np.float32)
    grain = ndimage.gaussian_filter(white, scanner.grain_mm / spacing_mm * (0.5, 1, 1))
    grain /= grain.std()
    depth = ndimage.gaussian_filter((image > -500).astype(np.float32), 30 / spacing_mm)
    level = scanner.noise_hu * rng.uniform(0.75, 1.3)
    image += level * (0.35 + 0.75 * depth) * grain
    image += np.float32(scanner.sharpness) * (
        image - ndimage.gaussian_filter(image, 7.0 / spacing_mm)
    )
    offset = np.float32(scanner.offset_hu + rng.normal(0, 4))
    image = np.where(image > -300, image * np.float32(scanner.gain) + offset, image)
    return np.asarray(np.clip(np.rint(image), -1024, 3071), dtype=np.int16)


# A phantom dataset as NIfTI files in varied orientations; safe to interrupt and to repeat.

_ORIENTATIONS: Final = ("LPS", "RAS", "LAS", "PIR", "RPS", "LPI", "ASL", "RAI")
_MARKER: Final = "phantom.json"


def write_dataset(
    root: Path, spec: PhantomSpec, *, on_case: Callable[[str], None] | None = None
) -> None:
    """Writes a dataset as `root/images/<case>.nii.gz` and `root/labels/<case>.nii.gz`.

    The files' orientations, spacings and obliquity vary from case to case. `root/phantom.json`
    holds the spec and the SHA-256 of each file of every finished case. A second call rewrites only
    the cases whose files are missing or changed, so a call that was killed is simply repeated.

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
    wanted = [ORGANS.index(organ) + 1 for organ in spec.annotated]
    label = np.where(np.isin(label, wanted), 1 if len(wanted) == 1 else label, 0).astype(np.uint8)
    turned = (spec.seed + index) % len(_ORIENTATIONS)
    turn = nib.orientations.axcodes2ornt(_ORIENTATIONS[turned])
    grid = case.image.grid  # the same voxels, stored along these axes
    affine = file_affine(grid) @ nib.orientations.inv_ornt_aff(turn, grid.shape[::-1])
    write_image(files["images"], case.image, affine_xyz=affine)
    write_image(files["labels"], Volume(label, case.label.grid), affine_xyz=affine)


def _digests(files: dict[str, Path]) -> dict[str, str]:
    return {part: file_sha256(path) if path.is_file() else "" for part, path in files.items()}


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
    replace_file(path, f"{json.dumps(content, indent=1)}\n".encode())
