"""Teachers of kind `nnunet` against nnU-Net's own inference on the same files.

Logits come from nnU-Net's own predictor, which sums windows in float16; on the grid that it
prepares ours must therefore be the very same numbers. Across grids nnU-Net resamples logits onto
the CT's grid and we resample log-odds onto the student's, both linearly.
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import numpy.typing as npt
import pytest
import torch

from pipeline.data.entries import TeacherEntry
from pipeline.data.nifti import read_image
from pipeline.data.resample import resample
from pipeline.data.volume import Grid, Orientation, Volume
from pipeline.errors import TeacherError
from pipeline.teachers.nnunet import NnunetTeacher
from pipeline.teachers.teacher import Prediction, organ_log_odds
from tests.blobs import write_blobs
from tests.nnunet_models import ORGANS
from tests.unit.teachers.teacher_contract import opened

# Making the model folders takes more than ten seconds.
pytestmark = pytest.mark.slow

LARGEST_DIFFERENCE = 1e-3
LEAST_DICE = 0.995

SCANS: dict[str, dict[str, Any]] = {
    "LPS": {"code": "LPS"},
    "RAS anisotropic": {"code": "RAS", "spacing": (1.5, 1.5, 3.0)},
    # Axes in another order, and half of the voxels are 0 HU around the patient.
    "SLA cropped": {"code": "SLA", "spacing": (2.5, 1.6, 1.8), "border": 5},
    "LIP oblique cropped": {"code": "LIP", "spacing": (1.2, 2.5, 2.0), "border": 3, "tilt": 12.0},
}


@dataclass(frozen=True)
class Own:
    """What nnU-Net itself says of a file.

    Attributes:
        logits: (C, ..) float32 on its prepared grid, in its axis order.
        labels: (k, j, i), what it would save.
        probabilities: (C, k, j, i), what it would save.
        transpose: its transpose_forward.
    """

    logits: npt.NDArray[np.float32]
    labels: npt.NDArray[Any]
    probabilities: npt.NDArray[Any]
    transpose: tuple[int, int, int]


def entry_of(kind: str, **changes: Any) -> TeacherEntry:
    values = {"kind": "nnunet", "weights": "model", **ORGANS[kind], **changes}
    return TeacherEntry.model_validate(values)


def load(model: Path, entry: TeacherEntry) -> NnunetTeacher:
    return opened(NnunetTeacher, entry, model)


def own(
    model: Path, image: Path, *, folds: Any = None, mirroring: bool = True, step: float = 0.5
) -> Own:
    """The real tool, from the folder to its outputs."""
    from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor

    with contextlib.redirect_stdout(io.StringIO()):
        predictor = nnUNetPredictor(
            tile_step_size=step,
            use_mirroring=mirroring,
            device=torch.device("cpu"),
            allow_tqdm=False,
        )
        predictor.initialize_from_trained_model_folder(str(model), folds)
        data, _, properties = predictor.configuration_manager.preprocessor_class(False).run_case(
            [str(image)],
            None,
            predictor.plans_manager,
            predictor.configuration_manager,
            predictor.dataset_json,
        )
        logits = predictor.predict_logits_from_preprocessed_data(torch.from_numpy(data))
        from nnunetv2.inference.export_prediction import (
            convert_predicted_logits_to_segmentation_with_correct_shape,
        )

        labels, probabilities = convert_predicted_logits_to_segmentation_with_correct_shape(
            logits,
            predictor.plans_manager,
            predictor.configuration_manager,
            predictor.label_manager,
            properties,
            return_probabilities=True,
        )
    a, b, c = predictor.plans_manager.transpose_forward
    return Own(logits.float().numpy(), labels, probabilities, (a, b, c))


def difference(
    said: Prediction, seen: Orientation, entry: TeacherEntry, theirs: Own
) -> tuple[float, bool]:
    """Largest difference of log-odds on nnU-Net's prepared grid; whether regions are the same."""
    transposed = Orientation(axes=theirs.transpose)
    ours = organ_log_odds(said, entry, where="test")
    grid = transposed.apply(seen.apply(said.logits)).grid
    expected = organ_log_odds(Prediction(Volume(theirs.logits, grid)), entry, where="test")
    worst, same = 0.0, True
    for organ, odds in ours.items():
        mine = transposed.apply(seen.apply(odds)).array
        worst = max(worst, float(np.abs(mine - expected[organ].array).max()))
        same &= bool(np.array_equal(mine > 0, expected[organ].array > 0))
    return worst, same


