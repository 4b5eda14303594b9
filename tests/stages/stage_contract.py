"""What every stage promises, as tests; one subclass per stage says what the stage is.

    class TestPredict(StageContract):
        def run(self, registry, *, dry_run=False): ...
        ...

`registry` is the path of a copy of the tiny cohort (see `tests/tiny.py`). A stage that needs a
filled cache overrides the fixture:

        @pytest.fixture
        def registry(self, tiny_cached: Path) -> Path:
            return tiny_cached
"""

from __future__ import annotations

import hashlib
import json
import shutil
import signal
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from fnmatch import fnmatch
from pathlib import Path
from typing import ClassVar

import pytest

from pipeline.student.progress import metric_lines, without_timing
from stages.report import StageReport
from tests.tiny import placeless_entry, run_python

# Runs the command line with one function replaced: its nth call kills the process, as kill -9 does.
_KILLER = """
import importlib, os, signal, sys
module, name, nth = sys.argv[1], sys.argv[2], int(sys.argv[3])
sys.argv = ["pipeline", *sys.argv[4:]]
owner = importlib.import_module(module)
real, calls = getattr(owner, name), []
def fatal(*args, **kwargs):
    calls.append(1)
    if len(calls) == nth:
        os.kill(os.getpid(), signal.SIGKILL)
    return real(*args, **kwargs)
setattr(owner, name, fatal)
from pipeline.cli import main
main()
"""


def snapshot(folder: Path, *, without: Sequence[str] = ()) -> dict[str, tuple[int, str]]:
    """File or folder -> (mtime in ns, SHA-256), except for paths that match `without`; a folder
    counts by being there, since its mtime also changes when a temporary comes and goes."""
    found = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if any(fnmatch(name, pattern) for pattern in without):
            continue
        if path.is_file():
            digest = hashlib.sha256(_without_times(path)).hexdigest()
            found[name] = (path.stat().st_mtime_ns, digest)
        else:
            found[name] = (0, "folder")
    return found


def _without_times(path: Path) -> bytes:
    """The bytes of a file; of metrics.jsonl what the clock does not decide, of an entry of the
    index what is not about places and times of files."""
    above = path.parent.parent
    if path.suffix == ".json" and "index" in (above.name, above.parent.name):
        return json.dumps(placeless_entry(path)).encode()
    if path.name != "metrics.jsonl":
        return path.read_bytes()
    return json.dumps(without_timing(metric_lines(path))).encode()


def content(folder: Path, *, without: Sequence[str] = ()) -> dict[str, str]:
    """`snapshot` without times."""
    return {name: digest for name, (_, digest) in snapshot(folder, without=without).items()}


def run_killed(command: Sequence[str], at: str, nth: int) -> int:
    """Runs the command line until the nth call of `module:function`, which kills it; returns the
    return code."""
    module, function = at.split(":")
    done = run_python("-c", _KILLER, module, function, nth, *command)
    assert done.returncode == -signal.SIGKILL, done.stderr
    return done.returncode


