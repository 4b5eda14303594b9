"""What a run's folder and the receipts say of it."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from pipeline.cache.receipt import RECEIPT, read_receipt, write_receipt
from pipeline.data.registry import load_registry
from pipeline.review.inspect.look import View
from pipeline.review.report.trace import GONE, read_gate, read_run, trace
from tests.tiny import change_registry, work_of
from tests.unit.review.report.pages import RUN, folder_of, recorded


def rewrite(registry: Path, change: Any) -> None:
    content = recorded(registry)
    change(content)
    (folder_of(registry) / "config.json").write_text(json.dumps(content))


def test_regions_are_formed_as_the_training_formed_them(runs: Path) -> None:
    def change(content: dict[str, Any]) -> None:
        content["config"]["supervision"] |= {"margin": 1.5, "labels_win": False, "confidence": 3.0}
        content["inputs"]["temperatures"] = {"liver: liver": 2.0}

    rewrite(runs, change)
    view = read_run(work_of(runs), RUN).view
    assert view == View(1.5, False, 3.0, {("liver", "liver"): 2.0})
    rewrite(runs, lambda content: content["config"]["supervision"].update(kind="of old"))
    assert read_run(work_of(runs), RUN).view == View(1.5, False, 3.0, {("liver", "liver"): 2.0})
    rewrite(runs, lambda content: content["config"]["supervision"].update(margin="of old"))
    assert read_run(work_of(runs), RUN).view == View()


def test_time_is_the_sum_of_what_clocks_said(runs: Path) -> None:
    lines = [
        {"step": 1, "loss": 1.0, "terms": {}},
        {"step": 2, "loss": 1.0, "terms": {},
         "timing": {"seconds": 2.0, "data_wait": 0.5, "samples_per_second": 1.0}},
        {"step": 3, "loss": 1.0, "terms": {},
         "timing": {"seconds": 6.0, "data_wait": 0.0, "samples_per_second": 1.0}},
        {"step": 3, "validation_dice": {"liver": 0.5}, "timing": {"seconds": 0.25}},
    ]  # fmt: skip
    text = "\n".join(json.dumps(line) for line in lines) + '\n{"step": 4, "lo'
    (folder_of(runs) / "metrics.jsonl").write_text(text)
    training = read_run(work_of(runs), RUN).training
    assert training is not None
    assert training.history.step == 3
    assert training.seconds == 8.0
    assert training.data_wait == pytest.approx(1 / 8)


def test_teachers_that_a_user_accepted_are_told_from_those_that_failed(runs: Path) -> None:
    change_registry(runs, lambda data: data.update(admission={"dice": 0.99}))
    work = work_of(runs)
    unit = next(work.glob("teachers/spleen@*/spleen-ct/case_001@*"))
    note = {"accepted": {"spleen": {"dice": 0.1, "threshold": 0.99}}}
    sealed = dataclasses.replace(read_receipt(unit), notes=note)
    (unit / RECEIPT).write_text(write_receipt(sealed))
    lineage = trace(work, read_run(work, RUN))
    found = read_gate(work, load_registry(runs, files=False), lineage.teachers)
    accepted = {row["teacher"]: row["accepted"] for row in found.scores}
    assert accepted == {"liver": False, "spleen": True}
    assert all(row["passed"] is False for row in found.scores)
    assert all(row["temperature"] > 0 for row in found.scores)


def test_units_that_were_missing_then_are_told_from_those_that_are_gone(runs: Path) -> None:
    case = next(iter(recorded(runs)["inputs"]["cases"]))

    def change(content: dict[str, Any]) -> None:
        content["inputs"]["missing_units"] = {"liver": [case]}

    rewrite(runs, change)
    work = work_of(runs)
    (next(work.glob(f"teachers/spleen@*/{case}@*")) / RECEIPT).unlink()
    first, *others = trace(work, read_run(work, RUN)).cases
    assert first.name == case
    assert first.left_out == {"liver"}
    assert set(first.usable) == {"liver"}
    assert first.units["spleen"].problem
    assert not any(other.left_out for other in others)


def test_a_unit_of_another_digest_is_not_taken_for_the_run_s(runs: Path) -> None:
    def change(content: dict[str, Any]) -> None:
        teachers = content["inputs"]["teachers"]
        teachers["liver"] = teachers["liver"][:16] + "0" * 48
        content["inputs"]["cases"]["liver-ct/case_001"] = "1" * 64

    rewrite(runs, change)
    lineage = trace(work_of(runs), read_run(work_of(runs), RUN))
    cases = {case.name: case for case in lineage.cases}
    assert cases["liver-ct/case_001"].case.problem == GONE
    for case in cases.values():
        assert case.units["liver"].problem == "of a teacher with another digest"
        assert case.units["spleen"].unit is not None
    (liver,) = (teacher for teacher in lineage.teachers if teacher.name == "liver")
    assert liver.inputs is None