def dice(a: npt.NDArray[np.bool_], b: npt.NDArray[np.bool_]) -> float:
    assert a.any()
    return float(2 * np.count_nonzero(a & b) / (np.count_nonzero(a) + np.count_nonzero(b)))


def regions_on_native_grid(
    said: Prediction, image: Volume, entry: TeacherEntry, seen: Orientation
) -> Mapping[str, npt.NDArray[np.bool_]]:
    """Ours, on a student grid that is the CT's own, in the axis order of the file."""
    regions = {}
    for organ, odds in organ_log_odds(said, entry, where="test").items():
        native = resample(odds, image.grid, order=1, outside=np.nan)
        regions[organ] = seen.apply(native).array > 0
    return regions


@pytest.mark.parametrize(
    ("kind", "scan"),
    [
        *(("labels", scan) for scan in SCANS),
        ("regions", "LPS"),
        ("regions", "LIP oblique cropped"),
        ("2d", "RAS anisotropic"),
        ("2d", "SLA cropped"),
    ],
)
def test_the_same_numbers_as_nnunet(
    kind: str,
    scan: str,
    nnunet_models: Mapping[str, Path],
    tmp_path: Path,
    record_property: Any,
) -> None:
    path = tmp_path / "scan.nii.gz"
    write_blobs(path, shape=(52, 45, 50), seed=9, **SCANS[scan])
    # Mirroring multiplies the cost by eight; it has its own test.
    image, entry = read_image(path).volume, entry_of(kind, nnunet={"mirroring": False})
    said = load(nnunet_models[kind], entry).predict(image)
    theirs = own(nnunet_models[kind], path, mirroring=False)
    worst, same = difference(said, image.stored, entry, theirs)
    record_property("largest difference", worst)
    assert worst < LARGEST_DIFFERENCE
    assert same
    for organ, mine in regions_on_native_grid(said, image, entry, image.stored).items():
        channel = entry.organs[organ][0]
        by_probability = dice(mine, theirs.probabilities[channel] > 0.5)
        record_property(f"Dice {organ}", by_probability)
        assert by_probability >= LEAST_DICE
        if kind == "regions":
            continue
        # Its label map takes the largest of three, our region what is more likely than not.
        by_label = dice(mine, theirs.labels == channel)
        record_property(f"Dice {organ}, label map", by_label)
        assert by_label >= 0.99


def one_slice(path: Path) -> Volume:
    write_blobs(path, shape=(52, 45, 50), seed=9)
    scan: Any = nib.load(path)
    nib.save(scan.slicer[:, :, 24:25], path)
    return read_image(path).volume


def test_one_slice_gets_the_numbers_of_nnunets_2d_configuration(
    nnunet_models: Mapping[str, Path], tmp_path: Path
) -> None:
    path = tmp_path / "slice.nii.gz"
    image, entry = one_slice(path), entry_of("2d", nnunet={"mirroring": False})
    said = load(nnunet_models["2d"], entry).predict(image)
    worst, same = difference(
        said, image.stored, entry, own(nnunet_models["2d"], path, mirroring=False)
    )
    assert worst < LARGEST_DIFFERENCE
    assert same


def test_one_slice_is_refused_by_a_3d_configuration(
    nnunet_models: Mapping[str, Path], tmp_path: Path
) -> None:
    image = one_slice(tmp_path / "slice.nii.gz")
    with pytest.raises(TeacherError, match="configuration 3d_fullres sees volumes"):
        load(nnunet_models["labels"], entry_of("labels")).predict(image)
    across = Volume(image.array.transpose(1, 0, 2), Grid.axis_aligned((45, 1, 52), (2, 2, 2)))
    with pytest.raises(TeacherError, match="2d sees slices across another axis"):
        load(nnunet_models["2d"], entry_of("2d")).predict(across)


