"""The wheel alone, outside the repository: everything that a user runs is in it."""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
import venv
from importlib.metadata import Distribution, version
from pathlib import Path

import pytest
from packaging.requirements import Requirement

REPOSITORY = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An environment with the wheel; packages that it needs are those of this one."""
    root = tmp_path_factory.mktemp("wheel")
    build = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation"]
    subprocess.run([*build, "-w", root, REPOSITORY], check=True, cwd=root, capture_output=True)
    venv.create(root / "env", with_pip=False)
    pip = [sys.executable, "-m", "pip", "--python", root / "env" / "bin" / "python"]
    [wheel] = root.glob("*.whl")
    install = [*pip, "install", "--no-deps", "--no-index", wheel]
    subprocess.run(install, check=True, cwd=root, capture_output=True)
    # After it, or pip would remove the package that is installed there. A path in a .pth file is
    # searched, its own .pth files are not: the repository stays out.
    site = next((root / "env" / "lib").glob("python*/site-packages"))
    (site / "others.pth").write_text(f"{sysconfig.get_path('purelib')}\n")
    return root / "env"


def test_its_requirements_are_what_is_tested_here(installed: Path) -> None:
    [info] = installed.glob("lib/python*/site-packages/organ_distill-*.dist-info")
    requires = [Requirement(text) for text in Distribution.at(info).requires or ()]
    assert len(requires) > 15
    for one in requires:
        if one.marker is None:
            assert one.specifier.contains(version(one.name)), one


@pytest.mark.slow
def test_it_holds_all_of_the_program_and_runs_elsewhere(installed: Path, tmp_path: Path) -> None:
    """What the demo does is in test_typed_pages.py: it needs nothing but these files."""
    [site] = installed.glob("lib/python*/site-packages")
    for package in ("pipeline", "stages"):
        files = [p for p in (REPOSITORY / package).rglob("*") if p.is_file()]
        names = [p.relative_to(REPOSITORY) for p in files if p.suffix != ".pyc"]
        assert [name for name in names if not (site / name).is_file()] == []
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    where = "import pipeline; print(pipeline.__file__)"
    for command in (["pipeline", "info", "--json"], ["python", "-c", where]):
        done = subprocess.run(
            [installed / "bin" / command[0], *command[1:]],
            cwd=tmp_path, env=environment, capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
    assert Path(done.stdout).is_relative_to(installed)


def test_the_containers_steps_are_those_of_make() -> None:
    """No builder is asked for: what it runs beside installing is what CI runs."""
    lines = (REPOSITORY / "Containerfile").read_text().splitlines()
    made = [line.split()[2] for line in lines if line.startswith("RUN make ")]
    assert made == [".venv/.test-installed"]
    for target in (*made, "demo", "test"):
        told = subprocess.run(
            ["make", "-n", target], cwd=REPOSITORY, capture_output=True, text=True
        )
        assert told.returncode == 0, told.stderr
