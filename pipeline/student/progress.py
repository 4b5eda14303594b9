"""A training as it is followed: metrics.jsonl, curves, loggers, and half a line for people."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from pipeline.student.history import History
from pipeline.student.loggers.run_logger import LoggedRun, Loggers, RunLogger
from pipeline.student.metrics_file import append_lines, kept_lines, sync

WINDOW_STEPS = 20
WINDOW_SECONDS = 10.0
SECONDS_BETWEEN_PICTURES = 60.0
_Batch = TypeVar("_Batch")


@dataclass
class _Window:
    """Steps whose lines are not written yet: a timing is of all of them."""

    began: float
    steps: int = 0
    seconds: float = 0.0
    waited: float = 0.0

    def add(self, seconds: float, waited: float) -> None:
        self.steps += 1
        self.seconds += max(seconds, 1e-9)
        self.waited += waited

    def timing(self, batch_size: int) -> dict[str, float]:
        return {
            "steps": self.steps,
            "seconds": round(self.seconds, 4),
            "data_wait": round(self.waited / self.seconds, 4),
            "samples_per_second": round(self.steps * batch_size / self.seconds, 3),
        }


class Metrics:
    """Appends lines to metrics.jsonl, tells loggers, and keeps curves, never all lines.

    Args:
        path: metrics.jsonl.
        keep_until: lines of later steps, written before a kill, are dropped, so that a resumed run
            leaves the same numbers as an undisturbed one.
        batch_size: samples in a step, over all processes.
        name: of the run, for people; by default the folder's.
        loggers: who else is told; nobody by default.
        warn: hears, once, that the picture cannot be drawn.

    Attributes:
        history: of all lines, those before a resume too.
    """

    def __init__(
        self,
        path: Path,
        *,
        keep_until: int,
        batch_size: int = 1,
        name: str = "",
        loggers: Loggers | None = None,
        warn: Callable[[str], None] | None = None,
    ) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        if not path.exists():
            path.touch()
        self.name = name or path.parent.name
        self.history = History()
        for line in kept_lines(path, keep_until):
            self.history.add(line)
        self._path, self._batch_size, self._loggers = path, batch_size, loggers
        self._unwritten: list[dict[str, Any]] = []
        self._window = _Window(began=time.monotonic())
        self._timing: Mapping[str, float] = {}
        self._asked: float | None = None
        self._waited = 0.0
        self._step_ended = self._drawn_at = time.monotonic()
        self._warn = warn

    @property
    def last_validation(self) -> Mapping[str, float | None]:
        """Per organ, of the last validation; empty before the first."""
        return self.history.last_validation

    @property
    def note(self) -> str:
        """The run in half a line: smoothed loss, throughput, share of time waiting for data."""
        loss, timing = self.history.smooth_loss, self._timing
        if not timing and self._window.steps:
            timing = self._window.timing(self._batch_size)
        parts = [] if loss is None else [f"loss {loss:.3f}"]
        if timing:
            parts.append(f"{timing['samples_per_second']:.3g} samples/s")
            parts.append(f"{timing['data_wait']:.0%} waiting for data")
        return ", ".join(parts)

    @property
    def picture_is_old(self) -> bool:
        """Whether the last picture is so old that a new one costs little beside the steps since."""
        return time.monotonic() - self._drawn_at > SECONDS_BETWEEN_PICTURES

    def picture_drawn(self, failed: str | None = None) -> None:
        """From here on the picture is new; or why it is not."""
        self._drawn_at = time.monotonic()
        if failed is not None and self._warn is not None:
            self._warn(failed)
            self._warn = None

    def batches(self, loader: Iterable[_Batch]) -> Iterator[_Batch]:
        """The loader's batches; how long each takes to come counts as waiting for data."""
        batches = iter(loader)
        while True:
            self._asked = time.monotonic()
            try:
                batch = next(batches)
            except StopIteration:
                return
            self._waited = time.monotonic() - self._asked
            yield batch

    def add(
        self,
        step: int,
        *,
        loss: float,
        terms: Mapping[str, float],
        lr: float,
        gradient_norm: float | None,
    ) -> None:
        """One training step, which took from when its batch was asked for until now; without a
        gradient norm if fp16 overflowed and it was left out.
        """
        line = {
            "step": step,
            "loss": round(loss, 6),
            "terms": {name: round(value, 6) for name, value in terms.items()},
            "lr": lr,
            "gradient_norm": None if gradient_norm is None else round(gradient_norm, 4),
        }
        self._unwritten.append(line)
        self.history.add(line)
        self._step_ended = now = time.monotonic()
        if self._asked is not None:
            self._window.add(now - self._asked, self._waited)
            self._asked = None
        if len(self._unwritten) >= WINDOW_STEPS or now - self._window.began > WINDOW_SECONDS:
            self._write()

    def add_validation(self, step: int, scores: Mapping[str, float | None]) -> None:
        """One validation. It took from the end of the step until now."""
        seconds = round(time.monotonic() - self._step_ended, 3)
        self._write()
        line = {"step": step, "validation_dice": dict(scores), "timing": {"seconds": seconds}}
        self.history.add(line)
        append_lines(self._path, [line])
        known = {organ: dice for organ, dice in scores.items() if dice is not None}
        if known and self._loggers is not None:
            mean = sum(known.values()) / len(known)
            values = {f"dice/{organ}": dice for organ, dice in {**known, "mean": mean}.items()}
            self._loggers.scalars(step, values)

    def flush(self) -> None:
        """All lines are on the disk; after that a checkpoint may say that their steps are made."""
        self._write()
        sync(self._path)

    def _write(self) -> None:
        """Appends the lines of a window, with its timing in the last."""
        lines, window = self._unwritten, self._window
        self._unwritten, self._window = [], _Window(began=time.monotonic())
        if not lines:
            return
        if window.steps:
            self._timing = lines[-1]["timing"] = window.timing(self._batch_size)
            self.history.add_timing(self._timing)
        append_lines(self._path, lines)
        if self._loggers is not None:
            self._loggers.scalars(lines[-1]["step"], _scalars(lines))


