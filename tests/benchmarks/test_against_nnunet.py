"""The bench beside nnU-Net: what both learn from, tables of made-up scores, and one tiny run."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest

from benchmarks.against_nnunet import nnunet, ours
from benchmarks.against_nnunet.__main__ import main
from benchmarks.against_nnunet.cohorts import SIZES, Place
from benchmarks.against_nnunet.job import NNUNET, row_folder, variants
from benchmarks.against_nnunet.report import report
from pipeline.cache.store import write_json
from pipeline.log import Log
from pipeline.student.network import seeded_network
from tests.tiny import change_registry, work_of

ROOT = Path(__file__).parents[2]
HARD = next(iter(NNUNET))


@pytest.mark.parametrize("missing", [False, True])
def test_what_nobody_knows_is_background_or_ignored(
    tiny_cached: Path, tmp_path: Path, missing: bool
) -> None:
    """With every teacher there is nothing to ignore, and one kind of labels."""

    def without_spleen(data: dict[str, Any]) -> None:
        del data["teachers"]["spleen"]

    if missing:
        change_registry(tiny_cached, without_spleen)
    place = Place(tiny_cached.parent, "here", "test")
    tiny_cached.rename(tiny_cached.with_name("here_registry.yaml"))
    assert work_of(tiny_cached) == place.work
    nnunet.write_datasets(place, Log(quiet=True))
    nnunet.write_datasets(place, Log(quiet=True))  # again, as after a kill
    assert nnunet.kinds_of_labels(place) == (["hard", "ignore"] if missing else ["hard"])
    hard, ignore = (nnunet.raw(place, labels) for labels in nnunet.DATASETS)
    organs = len(place.registry().label_space.organs)
    seen = set()
    for path in sorted((ignore / "labelsTr").iterdir()):
        one, other = (
            np.asarray(nib.load(folder / "labelsTr" / path.name).dataobj)
            for folder in (ignore, hard)
        )
        assert np.array_equal(np.where(one == organs + 1, 0, one), other)
        seen |= set(np.unique(one))
    assert (organs + 1 in seen) == missing
    for folder in (hard, ignore):
        told = json.loads((folder / "dataset.json").read_text())
        assert ("ignore" in told["labels"]) == (missing and folder == ignore)
        assert told["overwrite_image_reader_writer"] == "NibabelIOWithReorient"
        assert len(list((folder / "imagesTr").iterdir())) == told["numTraining"]
        assert (folder / "splits_final.json").exists()


def made_plan(axes: int) -> dict[str, Any]:
    """Of what nnU-Net plans, what is read of it."""
    kwargs = {
        "features_per_stage": [2, 4, 8, 16],
        "kernel_sizes": [[3] * axes] * 4,
        "strides": [[1] * axes, *[[2] * axes] * 3],
    }
    architecture = {"arch_kwargs": kwargs}
    return {"patch_size": [16] * axes, "batch_size": 3, "architecture": architecture}


@pytest.fixture
def planned(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Called with a number of axes, nnU-Net has planned so."""
    return lambda axes: monkeypatch.setattr(ours, "plan_of", lambda *_: made_plan(axes))


@pytest.mark.parametrize("cohort", ["phantoms", "slices"])
@pytest.mark.parametrize("row", ours.rows())
def test_every_student_can_be_built(
    planned: Callable[[int], None], tmp_path: Path, cohort: str, row: str
) -> None:
    flat = cohort == "slices"
    planned(2 if flat else 3)
    place = Place(tmp_path, "all", "test")
    training = ours.config_of(place, SIZES[cohort, "tiny"], row, seed=2).training
    assert training.patch == ((1, 16, 16) if flat else (16, 16, 16))
    assert training.batch_size == 3
    assert training.seed // 100 == 2
    assert not (flat and 0 in training.augment.flip_axes)
    seeded_network(training, num_organs=3)


def test_a_training_goes_on_with_as_many_steps(
    planned: Callable[[int], None], tiny_cached: Path, tmp_path: Path
) -> None:
    """As its speed was measured before it was killed, whatever it would be now."""
    planned(3)
    place = Place(tiny_cached.parent, "here", "test")
    tiny_cached.rename(tiny_cached.with_name("here_registry.yaml"))
    record = tmp_path / "speed.json"
    write_json(record, {"seconds_per_step": 0.5})
    for _ in range(2):
        told = ours.train(place, SIZES["phantoms", "tiny"], "ours", 1.5, 0, record)
        assert told["steps"] == 3
    assert told["seconds"] == 1.5  # nothing was left to measure


