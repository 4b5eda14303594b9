from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml

from benchmarks.tune.measure import Tuning, tune
from benchmarks.tune.table import print_tuning
from pipeline.cache.schema import StorageConfig
from pipeline.data.registry import load_registry
from pipeline.errors import RegistryError
from pipeline.log import Log
from tests.stages.stage_contract import snapshot
from tests.tiny import cache_config, change_registry, work_of

ROOT = Path(__file__).resolve().parents[3]
ALL = ("train", "validation", "test")


def tuned(registry: Path, **storage: int) -> Tuning:
    return tune(
        load_registry(registry), splits=ALL, window=cache_config().window,
        storage=StorageConfig(**storage), log=Log(quiet=True), device="cpu", window_batch=8,
    )  # fmt: skip


@pytest.fixture(scope="module")
def found(built_cohort: Path) -> Tuning:
    return tuned(built_cohort)


def row(rows: Sequence[Mapping[str, Any]], name: str) -> Mapping[str, Any]:
    return next(r for r in rows if r["stored_as"] == name)


def test_fewer_bits_cost_less_and_lose_more(found: Tuning) -> None:
    names = ["float32", "float16", *(f"float16, {b} bits" for b in (6, 5, 4, 3))]
    rows = [row(found.log_odds, name) for name in names]
    assert [r["bytes_per_voxel"] for r in rows] == sorted(
        (r["bytes_per_voxel"] for r in rows), reverse=True
    )
    for temperature in ("1", "2", "4"):
        lost = [r["mean_kl"][temperature] for r in rows]
        assert lost[0] == 0
        assert lost == sorted(lost)
    rms = [row(found.features, name)["rms_error"] for name in names[1:]]
    assert rms == sorted(rms)


def test_no_setting_on_offer_flips_a_region(found: Tuning) -> None:
    assert {r["region_flips"] for r in found.log_odds} == {0}


def test_the_configured_setting_is_marked_once_and_varied(found: Tuning) -> None:
    default = StorageConfig()
    for rows, bits in (
        (found.log_odds, default.log_odds_bits),
        (found.features, default.feature_bits),
    ):
        (configured,) = (r for r in rows if r["configured"])
        assert configured["bits"] == bits
        alike = [(r["chunk"], r["zstd_level"]) for r in rows if r["bits"] == bits]
        assert sorted(alike) == [(32, 1), (64, 1), (64, 3), (128, 1)]


def test_bytes_are_those_that_stage_one_writes(built_cache: Path, found: Tuning) -> None:
    """Of the two cases that were tuned on."""
    written = voxels = 0
    for name, shape in found.cases.items():
        dataset, case = name.split("/")
        for unit in work_of(built_cache).glob(f"teachers/*/{dataset}/{case}@*.zarr"):
            chunks = unit.glob("log_odds/*/c/**/*")
            written += sum(p.stat().st_size for p in chunks if p.is_file())
            voxels += shape[0] * shape[1] * shape[2]
    (configured,) = (r for r in found.log_odds if r["configured"])
    assert configured["bytes_per_voxel"] == pytest.approx(written / voxels, rel=1e-3)


def test_the_tables_hold_what_was_found(
    found: Tuning, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    print_tuning(found)
    printed = capsys.readouterr().out
    names = ("float16, 5 bits", "uint8 arcsine", "int8 per channel", "region flips")
    for part in (*names, *found.cases):
        assert part in printed
    assert json.loads(json.dumps(found.to_json()))["log_odds"][0]["stored_as"] == "float32"


def test_a_registry_without_teachers_is_refused(tiny_registry: Path) -> None:
    change_registry(tiny_registry, lambda data: data.update(teachers={}))
    with pytest.raises(RegistryError, match="no teacher") as caught:
        tuned(tiny_registry)
    assert caught.value.exit_code == 2


def test_the_command_writes_nothing(tiny_registry: Path) -> None:
    config = tiny_registry.parent / "cache.yaml"
    config.write_text(yaml.safe_dump(cache_config().model_dump(mode="json")))
    before = snapshot(tiny_registry.parent)
    command = [sys.executable, "-m", "benchmarks.tune", "-q", "--json", "--device", "cpu"]
    result = subprocess.run(
        [*command, "-r", str(tiny_registry), "-c", str(config)],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert {"cases", "log_odds", "features"} == set(json.loads(result.stdout))
    assert snapshot(tiny_registry.parent) == before
