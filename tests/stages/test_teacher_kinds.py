"""Bundles and exported networks on the whole road: cached, read back, nothing done twice."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from pipeline.cache.reader import CachedCase
from pipeline.consensus.cohort import open_cohort
from pipeline.data.labels import log_odds
from pipeline.data.nifti import read_image
from pipeline.data.patches import WindowConfig
from pipeline.data.registry import load_registry
from pipeline.data.resample import resample
from pipeline.data.volume import Volume
from pipeline.errors import OutputsError, TeacherError
from pipeline.review.status import status
from pipeline.teachers.load import load_teacher
from stages.report import StageReport
from tests.stages.stage_contract import snapshot
from tests.stages.test_cache_teachers import quiet_run
from tests.stages.test_cache_teachers_input import FACTORIES, factory, keep
from tests.tiny import WINDOW, cache_config, change_registry, teacher_data, work_of
from tests.unit.teachers.made_bundles import TAP, seeded_network, transform, write_bundle

ORGANS = {"liver": 1, "spleen": 2}


def coarse(config: dict[str, Any]) -> None:
    """The bundle's own spacing is about the tiny cohort's."""
    transform(config, "Spacingd")["pixdim"] = [11, 11, 13]


def bundle(registry: Path) -> dict[str, Any]:
    write_bundle(registry.parent / "teachers" / "zoo", coarse)
    return {"kind": "monai-bundle", "weights": "teachers/zoo", "organs": ORGANS, "taps": [TAP]}


def exported(registry: Path) -> dict[str, Any]:
    torch.jit.script(seeded_network()).save(str(registry.parent / "teachers" / "net.ts"))
    return {
        "kind": "exported",
        "weights": "teachers/net.ts",
        "organs": ORGANS,
        "orientation": "RAS",
        "spacing_mm": [13, 11, 11],
        "intensity": {"kind": "window", "window_hu": [-57, 164], "scaled_to": [0, 1]},
    }


def with_softmax(registry: Path, entry: dict[str, Any]) -> dict[str, Any]:
    """A teacher whose network ends in softmax, and else says the same."""
    teachers = registry.parent / "teachers"
    if entry["kind"] == "exported":
        network = nn.Sequential(seeded_network(), nn.Softmax(dim=1))
        torch.jit.script(network).save(str(teachers / "soft.ts"))
        return {**entry, "weights": "teachers/soft.ts"}
    if entry["kind"] == "monai-bundle":  # under `--trust`

        def change(config: dict[str, Any]) -> None:
            coarse(config)
            del config["imports"]
            config["unet"] = config["network_def"]
            config["network_def"] = "$torch.nn.Sequential(@unet, torch.nn.Softmax(dim=1))"

        folder = write_bundle(teachers / "soft", change)
        state = torch.load(folder / "models" / "model.pt")
        state = {f"0.{name}": tensor for name, tensor in state.items()}
        torch.save(state, folder / "models" / "model.pt")
        return {**entry, "weights": "teachers/soft", "taps": [f"0.{TAP}"]}
    return {**entry, "factory": f"{FACTORIES}:sure"}


def own_code(registry: Path) -> dict[str, Any]:
    return factory("threshold")


def run(registry: Path) -> StageReport:
    return quiet_run(cache_config(), load_registry(registry), work_of(registry))


def cached(registry: Path) -> list[CachedCase]:
    loaded = load_registry(registry)
    cohort = open_cohort(work_of(registry), loaded, teachers=list(loaded.teachers))
    assert not cohort.problems
    return list(cohort.cases)


@pytest.mark.parametrize("kind", [bundle, exported])
def test_cached_read_back_and_left_alone(tiny_registry: Path, kind: Any) -> None:
    entry = kind(tiny_registry)
    keep(tiny_registry, "liver-ct", mine=entry)
    report = run(tiny_registry)
    assert not report.failed
    assert sum(unit.startswith("mine x ") for unit in report.done) == 3
    before = snapshot(work_of(tiny_registry) / "teachers")
    assert run(tiny_registry).done == []
    assert snapshot(work_of(tiny_registry) / "teachers") == before
    registry = load_registry(tiny_registry)
    assert all(state == "done" for state in status(registry, work_of(tiny_registry)).units.values())
    teacher = load_teacher(
        "mine", registry.teachers["mine"], registry.resolve(entry["weights"]),
        window=WindowConfig(shape=WINDOW, overlap=0.25), batch_size=1, device=torch.device("cpu"),
    )  # fmt: skip
    sources = {source.name: source for source in registry.cases("liver-ct")}
    for case in cached(tiny_registry):
        native = read_image(sources[case.name].image).volume
        grid = native.grid.with_spacing(registry.grid.spacing_mm)
        image = native
        if teacher.spacing_mm is not None:
            image = resample(native, native.grid.with_spacing(teacher.spacing_mm), order=1)
        logits = teacher.predict(image).logits
        for organ, channel in ORGANS.items():
            said = Volume(log_odds(logits.array, [channel], "softmax"), logits.grid)
            expected = resample(said, grid, order=1, outside=np.nan).array
            found = np.asarray(case.log_odds("mine", organ), dtype=np.float32)
            np.testing.assert_array_equal(np.isnan(found), np.isnan(expected))
            np.testing.assert_allclose(found, expected, rtol=2**-5, atol=1e-4)
            seen = ~np.isnan(expected)
            np.testing.assert_array_equal(found[seen] > 0, expected[seen] > 0)


def test_a_changed_bundle_is_stale_and_made_anew(tiny_registry: Path) -> None:
    keep(tiny_registry, "liver-ct", mine=bundle(tiny_registry))
    run(tiny_registry)
    weights = tiny_registry.parent / "teachers" / "zoo" / "models" / "model.pt"
    torch.save(seeded_network(5).state_dict(), weights)
    states = status(load_registry(tiny_registry), work_of(tiny_registry)).units
    assert {state for (_, what, _), state in states.items() if what == "mine"} == {"stale"}
    assert len(run(tiny_registry).done) == 3


def test_trust_enters_no_digest(tiny_registry: Path) -> None:
    keep(tiny_registry, "liver-ct", mine=bundle(tiny_registry))
    run(tiny_registry)
    trusted = load_registry(tiny_registry).trusting(["mine"])
    assert quiet_run(cache_config(), trusted, work_of(tiny_registry)).done == []


def test_no_registry_can_claim_trust(tiny_registry: Path) -> None:
    entry = bundle(tiny_registry)
    config = tiny_registry.parent / "teachers" / "zoo" / "configs" / "inference.json"
    data = json.loads(config.read_text())
    data["network_def"]["dropout"] = "$min(0.0, 1.0)"
    config.write_text(json.dumps(data))
    keep(tiny_registry, "liver-ct", mine=entry)
    with pytest.raises(TeacherError, match="would run code"):
        run(tiny_registry)
    registry = load_registry(tiny_registry).trusting(["mine"])
    assert not quiet_run(cache_config(), registry, work_of(tiny_registry)).failed
    for name in ("trust", "trusted", "_trusted"):
        change_registry(tiny_registry, lambda d, n=name: d["teachers"]["mine"].update({n: True}))
        with pytest.raises(Exception, match="unknown key"):
            load_registry(tiny_registry)
        change_registry(tiny_registry, lambda d, n=name: d["teachers"]["mine"].pop(n))


def test_an_expert_in_several_organs_runs_once(
    tiny_registry: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two organs, one array each, and not a forward pass more than for one organ."""
    passes: list[int] = []
    forward = nn.Module.__call__

    def counting(self: nn.Module, *inputs: Any, **named: Any) -> Any:
        if isinstance(self, torch.jit.ScriptModule) and inputs[0].shape[1] == 1:
            passes.append(len(inputs[0]))
        return forward(self, *inputs, **named)

    monkeypatch.setattr(nn.Module, "__call__", counting)
    counts = {}
    for organs in ({"liver": 1}, ORGANS):
        keep(tiny_registry, "liver-ct", mine={**exported(tiny_registry), "organs": organs})
        change_registry(tiny_registry, lambda data: data["organs"].update(liver=1, spleen=2))
        if len(organs) == 1:
            change_registry(tiny_registry, lambda data: data["organs"].pop("spleen"))
        passes.clear()
        assert not run(tiny_registry).failed
        counts[len(organs)] = sum(passes)
    assert counts[1] == counts[2] > 0
    for case in cached(tiny_registry):
        liver, spleen = (case.log_odds("mine", organ) for organ in ORGANS)
        assert not np.array_equal(liver, spleen)


