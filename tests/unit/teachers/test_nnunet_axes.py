"""In which order of axes nnU-Net gets its images, and where its answers lie."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from pipeline.data.nifti import read_image
from pipeline.data.volume import Orientation, Volume
from tests.blobs import write_blobs
from tests.nnunet_models import copy_model
from tests.tiny import change_json
from tests.unit.teachers.test_nnunet_parity import (
    LARGEST_DIFFERENCE,
    difference,
    entry_of,
    load,
    own,
)

# Making the model folders takes more than ten seconds.
pytestmark = pytest.mark.slow


@pytest.mark.parametrize(
    ("reader", "code"),
    [
        ("SimpleITKIO", "SLA"),
        ("NibabelIO", "SLA"),
        ("NibabelIOWithReorient", "RAS"),
        ("SimpleITKIOWithReorient", "RAS"),
    ],
)
def test_each_image_reader_of_nnunet(
    reader: str,
    code: str,
    nnunet_models: Mapping[str, Path],
    tmp_path: Path,
    record_property: Any,
) -> None:
    model = copy_model(nnunet_models["regions"], tmp_path)
    change_json(model / "plans.json", lambda plans: plans.update(image_reader_writer=reader))
    path = tmp_path / "scan.nii.gz"
    write_blobs(path, shape=(30, 36, 34), code="SLA", spacing=(3.0, 1.5, 1.7), tilt=12.0)
    image, entry = read_image(path).volume, entry_of("regions", nnunet={"mirroring": False})
    said = load(model, entry).predict(image)
    seen = Orientation.from_code(code)
    worst, same = difference(said, seen, entry, own(model, path, mirroring=False))
    record_property("largest difference", worst)
    assert worst < LARGEST_DIFFERENCE
    assert same


def test_a_fixed_orientation_makes_the_order_of_the_file_irrelevant(
    nnunet_models: Mapping[str, Path], tmp_path: Path
) -> None:
    path = tmp_path / "scan.nii.gz"
    write_blobs(path, shape=(30, 36, 34), code="LPS")
    image = read_image(path).volume
    flipped = Volume(image.array, image.grid, Orientation.from_code("SAR"))

    def logits(volume: Volume, orientation: str) -> npt.NDArray[Any]:
        options = {"mirroring": False, "orientation": orientation, "folds": [0]}
        teacher = load(nnunet_models["labels"], entry_of("labels", nnunet=options))
        return teacher.predict(volume).logits.array

    as_stored = logits(image, "stored")
    np.testing.assert_array_equal(logits(image, "LPS"), as_stored)
    np.testing.assert_array_equal(logits(flipped, "LPS"), as_stored)
    # The network is none that looks the same from all sides.
    assert np.abs(logits(flipped, "stored") - as_stored).max() > 0.1


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_every_voxel_lies_where_its_grid_says(
    axis: int, nnunet_models: Mapping[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A ramp in mm, not normalised, and a network that hands its input on: values are places.
    model = copy_model(nnunet_models["regions"], tmp_path)

    def plain(plans: dict[str, Any]) -> None:
        configuration = plans["configurations"]["3d_fullres"]
        configuration["normalization_schemes"] = ["NoNormalization"]
        configuration["resampling_fn_data_kwargs"]["order"] = 1

    change_json(model / "plans.json", plain)
    path = tmp_path / "scan.nii.gz"
    write_blobs(path, shape=(33, 41, 37), code="ILP", spacing=(2.3, 1.7, 1.9), border=4, tilt=20.0)
    image = read_image(path).volume
    teacher = load(model, entry_of("regions"))
    monkeypatch.setattr(
        teacher.predictor, "predict_logits_from_preprocessed_data", lambda data: data
    )
    places = np.indices(image.grid.shape).reshape(3, -1)
    mm = (image.grid.matrix[axis, :3] @ places + image.grid.matrix[axis, 3]) + 500
    ramp = np.where(image.array == 0, 0, mm.reshape(image.grid.shape)).astype(np.float32)
    logits = teacher.predict(Volume(ramp, image.grid, image.stored)).logits
    assert logits.grid.shape != image.grid.shape
    indices = np.indices(logits.grid.shape).reshape(3, -1)
    expected = (logits.grid.matrix[axis, :3] @ indices + logits.grid.matrix[axis, 3]) + 500
    inner = (slice(3, -3),) * 3
    found = logits.array[0][inner]
    np.testing.assert_allclose(found, expected.reshape(logits.grid.shape)[inner], atol=1e-2)
