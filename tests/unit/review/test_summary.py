"""`summary.json`: nnU-Net's own code reads it, and computes the same numbers."""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import nibabel as nib
import numpy as np
import pytest

from pipeline.data.volume import Grid
from pipeline.review.metrics import (
    ABSENT,
    METRICS,
    NOT_ANNOTATED,
    OrganScore,
    known,
    organ_means,
    overall_means,
    score_case,
    score_json,
    summarise,
    to_csv,
)

NAN = math.nan
IDS = {"liver": 1, "spleen": 4}


def scores() -> dict[str, Sequence[OrganScore]]:
    return {
        "a/1": [
            OrganScore("liver", 0.9, 1.0, 2.0, 100, 80, "", 81, 1000),
            OrganScore.missing("spleen", ABSENT, num_voxels=1000),
        ],
        "a/2": [
            OrganScore("liver", 0.5, 0.4, 6.0, 80, 40, "", 30, 1000),
            OrganScore.missing("spleen", NOT_ANNOTATED),
        ],
        "b/1": [
            OrganScore.missing("liver", ABSENT, num_predicted=7, num_voxels=900),
            OrganScore("spleen", 0.2, 0.1, 10.0, 5, 5, "", 1, 900),
        ],
    }


def test_means_leave_nan_out_and_count_it() -> None:
    summary = summarise(scores(), IDS)
    liver, spleen = summary["mean"]["1"], summary["mean"]["4"]
    assert [row["case"] for row in summary["metric_per_case"]] == ["a/1", "a/2", "b/1"]
    # Of cases without the organ, those with false positives have a Dice, of 0.
    assert liver["Dice"] == pytest.approx((2 * 81 / 180 + 0.5 + 0) / 3)
    assert (liver["NSD"], liver["HD95_mm"]) == (pytest.approx(0.7), 4.0)
    assert (liver["num_cases"], liver["num_missing"]) == (3, 0)
    assert liver["FP"] == pytest.approx((-1 + 10 + 7) / 3)
    assert (spleen["Dice"], spleen["num_cases"], spleen["num_missing"]) == (0.2, 1, 2)
    # What nobody annotated is no true negative either.
    assert spleen["TN"] == pytest.approx((1000 + 891) / 2)
    assert summary["foreground_mean"]["Dice"] == pytest.approx((liver["Dice"] + 0.2) / 2)
    assert summary["metric_per_case"][1]["reasons"] == {"4": NOT_ANNOTATED}
    assert all(math.isnan(v) for v in summary["metric_per_case"][1]["metrics"]["4"].values())


def test_an_organ_without_any_value_spoils_no_mean() -> None:
    summary = summarise({"a/1": [OrganScore("liver", 0.8, NAN, NAN, 10, 10, "", 8, 99)]}, IDS)
    assert math.isnan(summary["mean"]["4"]["Dice"])
    assert summary["foreground_mean"]["Dice"] == pytest.approx(0.8)
    assert organ_means(summary)["spleen"]["Dice"] is None
    assert overall_means(summary)["NSD"] is None
    nothing = summarise({}, IDS)
    assert set(overall_means(nothing).values()) == {None}
    assert organ_means(nothing)["liver"]["num_missing"] == 0


def grid_of(labels: Any) -> Grid:
    return Grid.axis_aligned(labels.shape, (3, 1, 2))


@pytest.mark.parametrize("in_reference", [0, 12])
@pytest.mark.parametrize("in_prediction", [0, 9])
def test_evaluate_and_compare_count_dice_alike(in_prediction: int, in_reference: int) -> None:
    """A summary is what the one writes, `score_json` what the other does."""
    prediction, reference = np.zeros((2, 3, 4, 5), dtype=np.uint8)
    prediction.flat[:in_prediction] = reference.flat[:in_reference] = 4
    found = score_case(prediction, reference, {"spleen": 4}, grid_of(reference))
    (row,) = summarise({"a/1": found}, {"spleen": 4})["metric_per_case"]
    assert known(row["metrics"]["4"]["Dice"]) == score_json(found[0])["Dice"]


