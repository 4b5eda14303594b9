"""Bad input and damage: a clear error, exit code 2, nothing half-written, the others done."""

from __future__ import annotations

import json
import socket
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_pre_hook
from typer.testing import CliRunner

from pipeline.cache.index import read_teacher_index
from pipeline.cache.receipt import RECEIPT, read_receipt, write_receipt
from pipeline.cli import app as cli
from pipeline.consensus.cohort import open_cohort
from pipeline.consensus.evidence import read_evidence
from pipeline.data.registry import load_registry
from pipeline.errors import (
    GeometryError,
    RegistryError,
    TeacherError,
    WorkFolderError,
)
from pipeline.log import Log
from pipeline.student.inputs import open_inputs
from pipeline.student.settings import SupervisionConfig
from tests.stages.stage_contract import snapshot
from tests.stages.test_cache_teachers import run, units_of
from tests.tiny import change_registry, repaint, shrink_organ, teacher_data, work_of

FACTORIES = "tests.unit.teachers.made_teachers"


def factory(function: str, **changes: Any) -> dict[str, Any]:
    values = {
        "kind": "factory",
        "factory": f"{FACTORIES}:{function}",
        "weights": "teachers/liver.pt",
        "organs": {"liver": 1},
    }
    return values | changes


def keep(registry: Path, *datasets: str, **teachers: Any) -> Path:
    """A registry of fewer datasets, and with these teachers alone if any are given."""

    def change(data: dict[str, Any]) -> None:
        data["datasets"] = {d: data["datasets"][d] for d in datasets}
        if teachers:
            data["teachers"] = teachers
        known = {o for d in data["datasets"].values() for o in d["annotated"]}
        known |= {o for t in data["teachers"].values() for o in t["organs"]}
        data["organs"] = {o: i for o, i in data["organs"].items() if o in known}

    return change_registry(registry, change)


def files_of(registry: Path, part: str, dataset: str = "liver-ct") -> list[Path]:
    return sorted((registry.parent / "data" / dataset / part).glob("*.nii.gz"))


def test_a_dataset_whose_organ_is_empty_in_every_case(tiny_registry: Path) -> None:
    for label in files_of(tiny_registry, "labels"):
        repaint(label, np.zeros_like)
    report = run(tiny_registry)
    assert set(report.failed) == {"dataset liver-ct"}
    error = report.failed["dataset liver-ct"]
    assert isinstance(error, RegistryError)
    assert "liver is empty in all 3 cases" in str(error)
    assert "datasets.liver-ct.annotated.liver" in str(error)
    assert report.exit_code == 2
    # No teacher ran on it, and stage two does not get it as if it were in order.
    work = work_of(tiny_registry)
    assert not list(work.glob("teachers/*/liver-ct"))
    assert len(list(work.glob("teachers/*/spleen-ct/*.zarr"))) == 6
    cohort = open_cohort(work, load_registry(tiny_registry), datasets=["liver-ct"])
    assert not cohort.cases
    assert set(cohort.problems) == {f"liver-ct/case_{number:03}" for number in range(3)}
    assert {row["case"].split("/")[0] for row in report.details["regions_ml"]} == {
        "spleen-ct",
        "multi-ct",
    }


def test_one_case_without_the_organ_is_no_mistake(tiny_registry: Path) -> None:
    keep(tiny_registry, "liver-ct", liver=factory("threshold"))
    repaint(files_of(tiny_registry, "labels")[0], np.zeros_like)
    assert run(tiny_registry).exit_code == 0


def test_a_label_value_that_the_registry_does_not_name(tiny_registry: Path) -> None:
    keep(tiny_registry, "liver-ct", liver=factory("threshold"))
    repaint(files_of(tiny_registry, "labels")[2], lambda a: np.where(a == 1, 7, a).astype("u1"))
    report = run(tiny_registry)
    assert set(report.failed) == {"liver-ct/case_002"}
    error = report.failed["liver-ct/case_002"]
    assert isinstance(error, GeometryError)
    assert "label values [7] are not named" in str(error)
    assert len(report.done) == 4
    assert report.exit_code == 2
    assert not list(work_of(tiny_registry).rglob("*case_002@*"))


