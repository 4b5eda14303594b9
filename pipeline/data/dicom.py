"""DICOM series in: a folder or a zip file of one CT becomes an image of nibabel.

Geometry is that of each slice's own position and orientation, never of slice thickness or order of
files. What cannot be placed in space without a guess (missing or uneven slices, a tilted gantry,
several series) is refused. Nothing of a header but geometry and counts goes into a text.

Source of what tags mean: DICOM PS3.3, Image Plane (C.7.6.2) and CT Image (C.8.2.1) modules.
"""

from __future__ import annotations

import hashlib
import os
import zipfile
import zlib
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from io import BytesIO
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from pipeline.config import FileStamp, stamp_file
from pipeline.errors import GeometryError, counted

if TYPE_CHECKING:
    import nibabel as nib

_MAGIC_AT, _MAGIC = 128, b"DICM"
_CT = "1.2.840.10008.5.1.4.1.1.2"
_MULTI_FRAME = (
    "1.2.840.10008.5.1.4.1.1.2.1",  # enhanced CT
    "1.2.840.10008.5.1.4.1.1.2.2",  # legacy converted enhanced CT
)
_DIRECTORY = "1.2.840.10008.1.3.10"  # DICOMDIR
# Positions are written with few digits: 1.25 mm as 1.2 and 1.3.
_ROUNDING_MM, _UNEVEN = 0.06, 0.02
_TILT_DEGREES = 0.5
_SAME_DIRECTION = 1e-3
_TAGS = [
    "SOPClassUID", "SOPInstanceUID", "SeriesInstanceUID", "SeriesNumber", "Modality", "ImageType",
    "Rows", "Columns", "PixelSpacing", "ImagePositionPatient", "ImageOrientationPatient",
    "RescaleSlope", "RescaleIntercept", "SamplesPerPixel", "NumberOfFrames",
    "PerFrameFunctionalGroupsSequence", "SharedFunctionalGroupsSequence",
]  # fmt: skip


def is_series(path: Path, others: list[str] | None = None) -> bool:
    """Whether an image is a zip file, or a folder with a DICOM file anywhere below it; `others`
    gets the names of the files that were looked at before it."""
    if path.suffix.lower() == ".zip":
        return True
    found = _dicom_files(path, others=others)
    return os.path.isdir(path) and next(found, None) is not None  # noqa: PTH112


def holds_dicom(folder: Path) -> bool:
    """Whether DICOM files lie in a folder itself, or a DICOMDIR that leads to them."""
    return next(_dicom_files(folder, deep=False), None) is not None


def stamp_image(path: Path, known: FileStamp | None = None) -> FileStamp:
    """`stamp_file`, also of a series: of all DICOM files below a folder, whatever their names.

    Raises:
        OSError: a file cannot be read.
    """
    if not path.is_dir():
        return stamp_file(path, known)
    files = sorted(_dicom_files(path))
    states = [file.stat() for file in files]
    size, time = sum(s.st_size for s in states), max((s.st_mtime_ns for s in states), default=0)
    if known is not None and (known.size, known.mtime_ns) == (size, time):
        return known
    return FileStamp(_joined(stamp_file(file).sha256 for file in files), size, time)


def _joined(hashes: Iterator[str] | Sequence[str]) -> str:
    return hashlib.sha256("".join(sorted(hashes)).encode()).hexdigest()


def _dicom_files(
    folder: Path, *, deep: bool = True, others: list[str] | None = None
) -> Iterator[Path]:
    for place, folders, names in os.walk(folder):
        folders[:] = sorted(name for name in folders if deep and not name.startswith("."))
        for name in sorted(names):
            path = Path(place, name)
            if not name.startswith(".") and path.is_file():
                with path.open("rb") as file:
                    if _is_dicom(file):
                        yield path
                    elif others is not None:
                        others.append(name)


def _is_dicom(file: IO[bytes]) -> bool:
    return file.read(_MAGIC_AT + len(_MAGIC))[_MAGIC_AT:] == _MAGIC


@dataclass(frozen=True)
class _Slice:
    """One image of a series, or one frame of a multi-frame file.

    Attributes:
        file: its number among the files.
        frame: within its file; None: the file is one image.
        position: of the first voxel's centre, LPS+ mm.
        axes: (2, 3), directions of increasing column and row number.
        spacing: mm between columns, and between rows.
        size: (columns, rows).
        rescale: slope and intercept, stored value -> HU.
    """

    file: int
    frame: int | None
    position: npt.NDArray[np.float64]
    axes: npt.NDArray[np.float64]
    spacing: tuple[float, float]
    size: tuple[int, int]
    rescale: tuple[float, float]


