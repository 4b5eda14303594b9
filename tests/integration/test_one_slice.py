"""The whole road with cases of one slice, and slices beside volumes: seconds, at toy size."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import yaml
from typer.testing import CliRunner

from pipeline.cli.app import app
from pipeline.errors import PipelineError
from tests.tiny import ORGANS, TAP, change_registry

FLAT = {
    "name": "UNet",
    "args": {
        "channels": [4, 8, 8], "strides": [[1, 2, 2], [1, 2, 2]], "kernel_size": [1, 3, 3],
        "up_kernel_size": [1, 3, 3], "num_res_units": 0, "norm": "instance",
    },
}  # fmt: skip
# All that may be done to one slice.
AUGMENT = {
    "flip_axes": [0], "rotate_axes": [0], "intensity": 1.0,
    "affine": {"probability": 0.5, "degrees": [20, 20, 20]},
}  # fmt: skip
TRAINING = {
    "steps": 4, "batch_size": 2, "patch": [1, 16, 16], "validate_every": 4, "network": FLAT,
}  # fmt: skip


def pipeline(*arguments: Any, code: int = 0) -> str:
    result = CliRunner().invoke(app, [str(a) for a in arguments])
    error = result.exception
    found = error.exit_code if isinstance(error, PipelineError) else result.exit_code
    assert found == code, f"{result.output}\n{error!r}"
    return f"{result.output}{error if isinstance(error, PipelineError) else ''}"


def settings(folder: Path, name: str, values: Any) -> Path:
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(values), encoding="utf-8")
    return path


def student(folder: Path, run: str, training: Any) -> Path:
    return settings(folder, run, {"run": run, "training": training})


def cut(folder: Path, cases: Sequence[str], *, flat: bool = False) -> None:
    """Leaves of each case the slice that shows most of its organs; `flat`: as a 2D file."""
    for case in cases:
        dataset, name = case.split("/")
        paths = [folder / dataset / kind / f"{name}.nii.gz" for kind in ("images", "labels")]
        files: list[Any] = [nib.as_closest_canonical(nib.load(path)) for path in paths]
        areas = np.count_nonzero(np.asarray(files[1].dataobj), axis=(0, 1))
        number = int(areas.argmax())
        for path, file in zip(paths, files, strict=True):
            part = file.slicer[:, :, number : number + 1]
            if flat:
                part = nib.Nifti1Image(np.asarray(part.dataobj)[:, :, 0], part.affine)
            nib.save(part, path)


@pytest.fixture
def slices(tiny_registry: Path) -> Path:
    """The tiny cohort, a slice of each case, and teachers that are still to be trained."""
    data = tiny_registry.parent / "data"
    cases = [f"{d}-ct/case_00{n}" for d in (*ORGANS, "multi") for n in range(3)]
    cut(data, cases[1:])
    cut(data, cases[:1], flat=True)
    for organ in ORGANS:
        (tiny_registry.parent / "teachers" / f"{organ}.pt").unlink()
    return tiny_registry


@pytest.mark.slow
def test_slices_go_the_whole_road(slices: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(slices.parent)
    here = slices.parent
    both = ("-r", slices, "-w", "work")
    alone = settings(here, "teachers", {"training": TRAINING | {"augment": AUGMENT}})
    windows = settings(here, "cache", {"window": {"shape": [1, 16, 16]}})
    features = {"weight": 0.1, "student_taps": [TAP]}
    taught = student(
        here, "taught", TRAINING | {"supervision": {"kind": "ms_kd", "features": features}}
    )
    moved = student(here, "moved", TRAINING | {"augment": AUGMENT})
    pipeline("train-teachers", *both, "-c", alone, "--device", "cpu")
    pipeline("check", "-r", slices, "-c", windows, "--student", moved, "--device", "cpu")
    pipeline("plan", *both, "-c", windows, "--device", "cpu")
    pipeline("cache-teachers", *both, "-c", windows, "--device", "cpu")
    for config in (taught, moved):
        pipeline("train-student", *both, "-c", config, "--device", "cpu", "--workers", 0)
    run = here / "work" / "students" / "taught"
    pipeline("predict", run / "student.pt", "-r", slices, "-o", "out", "--device", "cpu")
    pipeline("evaluate", "out", "-r", slices)
    scores = json.loads((here / "out" / "summary.json").read_text(encoding="utf-8"))
    assert len(scores["metric_per_case"]) == 2
    pipeline("inspect", "multi-ct/case_000", *both, "-o", "looked")
    assert list((here / "looked").rglob("*.png"))
    pipeline("report", run, *both, "-o", "report.html")
    page = (here / "report.html").read_text(encoding="utf-8")
    assert "axial" in page
    assert "coronal, slice" not in page
    images = here / "data" / "liver-ct" / "images"
    pipeline("predict", run / "student.pt", images, "-o", "any", "--device", "cpu")
    image, label = (nib.load(part / "case_000.nii.gz") for part in (images, here / "any"))
    assert len(image.shape) == 2
    assert label.shape == image.shape
    np.testing.assert_array_equal(label.affine, image.affine)
    for form in ("bundle", "torchscript"):
        pipeline("export", run / "student.pt", "-o", "exported", "-f", form)


def test_slices_beside_volumes(tiny_registry: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Flat patches see both; thicker ones are refused by the case's name, by `check` already."""
    here = tiny_registry.parent
    monkeypatch.chdir(here)
    cut(here / "data", ["liver-ct/case_001", "multi-ct/case_001"])
    both = ("-r", tiny_registry, "-w", "work")
    labels = TRAINING | {"supervision": {"kind": "marginal"}, "augment": AUGMENT}
    thick = student(here, "thick", labels | {"patch": [8, 16, 16]})
    flat = student(here, "flat", labels)
    plain = ("check", "-r", tiny_registry, "--device", "cpu", "--json")
    said = json.loads(pipeline(*plain, "--student", thick, "--no-teachers", code=2))
    errors = [f for f in said["findings"] if f["severity"] == "error"]
    assert [f["where"] for f in errors] == ["liver-ct/case_001", "multi-ct/case_001"]
    assert "Set `patch` to [1, h, w]" in errors[0]["fix"]
    # Teachers are tried on a slice, wherever it is, and these are for volumes.
    said = json.loads(pipeline(*plain, "--student", flat, code=2))
    assert said["teachers"]["case"] == "liver-ct/case_001"
    assert "would be all but padding" in said["teachers"]["teachers"][0]["problem"]
    change_registry(tiny_registry, lambda data: data.pop("teachers"))
    pipeline(*plain, "--student", flat)
    pipeline("cache-teachers", *both, "--device", "cpu")
    alone = ("--device", "cpu", "--workers", 0)
    said = pipeline("train-student", *both, "-c", thick, *alone, code=2)
    assert "liver-ct/case_001: one slice, " in " ".join(said.split())
    pipeline("train-student", *both, "-c", flat, *alone)
    trained = here / "work" / "students" / "flat" / "student.pt"
    pipeline("predict", trained, "-r", tiny_registry, "-o", "out", "--device", "cpu")
    pipeline("evaluate", "out", "-r", tiny_registry)
