"""What may not change when code is moved: digests, stored bytes, losses, scores, words of `--help`.

`golden.json` holds them. After a change that is meant, `GOLDEN=write python -m pytest
tests/test_golden.py` writes it anew; look at its diff. Stored bytes follow from the libraries and
the processor too: they are compared where both are those that the file was written with.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from importlib.metadata import version
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import torch
import typer.main
from typer.testing import CliRunner

from pipeline.cli.app import app
from pipeline.student.settings import Kind
from tests.stages.test_evaluate import perfect, summary_of, without, write_prediction
from tests.stages.test_evaluate import run as evaluate
from tests.stages.test_train_student import run as train
from tests.stages.test_train_student import run_folder
from tests.tiny import placeless_entry, work_of
from tests.unit.student.fixed import config, terms_of
from tests.unit.student.terms import TERMS, RandomBatch, all_terms
from website.command_reference import walk

__all__ = ["perfect"]  # a fixture

GOLDEN = Path(__file__).with_name("golden.json")


def same(name: str, found: Any) -> None:
    """Holds a value against the golden one, or writes it."""
    golden = json.loads(GOLDEN.read_text(encoding="utf-8")) if GOLDEN.exists() else {}
    if os.environ.get("GOLDEN") == "write":
        golden[name] = found
        text = json.dumps(golden, indent=1, sort_keys=True, ensure_ascii=False)
        GOLDEN.write_text(text + "\n", encoding="utf-8")
        return
    assert_same(name, found, golden[name])


def assert_same(where: str, found: Any, expected: Any) -> None:
    """Numbers to a millionth, all else as it is; the assertion says where."""
    if isinstance(expected, dict):
        assert sorted(found) == sorted(expected), where
        for key in expected:
            assert_same(f"{where}: {key}", found[key], expected[key])
    elif isinstance(expected, float):
        assert found == pytest.approx(expected, rel=1e-6, abs=1e-9, nan_ok=True), where
    elif isinstance(expected, list) and len(expected) == len(found):
        for number, (one, other) in enumerate(zip(found, expected, strict=True)):
            assert_same(f"{where}[{number}]", one, other)
    else:
        assert found == expected, where


def made_with() -> dict[str, str]:
    """What stored bytes follow from beside this project's code."""
    names = ("numcodecs", "numpy", "scipy", "torch", "zarr")
    cpu = torch.backends.cpu.get_cpu_capability()
    return {"cpu": cpu, **{name: version(name) for name in names}}


@pytest.fixture
def same_bytes() -> None:
    """Bytes, and so digests, of synthetic CTs and of what networks say of them."""
    if os.environ.get("GOLDEN") == "write":
        same("made with", made_with())
    elif json.loads(GOLDEN.read_text(encoding="utf-8"))["made with"] != made_with():
        pytest.skip("other libraries or another processor than those of golden.json")


@pytest.mark.usefixtures("same_bytes")
def test_the_units_of_the_cache_have_the_same_digests(built_cache: Path) -> None:
    """They are in the units' names."""
    work = work_of(built_cache)
    same("units", sorted(p.relative_to(work).as_posix() for p in work.rglob("*@*.zarr")))


@pytest.mark.usefixtures("same_bytes")
def test_the_cache_holds_the_same_bytes(built_cache: Path) -> None:
    work = work_of(built_cache)
    found = {p.parent.relative_to(work).as_posix(): _sums(p) for p in work.rglob("receipt.json")}
    for path in sorted((work / "index").rglob("*.json")):
        text = json.dumps(placeless_entry(path), sort_keys=True)
        found[path.relative_to(work).as_posix()] = hashlib.sha256(text.encode()).hexdigest()
    same("bytes", found)


def _sums(receipt: Path) -> str:
    """What a receipt says, SHA-256 of each object of its unit in it, but for when it was made."""
    content = json.loads(receipt.read_text(encoding="utf-8"))
    for key in ("seconds", "written", "seal"):
        del content[key]
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


@pytest.mark.usefixtures("same_bytes")
def test_a_training_has_the_same_digest(tiny_cached: Path) -> None:
    train(tiny_cached)
    finished = json.loads((run_folder(tiny_cached) / "finished.json").read_text())
    same("run", finished)


def test_the_losses_have_the_same_values() -> None:
    kinds = {kind: dict(terms_of(config(kind))) for kind in get_args(Kind)}
    batch = RandomBatch(7, silent=0.2)
    terms = {name: float(all_terms(batch)[name](batch.logits)) for name in TERMS}
    same("losses", {"kinds": kinds, "terms": terms})


def test_the_scores_of_predictions_are_the_same(perfect: Path) -> None:
    write_prediction(perfect, "multi-ct/case_001", without(2))
    write_prediction(perfect, "multi-ct/case_002", lambda array: np.roll(array, 1, axis=0))
    evaluate(perfect)
    text = json.dumps(summary_of(perfect)).replace(str(perfect.parent), "")
    same("summary.json", json.loads(text))


def test_the_help_of_every_command_says_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its words line by line, without frames."""
    monkeypatch.setenv("COLUMNS", "100")
    monkeypatch.setenv("TERM", "dumb")
    names = ["", *(name for name, _ in walk(typer.main.get_command(app), ""))]
    found = {}
    for name in names:
        result = CliRunner().invoke(app, [*name.split(), "--help"], prog_name="pipeline")
        assert result.exit_code == 0, result.output
        lines = (" ".join(re.sub("[─-╿]", " ", x).split()) for x in result.output.splitlines())
        found[f"pipeline {name}".strip()] = [line for line in lines if line]
    same("help", found)
