"""DICOM series: geometry against an independent reader, what is left out, what is refused."""

from __future__ import annotations

import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipeline.data.dicom import stamp_image
from pipeline.data.dicom_seg import write_segmentation
from pipeline.data.nifti import read_grid, read_header, read_image, write_like
from pipeline.data.volume import Volume
from pipeline.errors import GeometryError
from pipeline.setup.init.datasets import look_at_dataset
from pipeline.student.images import find_inputs

pydicom = pytest.importorskip("pydicom")
sitk = pytest.importorskip("SimpleITK")

CT = "1.2.840.10008.5.1.4.1.1.2"
EXPLICIT = "1.2.840.10008.1.2.1"
ROOT = "1.2.826.0.1.3680043.8.498."  # of pydicom
SHAPE = (5, 7, 6)  # slices, rows, columns
AXIAL = ((1, 0, 0), (0, 1, 0))
NAME = "Doe^Jane"


def voxels(shape: tuple[int, int, int] = SHAPE) -> np.ndarray[Any, Any]:
    return np.random.default_rng(3).integers(-1024, 3000, shape).astype(np.int16)


def write_series(
    folder: Path,
    hu: np.ndarray[Any, Any],
    *,
    axes: Sequence[Sequence[float]] = AXIAL,
    gap: float = 2.5,
    spacing: tuple[float, float] = (0.8, 0.7),
    series: int = 3,
    change: Callable[[Any, int], object] = lambda header, z: None,
) -> Path:
    """One file a slice, named at random so that order of files says nothing."""
    folder.mkdir(parents=True, exist_ok=True)
    normal = np.cross(*np.array(axes, dtype=float))
    for z, rows in enumerate(hu):
        header = _header(series, z)
        header.PixelSpacing = list(spacing)
        header.ImageOrientationPatient = [float(v) for axis in axes for v in axis]
        header.ImagePositionPatient = [
            float(v) for v in np.array([-50, -60, 20]) + z * gap * normal
        ]
        header.Rows, header.Columns = rows.shape
        header.RescaleSlope, header.RescaleIntercept = 1, -1024
        header.PixelData = (rows.astype(np.int32) + 1024).astype(np.uint16).tobytes()
        change(header, z)
        header.save_as(folder / f"{(z * 7919) % 1000:03d}.{series}.dcm", enforce_file_format=True)
    return folder


def _header(series: int, z: int) -> Any:
    header = pydicom.Dataset()
    header.file_meta = pydicom.dataset.FileMetaDataset()
    header.file_meta.TransferSyntaxUID = EXPLICIT
    header.file_meta.MediaStorageSOPClassUID = header.SOPClassUID = CT
    uid = f"{ROOT}{series}.{z + 1}"
    header.file_meta.MediaStorageSOPInstanceUID = header.SOPInstanceUID = uid
    header.SeriesInstanceUID, header.StudyInstanceUID = f"{ROOT}{series}", f"{ROOT}99"
    header.FrameOfReferenceUID = f"{ROOT}98"
    header.SeriesNumber, header.InstanceNumber = series, z + 1
    header.Modality, header.ImageType = "CT", ["ORIGINAL", "PRIMARY", "AXIAL"]
    header.PatientName = header.PatientID = NAME
    header.PatientBirthDate = header.PatientSex = header.AccessionNumber = header.StudyID = ""
    header.StudyDate, header.StudyTime = "20261130", "120000"
    header.SamplesPerPixel, header.PhotometricInterpretation = 1, "MONOCHROME2"
    header.BitsAllocated, header.BitsStored, header.HighBit = 16, 16, 15
    header.PixelRepresentation = 0
    return header


ANGLE = np.deg2rad(20)
ORIENTATIONS = {
    "axial": AXIAL,
    "feet first": ((-1, 0, 0), (0, 1, 0)),
    "coronal": ((1, 0, 0), (0, 0, -1)),
    "sagittal": ((0, 1, 0), (0, 0, -1)),
    "oblique": ((1, 0, 0), (0, np.cos(ANGLE), np.sin(ANGLE))),
}


@pytest.mark.parametrize("name", ORIENTATIONS)
def test_voxels_lie_where_another_reader_puts_them(tmp_path: Path, name: str) -> None:
    hu = voxels()
    folder = write_series(tmp_path / "ct", hu, axes=ORIENTATIONS[name])
    read = read_image(folder)
    files = sitk.ImageSeriesReader.GetGDCMSeriesFileNames(str(folder))
    other = sitk.ReadImage(files)
    for index in np.ndindex(*other.GetSize()):
        x, y, z = other.TransformIndexToPhysicalPoint([int(i) for i in index])
        place = np.linalg.inv(read.volume.grid.matrix) @ [z, -y, -x, 1]
        at = np.rint(place[:3]).astype(int)
        assert np.allclose(place[:3], at, atol=1e-3)
        assert read.volume.array[tuple(at)] == other.GetPixel(*(int(i) for i in index))
    assert read.volume.array.dtype == np.int16
    assert read_grid(folder) == read.volume.grid
    assert read.note == ""


