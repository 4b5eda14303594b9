"""The import contract of pyproject.toml leaves no module out."""

from __future__ import annotations

import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def test_every_module_is_named_in_the_contract() -> None:
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    layers = settings["tool"]["importlinter"]["contracts"][0]["layers"]
    named = {name for row in layers for name in row.replace("|", " ").replace(":", " ").split()}
    there = {
        f"{folder}.{path.stem}"
        for folder in ("pipeline", "stages")
        for path in (ROOT / folder).iterdir()
        if path.suffix == ".py" or (path / "__init__.py").is_file()
    }
    assert named == there - {"pipeline.__init__", "stages.__init__"}
    assert len(layers) <= 8
