"""What is laid over a case, against plain numpy."""

from __future__ import annotations

import dataclasses
import gzip
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipeline.cache.reader import CachedCase
from pipeline.consensus.cohort import open_case
from pipeline.data.nifti import write_image
from pipeline.data.registry import load_registry
from pipeline.data.volume import Volume
from pipeline.errors import PipelineError
from pipeline.log import Log
from pipeline.review.report.pictures import NOT_OF_THIS_RUN, CaseLayers, CaseSource
from pipeline.review.report.trace import RunRecord, read_run, trace
from stages import predict
from tests.tiny import ORGANS, change_registry, work_of
from tests.unit.review.damage import rewrite
from tests.unit.review.report.pages import RUN, folder_of

VALIDATION, TEST, PARTIAL = "multi-ct/case_000", "multi-ct/case_001", "liver-ct/case_002"


def source(registry: Path, predictions: Path | None = None, **changes: Any) -> CaseSource:
    work = work_of(registry)
    record = dataclasses.replace(read_run(work, RUN), **changes)
    known = load_registry(registry, files=False)
    settings = predict.PredictConfig().digested()
    return CaseSource(work, known, record, trace(work, record), None, settings, predictions)


def cached(registry: Path, name: str) -> CachedCase:
    known = load_registry(registry, files=False)
    return open_case(work_of(registry), known, name, list(known.teachers))


def values(found: CaseLayers) -> dict[str, Any]:
    return {layer.key: layer.values for layer in found.layers}


def predicted(folder: Path, case: CachedCase, array: Any) -> Path:
    write_image(folder / f"{case.name}.nii.gz", Volume(array, case.grid))
    return folder


@pytest.mark.parametrize("name", [VALIDATION, TEST])
def test_teachers_are_shown_by_themselves_whatever_the_label_says(
    built_runs: Path, name: str
) -> None:
    found = values(source(built_runs).layers(name))
    case = cached(built_runs, name)
    odds = np.stack([case.log_odds(organ, organ).astype(np.float32) for organ in ORGANS])
    claimed = odds > 0
    surest = np.where(claimed, odds, -np.inf).argmax(axis=0) + 1
    assert np.array_equal(found["regions"], np.where(claimed.any(axis=0), surest, 0))
    assert np.array_equal(found["background"], (odds < 0).all(axis=0))
    assert np.array_equal(found["conflict"], claimed.all(axis=0))
    assert found["conflict"].any()
    # Labels that win would have left no conflict in a case that annotates every organ.


def test_the_reference_is_the_label_of_what_it_annotates(built_runs: Path) -> None:
    for name in (VALIDATION, PARTIAL):
        found = source(built_runs).layers(name)
        case = cached(built_runs, name)
        assert np.array_equal(values(found)["reference"], case.label())
        assert np.array_equal(found.image, case.image())


def test_errors_are_counted_where_the_label_can_tell(runs: Path, tmp_path: Path) -> None:
    def ignore(arrays: dict[str, Any]) -> None:
        arrays["label"][2, :4, :] = 255

    case = cached(runs, PARTIAL)
    label = case.label()
    array = label.copy()
    array[2, :, :] = 1
    array[5, :, :] = 2  # spleen, of which this label says nothing
    rewrite(case.case.path, arrays=ignore)
    found = source(runs, predicted(tmp_path / "predictions", case, array)).layers(PARTIAL)
    expected = np.zeros(label.shape, dtype=np.bool_)
    expected[2, 4:] = label[2, 4:] != 1
    expected[5] = label[5] == 1
    assert np.array_equal(found.wrong, expected)
    assert np.array_equal(values(found)["student"], array)
    assert not (values(found)["reference"] == 255).any()


