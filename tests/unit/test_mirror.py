from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from pipeline.errors import CheckpointError
from pipeline.folder import mirrored, read_text, sizes

if TYPE_CHECKING:
    from upath import UPath


def test_a_local_folder_is_itself(tmp_path: Path) -> None:
    with mirrored(tmp_path / "run") as (local, keep):
        assert local == tmp_path / "run"
        keep()
    assert not local.exists()


def test_what_is_kept_is_found_again_and_the_rest_is_not(store_work: UPath) -> None:
    with mirrored(store_work / "run") as (local, keep):
        (local / "checkpoints").mkdir()
        for name in ("metrics.jsonl", "checkpoints/step_1.pt", "checkpoints/step_2.pt"):
            (local / name).write_text(name)
        keep()
        (local / "metrics.jsonl").write_text("not kept: killed before")
    assert not local.exists()
    with mirrored(store_work / "run") as (local, keep):
        assert (local / "metrics.jsonl").read_text() == "metrics.jsonl"
        (local / "checkpoints" / "step_1.pt").unlink()
        (local / "metrics.jsonl").write_text("more")
        (local / ".step_3.pt.1.tmp").write_text("being written")
        keep()
    assert set(sizes(store_work / "run")) == {"metrics.jsonl", "checkpoints/step_2.pt"}
    assert read_text(store_work / "run" / "metrics.jsonl") == "more"


def test_metrics_go_first_and_the_marker_last(
    store_work: UPath, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed at any moment, what is in the store is a state to go on from."""
    order: list[str] = []
    real = store_work.fs.put_file

    def put(source: str, target: str) -> None:
        order.append(target.rsplit("/run/", 1)[1])
        real(source, target)

    monkeypatch.setattr(store_work.fs, "put_file", put)
    with mirrored(store_work / "run") as (local, keep):
        (local / "checkpoints").mkdir()
        for name in ("finished.json", "student.pt", "checkpoints/step_1.pt", "metrics.jsonl"):
            (local / name).write_text(name)
            time.sleep(0.01)
        keep()
        keep()
    assert order == ["metrics.jsonl", "checkpoints/step_1.pt", "student.pt", "finished.json"]


def test_an_error_names_the_folder_in_the_store(store_work: UPath) -> None:
    with (
        pytest.raises(CheckpointError, match=f"^{store_work}/run/checkpoints: "),
        mirrored(store_work / "run") as (local, _),
    ):
        raise CheckpointError("cannot be read.", where=local / "checkpoints")
