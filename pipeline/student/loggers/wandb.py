"""Weights & Biases, offline unless its own variable WANDB_MODE says otherwise."""

from __future__ import annotations

import os
import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pipeline.student.loggers.run_logger import LoggedRun


class WandbLogger:
    """One W&B run per run; after a resume it has the same id."""

    name = "wandb"

    def start(self, run: LoggedRun) -> None:
        """Opens the W&B run of this folder, or makes one; files go to `wandb/` there."""
        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")  # read when it is imported
        import wandb

        marker = run.folder / "wandb_run_id"
        if not (marker.exists() and run.resumed_from):
            marker.write_text(secrets.token_hex(8) + "\n", encoding="utf-8")
        self._run: Any = wandb.init(
            project=os.environ.get("WANDB_PROJECT", "organ-distill"),
            name=run.name,
            id=marker.read_text(encoding="utf-8").strip(),
            resume="allow",
            dir=str(run.folder),
            mode=os.environ.get("WANDB_MODE", "offline"),
            config=dict(run.settings),
            settings=wandb.Settings(console="off", silent=True),  # standard error has our lines
        )
        # A step of its own: W&B's only grows, and steps after a kill come again.
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """One row."""
        self._run.log({"step": step, **values})

    def finish(self, picture: Path, *, well: bool) -> None:
        """All is on the disk, or sent."""
        self._run.finish(exit_code=0 if well else 1)
