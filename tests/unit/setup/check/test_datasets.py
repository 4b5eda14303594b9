"""Datasets in `pipeline check`: one damaged cohort, every damage named with its case."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest

from pipeline.data.nifti import read_grid
from pipeline.data.registry import load_registry
from pipeline.errors import RegistryError
from pipeline.log import Log
from pipeline.setup.check.cases import Finding
from pipeline.setup.check.cohort import DataReport, check_datasets
from pipeline.setup.check.report import Report, print_report
from tests.tiny import ORGANS, WINDOW, RunCli, change_registry, shrink_organ


def check(registry: Path, **options: Any) -> DataReport:
    known = {"patch": WINDOW, "jobs": 1, "log": Log(quiet=True)}
    return check_datasets(load_registry(registry, files=False), **(known | options))


def file_of(registry: Path, case: str, kind: str = "image") -> Path:
    dataset, name = case.split("/")
    return registry.parent / "data" / dataset / f"{kind}s" / f"{name}.nii.gz"


def rewrite(path: Path, change: Callable[[Any], Any], **header: Any) -> None:
    source = nib.load(path)
    affine = header.get("affine", source.affine)
    image = nib.Nifti1Image(np.ascontiguousarray(change(np.asarray(source.dataobj))), affine)
    if "code" in header:
        image.set_sform(affine, header["code"])
        image.set_qform(affine, header["code"])
    if "qform" in header:
        image.set_sform(affine, 1)
        image.set_qform(header["qform"], 1)
    if "unit" in header:
        image.header.set_xyzt_units(header["unit"])
    nib.save(image, path)


def of(report: DataReport, where: str) -> list[Finding]:
    return [finding for finding in report.findings if finding.where == where]


def only(report: DataReport, where: str) -> Finding:
    (found,) = of(report, where)
    return found


def test_a_sound_cohort_has_no_finding(tiny_registry: Path) -> None:
    report = check(tiny_registry)
    assert report.findings == []
    assert report.num_cases == len(report.cases) == 9
    for case in report.cases:
        label = nib.load(file_of(tiny_registry, case.case, "label"))
        image = nib.load(file_of(tiny_registry, case.case))
        voxel_ml = abs(np.linalg.det(label.affine[:3, :3])) / 1000
        values = dict(enumerate(ORGANS, 1)) if case.dataset == "multi-ct" else {
            1: case.dataset.removesuffix("-ct")
        }  # fmt: skip
        for value, organ in values.items():
            voxels = int((np.asarray(label.dataobj) == value).sum())
            assert case.organ_ml[organ] == pytest.approx(voxels * voxel_ml, abs=1e-3)
        assert sorted(case.shape or ()) == sorted(image.shape)
        assert case.stored == "".join(nib.aff2axcodes(image.affine))
        assert case.hu is not None
        assert case.hu.low == np.asarray(image.dataobj).min()
    # Liver and spleen lie on their own sides, whatever the files' orders.
    sides = {
        organ: {np.sign(c.organ_place[organ][2]) for c in report.cases if organ in c.organ_place}
        for organ in ORGANS
    }
    assert sides == {"liver": {1.0}, "spleen": {-1.0}}


def test_every_damage_is_named(tiny_registry: Path) -> None:
    files = {
        name: (file_of(tiny_registry, name), file_of(tiny_registry, name, "label"))
        for name in (f"{d}-ct/case_00{n}" for d in ("liver", "spleen", "multi") for n in range(3))
    }
    rewrite(files["liver-ct/case_000"][1], lambda a: np.where(a == 0, 0, 77).astype(np.uint8))
    rewrite(files["liver-ct/case_001"][0], lambda a: a + 1024)
    files["liver-ct/case_002"][0].write_bytes(files["liver-ct/case_002"][0].read_bytes()[:200])
    moved = nib.load(files["spleen-ct/case_000"][1]).affine.copy()
    moved[:3, 3] += 7
    rewrite(files["spleen-ct/case_000"][1], lambda a: a, affine=moved)
    rewrite(files["spleen-ct/case_001"][1], lambda a: a[:-1])
    nan = np.float32("nan")
    rewrite(files["spleen-ct/case_002"][0], lambda a: np.where(a > 50, nan, a).astype(np.float32))
    rewrite(files["multi-ct/case_000"][0], lambda a: a, code=0)
    rewrite(files["multi-ct/case_001"][0], lambda a: a, unit="micron")
    rewrite(files["multi-ct/case_002"][1], lambda a: np.where(a == 2, 0, a))
    turned = nib.load(files["multi-ct/case_002"][0]).affine.copy()
    turned[:3, 3] += 30
    rewrite(files["multi-ct/case_002"][0], lambda a: a, qform=turned)
    report = check(tiny_registry)
    found = {(f.severity, f.kind, f.where): f.what for f in report.findings}
    multi = {f.kind: f.what for f in of(report, "multi-ct/case_002")}
    assert "77 (" in found["error", "values", "liver-ct/case_000"]
    assert "too high" in found["error", "hu", "liver-ct/case_001"]
    assert "not a readable NIfTI" in found["error", "file", "liver-ct/case_002"]
    grid = found["error", "grid", "spleen-ct/case_000"]
    assert "12.12 mm away" in grid
    assert "first voxels 12.1 mm apart" in grid
    assert "spacing" not in grid
    assert "the label has shape" in found["error", "grid", "spleen-ct/case_001"]
    assert "voxels are NaN or infinite" in found["error", "file", "spleen-ct/case_002"]
    assert "which side is left" in found["warning", "header", "multi-ct/case_000"]
    assert "in microns" in found["error", "header", "multi-ct/case_001"]
    assert multi["organ"] == "spleen has no voxel in the label."
    assert "52.0 mm apart" in multi["header"]
    assert all(finding.fix for finding in report.findings)
    severities = [finding.severity for finding in report.findings]
    assert severities == sorted(severities)  # errors come first
    # Of the damaged file nothing is known, of its label everything.
    facts = {case.case: case for case in report.cases}
    assert facts["liver-ct/case_002"].shape is None
    assert facts["liver-ct/case_002"].organ_ml["liver"] > 0


def test_a_tilted_gantry_is_named(tiny_registry: Path) -> None:
    name = "multi-ct/case_001"
    lean = np.eye(4)
    lean[1:3, 2] = np.sin(np.radians(25)), np.cos(np.radians(25))
    for kind in ("image", "label"):
        path = file_of(tiny_registry, name, kind)
        rewrite(path, lambda a: a, affine=lean @ nib.load(path).affine)
    found = only(check(tiny_registry), name)
    assert (found.severity, found.kind) == ("warning", "grid")
    degrees = read_grid(file_of(tiny_registry, name)).shear_degrees
    assert 20 < degrees < 30  # it was turned a little before
    assert f"sheared by {degrees:.1f} degrees, as by a tilted gantry" in found.what
    assert "resample image and label onto upright axes together" in found.fix


def test_small_organs_are_counted_on_the_grid(tiny_registry: Path) -> None:
    for case in range(3):
        shrink_organ(file_of(tiny_registry, f"liver-ct/case_00{case}", "label"), 1, 48)
    change_registry(tiny_registry, lambda data: data["grid"].update(spacing_mm=[48, 48, 48]))
    report = check(tiny_registry, dataset="liver-ct", patch=(2, 2, 2))
    assert {(f.severity, f.kind, f.where) for f in report.findings} == {
        ("error", "small", "liver-ct"),
        *(("warning", "small", f"liver-ct/case_00{n}") for n in range(3)),
    }
    assert "in any of 3 cases" in only(report, "liver-ct").what
    said = only(report, "liver-ct/case_000")
    assert said.what.startswith("liver has 1 voxel in the label's file and none on the student")
    assert "finer `grid.spacing_mm`" in said.fix
    found = check(tiny_registry, dataset="spleen-ct", patch=(2, 2, 2))
    assert any("spleen keeps" in f.what and f.severity == "warning" for f in found.findings)


def test_other_units_and_noise_in_labels(tiny_registry: Path) -> None:
    rewrite(file_of(tiny_registry, "liver-ct/case_001"), lambda a: (a + 1024).astype(np.int16))
    label = file_of(tiny_registry, "liver-ct/case_002", "label")
    rewrite(label, lambda a: a.astype(np.float32) + np.float32(1e-4))
    report = check(tiny_registry)
    assert only(report, "liver-ct/case_001").severity == "error"
    noise = only(report, "liver-ct/case_002")
    assert (noise.severity, noise.kind) == ("warning", "values")
    assert "were rounded" in noise.what
    change_registry(tiny_registry, lambda data: data["datasets"]["liver-ct"].update(units="other"))
    assert check(tiny_registry).findings == [noise]


def test_one_scan_in_two_orders_of_axes_is_found(tiny_registry: Path) -> None:
    """In a training dataset and among test cases, stored the other way round."""
    source = nib.load(file_of(tiny_registry, "liver-ct/case_000"))
    turned = source.as_reoriented(np.array([[2, -1], [0, 1], [1, -1]]))
    nib.save(turned, file_of(tiny_registry, "multi-ct/case_001"))
    facts = {c.case: c for c in check(tiny_registry).cases}
    split = facts["liver-ct/case_000"].split
    (found,) = [f for f in check(tiny_registry).findings if f.kind == "duplicate"]
    assert found.where == "liver-ct/case_000"
    assert "multi-ct/case_001 (test)" in found.what
    assert found.severity == ("error" if split == "train" else "warning")
    assert facts["liver-ct/case_000"].stored != facts["multi-ct/case_001"].stored


def test_files_and_patterns_are_findings_too(tiny_registry: Path) -> None:
    file_of(tiny_registry, "liver-ct/case_000", "label").unlink()
    change_registry(
        tiny_registry,
        lambda data: data["datasets"]["multi-ct"]["split"].update(train=["case_009"]),
    )
    report = check(tiny_registry)
    found = {f.where: f.what for f in report.findings if f.kind == "registry"}
    assert "images without a label" in found["liver-ct"]
    assert "there is no case case_009" in found["multi-ct"]
    # The one that is gone was the one that validates.
    (empty,) = [f for f in report.findings if f.kind == "split"]
    assert (empty.severity, empty.where) == ("warning", "liver-ct")
    assert empty.what == "none of its 2 cases falls into validation (0.2)."
    assert {case.case for case in report.cases} >= {"liver-ct/case_001", "multi-ct/case_002"}


def test_a_phantom_that_was_not_made(tiny_registry: Path) -> None:
    for folder in ("images", "labels"):
        for path in (tiny_registry.parent / "data" / "liver-ct" / folder).iterdir():
            path.unlink()
    spec = {"num_cases": 3, "seed": 1, "annotated": ["liver"]}
    change_registry(tiny_registry, lambda data: data["datasets"]["liver-ct"].update(phantom=spec))
    assert only(check(tiny_registry), "liver-ct").fix == "Run `pipeline phantom`."


def test_a_case_that_is_smaller_than_the_patch(tiny_registry: Path) -> None:
    assert check(tiny_registry, patch=(28, 8, 8), dataset="liver-ct").findings == []
    report = check(tiny_registry, patch=(64, 8, 8), dataset="liver-ct")
    assert len(report.findings) == len(report.cases) == 3
    assert {f.severity for f in report.findings} == {"warning"}
    assert "the student's patch of 64 x 8 x 8" in report.findings[0].what
    with pytest.raises(RegistryError, match=r"no dataset 'lung'.*liver-ct"):
        check(tiny_registry, dataset="lung")


def test_processes_find_the_same(tiny_registry: Path) -> None:
    rewrite(file_of(tiny_registry, "liver-ct/case_001"), lambda a: a * 0)
    assert check(tiny_registry, jobs=2) == check(tiny_registry)


def test_people_see_rows_and_machines_see_all(
    tiny_registry: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    run_cli: RunCli,
) -> None:
    for number in range(3):
        path = file_of(tiny_registry, f"multi-ct/case_00{number}", "label")
        rewrite(path, lambda a: np.where(a == 1, 9, a))
    arguments = ["check", "-r", str(tiny_registry), "--jobs", "1", "--no-teachers"]
    code, out, err = run_cli(*arguments, "--json")
    assert (code, err) == (2, "")
    found = json.loads(out)
    assert (found["num_errors"], found["teachers"]) == (4, None)
    assert {f["kind"] for f in found["findings"]} == {"values", "organ", "patch"}
    assert len(found["cases"]) == 9
    registry = load_registry(tiny_registry)
    monkeypatch.setenv("COLUMNS", "200")
    print_report(Report(registry, check(tiny_registry), None))
    out = capsys.readouterr().out
    assert "multi-ct/case_000, multi-ct/case_001, multi-ct/case_002" in out
    assert "liver is empty in all 3 labels" in out
    assert "4 errors, 0 warnings in 9 cases" in out


def test_warnings_alone_end_well(tiny_registry: Path, run_cli: RunCli) -> None:
    arguments = ["check", "-r", str(tiny_registry), "--no-teachers", "--dataset", "liver-ct"]
    code, out, _ = run_cli(*arguments, "--jobs", "1")
    assert code == 0
    assert "0 errors, 3 warnings in 3 cases" in out  # the default patch is larger than these


def test_equal_errors_of_many_cases_share_a_row(
    tiny_registry: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Files cut at other places; one is something else, and has a row of its own."""
    other = file_of(tiny_registry, "liver-ct/case_001")
    for dataset in ("liver-ct", "multi-ct"):
        for number in range(3):
            path = file_of(tiny_registry, f"{dataset}/case_00{number}")
            if path != other:
                path.write_bytes(path.read_bytes()[: 400 + number])
    rewrite(other, lambda a: a[..., None].repeat(2, -1))
    report = Report(load_registry(tiny_registry), check(tiny_registry), None)
    monkeypatch.setenv("COLUMNS", "900")
    print_report(report)
    out = capsys.readouterr().out
    rows = [line.split("│")[2:4] for line in out.splitlines() if line.startswith("│ error")]
    assert [row[0].strip() for row in rows] == [
        "liver-ct/case_000, liver-ct/case_002",
        "liver-ct/case_001",
        "multi-ct/case_000, multi-ct/case_001, multi-ct/case_002",
    ]
    assert "(This is the first; the others are alike.)" in rows[2][1]
    assert "6 errors, 0 warnings in 9 cases. All of them: --json." in out
    assert len(report.to_json()["findings"]) == 6


def test_an_image_in_place_of_a_label_is_told_in_a_few_lines(tiny_registry: Path) -> None:
    path = file_of(tiny_registry, "liver-ct/case_000", "label")
    rewrite(path, lambda a: np.arange(a.size, dtype=np.uint16).reshape(a.shape))
    (found,) = [f for f in check(tiny_registry).findings if f.kind == "values"]
    assert found.what.endswith("9 (1 voxels) and 25910 more (is it an image, not a label map?).")
    assert len(found.what) < 250