@pytest.mark.parametrize("below", [False, True])
def test_a_work_folder_that_cannot_be_written(tiny_registry: Path, below: bool) -> None:
    work_of(tiny_registry).write_text("a file is in the way")
    before = snapshot(tiny_registry.parent)
    work = work_of(tiny_registry) / "below" if below else work_of(tiny_registry)
    command = ["cache-teachers", "-q", "-r", str(tiny_registry), "-w", str(work)]
    result = CliRunner().invoke(cli.app, command)
    assert isinstance(result.exception, WorkFolderError)
    assert result.exception.exit_code == 2
    assert snapshot(tiny_registry.parent) == before


@pytest.mark.parametrize(
    ("teacher", "match"),
    [
        ({"weights": "teachers/none.pt"}, "do not exist"),
        ({"num_channels": 3}, "num_channels is 2 in the file but 3"),
        ({"taps": ["nowhere"]}, "no layer 'nowhere'"),
    ],
)
def test_a_teacher_that_does_not_load_stops_before_any_case(
    tiny_registry: Path, teacher: dict[str, Any], match: str
) -> None:
    change_registry(tiny_registry, lambda data: data["teachers"]["liver"].update(teacher))
    with pytest.raises(TeacherError, match=match):
        run(tiny_registry)
    assert units_of(work_of(tiny_registry)) == []