def test_a_label_map_that_covers_less_is_background_beyond(
    built_runs: Path, tmp_path: Path
) -> None:
    case = cached(built_runs, VALIDATION)
    part = case.grid.crop((4, 0, 0), (8, *case.grid.shape[1:]))
    write_image(tmp_path / f"{VALIDATION}.nii.gz", Volume(np.ones(part.shape, np.uint8), part))
    student = values(source(built_runs, tmp_path).layers(VALIDATION))["student"]
    expected = np.zeros(case.grid.shape, dtype=np.uint8)
    expected[4:12] = 1
    assert np.array_equal(student, expected)


def test_label_maps_with_other_ids_are_read_by_name(built_runs: Path, tmp_path: Path) -> None:
    case = cached(built_runs, VALIDATION)
    label = case.label()
    folder = predicted(tmp_path, case, np.where(label > 0, 3 - label.astype(int), 0).astype("u1"))
    beside = folder / f"{VALIDATION}.json"
    beside.write_text(json.dumps({"organs": {"liver": 2, "spleen": 1}}))
    found = source(built_runs, folder).layers(VALIDATION)
    assert np.array_equal(values(found)["student"], label)
    assert not found.wrong.any()
    beside.write_text(json.dumps({"organs": {"liver": 2}}))
    notes = source(built_runs, folder).layers(VALIDATION).notes
    assert any("label values that are no organ's: 1 (" in note for note in notes)


def test_a_registry_with_other_ids_is_refused(built_runs: Path) -> None:
    change_registry(built_runs, lambda data: data.update(organs={"liver": 2, "spleen": 1}))
    try:
        with pytest.raises(PipelineError, match="the registry's ids are"):
            source(built_runs).layers(TEST)
    finally:
        change_registry(built_runs, lambda data: data.update(organs={"liver": 1, "spleen": 2}))


def test_label_maps_of_another_student_are_called_so(built_runs: Path, tmp_path: Path) -> None:
    images = built_runs.parent / "data" / "multi-ct" / "images"
    inputs = predict.Inputs({TEST: images / "case_001.nii.gz"})
    cpu = predict.PredictExecution("cpu")
    for run in (RUN, "labels/only"):
        student = folder_of(built_runs, run) / "student.pt"
        config, log = predict.PredictConfig(), Log(quiet=True)
        predict.run(config, student, inputs, tmp_path / run, cpu, log=log)
    assert NOT_OF_THIS_RUN not in source(built_runs, tmp_path / RUN).layers(TEST).notes
    assert NOT_OF_THIS_RUN in source(built_runs, tmp_path / "labels/only").layers(TEST).notes
    made = tmp_path / RUN / f"{TEST}.nii.gz"
    whole = made.read_bytes()
    made.write_bytes(gzip.compress(gzip.decompress(whole), 1))
    assert NOT_OF_THIS_RUN in source(built_runs, tmp_path / RUN).layers(TEST).notes
    made.write_bytes(whole)
    assert NOT_OF_THIS_RUN not in source(built_runs, tmp_path / RUN).layers(TEST).notes
    (tmp_path / RUN / f"{TEST}.json").unlink()
    assert NOT_OF_THIS_RUN in source(built_runs, tmp_path / RUN).layers(TEST).notes


def test_units_of_other_teachers_are_left_out_and_named(built_runs: Path) -> None:
    record: RunRecord = read_run(work_of(built_runs), RUN)
    other = {**record.inputs, "teachers": {**record.teachers, "liver": "0" * 64}}
    found = source(built_runs, inputs=other).layers(TEST)
    assert set(np.unique(values(found)["regions"])) == {0, 2}
    assert any("registry now means others: liver" in note for note in found.notes)


def test_without_units_there_is_a_note_and_no_layer(runs: Path) -> None:
    shutil.rmtree(work_of(runs) / "teachers")
    found = source(runs).layers(VALIDATION)
    assert list(values(found)) == ["reference"]
    assert found.notes == [
        "No label map of the student: the run has no readable student.pt or best.pt.",
        "No regions of the teachers: the cache has none of this case.",
    ]
    assert not found.wrong.any()
