from __future__ import annotations

from pathlib import Path

import pytest
from typer.testing import CliRunner

from pipeline.cli import app as cli
from pipeline.cli import setup
from pipeline.data.registry import load_registry
from pipeline.errors import RegistryError
from tests.tiny import run_python


def pairs(folder: Path) -> Path:
    for part in ("images", "labels"):
        (folder / part).mkdir(parents=True)
        (folder / part / "a.nii.gz").touch()
    return folder


def test_the_command_says_what_comes_next(tmp_path: Path) -> None:
    pairs(tmp_path / "ct")
    words = ["init", "-d", "ct:liver=1", "--spacing-mm", "4", "2", "2"]
    done = run_python("-m", "pipeline.cli", *words, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "dataset ct: 1 cases, liver" in done.stdout
    assert "pipeline cache-teachers --dry-run" in done.stdout
    registry = load_registry(tmp_path / "data_registry.yaml")
    assert registry.grid.spacing_mm == (4, 2, 2)


def test_somebody_at_the_terminal_is_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(setup, "can_ask", lambda: True)
    pairs(tmp_path / "ct")
    path = tmp_path / "r.yaml"
    arguments = ["init", "-d", f"a={tmp_path}/ct", "--organ", "liver", "-r", str(path)]
    shown = CliRunner().invoke(cli.app, arguments, input="liver=3\n")
    assert shown.exit_code == 0, shown.output
    assert load_registry(path).datasets["a"].annotated == {"liver": (3,)}
    # With --yes nothing is asked, though somebody could answer.
    shown = CliRunner().invoke(cli.app, [*arguments, "--yes", "--force"], input="liver=4\n")
    assert shown.exit_code != 0
    assert load_registry(path).datasets["a"].annotated == {"liver": (3,)}


def test_a_case_that_cannot_be_opened_is_named_and_kept(tmp_path: Path) -> None:
    labels = pairs(tmp_path / "ct") / "labels"
    (tmp_path / "ct" / "images" / "b.nii.gz").symlink_to("../none")
    (labels / "b.nii.gz").touch()
    path = tmp_path / "r.yaml"
    shown = CliRunner().invoke(cli.app, ["init", "-d", f"{tmp_path}/ct:liver=1", "-r", str(path)])
    assert "dataset ct: 2 cases, liver" in shown.output
    assert isinstance(shown.exception, RegistryError)
    assert "1 case cannot be opened:\n  ct/b: " in str(shown.exception)
    assert [case.case for case in load_registry(path).cases("ct")] == ["a", "b"]
