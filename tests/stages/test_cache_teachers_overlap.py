"""Stage one overlaps its steps: the same numbers, the same report, and a prompt end."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_pre_hook

from pipeline.cache.index import read_dataset_index
from pipeline.consensus import evidence
from pipeline.data.nifti import read_image
from pipeline.data.registry import load_registry
from pipeline.errors import TeacherError
from pipeline.teachers import units
from tests.stages import test_cache_teachers as stage
from tests.stages.stage_contract import content
from tests.stages.test_cache_teachers import quiet_run, run, units_of
from tests.tiny import ROOT, cache_config, copy_cohort, work_of


def test_overlapped_or_in_turn_is_the_same(tiny_registry: Path, tmp_path: Path) -> None:
    other = copy_cohort(tiny_registry, tmp_path / "other")
    bad = tiny_registry.parent / "data" / "liver-ct" / "images" / "case_001.nii.gz"
    bad.write_bytes(bad.read_bytes()[:1000])
    (other.parent / "data" / "liver-ct" / "images" / "case_001.nii.gz").write_bytes(
        bad.read_bytes()
    )
    reports = [
        quiet_run(cache_config(), load_registry(path), work_of(path), overlap=overlap)
        for path, overlap in ((tiny_registry, True), (other, False))
    ]
    assert reports[0].done == reports[1].done
    assert list(reports[0].failed) == list(reports[1].failed) == ["liver-ct/case_001"]
    assert reports[0].skipped == reports[1].skipped == []
    ignored = ["reports/*", "*/receipt.json"]
    first, second = (content(work_of(path), without=ignored) for path in (tiny_registry, other))
    assert first == second
    assert len(units_of(work_of(other))) == len(reports[1].done)


def test_a_ct_is_read_once_for_all_teachers(
    tiny_registry: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[str] = []

    def spy(path: Path) -> Any:
        seen.append(str(path))
        return read_image(path)

    monkeypatch.setattr(units, "read_image", spy)
    assert run(tiny_registry).exit_code == 0
    times = Counter(seen)
    assert len(times) == 9
    # The cases of the admission gate are read again where teachers are left that it did not ask.
    registry = load_registry(tiny_registry)
    work = work_of(tiny_registry)
    keys = {dataset: registry.dataset_key(dataset) for dataset in registry.datasets}
    cases = [case for dataset in keys for case in read_dataset_index(work, dataset, keys[dataset])]
    gate = {case for _, case in evidence.units_of(evidence.plan_gate_cases(registry, cases))}
    twice = {f"{Path(p).parents[1].name}/{Path(p).name[:8]}" for p, n in times.items() if n == 2}
    assert twice <= gate
    assert max(times.values()) <= 2


def test_out_of_memory_names_the_case_and_what_to_set(tiny_registry: Path) -> None:
    too_much = [MemoryError()]

    def forward(network: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        """The first window of a CT; loading a network tries it without one."""
        if too_much and inputs[0].device.type == "cpu" and inputs[0].any():
            raise too_much.pop()

    hook = register_module_forward_pre_hook(forward)
    try:
        report = run(tiny_registry)
    finally:
        hook.remove()
    (unit,) = report.failed
    error = report.failed[unit]
    assert isinstance(error, TeacherError)
    assert unit in str(error)
    assert "out of memory" in str(error)
    assert "window.shape" in error.fix
    assert len(report.done) == 26


_SLOW = """
import signal, sys, time
from pipeline.teachers import units
signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job begins without it
real, calls = units.compute_unit, []
def slow(*args):
    calls.append(1)
    if len(calls) == 5:
        print("working", flush=True)
        time.sleep(60)
    return real(*args)
units.compute_unit = slow
from pipeline.cli import main
sys.argv = ["pipeline", *sys.argv[1:]]
main()
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_it_promptly_and_loses_only_what_was_in_flight(
    tiny_registry: Path, number: int
) -> None:
    command = stage.TestCacheTeachers().command(tiny_registry)
    with subprocess.Popen(
        [sys.executable, "-c", _SLOW, *command],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "working\n"
        process.send_signal(number)
        process.communicate(timeout=30)  # half of what the unit at work would have taken
        assert process.returncode != 0
    there = [path for path in units_of(work_of(tiny_registry)) if path.parts[-3] != "cases"]
    # Four were computed: three are stored, the fourth may have been in flight.
    assert len(there) in (3, 4)
    report = run(tiny_registry)
    assert report.exit_code == 0
    assert len(report.skipped) == 9 + len(there)
    assert not list(work_of(tiny_registry).rglob(".*"))
