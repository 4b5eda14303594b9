"""`pipeline inspect` as it is typed, on the tiny cohort."""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path
from typing import Any

import matplotlib.image
import nibabel as nib
import numpy as np
import pytest
import yaml
from typer.testing import CliRunner, Result

from pipeline.cli.app import app
from pipeline.consensus.cohort import open_case
from pipeline.data.nifti import read_image, read_label
from pipeline.data.registry import load_registry
from pipeline.errors import CacheMissing, CacheStale, ConfigError, PipelineError, RegistryError
from tests.stages.stage_contract import snapshot
from tests.tiny import change_registry, training_settings, work_of

CASE = "liver-ct/case_001"


def call(registry: Path, output: Path, *arguments: str) -> Result:
    options = ["-r", str(registry), "-w", str(work_of(registry)), "-o", str(output), "-q"]
    return CliRunner().invoke(app, ["inspect", *arguments, *options])


def inspected(registry: Path, output: Path, *arguments: str) -> Any:
    result = call(registry, output, "--json", *arguments)
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


def cohort_case(registry: Path, output: Path, *arguments: str) -> Any:
    """The organs of `CASE` in the table of all: quicker than its files and its figure."""
    found = inspected(registry, output, *arguments)
    (case,) = (c for c in found["cases"] if c["case"] == CASE)
    return case["organs"]


def error_of(registry: Path, output: Path, *arguments: str) -> PipelineError:
    error = call(registry, output, *arguments).exception
    assert isinstance(error, PipelineError)
    assert not output.exists()
    return error


def test_cases_that_are_not_in_the_cache_are_named_or_left_out(
    tiny_cached: Path, tmp_path: Path
) -> None:
    for part in ("images", "labels"):
        there = tiny_cached.parent / "data" / "liver-ct" / part / "case_001.nii.gz"
        shutil.copy(there, there.with_name("case_010.nii.gz"))
    lost = "liver-ct/case_010"
    result = call(tiny_cached, tmp_path / "out", "--json")
    assert result.exit_code == 1
    assert list(json.loads(result.stdout)["failed"]) == [lost]
    result = call(tiny_cached, tmp_path / "out", "--json", "--allow-missing")
    assert result.exit_code == 0, result.output
    assert f"cases that are not in the cache and left out: {lost}" in result.stderr
    assert json.loads(result.stdout)["failed"] == {}


def test_files_of_others_stay(built_cache: Path, tmp_path: Path) -> None:
    """A folder of cases, each with its image, is no place for what is drawn of them."""
    image = tmp_path / CASE / "image.nii.gz"
    image.parent.mkdir(parents=True)
    image.write_text("a CT")
    (tmp_path / "cohort.csv").write_text("case,age\n")
    before = snapshot(tmp_path)
    for arguments, path in (((CASE,), image), ((), tmp_path / "cohort.csv")):
        error = call(built_cache, tmp_path, *arguments).exception
        assert isinstance(error, ConfigError)
        assert f"{path}: `pipeline inspect` did not write this file and does" in str(error)
        assert snapshot(tmp_path) == before
    for path in (image, tmp_path / "cohort.csv"):
        path.unlink()
    for arguments in ((CASE, "--no-reliability"), (), (CASE, "--no-reliability"), ()):
        assert call(built_cache, tmp_path, *arguments).exit_code == 0


def test_files_of_a_case_lie_where_the_case_lies(built_cache: Path, tmp_path: Path) -> None:
    result = call(built_cache, tmp_path, CASE, "--no-reliability")
    assert result.exit_code == 0, result.output
    folder = tmp_path / CASE
    written = {Path(line).name for line in result.stdout.splitlines()}
    assert written == {path.name for path in folder.iterdir()}
    registry = load_registry(built_cache, files=False)
    case = open_case(work_of(built_cache), registry, CASE, ["liver", "spleen"])
    for name in ("label", "regions", "agreed_background", "conflicts", "abstained"):
        volume = read_label(folder / f"{name}.nii.gz").volume
        assert volume.grid.shape == case.grid.shape
        np.testing.assert_allclose(volume.grid.matrix, case.grid.matrix, atol=1e-4)
    np.testing.assert_array_equal(read_image(folder / "image.nii.gz").volume.array, case.image())
    regions = read_label(folder / "regions.nii.gz").volume.array
    np.testing.assert_array_equal(regions == 1, case.label() == 1)
    against = read_label(folder / "against_label.nii.gz").volume.array
    said = case.log_odds("liver", "liver") > 0
    np.testing.assert_array_equal(against >= 2, (case.label() == 1) & ~said)
    # As a viewer reads it: one whole number per voxel, RAS+ in mm.
    image = nib.load(folder / "regions.nii.gz")
    assert image.get_data_dtype() == np.uint8
    assert nib.aff2axcodes(image.affine) == ("R", "A", "S")
    assert image.header.get_zooms() == pytest.approx((12, 12, 12))
    assert (folder / "organs.ctbl").read_text().splitlines()[3].startswith("1 liver ")
    assert '"spleen"' in (folder / "organs.label.txt").read_text()
    assert matplotlib.image.imread(folder / "figure.png").std() > 0.1


