"""Staging: who copies what, and what is read where it cannot."""

from __future__ import annotations

import os
import shutil
import socket
import threading
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from pipeline.cache.reader import CachedCase
from pipeline.cache.staged import Copy, StagedUnit
from pipeline.cli import options as cli_options
from pipeline.consensus.cohort import open_cohort
from pipeline.data.registry import load_registry
from pipeline.errors import ConfigError
from pipeline.log import Log
from pipeline.student.distributed import ALONE, Processes
from pipeline.student.staging import staged_cases
from tests.tiny import ORGANS, TAP, work_of


@pytest.fixture
def cases(built_cache: Path) -> list[CachedCase]:
    registry = load_registry(built_cache, files=False)
    return list(open_cohort(work_of(built_cache), registry, teachers=ORGANS).cases)


def stage(cases: list[CachedCase], folder: Path, **options: Any) -> list[CachedCase]:
    log = options.get("processes", ALONE).log(Log())
    return staged_cases(cases, folder, log=log, taps=[("liver", TAP)], **options)


def units(cases: list[CachedCase]) -> list[Any]:
    return [unit for case in cases for unit in (case.case, *case.teachers.values())]


def num_staged(cases: list[CachedCase]) -> int:
    return sum(isinstance(unit, StagedUnit) for unit in units(cases))