def compress(path: Path, syntax: str) -> None:
    """By pydicom's own encoders, or by GDCM in SimpleITK."""
    header = pydicom.dcmread(path)
    if syntax in ("RLELossless", "JPEGLSLossless"):
        header.compress(getattr(pydicom.uid, syntax), generate_instance_uid=False)
    else:
        writer = sitk.ImageFileWriter()
        writer.SetImageIO("GDCMImageIO")
        writer.SetFileName(str(path))
        writer.UseCompressionOn()
        writer.SetCompressor("JPEG" if syntax == "JPEGLosslessSV1" else "JPEG2000")
        writer.Execute(sitk.GetImageFromArray(header.pixel_array))
        written = pydicom.dcmread(path)
        header.PixelData = written.PixelData
        header["PixelData"].is_undefined_length = True
        header.file_meta.TransferSyntaxUID = written.file_meta.TransferSyntaxUID
    assert header.file_meta.TransferSyntaxUID == getattr(pydicom.uid, syntax)
    header.save_as(path)


SYNTAXES = ("RLELossless", "JPEG2000Lossless", "JPEGLSLossless", "JPEGLosslessSV1")


@pytest.mark.parametrize("syntax", SYNTAXES)
def test_compressed_pixels_are_the_same(tmp_path: Path, syntax: str) -> None:
    folder = write_series(tmp_path / "ct", voxels((3, 64, 48)))  # GDCM dies of tiny ones
    plain = read_image(folder)
    for path in folder.iterdir():
        compress(path, syntax)
    read = read_image(folder)
    assert np.array_equal(read.volume.array, plain.volume.array)
    assert read.volume.grid == plain.volume.grid


def test_a_multi_frame_file_is_read_as_its_slices_are(tmp_path: Path) -> None:
    hu = voxels()
    slices = read_image(write_series(tmp_path / "slices", hu))
    header = _header(3, 0)
    header.SOPClassUID = f"{CT}.1"
    header.Rows, header.Columns, header.NumberOfFrames = *hu.shape[1:], len(hu)
    shared, frames = pydicom.Dataset(), []
    shared.PixelMeasuresSequence = [pydicom.Dataset()]
    shared.PixelMeasuresSequence[0].PixelSpacing = [0.8, 0.7]
    shared.PlaneOrientationSequence = [pydicom.Dataset()]
    shared.PlaneOrientationSequence[0].ImageOrientationPatient = [1, 0, 0, 0, 1, 0]
    order = np.random.default_rng(0).permutation(len(hu))
    for z in order:
        frame = pydicom.Dataset()
        frame.PlanePositionSequence = [pydicom.Dataset()]
        frame.PlanePositionSequence[0].ImagePositionPatient = [-50, -60, 20 + 2.5 * float(z)]
        frame.PixelValueTransformationSequence = [pydicom.Dataset()]
        values = frame.PixelValueTransformationSequence[0]
        values.RescaleSlope, values.RescaleIntercept = 1, -1024
        frames.append(frame)
    header.SharedFunctionalGroupsSequence = [shared]
    header.PerFrameFunctionalGroupsSequence = frames
    header.PixelData = (hu[order].astype(np.int32) + 1024).astype(np.uint16).tobytes()
    (tmp_path / "multi").mkdir()
    header.save_as(tmp_path / "multi" / "one", enforce_file_format=True)
    read = read_image(tmp_path / "multi")
    assert np.array_equal(read.volume.array, slices.volume.array)
    assert read.volume.grid == slices.volume.grid


def test_what_lies_beside_the_series_is_left_out_and_said(tmp_path: Path) -> None:
    folder = write_series(tmp_path / "ct", voxels())

    def localiser(header: Any, z: int) -> None:
        header.ImageType = ["ORIGINAL", "PRIMARY", "LOCALIZER"]

    def report(header: Any, z: int) -> None:
        header.SOPClassUID, header.Modality = "1.2.840.10008.5.1.4.1.1.88.11", "SR"

    alone = read_image(folder)
    write_series(folder / "scout", voxels((2, 7, 6)), series=1, change=localiser)
    write_series(folder / "more", voxels((1, 7, 6)), series=9, change=report)
    (folder / "Thumbs.db").write_bytes(b"x" * 200)
    read = read_image(folder)
    assert np.array_equal(read.volume.array, alone.volume.array)
    assert read.note == "left out beside the CT series: 2 localisers, 1 object of modality SR."
    assert NAME not in repr(read)


def _without_uid(header: Any, z: int) -> None:
    del header.SOPInstanceUID


