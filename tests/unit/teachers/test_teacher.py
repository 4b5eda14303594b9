from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from pipeline.data.entries import TeacherEntry
from pipeline.data.volume import Grid, Volume
from pipeline.errors import TeacherError
from pipeline.teachers.teacher import Prediction, organ_log_odds, tap_agreement

GRID = Grid.axis_aligned((3, 4, 5), (2, 2, 2))
WHERE = "liver x ct/case_001"


def entry(**changes: Any) -> TeacherEntry:
    values = {"kind": "checkpoint", "weights": "w", "organs": {"liver": 1}, **changes}
    return TeacherEntry.model_validate(values)


def prediction(num_channels: int = 2, *, feature: float = 0.0) -> Prediction:
    logits = np.random.default_rng(0).normal(size=(num_channels, *GRID.shape)).astype(np.float32)
    features = np.full((2, 2, 2, 3), feature, np.float32)
    cells = GRID.coarsen((2, 2, 2))
    return Prediction(Volume(logits, GRID), {"tap": Volume(features, cells)})


def softmax(logits: npt.NDArray[Any]) -> npt.NDArray[Any]:
    e = np.exp(logits.astype(np.float64))
    return np.asarray(e / e.sum(axis=0))


def test_several_organs_of_one_network() -> None:
    made = prediction(4)
    found = organ_log_odds(made, entry(organs={"liver": [1, 2], "spleen": 3}), where=WHERE)
    p = softmax(made.logits.array)
    for organ, chance in (("liver", p[1] + p[2]), ("spleen", p[3])):
        assert found[organ].grid == GRID
        assert found[organ].array.dtype == np.float32
        np.testing.assert_allclose(found[organ].array, np.log(chance / (1 - chance)), atol=1e-5)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("channel", [0, 1, 2])
def test_an_output_that_is_no_number(bad: float, channel: int) -> None:
    """Even in a channel that means nothing here: such a network cannot be trusted."""
    made = prediction(3)
    made.logits.array[channel, 1, 1, :2] = bad
    with pytest.raises(TeacherError, match="2 of 180 logits are NaN or infinite") as caught:
        organ_log_odds(made, entry(), where=WHERE)
    assert WHERE in str(caught.value)
    assert caught.value.exit_code == 2


def test_a_feature_that_is_no_number() -> None:
    with pytest.raises(TeacherError, match="features of tap are NaN") as caught:
        organ_log_odds(prediction(feature=np.nan), entry(), where=WHERE)
    assert WHERE in str(caught.value)


class Pools:
    """Two features: the mean of each cell of 2 voxels, and that times a sign that depends on where
    in the image it is given the cell lies, as of a layer that knows its window's borders."""

    spacing_mm = None
    sizes: tuple[int, ...] = (2, 8, 8)

    def predict(self, image: Volume) -> Prediction:
        if any(n < m for n, m in zip(image.grid.shape, self.sizes, strict=True)):
            raise TeacherError("too small.", where="here", fix="Give more.")
        d, h, w = (n // 2 * 2 for n in image.grid.shape)
        whole = image.array[:d, :h, :w].astype(np.float32)
        mean = whole.reshape(d // 2, 2, h // 2, 2, w // 2, 2).mean(axis=(1, 3, 5))
        sign = 1 - 2 * (np.indices(mean.shape).sum(axis=0) % 2)
        cells = image.grid.coarsen((2, 2, 2)).crop((0, 0, 0), mean.shape)
        features = {"local": mean[None], "placed": np.stack([mean * sign, mean * 0])}
        return Prediction(
            Volume(image.array[None], image.grid),
            {tap: Volume(array, cells) for tap, array in features.items()},
        )

    def describe(self) -> dict[str, Any]:
        return {}


class TestAgreement:
    SMOOTH = np.sin(np.indices((12, 20, 24)).sum(axis=0) / 6)
    IMAGE = Volume((1000 * SMOOTH).astype(np.int16), Grid.axis_aligned((12, 20, 24), (3, 2, 2)))

    def test_it_tells_a_layer_of_the_place_from_one_of_the_window(self) -> None:
        whole = Pools().predict(self.IMAGE).features
        found = tap_agreement(Pools(), self.IMAGE, whole, (8, 8, 8), seed=0, num_patches=6)
        assert found["local"] > 0.95
        assert found["placed"] < 0.5  # the channel that never varies says nothing of it
        again = tap_agreement(Pools(), self.IMAGE, whole, (8, 8, 8), seed=0, num_patches=6)
        assert again == found

    def test_an_image_that_is_no_larger_than_a_patch(self) -> None:
        flat = replace(
            self.IMAGE,
            array=self.IMAGE.array[:4],
            grid=self.IMAGE.grid.crop((0, 0, 0), (4, 20, 24)),
        )
        whole = Pools().predict(flat).features
        assert tap_agreement(Pools(), flat, whole, (4, 20, 24), seed=1)["local"] > 0.9

    def test_what_cannot_be_told_is_not(self) -> None:
        whole = Pools().predict(self.IMAGE).features
        assert tap_agreement(Pools(), self.IMAGE, whole, (1, 8, 8), seed=0) == {}
        assert tap_agreement(Pools(), self.IMAGE, {}, (8, 8, 8), seed=0) == {}
        unseen = {tap: Volume(v.array * np.nan, v.grid) for tap, v in whole.items()}
        assert tap_agreement(Pools(), self.IMAGE, unseen, (8, 8, 8), seed=0) == {}
