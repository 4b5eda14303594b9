from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import NoReturn

import numpy as np
import pytest

from pipeline.cache.places import clean_temporaries, dead_temporaries
from pipeline.cache.reader import Unit
from pipeline.cache.schema import StorageConfig, image_spec
from pipeline.cache.store import remove_unit, write_unit
from pipeline.errors import CacheMissing, WorkFolderError
from tests.unit.cache.test_store import dead_pid

STORAGE = StorageConfig(chunk=8)


@pytest.fixture
def unit(tmp_path: Path) -> Path:
    path = tmp_path / "teachers" / "liver@0" / "ct" / "case.zarr"
    image = np.ones((8, 8, 8), dtype=np.int16)
    write_unit(path, [image_spec(image)], {}, {"a": 1}, storage=STORAGE)
    return path


def test_a_unit_goes_with_the_folders_that_it_leaves_empty(unit: Path, tmp_path: Path) -> None:
    remove_unit(unit)
    assert list((tmp_path / "teachers").iterdir()) == []
    with pytest.raises(CacheMissing):
        Unit.open(unit)
    remove_unit(unit)


def test_what_is_beside_it_stays(unit: Path, tmp_path: Path) -> None:
    other = unit.with_name("other.zarr")
    other.mkdir()
    remove_unit(unit)
    assert list(unit.parent.iterdir()) == [other]
    another = tmp_path / "teachers" / "liver@0" / "mr"
    another.mkdir()
    remove_unit(other)
    assert list((tmp_path / "teachers" / "liver@0").iterdir()) == [another]


def test_it_is_gone_before_its_first_byte_is(unit: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A reader sees it whole or not at all, and a kill leaves what the next run removes."""
    dead = dead_pid()
    seen: list[Path] = []

    def crash(path: Path, **options: object) -> NoReturn:
        seen.append(path)
        assert not unit.exists()
        assert (path / "receipt.json").exists()
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", crash)
        patch.setattr(os, "getpid", lambda: dead)
        with pytest.raises(KeyboardInterrupt):
            remove_unit(unit)
    assert dead_temporaries(unit.parent) == seen
    assert clean_temporaries(unit.parent) == 1
    assert list(unit.parent.iterdir()) == []


def test_a_folder_that_cannot_be_written(unit: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object) -> NoReturn:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "rename", refuse)
    with pytest.raises(WorkFolderError, match="could not be removed") as caught:
        remove_unit(unit)
    assert caught.value.exit_code == 2
    assert Unit.open(unit)