@contextmanager
def followed(
    folder: Path,
    settings: Mapping[str, Any],
    *,
    resumed_from: int,
    batch_size: int,
    warn: Callable[[str], None],
    name: str = "",
    loggers: Iterable[RunLogger] = (),
) -> Iterator[Metrics]:
    """The metrics of a run while it trains; what loggers began is finished whatever happens.

    Args:
        folder: of the run.
        settings: nested, for loggers.
        resumed_from: step of the checkpoint; 0 at the start.
        batch_size: samples in a step, over all processes.
        warn: hears of a logger that fails, or of a picture.
        name: of the run, for people; by default the folder's.
        loggers: who is told beside metrics.jsonl.
    """
    others = Loggers(loggers, warn)
    metrics = Metrics(
        folder / "metrics.jsonl",
        keep_until=resumed_from,
        batch_size=batch_size,
        name=name,
        loggers=others,
        warn=warn,
    )
    others.start(LoggedRun(metrics.name, folder, settings, resumed_from))
    well = False
    try:
        yield metrics
        metrics.flush()
        well = True
    finally:
        if not well:
            with suppress(OSError):  # of a full disk: the error on its way says more
                metrics.flush()
        others.finish(folder / "progress.png", well=well)


def _scalars(lines: list[dict[str, Any]]) -> dict[str, float]:
    """Means over a window, for loggers: a point each would be a million files of a long run."""
    last = lines[-1]
    names = {name for line in lines for name in line["terms"]}
    found = {f"loss/{n}": _mean(line["terms"].get(n, 0.0) for line in lines) for n in sorted(names)}
    found["loss/total"] = _mean(line["loss"] for line in lines)
    norms = [line["gradient_norm"] for line in lines if line["gradient_norm"] is not None]
    if norms:
        found["gradient_norm"] = _mean(norms)
    found["lr"] = last["lr"]
    if "timing" in last:
        found["speed/samples_per_second"] = last["timing"]["samples_per_second"]
        found["speed/data_wait"] = last["timing"]["data_wait"]
    return found


def _mean(values: Iterable[float]) -> float:
    found = list(values)
    return sum(found) / len(found)
