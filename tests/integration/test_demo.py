"""The folder of `pipeline demo`. What it leaves there is read in test_typed_pages.py."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipeline.cli.demo import write_settings
from pipeline.errors import ConfigError


@pytest.mark.parametrize("name", ["cache_teachers.yaml", "overlay.png", "work"])
def test_a_folder_with_files_of_others_is_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text("mine")
    (tmp_path / "notes.txt").write_text("in nobody's way")
    with pytest.raises(ConfigError) as caught:
        write_settings(tmp_path, quick=True)
    assert str(caught.value) == (
        f"{tmp_path / name}: `pipeline demo` did not write this file and does not replace it. "
        "Name another folder."
    )
    assert {path.name for path in tmp_path.iterdir()} == {name, "notes.txt"}


def test_settings_that_somebody_changed_stay(tmp_path: Path) -> None:
    write_settings(tmp_path, quick=True)
    write_settings(tmp_path, quick=True)
    path = tmp_path / "train_student_ms_kd.yaml"
    changed = path.read_text().replace("steps: 8", "steps: 800")
    path.write_text(changed)
    with pytest.raises(ConfigError, match=r"kd\.yaml: these are not the settings of this demo"):
        write_settings(tmp_path, quick=True)
    assert path.read_text() == changed
