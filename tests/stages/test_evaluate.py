from __future__ import annotations

import csv
import json
import math
import resource
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import numpy.typing as npt
import pytest

from pipeline.config import file_sha256
from pipeline.data.registry import load_registry
from pipeline.errors import ConfigError
from pipeline.log import Log
from pipeline.summary import METRICS, known, organ_means, overall_means
from stages import evaluate
from stages.evaluate import EvaluateConfig
from stages.report import StageReport
from tests.stages.stage_contract import snapshot
from tests.tiny import change_registry

CASES = ("multi-ct/case_001", "multi-ct/case_002")
LIVER, SPLEEN = 1, 2
Change = Callable[[npt.NDArray[Any]], npt.NDArray[Any]]


def run(
    registry: Path, *, dry_run: bool = False, table: bool = False, **config: Any
) -> StageReport:
    return evaluate.run(
        EvaluateConfig(**config),
        load_registry(registry),
        registry.parent / "predictions",
        log=Log(quiet=True),
        table=table,
        dry_run=dry_run,
    )


def reference(registry: Path, case: str) -> Path:
    dataset, name = case.split("/")
    return registry.parent / "data" / dataset / "labels" / f"{name}.nii.gz"


def change_file(path: Path, target: Path, change: Change, *, shift_mm: float = 0.0) -> None:
    source = nib.load(path)
    affine = source.affine.copy()
    affine[0, 3] += shift_mm
    target.parent.mkdir(parents=True, exist_ok=True)
    array = np.ascontiguousarray(change(np.asarray(source.dataobj))).astype(np.uint8)
    nib.save(nib.Nifti1Image(array, affine), target)


def write_prediction(registry: Path, case: str, change: Change = lambda a: a, **how: Any) -> None:
    target = registry.parent / "predictions" / f"{case}.nii.gz"
    change_file(reference(registry, case), target, change, **how)


def summary_of(registry: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((registry.parent / "predictions/summary.json").read_text())
    return found


def metrics(registry: Path, case: str, organ: str) -> dict[str, Any]:
    """Of one case and organ, by name; None for NaN."""
    summary = summary_of(registry)
    label = str(summary["organs"][organ])
    row = next(row for row in summary["metric_per_case"] if row["case"] == case)
    found: dict[str, Any] = {key: known(value) for key, value in row["metrics"][label].items()}
    return found | {"reason": row["reasons"].get(label, "")}


def means(registry: Path, organ: str) -> dict[str, Any]:
    return dict(organ_means(summary_of(registry))[organ])


def without(value: int) -> Change:
    return lambda array: np.where(array == value, 0, array)


@pytest.fixture
def perfect(tiny_registry: Path) -> Path:
    """A cohort whose predictions are its references."""
    for case in CASES:
        write_prediction(tiny_registry, case)
    return tiny_registry


class TestFilesOfOthers:
    @pytest.mark.parametrize(
        ("name", "text"),
        [
            ("summary.json", '{"metric_per_case": [], "mean": {}, "foreground_mean": {}}'),
            ("summary.json", "[]"),
            ("scores.csv", "case,age\n"),
        ],
    )
    def test_a_summary_of_nnunet_and_other_tables_stay(
        self, perfect: Path, name: str, text: str
    ) -> None:
        path = perfect.parent / "predictions" / name
        path.write_text(text)
        before = snapshot(perfect.parent)
        for dry_run in (True, False):
            with pytest.raises(ConfigError) as caught:
                run(perfect, dry_run=dry_run)
            assert str(caught.value) == (
                f"{path}: `pipeline evaluate` did not write this file and does not replace it. "
                "Move away what is there, or copy the predictions to a folder of their own."
            )
        assert snapshot(perfect.parent) == before

    def test_a_full_disk_costs_no_score(
        self, perfect: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        """Both files stay as they were, the table is printed, and the report says it."""
        run(perfect)
        before, limit = snapshot(perfect.parent), resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (256, limit[1]))
        try:
            report = run(perfect, tolerance_mm=1.0, table=True)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limit)
        assert (report.done, set(report.failed)) == (list(CASES), {"summary.json"})
        assert report.exit_code == 2
        assert str(report.failed["summary.json"]) == (
            f"{perfect.parent / 'predictions' / 'summary.json'}: it cannot be written (File too "
            "large). Check free space, quota and permissions, then run the same command again."
        )
        assert "liver" in capsys.readouterr().out
        assert snapshot(perfect.parent) == before


