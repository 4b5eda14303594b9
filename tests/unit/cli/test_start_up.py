"""A command answers at once: it imports what it computes with, and nothing before that."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from pipeline.cli.app import app
from tests.tiny import WINDOW, run_python, training_settings

_LIST_MODULES = """
import sys
sys.argv = ["pipeline", *sys.argv[1:]]
from pipeline.cli import main
try:
    main()
finally:
    print("MODULES", *sys.modules, file=sys.stderr)
"""
NETWORKS = ("torch", "monai")
SLOW = (*NETWORKS, "dask", "distributed", "zarr", "scipy", "nibabel", "matplotlib", "pandas")
LIGHT = (*NETWORKS, "distributed", "scipy.stats", "scipy.signal", "matplotlib", "pandas")

# Arguments, what must not be imported, and how many modules there may be: about a tenth more than
# there are. `cache-teachers` and `train-student` are stopped where they read their settings.
COMMANDS = (
    ("--help", (*SLOW, "numpy", "pydantic", "yaml"), 400),
    ("plan --help", (*SLOW, "numpy"), 500),
    ("info", SLOW, 510),
    ("init -d ct=data/liver-ct:liver=1 -r new.yaml --yes", LIGHT, 1200),
    ("status", LIGHT, 760),
    ("cache verify", LIGHT, 730),
    ("cache gc data_registry.yaml --dry-run", LIGHT, 730),
    ("cache diff work work", LIGHT, 1260),
    ("check --no-teachers --jobs 1", LIGHT, 1520),
    ("inspect", LIGHT, 1510),
    ("inspect liver-ct/case_000", (*NETWORKS, "distributed", "pandas"), 1800),
    ("report student -p pred --no-regions", (*NETWORKS, "distributed", "pandas"), 1690),
    ("predict work/students/student/student.pt -r data_registry.yaml -o pred --dry-run",
     LIGHT, 1090),
    ("evaluate pred", LIGHT, 1370),
    ("submit cache-teachers train-student predict evaluate --print -c train-student=student.yaml "
     "-c cache-teachers=teachers.yaml", ("monai",), 2300),
    ("cache-teachers -c absent.yaml", NETWORKS, 1600),
    ("train-student -c absent.yaml", ("monai",), 2100),
)  # fmt: skip


@pytest.fixture(scope="module")
def folder(built_cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cohort with a cache, a student, its predictions and their scores."""
    folder = tmp_path_factory.mktemp("start") / "cohort"
    shutil.copytree(built_cache.parent, folder)
    settings = {"training": training_settings()}
    (folder / "student.yaml").write_text(yaml.safe_dump(settings), encoding="utf-8")
    settings = {"window": {"shape": list(WINDOW)}}
    (folder / "teachers.yaml").write_text(yaml.safe_dump(settings), encoding="utf-8")
    registry = ["-r", str(folder / "data_registry.yaml"), "-q"]
    student = str(folder / "work/students/student/student.pt")
    for command in (
        ["train-student", "-c", str(folder / "student.yaml"), "-w", str(folder / "work")],
        ["predict", student, "-o", str(folder / "pred")],
        ["evaluate", str(folder / "pred")],
    ):
        result = CliRunner().invoke(app, [*command, *registry], catch_exceptions=False)
        assert result.exit_code == 0, result.output
    return folder


@pytest.mark.parametrize(("command", "absent", "at_most"), COMMANDS, ids=[c[0] for c in COMMANDS])
def test_a_command_imports_what_it_needs(
    command: str, absent: tuple[str, ...], at_most: int, folder: Path
) -> None:
    done = run_python("-c", _LIST_MODULES, *command.split(), cwd=folder)
    assert done.returncode == (2 if "absent.yaml" in command else 0), done.stderr
    modules = done.stderr.split("MODULES ")[1].split()
    assert "typer" in modules
    assert [name for name in absent if name in modules] == []
    assert len(modules) <= at_most


@pytest.mark.parametrize(
    ("module", "absent"),
    [
        ("pipeline.setup.check.cases", ("torch", "monai", "dask", "matplotlib")),
        ("pipeline.review.inspect.numbers", ("torch", "monai", "matplotlib")),
        ("pipeline.student.dataset", ("monai", "matplotlib", "scipy.ndimage")),
    ],
)
def test_worker_processes_import_what_they_need(module: str, absent: tuple[str, ...]) -> None:
    """Of `check`, `inspect` and a training's loaders: what the server they are forked from does."""
    done = run_python("-c", f"import sys, {module}; print(*sys.modules)")
    assert done.returncode == 0, done.stderr
    assert [name for name in absent if name in done.stdout.split()] == []
