"""NIfTI in and out: bytes, headers, images and label maps. A CT may also be a DICOM series.

Images come back in the closest canonical orientation (RAS+), with axes (D, H, W) = z, y, x; an
oblique affine is kept as it is, never straightened by interpolation.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import nibabel as nib
import numpy as np
import numpy.typing as npt
from isal import igzip
from nibabel.orientations import apply_orientation, io_orientation, ornt_transform
from nibabel.volumeutils import apply_read_scaling

from pipeline.data.dicom import is_series, open_series, read_series
from pipeline.data.files import require_file
from pipeline.data.hounsfield import Doubt, header_doubts
from pipeline.data.volume import Grid, Orientation, Volume, orientation_of
from pipeline.errors import GeometryError
from pipeline.figures import caret_names, caret_xml

# NIfTI files as bytes: packed or not, of version 1 or 2, whole or the header alone.

_GZIP_MAGIC = b"\x1f\x8b"
_NIFTI2_HEADER_SIZE = ((540).to_bytes(4, "little"), (540).to_bytes(4, "big"))
_UNKNOWN_EXTENSION = 0
_COMMENT_EXTENSION = 6


def read_file(path: Path) -> tuple[Any, str]:
    """A NIfTI as nibabel has it, with its voxels in memory, and the SHA-256 of the file's bytes.
    A DICOM series comes as a NIfTI of it would.

    The bytes that were hashed are decoded, so that a file changing meanwhile cannot mix the two.

    Raises:
        GeometryError: it cannot be read, is no NIfTI, or nothing says how large its voxels are.
    """
    require_file(path)
    if is_series(path):
        return read_series(path)
    try:
        data = path.read_bytes()
    except OSError as error:
        raise GeometryError(
            f"the file cannot be read ({error.strerror}).",
            where=path,
            fix="Check the path and its permissions.",
        ) from error
    digest = hashlib.sha256(data).hexdigest()
    with _decoding(path):
        if path.name.lower().endswith(".gz") or data[:2] == _GZIP_MAGIC:
            # Of the well-kept readers the fastest, and it checks lengths and CRCs (decision 0023).
            data = igzip.decompress(data)
        kind = nib.Nifti2Image if data[:4] in _NIFTI2_HEADER_SIZE else nib.Nifti1Image
        _check_voxel_size(kind.header_class, data, path)
        return kind.from_bytes(data), digest


def read_header(path: Path) -> tuple[Any, Any]:
    """The kind of image that a file holds, and its header; voxels are not read.

    Raises:
        GeometryError: not a readable NIfTI, or nothing says how large its voxels are.
    """
    require_file(path)
    if is_series(path):
        return nib.Nifti1Image, open_series(path).header()
    with _decoding(path), path.open("rb") as file:
        begin = file.read(4)
        packed = path.name.lower().endswith(".gz") or begin[:2] == _GZIP_MAGIC
        file.seek(0)
        with igzip.open(file) if packed else nullcontext(file) as stream:
            first = stream.read(4)
            kind = nib.Nifti2Image if first in _NIFTI2_HEADER_SIZE else nib.Nifti1Image
            # What nibabel keeps of a header is at its beginning; extensions go anyway.
            data = first + stream.read(kind.header_class.sizeof_hdr - 4)
            _check_voxel_size(kind.header_class, data, path)
            return kind, kind.header_class(data)


def _check_voxel_size(kind: Any, data: bytes, path: Path) -> None:
    """Before nibabel mends the header: it takes a voxel size of 0 for 1 mm."""
    header = kind(data[: kind.sizeof_hdr], check=False)
    sizes = header["pixdim"][1:4][: max(0, int(header["dim"][0]))]
    if header["sform_code"] <= 0 and not sizes.all():
        raise GeometryError(
            f"the header has no voxel size (pixdim is {', '.join(f'{s:g}' for s in sizes)}).",
            where=path,
            fix="Write the file again with its spacing and orientation.",
        )


@contextmanager
def _decoding(path: Path) -> Iterator[None]:
    """Within the block, what nibabel or gzip raise becomes a `GeometryError`."""
    try:
        yield
    except GeometryError:
        raise
    except Exception as error:  # a damaged header makes nibabel raise almost anything
        raise GeometryError(
            f"not a readable NIfTI file ({type(error).__name__}: {error}).",
            where=path,
            fix="It may be truncated, or not gzip: fetch or export it again.",
        ) from error


def name_extensions(names: Mapping[int, str]) -> list[Any]:
    """Header extensions that keep the organ of each label value: as TotalSegmentator does, and as
    JSON in a comment.
    """
    text = json.dumps({"labels": {str(k): v for k, v in names.items()}}, sort_keys=True)
    # TotalSegmentator reads the first extension, whatever its code, and gives it this one.
    contents = ((_UNKNOWN_EXTENSION, caret_xml(names)), (_COMMENT_EXTENSION, text))
    return [nib.nifti1.Nifti1Extension(code, _padded(content)) for code, content in contents]


def names_in(header: Any) -> tuple[dict[int, str], ...]:
    """What header extensions call the label values, as `name_extensions` writes them or
    TotalSegmentator does; one mapping for each that says something, without 0."""
    found = []
    for extension in header.extensions:
        content = extension.get_content()
        text = content if isinstance(content, bytes) else str(content).encode()
        names = caret_names(text)
        with suppress(ValueError, KeyError, TypeError, AttributeError):  # somebody's own comment
            names = names or {int(k): str(v) for k, v in json.loads(text)["labels"].items()}
        named = {value: name for value, name in names.items() if value != 0}
        found += [named] if named else []
    return tuple(found)


def _padded(text: str) -> bytes:
    """As long as the header wants it, in blanks: XML readers refuse the zeros that would come."""
    content = text.encode()
    return content + b" " * (-(len(content) + 8) % 16)


def write_file(image: Any, path: Path) -> None:
    """Writes an image of nibabel, `.nii` or `.nii.gz`, atomically; makes the folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    suffix = ".nii.gz" if path.name.endswith(".gz") else ".nii"
    temporary = path.with_name(f".{path.name}.{os.getpid()}{suffix}")
    try:
        nib.save(image, temporary)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


