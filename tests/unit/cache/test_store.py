from __future__ import annotations

import errno
import json
import os
import socket
import subprocess
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import pytest

from pipeline.cache import receipt as receipts
from pipeline.cache import shards, store
from pipeline.cache.places import clean_temporaries
from pipeline.cache.reader import Unit
from pipeline.cache.receipt import RECEIPT, read_receipt, verify_unit
from pipeline.cache.schema import StorageConfig, image_spec, log_odds_spec
from pipeline.cache.store import (
    prepare_work_folder,
    write_json,
    write_unit,
)
from pipeline.config import digest
from pipeline.data.patches import Patch
from pipeline.errors import (
    CacheCorrupt,
    CacheIncomplete,
    CacheMissing,
    CacheStale,
    WorkFolderError,
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
        seconds=1.5,
    )


def files(folder: Path) -> list[str]:
    return sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())


def flip(path: Path, at: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 0x10
    path.write_bytes(data)


def shard(unit: Path, name: str) -> Path:
    (file,) = (p for p in (unit / name / "c").rglob("*") if p.is_file())
    return file


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


def test_nothing_else_is_left_beside_it(tmp_path: Path) -> None:
    write(tmp_path / "unit.zarr")
    assert [p.name for p in tmp_path.iterdir()] == ["unit.zarr"]


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


@pytest.mark.parametrize("last", ["zarr.json", RECEIPT])
def test_a_crash_before_the_name_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, synced: list[str], last: str
) -> None:
    noted = os.fsync

    def crash(descriptor: int) -> None:
        noted(descriptor)
        if last in synced:
            raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", crash)
    with pytest.raises(KeyboardInterrupt):
        write(tmp_path / "unit.zarr")
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_is_one_clear_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: object) -> NoReturn:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(store.os, "fsync", full)
    with pytest.raises(WorkFolderError, match="No space left on device") as caught:
        write(tmp_path / "unit.zarr")
    assert caught.value.exit_code == 2
    assert list(tmp_path.iterdir()) == []


# --- what a reader refuses ----------------------------------------------------------------------


def test_no_unit_and_no_receipt_are_missing(tmp_path: Path) -> None:
    unit = tmp_path / "unit.zarr"
    with pytest.raises(CacheMissing):
        read_receipt(unit)
    write(unit)
    (unit / RECEIPT).unlink()
    with pytest.raises(CacheMissing, match="not in the cache"):
        Unit.open(unit)


def test_an_absent_object_is_incomplete(tmp_path: Path) -> None:
    unit = tmp_path / "unit.zarr"
    write(unit)
    shard(unit, "image").unlink()
    with pytest.raises(CacheIncomplete, match=r"image/c/0/0/0 is missing"):
        Unit.open(unit)


@pytest.mark.parametrize("size", [0, 10])
def test_an_object_of_another_size_is_incomplete(tmp_path: Path, size: int) -> None:
    unit = tmp_path / "unit.zarr"
    write(unit)
    file = shard(unit, "log_odds/liver")
    file.write_bytes(file.read_bytes()[:size])
    with pytest.raises(CacheIncomplete, match=f"has {size} bytes instead of"):
        Unit.open(unit)


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


def test_a_receipt_that_claims_other_inputs_is_corrupt(tmp_path: Path) -> None:
    unit = tmp_path / "unit.zarr"
    write(unit)
    data = json.loads((unit / RECEIPT).read_text())
    data["inputs"]["window"] = [9, 9, 9]
    (unit / RECEIPT).write_text(json.dumps(data))
    with pytest.raises(CacheCorrupt, match="its own digest"):
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


def test_a_damaged_unit_is_replaced(tmp_path: Path) -> None:
    unit = tmp_path / "unit.zarr"
    write(unit)
    flip(shard(unit, "image"), 5)
    write(unit)
    verify_unit(unit)
    assert np.array_equal(Unit.open(unit).read("image"), IMAGE)
    assert [p.name for p in tmp_path.iterdir()] == ["unit.zarr"]


@pytest.mark.parametrize("left", ["nothing", "no receipt", "a file", "other inputs"])
def test_what_is_no_unit_is_replaced(tmp_path: Path, left: str) -> None:
    unit = tmp_path / "unit.zarr"
    if left == "a file":
        unit.write_text("not a folder")
    else:
        write(unit, inputs={"other": 1} if left == "other inputs" else None)
    if left == "nothing":
        for name in files(unit):
            (unit / name).unlink()
    if left == "no receipt":
        (unit / RECEIPT).unlink()
    receipt = write(unit)
    assert read_receipt(unit, expect=digest(INPUTS)) == receipt
    assert [p.name for p in tmp_path.iterdir()] == ["unit.zarr"]


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


def test_what_a_killed_writer_leaves_is_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dead = dead_pid()

    def killed(*args: object) -> NoReturn:
        raise KeyboardInterrupt

    monkeypatch.setattr(store.shutil, "rmtree", lambda *a, **k: None)
    monkeypatch.setattr(store.os, "getpid", lambda: dead)
    monkeypatch.setattr(Path, "rename", killed)
    with pytest.raises(KeyboardInterrupt):
        write(tmp_path / "unit.zarr")
    monkeypatch.undo()
    (left,) = tmp_path.iterdir()
    assert left.name.startswith(".unit.zarr~")
    assert clean_temporaries(tmp_path) == 1
    assert list(tmp_path.iterdir()) == []


# --- the work folder and JSON files -------------------------------------------------------------


def test_a_work_folder_is_made_and_left_as_it_is(tmp_path: Path) -> None:
    prepare_work_folder(tmp_path / "a" / "work")
    assert list((tmp_path / "a" / "work").iterdir()) == []


def test_a_work_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for work in (tmp_path / "file", tmp_path / "file" / "work"):
        with pytest.raises(WorkFolderError, match="cannot be written") as caught:
            prepare_work_folder(work)
        assert caught.value.exit_code == 2
        assert str(work) in str(caught.value)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_work_folder_without_permission(tmp_path: Path) -> None:
    tmp_path.chmod(0o555)
    with pytest.raises(WorkFolderError, match="Permission denied"):
        prepare_work_folder(tmp_path)


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
        patch.setattr(store.os, "fsync", crash)
        with pytest.raises(KeyboardInterrupt):
            write_json(path, {"x": [3]})
    assert snapshot(tmp_path) == before
    write_json(path, {"x": [3]})
    assert json.loads(path.read_text()) == {"x": [3]}
