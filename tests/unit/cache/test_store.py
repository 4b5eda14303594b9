from __future__ import annotations

import json
import os
import socket
import subprocess
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import pytest

from pipeline.cache import receipt as receipts
from pipeline.cache import shards
from pipeline.cache.places import clean_temporaries
from pipeline.cache.reader import Unit
from pipeline.cache.receipt import RECEIPT, verify_unit
from pipeline.cache.schema import StorageConfig, image_spec, log_odds_spec
from pipeline.cache.store import (
    Made,
    write_json,
    write_unit,
)
from pipeline.config import digest
from pipeline.data.patches import Patch
from pipeline.errors import (
    CacheCorrupt,
    CacheStale,
)
from tests.stages.stage_contract import snapshot

INPUTS = {"image_sha256": "abc", "window": [8, 8, 8]}
STORAGE = StorageConfig(chunk=8)
IMAGE = np.random.default_rng(0).integers(-1024, 2000, (12, 10, 9)).astype(np.int16)
ODDS = np.random.default_rng(1).normal(size=(12, 10, 9)).astype(np.float32)


def write(path: Path, *, inputs: dict[str, Any] | None = None, shift: int = 0) -> receipts.Receipt:
    return write_unit(
        path,
        [image_spec(IMAGE + np.int16(shift)), log_odds_spec("liver", ODDS, STORAGE)],
        {"case": "d/c", "grid": {"shape": [12, 10, 9]}},
        inputs or INPUTS,
        storage=STORAGE,
        made=Made(1.5),
    )


def files(folder: Path) -> list[str]:
    return sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())


# --- a unit as written --------------------------------------------------------------------------


def test_round_trip(tmp_path: Path) -> None:
    receipt = write(tmp_path / "a" / "unit.zarr")
    unit = Unit.open(tmp_path / "a" / "unit.zarr", expect=digest(INPUTS))
    assert unit.receipt == receipt
    assert np.array_equal(unit.read("image"), IMAGE)
    stored = log_odds_spec("liver", ODDS, STORAGE).values
    assert np.array_equal(unit.read("log_odds/liver"), stored)
    assert unit.attributes["case"] == "d/c"
    assert receipt.digest == digest(INPUTS)
    assert receipt.inputs == INPUTS
    assert receipt.seconds == 1.5
    assert receipt.arrays["log_odds/liver"] == {
        "shape": [12, 10, 9],
        "dtype": "float16",
        "axes": ["z", "y", "x"],
    }


def test_the_receipt_names_every_file_and_its_size(tmp_path: Path) -> None:
    unit = tmp_path / "unit.zarr"
    receipt = write(unit)
    assert sorted([*receipt.objects, RECEIPT]) == files(unit)
    sizes = {name: (unit / name).stat().st_size for name in receipt.objects}
    assert {name: entry["bytes"] for name, entry in receipt.objects.items()} == sizes
    assert receipt.num_bytes == sum(sizes.values())
    assert verify_unit(unit) == receipt