@pytest.mark.parametrize("kind", ["labels", "regions"])
def test_thick_slices_that_nnunet_exports_without_interpolating_between_them(
    kind: str, nnunet_models: Mapping[str, Path], tmp_path: Path, record_property: Any
) -> None:
    # More than three times as thick as wide: across slices nnU-Net takes the nearest value, in its
    # preparation and in its export. Ours interpolates; taking the nearest too, it is the same.
    path = tmp_path / "scan.nii.gz"
    write_blobs(path, shape=(52, 45, 50), seed=9, code="LPS", spacing=(1.5, 1.5, 5.0))
    image, entry = read_image(path).volume, entry_of(kind, nnunet={"mirroring": False})
    said = load(nnunet_models[kind], entry).predict(image)
    theirs = own(nnunet_models[kind], path, mirroring=False)
    worst, same = difference(said, image.stored, entry, theirs)
    record_property("largest difference", worst)
    assert worst < LARGEST_DIFFERENCE
    assert same
    for organ, odds in organ_log_odds(said, entry, where="test").items():
        wanted = theirs.probabilities[entry.organs[organ][0]] > 0.5
        linear = image.stored.apply(resample(odds, image.grid, order=1)).array > 0
        record_property(f"Dice {organ}", dice(linear, wanted))
        in_plane = resample(odds, image.grid.with_shape((odds.grid.shape[0], 45, 52)), order=1)
        nearest = image.stored.apply(resample(in_plane, image.grid, order=0)).array > 0
        record_property(f"Dice {organ}, nearest across slices", dice(nearest, wanted))
        assert dice(nearest, wanted) >= LEAST_DICE
        assert dice(linear, wanted) >= 0.9


def test_on_another_student_grid(
    nnunet_models: Mapping[str, Path], tmp_path: Path, record_property: Any
) -> None:
    # A scan at the spacing of the plans, so that nnU-Net resamples nothing: then a single linear
    # interpolation lies between its probabilities and the student grid, as it does for ours.
    path = tmp_path / "scan.nii.gz"
    write_blobs(path, shape=(52, 45, 50), seed=9, code="SLA", tilt=12.0)
    image, entry = read_image(path).volume, entry_of("labels", nnunet={"mirroring": False})
    said = load(nnunet_models["labels"], entry).predict(image)
    theirs = own(nnunet_models["labels"], path, mirroring=False)
    grid = image.grid.with_spacing((2.5, 2.2, 2.2))
    for organ, odds in organ_log_odds(said, entry, where="test").items():
        p = np.clip(theirs.probabilities[entry.organs[organ][0]].astype(np.float64), 1e-12, 1)
        exported = np.log(p) - np.log(np.clip(1 - p, 1e-12, 1))
        native = image.stored.apply(image).grid
        wanted = resample(Volume(exported, native), grid, order=1).array
        mine = resample(odds, grid, order=1, outside=np.nan).array
        found = dice(mine > 0, wanted > 0)
        record_property(f"Dice {organ}", found)
        assert found >= LEAST_DICE


@pytest.mark.parametrize(
    ("options", "arguments"),
    [
        ({}, {}),
        ({"folds": [1]}, {"folds": (1,)}),
        ({"mirroring": False, "tile_step": 0.1}, {"mirroring": False, "step": 0.1}),
    ],
)
def test_settings_mean_what_they_mean_to_nnunet(
    options: dict[str, Any],
    arguments: dict[str, Any],
    nnunet_models: Mapping[str, Path],
    tmp_path: Path,
    record_property: Any,
) -> None:
    path = tmp_path / "scan.nii.gz"
    write_blobs(path, shape=(30, 36, 34), seed=3)
    image, entry = read_image(path).volume, entry_of("labels", nnunet=options)
    said = load(nnunet_models["labels"], entry).predict(image)
    theirs = own(nnunet_models["labels"], path, **arguments)
    worst, same = difference(said, image.stored, entry, theirs)
    record_property("largest difference", worst)
    assert worst < LARGEST_DIFFERENCE
    assert same
