"""The whole road on one real CT with four real third-party networks, through the command line."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import yaml

from pipeline.consensus.cohort import open_cohort
from pipeline.consensus.evidence import temperatures
from pipeline.data.nifti import read_label
from pipeline.data.registry import Registry, load_registry
from tests.shared_data import needs_shared_data, shared_data_dir

pytestmark = [needs_shared_data, pytest.mark.realdata, pytest.mark.slow]

# organ -> (label value and id, output channel, fold of the weights)
ORGANS = {
    "liver": (1, 6, 4),
    "spleen": (4, 1, 2),
    "kidney_left": (3, 3, 1),
    "pancreas": (5, 2, 3),
}
CHECKOUT = Path(__file__).resolve().parents[3]


def write_registry(folder: Path) -> Path:
    """The real CT as a dataset, four folds as teachers, each of another organ."""
    shared = shared_data_dir()
    assert shared is not None
    case = {"image": "case_a_ct.nii.gz", "label": "case_a_label.nii.gz"}
    registry = {
        "schema_version": 1,
        "organs": {organ: value for organ, (value, _, _) in ORGANS.items()},
        "grid": {"spacing_mm": [4.0, 4.0, 4.0]},
        "datasets": {
            "real-ct": {
                "root": str(shared / "real_ct"),
                "pairs": {"case_a": case},
                "annotated": {organ: value for organ, (value, _, _) in ORGANS.items()},
                "background_values": [2, 6, 7, 8, 9, 10, 11],
                "split": {"train": ["case_a"], "validation": [], "test": []},
            }
        },
        "teachers": {
            organ: {
                "kind": "factory",
                "factory": "tests.integration.real_ct.allconvunet:load",
                "weights": str(shared / "teacher_weights" / f"allconvunet_tcia_fold{fold}.npz"),
                "organs": {organ: channel},
                "num_channels": 9,
                "taps": ["conv33"],
            }
            for organ, (_, channel, fold) in ORGANS.items()
        },
    }
    path = folder / "data_registry.yaml"
    path.write_text(yaml.safe_dump(registry, sort_keys=False), encoding="utf-8")
    return path


def write_student(folder: Path) -> Path:
    """A student whose tapped layer has the cells that conv33 has on the student grid."""
    strides = [[1, 2, 2], [2, 2, 2], [2, 2, 2]]
    args = {"channels": [16, 32, 64, 96], "strides": strides, "norm": "instance"}
    training = {
        "steps": 70,
        "batch_size": 1,
        "patch": [48, 64, 64],
        "network": {"name": "UNet", "args": {**args, "num_res_units": 0}},
        "supervision": {"kind": "ms_kd", "features": {"student_taps": ["model.1.submodule.0"]}},
        "optimiser": {"lr": 0.004},
    }
    path = folder / "train_student.yaml"
    path.write_text(yaml.safe_dump({"run": "real", "training": training}), encoding="utf-8")
    return path


def pipeline(*arguments: object, expect: int = 0) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "pipeline.cli", *map(str, arguments)]
    done = subprocess.run(command, cwd=CHECKOUT, capture_output=True, text=True, check=False)
    assert done.returncode == expect, done.stderr + done.stdout
    return done


@pytest.fixture(scope="module")
def refused(
    tmp_path_factory: pytest.TempPathFactory,
) -> tuple[Path, subprocess.CompletedProcess[str]]:
    folder = tmp_path_factory.mktemp("real_ct")
    path = write_registry(folder)
    return folder, pipeline("cache-teachers", "-r", path, "-w", folder / "work", expect=2)


@pytest.fixture(scope="module")
def cached(
    refused: tuple[Path, subprocess.CompletedProcess[str]],
) -> tuple[Path, Registry, str]:
    folder, _ = refused
    path = folder / "data_registry.yaml"
    done = pipeline("cache-teachers", "-r", path, "-w", folder / "work", "--accept", "pancreas")
    return folder, load_registry(path), done.stdout


def test_the_useless_pancreas_teacher_is_stopped_and_no_other(
    refused: tuple[Path, subprocess.CompletedProcess[str]],
) -> None:
    folder, done = refused
    told = json.loads((folder / "work" / "reports" / "admission.json").read_text())
    assert set(told["refused"]) == {"pancreas"}
    for part in ("pancreas has a mean Dice of 0.0", "below 0.5", "--accept pancreas"):
        assert part in done.stderr
    assert "over-confident" in done.stderr  # the only case stands in split train
    passed = {row["teacher"]: row["passed"] for row in told["teachers"]}
    assert passed == {"liver": True, "spleen": True, "kidney_left": True, "pancreas": False}


def test_an_accepted_teacher_is_not_run_again(cached: tuple[Path, Registry, str]) -> None:
    folder, _, _ = cached
    report = json.loads((folder / "work" / "reports" / "cache-teachers.json").read_text())
    assert (report["done"], report["exit_code"]) == ([], 0)
    assert report["accepted"]["pancreas"]["pancreas"]["dice"] < 0.05


def test_every_real_teacher_is_found_to_be_over_confident(
    cached: tuple[Path, Registry, str],
) -> None:
    """The temperatures that a grid search over all voxels of the case finds, too."""
    folder, registry, _ = cached
    found = temperatures(folder / "work", registry, list(registry.teachers))
    (case,) = open_cohort(folder / "work", registry, teachers=list(registry.teachers)).cases
    for organ in ORGANS:
        odds = case.log_odds(organ, organ).astype(np.float64)
        seen = ~np.isnan(odds)
        sign = np.where(case.label() == registry.organs[organ], -1, 1)[seen]
        grid = np.geomspace(0.5, 5, 200)
        losses = [np.logaddexp(0, sign * odds[seen] / t).mean() for t in grid]
        assert found[organ, organ] == pytest.approx(grid[int(np.argmin(losses))], rel=0.02)
        assert 1.2 < found[organ, organ] < 3.0


@pytest.fixture(scope="module")
def predicted(cached: tuple[Path, Registry, str]) -> Path:
    """A student's label maps of the CT as it is stored and with its axes in another order."""
    folder, registry, _ = cached
    shared = shared_data_dir()
    assert shared is not None
    config = write_student(folder)
    pipeline("train-student", "-r", registry.path, "-c", config, "-w", folder / "work")
    original, inputs = shared / "real_ct" / "case_a_ct.nii.gz", folder / "in"
    inputs.mkdir()
    (inputs / original.name).symlink_to(original)
    source = nib.load(original)
    turn = nib.orientations.ornt_transform(
        nib.io_orientation(source.affine), nib.orientations.axcodes2ornt("PIL")
    )
    nib.save(source.as_reoriented(turn), inputs / "turned.nii.gz")
    student = folder / "work" / "students" / "real" / "student.pt"
    pipeline("predict", student, inputs, "-o", folder / "out")
    return folder


