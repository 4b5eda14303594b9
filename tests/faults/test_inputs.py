"""A teacher that yields NaN on one case; a case whose files change while they are read."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

import pipeline.cache.cases
import stages.cache_teachers
from pipeline.cli.app import app
from pipeline.data.nifti import NiftiVolume, read_image, write_image
from pipeline.data.volume import Volume
from pipeline.errors import PipelineError
from tests.faults.ledger import LEDGER
from tests.faults.small import (
    DATASET,
    content,
    hidden,
    run_stage,
    settings,
    teacher,
    unit_names,
    write_registry,
)
from tests.tiny import work_of

CASE = f"{DATASET}/case_001"


def file_of(registry: Path, part: str) -> Path:
    return registry.parent / "data" / DATASET / part / "case_001.nii.gz"


def repaint(path: Path, value: int) -> None:
    """The same file with another first voxel."""
    volume = read_image(path).volume
    array = volume.array.copy()
    array.flat[0] = value
    write_image(path, Volume(array, volume.grid))


@pytest.mark.parametrize("how", ["nan", "infinite", "raise"])
def test_a_teacher_that_fails_on_one_case(small: Path, how: str) -> None:
    repaint(file_of(small, "images"), 12345)
    poor = {
        **teacher(0.0, args={"how": how, "marked_by": 12345}, taps=[]),
        "factory": "tests.unit.teachers.made_teachers:poor",
    }
    write_registry(small, {"one": teacher(0.0), "poor": poor})
    config = small.parent / "cache.yaml"
    config.write_text(yaml.safe_dump(settings().model_dump(mode="json")))
    command = ["cache-teachers", "-q", "--device", "cpu", "-r", str(small), "-c", str(config)]
    result = CliRunner().invoke(app, [*command, "-w", str(work_of(small))])
    assert result.exit_code == 2
    assert f"failed: poor x {CASE}: " in result.stderr
    assert "8 done, 0 already there, 1 failed" in result.stderr
    assert not list(work_of(small).glob("teachers/poor@*/*/case_001@*"))
    verified = CliRunner().invoke(
        app, ["cache", "verify", "--deep", "-q", "-r", str(small), "-w", str(work_of(small))]
    )
    assert verified.exit_code == 1  # one unit is missing, and it is named
    assert f"poor x {CASE}" in verified.output
    assert run_stage(small).done == []
    LEDGER.add(f"a teacher that fails on one case: {how}")


MOMENTS = (
    "image, after it was hashed",
    "label, after it was hashed",
    "image, while the label is read",
    "image, before the first teacher",
    "image, cut short while it is read",
)


@pytest.mark.parametrize("moment", MOMENTS)
def test_a_case_whose_files_change_meanwhile(
    small: Path, undisturbed: Path, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    """It fails by name or is cached as the bytes that were digested, never as a mixture."""
    image, label = file_of(small, "images"), file_of(small, "labels")
    whole = {image: image.read_bytes(), label: label.read_bytes()}
    real_image, real_label = pipeline.cache.cases.read_image, pipeline.cache.cases.read_label

    def change_image(path: Path) -> NiftiVolume:
        if path == image and moment == MOMENTS[0]:
            repaint(image, 7)
        if path == image and moment == MOMENTS[4]:
            image.write_bytes(whole[image][: len(whole[image]) // 2])
        return real_image(path)

    def change_label(path: Path) -> NiftiVolume:
        if path == label and moment == MOMENTS[1]:
            repaint(label, 1 - int(read_image(label).volume.array.flat[0]))
        if path == label and moment == MOMENTS[2]:
            repaint(image, 7)
        return real_label(path)

    real_units = stages.cache_teachers.CacheRun.gate_units

    def gate_units(*args: Any) -> Any:
        if moment == MOMENTS[3]:
            repaint(image, 7)
        return real_units(*args)

    monkeypatch.setattr(pipeline.cache.cases, "read_image", change_image)
    monkeypatch.setattr(pipeline.cache.cases, "read_label", change_label)
    monkeypatch.setattr(stages.cache_teachers.CacheRun, "gate_units", gate_units)
    report = run_stage(small)
    monkeypatch.undo()
    # An image that changes after its case was read is met by the teachers, who read it again.
    failed = {CASE} if moment in (MOMENTS[0], MOMENTS[1], MOMENTS[4]) else set()
    failed = failed or {f"one x {CASE}", f"two x {CASE}"}
    assert set(report.failed) == failed
    for error in report.failed.values():
        assert CASE in str(error) or str(image) in str(error)
    assert report.exit_code == 2
    others = {name for name in unit_names(small) if CASE not in name}
    assert others <= set(report.done)
    assert not set(report.done) & failed
    # What there is, is what an undisturbed run makes of the files as they were.
    right, found = content(work_of(undisturbed)), content(work_of(small))
    assert {n: d for n, d in found.items() if not n.startswith("index/")}.items() <= right.items()
    assert hidden(work_of(small)) == []
    for path, data in whole.items():
        path.write_bytes(data)
    assert run_stage(small).exit_code == 0
    assert content(work_of(small)) == right
    LEDGER.add("a case that changes while it is read")


@pytest.mark.parametrize("part", ["images", "labels"])
def test_a_case_whose_file_was_not_fetched(small: Path, part: str) -> None:
    """It is named by every command that opens cases, and the others are done."""
    predictions = small.parent / "predictions"
    shutil.copytree(small.parent / "data" / DATASET / "labels", predictions / DATASET)
    here = file_of(small, part)
    kept = here.rename(here.with_name("kept"))
    here.symlink_to("../.git/annex/objects/none.nii.gz")
    registry, work = ["-r", str(small)], ["-w", str(work_of(small))]
    config = small.parent / "cache.yaml"
    config.write_text(yaml.safe_dump(settings().model_dump(mode="json")))
    splits = small.parent / "evaluate.yaml"
    splits.write_text("splits: [train, validation]\nsurface: false\n")
    label_alone = part == "labels"
    for command, code in (
        (["info", *registry], 2),
        (["check", "--no-teachers", "-q", "--json", *registry], 2),
        (["cache-teachers", "-q", "--device", "cpu", "-c", str(config), *registry, *work], 2),
        (["evaluate", str(predictions), "-q", "-c", str(splits), *registry], 2 * label_alone),
    ):
        result = CliRunner().invoke(app, command)
        error = result.exception
        said = result.output + (str(error) if isinstance(error, PipelineError) else "")
        found = error.exit_code if isinstance(error, PipelineError) else result.exit_code
        assert found == code, (command, said)
        assert not code or CASE in said, command
        assert not code or "it is a link to ../.git/annex/objects/none.nii.gz" in said, command
        assert command[0] != "cache-teachers" or "6 done, 0 already there, 1 failed" in said
    here.unlink()
    kept.rename(here)
    again = run_stage(small)
    assert (again.exit_code, set(again.done)) == (0, {n for n in unit_names(small) if CASE in n})
    LEDGER.add("a case whose file was not fetched")
