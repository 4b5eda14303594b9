"""Receipts vouch for themselves: whatever byte of one changes is noticed."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipeline.cache.receipt import (
    RECEIPT,
    read_receipt,
    verify_seal,
    verify_unit,
    write_receipt,
)
from pipeline.cache.schema import StorageConfig, image_spec
from pipeline.cache.store import Made, write_unit
from pipeline.config import digest
from pipeline.errors import CacheCorrupt

STORAGE = StorageConfig(chunk=8)
TEACHER = {"weights_sha256": "w", "window": {"overlap": 0.5}}


@pytest.fixture
def unit(tmp_path: Path) -> Path:
    image = np.arange(8**3, dtype=np.int16).reshape(8, 8, 8)
    path = tmp_path / "unit.zarr"
    write_unit(
        path,
        [image_spec(image)],
        {"case": "d/ä"},
        {"teacher_digest": "t", "spacing_mm": [3.0, 2.5]},
        storage=STORAGE,
        made=Made(1.0, TEACHER),
    )
    return path


def test_what_is_written_is_read_back(unit: Path) -> None:
    receipt = read_receipt(unit)
    assert receipt.teacher_inputs == TEACHER
    assert receipt.written.endswith("Z")
    assert len(receipt.written) == len("2026-11-23T07:30:00Z")
    assert write_receipt(receipt) == (unit / RECEIPT).read_text()
    verify_seal(unit, receipt)


def noted(tmp_path: Path, **made: Any) -> Path:
    path = tmp_path / "noted.zarr"
    image = np.zeros((8, 8, 8), dtype=np.int16)
    write_unit(path, [image_spec(image)], {}, {"a": 1}, storage=STORAGE, made=Made(**made))
    return path


def test_notes_are_sealed_and_in_no_digest(tmp_path: Path) -> None:
    notes = {"accepted": {"liver": {"dice": 0.25, "threshold": 0.5}}}
    path = noted(tmp_path, notes=notes)
    receipt = verify_unit(path)
    assert receipt.notes == notes
    assert receipt.digest == digest({"a": 1})
    assert list(json.loads((path / RECEIPT).read_text()))[3:6] == [
        "teacher_inputs",
        "notes",
        "arrays",
    ]
    text = (path / RECEIPT).read_text()
    (path / RECEIPT).write_text(text.replace("0.25", "0.75"))
    with pytest.raises(CacheCorrupt, match="its own digest"):
        read_receipt(path)


@pytest.mark.parametrize("options", [{}, {"notes": None}, {"notes": {}}])
def test_without_notes_a_receipt_is_what_it_always_was(
    tmp_path: Path, options: dict[str, Any]
) -> None:
    path = noted(tmp_path, **options)
    assert list(json.loads((path / RECEIPT).read_text())) == [
        "format_version", "digest", "inputs", "teacher_inputs", "arrays", "objects", "seconds",
        "written", "seal",
    ]  # fmt: skip
    assert verify_unit(path).notes == {}


@pytest.mark.parametrize(
    "change",
    [
        *({field: "1"} for field in ("seconds", "written", "seal", "digest")),
        *({field: {}} for field in ("arrays", "objects", "teacher_inputs", "inputs")),
        *({field: None} for field in ("seal", "inputs", "digest")),  # it is missing
        {"seconds": math.inf},
    ],
)
def test_a_field_that_changed_or_is_missing_breaks_the_seal(
    unit: Path, change: dict[str, Any]
) -> None:
    data = json.loads((unit / RECEIPT).read_text()) | change
    kept = {field: value for field, value in data.items() if value is not None}
    (unit / RECEIPT).write_text(json.dumps(kept, indent=1))
    with pytest.raises(CacheCorrupt, match="its own digest"):
        read_receipt(unit)


def test_white_space_for_other_white_space_is_another_byte(unit: Path) -> None:
    text = (unit / RECEIPT).read_text()
    (unit / RECEIPT).write_text(text.replace("\n ", "\n\t", 1))
    assert read_receipt(unit)
    with pytest.raises(CacheCorrupt, match="other bytes"):
        verify_unit(unit)
