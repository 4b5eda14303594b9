"""DICOM series in: a folder or a zip file of one CT becomes an image of nibabel.

Geometry is that of each slice's own position and orientation, never of slice thickness or order of
files. What cannot be placed in space without a guess (missing or uneven slices, a tilted gantry,
several series) is refused. Nothing of a header but geometry and counts goes into a text.

Source of what tags mean: DICOM PS3.3, Image Plane (C.7.6.2) and CT Image (C.8.2.1) modules.
"""

from __future__ import annotations

import hashlib
import os
import re
import zipfile
import zlib
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from io import BytesIO
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from pipeline.config import FileStamp, stamp_file, versions
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
        kind, uid = str(header.get("SOPClassUID", "")), header.get("SOPInstanceUID")
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
        raise _not_installed("pydicom is not installed, which reads DICOM", where) from error
    try:
        return dcmread(file, stop_before_pixels=True, specific_tags=_TAGS)
    except Exception as error:  # a damaged file makes pydicom raise almost anything
        raise _undecoded(where, error) from error


def _not_installed(what: str, where: Path | str) -> GeometryError:
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
                "of several phases or reconstructions do.",
                "Give a folder with one phase in one reconstruction.",
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


# A label map as DICOM SEG, beside the series that it is of.

_MAKER = "organ-distill"
_SIDES = {"left", "right"}


def write_segmentation(
    path: Path,
    labels: Path,
    series: Path,
    ids: Mapping[str, int],
    colours: Mapping[str, tuple[int, int, int]],
) -> bool:
    """Writes a label map as a DICOM Segmentation (binary segments) that refers to its series;
    False of an empty one, for which there is no such file.

    Organs are coded in SNOMED CT where pydicom's dictionary has their names (`kidney_left` is a
    kidney with its side), others in a private scheme. As the standard asks, patient and study are
    copied from the series into this file.

    Args:
        labels: a NIfTI in the geometry of the series, as `predict` writes it.
        ids: organ -> value in the label map; organs without a voxel get no segment.
        colours: organ -> red, green, blue, 0 .. 255.

    Raises:
        GeometryError: a series whose headers lack what a SEG repeats, or highdicom is not
            installed.
    """
    import nibabel as nib

    sources, order = _sources(series)
    image: Any = nib.load(labels)
    planes = np.asarray(image.dataobj).T[order]
    there = [organ for organ, value in ids.items() if (planes == value).any()]
    if not there:
        return False
    segments = np.zeros(planes.shape, dtype=np.uint8)
    for number, organ in enumerate(there, 1):
        segments[planes == ids[organ]] = number
    try:
        from highdicom.seg import Segmentation
        from pydicom.uid import generate_uid

        made = Segmentation(
            source_images=sources, pixel_array=segments, segmentation_type="BINARY",
            segment_descriptions=[_segment(k, o, colours[o]) for k, o in enumerate(there, 1)],
            series_instance_uid=generate_uid(), sop_instance_uid=generate_uid(),
            series_number=1000 + int(sources[0].get("SeriesNumber") or 0), instance_number=1,
            manufacturer=_MAKER, manufacturer_model_name=_MAKER,
            software_versions=versions()[_MAKER] or "0", device_serial_number="0",
            content_label="ORGANS",
        )  # fmt: skip
    except ImportError as error:
        raise _not_installed(
            "highdicom is not installed, which writes DICOM SEG", series
        ) from error
    except (AttributeError, ValueError, TypeError) as error:
        raise GeometryError(
            f"no DICOM SEG can refer to this series ({error}).",
            where=series,
            fix="Its headers lack what the standard asks for: export it again.",
        ) from error
    made.save_as(path)
    return True


def _sources(path: Path) -> tuple[list[Any], list[int]]:
    """Headers of a series as a SEG refers to them, and which slice of the volume, along z, is at
    each of their places."""
    from pydicom import dcmread

    with _opened(path) as (files, _):
        series = _series(path, files)
        slices = series.slices
        wanted = dict.fromkeys(one.file for one in slices)
        headers = []
        for number in wanted:
            with files[number][1]() as file:
                headers.append(dcmread(file, stop_before_pixels=True))
    for header in headers:  # it may be empty, and highdicom wants it
        if not header.get("SliceThickness"):
            header.SliceThickness = round(float(np.linalg.norm(series.affine[:3, 2])), 4)
    return headers, sorted(range(len(slices)), key=lambda z: slices[z].frame or 0)


def _segment(number: int, organ: str, colour: tuple[int, int, int]) -> Any:
    from highdicom import AlgorithmIdentificationSequence
    from highdicom.color import CIELabColor
    from highdicom.seg import SegmentDescription
    from pydicom.sr.codedict import codes

    family = codes.DCM.ArtificialIntelligence
    kind, side = _coded(organ)
    made = SegmentDescription(
        number, organ, codes.SCT.Organ, kind, "AUTOMATIC",
        AlgorithmIdentificationSequence(_MAKER, family, versions()[_MAKER] or "0"),
        display_color=CIELabColor.from_rgb(*colour),
    )  # fmt: skip
    if side is not None:
        made.SegmentedPropertyTypeCodeSequence[0].SegmentedPropertyTypeModifierCodeSequence = [side]
    return made


def _coded(organ: str) -> tuple[Any, Any]:
    """An organ's code and that of its side, if its name has one."""
    from highdicom.sr import CodedConcept
    from pydicom.sr.codedict import codes

    words = re.split(r"[^a-z]+", organ.lower())
    sides = [word for word in words if word in _SIDES]
    name = "".join(word.title() for word in words if word not in _SIDES)
    for known in (name, name.removesuffix("s"), f"{name}Structure"):
        if (code := getattr(codes.SCT, known, None)) is not None:
            break
    else:  # a code has at most 16 characters
        value = hashlib.sha256(organ.encode()).hexdigest()[:16]
        return CodedConcept(value, "99ORGANDISTILL", organ[:64]), None
    side = CodedConcept.from_code(getattr(codes.SCT, sides[0].title())) if sides else None
    return code, side