def test_flags_and_yaml_change_the_regions(built_cache: Path, tmp_path: Path) -> None:
    def liver(*arguments: str) -> float:
        return float(cohort_case(built_cache, tmp_path, *arguments)["liver"]["region_ml"])

    supervision = {"labels_win": False, "margin": 0.1}
    settings = {"training": training_settings(supervision=supervision)}
    student = tmp_path / "student.yaml"
    student.write_text(yaml.safe_dump(settings))
    label = liver()
    assert liver("-c", str(student)) == liver("--no-labels-win", "--margin", "0.1") != label
    assert liver("-c", str(student), "--labels-win") == label
    assert liver("--no-labels-win", "--margin", "0.3") < liver("-c", str(student))


def test_calibrated_regions_are_those_of_a_calibrated_training(
    built_cache: Path, tmp_path: Path
) -> None:
    plain = cohort_case(built_cache, tmp_path, "--margin", "0.2", "--no-labels-win")
    heat = cohort_case(built_cache, tmp_path, "--margin", "0.2", "--no-labels-win", "--calibrated")
    assert plain != heat


def test_who_is_not_believed_is_told_with_the_reason(built_cache: Path, tmp_path: Path) -> None:
    """After eight steps no teacher finds its organ."""
    plain = inspected(built_cache, tmp_path, "--no-reliability")
    assert plain["doubts"] == []
    found = inspected(built_cache, tmp_path)
    (spleen,) = (row for row in found["doubts"] if row["organ"] == "spleen")
    assert spleen["teacher"] == "spleen"
    asked = [case for case in found["cases"] if not case["case"].startswith("spleen-ct/")]
    sides = ("no_here", "no_not_here", "silent")
    assert 0 < sum(spleen[side] for side in sides) <= spleen["num_cases"] <= len(asked)
    (case,) = (c for c in found["cases"] if c["case"] == CASE)
    (doubt,) = (d for d in case["doubts"] if d["organ"] == "spleen")
    assert not (doubt["here"] and doubt["not_here"])
    assert doubt["why"]
    settings = {"training": training_settings(supervision={"reliability": None})}
    student = tmp_path / "student.yaml"
    student.write_text(yaml.safe_dump(settings))
    assert inspected(built_cache, tmp_path, "-c", str(student)) == plain
    result = call(built_cache, tmp_path)
    assert "Teachers that are not believed everywhere" in result.stdout


def test_the_table_of_all_cases(built_cache: Path, tmp_path: Path) -> None:
    before = snapshot(work_of(built_cache))
    result = call(built_cache, tmp_path)
    assert result.exit_code == 0, result.output
    assert "Improbable" in result.stdout
    assert snapshot(work_of(built_cache)) == before
    found = json.loads((tmp_path / "cohort.json").read_text())
    assert len(found["cases"]) == 9
    flags = [len(case["flags"]) for case in found["cases"]]
    assert flags == sorted(flags, reverse=True)
    with (tmp_path / "cohort.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["case"] for row in rows] == [case["case"] for case in found["cases"]]
    for row, case in zip(rows, found["cases"], strict=True):
        liver = case["organs"].get("liver", {"region_ml": ""})  # "": nobody is believed of it
        assert row["liver: region_ml"] == str(liver["region_ml"])
    again = inspected(built_cache, tmp_path)
    assert again == found


def test_a_case_that_is_not_cached(tiny_cached: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    error = error_of(tiny_cached, output, "liver-ct/case_9")
    assert isinstance(error, CacheMissing)
    assert "pipeline cache-teachers" in str(error)
    assert isinstance(error_of(tiny_cached, output, "nowhere/case_1"), RegistryError)
    change_registry(tiny_cached, lambda data: data["teachers"]["liver"].update(taps=[]))
    error = error_of(tiny_cached, output, CASE)
    assert isinstance(error, CacheStale)
    assert "pipeline cache-teachers" in str(error)
    change_registry(tiny_cached, lambda data: data.update(teachers={}))
    assert isinstance(error_of(tiny_cached, output), ConfigError)


def test_a_teacher_that_is_not_cached_for_one_case(tiny_cached: Path, tmp_path: Path) -> None:
    (gone,) = work_of(tiny_cached).glob(f"teachers/liver@*/{CASE}@*.zarr")
    shutil.rmtree(gone)
    error = error_of(tiny_cached, tmp_path / "out", CASE)
    assert isinstance(error, CacheMissing)
    assert "pipeline cache-teachers" in str(error)
    numbers = inspected(tiny_cached, tmp_path / "out", CASE, "--allow-missing")
    assert [entry["teacher"] for entry in numbers["teachers"]] == ["spleen"]

    result = call(tiny_cached, tmp_path / "all")
    assert result.exit_code == 1
    assert f"not inspected: liver x {CASE}" in result.stderr
    found = json.loads((tmp_path / "all" / "cohort.json").read_text())
    assert len(found["cases"]) == 8
    assert len(inspected(tiny_cached, tmp_path / "all", "--allow-missing")["cases"]) == 9


def test_damage_that_only_reading_finds_stops_one_case(tiny_cached: Path, tmp_path: Path) -> None:
    (unit,) = work_of(tiny_cached).glob(f"teachers/liver@*/{CASE}@*.zarr")
    (shard,) = (p for p in (unit / "log_odds").rglob("c/**/*") if p.is_file())
    data = bytearray(shard.read_bytes())
    data[len(data) // 3] ^= 0xFF
    shard.write_bytes(bytes(data))
    result = call(tiny_cached, tmp_path)
    assert result.exit_code == 1
    assert f"not inspected: {CASE}:" in result.stderr
    assert len(json.loads((tmp_path / "cohort.json").read_text())["cases"]) == 8
