"""What a training reads, where order and a run that never began must not matter."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipeline.cache.reader import Unit
from pipeline.data.registry import load_registry
from pipeline.errors import CheckpointError
from pipeline.log import Log
from pipeline.student.inputs import cached_taps, check_same_units, open_inputs
from pipeline.student.sampling import Sampler, SamplingConfig
from pipeline.student.settings import SupervisionConfig
from tests.tiny import work_of
from tests.unit.student.coded import SPACE, TAP, write_case

FULL: dict[str, Any] = {"cases": {"a/b": "1"}, "teachers": {"one": "2"}}
PARTIAL = FULL | {"missing_units": {"one": ["a/b"]}}


def test_the_order_of_teachers_in_the_registry_is_not_that_of_adapters(tmp_path: Path) -> None:
    case = write_case(tmp_path, "liver-ct/a")
    tapped, experts = case.teachers["one"], {"liver": ["a", "b"], "spleen": []}
    case = replace(case, teachers={"a": tapped, "b": tapped}, experts=experts)
    turned = replace(case, teachers={"b": tapped, "a": tapped})
    there, here = (list(cached_taps([one], SPACE)) for one in (case, turned))
    assert there == here
    assert len(here) == 2


def test_moments_of_a_tap_are_those_over_all_training_cases(tmp_path: Path) -> None:
    cases = [
        write_case(tmp_path, "liver-ct/a"),
        write_case(tmp_path, "liver-ct/b", shape=(30, 10, 10)),
    ]
    whole = np.concatenate([c.features(*TAP).reshape(2, -1) for c in cases], axis=1).astype(float)
    found = cached_taps(cases, SPACE)[TAP]
    np.testing.assert_allclose(found.mean, whole.mean(axis=1), rtol=1e-5)
    np.testing.assert_allclose(found.std, whole.std(axis=1), rtol=1e-5)


def test_every_unit_says_what_it_holds_once_and_is_not_kept_open(
    built_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Taps, reliability and the sampler ask the same units, of several organs each."""
    asked: list[Path] = []
    real = Unit._metadata

    def counted(self: Unit, name: str) -> dict[str, Any]:
        assert name == "zarr.json", "an array was opened"
        asked.append(Path(str(self.path)))
        return real(self, name)

    monkeypatch.setattr(Unit, "_metadata", counted)
    registry = load_registry(built_cache, files=False)
    supervision = SupervisionConfig.model_validate({"features": {"student_taps": "bottleneck"}})
    found = open_inputs(
        supervision, registry, work_of(built_cache), allow_missing=False, log=Log(quiet=True)
    )
    organs = registry.label_space.organs
    sampler = Sampler(found.training, organs, SamplingConfig(), use_teachers=True)
    assert sampler.remarks((2, 2, 2)) == []
    assert found.taps
    units = {unit.path for case in found.training for unit in (case.case, *case.teachers.values())}
    labels = {case.case.path for case in found.validation}
    assert len(units) > 6
    assert sorted(asked) == sorted(units | labels)
    kept = [unit for case in found.training for unit in (case.case, *case.teachers.values())]
    assert not any("_store" in vars(unit) or "centres" in unit.noted for unit in kept)


class TestSameUnits:
    @staticmethod
    def begun(folder: Path, identity: dict[str, Any], *, steps: int) -> Path:
        (folder / "checkpoints").mkdir()
        if steps:
            (folder / "checkpoints" / f"step_{steps:08d}.pt").touch()
        (folder / "config.json").write_text(json.dumps({"inputs": identity}))
        return folder

    def test_a_run_that_made_no_step_may_begin_with_what_is_there_now(self, tmp_path: Path) -> None:
        check_same_units(self.begun(tmp_path, PARTIAL, steps=0), FULL)

    @pytest.mark.parametrize(
        ("then", "now", "says"),
        [(PARTIAL, FULL, "has by now"), (FULL, PARTIAL, "no longer has")],
    )
    def test_one_that_did_is_refused(
        self, tmp_path: Path, then: dict[str, Any], now: dict[str, Any], says: str
    ) -> None:
        folder = self.begun(tmp_path, then, steps=3)
        with pytest.raises(CheckpointError, match=says):
            check_same_units(folder, now)
        check_same_units(folder, then)
