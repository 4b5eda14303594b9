"""A training as it is followed: metrics.jsonl, curves, loggers, and half a line for people."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Any, TypeVar

from pipeline.errors import WorkFolderError
from pipeline.figures import save_curves
from pipeline.folder import Folder, writing
from pipeline.log import Log
from pipeline.student.loggers import LoggedRun, Loggers, RunLogger

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
        keep_until: lines of later steps, written before a kill, are dropped, so that a resumed run
            leaves the same numbers as an undisturbed one.
        batch_size: samples in a step, over all processes.
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
        self.name = name or path.parent.name
        self.history = History()
        with writing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            if not path.exists():
                path.touch()
            for line in kept_lines(path, keep_until):
                self.history.add(line)
        self._path, self._batch_size, self._loggers, self._warn = path, batch_size, loggers, warn
        self._unwritten: list[dict[str, Any]] = []
        self._window = _Window(began=time.monotonic())
        self._timing: Mapping[str, float] = {}
        self._asked: float | None = None
        self._waited = 0.0
        self._step_ended = self._drawn_at = time.monotonic()

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

    def draw(self, path: Path, ids: Mapping[str, int] | None = None) -> None:
        """Loss terms, validation Dice and throughput against steps, as a PNG; in the colours of the
        organs' ids. One that cannot be drawn costs a warning, not the training."""
        history = self.history
        try:
            save_curves(
                path,
                {name: curve.points for name, curve in history.terms.items()},
                {organ: curve.points for organ, curve in history.dice.items()},
                samples_per_second=history.samples_per_second.points,
                data_wait=history.data_wait.points,
                ids=ids,
                title=f"{self.name}, step {history.step:,}",
            )
        except Exception as error:  # whatever a drawing library raises, and a full disk
            if self._warn is not None:
                self._warn(f"{path} cannot be drawn ({error}); the training goes on.")
                self._warn = None
        self._drawn_at = time.monotonic()

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
        **told: Any,
    ) -> None:
        """One training step, which took from when its batch was asked for until now; without a
        gradient norm if fp16 overflowed and it was left out. `told` stands in its line as it is.
        """
        line = {
            "step": step,
            "loss": round(loss, 6),
            "terms": {name: round(value, 6) for name, value in terms.items()},
            "lr": lr,
            "gradient_norm": None if gradient_norm is None else round(gradient_norm, 4),
            **told,
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
        self._append([line])
        told = {**scores, "mean": mean_dice(scores)}
        values = {f"dice/{organ}": dice for organ, dice in told.items() if dice is not None}
        if values and self._loggers is not None:
            self._loggers.scalars(step, values)

    def flush(self) -> None:
        """All lines are on the disk; after that a checkpoint may say that their steps are made."""
        self._write()
        with writing(self._path), self._path.open("rb") as file:
            os.fsync(file.fileno())

    def _write(self) -> None:
        """Appends the lines of a window, with its timing in the last."""
        lines, window = self._unwritten, self._window
        self._unwritten, self._window = [], _Window(began=time.monotonic())
        if not lines:
            return
        if window.steps:
            self._timing = lines[-1]["timing"] = window.timing(self._batch_size)
            self.history.add_timing(self._timing)
        self._append(lines)
        if self._loggers is not None:
            self._loggers.scalars(lines[-1]["step"], _scalars(lines))

    def _append(self, lines: Iterable[Mapping[str, Any]]) -> None:
        """In one write; a line that a full disk cuts short goes with the next resume."""
        text = "".join(json.dumps(line) + "\n" for line in lines)
        with writing(self._path), self._path.open("a", encoding="utf-8") as file:
            file.write(text)


@contextmanager
def followed(
    run: LoggedRun, batch_size: int, warn: Callable[[str], None], loggers: Iterable[RunLogger] = ()
) -> Iterator[Metrics]:
    """The metrics of a run while it trains; what loggers began is finished whatever happens."""
    others = Loggers(loggers, warn)
    metrics = Metrics(
        run.folder / "metrics.jsonl", keep_until=run.resumed_from, batch_size=batch_size,
        name=run.name, loggers=others, warn=warn,
    )  # fmt: skip
    others.start(run)
    well = False
    try:
        yield metrics
        metrics.flush()
        well = True
    finally:
        if not well:
            with suppress(WorkFolderError):  # of a full disk: the error on its way says more
                metrics.flush()
        others.finish(run.folder / "progress.png", well=well)


def mean_dice(scores: Mapping[str, float | None]) -> float | None:
    """Over the organs that have a score; None if none has."""
    found = [score for score in scores.values() if score is not None]
    return sum(found) / len(found) if found else None


def _scalars(lines: list[dict[str, Any]]) -> dict[str, float]:
    """Means over a window, for loggers: a point each would be a million files of a long run."""
    last = lines[-1]
    names = {name for line in lines for name in line["terms"]}
    found = {f"loss/{n}": fmean(line["terms"].get(n, 0.0) for line in lines) for n in sorted(names)}
    for line in lines:
        for organ, share in line.get("believed", {}).items():
            if share is not None:
                found[f"believed/{organ}"] = share
    found["loss/total"] = fmean(line["loss"] for line in lines)
    norms = [line["gradient_norm"] for line in lines if line["gradient_norm"] is not None]
    if norms:
        found["gradient_norm"] = fmean(norms)
    found["lr"] = last["lr"]
    speed = {k: v for k, v in last.get("timing", {}).items() if k not in ("steps", "seconds")}
    return found | {f"speed/{name}": value for name, value in speed.items()}


# What a training has been like, in little memory however long it is.

_SMOOTHING = 0.95
CAPACITY = 1000


class Curve:
    """A series as at most `CAPACITY` points, each the mean of equally many values.

    When it is full, neighbours are merged. What it holds depends on the values alone, so a run that
    was resumed has the same curve.
    """

    def __init__(self) -> None:
        self._bins: list[tuple[float, float]] = []
        self._width = 1
        self._open: list[tuple[float, float]] = []

    def add(self, step: int, value: float) -> None:
        """The next value; steps grow."""
        self._open.append((step, value))
        if len(self._open) < self._width:
            return
        self._bins.append(_mean_point(self._open))
        self._open = []
        if len(self._bins) == CAPACITY:
            pairs = zip(self._bins[::2], self._bins[1::2], strict=True)
            self._bins = [_mean_point(pair) for pair in pairs]
            self._width *= 2

    @property
    def points(self) -> list[tuple[float, float]]:
        """(step, value); the last may stand for fewer values than the others."""
        return [*self._bins, _mean_point(self._open)] if self._open else list(self._bins)


@dataclass
class Scores:
    """An organ's validation Dice as (step, Dice)."""

    first: tuple[int, float]
    best: tuple[int, float]
    last: tuple[int, float]

    def add(self, step: int, dice: float) -> None:
        """The next validation; the earlier of two that are equally good counts as the best."""
        self.last = (step, dice)
        if dice > self.best[1]:
            self.best = self.last


@dataclass
class History:
    """Lines of metrics.jsonl, one after the other, as curves and scores.

    Attributes:
        step: of the last line; 0 before the first.
        smooth_loss: a running mean over about 20 steps.
        terms: curve of each weighted loss term; `total` is their sum.
        data_wait: curve of the share of the time in which the loop waited for the loader, 0 to 1.
        scores: first, best and last validation of each organ, and of the mean over organs.
        last_validation: as it stands in the last line of a validation; empty before the first.
    """

    step: int = 0
    smooth_loss: float | None = None
    terms: dict[str, Curve] = field(default_factory=dict)
    dice: dict[str, Curve] = field(default_factory=dict)
    samples_per_second: Curve = field(default_factory=Curve)
    data_wait: Curve = field(default_factory=Curve)
    scores: dict[str, Scores] = field(default_factory=dict)
    last_validation: dict[str, float | None] = field(default_factory=dict)

    def add(self, line: Mapping[str, Any]) -> None:
        """One line of metrics.jsonl, parsed."""
        self.step = int(line["step"])
        if "validation_dice" in line:
            self._add_validation(line["validation_dice"])
        if "loss" not in line:
            return
        loss = float(line["loss"])
        before = loss if self.smooth_loss is None else self.smooth_loss
        self.smooth_loss = _SMOOTHING * before + (1 - _SMOOTHING) * loss
        for name, value in {"total": loss, **line["terms"]}.items():
            self.terms.setdefault(name, Curve()).add(self.step, value)
        if "timing" in line:
            self.add_timing(line["timing"])

    def add_timing(self, timing: Mapping[str, float]) -> None:
        """Of a window of steps that ends with the last line."""
        self.samples_per_second.add(self.step, timing["samples_per_second"])
        self.data_wait.add(self.step, timing["data_wait"])

    def _add_validation(self, scores: Mapping[str, float | None]) -> None:
        self.last_validation = dict(scores)
        for organ, dice in scores.items():
            if dice is not None:
                self.dice.setdefault(organ, Curve()).add(self.step, dice)
                self._score(organ, dice)
        if (mean := mean_dice(scores)) is not None:
            self._score("mean", mean)

    def _score(self, name: str, dice: float) -> None:
        now = (self.step, dice)
        self.scores.setdefault(name, Scores(now, now, now)).add(*now)


def _mean_point(points: Any) -> tuple[float, float]:
    steps, values = zip(*points, strict=True)
    return sum(steps) / len(steps), sum(values) / len(values)


# The file metrics.jsonl: one JSON object a line, in the order of the steps.
#
# A line of a step: `step`, `loss`, `terms` (weighted, they sum to the loss), `lr`, `gradient_norm`,
# and now and then `believed` (organ -> share of a teacher's voxels that count, `agree_after`).
# A line of a validation: `step`, `validation_dice`. All of that is the same in every run with the
# same settings, interrupted or not. What a clock measured stands under one further key, `timing`:
# in lines of steps once per window of some steps (`steps`, `seconds`, `data_wait`,
# `samples_per_second`), in lines of validations `seconds`.


def metric_lines(path: Path) -> Iterator[dict[str, Any]]:
    """Lines of a file one after the other, up to one that a kill cut short."""
    with path.open("rb") as file:
        for text in file:
            if (line := parsed(text)) is None:
                return
            yield line


def without_timing(lines: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Lines as far as they are the same in every run with the same settings."""
    return [{key: value for key, value in line.items() if key != "timing"} for line in lines]


def kept_lines(path: Path, keep_until: int) -> Iterator[dict[str, Any]]:
    """Lines up to a step; once all are taken, the file ends with them.

    It is cut, not written anew: a kill costs no line that is kept, and one line at a time is in
    memory.
    """
    end, last = 0, b"\n"
    with path.open("rb") as file:
        for text in file:
            line = parsed(text)
            if line is None or line["step"] > keep_until:
                break
            end, last = end + len(text), text
            yield line
    if end < path.stat().st_size:
        os.truncate(path, end)
    if not last.endswith(b"\n"):
        with path.open("ab") as file:
            file.write(b"\n")


def parsed(text: bytes) -> dict[str, Any] | None:
    """A line; None for one that a kill cut short, or that is none."""
    try:
        line = json.loads(text)
    except ValueError:
        return None
    return line if isinstance(line, dict) and isinstance(line.get("step"), int) else None


def show_validations(log: Log, metrics: Path, where: Folder) -> None:
    """A table of first, best and last validation Dice per organ, and where the run's files are:
    `where` as the user knows it."""
    if log.quiet:
        return
    history = History()
    for line in metric_lines(metrics):
        history.add(line)
    columns, rows = _table(history)
    if rows:
        log.table(f"{where.name}: validation Dice", columns, rows)
    log.info(f"{where}: progress.png, metrics.jsonl, checkpoints/")


def _table(history: History) -> tuple[list[str], list[list[str]]]:
    """First, best and last; a single validation is all three."""
    if not history.scores:
        return [], []
    organs = list(history.last_validation)
    first = min(scores.first[0] for scores in history.scores.values())
    columns = ["organ", f"step {first}"]
    if first != history.step:
        last = f"last (step {history.step})"
        columns = ["organ", f"first (step {first})", "best", "at step", last]
    rows = []
    for name in organs if len(organs) == 1 else [*organs, "mean"]:
        cells = ["-"] * 4
        if (found := history.scores.get(name)) is not None:
            at, best = found.best
            cells = [f"{found.first[1]:.3f}", f"{best:.3f}", str(at), f"{found.last[1]:.3f}"]
        rows.append([name, *cells][: len(columns)])
    return columns, rows
