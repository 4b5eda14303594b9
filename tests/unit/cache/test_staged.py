"""A unit's copy: what is in it, and what is read when it is not what it was."""

from __future__ import annotations

import hashlib
import pickle
import shutil
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipeline.cache.reader import Unit
from pipeline.cache.receipt import RECEIPT
from pipeline.cache.schema import StorageConfig, features_spec, log_odds_spec
from pipeline.cache.staged import Copy
from pipeline.cache.store import write_unit
from pipeline.data.patches import Patch
from pipeline.errors import CacheCorrupt
from tests.tiny import file_limit

SHAPE = (12, 10, 9)
STORAGE = StorageConfig(chunk=8)
ODDS = np.random.default_rng(0).normal(size=SHAPE).astype(np.float32)
ARRAYS = ("log_odds/liver", "features/tap")
PATCH = Patch((-2, 0, 3), (8, 8, 8))


@pytest.fixture
def unit(tmp_path: Path) -> Unit:
    path = tmp_path / "work/teachers/liver@0123456789abcdef/d/c@0123456789abcdef.zarr"
    arrays = [
        log_odds_spec("liver", ODDS, STORAGE),
        log_odds_spec("spleen", -ODDS, STORAGE),
        features_spec("tap", np.stack([ODDS, ODDS]), STORAGE),
    ]
    write_unit(path, arrays, {"of": "a teacher"}, {"of": "c"}, storage=STORAGE)
    return Unit.open(path)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    folder = tmp_path / "node"
    folder.mkdir()
    return folder


def shard(folder: Path, array: str = ARRAYS[0]) -> Path:
    (found,) = (path for path in (folder / array / "c").rglob("*") if path.is_file())
    return found


def same(ours: Unit, theirs: Unit, array: str = ARRAYS[0]) -> bool:
    pairs = (
        (ours.read(array), theirs.read(array)),
        (ours.read_padded(array, PATCH, 0.0), theirs.read_padded(array, PATCH, 0.0)),
    )
    return all(np.array_equal(a, b, equal_nan=True) for a, b in pairs)


class TestCopy:
    def test_it_holds_the_arrays_asked_for_and_no_receipt(self, unit: Unit, root: Path) -> None:
        copy = Copy(unit, root, ARRAYS[:1])
        assert not copy.is_there()
        assert copy.missing_bytes() == copy.num_bytes == copy.make()
        assert copy.is_there()
        assert copy.missing_bytes() == 0
        there = {p.relative_to(copy.path).as_posix() for p in copy.path.rglob("*") if p.is_file()}
        assert there == {
            "zarr.json", "log_odds/zarr.json", "log_odds/liver/zarr.json",
            shard(copy.path).relative_to(copy.path).as_posix(),
        }  # fmt: skip
        assert RECEIPT not in there
        assert list(root.glob(".*")) == []

    def test_it_reads_as_the_original_without_it(self, unit: Unit, root: Path) -> None:
        kept = Unit.open(Path(shutil.copytree(unit.path, root / "kept.zarr")))
        copy = Copy(unit, root, ARRAYS)
        copy.make()
        shutil.rmtree(unit.path)
        staged = pickle.loads(pickle.dumps(copy.open()))
        assert staged.attributes == kept.attributes
        for array in ARRAYS:
            assert same(staged, kept, array)

    def test_a_job_that_reads_more_adds_to_it(self, unit: Unit, root: Path) -> None:
        first = Copy(unit, root, ARRAYS[:1])
        first.make()
        before = shard(first.path).stat().st_ino
        both = Copy(unit, root, ARRAYS)
        assert both.path == first.path
        assert both.make() == both.num_bytes - first.num_bytes
        assert shard(both.path).stat().st_ino == before
        assert both.make() == 0

    @pytest.mark.parametrize("truncate", [True, False])
    def test_one_that_is_damaged_is_made_again(
        self, unit: Unit, root: Path, truncate: bool
    ) -> None:
        copy = Copy(unit, root, ARRAYS[:1])
        copy.make()
        damage(shard(copy.path), truncate=truncate)
        assert copy.is_there() is not truncate  # by sizes alone
        assert copy.make() == shard(unit.path).stat().st_size
        assert same(copy.open(), unit)

    def test_an_original_that_is_damaged_has_no_copy(self, unit: Unit, root: Path) -> None:
        damage(shard(unit.path))
        copy = Copy(unit, root, ARRAYS[:1])
        with pytest.raises(CacheCorrupt, match=r"log_odds/liver/c/.* has other bytes"):
            copy.make()
        assert not shard_there(copy.path)
        assert list(root.glob(".*")) == []

    def test_units_of_other_bytes_share_no_copy(self, unit: Unit, tmp_path: Path) -> None:
        names = unit.path.parts[len(tmp_path.parts) + 1 :]
        path = tmp_path.joinpath("other", *names)
        arrays = [log_odds_spec("liver", ODDS, StorageConfig(chunk=9))]
        write_unit(path, arrays, {}, {"of": "c"}, storage=StorageConfig(chunk=9))
        root = tmp_path / "node"
        ours, theirs = (Copy(u, root, ARRAYS[:1]).path for u in (unit, Unit.open(path)))
        assert ours != theirs
        assert ours.parts[len(root.parts) + 1 :] == theirs.parts[len(root.parts) + 1 :] == names