def test_csv_has_empty_cells_for_nan() -> None:
    rows = list(csv.DictReader(io.StringIO(to_csv(summarise(scores(), IDS)))))
    assert [(r["dataset"], r["case"], r["organ"], r["label"]) for r in rows[:3]] == [
        ("a", "1", "liver", "1"), ("a", "1", "spleen", "4"), ("a", "2", "liver", "1"),
    ]  # fmt: skip
    assert (rows[1]["Dice"], rows[1]["n_ref"], rows[1]["reason"]) == ("", "0", ABSENT)
    assert rows[3]["n_ref"] == ""
    assert "nan" not in to_csv(summarise(scores(), IDS)).lower()


class Here:
    """nnU-Net's pool of processes, in this one."""

    def __init__(self, _: int) -> None: ...

    def __enter__(self) -> Here:
        return self

    def __exit__(self, *_: object) -> None: ...

    def starmap(self, function: Any, arguments: Any) -> list[Any]:
        return [function(*one) for one in arguments]


@pytest.fixture
def label_maps(tmp_path: Path) -> Path:
    """`gt` and `pred`: all kinds of absence, and voxels to ignore (value 9)."""
    rng = np.random.default_rng(0)
    for number in range(4):
        truth = rng.choice([0, 1, 4, 9], (6, 7, 8), p=(0.5, 0.2, 0.2, 0.1))
        guess = np.where(rng.random(truth.shape) < 0.7, truth, rng.choice([0, 1, 4], truth.shape))
        guess[guess == 9] = 1
        if number == 1:  # the reference lacks it
            truth[truth == 4] = 0
        if number == 2:  # neither has it
            truth[truth == 4] = 0
            guess[guess == 4] = 0
        if number == 3:  # it is missed
            guess[guess == 1] = 0
        for name, array in (("gt", truth), ("pred", guess)):
            (tmp_path / name).mkdir(exist_ok=True)
            image = nib.Nifti1Image(array.astype(np.uint8), np.diag([2.0, 1.0, 3.0, 1.0]))
            nib.save(image, tmp_path / name / f"case_{number}.nii.gz")
    return tmp_path


def test_nnunet_reads_it_and_computes_the_same(
    label_maps: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    theirs = pytest.importorskip("nnunetv2.evaluation.evaluate_predictions")
    pool = SimpleNamespace(Pool=Here)
    monkeypatch.setattr(theirs.multiprocessing, "get_context", lambda _: pool)
    expected = theirs.compute_metrics_on_folder(
        str(label_maps / "gt"), str(label_maps / "pred"), str(label_maps / "theirs.json"),
        theirs.SimpleITKIO(), ".nii.gz", list(IDS.values()), ignore_label=9,
    )  # fmt: skip
    found = {}
    for path in sorted((label_maps / "pred").iterdir()):
        guess, truth = (
            np.asarray(nib.load(folder / path.name).dataobj)
            for folder in (label_maps / "pred", label_maps / "gt")
        )
        found[path.name] = score_case(guess, truth, IDS, grid_of(truth), ignore_value=9)
    (label_maps / "ours.json").write_text(json.dumps(summarise(found, IDS)))
    ours = theirs.load_summary_json(str(label_maps / "ours.json"))
    read = theirs.load_summary_json(str(label_maps / "theirs.json"))
    assert list(ours["mean"]) == list(read["mean"]) == [1, 4]
    for mine, other in zip(ours["metric_per_case"], expected["metric_per_case"], strict=True):
        for label, values in other["metrics"].items():
            shared = {key: mine["metrics"][label][key] for key in values}
            assert shared == pytest.approx(values, nan_ok=True)
    for label, values in expected["mean"].items():
        assert {k: ours["mean"][label][k] for k in values} == pytest.approx(values, nan_ok=True)
    overall = {k: ours["foreground_mean"][k] for k in expected["foreground_mean"]}
    assert overall == pytest.approx(expected["foreground_mean"], nan_ok=True)
    # All kinds of absence were in it, and both write NaN as the same token.
    dices = [row["metrics"][4]["Dice"] for row in expected["metric_per_case"]]
    assert dices[1] == 0
    assert math.isnan(dices[2])
    assert "NaN" in (label_maps / "theirs.json").read_text()
    assert set(METRICS) > set(expected["foreground_mean"])