def test_images_without_a_uid_are_no_copies_of_one_another(tmp_path: Path) -> None:
    usual = read_image(write_series(tmp_path / "usual", voxels()))
    read = read_image(write_series(tmp_path / "ct", voxels(), change=_without_uid))
    assert np.array_equal(read.volume.array, usual.volume.array)
    assert read.note == ""
    copy = next((tmp_path / "ct").iterdir())
    (tmp_path / "ct" / "copy").write_bytes(copy.read_bytes())
    with pytest.raises(GeometryError, match=r"2 slices or more share a place.*SOPInstanceUID"):
        read_grid(tmp_path / "ct")


def _shift(amount: Sequence[float]) -> Callable[[Any, int], object]:
    def change(header: Any, z: int) -> None:
        old = header.ImagePositionPatient
        header.ImagePositionPatient = [float(v + z * a) for v, a in zip(old, amount, strict=True)]

    return change


def _uneven(header: Any, z: int) -> None:
    if z == 3:
        header.ImagePositionPatient = [-50, -60, 20 + 2.5 * z + 0.9]


def _without_rescale(header: Any, z: int) -> None:
    del header.RescaleIntercept


def _wide(header: Any, z: int) -> None:
    if z == 2:
        header.PixelSpacing = [0.9, 0.9]


def _cut(header: Any, z: int) -> None:
    if z == 2:
        header.PixelData = header.PixelData[:10]


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (_shift((0, 0.4, 0)), "the gantry was tilted by 9.1 degrees"),
        (_uneven, "between slice 3 and 4 of 5 there are 3.40 mm, mostly 2.50 mm (uneven)"),
        (_shift((0, 0, -2.5)), "share a place"),
        (_without_rescale, "lacks position, orientation, pixel spacing, or rescale"),
        (_wide, "differ in size, pixel spacing or direction"),
        (_cut, "cannot be decoded"),
    ],
)
def test_what_cannot_be_placed_without_a_guess_is_refused(
    tmp_path: Path, change: Callable[[Any, int], object], told: str
) -> None:
    folder = write_series(tmp_path / "ct", voxels(), change=change)
    with pytest.raises(GeometryError) as caught:
        read_image(folder)
    assert told in str(caught.value)
    assert str(folder) in str(caught.value)
    assert NAME not in str(caught.value)


def test_missing_slices_are_counted(tmp_path: Path) -> None:
    folder = write_series(tmp_path / "ct", voxels())
    (folder / f"{(2 * 7919) % 1000:03d}.3.dcm").unlink()
    with pytest.raises(GeometryError, match=r"5\.00 mm, mostly 2\.50 mm \(1 slice missing\)"):
        read_image(folder)


def test_several_series_and_none_are_refused_by_number(tmp_path: Path) -> None:
    folder = write_series(tmp_path / "ct", voxels())
    write_series(folder, voxels((4, 7, 6)), series=4)
    with pytest.raises(GeometryError, match="number 3 of 5 slices; number 4 of 4 slices"):
        read_header(folder)
    (tmp_path / "empty.zip").write_bytes(b"PK\x05\x06" + b"\0" * 18)
    with pytest.raises(GeometryError, match="no CT series among 0 DICOM files"):
        read_image(tmp_path / "empty.zip")
    (tmp_path / "torn.zip").write_bytes(b"PK\x03\x04torn")
    with pytest.raises(GeometryError, match="not a readable zip file"):
        read_image(tmp_path / "torn.zip")


def test_a_series_is_known_by_the_bytes_of_its_files(tmp_path: Path) -> None:
    folder = write_series(tmp_path / "ct", voxels())
    read, stamp = read_image(folder), stamp_image(folder)
    assert read.sha256 == stamp.sha256
    folder.rename(tmp_path / "moved")
    assert stamp_image(tmp_path / "moved", stamp) is stamp
    first = next(iter((tmp_path / "moved").iterdir()))
    first.rename(first.with_name("another"))
    assert stamp_image(tmp_path / "moved").sha256 == stamp.sha256
    first.with_name("another").unlink()
    assert stamp_image(tmp_path / "moved", stamp).sha256 != stamp.sha256


def test_a_zip_file_is_its_folder(tmp_path: Path) -> None:
    folder = write_series(tmp_path / "ct", voxels())
    with zipfile.ZipFile(tmp_path / "ct.zip", "w") as packed:
        for path in folder.iterdir():
            packed.write(path, f"CD/{path.name}")
    read = read_image(tmp_path / "ct.zip")
    assert np.array_equal(read.volume.array, read_image(folder).volume.array)
    assert read.sha256 == stamp_image(tmp_path / "ct.zip").sha256