class StageContract(ABC):
    """Subclass it, name the subclass `Test...`, and fill in the abstract methods.

    Attributes:
        of_each_run: patterns of files, below `output`, that tell about the latest run and may
            change though nothing was done.
        timed: patterns of files that hold a time, so that two runs never write the same bytes.
        kill_at: `module:function` at which a run is killed, as that module looks it up.
        kill_nth: at which call of it.
    """

    of_each_run: ClassVar[tuple[str, ...]] = ()
    timed: ClassVar[tuple[str, ...]] = ()
    kill_at: ClassVar[str]
    kill_nth: ClassVar[int] = 2

    @abstractmethod
    def run(self, registry: Path, *, dry_run: bool = False) -> StageReport:
        """Runs the stage in this process."""

    @abstractmethod
    def command(self, registry: Path) -> list[str]:
        """The same run as arguments of the command line."""

    @abstractmethod
    def output(self, registry: Path) -> Path:
        """The folder that the stage writes into."""

    @abstractmethod
    def units(self, registry: Path) -> set[str]:
        """Names of all units that a first run makes."""

    @abstractmethod
    def remove_one(self, registry: Path) -> str:
        """Deletes one finished unit; returns its name."""

    @abstractmethod
    def break_one(self, registry: Path) -> Mapping[str, str]:
        """Makes an input unusable; returns each unit that will fail -> a part of its message.

        Units whose names contain a failed one's depend on it, and are not made either.
        """

    @pytest.fixture
    def registry(self, tiny_registry: Path) -> Path:
        """What the stage runs on."""
        return tiny_registry

    def test_a_dry_run_writes_nothing_and_says_what_it_would_do(self, registry: Path) -> None:
        before = snapshot(registry.parent)
        report = self.run(registry, dry_run=True)
        assert snapshot(registry.parent) == before
        assert set(report.done) == self.units(registry)
        assert report.exit_code == 0

    def test_the_first_run_does_all_and_the_second_nothing(self, registry: Path) -> None:
        first = self.run(registry)
        assert (set(first.done), first.skipped, first.failed) == (self.units(registry), [], {})
        assert first.exit_code == 0
        before = snapshot(registry.parent, without=self._hidden(registry, self.of_each_run))
        second = self.run(registry)
        after = snapshot(registry.parent, without=self._hidden(registry, self.of_each_run))
        assert (second.done, set(second.skipped)) == ([], self.units(registry))
        assert second.exit_code == 0
        assert after == before

    def test_a_removed_unit_is_made_again_alone_and_the_same(self, registry: Path) -> None:
        self.run(registry)
        output = self.output(registry)
        before = snapshot(output, without=self.of_each_run)
        unit = self.remove_one(registry)
        kept = snapshot(output, without=self.of_each_run)
        assert kept != before
        report = self.run(registry)
        assert report.done == [unit]
        after = snapshot(output, without=self.of_each_run)
        assert {name: entry for name, entry in after.items() if name in kept} == kept
        ignored = (*self.of_each_run, *self.timed)
        assert self._digests(after, ignored) == self._digests(before, ignored)

    def test_a_failing_unit_is_named_and_the_others_are_done(self, registry: Path) -> None:
        expected = self.break_one(registry)
        report = self.run(registry)
        assert set(report.failed) == set(expected)
        for unit, part in expected.items():
            assert part in str(report.failed[unit])
        blocked = {u for u in self.units(registry) if any(unit in u for unit in expected)}
        assert set(report.done) == self.units(registry) - blocked
        assert report.exit_code == 2
        self.assert_nothing_temporary(registry)

    def test_killed_and_run_again_is_as_if_never_killed(
        self, registry: Path, tmp_path: Path
    ) -> None:
        undisturbed = tmp_path / "undisturbed" / registry.name
        shutil.copytree(registry.parent, undisturbed.parent)
        self.run(undisturbed)
        run_killed(self.command(registry), self.kill_at, self.kill_nth)
        report = self.run(registry)
        assert report.exit_code == 0
        assert set(report.done) | set(report.skipped) == self.units(registry)
        assert report.done
        self.assert_nothing_temporary(registry)
        ignored = (*self.of_each_run, *self.timed)
        assert content(self.output(registry), without=ignored) == content(
            self.output(undisturbed), without=ignored
        )

    def assert_nothing_temporary(self, registry: Path) -> None:
        """Temporary names begin with a dot."""
        assert list(self.output(registry).rglob(".*")) == []

    def _hidden(self, registry: Path, patterns: Sequence[str]) -> list[str]:
        below = self.output(registry).relative_to(registry.parent).as_posix()
        return [f"{below}/{pattern}" for pattern in patterns]

    @staticmethod
    def _digests(found: Mapping[str, tuple[int, str]], without: Sequence[str]) -> dict[str, str]:
        return {
            name: digest
            for name, (_, digest) in found.items()
            if not any(fnmatch(name, pattern) for pattern in without)
        }
