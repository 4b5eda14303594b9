"""What the tab key offers, as bash asks for it."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar

import pytest
import yaml

from pipeline.cli import options
from tests.tiny import run_python


def offered(line: str, folder: Path, *, shell: str = "bash") -> list[str]:
    """What is offered at the end of a command line, typed in `folder`."""
    words = line.split(" ")
    code = "import sys; sys.argv = ['pipeline']; from pipeline.cli import main; main()"
    typed = {"COMP_WORDS": line, "COMP_CWORD": str(len(words) - 1)}
    done = run_python("-c", code, cwd=folder, _PIPELINE_COMPLETE=f"complete_{shell}", **typed)
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A registry and a work folder, as far as names go."""
    data = {
        "teachers": {"liver": {}, "liver-2": {}, "spleen": {}},
        "datasets": {"a-ct": {}, "b": {}},
    }
    (tmp_path / "data_registry.yaml").write_text(yaml.safe_dump(data))
    other = {"teachers": {"kidneys": {}}}
    (tmp_path / "other.yaml").write_text(yaml.safe_dump(other))
    for name in ("case_1@0123.zarr", "case_2@0123.zarr", "case_2@4567.zarr"):
        (tmp_path / "work" / "cases" / "a-ct" / name).mkdir(parents=True)
    for run in ("first", "compared/ms_kd-seed0"):
        folder = tmp_path / "work" / "students" / run
        folder.mkdir(parents=True)
        (folder / "config.json").touch()
        (folder / "student.pt").touch()
    return tmp_path


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("pipeline train-teachers --only li", ["liver", "liver-2"]),
        ("pipeline train-teachers -r other.yaml --only ", ["kidneys"]),
        ("pipeline cache why a", ["a-ct/"]),
        ("pipeline inspect a-ct/", ["a-ct/case_1", "a-ct/case_2"]),
        ("pipeline predict wor", ["work/students/compared/ms_kd-seed0/student.pt",
                                  "work/students/first/student.pt"]),
        ("pipeline train-student --logger m", ["mlflow"]),
        ("pipeline submit train-", ["train-teachers", "train-student"]),
        ("pipeline eval", ["evaluate"]),
    ],
)  # fmt: skip
def test_names_are_offered(place: Path, line: str, expected: list[str]) -> None:
    assert offered(line, place) == expected


@pytest.mark.parametrize("text", [None, "teachers: [", "- a list", "teachers: 3", "\udcff"])
def test_what_cannot_be_read_offers_nothing(tmp_path: Path, text: str | None) -> None:
    class Context:
        params: ClassVar = {"registry": tmp_path / "r.yaml", "work": tmp_path / "none"}

    if text is not None:
        (tmp_path / "r.yaml").write_text(text, errors="surrogateescape")
    for complete in (
        options.teacher_names, options.case_names, options.student_files,
        options.run_names,
    ):  # fmt: skip
        assert complete(Context(), "zz") == []  # type: ignore[arg-type]


def test_runs_of_a_work_folder(place: Path) -> None:
    class Context:
        params: ClassVar = {"work": place / "work"}

    assert options.run_names(Context(), "") == ["compared/ms_kd-seed0", "first"]  # type: ignore[arg-type]
    assert options.run_names(Context(), "f") == ["first"]  # type: ignore[arg-type]