def test_organ_and_tumour_channels_are_merged_on_the_road(tiny_registry: Path) -> None:
    """What the literature calls "liver includes tumour": a list of channels."""
    entry = {**exported(tiny_registry), "organs": {"liver": [1, 2]}}
    keep(tiny_registry, "liver-ct", mine=entry)
    assert not run(tiny_registry).failed
    registry = load_registry(tiny_registry)
    case = cached(tiny_registry)[0]
    source = next(s for s in registry.cases("liver-ct") if s.name == case.name)
    native = read_image(source.image).volume
    image = resample(native, native.grid.with_spacing((13, 11, 11)), order=1)
    teacher = load_teacher(
        "mine", registry.teachers["mine"], registry.resolve(entry["weights"]),
        window=WindowConfig(shape=WINDOW, overlap=0.25), batch_size=1, device=torch.device("cpu"),
    )  # fmt: skip
    logits = teacher.predict(image).logits
    shares = torch.softmax(torch.from_numpy(logits.array.astype(np.float64)), dim=0).numpy()
    together = np.log(shares[1] + shares[2]) - np.log(shares[0])
    expected = resample(
        Volume(together, logits.grid), native.grid.with_spacing((12, 12, 12)), order=1
    )
    found = np.asarray(case.log_odds("mine", "liver"), dtype=np.float64)
    np.testing.assert_allclose(found, expected.array, rtol=2**-5, atol=1e-3)