class TestDecoded:
    def test_it_holds_numbers_and_their_digest_and_reads_as_the_original_without_it(
        self, unit: Unit, root: Path
    ) -> None:
        kept = Unit.open(Path(shutil.copytree(unit.path, root / "kept.zarr")))
        copy = Copy(unit, root, ARRAYS, decoded=True)
        assert copy.missing_bytes() == copy.num_bytes == copy.make()
        assert copy.is_there()
        numbers = (copy.path / ARRAYS[0] / "decoded").read_bytes()
        assert numbers[:-32] == unit.read(ARRAYS[0]).tobytes()
        assert numbers[-32:] == hashlib.sha256(numbers[:-32]).digest()
        assert not shard_there(copy.path)
        assert list(root.glob(".*")) == []
        assert copy.make() == 0
        shutil.rmtree(unit.path)
        staged = pickle.loads(pickle.dumps(copy.open()))
        assert staged.attributes == kept.attributes
        for array in ARRAYS:
            assert same(staged, kept, array)

    @pytest.mark.parametrize("truncate", [True, False])
    def test_one_that_is_damaged_is_made_again(
        self, unit: Unit, root: Path, truncate: bool
    ) -> None:
        copy = Copy(unit, root, ARRAYS[:1], decoded=True)
        copy.make()
        file = copy.path / ARRAYS[0] / "decoded"
        damage(file, truncate=truncate)
        assert copy.is_there() is not truncate  # by sizes alone
        assert copy.make() == file.stat().st_size
        assert same(copy.open(), unit)

    def test_an_original_that_is_damaged_has_none(self, unit: Unit, root: Path) -> None:
        damage(shard(unit.path))
        copy = Copy(unit, root, ARRAYS[:1], decoded=True)
        with pytest.raises(CacheCorrupt, match=r"log_odds/liver/c/.* has other bytes"):
            copy.make()
        assert not copy.is_there()
        assert list(root.glob(".*")) == []

    def test_a_disk_that_fills_up_leaves_nothing_half_written(self, unit: Unit, root: Path) -> None:
        copy = Copy(unit, root, ARRAYS[:1], decoded=True)
        with file_limit(1000), pytest.raises(OSError, match="File too large"):
            copy.make()
        assert not copy.is_there()
        assert list(root.glob(".*")) == []

    def test_several_may_decode_one_unit_at_the_same_moment(self, unit: Unit, root: Path) -> None:
        copies = [Copy(unit, root, ARRAYS, decoded=True) for _ in range(3)]
        barrier = threading.Barrier(len(copies), timeout=60)

        def make(copy: Copy) -> None:
            barrier.wait()
            copy.make()

        with ThreadPoolExecutor(len(copies)) as pool:
            list(pool.map(make, copies))
        assert copies[0].make() == 0
        assert list(root.glob(".*")) == []
        assert same(copies[0].open(), unit)


class TestReading:
    @pytest.mark.parametrize("harm", ["bytes", "gone", "metadata", "numbers", "shorter numbers"])
    def test_what_is_lost_is_read_from_the_original_and_said_once(
        self, unit: Unit, root: Path, harm: str, capsys: pytest.CaptureFixture[str]
    ) -> None:
        decoded = "numbers" in harm
        copy = Copy(unit, root, ARRAYS[:1], decoded)
        copy.make()
        staged = copy.open()
        if decoded:
            assert same(staged, unit)  # so that it is mapped already
        if harm == "gone":
            shutil.rmtree(copy.path)
        elif decoded:
            damage(copy.path / ARRAYS[0] / "decoded", truncate="shorter" in harm)
        else:
            damage(copy.path / ARRAYS[0] / "zarr.json" if harm == "metadata" else shard(copy.path))
        assert same(staged, unit)
        assert staged.attributes == unit.attributes
        (line,) = capsys.readouterr().err.strip().splitlines()
        assert "warning: liver x d/c: its copy cannot be read" in line
        assert f"It is read from {unit.path} instead." in line


def damage(path: Path, *, truncate: bool = False) -> None:
    data = bytearray(path.read_bytes())
    for at in range(0, len(data), 7):
        data[at] ^= 0xFF
    path.write_bytes(bytes(data[:-1] if truncate else data))


def shard_there(folder: Path, array: str = ARRAYS[0]) -> list[Any]:
    return [path for path in (folder / array / "c").rglob("*") if path.is_file()]
