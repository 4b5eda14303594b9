"""The script for a machine with a GPU, rehearsed on a CPU: every part runs and says its numbers."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest

from benchmarks.gpu.__main__ import LEAST, Gpu, carry


def test_every_part_runs_and_is_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    gpu = Gpu(tmp_path / "new", tiny=True)
    gpu.run(time.monotonic() + 600)
    gpu.show()
    found = json.loads((tmp_path / "new" / "gpu.json").read_text())
    assert {name: part["why"] for name, part in found["parts"].items()} == {
        "stage one, fp32": "", "resume": "", "stage two": "", "channels-last": "",
    }  # fmt: skip
    assert found["parts"]["stage one, fp32"]["rows"]["stage one"]["wall / bare"] > 1
    resumed = found["parts"]["resume"]["rows"]["resumed against undisturbed"]
    assert resumed == {"largest difference": 0.0, "same bits": True}
    two = found["parts"]["stage two"]["rows"]
    assert set(two) == {"memory", "memory, ms_kd", "cache, 0 workers", "online"}
    table = (tmp_path / "new" / "gpu.md").read_text()
    assert "| resume (" in table
    assert table in capsys.readouterr().out


def test_what_has_no_time_left_is_named(tmp_path: Path) -> None:
    gpu = Gpu(tmp_path, tiny=False)
    gpu.run(time.monotonic())
    parts = json.loads((tmp_path / "gpu.json").read_text())["parts"]
    assert list(parts) == list(LEAST)
    assert all(part["why"].startswith("left out: ") for part in parts.values())


def test_what_has_to_be_carried(capsys: pytest.CaptureFixture[str]) -> None:
    carry()
    told = capsys.readouterr().out
    assert {"torch", "monai", "zarr"} <= {line.split("  ")[0] for line in told.splitlines()}
    assert " MB installed" in told