def test_a_label_map_is_written_like_a_series(tmp_path: Path) -> None:
    import nibabel as nib

    folder = write_series(tmp_path / "ct", voxels(), axes=ORIENTATIONS["oblique"])
    read = read_image(folder)
    labels = Volume((read.volume.array > 0).astype(np.uint8), read.volume.grid)
    write_like(tmp_path / "labels.nii.gz", labels, folder, names={1: "liver"})
    written = read_image(tmp_path / "labels.nii.gz")
    assert np.array_equal(written.volume.array, labels.array)
    assert np.allclose(nib.load(tmp_path / "labels.nii.gz").affine, read.file_affine, atol=1e-4)


def test_predict_takes_a_series_or_a_folder_of_them(tmp_path: Path) -> None:
    write_series(tmp_path / "all" / "p1", voxels())
    write_series(tmp_path / "all" / "p2" / "DICOM" / "0001", voxels())
    (tmp_path / "all" / "notes").mkdir()
    left: list[str] = []
    found = find_inputs(tmp_path / "all", left=left)
    assert found == {name: tmp_path / "all" / name for name in ("p1", "p2")}
    assert left == [f"{tmp_path / 'all'}: Folders without NIfTI files: notes."]
    assert find_inputs(tmp_path / "all" / "p1") == {"p1": tmp_path / "all" / "p1"}


@pytest.mark.parametrize("axes", [AXIAL, ORIENTATIONS["oblique"]], ids=["axial", "oblique"])
def test_a_segmentation_is_where_an_independent_reader_puts_it(
    tmp_path: Path, axes: Sequence[Sequence[float]]
) -> None:
    hd = pytest.importorskip("highdicom")
    folder = write_series(tmp_path / "ct", voxels(), axes=axes)
    read = read_image(folder)
    array = np.zeros(read.volume.grid.shape, dtype=np.uint8)
    array[1:3, 2:5, 1:4], array[3, 1, 2] = 2, 7
    labels = tmp_path / "labels.nii.gz"
    write_like(labels, Volume(array, read.volume.grid), folder)
    ids = {"liver": 1, "kidney_left": 2, "my organ": 7}
    colours = {"liver": (1, 2, 3), "kidney_left": (200, 30, 40), "my organ": (5, 6, 7)}
    assert write_segmentation(tmp_path / "seg.dcm", labels, folder, ids, colours)

    found = hd.seg.segread(tmp_path / "seg.dcm")
    assert [d.SegmentLabel for d in found.SegmentSequence] == ["kidney_left", "my organ"]
    kind = found.SegmentSequence[0].SegmentedPropertyTypeCodeSequence[0]
    side = kind.SegmentedPropertyTypeModifierCodeSequence[0]
    assert (kind.CodeValue, side.CodeMeaning) == ("64033007", "Left")
    shown = found.get_segment_description(1).RecommendedDisplayCIELabValue
    assert np.allclose(hd.color.CIELabColor.from_dicom_value(shown).to_rgb(), (200, 30, 40), atol=2)
    referred = found.ReferencedSeriesSequence[0].ReferencedInstanceSequence
    uids = {one.ReferencedSOPInstanceUID for one in referred}
    assert uids == {f"{ROOT}3.{z + 1}" for z in range(SHAPE[0])}
    volume = found.get_volume(combine_segments=True)
    for index in np.argwhere(volume.array > 0):
        x, y, z, _ = volume.affine @ [*index, 1]  # LPS+
        at = np.linalg.inv(read.volume.grid.matrix) @ [z, -y, -x, 1]
        organ = array[tuple(np.rint(at[:3]).astype(int))]
        assert organ == {1: 2, 2: 7}[int(volume.array[tuple(index)])]
    assert np.count_nonzero(volume.array) == np.count_nonzero(array)

    write_like(labels, Volume(np.zeros_like(array), read.volume.grid), folder)
    assert not write_segmentation(tmp_path / "none.dcm", labels, folder, ids, colours)
    assert not (tmp_path / "none.dcm").exists()


@pytest.mark.parametrize(
    ("image", "label", "found"),
    [
        ("ct/{}", "seg/{}.nii.gz", ("ct/{case}", "seg/{case}.nii.gz")),
        ("{}/dicom", "{}/label.nii.gz", ("{case}/dicom", "{case}/label.nii.gz")),
    ],
)
def test_init_finds_images_that_are_series(
    tmp_path: Path, image: str, label: str, found: tuple[str, str]
) -> None:
    for case in ("p1", "p2"):
        folder = write_series(tmp_path / image.format(case), voxels())
        read = read_image(folder)
        labels = Volume((read.volume.array > 0).astype(np.uint8), read.volume.grid)
        write_like(tmp_path / label.format(case), labels, folder)
    dataset = look_at_dataset(tmp_path)
    assert (dataset.images, dataset.labels) == found
    assert list(dataset.image_files()) == ["p1", "p2"]