@dataclass(frozen=True)
class Series:
    """A CT series, without its voxels.

    Attributes:
        shape: (x, y, z) sizes.
        affine: 4 x 4, (x, y, z) voxels to RAS+ mm.
        note: what else lies there and is left out, as a sentence; empty: nothing.
        slices: along z.
    """

    path: Path
    shape: tuple[int, int, int]
    affine: npt.NDArray[np.float64]
    note: str
    slices: Sequence[_Slice]

    def header(self) -> nib.Nifti1Header:
        """As a NIfTI of this geometry has it."""
        import nibabel as nib

        empty = np.broadcast_to(np.int16(0), self.shape)
        header: nib.Nifti1Header = nib.Nifti1Image(empty, self.affine).header
        header.set_xyzt_units("mm")
        return header


def read_series(path: Path) -> tuple[nib.Nifti1Image, str]:
    """A CT in Hounsfield units, and its digest as `stamp_image` gives it. What else lay there and
    was left out is `extra["note"]` of the image, a sentence.

    A voxel is its slice's stored value times slope plus intercept: int16 where all are whole.

    Raises:
        GeometryError: what `open_series` raises, or pixels that cannot be decoded.
    """
    import nibabel as nib

    with _opened(path) as (files, whole):
        series = _series(path, files)
        frames: dict[int, list[tuple[int, _Slice]]] = defaultdict(list)
        for z, one in enumerate(series.slices):
            frames[one.file].append((z, one))
        voxels = np.empty(series.shape, dtype=np.float32, order="F")
        hashes = []
        for number, (name, opened) in enumerate(files):
            with opened() as file:
                data = file.read()  # the bytes that are hashed are decoded
            hashes.append(hashlib.sha256(data).hexdigest())
            if number not in frames:
                continue
            pixels = _pixels(data, f"{path}, {name}")
            for z, one in frames[number]:
                stored = pixels if one.frame is None else pixels[one.frame]
                slope, intercept = one.rescale
                voxels[:, :, z] = np.transpose(stored * slope + intercept)
    limits = np.iinfo(np.int16)
    fits = limits.min <= voxels.min() and voxels.max() <= limits.max
    hu = voxels.astype(np.int16) if fits and not np.any(voxels % 1) else voxels
    made = nib.Nifti1Image(hu, series.affine, series.header(), dtype=hu.dtype)
    image = nib.Nifti1Image.from_bytes(made.to_bytes())  # as if read: stored values, no scaling
    image.extra["note"] = series.note
    return image, whole or _joined(hashes)


def open_series(path: Path) -> Series:
    """The geometry of the one CT series in a folder or zip file; no voxel is read.

    Raises:
        GeometryError: no CT series there, or several; slices that are missing, uneven, tilted or
            of several sizes; pydicom is not installed.
    """
    with _opened(path) as (files, _):
        return _series(path, files)


def read_headers(path: Path) -> tuple[Series, list[Any]]:
    """`open_series`, and of each file that it is of all but the pixels, as pydicom has it."""
    from pydicom import dcmread

    with _opened(path) as (files, _):
        series = _series(path, files)
        headers = []
        for number in dict.fromkeys(one.file for one in series.slices):
            with files[number][1]() as file:
                headers.append(dcmread(file, stop_before_pixels=True))
    return series, headers


_Files = Sequence[tuple[str, Callable[[], IO[bytes]]]]


def _open(file: Path) -> IO[bytes]:
    return file.open("rb")


@contextmanager
def _opened(path: Path) -> Iterator[tuple[_Files, str]]:
    """Name of each DICOM file there, and what opens it; of a zip file the SHA-256 of its bytes."""
    if path.is_dir():
        found = sorted(_dicom_files(path))
        yield [(str(file.relative_to(path)), partial(_open, file)) for file in found], ""
        return
    try:
        data = path.read_bytes()
        with zipfile.ZipFile(BytesIO(data)) as packed:
            names = []
            for name in sorted(packed.namelist()):
                with packed.open(name) as file:
                    names += [name] if _is_dicom(file) else []
            yield (
                [(name, partial(packed.open, name)) for name in names],
                hashlib.sha256(data).hexdigest(),
            )
    except (zipfile.BadZipFile, zlib.error, NotImplementedError, RuntimeError) as error:
        raise GeometryError(
            f"not a readable zip file ({error}).",
            where=path,
            fix="Fetch it again, or give the folder that it was made of.",
        ) from error