# With `pipeline.data.volume` the only file that knows the (x, y, z) of files.

_RAS = np.array([[0, 1], [1, 1], [2, 1]], dtype=np.float64)
_INT16 = np.iinfo(np.int16)
_SLAB_VOXELS = 4_000_000
LABEL_TOLERANCE = 1e-3


@dataclass(frozen=True)
class NiftiVolume:
    """A file's content in this project's axis order, and where it came from.

    Attributes:
        volume: array (D, H, W) in RAS+ with its grid, and how the file keeps its axes.
        sha256: of the file's bytes, the very bytes that `volume` was decoded from.
        file_shape: (x, y, z) sizes as stored.
        file_affine: 4 x 4 as stored, (x, y, z) voxels to RAS+ mm.
        doubts: what its header makes doubtful.
        names: label value -> organ, of each header extension that says it.
        note: what was done to its values or left out of a series, a sentence; empty: nothing.
    """

    volume: Volume
    path: Path
    sha256: str
    file_shape: tuple[int, ...]
    file_affine: npt.NDArray[np.float64]
    doubts: tuple[Doubt, ...] = ()
    names: tuple[Mapping[int, str], ...] = ()
    note: str = ""


def read_image(path: Path) -> NiftiVolume:
    """Reads a CT as int16 Hounsfield units (fractional values are rounded to the nearest HU).

    Raises:
        GeometryError: not a readable 3D NIfTI, NaN or infinite voxels, or values outside int16.
    """
    image, sha256 = read_file(path)
    stored = _canonical(image, _stored_voxels(image, path))
    array = np.empty(stored.shape, dtype=np.int16)
    low, high, bad = np.inf, -np.inf, 0
    # Slab by slab: scaled values are float64, four times the int16 that is kept.
    rows = max(1, _SLAB_VOXELS // (stored.shape[1] * stored.shape[2]))
    for begin in range(0, stored.shape[0], rows):
        part = _scaled(image, stored[begin : begin + rows])
        if part.dtype.kind == "f":
            finite = np.isfinite(part)
            bad += int(part.size - np.count_nonzero(finite))
            part = np.rint(part) if finite.all() else np.zeros_like(part)
        low, high = min(low, float(part.min())), max(high, float(part.max()))
        if low >= _INT16.min and high <= _INT16.max:
            array[begin : begin + rows] = part
    if bad:
        raise GeometryError(
            f"{bad} voxels are NaN or infinite.",
            where=path,
            fix="Hounsfield units must be finite: replace them (air is -1024) and save again.",
        )
    if low < _INT16.min or high > _INT16.max:
        raise GeometryError(
            f"values range from {low:.0f} to {high:.0f}, which are not Hounsfield units.",
            where=path,
            fix="Check the rescale slope and intercept that the file was written with.",
        )
    return _wrap(image, array, path, sha256)


def read_label(path: Path) -> NiftiVolume:
    """Reads a label map; values must be whole numbers from 0 to 65535, up to `LABEL_TOLERANCE`:
    slopes that libraries choose, and their float32, leave noise. Array dtype is uint16.

    Raises:
        GeometryError: not a readable 3D NIfTI, or values that are no labels.
    """
    image, sha256 = read_file(path)
    stored = _stored_voxels(image, path)
    whole, note = _whole_numbers(_scaled(image, stored), path)
    array = np.ascontiguousarray(_canonical(image, whole))
    return replace(_wrap(image, array, path, sha256), note=note)


def _whole_numbers(values: npt.NDArray[Any], path: Path) -> tuple[npt.NDArray[np.uint16], str]:
    """Values of a label map in the file's order -> uint16, and a remark if they were rounded."""
    nearest, note = values, ""
    wrong = "label values are not whole numbers from 0 to 65535"
    fix = "A label map holds one whole number per voxel; is this an image or a probability?"
    if values.dtype.kind == "f":
        nearest = np.rint(values)
        # Of NaN and infinity this is NaN, which is not below the limit either.
        with np.errstate(invalid="ignore"):
            apart = np.abs(values - nearest)
        most = float(apart.max())
        if not most <= LABEL_TOLERANCE:
            at = np.unravel_index(np.argmax(apart), apart.shape)
            raise GeometryError(
                f"{wrong}: the one furthest from any is {values[at]:.6g}, at voxel "
                f"{tuple(int(n) for n in at)} (x, y, z in the file, from 0).",
                where=path,
                fix=fix,
            )
        if most:
            note = (
                f"label values lie up to {most:.1g} from whole numbers and were rounded "
                f"(tolerance {LABEL_TOLERANCE:g})."
            )
    low, high = nearest.min(), nearest.max()
    if low < 0 or high > np.iinfo(np.uint16).max:
        raise GeometryError(f"{wrong}: they run from {low:g} to {high:g}.", where=path, fix=fix)
    return nearest.astype(np.uint16), note


def read_grid(path: Path) -> Grid:
    """The first of `read_geometry`."""
    return read_geometry(path)[0]


def read_geometry(path: Path) -> tuple[Grid, Orientation]:
    """The grid of a file in RAS+, and how the file keeps its axes, from its header alone (the
    voxels are not read).

    Raises:
        GeometryError: not a 3D NIfTI header, or not one DICOM series.
    """
    _, header = read_header(path)
    with _decoding(path):
        image = SimpleNamespace(affine=header.get_best_affine(), shape=header.get_data_shape())
    shape = _check_shape(image, path)
    order = np.argsort(io_orientation(image.affine)[:, 0])
    grid = _canonical_grid([shape[i] for i in order], image.affine, shape)
    return grid, orientation_of(image.affine)


def write_image(
    path: Path, volume: Volume, *, affine_xyz: npt.ArrayLike | None = None, description: str = ""
) -> None:
    """Writes (D, H, W) in RAS+ as NIfTI, atomically.

    Args:
        volume: its array's dtype is stored as it is (bool as uint8).
        affine_xyz: if given, the file is stored in the orientation of this affine (its axis order
            and directions), with this affine; it must describe the same voxels.
        description: at most 80 bytes, in the header.
    """
    array = _to_file_order(volume.array)
    affine = file_affine(volume.grid)
    if affine_xyz is not None:
        affine = np.asarray(affine_xyz, dtype=np.float64)
        array = apply_orientation(array, ornt_transform(_RAS, io_orientation(affine)))
    image = nib.Nifti1Image(np.ascontiguousarray(array), affine)
    image.header["descrip"] = description
    write_file(image, path)


def write_like(
    path: Path, volume: Volume, like: Path, *, names: Mapping[int, str] | None = None
) -> None:
    """Writes (D, H, W) back in the geometry of the file `like`: same shape, axes, affine, codes.

    Args:
        volume: in RAS+, on the grid that reading `like` gave; (C, D, H, W) becomes a 4D file, its
            channels last, written channel by channel (a memory map need not be loaded).
        like: the NIfTI whose geometry the output takes over; only its header is read.
        names: label value -> organ name, stored in two header extensions: as TotalSegmentator does,
            and as JSON in a comment.

    Raises:
        GeometryError: `like` cannot be read, or the volume has another shape.
    """
    kind, header = read_header(like)
    affine = header.get_best_affine()
    back = ornt_transform(_RAS, io_orientation(affine))
    array = apply_orientation(_to_file_order(volume.array), back)
    stored = header.get_data_shape()
    shape = _spatial(stored)[:3]
    if array.shape[:3] != shape:
        raise GeometryError(
            f"a volume of shape {array.shape[:3]} (x, y, z) cannot be written like one of {shape}.",
            where=like,
            fix="Did the file change while it was read? Run the command again.",
        )
    if len(stored) < 3 and array.ndim == 3:
        array = array.reshape(stored)
    header["scl_slope"], header["scl_inter"] = 1, 0
    header["cal_min"], header["cal_max"] = 0, 0
    header.extensions.clear()
    header.set_data_dtype(array.dtype)
    out = kind(array, affine, header)
    out.header.set_data_dtype(array.dtype)
    if names is not None:
        out.header.extensions.extend(name_extensions(names))
    write_file(out, path)


def _check_shape(image: Any, path: Path) -> tuple[int, int, int]:
    shape = _spatial(image.shape)
    # One slice has one voxel along one axis; a row of voxels, or a single one, is no image.
    if len(shape) != 3 or sorted(shape)[1] < 2 or min(shape) < 1:
        raise GeometryError(
            f"expected one volume or one slice, found shape {shape}.",
            where=path,
            fix="Split a 4D file into one file per volume; a slice has at least 2 x 2 voxels.",
        )
    if not _is_invertible(image.affine):
        raise GeometryError(
            "the affine is not invertible, so voxel sizes are unknown.",
            where=path,
            fix="Write the file again with its spacing and orientation.",
        )
    return shape


def _spatial(shape: Sequence[int]) -> tuple[int, ...]:
    """Sizes along x, y, z: a 2D file is one slice, and axes of one beyond the third are none."""
    sizes = [*map(int, shape), *[1] * (3 - len(shape))]
    while len(sizes) > 3 and sizes[-1] == 1:
        sizes.pop()
    return tuple(sizes)


def _is_invertible(affine: npt.NDArray[np.float64]) -> bool:
    if not np.all(np.isfinite(affine)) or abs(np.linalg.det(affine[:3, :3])) < 1e-9:
        return False
    # Columns of wildly different lengths leave an axis without a direction.
    return not np.isnan(io_orientation(affine)).any()


def _stored_voxels(image: Any, path: Path) -> npt.NDArray[Any]:
    """(x, y, z) as in the file, before rescaling."""
    shape = _check_shape(image, path)
    with _decoding(path):
        array: npt.NDArray[Any] = np.asanyarray(image.dataobj.get_unscaled()).reshape(shape)
    if array.dtype.kind not in "iuf":
        raise GeometryError(
            f"voxels are of type {array.dtype}, not one real number each.",
            where=path,
            fix="Colour and complex images cannot be used: export the CT or label map itself.",
        )
    return array


def _canonical(image: Any, stored: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """A view of stored voxels with axes z, y, x in RAS+."""
    oriented: npt.NDArray[Any] = apply_orientation(stored, io_orientation(image.affine))
    return oriented.transpose(2, 1, 0)


def _scaled(image: Any, part: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """Slope and intercept applied as nibabel does for the whole array."""
    slope, inter = np.asanyarray(image.dataobj.slope), np.asanyarray(image.dataobj.inter)
    return np.asanyarray(apply_read_scaling(part, slope, inter))


def _wrap(image: Any, array: npt.NDArray[Any], path: Path, sha256: str) -> NiftiVolume:
    shape = _check_shape(image, path)
    affine = np.array(image.affine, dtype=np.float64)
    grid = _canonical_grid(array.shape[::-1], affine, shape)
    volume = Volume(array, grid, orientation_of(affine))
    doubts, names = header_doubts(image), names_in(image.header)
    note = str(image.extra.get("note", ""))
    return NiftiVolume(volume, path, sha256, shape, affine, doubts, names, note)


def _canonical_grid(
    shape_xyz: Sequence[int], affine: npt.NDArray[np.float64], stored: tuple[int, ...]
) -> Grid:
    """The grid in RAS+ of a file's affine and shape; `shape_xyz` is that shape in RAS+."""
    canonical = affine @ nib.orientations.inv_ornt_aff(io_orientation(affine), stored)
    return Grid.from_matrix([int(n) for n in reversed(shape_xyz)], _swap(canonical))


def file_affine(grid: Grid) -> npt.NDArray[np.float64]:
    """4 x 4, (x, y, z) voxels to RAS+ mm."""
    return _swap(grid.matrix)


def _swap(affine: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Between (x, y, z) -> RAS and (z, y, x) -> (S, A, R): reverse both sides."""
    order = [2, 1, 0, 3]
    return affine[np.ix_(order, order)]


def _to_file_order(array: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """(..., D, H, W) -> (x, y, z, ...)."""
    stored = array.astype(np.uint8) if array.dtype == np.bool_ else array
    return stored.T if stored.ndim == 3 else stored.transpose(3, 2, 1, 0)
