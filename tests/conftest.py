"""The tiny cohort as fixtures, `tests/tiny.py` says what is in it; the table of faults at the end.

With several test processes each counts faults of its own; the one that prints adds them up.
"""

from __future__ import annotations

import secrets
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import settings

if TYPE_CHECKING:
    from upath import UPath

# On a shared machine one example may take as long as it likes; pytest-timeout sees to hangs.
settings.register_profile("no deadline", deadline=None)
settings.load_profile("no deadline")

pytest.register_assert_rewrite("tests.stages.stage_contract")

from pipeline.cache.reader import POOL, Unit  # noqa: E402
from pipeline.cli import main  # noqa: E402
from pipeline.data.patches import Patch  # noqa: E402
from tests.distribution import Dealt, num_processes, rank  # noqa: E402
from tests.faults.ledger import LEDGER, LONG  # noqa: E402
from tests.messages import never_raised  # noqa: E402
from tests.messages.ledger import RAISED, keep_with_earlier_runs  # noqa: E402
from tests.nnunet_models import build_models  # noqa: E402
from tests.object_store import BUCKET, folder, object_store  # noqa: E402
from tests.tiny import RunCli, build_cohort, copy_cohort, fill_cache  # noqa: E402

RAISED.install()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What takes long begins first."""
    items.sort(key=lambda item: rank(item.nodeid))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Dealt:
    """However files are to be dealt, see `tests/distribution.py`."""
    return Dealt(config, log)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers() -> int:
    """Of `--numprocesses auto`."""
    return num_processes()


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    """Hands a test process's counts of faults, and of errors, to the process that prints."""
    if (output := getattr(session.config, "workeroutput", None)) is not None:
        output["faults"] = {kind: dict(row) for kind, row in LEDGER.rows.items()}
        output["seconds"] = dict(LEDGER.seconds)
        output["raised"] = sorted(RAISED.sites)
        return
    keep_with_earlier_runs(RAISED.sites)
    if never_raised.whole_suite_ran(session, exitstatus):
        if never_raised.wants_rewriting():
            never_raised.rewrite(RAISED.sites)
        RAISED.verdict = never_raised.verdict(RAISED.sites, never_raised.listed())
        if RAISED.verdict:
            session.exitstatus = pytest.ExitCode.TESTS_FAILED


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any, error: object) -> None:
    """Adds the counts of a test process that ends."""
    output = getattr(node, "workeroutput", {})
    for kind, row in output.get("faults", {}).items():
        LEDGER.add(kind, **row)
    for kind, seconds in output.get("seconds", {}).items():
        LEDGER.took(kind, *seconds)
    RAISED.sites |= {(file, line) for file, line in output.get("raised", [])}


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Prints what was tried."""
    if LEDGER.rows:
        terminalreporter.section(f"faults, {'long' if LONG else 'short'} version")
        for line in (*LEDGER.table(), *LEDGER.times()):
            terminalreporter.write_line(line)
    if RAISED.verdict:
        terminalreporter.section("errors and tests/messages/never_raised.txt differ", red=True)
        for line in RAISED.verdict:
            terminalreporter.write_line(line)


@pytest.fixture(autouse=True)
def no_pooled_chunks() -> Iterator[None]:
    """Training in this process makes the pool large; chunks of one test are none of the next's."""
    yield
    POOL.resize(0)


@pytest.fixture(autouse=True)
def every_error_reads_well() -> Iterator[None]:
    """The text of each error of the code base that a test raises is read; see tests/messages."""
    RAISED.complaints.clear()
    yield
    assert RAISED.complaints == []


@pytest.fixture(scope="session")
def built_cohort(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The one original, never to be changed; use `tiny_registry`."""
    return build_cohort(tmp_path_factory.mktemp("tiny") / "cohort")


@pytest.fixture(scope="session")
def built_cache(built_cohort: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The one original with a filled cache; tests that only read may use it as it is."""
    registry = copy_cohort(built_cohort, tmp_path_factory.mktemp("tiny") / "cached")
    fill_cache(registry)
    return registry


@pytest.fixture(scope="session")
def store_endpoint() -> Iterator[str]:
    """An S3 server on loopback, which the AWS_* variables lead to."""
    pytest.importorskip("moto", reason="no S3 server to start: moto is not installed")
    with object_store() as endpoint:
        yield endpoint


@pytest.fixture
def store_work(store_endpoint: str) -> UPath:
    """A work folder of the test's own in that server, empty."""
    return folder(f"{BUCKET}/{secrets.token_hex(6)}/work")


@pytest.fixture
def run_cli(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> RunCli:
    """Runs `pipeline` with arguments in this process: exit code, standard output and error."""

    def run(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["pipeline", *arguments])
        monkeypatch.setenv("COLUMNS", "1000")  # no sentence is wrapped, however long its paths
        with pytest.raises(SystemExit) as caught:
            main()
        said = capsys.readouterr()
        return int(caught.value.code or 0), said.out, said.err

    return run


@pytest.fixture
def tiny_registry(built_cohort: Path, tmp_path: Path) -> Path:
    """A fresh copy of the cohort, nothing cached."""
    return copy_cohort(built_cohort, tmp_path / "cohort")


@pytest.fixture
def tiny_cached(built_cache: Path, tmp_path: Path) -> Path:
    """A fresh copy of the cohort and of its filled work folder."""
    return copy_cohort(built_cache, tmp_path / "cached")


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int]]:
    """What is read of units: teacher or `cases`, "/", array; and how many values."""
    made: list[tuple[str, int]] = []
    real = Unit.read

    def read(self: Unit, name: str, patch: Patch | None = None) -> Any:
        values = real(self, name, patch)
        made.append((f"{self.path.parts[-3].split('@')[0]}/{name}", values.size))
        return values

    monkeypatch.setattr(Unit, "read", read)
    return made


@pytest.fixture(scope="session")
def nnunet_models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Trained nnU-Net model folders: labels, 2d, regions; see `tests/nnunet_models.py`."""
    return build_models(tmp_path_factory.mktemp("nnunet"))
