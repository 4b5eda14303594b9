"""Predict: a DICOM SEG beside the label map of a DICOM series."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from pipeline.errors import ConfigError
from pipeline.figures import colour_of
from stages.report import StageReport
from tests.stages.stage_contract import snapshot
from tests.stages.test_predict import ORGANS, threshold, threshold_of, write_ct, write_student
from tests.stages.test_predict_many import run
from tests.unit.data.test_dicom import ROOT, SHAPE, voxels, write_series

__all__ = ["threshold", "threshold_of"]  # fixtures

hd = pytest.importorskip("highdicom")


@pytest.fixture
def student(tmp_path: Path) -> Path:
    return write_student(tmp_path / "student.pt")


def seg(student: Path, images: Path, *, dicom_seg: bool = True) -> StageReport:
    return run(student, images, student.parent / "out", dicom_seg=dicom_seg)


@pytest.mark.usefixtures("threshold")
def test_it_is_one_of_the_files_of_its_case(student: Path, tmp_path: Path) -> None:
    """Made once, though its bytes would differ each time; and gone with the label map."""
    write_student(student, spacing_mm=(2.5, 0.8, 0.7))
    images, out = write_series(tmp_path / "in" / "p1", voxels()), tmp_path / "out"
    assert seg(student, images).done == ["p1"]
    found = hd.seg.segread(out / "p1.seg.dcm")
    assert [d.SegmentLabel for d in found.SegmentSequence] == ["liver"]
    shown = found.get_segment_description(1).RecommendedDisplayCIELabValue
    rgb = hd.color.CIELabColor.from_dicom_value(shown).to_rgb()
    assert np.allclose(rgb, colour_of(ORGANS["liver"]), atol=2)
    liver = np.asarray(nib.load(out / "p1.nii.gz").dataobj) == ORGANS["liver"]
    assert found.get_volume().array.sum() == liver.sum() > 0
    referred = found.ReferencedSeriesSequence[0].ReferencedInstanceSequence
    assert {one.ReferencedSOPInstanceUID for one in referred} == {
        f"{ROOT}3.{z + 1}" for z in range(SHAPE[0])
    }
    assert "Doe" not in (out / "p1.json").read_text()
    assert set(json.loads((out / "p1.json").read_text())["files"]) == {"p1.nii.gz", "p1.seg.dcm"}

    before = snapshot(out)
    assert seg(student, images).skipped == seg(student, images, dicom_seg=False).skipped == ["p1"]
    assert snapshot(out) == before
    whole = (out / "p1.seg.dcm").read_bytes()
    (out / "p1.seg.dcm").write_bytes(whole[:-20])
    assert seg(student, images).done == ["p1"]
    (out / "p1.seg.dcm").write_bytes(whole)
    assert "it was changed since `pipeline predict`" in str(seg(student, images).failed["p1"])
    (out / "p1.seg.dcm").unlink()
    assert seg(student, images).done == ["p1"]
    write_student(student, spacing_mm=(2.5, 0.8, 0.7), seed=1)
    again = seg(student, images, dicom_seg=False)
    assert again.details["replaced"] == {"p1": "of another student, whose DICOM SEG is removed"}
    assert not (out / "p1.seg.dcm").exists()


# Beside this Python, which need not be on the PATH.
DCMQI = shutil.which("segimage2itkimage", path=str(Path(sys.executable).parent))


@pytest.mark.skipif(DCMQI is None, reason="dcmqi is absent: pip install it")
@pytest.mark.usefixtures("threshold")
def test_dcmqi_reads_voxels_names_and_colours_as_they_were_written(
    student: Path, tmp_path: Path
) -> None:
    """What 3D Slicer reads a DICOM SEG with; it shares no code with highdicom and pydicom."""
    write_student(student, spacing_mm=(2.5, 0.8, 0.7))
    images, out = write_series(tmp_path / "in" / "p1", voxels()), tmp_path / "out"
    assert seg(student, images).done == ["p1"]
    command = [str(DCMQI), "--inputDICOM", out / "p1.seg.dcm", "--outputType", "nifti"]
    subprocess.run([*command, "--outputDirectory", tmp_path], check=True, capture_output=True)
    ours, theirs = nib.load(out / "p1.nii.gz"), nib.load(tmp_path / "1.nii.gz")
    assert np.allclose(
        nib.as_closest_canonical(theirs).affine, nib.as_closest_canonical(ours).affine
    )
    liver = np.asarray(nib.as_closest_canonical(ours).dataobj) == ORGANS["liver"]
    assert np.array_equal(np.asarray(nib.as_closest_canonical(theirs).dataobj) > 0, liver)
    ((described,),) = json.loads((tmp_path / "meta.json").read_text())["segmentAttributes"]
    assert described["SegmentLabel"] == "liver"
    assert described["SegmentedPropertyTypeCodeSequence"]["CodeMeaning"] == "Liver"
    assert np.allclose(described["recommendedDisplayRGBValue"], colour_of(ORGANS["liver"]), atol=2)


@pytest.mark.usefixtures("threshold")
def test_of_no_organ_there_is_none_and_a_line_says_so(
    student: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    images = write_series(tmp_path / "in" / "p1", np.full(SHAPE, -900, np.int16))
    assert seg(student, images).done == ["p1"]
    assert "p1: no organ was found, of which there is no DICOM SEG." in capsys.readouterr().err
    assert not (tmp_path / "out" / "p1.seg.dcm").exists()
    assert seg(student, images).skipped == ["p1"]


@pytest.mark.usefixtures("threshold")
def test_images_without_a_series_are_refused_before_anything_is_computed(
    student: Path, tmp_path: Path
) -> None:
    write_series(tmp_path / "in" / "p1", voxels())
    write_ct(tmp_path / "in" / "p2.nii.gz")
    with pytest.raises(ConfigError) as caught:
        seg(student, tmp_path / "in")
    assert f"these are none: {tmp_path / 'in' / 'p2.nii.gz'}. Give the" in str(caught.value)
    assert not (tmp_path / "out").exists()
    series = write_series(student.parent / "out", voxels())
    with pytest.raises(ConfigError, match="would become part of this series"):
        seg(student, series)