def test_tables_of_made_up_scores(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rng = np.random.default_rng(0)
    common = {"cohort": "phantoms", "split": "test", "seconds": 5.0}
    for seed in range(3):
        place = Place(tmp_path / f"seed{seed}", "all", "test")
        for row, level in ((HARD, 0.5), ("ours", 0.6)):
            folder = row_folder(place, row)
            for number, variant in enumerate(variants(row)):
                rows = [
                    {"case": f"d/{c}", "organ": o, "n_ref": 9, "Dice": level + 0.01 * number}
                    for c, o in (("a", "liver"), ("a", "spleen"), ("b", "liver"))
                ]
                folder.mkdir(parents=True, exist_ok=True)
                content = {"rows": rows, "seconds_per_case": rng.uniform(1, 2)}
                write_json(folder / f"test-{variant}.json", content)
            told = {"steps": 8, "seconds": 5.0, "seconds_per_step": 0.5}
            write_json(folder / "train.json", told | {"bytes_kept": 2e6, "peak_mib": 300})
    page, content = report(tmp_path, common, ["all", "missing"], [HARD, "ours"], range(4))
    out = capsys.readouterr().out
    assert "+0.100 [+0.100, +0.100]" in out
    assert "+0.010 [+0.010, +0.010]" in out
    assert "| ours | 8 | 5 | 300 | 2.00 | 2.0 |" in page.read_text()
    dice = json.loads(content.read_text())["settings"]["all"]["dice"]
    assert np.array(dice["ours, plain"], dtype=float).shape == (3, 2, 2)
    assert np.isnan(np.array(dice["ours, plain"], dtype=float)[:, 1, 1]).all()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--rows", "theirs"], "no 'theirs'"),
        (["--settings", "none"], "all; missing"),
        (["--seeds", "0"], "at least one"),
        (["--seconds", "0"], "more than 0"),
    ],
)
def test_wrong_arguments(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], said: str
) -> None:
    assert main([str(tmp_path / "new"), *arguments]) == 2
    assert said in capsys.readouterr().err
    assert not (tmp_path / "new").exists()


def test_no_slices_is_no_failure(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(tmp_path / "new"), "--slices", str(tmp_path / "none")]) == 0
    assert "skipped: there are no slices" in capsys.readouterr().err


@pytest.mark.slow
def test_from_nothing_to_tables(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Ended by a signal after the cohort, the same command goes on; done, it does nothing."""
    pytest.importorskip("nnunetv2")
    folder = tmp_path / "bench"
    wanted = [
        str(folder), "--size", "tiny", "--seeds", "1", "--seconds", "1", "--settings", "all",
        "--rows", f"{HARD};ours", "--test",
    ]  # fmt: skip
    began = subprocess.Popen(
        [sys.executable, "-m", "benchmarks.against_nnunet", *wanted],
        cwd=ROOT, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    place = Place(folder / "phantoms" / "seed0", "all", "test")
    while not (place.folder / "made.json").exists() and began.poll() is None:
        time.sleep(0.1)
    began.send_signal(signal.SIGTERM)
    assert began.wait(60) == 130
    assert not (place.folder / "dataset-all.json").exists()
    made = (place.folder / "made.json").stat().st_mtime_ns

    logs = place.folder / "requests"
    assert main(wanted) == 0, [log.read_text() for log in logs.glob("*.log")]
    assert (place.folder / "made.json").stat().st_mtime_ns == made
    out = capsys.readouterr().out
    assert f"Dice minus that of {HARD}" in out
    found = json.loads((folder / "phantoms" / "test.json").read_text())["settings"]["all"]
    assert {f"{HARD}, {v}" for v in ("mirrored", "plain")} < set(found["dice"])
    for row in (HARD, "ours"):
        [told] = found["training"][row]
        assert told["steps"] > 1
        assert told["seconds"] == pytest.approx(1, rel=0.6)
        assert told["bytes_kept"] > 0
        assert told["peak_mib"] > 50
    assert not list(folder.glob("**/validation*"))

    for log in logs.glob("*.log"):
        log.unlink()
    assert main(wanted) == 0
    assert not list(logs.glob("*.log"))
    with pytest.raises(SystemExit):
        main([*wanted, "--size", "huge"])
    assert main([*wanted, "--seconds", "2"]) == 2
    assert "another --size or --seconds" in capsys.readouterr().err