class TestOneProcess:
    def test_what_a_training_reads_is_copied_once_and_read_from_there(
        self, cases: list[CachedCase], tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        staged = stage(cases, tmp_path)
        assert num_staged(staged) == len(units(staged)) == len(units(cases))
        for ours, theirs in zip(staged, cases, strict=True):
            assert (ours.name, ours.experts) == (theirs.name, theirs.experts)
            assert np.array_equal(ours.image(), theirs.image())
            assert np.array_equal(ours.label(), theirs.label())
            for organ, (teacher,) in theirs.experts.items():
                pair = ours.log_odds(teacher, organ), theirs.log_odds(teacher, organ)
                assert np.array_equal(*pair, equal_nan=True)
            features = ours.features("liver", TAP), theirs.features("liver", TAP)
            assert np.array_equal(*features, equal_nan=True)
        names = {p.relative_to(tmp_path).as_posix() for p in tmp_path.rglob("*") if p.is_file()}
        assert not any("spleen@" in name and "features" in name for name in names)
        first, again = capsys.readouterr().err, stage(cases, tmp_path)
        assert num_staged(again) == len(units(cases))
        assert f"27 of 27 units are read from {tmp_path}, decoded; " in first
        assert not list(tmp_path.glob("**/c"))
        assert first.rstrip().endswith("of it copied now")
        assert "0 B of it copied now" not in first
        assert "0 B of it copied now" in capsys.readouterr().err

    def test_another_users_folder_is_not_touched(
        self, cases: list[CachedCase], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        (tmp_path / "organ-distill-staged-12345").mkdir()
        monkeypatch.setattr(os, "getuid", lambda: 12345)
        assert num_staged(stage(cases, tmp_path)) == 0

    def test_a_folder_that_cannot_be_made(
        self, cases: list[CachedCase], tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        (tmp_path / "file").touch()
        assert num_staged(stage(cases, tmp_path / "file")) == 0
        told = capsys.readouterr().err
        assert "warning: 27 of 27 units are read from the cache itself" in told
        assert "cannot be written (Not a directory)" in told

    def test_no_space_by_what_the_disk_says(
        self,
        cases: list[CachedCase],
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
        capsys: pytest.CaptureFixture[str],
    ) -> None:
        decoded = [c for c in spied(monkeypatch, cases, tmp_path / "spy") if c.decoded]
        capsys.readouterr()
        room = [sum(replace(c, decoded=of).num_bytes for c in decoded) for of in (False, True)]
        for free, staged, how in (
            (min(room) - 1, 0, ""),
            (min(room), 27, "as stored: " if room[0] < room[1] else "decoded; "),
            (room[1], 27, "decoded; "),
        ):
            disk = SimpleNamespace(total=2_000_000, free=100_000 + free)
            monkeypatch.setattr(shutil, "disk_usage", lambda _, disk=disk: disk)
            assert num_staged(stage(cases, tmp_path / f"node{free}")) == staged
            told = capsys.readouterr().err
            assert ("are free, a twentieth of the disk left aside" in told) is (staged == 0)
            assert how in told

    def test_a_disk_that_fills_up_meanwhile(
        self,
        cases: list[CachedCase],
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
        capsys: pytest.CaptureFixture[str],
    ) -> None:
        made = Counter[str]()

        def fill(copy: Copy) -> None:
            made["units"] += copy.decoded
            if made["units"] > 5:
                raise OSError(28, "No space left on device", str(copy.path))

        before_each_copy(monkeypatch, fill)
        staged = stage(cases, tmp_path)
        assert (num_staged(staged), made["units"]) == (5, 6)
        told = capsys.readouterr().err
        assert "5 of 27 units are read from" in told
        assert "warning: 22 of 27 units are read from the cache itself" in told
        assert "(No space left on device)" in told


class TestSeveralProcesses:
    def test_those_of_a_host_share_and_those_of_another_have_their_own(
        self, cases: list[CachedCase], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Ranks 0, 1, 3 on a, rank 2 on b; a host's disk is a folder of its own."""
        hosts = ["a", "a", "b", "a"]
        made: list[tuple[str, Path]] = []

        def note(copy: Copy) -> None:
            if copy.decoded:  # to decode one it is copied as it is stored first
                made.append((threading.current_thread().name, copy.path))

        before_each_copy(monkeypatch, note)
        monkeypatch.setattr(
            socket, "gethostname", lambda: hosts[int(threading.current_thread().name)]
        )
        staged = each_of(4, lambda own: stage(cases, tmp_path / hosts[own.rank], processes=own))
        assert [num_staged(found) for found in staged] == [27] * 4
        share = Counter(rank for rank, _ in made)
        assert share["2"] == 27
        assert sorted(share[rank] for rank in "013") == [9, 9, 9]
        assert len({path for rank, path in made if rank != "2"}) == 27

    def test_a_host_without_room_reads_the_cache_and_the_first_process_says_so(
        self,
        cases: list[CachedCase],
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
        capsys: pytest.CaptureFixture[str],
    ) -> None:
        (tmp_path / "1").touch()
        monkeypatch.setattr(socket, "gethostname", lambda: f"node{threading.current_thread().name}")
        staged = each_of(2, lambda own: stage(cases, tmp_path / str(own.rank), processes=own))
        assert [num_staged(found) for found in staged] == [27, 0]
        told = capsys.readouterr().err
        assert "node0: 27 of 27 units are read from" in told
        assert "warning: node1: 27 of 27 units are read from the cache itself" in told
        assert "node0: 27 of 27 units are read from the cache" not in told


class TestOption:
    @pytest.mark.parametrize("text", ["", " ", "$SLURM_TMPDIR", "s3://bucket/x"])
    def test_what_is_no_folder(self, text: str) -> None:
        with pytest.raises(ConfigError, match=r"--stage-to: .* is no folder") as caught:
            cli_options.parse_stage_to(text)
        assert caught.value.exit_code == 2

    def test_a_folder(self) -> None:
        assert cli_options.parse_stage_to("/scratch/1") == Path("/scratch/1")


class Threads:
    """Processes played by threads, whose exchanges are real."""

    def __init__(self, size: int) -> None:
        self.told: list[Any] = [None] * size
        self.barrier = threading.Barrier(size, timeout=60)

    def exchange(self, rank: int, value: Any) -> list[Any]:
        self.told[rank] = value
        self.barrier.wait()
        found = list(self.told)
        self.barrier.wait()
        return found


class Played(Processes):
    """One of them."""

    threads: Threads

    def gathered(self, compute: Callable[[], Any]) -> list[Any]:
        return self.threads.exchange(self.rank, compute())

    def any(self, *flags: bool) -> tuple[bool, ...]:
        told = self.threads.exchange(self.rank, flags)
        return tuple(any(of) for of in zip(*told, strict=True))


def each_of(size: int, do: Callable[[Processes], Any]) -> list[Any]:
    threads = Threads(size)

    def run(rank: int) -> Any:
        threading.current_thread().name = str(rank)
        own = Played(rank, size, rank)
        object.__setattr__(own, "threads", threads)
        return do(own)

    with ThreadPoolExecutor(size) as pool:
        return list(pool.map(run, range(size)))


def spied(monkeypatch: pytest.MonkeyPatch, cases: list[CachedCase], folder: Path) -> list[Copy]:
    """The copies that staging makes."""
    found: list[Copy] = []
    with monkeypatch.context() as patch:
        before_each_copy(patch, found.append)
        stage(cases, folder)
    return found


def before_each_copy(monkeypatch: pytest.MonkeyPatch, act: Callable[[Copy], object]) -> None:
    """Something happens whenever a unit is about to be copied."""
    real = Copy.make

    def make(self: Copy) -> int:
        act(self)
        return real(self)

    monkeypatch.setattr(Copy, "make", make)
