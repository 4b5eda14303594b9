"""`pipeline evaluate --against`: folders of predictions of the same cases, and refusals."""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
from typer.testing import CliRunner

from pipeline.cli.app import app
from pipeline.config import file_sha256
from pipeline.data.registry import load_registry
from pipeline.errors import ConfigError
from pipeline.log import Log
from pipeline.review.metrics import RULES
from stages import evaluate
from stages.against import (
    SideBySide,
    predictions_of,
    print_side_by_side,
    side_by_side,
    write_side_by_side,
)
from stages.evaluate import EvaluateConfig
from tests.stages.stage_contract import snapshot
from tests.stages.test_evaluate import CASES, LIVER, change_file, reference, without
from tests.tiny import RunCli, change_registry

ALL = [f"{d}/case_00{n}" for d in ("liver-ct", "spleen-ct", "multi-ct") for n in range(3)]


@pytest.fixture
def cohort(tiny_registry: Path) -> Path:
    """All nine cases are test cases; `good` predicts the references, `poor` shifts them."""

    def all_test(data: dict[str, Any]) -> None:
        for name, entry in data["datasets"].items():
            cases = [case.split("/")[1] for case in ALL if case.startswith(name)]
            entry["split"] = {"train": [], "validation": [], "test": cases}

    # The single-organ datasets call their organ 1; predictions have the registry's ids.
    change_registry(tiny_registry, all_test)
    for number, case in enumerate(ALL):
        for name, shift in (("good", 0), ("poor", 1 + number % 3)):
            target = tiny_registry.parent / name / f"{case}.nii.gz"
            value = 2 if case.startswith("spleen") else 1
            change_file(
                reference(tiny_registry, case),
                target,
                lambda a, s=shift, v=value: np.roll(np.where(a == 1, v, a), s, axis=0),
            )
    return tiny_registry


def compare(registry: Path, *others: str, first: str = "good", **config: Any) -> SideBySide:
    settings = EvaluateConfig(**({"surface": False} | config))
    opened, log = load_registry(registry), Log(quiet=True)
    folder = registry.parent / first
    evaluate.run(settings, opened, folder, log=log, table=False)
    return side_by_side(settings, opened, folder, [registry.parent / o for o in others], log=log)


def summary_of(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "summary.json").read_text())
    return found


