from __future__ import annotations

import csv
import gzip
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import numpy.typing as npt
import pytest

from pipeline.config import file_sha256
from pipeline.data.entries import CaseFiles
from pipeline.data.nifti import name_extensions
from pipeline.data.registry import load_registry
from pipeline.errors import ConfigError
from pipeline.log import Log
from pipeline.review.metrics import METRICS, known, organ_means, overall_means
from stages import evaluate
from stages.evaluate import EvaluateConfig
from stages.report import StageReport
from tests.stages.stage_contract import snapshot
from tests.tiny import (
    RunCli,
    change_registry,
    file_limit,
    fill_cache,
    in_two_folds,
    training_settings,
    work_of,
)

CASES = ("multi-ct/case_001", "multi-ct/case_002")
LIVER, SPLEEN = 1, 2
IN_PLACE = np.eye(4)
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


def change_file(
    path: Path, target: Path, change: Change, *, shift_mm: float = 0.0, turn: Any = IN_PLACE
) -> None:
    source = nib.load(path)
    affine = turn @ source.affine
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


def one_voxel(array: npt.NDArray[Any]) -> npt.NDArray[Any]:
    out = np.zeros_like(array)
    out[tuple(n // 2 for n in array.shape)] = LIVER
    return out


def swapped(array: npt.NDArray[Any]) -> npt.NDArray[Any]:
    return np.where(array > 0, 3 - array.astype(int), 0)


def say(registry: Path, case: str, organs: dict[str, int]) -> None:
    """As `predict` does, beside the label map."""
    path = registry.parent / "predictions" / f"{case}.json"
    path.write_text(json.dumps({"digest": "0", "organs": organs}))


def say_in_header(
    registry: Path, case: str, names: dict[int, str], which: tuple[int, ...] = (0, 1)
) -> None:
    path = registry.parent / "predictions" / f"{case}.nii.gz"
    image = nib.load(path)
    image.header.extensions.extend(name_extensions(names)[n] for n in which)
    path.write_bytes(gzip.compress(image.to_bytes()))


def without(value: int) -> Change:
    return lambda array: np.where(array == value, 0, array)


@pytest.fixture
def perfect(tiny_registry: Path) -> Path:
    """A cohort whose predictions are its references."""
    for case in CASES:
        write_prediction(tiny_registry, case)
    return tiny_registry


class TestFolds:
    def test_each_case_counts_as_it_was_held_out(
        self, tiny_registry: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        cases = {c.name: c.fold for c in folded(tiny_registry)}
        assert set(cases.values()) == {0, 1}
        for name, fold in cases.items():
            write_prediction(tiny_registry, name, (lambda a: a) if fold else without(LIVER))
        report = run(tiny_registry, folds=True, table=True, surface=False)
        assert report.exit_code == 0
        assert set(report.done) == set(cases)
        summary = summary_of(tiny_registry)
        held_out = {int(k): set(found["cases"]) for k, found in summary["folds"].items()}
        assert held_out == {k: {c for c, f in cases.items() if f == k} for k in (0, 1)}
        assert [summary["folds"][k]["mean"]["liver"]["Dice"] for k in "01"] == [0.0, 1.0]
        assert summary["std_over_folds"]["liver"]["Dice"] == pytest.approx(math.sqrt(0.5))
        assert summary["std_over_folds"]["liver"]["NSD"] is None
        livers = [c for c in cases if not c.startswith("spleen")]
        mean = sum(cases[c] or 0 for c in livers) / len(livers)
        assert means(tiny_registry, "liver")["Dice"] == pytest.approx(mean)
        said = " ".join(capsys.readouterr().out.split())
        assert "2 folds, ± std of their means" in said
        assert f"{mean:.3f} ± 0.707" in said

    def test_a_student_that_saw_the_case_is_refused(self, tiny_registry: Path) -> None:
        name, *_ = (case.name for case in folded(tiny_registry))
        write_prediction(tiny_registry, name)
        path = tiny_registry.parent / "predictions" / f"{name}.json"
        told = {"digest": "0", "organs": {"liver": 1}, "trained_on": True}
        path.write_text(json.dumps(told))
        error = run(tiny_registry, folds=True).failed[name]
        assert "the student that predicted it was trained on it." in str(error)
        assert "`pipeline predict --fold " in str(error)

    def test_the_road_over_folds(self, tiny_cached: Path, run_cli: RunCli) -> None:
        """As docs/evaluate.md shows it."""
        fill_cache(in_two_folds(tiny_cached))
        folder, known = tiny_cached.parent, ["-r", str(tiny_cached)]
        students = [
            str(work_of(tiny_cached) / f"students/student-fold{k}/student.pt") for k in (0, 1)
        ]
        config = {"training": training_settings(steps=2, supervision={"kind": "marginal"})}
        (folder / "student.yaml").write_text(json.dumps(config))
        for k, student in enumerate(students):
            trains = ["-w", str(work_of(tiny_cached)), "-c", str(folder / "student.yaml")]
            for words in (
                ["train-student", *known, *trains, "--device", "cpu"],
                ["predict", student, *known, "-o", str(folder / "held-out"), "--device", "cpu"],
            ):
                code, _, said = run_cli(*words, "--fold", str(k), "-q")
                assert code == 0, said
                assert "was trained on" not in said
        code, table, said = run_cli("evaluate", str(folder / "held-out"), *known, "--folds")
        assert code == 0, said
        assert "2 folds, ±" in " ".join(table.split())
        assert "teachers trained on the cases of all folds but fold 0: liver, spleen" in said
        # With the student of another fold it is no score.
        output = ["-o", str(folder / "seen"), "--device", "cpu", "-q"]
        assert run_cli("predict", students[0], *known, "--fold", "1", *output)[0] == 0
        code, _, said = run_cli("evaluate", str(folder / "seen"), *known, "--folds", "-q")
        assert code == 2
        assert "the student that predicted it was trained on it." in said
        # Together for test cases.
        test = ["-o", str(folder / "test"), f"--with={students[1]}", "--device", "cpu", "-q"]
        assert run_cli("predict", students[0], *known, *test)[0] == 0
        assert run_cli("evaluate", str(folder / "test"), *known, "-q")[0] == 0
        made = json.loads((folder / "test" / "multi-ct" / "case_002.json").read_text())
        assert made["averaged_with"] == [file_sha256(Path(students[1]))]
        code, _, said = run_cli("predict", students[0], str(folder), "-o", "x", "--fold", "0")
        assert code == 2
        assert "--fold without --registry." in said

    def test_there_are_none(self, perfect: Path) -> None:
        with pytest.raises(ConfigError, match=r"its cases are in no folds"):
            run(perfect, folds=True)


def folded(registry: Path) -> list[CaseFiles]:
    known = load_registry(in_two_folds(registry))
    return [c for d in known.datasets for c in known.cases(d) if c.fold is not None]


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
        before = snapshot(perfect.parent)
        with file_limit(256):
            report = run(perfect, tolerance_mm=1.0, table=True)
        assert (report.done, set(report.failed)) == (list(CASES), {"summary.json"})
        assert report.exit_code == 2
        assert str(report.failed["summary.json"]) == (
            f"{perfect.parent / 'predictions' / 'summary.json'}: it cannot be written (File too "
            "large). Check free space, quota and permissions, then run the same command again."
        )
        assert "liver" in capsys.readouterr().out
        assert snapshot(perfect.parent) == before


def beside(registry: Path, case: str, student: str, **also: str) -> Path:
    """What `predict` says beside a label map: of this case's image unless told otherwise."""
    dataset, name = case.split("/")
    image = registry.parent / "data" / dataset / "images" / f"{name}.nii.gz"
    content = {
        "image_sha256": file_sha256(image), "student_sha256": student,
        "settings": {"overlap": 0.5}, "organs": {"liver": LIVER, "spleen": SPLEEN},
    }  # fmt: skip
    path = registry.parent / "predictions" / f"{case}.json"
    path.write_text(json.dumps({"digest": "0", **content, **also}))
    return image


class TestWhoseAndOfWhat:
    """Who predicted a case, and from which image."""

    def test_an_image_that_changed_since_or_another_case_s(self, perfect: Path) -> None:
        """Its case fails by name; the other is scored."""
        image, _ = (beside(perfect, case, "a" * 64) for case in CASES)
        assert (run(perfect).exit_code, run(perfect).warnings) == (0, {})
        assert summary_of(perfect)["metric_per_case"][0]["image_sha256"] == file_sha256(image)
        before = file_sha256(image)
        image.write_bytes(image.read_bytes() + b"newer")
        report = run(perfect)
        assert (report.done, report.exit_code) == ([CASES[1]], 2)
        path = perfect.parent / "predictions" / f"{CASES[0]}.nii.gz"
        assert str(report.failed[CASES[0]]) == (
            f"{CASES[0]}, {path}: it was predicted from another image: the SHA-256 of that one "
            f"begins with {before[:12]}, that of {image} with {file_sha256(image)[:12]}. Predict "
            "the case again."
        )
        image.unlink()
        image.symlink_to("not-fetched")
        report = run(perfect)
        assert (report.exit_code, report.failed) == (0, {})
        assert f"{image} cannot be read (No such file or directory)" in report.warnings[CASES[0]][0]

    def test_predictions_of_two_students_are_told(
        self, perfect: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        """As after a second `predict` that was killed; kept with the scores."""
        for case, student in zip(CASES, "ab", strict=True):
            beside(perfect, case, student * 64)
        report = run(perfect, table=True)
        told = (
            "the scores are of predictions by several students or settings, and so are their "
            f"means: 1 by the student whose SHA-256 begins with {'a' * 12} (overlap 0.5): "
            f"{CASES[0]}; 1 by the student whose SHA-256 begins with {'b' * 12} (overlap 0.5): "
            f"{CASES[1]}. Predict all cases with one, unless this is meant."
        )
        assert (report.exit_code, report.warnings) == (0, {"summary.json": [told]})
        assert summary_of(perfect)["warnings"] == [told]
        assert capsys.readouterr().err.endswith(f"warning: {told}\n")
        (perfect.parent / "predictions" / f"{CASES[1]}.json").unlink()
        (told,) = run(perfect).warnings["summary.json"]
        assert f"1 by a student that no JSON names: {CASES[1]}." in told
        (perfect.parent / "predictions" / f"{CASES[0]}.json").unlink()
        assert (run(perfect).warnings, "warnings" in summary_of(perfect)) == ({}, False)


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

    def test_distances_of_a_tilted_gantry_are_those_in_mm(self, perfect: Path) -> None:
        path = reference(perfect, CASES[0])
        lean = np.eye(4)
        lean[1:3, 2] = np.sin(np.radians(25)), np.cos(np.radians(25))
        change_file(path, path, one_voxel, turn=lean)
        write_prediction(perfect, CASES[0], lambda a: np.roll(a, (2, 3), axis=(1, 2)))
        run(perfect)
        apart = nib.load(path).affine[:3, :3] @ (0, 2, 3)
        found = metrics(perfect, CASES[0], "liver")
        assert found["HD95_mm"] == pytest.approx(np.linalg.norm(apart), rel=1e-5)

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

    def test_float_noise_is_rounded_with_a_note(
        self, perfect: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        path = perfect.parent / "predictions" / f"{CASES[0]}.nii.gz"
        image = nib.load(path)
        noisy = np.asarray(image.dataobj).astype(np.float32) + np.float32(2e-4)
        nib.save(nib.Nifti1Image(noisy, image.affine), path)
        report = run(perfect)
        assert report.exit_code == 0
        assert metrics(perfect, CASES[0], "liver")["Dice"] == 1
        assert set(report.warnings) == {CASES[0]}
        assert "lie up to 0.0002 from whole numbers" in report.warnings[CASES[0]][0]
        assert str(path) in capsys.readouterr().err
        nib.save(nib.Nifti1Image(noisy + np.float32(0.01), image.affine), path)
        error = run(perfect).failed[CASES[0]]
        assert "not whole numbers from 0 to 65535: the one furthest from any is" in str(error)

    def test_a_label_value_without_a_meaning_is_named(self, perfect: Path) -> None:
        path = reference(perfect, CASES[0])
        change_file(path, path, lambda a: np.where(a == SPLEEN, 77, a))
        report = run(perfect)
        assert "label values [77]" in str(report.failed[CASES[0]])

    def test_all_missing_still_writes_a_summary(self, tiny_registry: Path) -> None:
        (tiny_registry.parent / "predictions").mkdir()
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

    def test_a_fraction_that_no_case_falls_into(
        self, perfect: Path, capfd: pytest.CaptureFixture[str]
    ) -> None:
        few = {"validation": 0.2, "test": 0.1}
        change_registry(perfect, lambda data: data["datasets"]["liver-ct"].update(split=few))
        told = "dataset liver-ct: none of its 3 cases falls into test (0.1). Choose another `seed`"
        assert run(perfect).done == list(CASES)
        assert told in " ".join(capfd.readouterr().err.split())
        run(perfect, splits=("validation",))
        assert "none of" not in capfd.readouterr().err
        change_registry(perfect, lambda data: data["datasets"]["multi-ct"].update(split=few))
        with pytest.raises(ConfigError, match=r"no case is in test\.") as caught:
            run(perfect)
        assert f"in evaluate.yaml; {told}" in str(caught.value)


class TestWhatValuesMean:
    """Of predictions: by the JSON beside them, by their header, else by the registry."""

    def test_other_ids_are_mapped_by_name(
        self, perfect: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        for case in CASES:
            write_prediction(perfect, case, swapped)
            say(perfect, case, {"liver": SPLEEN, "spleen": LIVER})
        assert run(perfect).exit_code == 0
        assert [metrics(perfect, case, "liver")["Dice"] for case in CASES] == [1.0, 1.0]
        told = "ids of the predictions differ from the registry's; mapped by name (2 of 2 cases"
        assert capsys.readouterr().err.count(told) == 1
        say(perfect, CASES[0], {"liver": LIVER, "spleen": SPLEEN})
        run(perfect)
        assert metrics(perfect, CASES[0], "liver")["Dice"] == 0.0
        assert "mapped by name (1 of 2 cases, such as " + CASES[1] in capsys.readouterr().err

    @pytest.mark.parametrize("which", [(0, 1), (0,), (1,)], ids=["both", "as others", "as JSON"])
    def test_the_header_says_it_too(self, perfect: Path, which: tuple[int, ...]) -> None:
        write_prediction(perfect, CASES[0], swapped)
        say_in_header(perfect, CASES[0], {SPLEEN: "liver", LIVER: "spleen"}, which)
        run(perfect)
        assert metrics(perfect, CASES[0], "spleen")["Dice"] == 1.0

    def test_json_and_header_that_disagree_are_refused(self, perfect: Path) -> None:
        say_in_header(perfect, CASES[0], {LIVER: "liver", SPLEEN: "spleen"})
        say(perfect, CASES[0], {"liver": SPLEEN, "spleen": LIVER})
        report = run(perfect)
        assert (report.done, report.exit_code) == ([CASES[1]], 2)
        text = str(report.failed[CASES[0]])
        assert "case_001.json says that its values are spleen 1, liver 2, its header" in text
        assert "they are liver 1, spleen 2" in text

    def test_an_organ_that_the_student_does_not_know_is_no_empty_one(
        self, perfect: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        write_prediction(perfect, CASES[0], without(SPLEEN))
        say(perfect, CASES[0], {"liver": LIVER, "kidney": 7})
        report = run(perfect)
        assert "are liver 1, kidney 7; not among them: spleen." in str(report.failed[CASES[0]])
        assert report.exit_code == 2
        # What a dataset does not annotate need not be known.
        change_registry(
            perfect, lambda data: data["datasets"]["multi-ct"].update(
                annotated={"liver": LIVER}, background_values=[SPLEEN]
            )
        )  # fmt: skip
        assert run(perfect).exit_code == 0
        assert "does not have count as background: kidney" in capsys.readouterr().err

    def test_organs_that_the_registry_lacks_are_background(self, perfect: Path) -> None:
        write_prediction(perfect, CASES[0], lambda a: np.where(a == 0, 9, a))
        say(perfect, CASES[0], {"liver": LIVER, "spleen": SPLEEN, "body": 9})
        run(perfect)
        assert metrics(perfect, CASES[0], "liver")["Dice"] == 1.0

    @pytest.mark.parametrize("value", [7, 255])
    def test_a_value_that_no_organ_has_is_an_error(self, perfect: Path, value: int) -> None:
        write_prediction(perfect, CASES[0], lambda a: np.where(a == SPLEEN, value, a))
        text = str(run(perfect).failed[CASES[0]])
        assert f"label values that are no organ's: {value} (" in text
        assert "nothing says what its values mean, and the registry has liver 1, spleen 2" in text
        assert 'into case_001.json, as {"organs": {"liver": 1}}' in text
        say(perfect, CASES[0], {"liver": LIVER, "spleen": SPLEEN})
        assert "it says liver 1, spleen 2" in str(run(perfect).failed[CASES[0]])
        say(perfect, CASES[0], {"liver": LIVER, "spleen": value})
        assert run(perfect).exit_code == 0
        assert metrics(perfect, CASES[0], "spleen")["Dice"] == 1.0

    @pytest.mark.parametrize(
        "text", ["{", '{"organs": [1]}', '{"organs": {"liver": 1, "spleen": 1}}',
                 '{"organs": {"liver": 0, "spleen": 1}}', '{"organs": {"liver": "one"}}'],
    )  # fmt: skip
    def test_a_json_that_does_not_say_it_is_an_error(self, perfect: Path, text: str) -> None:
        (perfect.parent / "predictions" / f"{CASES[0]}.json").write_text(text)
        report = run(perfect)
        assert "case_001.json does not say which organs" in str(report.failed[CASES[0]])
        assert report.done == [CASES[1]]

    def test_files_of_other_programs_say_nothing(self, perfect: Path) -> None:
        beside = perfect.parent / "predictions" / f"{CASES[0]}.json"
        beside.write_text('{"Modality": "CT"}')
        path = beside.with_suffix(".nii.gz")
        image = nib.load(path)
        for code, text in (
            (6, b"somebody's words"),
            (6, b'{"labels": 3}'),
            (0, b"<a><Label/></a>"),
        ):
            image.header.extensions.append(nib.nifti1.Nifti1Extension(code, text))
        path.write_bytes(gzip.compress(image.to_bytes()))
        assert run(perfect).exit_code == 0
        assert metrics(perfect, CASES[0], "liver")["Dice"] == 1.0


class TestWhereFilesLie:
    def test_a_folder_that_is_not_there_is_not_made(self, tiny_registry: Path) -> None:
        before = snapshot(tiny_registry.parent)
        for dry_run in (False, True):
            with pytest.raises(ConfigError, match="there is no such folder"):
                run(tiny_registry, dry_run=dry_run)
        assert snapshot(tiny_registry.parent) == before
        (tiny_registry.parent / "predictions").write_text("")
        with pytest.raises(ConfigError, match="it is a file, not a folder"):
            run(tiny_registry)

    def test_unpacked_predictions_are_scored(self, perfect: Path) -> None:
        packed = perfect.parent / "predictions" / f"{CASES[0]}.nii.gz"
        unpacked = packed.with_suffix("")
        nib.save(nib.load(packed), unpacked)
        report = run(perfect)
        assert "case_001.nii.gz and case_001.nii are both there" in str(report.failed[CASES[0]])
        packed.unlink()
        say(perfect, CASES[0], {"liver": LIVER, "spleen": SPLEEN})
        assert run(perfect).exit_code == 0
        row = summary_of(perfect)["metric_per_case"][0]
        assert row["prediction_file"] == str(unpacked)
        assert row["prediction_json_sha256"] == file_sha256(unpacked.with_suffix(".json"))

    def test_label_maps_outside_of_their_datasets_folder_are_counted(self, perfect: Path) -> None:
        folder = perfect.parent / "predictions"
        for case in CASES:
            path = folder / f"{case}.nii.gz"
            path.rename(folder / path.name)
        before = snapshot(perfect.parent)
        with pytest.raises(ConfigError) as refused:
            run(perfect)
        assert "lie in the folder itself (2, such as case_001.nii.gz)" in refused.value.what
        assert f"such as {CASES[0]}.nii.gz" in refused.value.what
        assert f"Move them to {folder / 'multi-ct'}" in refused.value.fix
        assert snapshot(perfect.parent) == before

    def test_the_folder_of_a_dataset_is_one_too_deep(self, perfect: Path) -> None:
        folder = perfect.parent / "predictions"
        with pytest.raises(ConfigError, match=f"Name the folder above, {folder}"):
            evaluate.run(
                EvaluateConfig(), load_registry(perfect), folder / "multi-ct", log=Log(quiet=True)
            )


class TestSummary:
    def test_its_shape(self, perfect: Path) -> None:
        report = run(perfect)
        summary = summary_of(perfect)
        assert set(summary) == {
            "settings", "failed", "metric_per_case", "mean", "foreground_mean", "organs", "rules",
        }  # fmt: skip
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
        run(perfect, table=True)
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
