"""What a training has been like, in little memory however long it is."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

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
        self._bins.append(_mean(self._open))
        self._open = []
        if len(self._bins) == CAPACITY:
            pairs = zip(self._bins[::2], self._bins[1::2], strict=True)
            self._bins = [_mean(pair) for pair in pairs]
            self._width *= 2

    @property
    def points(self) -> list[tuple[float, float]]:
        """(step, value); the last may stand for fewer values than the others."""
        return [*self._bins, _mean(self._open)] if self._open else list(self._bins)


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
        dice: curve of each organ's validation Dice.
        samples_per_second: curve.
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
        known = {organ: dice for organ, dice in scores.items() if dice is not None}
        for organ, dice in known.items():
            self.dice.setdefault(organ, Curve()).add(self.step, dice)
            self._score(organ, dice)
        if known:
            self._score("mean", sum(known.values()) / len(known))

    def _score(self, name: str, dice: float) -> None:
        now = (self.step, dice)
        self.scores.setdefault(name, Scores(now, now, now)).add(*now)


def _mean(points: Any) -> tuple[float, float]:
    steps, values = zip(*points, strict=True)
    return sum(steps) / len(steps), sum(values) / len(values)
