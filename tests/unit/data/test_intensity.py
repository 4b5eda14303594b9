"""What a network is shown, and that new settings leave old digests alone."""

from __future__ import annotations

import numpy as np
import pytest
from monai.transforms import NormalizeIntensity, ScaleIntensityRange
from pydantic import ValidationError

from pipeline.config import digest
from pipeline.data.entries import TeacherEntry
from pipeline.data.labels import Intensity, is_ct
from tests.tiny import teacher_data

HU = np.arange(-1100, 1200, 7).astype(np.int16)


@pytest.mark.parametrize("scaled_to", [(-1.0, 1.0), (0.0, 1.0), (0.0, 255.0)])
def test_a_window_is_what_monai_makes_of_it(scaled_to: tuple[float, float]) -> None:
    ours = Intensity(window_hu=(-57, 164), scaled_to=scaled_to).apply(HU)
    theirs = ScaleIntensityRange(-57, 164, *scaled_to, clip=True)(HU.astype(np.float32))
    assert ours.dtype == np.float32
    np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-6)


def test_zscore_is_nnunets_ct_normalisation() -> None:
    """Clip to percentiles, subtract the mean, divide by the deviation: all from the plans."""
    ours = Intensity(kind="zscore", window_hu=(-57, 164), mean_hu=101.5, std_hu=42.25).apply(HU)
    clipped = HU.astype(np.float32).clip(-57, 164)
    theirs = NormalizeIntensity(subtrahend=101.5, divisor=42.25)(clipped)
    np.testing.assert_allclose(ours, theirs, rtol=1e-6)


def test_padding_is_air_in_the_networks_units() -> None:
    assert Intensity(scaled_to=(0, 1)).air == 0
    assert Intensity().air == -1
    assert Intensity(kind="raw").air == -1024


def test_a_window_upside_down() -> None:
    with pytest.raises(ValidationError, match="low < high"):
        Intensity(scaled_to=(1, 0))


@pytest.mark.parametrize(
    ("says", "names"),
    [
        (True, ["CT", "ct", "CT_venous", "CBCT", "CTA", "low-dose CT", "PET/CT"]),
        (False, ["MR", "MRI", "T1", "T1w", "t2-weighted", "FLAIR", "DCE_MRI", "ADC", "PET", "US"]),
        (None, ["", "image", "zscore", "noNorm", "rescale_to_0_1", "0", "venous", "T12", "active"]),
    ],
)
def test_whether_a_channel_is_ct(says: bool | None, names: list[str]) -> None:
    assert [is_ct(name) for name in names] == [says] * len(names)


def test_new_fields_at_their_default_leave_old_digests_alone() -> None:
    before = {"kind": "window", "window_hu": [-160.0, 240.0], "mean_hu": 0.0, "std_hu": 1.0}
    assert Intensity().model_dump(mode="json") == before
    assert Intensity(scaled_to=(-1, 1)).model_dump(mode="json") == before
    assert digest(Intensity()) == digest(before)
    assert Intensity(scaled_to=(0, 1)).model_dump(mode="json") == before | {"scaled_to": [0.0, 1.0]}
    other = Intensity(scaled_to=(0, 1))
    assert Intensity.model_validate_json(other.model_dump_json()) == other
    key = TeacherEntry.model_validate(teacher_data("liver")).key()
    assert "orientation" not in key
    assert "scaled_to" not in key["intensity"]
