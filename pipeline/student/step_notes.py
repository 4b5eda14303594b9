"""What a training was after each of its steps, by digest, and where two trainings first differ."""

from __future__ import annotations

import hashlib
import json
import statistics
import time
from collections.abc import Iterator, Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

from pipeline.cache.store import write_json
from pipeline.sealed_file import load_sealed
from pipeline.student.checkpoint import training_checkpoints

WALL_CLOCK = "timing"  # the key of a line of metrics.jsonl that may differ


def note_step(folder: Path) -> int:
    """Digests of the newest checkpoint of a run, beside it; returns its step."""
    state = load_sealed(training_checkpoints(folder / "checkpoints")[-1])
    note = {"time": time.time(), "digests": dict(state_digests(state))}
    write_json(folder / "notes" / f"{state['step']:08d}.json", note)
    return int(state["step"])


def state_digests(state: Any, name: str = "") -> Iterator[tuple[str, str]]:
    """Name and SHA-256 of every tensor, however deep; of other values name and text."""
    if isinstance(state, torch.Tensor):
        flat = state.detach().cpu().contiguous().reshape(-1)
        digest = hashlib.sha256(flat.view(torch.uint8).numpy().tobytes()).hexdigest()
        yield name, f"{state.dtype} {tuple(state.shape)} {digest}"
    elif isinstance(state, Mapping):
        for key, value in state.items():
            yield from state_digests(value, f"{name}.{key}".lstrip("."))
    elif isinstance(state, (list, tuple)):
        for number, value in enumerate(state):
            yield from state_digests(value, f"{name}[{number}]")
    else:
        yield name, repr(state)


def steps_of_checkpoints(folder: Path) -> list[int]:
    """Of those that are kept."""
    paths = training_checkpoints(folder / "checkpoints")
    return [int(path.stem.removeprefix("step_")) for path in paths]


def notes_of(folder: Path) -> dict[int, Mapping[str, Any]]:
    """Step -> `time` and `digests` of its checkpoint."""
    paths = sorted(folder.glob("notes/*.json"))
    return {int(path.stem): json.loads(path.read_text(encoding="utf-8")) for path in paths}


def first_difference(straight: Path, notes: Mapping[int, Mapping[str, Any]]) -> str:
    """The first step, and the first tensor there, in which notes differ from those of a run that
    nothing disturbed; empty if all is equal.
    """
    expected = notes_of(straight)
    for step, note in sorted(notes.items()):
        ours, theirs = note["digests"], expected[step]["digests"]
        for name in {**theirs, **ours}:
            if ours.get(name) != theirs.get(name):
                return f"{name} after step {step}"
    return ""


def metrics_difference(straight: Path, killed: Path) -> str:
    """The first line of metrics.jsonl that differs but for its times; empty if none does."""
    ours, theirs = _lines(killed), _lines(straight)
    for number, (one, other) in enumerate(zip(ours, theirs, strict=False), start=1):
        if one != other:
            return f"metrics.jsonl, line {number}"
    return "" if len(ours) == len(theirs) else "the number of lines in metrics.jsonl"


def _lines(folder: Path) -> list[Mapping[str, Any]]:
    text = (folder / "metrics.jsonl").read_text(encoding="utf-8")
    lines = [json.loads(line) for line in text.splitlines()]
    return [{key: line[key] for key in line if key != WALL_CLOCK} for line in lines]


def seconds_per_step(straight: Path) -> float:
    """Median over a training that nothing disturbed."""
    times = [note["time"] for _, note in sorted(notes_of(straight).items())]
    return float(statistics.median(b - a for a, b in pairwise(times)))
