"""`pipeline info`: at once, and what it says is so."""

from __future__ import annotations

import json
import sys
from importlib.metadata import version
from pathlib import Path

import pytest

from pipeline.cli.app import app
from pipeline.cli.setup import stage_settings
from tests.tiny import RunCli, change_registry
from tests.unit.cli.test_app import ROOT


def test_json_says_what_is_there(tiny_registry: Path, run_cli: RunCli) -> None:
    (tiny_registry.parent / "teachers" / "spleen.pt").unlink()
    code, out, err = run_cli("info", "--json", "-r", str(tiny_registry))
    assert (code, err) == (0, "")
    found = json.loads(out)
    assert found["packages"]["torch"] == version("torch")
    assert found["python"] == ".".join(map(str, sys.version_info[:3]))
    registry = found["registry"]
    assert registry["path"] == str(tiny_registry)
    liver = registry["datasets"]["liver-ct"]
    assert [liver[k] for k in ("cases", "train", "validation", "test")] == [3, 2, 1, 0]
    multi = registry["datasets"]["multi-ct"]
    assert [multi[k] for k in ("cases", "train", "validation", "test")] == [3, 0, 1, 2]
    assert multi["annotated"] == ["liver", "spleen"]
    teachers = registry["teachers"]
    assert {name: t["weights_there"] for name, t in teachers.items()} == {
        "liver": True, "spleen": False,
    }  # fmt: skip
    assert found["registry_error"] is None


def test_every_command_and_every_stage_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, run_cli: RunCli
) -> None:
    monkeypatch.chdir(tmp_path)
    code, out, _ = run_cli("info", "--json")
    found = json.loads(out)
    assert (code, found["registry"]) == (0, None)
    names = {c.name or (c.callback.__name__ if c.callback else "") for c in app.registered_commands}
    assert names <= set(found["commands"])
    assert "cache ls" in found["commands"]
    assert all(found["commands"].values())  # each has a line
    assert set(found["stages"]) == set(stage_settings())
    assert {Path(s["settings"]) for s in found["stages"].values()} == {
        path for path in (ROOT / "stages").glob("*.yaml") if path.name.count(".") == 1
    }


def test_for_people(tiny_registry: Path, run_cli: RunCli) -> None:
    code, out, _ = run_cli("info", "-r", str(tiny_registry))
    assert code == 0
    for text in ("torch 2", "liver 1, spleen 2", "multi-ct", "12 x 12 x 12 mm", "checkpoint"):
        assert text in out


@pytest.mark.parametrize("as_json", [True, False])
def test_versions_are_told_though_the_registry_is_wrong(
    tiny_registry: Path, as_json: bool, run_cli: RunCli
) -> None:
    change_registry(tiny_registry, lambda data: data.pop("grid"))
    arguments = ["info", *(["--json"] if as_json else []), "-r", str(tiny_registry)]
    code, out, err = run_cli(*arguments)
    assert code == 2
    assert "grid: required, but missing." in err
    if as_json:
        assert "grid: required" in json.loads(out)["registry_error"]
    else:
        assert "torch 2" in out


def test_a_split_that_is_empty_is_told(tiny_registry: Path, run_cli: RunCli) -> None:
    few = {"validation": 0.1}
    change_registry(tiny_registry, lambda d: d["datasets"]["liver-ct"].update(split=few))
    told = "none of its 3 cases falls into validation (0.1). Choose another `seed` (`seed: "
    arguments = ("info", "-r", str(tiny_registry))
    code, out, _ = run_cli(*arguments)
    assert code == 0
    assert f"\nliver-ct: {told}" in out
    _, out, _ = run_cli(*arguments, "--json")
    datasets = json.loads(out)["registry"]["datasets"]
    assert datasets["liver-ct"]["note"].startswith(told)
    assert datasets["spleen-ct"]["note"] is None


def test_what_cannot_be_found_or_opened_is_told_last(tiny_registry: Path, run_cli: RunCli) -> None:
    asked = ("info", "-r", str(tiny_registry))
    image = next((tiny_registry.parent / "data/liver-ct/images").glob("*.nii.gz"))
    image.unlink()
    image.symlink_to("../none")
    code, out, err = run_cli(*asked)
    assert (code, "multi-ct" in out) == (2, True)
    case = image.name.removesuffix(".nii.gz")
    assert f"1 case cannot be opened:\n  liver-ct/{case}: " in err
    change_registry(tiny_registry, lambda data: data["datasets"]["liver-ct"].update(root="none"))
    code, out, err = run_cli(*asked, "--json")
    found = json.loads(out)
    assert (code, found["registry"]["datasets"]["liver-ct"]["cases"]) == (2, 0)
    assert "datasets.liver-ct: there is no folder " in found["registry_error"]
    assert "none. Check `root`." in err
