"""metrics.jsonl, one line a step, and the picture of it that a person understands."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pipeline.figures import save_curves

_SMOOTHING = 0.95


class Metrics:
    """Collects lines and appends them to a file.

    Args:
        path: metrics.jsonl.
        keep_until: lines of later steps, written before a kill, are dropped, so that a resumed run
            leaves the same file as an undisturbed one.
    """

    def __init__(self, path: Path, *, keep_until: int) -> None:
        self._path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        self.lines = [line for line in _read(path) if line["step"] <= keep_until]
        text = "".join(json.dumps(line) + "\n" for line in self.lines)
        if not path.exists() or path.read_text(encoding="utf-8") != text:
            _replace(path, text)
        self._written = len(self.lines)
        self.smooth_loss = 0.0
        for line in self.lines:
            self._smooth(line)

    @property
    def last_validation(self) -> Mapping[str, float | None]:
        """Per organ, of the last validation; empty before the first."""
        found = [line["validation_dice"] for line in self.lines if "validation_dice" in line]
        return found[-1] if found else {}

    def add(
        self,
        step: int,
        *,
        loss: float,
        terms: Mapping[str, float],
        lr: float,
        gradient_norm: float | None,
    ) -> None:
        """One training step; without a gradient norm if fp16 overflowed and it was left out."""
        line = {
            "step": step,
            "loss": round(loss, 6),
            "terms": {name: round(value, 6) for name, value in terms.items()},
            "lr": lr,
            "gradient_norm": None if gradient_norm is None else round(gradient_norm, 4),
        }
        self.lines.append(line)
        self._smooth(line)
        if len(self.lines) - self._written >= 50:
            self.flush()

    def add_validation(self, step: int, scores: Mapping[str, float | None]) -> None:
        """One validation."""
        self.lines.append({"step": step, "validation_dice": dict(scores)})
        self.flush()

    def flush(self) -> None:
        """Appends what is new to the file."""
        with self._path.open("a", encoding="utf-8") as file:
            for line in self.lines[self._written :]:
                file.write(json.dumps(line) + "\n")
        self._written = len(self.lines)

    def _smooth(self, line: Mapping[str, Any]) -> None:
        if "loss" in line:
            first = self.smooth_loss == 0.0
            keep = 0.0 if first else _SMOOTHING
            self.smooth_loss = keep * self.smooth_loss + (1 - keep) * float(line["loss"])


def draw_progress(path: Path, metrics: Metrics) -> None:
    """Loss terms and validation Dice against steps, as a PNG."""
    terms: dict[str, list[tuple[int, float]]] = {}
    dice: dict[str, list[tuple[int, float]]] = {}
    for line in metrics.lines:
        for name, value in line.get("terms", {}).items():
            terms.setdefault(name, []).append((line["step"], value))
        for organ, score in line.get("validation_dice", {}).items():
            if score is not None:
                dice.setdefault(organ, []).append((line["step"], score))
    save_curves(path, terms, dice)


def _replace(path: Path, text: str) -> None:
    """Whole or not at all: a kill here must not cost the lines of the steps that are kept."""
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)


def _read(path: Path) -> list[dict[str, Any]]:
    if not path.exists():
        return []
    lines = []
    for text in path.read_text(encoding="utf-8").splitlines():
        try:
            lines.append(json.loads(text))
        except ValueError:  # the line that a kill cut short; its step is made again
            break
    return lines