def test_what_nobody_foresaw_stops_one_unit_and_keeps_its_traceback(
    tiny_registry: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    keep(tiny_registry, "liver-ct", liver=teacher_data("liver"))
    bugs = [ZeroDivisionError("a bug")]

    def broken(network: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        """The first window of a CT; loading a network tries it without one."""
        if bugs and inputs[0].device.type == "cpu" and inputs[0].any():
            raise bugs.pop()

    hook = register_module_forward_pre_hook(broken)
    try:
        report = run(tiny_registry)
    finally:
        hook.remove()
    (unit,) = report.failed
    assert unit.startswith("liver x liver-ct/case_00")
    assert len(report.done) == 5
    assert report.exit_code == 1
    told = capsys.readouterr().err
    assert "in broken" in told
    assert "ZeroDivisionError: a bug" in told


def test_an_image_that_is_not_hu_fails_by_name_before_a_teacher_sees_it(
    tiny_registry: Path,
) -> None:
    keep(tiny_registry, "liver-ct", liver=factory("threshold"))
    images = files_of(tiny_registry, "images")
    repaint(images[1], lambda a: (a + 1024).astype(np.int16))
    repaint(images[2], lambda a: np.clip(a, -160, 240))
    report = run(tiny_registry)
    assert set(report.failed) == {"liver-ct/case_001"}
    error = report.failed["liver-ct/case_001"]
    assert isinstance(error, GeometryError)
    assert "it cannot be CT in HU: values lie about 1000 too high" in str(error)
    assert "subtract 1024" in str(error)
    assert report.exit_code == 2
    assert len(report.done) == 4
    work = work_of(tiny_registry)
    assert not list(work.rglob("*case_001@*"))
    # What is improbable is told, kept in the report, and repeated of cases that are there.
    kept = json.loads((work / "reports" / "cache-teachers.json").read_text())["warnings"]
    assert set(kept) == {"liver-ct/case_002"}
    assert "the image was windowed" in kept["liver-ct/case_002"][0]
    again = run(tiny_registry)
    assert (again.warnings, again.done) == (report.warnings, [])
    change_registry(tiny_registry, lambda data: data["datasets"]["liver-ct"].update(units="other"))
    other = run(tiny_registry)
    assert (other.exit_code, other.warnings) == (0, {})
    assert "liver x liver-ct/case_001" in other.done
    assert {"liver x liver-ct/case_000", "liver x liver-ct/case_002"} <= set(other.skipped)


def test_an_organ_that_the_grid_swallows_everywhere_is_told_as_that(tiny_registry: Path) -> None:
    for label in files_of(tiny_registry, "labels"):
        shrink_organ(label, 1, 48)
    keep(tiny_registry, "liver-ct", liver=factory("threshold"))
    change_registry(tiny_registry, lambda data: data["grid"].update(spacing_mm=[48, 48, 48]))
    report = run(tiny_registry)
    assert set(report.failed) == {"dataset liver-ct"}
    assert "liver has no voxel left on the student grid in any of 3 cases" in str(
        report.failed["dataset liver-ct"]
    )
    assert "Choose a finer `grid.spacing_mm`" in str(report.failed["dataset liver-ct"])
    assert all("here it counts as not annotated" in w for (w,) in report.warnings.values())
    assert len(report.warnings) == 3


def test_an_organ_that_the_grid_swallows_in_one_case_is_unknown_there(
    tiny_registry: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """In training and in validation: not absent, not scored, not calibrated by."""
    change_registry(tiny_registry, lambda data: data["grid"].update(spacing_mm=[24, 24, 24]))
    case_of = {c.split: c.case for c in load_registry(tiny_registry).cases("liver-ct")}
    for split in ("train", "validation"):
        label = tiny_registry.parent / "data/liver-ct/labels" / f"{case_of[split]}.nii.gz"
        shrink_organ(label, 1, 24)
    keep(tiny_registry, "liver-ct", liver=factory("threshold"))
    assert run(tiny_registry).exit_code == 0
    capsys.readouterr()
    work, registry = work_of(tiny_registry), load_registry(tiny_registry, files=False)
    inputs = open_inputs(
        SupervisionConfig(kind="marginal"), registry, work,
        allow_missing=False, log=Log(quiet=True),
    )  # fmt: skip
    annotated = {case.name: case.annotated for case in (*inputs.training, *inputs.validation)}
    lost = {f"liver-ct/{case}" for case in case_of.values()}
    assert {name for name, organs in annotated.items() if organs == ()} == lost
    assert set(inputs.identity["swallowed_organs"]) == lost
    assert capsys.readouterr().err == ""
    evidence = read_evidence(work, registry, read_teacher_index(
        work, "liver", registry.teacher_key("liver")))  # fmt: skip
    (score,) = evidence.organs["liver"].scored
    assert score.dice is None
    assert evidence.organs["liver"].calibration is None
    # A cache of before the program asked says that it does not know.
    for path in work.glob("cases/liver-ct/*.zarr"):
        receipt = read_receipt(path)
        (path / RECEIPT).write_text(write_receipt(replace(receipt, notes={})))
    before = open_inputs(
        SupervisionConfig(kind="marginal"), registry, work,
        allow_missing=False, log=Log(quiet=True),
    )  # fmt: skip
    assert "swallowed_organs" not in before.identity
    assert "`pipeline cache-teachers` finds out" in capsys.readouterr().err


# --- damage to the cache ------------------------------------------------------------------------


def test_what_a_killed_run_left_is_removed_and_the_rest_is_not(tiny_cached: Path) -> None:
    process = subprocess.Popen(["true"])
    process.wait()
    folder = next(work_of(tiny_cached).glob("teachers/liver@*/liver-ct"))
    left = folder / f".case_009@0.zarr~{socket.gethostname()}~{process.pid}~ab.tmp"
    (left / "log_odds").mkdir(parents=True)
    before = len(units_of(work_of(tiny_cached)))
    student = work_of(tiny_cached) / "students" / "a" / "checkpoints" / ".step_1.pt.1.tmp"
    student.parent.mkdir(parents=True)
    student.write_bytes(b"")
    assert run(tiny_cached).done == []
    assert not left.exists()
    assert student.exists()
    assert len(units_of(work_of(tiny_cached))) == before


# --- the command line ---------------------------------------------------------------------------


def test_a_bad_case_decides_the_exit_code_of_the_command(tiny_registry: Path) -> None:
    keep(tiny_registry, "liver-ct", liver=factory("threshold"))
    image = files_of(tiny_registry, "images")[0]
    image.write_bytes(b"no gzip at all")
    command = ["cache-teachers", "-q", "-r", str(tiny_registry), "-w", str(work_of(tiny_registry))]
    result = CliRunner().invoke(cli.app, command)
    assert result.exit_code == 2
    assert "4 done" in result.stderr
    assert "failed: liver-ct/case_000" in result.stderr
    assert str(image) in result.stderr