def test_teachers_agree_with_the_label_read_back_from_the_cache(
    cached: tuple[Path, Registry, str],
) -> None:
    folder, _, printed = cached
    report = json.loads((folder / "work" / "reports" / "cache-teachers.json").read_text())
    dice = {row["teacher"]: row["dice"] for row in report["teachers"]}
    flags = {row["teacher"]: row["flag"] for row in report["teachers"]}
    least = {row["teacher"]: row["sensitivity"] for row in report["teachers"]}
    assert least["liver"] >= 0.90
    assert dice["liver"] >= 0.90
    assert dice["spleen"] >= 0.85
    assert 0.3 < dice["kidney_left"] < 0.7
    assert dice["pancreas"] < 0.05
    assert "POOR" in flags["pancreas"]
    assert flags["liver"] == flags["spleen"] == ""
    line = next(text for text in printed.splitlines() if "pancreas" in text and "real-ct" in text)
    assert "POOR" in line


def test_log_odds_in_the_cache_lie_where_the_organs_are(
    cached: tuple[Path, Registry, str],
) -> None:
    """Independent of the report: from the stored arrays, in mm, with every mirroring refused."""
    folder, registry, _ = cached
    (case,) = open_cohort(folder / "work", registry, teachers=list(registry.teachers)).cases
    label = case.label()
    for organ, least in (("liver", 0.90), ("spleen", 0.85)):
        region = case.log_odds(organ, organ) > 0
        reference = label == registry.organs[organ]
        assert _dice(region, reference) >= least
        for axis in range(3):
            assert _dice(np.flip(region, axis), reference) < 0.75
    unseen = np.isnan(case.log_odds("liver", "liver"))
    assert 0.5 < unseen.mean() < 0.9  # the network sees a box of the abdomen, not the pelvis
    assert not (unseen & (label == registry.organs["spleen"])).any()


def test_the_student_learns_from_the_cache_alone_and_predicts_on_the_original_grid(
    predicted: Path,
) -> None:
    shared = shared_data_dir()
    assert shared is not None
    result = nib.load(predicted / "out" / "case_a_ct.nii.gz")
    source = nib.load(shared / "real_ct" / "case_a_ct.nii.gz")
    assert result.shape == source.shape
    np.testing.assert_array_equal(result.affine, source.affine)
    found = np.asarray(result.dataobj)
    truth = np.asarray(nib.load(shared / "real_ct" / "case_a_label.nii.gz").dataobj)
    assert _dice(found == 1, truth == 1) > 0.7  # liver, after a few steps on this very case
    for axis in range(3):
        assert _dice(np.flip(found == 1, axis), truth == 1) < 0.6


def test_the_orientation_of_the_file_does_not_matter(predicted: Path) -> None:
    back = nib.load(predicted / "out" / "turned.nii.gz")
    assert nib.aff2axcodes(back.affine) == ("P", "I", "L")
    straight = predicted / "out" / "case_a_ct.nii.gz"
    same = read_label(predicted / "out" / "turned.nii.gz").volume.array
    np.testing.assert_array_equal(same, read_label(straight).volume.array)


def _dice(a: np.ndarray, b: np.ndarray) -> float:
    return 2 * float((a & b).sum()) / float(a.sum() + b.sum())