@pytest.fixture
def synced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the files and folders that were forced onto the disk before the unit was visible."""
    names: list[str] = []
    real = os.fsync

    def sync(descriptor: int) -> None:
        if not (tmp_path / "unit.zarr").exists():
            names.append(Path(f"/proc/self/fd/{descriptor}").readlink().name)
        real(descriptor)

    monkeypatch.setattr(os, "fsync", sync)
    return names


def test_all_is_on_the_disk_before_the_name_is_and_the_receipt_last(
    tmp_path: Path, synced: list[str]
) -> None:
    receipt = write(tmp_path / "unit.zarr")
    on_disk = [name for name in synced if "~" not in name]
    assert {Path(name).name for name in receipt.objects} <= set(on_disk)
    assert on_disk[-1] == RECEIPT


# --- what a reader refuses ----------------------------------------------------------------------


def test_another_digest_is_stale(tmp_path: Path) -> None:
    write(tmp_path / "unit.zarr")
    with pytest.raises(CacheStale, match="other inputs"):
        Unit.open(tmp_path / "unit.zarr", expect="f" * 64)


def test_another_format_version_is_stale(tmp_path: Path) -> None:
    unit = tmp_path / "unit.zarr"
    write(unit)
    data = json.loads((unit / RECEIPT).read_text())
    (unit / RECEIPT).write_text(json.dumps({**data, "format_version": 99}))
    with pytest.raises(CacheStale, match="format 99"):
        Unit.open(unit)


@pytest.mark.parametrize("text", ["", "{", "[]", '"x"', '{"digest": "x"}'])
def test_an_unreadable_receipt_is_corrupt(tmp_path: Path, text: str) -> None:
    unit = tmp_path / "unit.zarr"
    write(unit)
    (unit / RECEIPT).write_text(text)
    with pytest.raises(CacheCorrupt, match="unreadable receipt"):
        Unit.open(unit)


def test_of_an_array_its_metadata_and_its_index_are_read_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path / "unit.zarr")
    unit = Unit.open(tmp_path / "unit.zarr")
    unit.read("image", Patch((0, 0, 0), (2, 2, 2)))
    monkeypatch.setattr(receipts, "read_bytes", lambda _: pytest.fail("metadata again"))
    ranges: list[tuple[int, int]] = []
    real = shards.read_range

    def noted(path: Path, begin: int, end: int) -> bytes:
        ranges.append((begin, end))
        return real(path, begin, end)

    monkeypatch.setattr(shards, "read_range", noted)
    assert np.array_equal(unit.read("image", Patch((0, 0, 0), (2, 2, 2))), IMAGE[:2, :2, :2])
    assert [begin for begin, _ in ranges] == [0]  # the first chunk


# --- several writers ----------------------------------------------------------------------------


def test_the_second_writer_keeps_the_units_of_the_first(tmp_path: Path) -> None:
    first = write(tmp_path / "unit.zarr")
    before = snapshot(tmp_path)
    second = write(tmp_path / "unit.zarr", shift=1)
    assert second == first
    assert snapshot(tmp_path) == before


# --- temporaries --------------------------------------------------------------------------------


def dead_pid() -> int:
    process = subprocess.Popen(["true"])
    process.wait()
    return process.pid


def test_only_temporaries_of_dead_processes_of_this_host_are_removed(tmp_path: Path) -> None:
    here, dead = socket.gethostname(), dead_pid()
    gone = [f".c.zarr~{here}~{dead}~ab.tmp", f".odd~name.zarr~{here}~{dead}~cd.tmp"]
    kept = [
        f".c.zarr~{here}~{os.getpid()}~ab.tmp",
        f".c.zarr~another-{here}~{dead}~ab.tmp",
        ".student.pt.12345.tmp",
        ".x~y~notes.tmp",
        f".c~{here}~word~ab.tmp",
        "c@0123.zarr",
    ]
    folder = tmp_path / "teachers" / "t@0" / "d"
    for name in gone + kept:
        (folder / name / "image").mkdir(parents=True)
        (folder / name / "image" / "zarr.json").write_text("{}")
    (folder / f".index.json~{here}~{dead}~ef.tmp").write_text("{}")
    assert clean_temporaries(tmp_path) == 3
    assert sorted(p.name for p in folder.iterdir()) == sorted(kept)


# --- the work folder and JSON files -------------------------------------------------------------


def test_json_is_replaced_whole_and_only_when_it_says_something_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a" / "b.json"
    write_json(path, {"x": [1, 2]})
    before = snapshot(tmp_path)
    write_json(path, {"x": [1, 2]})
    assert snapshot(tmp_path) == before

    def crash(*args: object) -> NoReturn:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", crash)
        with pytest.raises(KeyboardInterrupt):
            write_json(path, {"x": [3]})
    assert snapshot(tmp_path) == before
    write_json(path, {"x": [3]})
    assert json.loads(path.read_text()) == {"x": [3]}