class TestScores:
    def test_a_perfect_prediction(self, perfect: Path) -> None:
        report = run(perfect)
        assert (report.done, report.exit_code) == (list(CASES), 0)
        for case in CASES:
            for organ in ("liver", "spleen"):
                found = metrics(perfect, case, organ)
                assert (found["Dice"], found["NSD"], found["HD95_mm"]) == (1.0, 1.0, 0.0)
        overall = summary_of(perfect)["foreground_mean"]
        assert (overall["Dice"], overall["NSD"], overall["HD95_mm"]) == (1.0, 1.0, 0.0)

    def test_an_empty_prediction_of_a_present_organ_is_zero(self, perfect: Path) -> None:
        write_prediction(perfect, CASES[0], without(SPLEEN))
        run(perfect)
        found = metrics(perfect, CASES[0], "spleen")
        assert (found["Dice"], found["NSD"]) == (0.0, 0.0)
        assert found["HD95_mm"] > 100
        assert found["reason"] == "prediction is empty"
        assert means(perfect, "spleen")["Dice"] == 0.5
        assert means(perfect, "spleen")["num_missing"] == 0

    def test_an_organ_that_the_reference_lacks_is_as_nnunet_has_it(
        self, perfect: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        path = reference(perfect, CASES[1])
        change_file(path, path, without(LIVER))
        report = run(perfect, table=True)
        assert report.exit_code == 0
        assert f"the reference lacks it; Dice 0, as nnU-Net counts it: {CASES[1]} (liver)." in (
            capsys.readouterr().out
        )
        found = metrics(perfect, CASES[1], "liver")
        assert (found["Dice"], found["NSD"], found["HD95_mm"]) == (0.0, None, None)
        assert found["n_pred"] == found["FP"] > 0
        mean = means(perfect, "liver")
        assert (mean["Dice"], mean["num_cases"], mean["num_missing"]) == (0.5, 2, 0)
        write_prediction(perfect, CASES[1])  # nor does the prediction have it
        run(perfect)
        assert metrics(perfect, CASES[1], "liver")["Dice"] is None
        mean = means(perfect, "liver")
        assert (mean["Dice"], mean["num_cases"], mean["num_missing"]) == (1.0, 1, 1)

    def test_an_organ_that_the_dataset_does_not_annotate_is_counted_too(
        self, perfect: Path
    ) -> None:
        change_registry(
            perfect, lambda data: data["datasets"]["liver-ct"]["split"].update(test=0.2)
        )
        cases = [c.name for c in load_registry(perfect).cases("liver-ct") if c.split == "test"]
        assert cases
        for case in cases:
            write_prediction(perfect, case)
        run(perfect)
        found = metrics(perfect, cases[0], "spleen")
        assert found["Dice"] is None
        assert found["reason"] == "not annotated in this case"
        mean = means(perfect, "spleen")
        assert (mean["num_cases"], mean["num_missing"]) == (2, len(cases))

    def test_swapped_organs_score_zero(self, perfect: Path) -> None:
        write_prediction(perfect, CASES[0], lambda a: np.where(a > 0, 3 - a.astype(int), 0))
        run(perfect)
        assert metrics(perfect, CASES[0], "liver")["Dice"] == 0.0

    def test_a_prediction_mirrored_in_memory_but_right_in_space_is_perfect(
        self, perfect: Path
    ) -> None:
        source = nib.load(reference(perfect, CASES[0]))
        flipped = nib.as_closest_canonical(source)
        path = perfect.parent / "predictions" / f"{CASES[0]}.nii.gz"
        nib.save(flipped, path)
        stored = np.asarray(nib.load(path).dataobj)
        assert stored.shape != source.shape or not np.array_equal(stored, source.dataobj)
        run(perfect)
        assert metrics(perfect, CASES[0], "liver")["Dice"] == 1.0

    def test_the_label_values_of_the_dataset_are_mapped(self, perfect: Path) -> None:
        def other_values(data: dict[str, Any]) -> None:
            data["datasets"]["multi-ct"]["annotated"] = {"liver": [7, 9], "spleen": 2}

        for case in ("multi-ct/case_000", *CASES):
            path = reference(perfect, case)
            change_file(path, path, lambda a: np.where(a == LIVER, np.where(a % 2, 9, 7), a))
        run(change_registry(perfect, other_values))
        assert metrics(perfect, CASES[0], "liver")["Dice"] == 1.0

    def test_ignored_voxels_do_not_count(self, perfect: Path) -> None:
        path = reference(perfect, CASES[0])
        change_file(path, path, lambda a: np.where(a == LIVER, 5, a))
        change_registry(
            perfect, lambda data: data["datasets"]["multi-ct"].update(ignore_values=[5])
        )
        run(perfect)
        found = metrics(perfect, CASES[0], "liver")
        assert (found["Dice"], found["n_pred"]) == (None, 0)
        size = np.asarray(nib.load(reference(perfect, CASES[0])).dataobj)
        assert found["TN"] == (size != 5).sum()
        assert metrics(perfect, CASES[0], "spleen")["Dice"] == 1.0

    def test_tolerance_is_in_mm_and_surfaces_may_be_left_out(self, perfect: Path) -> None:
        write_prediction(perfect, CASES[0], lambda a: np.roll(a, 1, axis=0))
        run(perfect, tolerance_mm=0.5)
        strict = metrics(perfect, CASES[0], "liver")["NSD"]
        run(perfect, tolerance_mm=50.0)
        assert metrics(perfect, CASES[0], "liver")["NSD"] == 1.0
        assert strict < 0.9
        assert summary_of(perfect)["settings"]["tolerance_mm"] == 50.0
        run(perfect, surface=False)
        found = metrics(perfect, CASES[0], "liver")
        assert (found["NSD"], found["HD95_mm"]) == (None, None)
        assert 0 < found["Dice"] < 1


class TestFailures:
    def test_a_missing_prediction_is_named_and_the_others_are_scored(self, perfect: Path) -> None:
        (perfect.parent / "predictions" / f"{CASES[0]}.nii.gz").unlink()
        report = run(perfect)
        assert report.done == [CASES[1]]
        assert "there is no prediction" in str(report.failed[CASES[0]])
        assert report.exit_code == 2
        summary = summary_of(perfect)
        assert set(summary["failed"]) == {CASES[0]}
        assert [row["case"] for row in summary["metric_per_case"]] == [CASES[1]]

    @pytest.mark.parametrize(
        ("how", "says"),
        [
            ({"shift_mm": 5.0}, "5.00 mm away from the reference"),
            ({"change": lambda a: a[:, :, :-1]}, "the prediction has shape"),
        ],
    )
    def test_another_geometry_is_named(self, perfect: Path, how: dict[str, Any], says: str) -> None:
        write_prediction(perfect, CASES[1], **how)
        report = run(perfect)
        text = str(report.failed[CASES[1]])
        assert says in text
        assert f"{CASES[1]}.nii.gz" in text
        assert (report.done, report.exit_code) == ([CASES[0]], 2)

    @pytest.mark.parametrize("which", ["prediction", "reference"])
    def test_a_damaged_file_is_named(self, perfect: Path, which: str) -> None:
        predicted = perfect.parent / "predictions" / f"{CASES[0]}.nii.gz"
        path = predicted if which == "prediction" else reference(perfect, CASES[0])
        path.write_bytes(path.read_bytes()[:100])
        report = run(perfect)
        assert str(path) in str(report.failed[CASES[0]])
        assert report.done == [CASES[1]]

    def test_a_label_value_without_a_meaning_is_named(self, perfect: Path) -> None:
        path = reference(perfect, CASES[0])
        change_file(path, path, lambda a: np.where(a == SPLEEN, 77, a))
        report = run(perfect)
        assert "label values [77]" in str(report.failed[CASES[0]])

    def test_all_missing_still_writes_a_summary(self, tiny_registry: Path) -> None:
        report = run(tiny_registry)
        assert (report.done, report.exit_code) == ([], 2)
        summary = summary_of(tiny_registry)
        assert summary["metric_per_case"] == []
        assert set(overall_means(summary).values()) == {None}

    def test_no_case_in_the_splits(self, perfect: Path) -> None:
        change_registry(
            perfect,
            lambda data: data["datasets"]["multi-ct"].update(
                split={"train": [], "validation": [], "test": []}
            ),
        )
        with pytest.raises(ConfigError, match="no case is in test"):
            run(perfect)


class TestSummary:
    def test_its_shape(self, perfect: Path) -> None:
        report = run(perfect)
        summary = summary_of(perfect)
        assert set(summary) == {
            "settings",
            "failed",
            "metric_per_case",
            "mean",
            "foreground_mean",
            "organs",
        }
        assert list(summary["mean"]) == ["1", "2"]
        assert all(
            set(m) == {*METRICS, "num_cases", "num_missing"} for m in summary["mean"].values()
        )
        row = summary["metric_per_case"][0]
        assert set(row["metrics"]["1"]) == set(METRICS)
        assert row["reference_file"] == str(reference(perfect, CASES[0]))
        assert row["prediction_sha256"] == file_sha256(Path(row["prediction_file"]))
        assert report.details["mean"] == organ_means(summary)

    def test_scores_as_csv(self, perfect: Path) -> None:
        change_file(reference(perfect, CASES[0]), reference(perfect, CASES[0]), without(LIVER))
        write_prediction(perfect, CASES[0])
        run(perfect)
        with (perfect.parent / "predictions" / "scores.csv").open() as file:
            rows = list(csv.DictReader(file))
        assert [(r["dataset"], r["case"], r["organ"], r["label"]) for r in rows] == [
            ("multi-ct", case, organ, label)
            for case in ("case_001", "case_002")
            for organ, label in (("liver", "1"), ("spleen", "2"))
        ]
        assert (rows[0]["Dice"], rows[0]["reason"]) == ("", "organ absent from the reference")
        for row in rows[1:]:
            found = metrics(perfect, f"multi-ct/{row['case']}", row["organ"])
            assert all(float(row[key]) == found[key] for key in METRICS)

    def test_other_splits(self, perfect: Path) -> None:
        write_prediction(perfect, "multi-ct/case_000")
        run(perfect, splits=("test", "validation"), surface=False)
        cases = [row["case"] for row in summary_of(perfect)["metric_per_case"]]
        assert set(CASES) < set(cases)
        assert "multi-ct/case_000" in cases

    def test_the_table_shows_the_means(
        self, perfect: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        write_prediction(perfect, CASES[0], without(SPLEEN))
        evaluate.run(
            EvaluateConfig(),
            load_registry(perfect),
            perfect.parent / "predictions",
            log=Log(quiet=True),
        )
        shown = capsys.readouterr().out
        assert "mean over organs" in shown
        assert "0.500" in shown
        assert "0.750" in shown

    def test_a_dry_run_writes_nothing(self, perfect: Path) -> None:
        before = snapshot(perfect.parent)
        assert run(perfect, dry_run=True).done == list(CASES)
        assert snapshot(perfect.parent) == before


def test_what_the_stage_reports_is_strict_json(perfect: Path) -> None:
    """`summary.json` has NaN where nnU-Net has it; what goes into events has null."""
    path = reference(perfect, CASES[0])
    change_file(path, path, without(LIVER))
    report = run(perfect)
    assert math.isnan(summary_of(perfect)["metric_per_case"][0]["metrics"]["1"]["NSD"])
    json.dumps(report.to_json(), allow_nan=False)
