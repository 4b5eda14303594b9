"""Event files for TensorBoard, in `tensorboard/` of the run's folder."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from pipeline.student.loggers.run_logger import LoggedRun


class TensorBoardLogger:
    """Writes event files; nothing leaves the machine."""

    name = "tensorboard"

    def start(self, run: LoggedRun) -> None:
        """Another event file; it tells readers to forget what older ones say of later steps."""
        from torch.utils.tensorboard.writer import SummaryWriter

        self._writer = SummaryWriter(
            run.folder / "tensorboard", purge_step=run.resumed_from + 1, flush_secs=30
        )
        if run.resumed_from == 0:
            text = json.dumps(run.settings, indent=1, default=str).replace("\n", "\n    ")
            self._writer.add_text("settings", f"    {text}")

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """One point each."""
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def finish(self, picture: Path, *, well: bool) -> None:
        """All is on the disk."""
        self._writer.close()
