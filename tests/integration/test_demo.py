"""`pipeline demo --quick` as a new user runs it, in a process of its own."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from pipeline.cli.demo import STUDENTS, write_settings
from pipeline.data.labels import IGNORE
from pipeline.errors import ConfigError

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("name", ["cache_teachers.yaml", "overlay.png", "work"])
def test_a_folder_with_files_of_others_is_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text("mine")
    (tmp_path / "notes.txt").write_text("in nobody's way")
    with pytest.raises(ConfigError) as caught:
        write_settings(tmp_path, quick=True)
    assert str(caught.value) == (
        f"{tmp_path / name}: `pipeline demo` did not write this file and does not replace it. "
        "Name another folder."
    )
    assert {path.name for path in tmp_path.iterdir()} == {name, "notes.txt"}


def test_settings_that_somebody_changed_stay(tmp_path: Path) -> None:
    write_settings(tmp_path, quick=True)
    write_settings(tmp_path, quick=True)
    path = tmp_path / "train_student_ms_kd.yaml"
    changed = path.read_text().replace("steps: 8", "steps: 800")
    path.write_text(changed)
    with pytest.raises(ConfigError, match=r"kd\.yaml: these are not the settings of this demo"):
        write_settings(tmp_path, quick=True)
    assert path.read_text() == changed


def run_demo(folder: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "pipeline.cli", "demo", "--quick", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done


def files_with_times(folder: Path) -> dict[str, int]:
    return {
        str(path.relative_to(folder)): path.stat().st_mtime_ns
        for path in folder.rglob("*")
        # networks, NIfTI files and chunks (which have no suffix); reports and tables are made anew
        if path.is_file() and path.suffix in {".pt", ".gz", ""}
    }


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    folder = tmp_path_factory.mktemp("demo")
    return folder, run_demo(folder).stdout


def test_it_ends_with_a_table_and_says_where_everything_is(demo: tuple[Path, str]) -> None:
    folder, printed = demo
    for word in ("ms_kd", "pseudo_label", "marginal", "teachers", "liver", "pancreas", "mean"):
        assert word in printed
    assert str(folder / "overlay.png") in printed
    assert (folder / "overlay.png").stat().st_size > 20_000
    assert "one seed" in printed
    assert "difference to marginal" in printed
    compared = json.loads((folder / "kinds" / "validation.json").read_text())
    assert [entry["name"] for entry in compared["configurations"]] == list(STUDENTS)
    assert (folder / "kinds" / "validation.png").stat().st_size > 20_000
    for kind in STUDENTS:
        run = folder / "work" / "students" / "kinds" / f"{kind}-seed0"
        assert (run / "student.pt").is_file()
        assert (run / "progress.png").is_file()
        lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        assert [line["step"] for line in lines if "loss" in line] == list(range(1, 9))


def test_predictions_lie_on_the_grid_of_their_images(demo: tuple[Path, str]) -> None:
    folder, _ = demo
    found = sorted((folder / "predictions" / "ms_kd").rglob("*.nii.gz"))
    assert found
    for path in found:
        label = nib.load(path)
        image = nib.load(folder / "phantom" / path.parent.name / "images" / path.name)
        assert label.shape == image.shape
        np.testing.assert_array_equal(label.affine, image.affine)
        assert set(np.unique(np.asarray(label.dataobj))) <= {0, 1, 2, 3, 4}
        assert IGNORE not in np.asarray(label.dataobj)


def test_every_case_and_teacher_is_in_the_cache(demo: tuple[Path, str]) -> None:
    folder, _ = demo
    command = [sys.executable, "-m", "pipeline.cli", "status", "--json"]
    where = ["-r", str(folder / "data_registry.yaml"), "-w", str(folder / "work")]
    done = subprocess.run([*command, *where], capture_output=True, text=True, check=True)
    status = json.loads(done.stdout)
    assert status["not_done"] == []
    assert len(status["counts"]) == 5 * (1 + 4)
    assert all(row["done"] == 3 or row["dataset"] == "multi-organ-ct" for row in status["counts"])
    assert set(status["runs"].values()) == {"finished"}


def test_a_second_run_does_nothing_again(demo: tuple[Path, str]) -> None:
    folder, printed = demo
    before = files_with_times(folder)
    again = run_demo(folder)
    assert files_with_times(folder) == before
    table = [line for line in printed.splitlines() if line.startswith("│")]
    assert table == [line for line in again.stdout.splitlines() if line.startswith("│")]


def test_a_full_demo_does_not_write_over_a_quick_one(demo: tuple[Path, str]) -> None:
    folder, _ = demo
    before = (folder / "data_registry.yaml").read_bytes()
    command = [sys.executable, "-m", "pipeline.cli", "demo", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 2
    assert "another size" in done.stderr
    assert (folder / "data_registry.yaml").read_bytes() == before
