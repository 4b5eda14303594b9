from __future__ import annotations

import os
import shutil
import socket
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from pipeline.errors import ConfigError, WorkFolderError
from pipeline.folder import (
    ages,
    check_answers,
    contains,
    copy_name,
    create_object,
    folders_below,
    is_local,
    json_with,
    parse_folder,
    read_text,
    refuse_foreign,
    remove,
    replace_file,
    replace_files,
    sizes,
    temporary_name,
    writing,
    written_by_dead,
)
from tests.object_store import folder

if TYPE_CHECKING:
    from upath import UPath


def test_a_path_is_local_and_a_url_is_not(store_work: UPath) -> None:
    assert parse_folder("a/b") == Path("a/b")
    assert parse_folder(Path("a")) == Path("a")
    assert parse_folder("file:///a/b") == Path("/a/b")
    assert is_local(parse_folder("a"))
    again = parse_folder(str(store_work))
    assert not is_local(again)
    assert again == store_work
    assert hash(again) == hash(store_work)


def test_a_bucket_that_is_not_there_is_named(store_work: UPath) -> None:
    check_answers(store_work)
    with pytest.raises(WorkFolderError, match=r"s3://no-such-bucket/work.*bucket"):
        check_answers(folder("no-such-bucket/work"))


@pytest.mark.parametrize("where", ["local", "store"])
def test_files_are_listed_replaced_and_removed(
    where: str, tmp_path: Path, store_work: UPath
) -> None:
    work = tmp_path / "work" if where == "local" else store_work
    assert sizes(work) == {}
    replace_file(work / "a" / "b.json", b"old")
    replace_file(work / "a" / "b.json", "neu ä".encode())
    replace_file(work / "c@0.zarr" / "zarr.json", b"")
    assert sizes(work) == {"a/b.json": 6, "c@0.zarr/zarr.json": 0}
    assert read_text(work / "a" / "b.json") == "neu ä"
    assert set(ages(work)) == set(sizes(work))
    assert all(-5 < age < 120 for age in ages(work).values())
    remove(work / "a")
    remove(work / "not there")
    assert sizes(work) == {"c@0.zarr/zarr.json": 0}
    with pytest.raises(FileNotFoundError):
        read_text(work / "a" / "b.json")


def test_an_object_is_created_once(store_work: UPath) -> None:
    assert create_object(store_work / "receipt.json", b"first")
    assert not create_object(store_work / "receipt.json", b"second")
    assert (store_work / "receipt.json").read_bytes() == b"first"


def test_a_write_that_fails_leaves_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    replace_file(tmp_path / "a", b"old")

    def full(handle: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        replace_file(tmp_path / "a", b"new")
    assert (tmp_path / "a").read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [tmp_path / "a"]


def test_of_files_that_belong_together_all_or_none_are_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    replace_files({tmp_path / "a": b"old", tmp_path / "b": b"old"})
    real, calls = os.fsync, []

    def full(handle: int) -> None:
        calls.append(handle)
        if len(calls) == 2:
            raise OSError(28, "No space left on device")
        real(handle)

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(WorkFolderError) as caught, writing("the tables"):
        replace_files({tmp_path / "a": b"new", tmp_path / "b": b"new"})
    assert str(caught.value) == (
        "the tables: it cannot be written (No space left on device). Check free space, quota and "
        "permissions, then run the same command again."
    )
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == {
        "a": b"old", "b": b"old",
    }  # fmt: skip


def test_what_is_not_ours_is_named_and_a_pipe_is_not_waited_for(tmp_path: Path) -> None:
    for number in range(8):
        (tmp_path / f"{number}.json").write_text("[]" if number else '{"mine": 1}')
    os.mkfifo(tmp_path / "pipe.json")
    paths = [*sorted(tmp_path.iterdir()), tmp_path / "absent.json"]
    with pytest.raises(ConfigError) as caught:
        refuse_foreign("try", [(path, json_with(path, "mine") is not None) for path in paths])
    assert str(caught.value) == (
        f"{tmp_path / '1.json'}: `pipeline try` did not write this file and does not replace it, "
        "nor 2.json, 3.json, 4.json, 5.json, 6.json and 2 more. Move away what is there, or name "
        "another --output."
    )
    assert not contains(tmp_path / "pipe.json", "mine")
    assert contains(tmp_path / "0.json", "mine")


def test_a_folder_that_vanishes_while_it_is_walked_is_passed_over(tmp_path: Path) -> None:
    """Another process removes a unit between the listing of its parent and its own."""
    for name in ("a", "b"):
        (tmp_path / name / "inner").mkdir(parents=True)
        (tmp_path / name / "file").write_bytes(b"x")
    seen = []
    for root, folders, _ in folders_below(tmp_path):
        seen.append(root.name)
        if root == tmp_path:
            assert sorted(folders) == ["a", "b"]
            shutil.rmtree(tmp_path / folders[1])
    assert len(seen) == 3


def test_only_names_of_dead_processes_of_this_host_count() -> None:
    host = socket.gethostname()
    assert not written_by_dead(temporary_name("x"))
    assert not written_by_dead(copy_name())
    assert written_by_dead(f".x~{host}~99999999~ab.tmp")
    assert written_by_dead(f"copy~{host}~99999999~ab")
    assert not written_by_dead("copy~elsewhere~99999999~ab")
    assert not written_by_dead("case_000@0123456789abcdef.zarr")
