"""A trained nnU-Net model folder through stage one, from NIfTI files to the cache and back."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import yaml

from pipeline.cache.schema import round_bits
from pipeline.cli import app as cli
from pipeline.data.nifti import read_image
from pipeline.data.registry import load_registry
from pipeline.data.resample import resample
from pipeline.review.status import status
from pipeline.teachers.teacher import organ_log_odds
from tests.blobs import write_blobs
from tests.nnunet_models import copy_model
from tests.stages.stage_contract import snapshot
from tests.stages.test_cache_teachers import run
from tests.stages.test_cache_teachers_numbers import cases_of
from tests.tiny import change_registry, work_of
from tests.unit.teachers.test_nnunet_parity import load

# Making the model folders takes more than ten seconds.
pytestmark = pytest.mark.slow

GRID_MM = [2.5, 2.2, 2.2]
# The same patient, as two archives would keep him.
CODES = {"case_0": "LPS", "case_1": "IRA"}


@pytest.fixture
def registry(nnunet_models: Mapping[str, Path], tmp_path: Path) -> Path:
    """Two scans stored in different orders, and the folder of two folds."""
    copy_model(nnunet_models["labels"], tmp_path)
    for case, code in CODES.items():
        image = tmp_path / "data" / "images" / f"{case}.nii.gz"
        label = write_blobs(image, shape=(34, 36, 38), code=code, border=3, seed=5)
        (tmp_path / "data" / "labels").mkdir(exist_ok=True)
        nib.save(
            nib.Nifti1Image(label, nib.load(image).affine),
            tmp_path / "data" / "labels" / f"{case}.nii.gz",
        )
    data: dict[str, Any] = {
        "schema_version": 1,
        "organs": {"liver": 1, "spleen": 2},
        "grid": {"spacing_mm": GRID_MM, "orientation": "RAS"},
        "datasets": {
            "blobs": {
                "root": "data",
                "images": "images/{case}.nii.gz",
                "labels": "labels/{case}.nii.gz",
                "annotated": {"liver": 1, "spleen": 2},
                "split": {"validation": 0.5, "test": 0.0, "seed": 0},
            }
        },
        "teachers": {
            "net": {
                "kind": "nnunet",
                "weights": nnunet_models["labels"].name,
                "organs": {"liver": 1, "spleen": 2},
                "nnunet": {"mirroring": False},
            }
        },
    }
    path = tmp_path / "data_registry.yaml"
    path.write_text(yaml.safe_dump(data, sort_keys=False), encoding="utf-8")
    return path


def test_a_model_folder_is_cached_once_and_read_back(registry: Path) -> None:
    first = run(registry)
    assert not first.failed
    assert len(first.done) == 4
    before = snapshot(work_of(registry) / "teachers")
    again = run(registry)
    assert again.done == []
    assert len(again.skipped) == 4
    assert snapshot(work_of(registry) / "teachers") == before
    loaded = load_registry(registry)
    entry = loaded.teachers["net"]
    teacher = load(loaded.resolve(entry.weights), entry)
    cases = {case.name.split("/")[1]: case for case in cases_of(registry)}
    for source in loaded.cases("blobs"):
        case, native = cases[source.case], read_image(source.image).volume
        assert native.stored.code == CODES[source.case]
        for organ, odds in organ_log_odds(teacher.predict(native), entry, where="test").items():
            wanted = resample(odds, case.grid, order=1, outside=np.nan).array
            stored = case.log_odds("net", organ)
            np.testing.assert_array_equal(stored, round_bits(wanted, 5))
            # The rim of 0 HU was cropped away: nobody looked there.
            assert np.isnan(stored).mean() > 0.2
            assert (stored > 0).sum() > 100


def test_what_makes_its_units_stale(registry: Path) -> None:
    assert not run(registry).failed
    work, folder = work_of(registry), registry.parent

    def states() -> set[str]:
        found = status(load_registry(registry), work).units
        return {state for (_, what, _), state in found.items() if what == "net"}

    assert states() == {"done"}
    plans = next(folder.glob("nnUNetTrainer*")) / "plans.json"
    text = plans.read_text(encoding="utf-8")
    plans.write_text(text + "\n", encoding="utf-8")
    assert states() == {"stale"}
    plans.write_text(text, encoding="utf-8")
    assert states() == {"done"}
    change_registry(registry, lambda d: d["teachers"]["net"]["nnunet"].update(folds=[0]))
    assert states() == {"stale"}
    # Weights that are not on this machine are no news.
    change_registry(registry, lambda d: d["teachers"]["net"]["nnunet"].pop("folds"))
    next(folder.glob("nnUNetTrainer*")).rename(folder / "away")
    assert states() == {"done"}


def test_bad_input_ends_with_2_and_leaves_nothing(
    registry: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    next(registry.parent.glob("nnUNetTrainer*/dataset.json")).unlink()
    command = ["cache-teachers", "-q", "-r", str(registry), "-w", str(work_of(registry))]
    monkeypatch.setattr("sys.argv", ["pipeline", *command])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 2
    assert "there is no dataset.json" in capsys.readouterr().err
    assert not list(work_of(registry).rglob("*.zarr"))