def _series(path: Path, files: _Files) -> Series:
    left: Counter[str] = Counter()
    found: dict[str, list[_Slice]] = defaultdict(list)
    numbers: dict[str, str] = {}
    seen = set()
    for number, (name, opened) in enumerate(files):
        with opened() as file:
            header = _header(file, f"{path}, {name}")
        kind = str(header.get("SOPClassUID", ""))
        uid = header.get("SOPInstanceUID") or name  # without one, each file is an image of its own
        if kind == _DIRECTORY:
            continue
        if uid in seen:
            left["copy of an image"] += 1
        elif kind != _CT and kind not in _MULTI_FRAME:
            left[f"object of modality {header.get('Modality') or 'unknown'}"] += 1
        elif "LOCALIZER" in (header.get("ImageType") or ()):
            left["localiser"] += 1
        else:
            series = str(header.get("SeriesInstanceUID"))
            numbers[series] = str(header.get("SeriesNumber") or "without number")
            found[series] += _slices(header, number, f"{path}, {name}")
        seen.add(uid)
    left_out = ", ".join(counted(many, what) for what, many in sorted(left.items()))
    if not found:
        raise GeometryError(
            f"no CT series among {counted(len(files), 'DICOM file')}"
            f"{f' ({left_out})' if left_out else ''}.",
            where=path,
            fix="Give the folder or zip file of a CT series.",
        )
    if len(found) > 1:
        each = "; ".join(
            f"number {numbers[uid]} of {counted(len(slices), 'slice')}"
            for uid, slices in sorted(found.items(), key=lambda item: numbers[item[0]])
        )
        raise GeometryError(
            f"{len(found)} CT series lie there: {each}.",
            where=path,
            fix="Give a folder of one series: move it, or write all as NIfTI with `dcm2niix`.",
        )
    slices, affine = _placed(path, *found.values())
    shape = (*slices[0].size, len(slices))
    note = f"left out beside the CT series: {left_out}." if left_out else ""
    return Series(path, shape, affine, note, slices)


def _header(file: IO[bytes], where: str) -> Any:
    try:
        from pydicom import dcmread
    except ImportError as error:
        raise not_installed("pydicom is not installed, which reads DICOM", where) from error
    try:
        return dcmread(file, stop_before_pixels=True, specific_tags=_TAGS)
    except Exception as error:  # a damaged file makes pydicom raise almost anything
        raise _undecoded(where, error) from error


def not_installed(what: str, where: Path | str) -> GeometryError:
    """The error for a package of the extra `dicom`."""
    fix = "Run  pip install 'organ-distill[dicom]', or work with NIfTI."
    return GeometryError(f"{what}.", where=where, fix=fix)


def _pixels(data: bytes, where: str) -> npt.NDArray[Any]:
    """Stored values: (rows, columns), or (frames, rows, columns)."""
    from pydicom import dcmread

    try:
        return dcmread(BytesIO(data)).pixel_array
    except Exception as error:
        raise _undecoded(where, error) from error


def decode_pixels(path: Path) -> None:
    """Tries whether a DICOM file is whole.

    Raises:
        GeometryError: it cannot be decoded.
        OSError: it cannot be read.
    """
    _pixels(path.read_bytes(), str(path))


def _undecoded(where: str, error: Exception) -> GeometryError:
    return GeometryError(
        f"a DICOM file cannot be decoded ({type(error).__name__}).",
        where=where,
        fix="It may be truncated: export the series again, best without compression.",
    )


