"""A student that reads from the node's own disk is the student that reads from the cache."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
import yaml
from typer.testing import CliRunner

from pipeline.cli.app import app
from pipeline.data.registry import load_registry
from pipeline.folder import Folder
from pipeline.log import Log
from pipeline.student.checkpoint import load_student
from pipeline.student.progress import metric_lines, without_timing
from pipeline.student.speed import TrainingExecution
from stages import train_student
from stages.report import Scope
from tests.stages.test_train_student import settings
from tests.tiny import copy_cohort, training_settings, work_of

if TYPE_CHECKING:
    from upath import UPath


def trained(
    registry: Path, work: Folder | None = None, log: Log | None = None, **options: Any
) -> tuple[Any, ...]:
    """What a training of two steps with features came to."""
    work = work or work_of(registry)
    scope = Scope(load_registry(registry, files=False), work, log or Log())
    execution = TrainingExecution(device="cpu", **options)
    report = train_student.run(settings(steps=2, validate_every=1), scope, execution)
    assert report.exit_code == 0, report.failed
    run = work / "students" / "student"
    record, network = load_student(run / "student.pt")
    return record, network.state_dict(), without_timing(metric_lines(run / "metrics.jsonl"))


def assert_same(ours: tuple[Any, ...], theirs: tuple[Any, ...]) -> None:
    assert ours[0] == theirs[0]  # the run's digest is in it
    assert ours[1].keys() == theirs[1].keys()
    assert all(torch.equal(ours[1][name], theirs[1][name]) for name in theirs[1])
    assert ours[2] == theirs[2]


@pytest.fixture(scope="module")
def plain(built_cache: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, ...]:
    """Without copies."""
    return trained(copy_cohort(built_cache, tmp_path_factory.mktemp("plain") / "cohort"))


def test_numbers_and_digest_are_the_same_and_no_array_of_the_cache_is_read(
    tiny_cached: Path, tmp_path: Path, plain: tuple[Any, ...]
) -> None:
    assert_same(trained(tiny_cached, stage_to=tmp_path / "node"), plain)
    # Once copied, arrays may as well be damaged: whoever read one would stop.
    shutil.rmtree(work_of(tiny_cached) / "students")
    for chunk in work_of(tiny_cached).glob("**/*.zarr/**/c/**/*"):
        if chunk.is_file():
            chunk.write_bytes(bytes(chunk.stat().st_size))
    assert_same(trained(tiny_cached, stage_to=tmp_path / "node"), plain)


def test_from_an_object_store(
    tiny_cached: Path, tmp_path: Path, store_work: UPath, plain: tuple[Any, ...],
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    store_work.fs.put(f"{work_of(tiny_cached)}/", store_work.path, recursive=True)
    assert_same(trained(tiny_cached, store_work, stage_to=tmp_path / "node"), plain)
    assert "units are read from" in capsys.readouterr().err


def test_loader_processes_read_the_copies_and_go_on_without_them(
    tiny_cached: Path, tmp_path: Path, plain: tuple[Any, ...], capfd: pytest.CaptureFixture[str]
) -> None:
    class Robbed(Log):
        """Somebody cleans up between copying and reading."""

        def info(self, text: str) -> None:
            super().info(text)
            if "units are read from" in text:
                shutil.rmtree(tmp_path / "node")

    found = trained(tiny_cached, log=Robbed(), stage_to=tmp_path / "node", workers=1)
    assert_same(found, plain)
    assert "its copy cannot be read" in capfd.readouterr().err


class TestCommand:
    def arguments(self, registry: Path) -> list[str]:
        file = registry.parent / "student.yaml"
        file.write_text(yaml.safe_dump({"training": training_settings(steps=1)}))
        return ["-r", str(registry), "-w", str(work_of(registry)), "--device", "cpu",
                "--stage-to", str(registry.parent / "node")]  # fmt: skip

    def test_train_student(self, tiny_cached: Path) -> None:
        words = self.arguments(tiny_cached)
        result = CliRunner().invoke(
            app, ["train-student", *words, "-c", str(tiny_cached.parent / "student.yaml")]
        )
        assert result.exit_code == 0, result.output
        assert "units are read from" in result.output
        assert list((tiny_cached.parent / "node").rglob("image"))
