"""An error in a loader process ends the training at once, as the paragraph that it was."""

from __future__ import annotations

from pathlib import Path

import yaml

from tests.tiny import run_python, training_settings, work_of


def test_a_damaged_chunk_stops_the_training_and_does_not_hang(tiny_cached: Path) -> None:
    for chunk in work_of(tiny_cached).glob("teachers/*/*/*.zarr/log_odds/*/c/0/0/0"):
        content = bytearray(chunk.read_bytes())
        content[len(content) // 3] ^= 0x10
        chunk.write_bytes(bytes(content))
    config = tiny_cached.parent / "student.yaml"
    config.write_text(yaml.safe_dump({"training": training_settings()}), encoding="utf-8")
    where = ["-r", tiny_cached, "-c", config, "-w", work_of(tiny_cached)]
    done = run_python("-m", "pipeline.cli", "train-student", *where, "--workers", "1")
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("error: ")
    assert "cannot be decoded" in last