@pytest.mark.parametrize("kind", [bundle, exported, own_code])
def test_probabilities_are_refused_by_name_and_none_is_cached(
    tiny_registry: Path, kind: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    """The other teacher goes on; of this one, only what the gate asks for is tried."""
    other = kind(tiny_registry)
    keep(tiny_registry, "liver-ct", mine=with_softmax(tiny_registry, other), other=other)
    registry = load_registry(tiny_registry).trusting(["mine"])
    report = quiet_run(cache_config(), registry, work_of(tiny_registry))
    assert report.failed
    for unit, error in report.failed.items():
        assert unit.startswith("mine x liver-ct/case_")
        assert isinstance(error, OutputsError)
        assert "the network's outputs are probabilities, not logits" in str(error)
        assert "End the network before its softmax, or enter `outputs: probab" in str(error)
    if kind is own_code:  # an expert in one organ: the gate asks for one case
        assert len(report.failed) == 1
    assert report.exit_code == 2
    assert "teacher mine: outputs of the wrong kind, so no other unit" in capsys.readouterr().err
    assert sum(unit.startswith("other x ") for unit in report.done) == 3
    assert list(work_of(tiny_registry).glob("teachers/mine@*/*/*")) == []


@pytest.mark.parametrize("kind", [bundle, exported, own_code])
def test_probabilities_on_request_are_the_logits_they_were_made_of(
    tiny_registry: Path, kind: Any
) -> None:
    other = kind(tiny_registry)
    soft = {**with_softmax(tiny_registry, other), "outputs": "probabilities"}
    keep(tiny_registry, "liver-ct", mine=soft, other=other)
    registry = load_registry(tiny_registry).trusting(["mine"])
    assert not quiet_run(cache_config(), registry, work_of(tiny_registry)).failed
    for case in cached(tiny_registry):
        for organ in soft["organs"]:
            ours, theirs = (
                np.asarray(case.log_odds(teacher, organ), dtype=np.float32)
                for teacher in ("mine", "other")
            )
            assert np.nanmax(np.abs(ours)) > 1
            # Stored in 5 bits; bounded by what float32 tells from 0.
            np.testing.assert_allclose(ours, theirs.clip(-16.6, 16.6), rtol=2**-4, atol=2e-3)


def test_logits_that_are_said_to_be_probabilities_are_refused(tiny_registry: Path) -> None:
    for teacher in (exported(tiny_registry), teacher_data("liver")):
        keep(tiny_registry, "liver-ct", mine={**teacher, "outputs": "probabilities"})
        error, *_ = run(tiny_registry).failed.values()
        assert isinstance(error, OutputsError)
        assert "`outputs: probabilities` is said of it, but its outputs reach from -" in str(error)
        assert list(work_of(tiny_registry).glob("teachers/*")) == []