def _slices(header: Any, file: int, where: str) -> list[_Slice]:
    """Of a file: one, or one for each frame."""
    try:
        if header.get("NumberOfFrames") is None:
            return [_slice(header, header, header, header, file, None)]
        shared = header.SharedFunctionalGroupsSequence[0]

        def group(frame: Any, name: str) -> Any:
            return (frame.get(name) or shared.get(name))[0]

        return [
            _slice(
                group(frame, "PlanePositionSequence") , group(frame, "PlaneOrientationSequence"),
                group(frame, "PixelMeasuresSequence"),
                group(frame, "PixelValueTransformationSequence"), file, k, header,
            )
            for k, frame in enumerate(header.PerFrameFunctionalGroupsSequence)
        ]  # fmt: skip
    except (AttributeError, TypeError, ValueError, IndexError) as error:
        raise GeometryError(
            "a CT image lacks position, orientation, pixel spacing, or rescale slope and intercept "
            "(or they are no numbers).",
            where=where,
            fix="Export the series again from the scanner's archive.",
        ) from error


def _slice(
    place: Any, direction: Any, measures: Any, values: Any, file: int, frame: int | None,
    header: Any = None,
) -> _Slice:  # fmt: skip
    header = place if header is None else header
    between_rows, between_columns = (float(v) for v in measures.PixelSpacing)
    if int(header.get("SamplesPerPixel", 1)) != 1 or min(between_rows, between_columns) <= 0:
        raise ValueError
    position = np.array([float(v) for v in place.ImagePositionPatient])
    axes = np.array([float(v) for v in direction.ImageOrientationPatient]).reshape(2, 3)
    if not np.allclose(axes @ axes.T, np.eye(2), atol=1e-3) or position.shape != (3,):
        raise ValueError
    return _Slice(
        file, frame, position, axes, (between_columns, between_rows),
        (int(header.Columns), int(header.Rows)),
        (float(values.RescaleSlope), float(values.RescaleIntercept)),
    )  # fmt: skip


def _placed(path: Path, slices: list[_Slice]) -> tuple[list[_Slice], npt.NDArray[np.float64]]:
    """Slices in the order of their places along the normal, and the affine that places them."""

    def refuse(what: str, fix: str) -> GeometryError:
        return GeometryError(what, where=path, fix=fix)

    first = slices[0]
    if any(
        one.size != first.size
        or not np.allclose(one.spacing, first.spacing, rtol=1e-3)
        or not np.allclose(one.axes, first.axes, atol=_SAME_DIRECTION)
        for one in slices
    ):
        raise refuse(
            "its slices differ in size, pixel spacing or direction.",
            "Give a folder of slices that make one volume.",
        )
    normal = np.cross(*first.axes)
    slices = sorted(slices, key=lambda one: float(one.position @ normal))
    positions = np.array([one.position for one in slices])
    step = normal  # 1 mm, of a single slice: nothing else is known
    if len(slices) > 1:
        gaps = np.diff(positions @ normal)
        usual = float(np.median(gaps))
        near = _ROUNDING_MM + _UNEVEN * usual
        if gaps.min() < near:
            raise refuse(
                f"{counted(int((gaps < near).sum()) + 1, 'slice')} or more share a place, as those "
                "of several phases or reconstructions do, or copies without a SOPInstanceUID.",
                "Give a folder with one phase in one reconstruction, and each image once.",
            )
        if (apart := np.abs(gaps - usual)).max() > near:
            z = int(apart.argmax())
            missing = gaps[z] / usual
            what = (
                f"{counted(round(missing) - 1, 'slice')} missing"
                if abs(missing - round(missing)) * usual < 2 * near and missing > 1.5
                else "uneven"
            )
            raise refuse(
                f"its slices are not evenly spaced: between slice {z + 1} and {z + 2} of "
                f"{len(slices)} there are {gaps[z]:.2f} mm, mostly {usual:.2f} mm ({what}).",
                "Fetch the missing slices, or resample the series evenly with a tool of your "
                "choice and give the NIfTI.",
            )
        step = (positions[-1] - positions[0]) / (len(slices) - 1)
        tilt = float(np.degrees(np.arccos(np.clip(step @ normal / np.linalg.norm(step), -1, 1))))
        if tilt > _TILT_DEGREES:
            raise refuse(
                f"the gantry was tilted by {tilt:.1f} degrees: slices are shifted against each "
                "other.",
                "Correct it first: `dcm2niix` writes a file named _Tilt that can be used.",
            )
    affine = np.eye(4)
    affine[:3, 0] = first.axes[0] * first.spacing[0]
    affine[:3, 1] = first.axes[1] * first.spacing[1]
    affine[:3, 2], affine[:3, 3] = step, positions[0]
    return slices, np.diag([-1.0, -1.0, 1.0, 1.0]) @ affine  # LPS+ -> RAS+