def test_better_and_worse(cohort: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = compare(cohort, "poor")
    assert (found.cases, found.notices, found.metrics) == (
        [case for d in ("liver-ct", "spleen-ct", "multi-ct") for case in ALL if d in case],
        [], ("Dice",),
    )  # fmt: skip
    (results,) = found.results["Dice"]
    for organ, label in (("liver", "1"), ("spleen", "2")):
        rows = {r["case"]: r["metrics"][label] for r in summary_of(cohort.parent / "poor")[
            "metric_per_case"]}  # fmt: skip
        dice = [row["Dice"] for row in rows.values() if row["n_ref"] > 0]
        assert len(dice) == 6
        assert results[organ].other == pytest.approx(np.mean(dice))
        assert results[organ].difference.mean == pytest.approx(1 - np.mean(dice))
        assert (results[organ].higher, results[organ].equal, results[organ].lower) == (6, 0, 0)
        assert results[organ].p == pytest.approx(2 / 2**6)
        assert found.adjusted("Dice")[0][organ] == pytest.approx(2 * 2 / 2**6)
    assert results["mean"].p == pytest.approx(2 / 2**9)
    assert found.losses(1) == []  # it lost nowhere
    written = write_side_by_side(found, cohort.parent / "good")
    content = json.loads(written[0].read_text())
    json.dumps(content, allow_nan=False)
    liver = content["against"]["poor"]["metrics"]["Dice"]["liver"]
    assert (liver["num_cases"], liver["p_holm"]) == (6, pytest.approx(4 / 64))
    with written[1].open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == len(ALL) * 2
    assert sum(row["good"] == "" for row in rows) == 6  # organs that nobody annotated there
    print_side_by_side(found)
    out = capsys.readouterr().out
    assert "Dice: good against poor, 9 cases" in out
    assert "6 / 0 / 0" in out
    assert "lost most" not in out


@pytest.mark.parametrize("name", ["against.json", "against.csv"])
def test_a_table_of_others_stays(cohort: Path, name: str) -> None:
    theirs = cohort.parent / "good" / name
    theirs.write_text('{"first": 1}')
    command = ["evaluate", str(theirs.parent), "-r", str(cohort), "--against"]
    result = CliRunner().invoke(app, [*command, str(cohort.parent / "poor")])
    assert isinstance(result.exception, ConfigError)
    assert str(result.exception) == (
        f"{theirs}: `pipeline evaluate --against` did not write this file and does not replace "
        "it. Move away what is there."
    )
    assert theirs.read_text() == '{"first": 1}'
    assert not (theirs.parent / "scores.csv").exists()


def test_the_largest_losses_are_named(cohort: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = compare(cohort, "good", first="poor", surface=True)
    losses = found.losses(1, most=3)
    apart = found.scores(0, "Dice") - found.scores(1, "Dice")
    assert [loss["first"] - loss["other"] for loss in losses] == pytest.approx(
        np.sort(apart[~np.isnan(apart)])[:3]
    )
    assert {loss["organ"] for loss in losses} <= {"liver", "spleen"}
    print_side_by_side(found)
    out = capsys.readouterr().out
    assert "Where poor lost most Dice against good" in out
    assert "HD95, mm (lower is better)" in out
    # Of distances the larger is the worse.
    assert out.count("0 / 0 / 6") + out.count("0 / 0 / 9") == out.count("0 / 0 / ") > 5


def test_a_summary_is_used_again_unless_it_is_out_of_date(cohort: Path) -> None:
    compare(cohort, "poor")
    path = cohort.parent / "poor" / "summary.json"
    path.write_text(path.read_text().replace('"failed": {}', '"failed": {}, "kept": true'))
    compare(cohort, "poor")
    assert "kept" in summary_of(path.parent)
    change_file(reference(cohort, CASES[0]), path.parent / f"{CASES[0]}.nii.gz", lambda a: a)
    found = compare(cohort, "poor")
    assert "kept" not in summary_of(path.parent)
    assert found.results["Dice"][0]["liver"].equal == 1
    label = reference(cohort, CASES[1])
    change_file(label, label, without(LIVER))
    compare(cohort, "poor")
    rows = {row["case"]: row["metrics"]["1"] for row in summary_of(path.parent)["metric_per_case"]}
    assert rows[CASES[1]]["n_ref"] == 0


def test_an_image_that_changed_and_two_students_in_a_folder(
    cohort: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    case = "multi-ct/case_000"
    image = cohort.parent / "data" / "multi-ct" / "images" / "case_000.nii.gz"

    def say(folder: str) -> None:
        content = {
            "image_sha256": file_sha256(image), "student_sha256": folder,
            "organs": {"liver": 1, "spleen": 2},
        }  # fmt: skip
        (cohort.parent / folder / f"{case}.json").write_text(json.dumps(content))

    say("good"), say("poor")
    for _ in range(2):  # evaluated now, and read from its summary
        told = [notice for notice in compare(cohort, "poor").notices if "several" in notice]
        assert [notice.partition(": ")[0] for notice in told] == ["good", "poor"]
        assert "8 by a student that no JSON names" in told[1]
    image.write_bytes(image.read_bytes() + b"newer")
    say("good")
    found = compare(cohort, "poor")
    assert f"{cohort.parent / 'poor'} could not be scored in {case}." in found.notices
    assert case not in found.cases


def test_scores_of_an_earlier_version_are_made_anew(cohort: Path) -> None:
    """It did not ask what the values of predictions mean."""
    compare(cohort, "poor")
    path = cohort.parent / "poor" / "summary.json"
    content = json.loads(path.read_text())
    del content["rules"]
    for row in content["metric_per_case"]:
        del row["prediction_json_sha256"]
        row["metrics"]["1"]["Dice"] = 0.5
    path.write_text(json.dumps(content))
    compare(cohort, "poor")
    assert summary_of(path.parent)["rules"] == RULES


def test_other_words_about_a_prediction_make_its_scores_anew(cohort: Path) -> None:
    """Names decide in every folder, whatever ids each was written with."""
    equal = compare(cohort, "good", first="poor")
    for case in ALL:
        target = cohort.parent / "good" / f"{case}.nii.gz"
        change_file(target, target, lambda a: np.where(a > 0, 3 - a.astype(int), 0))
        target.with_name(f"{case.split('/')[1]}.json").write_text(
            json.dumps({"organs": {"liver": 2, "spleen": 1}})
        )
    found = compare(cohort, "good", first="poor")
    assert np.array_equal(found.scores(1, "Dice"), equal.scores(1, "Dice"), equal_nan=True)
    (cohort.parent / "good" / f"{CASES[0]}.json").write_text("{}")  # nothing says it any more
    found = compare(cohort, "good", first="poor")
    assert found.scores(1, "Dice")[found.cases.index(CASES[0])].tolist() == [0.0, 0.0]


def test_other_cases_are_left_out_with_a_notice(cohort: Path) -> None:
    for case in ALL[:4]:
        (cohort.parent / "poor" / f"{case}.nii.gz").unlink()
    found = compare(cohort, "poor")
    assert len(found.cases) == 5
    assert any("in all folders, of good: " in n and ALL[3] in n for n in found.notices)
    assert any("could not be scored" in notice for notice in found.notices)
    assert found.results["Dice"][0]["liver"].difference.num_cases == 3
    shutil.rmtree(cohort.parent / "poor")
    (cohort.parent / "poor").mkdir()
    with pytest.raises(ConfigError, match=r"no case was scored in all folders .good 9, poor 0."):
        compare(cohort, "poor")


def test_other_settings_are_refused(cohort: Path) -> None:
    compare(cohort, "good", first="poor")
    with pytest.raises(ConfigError, match=r"tolerance_mm 3\.0 instead of 5\.0"):
        compare(cohort, "poor", tolerance_mm=5.0)
    path = cohort.parent / "poor" / "summary.json"
    path.write_text('{"metric_per_case": [], "mean": {}, "foreground_mean": {}}')
    with pytest.raises(ConfigError, match="not written by this"):
        compare(cohort, "poor")
    path.write_text("{")
    with pytest.raises(ConfigError, match="cannot be read"):
        compare(cohort, "poor")


def test_folders_that_are_none(cohort: Path) -> None:
    with pytest.raises(ConfigError, match="no such folder"):
        compare(cohort, "none")
    with pytest.raises(ConfigError, match="compared with itself"):
        compare(cohort, "good")


def test_a_run_stands_for_its_predictions(tmp_path: Path) -> None:
    run = tmp_path / "work" / "students" / "kinds" / "ms_kd-seed0"
    run.mkdir(parents=True)
    assert predictions_of(run) == run  # no student: a folder of predictions
    (run / "student.pt").touch()
    with pytest.raises(ConfigError, match=r"pipeline predict .*student.pt .*kinds/ms_kd-seed0"):
        predictions_of(run)
    predicted = tmp_path / "work" / "predictions" / "kinds" / "ms_kd-seed0"
    predicted.mkdir(parents=True)
    assert predictions_of(run) == predicted


def test_on_the_command_line(cohort: Path, run_cli: RunCli) -> None:
    good, poor = (str(cohort.parent / name) for name in ("good", "poor"))
    config = cohort.parent / "evaluate.yaml"
    config.write_text("surface: false\n")
    arguments = ["evaluate", good, "-r", str(cohort), "-c", str(config), "--against", poor]
    code, out, _ = run_cli(*arguments)
    assert code == 0
    assert "Dice: good against poor, 9 cases" in out
    assert (cohort.parent / "good" / "against.json").exists()
    (Path(good) / "summary.json").unlink()
    before = snapshot(cohort.parent)
    missing = [*arguments, "--against", f"{poor}er"]
    code, _, err = run_cli(*missing)
    assert code == 2
    assert f"{poor}er: there is no such folder." in err
    assert snapshot(cohort.parent) == before  # it is asked before anything is scored
    nib.load(Path(poor) / f"{ALL[0]}.nii.gz")
    (Path(good) / f"{ALL[0]}.nii.gz").unlink()
    code, _, err = run_cli(*arguments)
    assert code == 2  # the first folder lacks a case; the others are compared all the same
    assert f"in all folders, of poor: {ALL[0]}." in err
