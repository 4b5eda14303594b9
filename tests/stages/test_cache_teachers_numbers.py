"""What is in the cache is what the teachers said, and nobody else's folder is touched."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pipeline.cache.reader import CachedCase
from pipeline.cache.schema import round_bits
from pipeline.consensus.cohort import (
    RegionRules,
    compute,
    lazy_consensus,
    open_cohort,
)
from pipeline.data.labels import Intensity, log_odds
from pipeline.data.nifti import read_image
from pipeline.data.registry import load_registry
from pipeline.data.resample import resample
from pipeline.networks.by_name import build_network
from pipeline.teachers.checkpoint import read_teacher
from pipeline.teachers.units import feature_stride
from stages.report import StageReport
from tests.stages.test_cache_teachers import quiet_run, run
from tests.stages.test_cache_teachers_input import factory, keep
from tests.stages.test_teacher_kinds import bundle
from tests.tiny import (
    GRID_MM,
    TAP,
    cache_config,
    change_registry,
    teacher_data,
    work_of,
    write_teacher,
)


def cases_of(registry: Path) -> list[CachedCase]:
    loaded = load_registry(registry)
    cohort = open_cohort(work_of(registry), loaded, teachers=list(loaded.teachers))
    assert not cohort.problems
    return list(cohort.cases)


def done(registry: Path) -> StageReport:
    report = run(registry)
    assert not report.failed
    return report


# --- teachers come and go -----------------------------------------------------------------------


def test_a_run_over_some_splits_forgets_no_other(tiny_cached: Path) -> None:
    change_registry(tiny_cached, lambda data: data["teachers"].pop("spleen"))
    config = cache_config(splits=["train"])
    report = quiet_run(config, load_registry(tiny_cached), work_of(tiny_cached))
    assert len(report.skipped) == 8
    assert {c.split for c in cases_of(tiny_cached)} == {"train", "validation", "test"}


# --- numbers ------------------------------------------------------------------------------------


def test_log_odds_are_those_of_the_network_on_the_whole_road(tiny_registry: Path) -> None:
    """A window that holds the volume: then the road is resample, scale, run, subtract, round."""
    keep(tiny_registry, "liver-ct", liver=teacher_data("liver"))
    config = cache_config(window={"shape": [48, 48, 48]})
    quiet_run(config, load_registry(tiny_registry), work_of(tiny_registry))
    record, state = read_teacher(tiny_registry.parent / "teachers" / "liver.pt")
    network = build_network(record.network, in_channels=1, out_channels=2).eval()
    network.load_state_dict(state)
    case = cases_of(tiny_registry)[0]
    hu = Intensity().apply(case.image())
    padding = [(0, 48 - n) for n in hu.shape]
    padded = np.pad(hu, padding, constant_values=-1.0)
    with torch.no_grad():
        logits = network(torch.from_numpy(padded)[None, None])[0].numpy()
    d, h, w = hu.shape
    wanted = round_bits((logits[1] - logits[0])[:d, :h, :w], 5)
    stored = case.log_odds("liver", "liver")
    np.testing.assert_allclose(stored, wanted, rtol=2**-5, atol=1e-4)
    assert np.mean(stored == wanted) > 0.99


def test_every_orientation_comes_out_where_the_image_is(tiny_registry: Path) -> None:
    """A teacher that is a function of HU must follow the stored image voxel by voxel."""
    spacing = list(GRID_MM)
    keep(tiny_registry, "liver-ct", "multi-ct", liver=factory("threshold", spacing_mm=spacing))
    done(tiny_registry)
    for case in cases_of(tiny_registry):
        wanted = round_bits(case.image().astype(np.float32) / 100, 5)
        np.testing.assert_array_equal(case.log_odds("liver", "liver"), wanted)


@pytest.mark.parametrize("spacing", [None, [6, 7, 8], [24, 24, 24]])
def test_a_teacher_at_another_spacing(tiny_registry: Path, spacing: list[float] | None) -> None:
    keep(tiny_registry, "liver-ct", liver=factory("threshold", spacing_mm=spacing))
    done(tiny_registry)
    loaded = load_registry(tiny_registry)
    for case, source in zip(cases_of(tiny_registry), loaded.cases("liver-ct"), strict=True):
        native = read_image(source.image).volume
        there = native.grid.with_spacing(spacing) if spacing else native.grid
        image = resample(native, there, order=1)
        odds = type(image)(image.array.astype(np.float32) / 100, there)
        wanted = resample(odds, case.grid, order=1).array
        stored = case.log_odds("liver", "liver").astype(np.float32)
        seen = np.isfinite(stored)
        assert seen.mean() > 0.9
        np.testing.assert_allclose(stored[seen], wanted[seen], rtol=2**-5, atol=1e-2)


def test_a_checkpoint_at_another_spacing_lies_on_the_student_grid(tiny_registry: Path) -> None:
    write_teacher(
        tiny_registry.parent / "teachers" / "liver.pt", "liver", seed=0, spacing_mm=(8, 6, 6)
    )
    keep(tiny_registry, "liver-ct", liver=teacher_data("liver", spacing_mm=[8, 6, 6]))
    done(tiny_registry)
    case = cases_of(tiny_registry)[0]
    assert case.log_odds("liver", "liver").shape == case.image().shape
    assert np.isfinite(case.log_odds("liver", "liver")).mean() > 0.9
    tap = case.teachers["liver"].attributes["taps"][TAP]
    cells = [-(-n // s) for n, s in zip(case.image().shape, tap["stride"], strict=True)]
    assert case.features("liver", TAP).shape == (tap["channels"], *cells)


def test_a_teacher_that_sees_a_box_is_silent_outside(tiny_registry: Path) -> None:
    box = [10, 12, 14]
    seer = factory("threshold", args={"box": box}, spacing_mm=list(GRID_MM))
    keep(tiny_registry, "liver-ct", liver=seer)
    done(tiny_registry)
    space = load_registry(tiny_registry).label_space
    for case in cases_of(tiny_registry):
        odds = case.log_odds("liver", "liver")
        inside = np.zeros(odds.shape, bool)
        inside[:10, :12, :14] = True
        np.testing.assert_array_equal(np.isfinite(odds), inside)
        regions, _ = lazy_consensus(case, space, RegionRules(labels_win=False))
        (abstained, background) = compute(regions.abstained, regions.background)
        assert abstained[~inside].all()
        assert not background[~inside].any()


def test_two_teachers_of_one_organ_are_averaged(tiny_registry: Path) -> None:
    spacing = list(GRID_MM)
    keep(
        tiny_registry,
        "liver-ct",
        low=factory("threshold", args={"hu": -100}, spacing_mm=spacing),
        high=factory("threshold", args={"hu": 300}, spacing_mm=spacing),
    )
    done(tiny_registry)
    case = cases_of(tiny_registry)[0]
    assert case.experts["liver"] == ["high", "low"]
    space = load_registry(tiny_registry).label_space
    regions, _ = lazy_consensus(case, space, RegionRules(labels_win=False))
    (mean,) = compute(regions.log_odds)
    np.testing.assert_allclose(
        mean[0],
        (case.log_odds("low", "liver").astype(np.float32) + case.log_odds("high", "liver")) / 2,
        rtol=1e-6,
    )
    hu = case.image().astype(np.float32)
    np.testing.assert_allclose(mean[0], (hu - 100) / 100, atol=0.5)


def test_a_teacher_of_several_organs(tiny_registry: Path) -> None:
    weights = tiny_registry.parent / "teachers" / "both.pt"
    channels = {"liver": (1, 3), "spleen": (2,)}
    write_teacher(weights, "liver", seed=3, num_channels=4, channels=channels)
    entry = teacher_data("both", organs={"liver": [1, 3], "spleen": 2}, num_channels=4)
    del entry["trained_on"]
    keep(tiny_registry, "multi-ct", both=entry)
    config = cache_config(window={"shape": [48, 48, 48]})
    quiet_run(config, load_registry(tiny_registry), work_of(tiny_registry))
    case = cases_of(tiny_registry)[0]
    record, state = read_teacher(weights)
    network = build_network(record.network, in_channels=1, out_channels=4).eval()
    network.load_state_dict(state)
    hu = Intensity().apply(case.image())
    padded = np.pad(hu, [(0, 48 - n) for n in hu.shape], constant_values=-1.0)
    with torch.no_grad():
        logits = network(torch.from_numpy(padded)[None, None])[0].numpy()
    d, h, w = hu.shape
    for organ, meant in channels.items():
        wanted = log_odds(logits[:, :d, :h, :w], meant, "softmax")
        stored = case.log_odds("both", organ).astype(np.float32)
        np.testing.assert_allclose(stored, wanted, rtol=2**-5, atol=1e-3)


@pytest.mark.parametrize(
    ("cell_mm", "spacing_mm", "stride"),
    [
        ((24, 24, 24), (12, 12, 12), (2, 2, 2)),
        ((12, 24, 48), (12, 12, 12), (1, 2, 4)),
        ((3, 6, 10), (12, 12, 12), (1, 1, 1)),
        ((20, 30, 12.5), (3, 3, 3), (8, 8, 4)),
    ],
)
def test_strides_are_powers_of_two_near_the_cells_own_size(
    cell_mm: tuple[float, ...], spacing_mm: tuple[float, ...], stride: tuple[int, ...]
) -> None:
    assert feature_stride(cell_mm, spacing_mm) == stride


def test_centres_lie_in_the_region_of_their_organ(built_cache: Path) -> None:
    for case in cases_of(built_cache):
        label = case.label()
        for organ, id_ in (("liver", 1), ("spleen", 2)):
            found = case.teachers[organ].attributes["centres"][organ]
            region = case.log_odds(organ, organ) > 0
            assert len(found) == min(256, region.sum())
            assert all(region[tuple(voxel)] for voxel in found)
            if organ in case.annotated:
                labelled = case.case.attributes["centres"][organ]
                assert labelled
                assert all(label[tuple(voxel)] == id_ for voxel in labelled)


# --- tables -------------------------------------------------------------------------------------


def test_the_table_of_regions_counts_ml(built_cache: Path) -> None:
    rows = {r["case"]: r for r in report_of(built_cache)["regions_ml"]}
    cases = cases_of(built_cache)
    assert set(rows) == {c.name for c in cases}
    for case in cases:
        row = rows[case.name]
        assert row["split"] == case.split
        label = case.label()
        for organ in case.annotated:
            voxels = np.sum(label == {"liver": 1, "spleen": 2}[organ])
            assert row["ml"][organ] == pytest.approx(voxels * case.grid.voxel_ml, abs=0.06)
        # Nothing conflicts where labels win, so the regions share out the volume.
        total = label.size * case.grid.voxel_ml
        assert row["ml"]["conflict"] == 0
        assert sum(row["ml"].values()) == pytest.approx(total, abs=0.3)


def test_the_table_of_teachers_is_read_back_from_the_cache(built_cache: Path) -> None:
    rows = report_of(built_cache)["teachers"]
    assert [(r["teacher"], r["dataset"]) for r in rows] == [
        ("liver", "liver-ct"),
        ("liver", "multi-ct"),
        ("spleen", "spleen-ct"),
        ("spleen", "multi-ct"),
    ]
    for row in rows:
        (case,) = (
            c
            for c in cases_of(built_cache)
            if c.name.startswith(row["dataset"]) and c.split == "validation"
        )
        inside = case.log_odds(row["teacher"], row["organ"]) > 0
        label = case.label() == {"liver": 1, "spleen": 2}[row["organ"]]
        dice = 2 * np.sum(inside & label) / (np.sum(inside) + np.sum(label))
        assert row["dice"] == pytest.approx(dice, abs=1e-4)
        sensitivity = np.sum(inside & label) / np.sum(label)
        assert row["sensitivity"] == pytest.approx(sensitivity, abs=1e-4)
        assert (row["split"], row["num_cases"]) == ("validation", 1)


def test_each_tap_says_how_far_it_agrees_with_itself(built_cache: Path) -> None:
    rows = report_of(built_cache)["taps"]
    assert [(row["teacher"], row["tap"]) for row in rows] == [("liver", TAP), ("spleen", TAP)]
    for row in rows:
        units = [c.teachers[row["teacher"]].noted["taps"][TAP] for c in cases_of(built_cache)]
        assert row["agreement"] == round(float(np.median([u["agreement"] for u in units])), 3)
        assert -1 <= row["agreement"] <= 1


def test_a_tap_that_does_not_is_told(
    tiny_registry: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    keep(tiny_registry, "liver-ct", zoo=bundle(tiny_registry))
    done(tiny_registry)
    said = capsys.readouterr().err
    assert re.search(r"teacher zoo: tap '\S+' agrees with itself by -?0\.\d+ only", said)


def report_of(registry: Path) -> dict[str, Any]:
    """What the stage told when this cache was filled."""
    path = work_of(registry) / "reports" / "cache-teachers.json"
    told: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return told
