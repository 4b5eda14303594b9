"""The admission gate in stage one: who is stopped, what is made first, what is remembered.

The cohort is made of noise with two organs by threshold, and teachers that need no network: `good`
finds the liver, `empty` nothing at all. Dataset `livers` annotates the liver, `spleens` does not.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from typer.testing import CliRunner

from pipeline.cache.index import read_teacher_index
from pipeline.cache.places import find_units
from pipeline.cache.receipt import read_receipt, verify_unit
from pipeline.cli import app as cli
from pipeline.consensus.evidence import Evidence, read_evidence, temperatures
from pipeline.data.nifti import read_image, write_image
from pipeline.data.registry import load_registry
from pipeline.data.volume import Grid, Volume
from pipeline.errors import CacheMissing, ConfigError, TeacherError
from pipeline.log import Log
from pipeline.review.why import why
from stages import cache_teachers
from stages.report import StageReport
from tests.stages.stage_contract import snapshot
from tests.tiny import change_registry, run_cache, work_of

SHAPE, SPACING_MM = (12, 14, 16), (6.0, 6.0, 6.0)
LIVER_HU = 60
NUM_CASES = 6
GATE = {  # case_002 and case_003 validate; of `spleens` three by the digest of the image
    "good x livers/case_002",
    "good x livers/case_003",
}


def teacher(function: str = "threshold", **args: Any) -> dict[str, Any]:
    return {
        "kind": "factory",
        "factory": f"tests.unit.teachers.made_teachers:{function}",
        "weights": "none.pt",
        "organs": {"liver": 1},
        "args": args,
    }


GOOD, EMPTY = teacher(hu=LIVER_HU), teacher(hu=5000)


def write_scan(folder: Path, case: str, seed: int, *, spacing_mm: Any = SPACING_MM) -> None:
    """Noise around 0 HU; label 1 where it is above `LIVER_HU`."""
    hu = np.random.default_rng(seed).normal(0, 80, SHAPE).astype(np.int16)
    grid = Grid.axis_aligned(SHAPE, spacing_mm)
    for part, array in (("images", hu), ("labels", (hu > LIVER_HU).astype(np.uint8))):
        path = folder / part / f"{case}.nii.gz"
        path.parent.mkdir(parents=True, exist_ok=True)
        write_image(path, Volume(array, grid))


@pytest.fixture
def registry(tmp_path: Path) -> Path:
    """`good` alone; tests add the others."""
    names = [f"case_{n:03}" for n in range(NUM_CASES)]
    split = {"train": names[:2] + names[4:], "validation": names[2:4], "test": []}
    files = {"images": "images/{case}.nii.gz", "labels": "labels/{case}.nii.gz"}
    datasets = {}
    for number, (name, organ) in enumerate({"livers": "liver", "spleens": "spleen"}.items()):
        for n, case in enumerate(names):
            write_scan(tmp_path / "co" / name, case, 100 * number + n)
        datasets[name] = {"root": name, **files, "annotated": {organ: 1}, "split": split}
    data = {
        "schema_version": 1,
        "organs": {"liver": 1, "spleen": 2},
        "grid": {"spacing_mm": list(SPACING_MM)},
        "datasets": datasets,
        "teachers": {"good": GOOD},
    }
    (tmp_path / "co" / "none.pt").write_bytes(b"no weights")
    path = tmp_path / "co" / "data_registry.yaml"
    path.write_text(yaml.safe_dump(data, sort_keys=False), encoding="utf-8")
    return path


def with_teachers(registry: Path, **teachers: Any) -> Path:
    return change_registry(registry, lambda data: data.update(teachers=teachers))


def run(registry: Path, **options: Any) -> StageReport:
    work = work_of(registry)
    log = Log(quiet=True, events=work / "events.jsonl")
    return run_cache(
        cache_teachers.CacheTeachersConfig(), load_registry(registry), work,
        log=options.pop("log", log), device="cpu", **({"tables": False} | options),
    )  # fmt: skip


def teacher_units(registry: Path) -> set[str]:
    return {p.name for p in find_units(work_of(registry)) if p.teacher is not None}


def evidence_of(registry: Path, name: str) -> Evidence:
    loaded, work = load_registry(registry, files=False), work_of(registry)
    return read_evidence(work, loaded, read_teacher_index(work, name, loaded.teacher_key(name)))


def admission_of(registry: Path) -> dict[str, Any]:
    path = work_of(registry) / "reports" / "admission.json"
    told: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return told


# --- stopped, or not ------------------------------------------------------------------------------


def test_a_good_teacher_passes_and_everything_is_cached(registry: Path) -> None:
    report = run(registry)
    assert report.exit_code == 0
    assert len(teacher_units(registry)) == 2 * NUM_CASES
    # The gate's units come first, and none is made twice.
    units = [unit for unit in report.done if " x " in unit]
    assert len(units) == len(set(units)) == 2 * NUM_CASES
    assert set(units[:5]) >= GATE
    assert len([unit for unit in units[:5] if "spleens" in unit]) == 3
    assert report.skipped == []
    (row,) = report.details["teachers"]
    assert row["dice"] > 0.97
    assert (row["split"], row["num_cases"], row["passed"]) == ("validation", 2, True)


def test_a_poor_teacher_stops_the_stage_and_what_is_cached_stays(
    registry: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with_teachers(registry, good=GOOD, bad=EMPTY)
    report = run(registry, tables=True)
    assert report.exit_code == 2
    assert list(report.failed) == ["teacher bad"]
    error = report.failed["teacher bad"]
    assert isinstance(error, TeacherError)
    assert "liver has a mean Dice of 0.000 (sensitivity 0.000) over 2 validation" in str(error)
    made = teacher_units(registry)
    for name in ("good", "bad"):
        assert {u for u in made if u.startswith(name) and "livers" in u} == {
            f"{name} x livers/case_002",
            f"{name} x livers/case_003",
        }
        assert len({u for u in made if u.startswith(name) and "spleens" in u}) == 3
    assert made == {unit for unit in report.done if " x " in unit}
    shown = capsys.readouterr().out
    assert "POOR: Dice below 0.5" in shown
    told = admission_of(registry)
    assert set(told["refused"]) == {"bad"}
    lines = (work_of(registry) / "events.jsonl").read_text().splitlines()
    (event,) = (e for e in map(json.loads, lines) if e["event"] == "admission")
    assert event["refused"] == told["refused"]


def test_a_dry_run_needs_no_gate_and_writes_nothing(registry: Path) -> None:
    with_teachers(registry, bad=EMPTY)
    before = snapshot(registry.parent)
    report = run(registry, dry_run=True, log=Log(quiet=True))
    assert report.exit_code == 0
    assert len(report.done) == 2 * NUM_CASES + 2 * NUM_CASES
    assert snapshot(registry.parent) == before


def test_a_teacher_that_always_raises_is_failing_units_and_no_crash(registry: Path) -> None:
    with_teachers(registry, good=GOOD, broken=teacher("poor", how="raise"))
    report = run(registry)
    assert report.exit_code == 2
    assert {unit.split(" x ")[0] for unit in report.failed} == {"broken"}
    assert len(report.failed) == 2 * NUM_CASES
    assert len(teacher_units(registry)) == 2 * NUM_CASES
    row = next(r for r in report.details["teachers"] if r["teacher"] == "broken")
    assert (row["passed"], row["flag"]) == (None, "not scored: its cases could not be read")


# --- accepted -------------------------------------------------------------------------------------


def test_accepted_all_the_same_and_receipts_say_so(registry: Path) -> None:
    with_teachers(registry, good=GOOD, bad=EMPTY)
    run(registry)
    before = teacher_units(registry)
    report = run(registry, accept=["bad"])
    assert report.exit_code == 0
    assert len(teacher_units(registry)) == 4 * NUM_CASES
    for place in find_units(work_of(registry)):
        notes = verify_unit(place.path).notes
        if place.teacher == "bad" and place.name not in before:
            assert notes["accepted"]["liver"]["dice"] == 0.0
            assert notes["accepted"]["liver"]["threshold"] == 0.5
        else:
            assert notes == {}
    row = next(r for r in report.details["teachers"] if r["teacher"] == "bad")
    assert row["flag"] == "POOR: Dice below 0.5, accepted"
    assert admission_of(registry)["accepted"]["bad"]["liver"]["num_cases"] == 2


def test_acceptance_is_in_no_digest_and_why_tells_of_it(registry: Path) -> None:
    with_teachers(registry, bad={**EMPTY, "admission": {"dice": 0.0}})
    run(registry)
    digests = {p.name: read_receipt(p.path).digest for p in find_units(work_of(registry))}
    change_registry(registry, lambda data: data["teachers"]["bad"].pop("admission"))
    for path in (p.path for p in find_units(work_of(registry)) if p.case == "case_000"):
        path.rename(path.with_name("." + path.name))
    report = run(registry, accept=["bad"])
    assert sorted(unit for unit in report.done if "x" in unit) == [
        "bad x livers/case_000",
        "bad x spleens/case_000",
    ]
    assert {p.name: read_receipt(p.path).digest for p in find_units(work_of(registry))} == digests
    config = cache_teachers.CacheTeachersConfig()
    reasons = why(
        work_of(registry), load_registry(registry), "livers/case_000",
        window=config.window, storage=config.storage,
    )  # fmt: skip
    unit = next(reason for reason in reasons if reason.unit == "bad x livers/case_000")
    assert unit.verdict == "reused"
    assert "accepted below the gate (liver: Dice 0.000, asked for 0.5)" in unit.because


def test_accept_takes_names_of_teachers_only(registry: Path) -> None:
    with pytest.raises(ConfigError, match="--accept bda: there is no such teacher") as caught:
        run(registry, accept=["bda"])
    assert "good" in str(caught.value)
    assert not work_of(registry).exists() or not teacher_units(registry)


def test_the_command_line_stops_with_2_and_takes_several_names(registry: Path) -> None:
    with_teachers(registry, bad=EMPTY, worse=teacher(hu=6000))
    command = ["cache-teachers", "-q", "--device", "cpu", "-r", str(registry)]
    command += ["-w", str(work_of(registry))]
    stopped = CliRunner().invoke(cli.app, command)
    assert stopped.exit_code == 2
    for name in ("bad", "worse"):
        assert f"--accept {name}" in stopped.output
    accepted = CliRunner().invoke(cli.app, [*command, "--accept", "bad", "--accept", "worse"])
    assert accepted.exit_code == 0


# --- what it is judged by -------------------------------------------------------------------------


def test_a_rerun_measures_nothing_again(registry: Path, reads: list[tuple[str, int]]) -> None:
    with_teachers(registry, good=GOOD, bad=EMPTY)
    first = run(registry)
    assert "bad/log_odds/liver" in dict(reads)
    reads.clear()
    again = run(registry)
    assert reads == []
    assert again.details["teachers"] == first.details["teachers"]
    assert again.exit_code == 2
    # Another threshold is another verdict on the same evidence.
    change_registry(registry, lambda data: data.update(admission={"dice": 0.0}))
    assert run(registry).exit_code == 0


def test_another_label_is_measured_again(registry: Path) -> None:
    run(registry)
    label = registry.parent / "livers" / "labels" / "case_002.nii.gz"
    other = np.zeros(SHAPE, dtype=np.uint8)
    other[0] = 1
    write_image(label, Volume(other, Grid.axis_aligned(SHAPE, SPACING_MM)))
    (row,) = run(registry).details["teachers"]
    assert row["dice"] < 0.7
    assert {unit for unit in teacher_units(registry) if "case_002" in unit} == {
        "good x livers/case_002",
        "good x spleens/case_002",
    }


def test_a_case_that_failed_is_measured_when_it_is_mended(registry: Path) -> None:
    image = registry.parent / "livers" / "images" / "case_002.nii.gz"
    whole = image.read_bytes()
    image.write_bytes(whole[:200])
    (row,) = run(registry).details["teachers"]
    assert row["num_cases"] == 1
    image.write_bytes(whole)
    (row,) = run(registry).details["teachers"]
    assert row["num_cases"] == 2


def test_a_unit_that_could_not_be_made_counts_as_soon_as_it_can(
    registry: Path, tmp_path: Path
) -> None:
    image = registry.parent / "livers" / "images" / "case_002.nii.gz"
    volume = read_image(image).volume
    marked, mark = volume.array.copy(), 1500
    marked.flat[0] = mark
    write_image(image, Volume(marked, volume.grid))
    mended = tmp_path / "mended"
    poor = teacher("poor", how="raise", marked_by=mark, hu=LIVER_HU, mended=str(mended))
    report = run(with_teachers(registry, good=poor))
    assert list(report.failed) == ["good x livers/case_002"]
    assert report.details["teachers"][0]["num_cases"] == 1
    mended.touch()
    (row,) = run(registry).details["teachers"]
    assert row["num_cases"] == 2


def test_voxels_of_unknown_label_count_neither_way(registry: Path) -> None:
    """In every voxel that the teacher would get wrong, the label is ignored."""

    def ignore(data: dict[str, Any]) -> None:
        data["datasets"]["livers"]["ignore_values"] = [9]

    change_registry(registry, ignore)
    with_teachers(registry, loose=teacher(hu=0))
    for n in (2, 3):
        hu = np.random.default_rng(n).normal(0, 80, SHAPE).astype(np.int16)
        label = np.where(hu > LIVER_HU, 1, np.where(hu >= 0, 9, 0)).astype(np.uint8)
        path = registry.parent / "livers" / "labels" / f"case_{n:03}.nii.gz"
        write_image(path, Volume(label, Grid.axis_aligned(SHAPE, SPACING_MM)))
    (row,) = run(registry).details["teachers"]
    assert (row["dice"], row["sensitivity"]) == (1.0, 1.0)


def test_damaged_evidence_is_measured_again(registry: Path) -> None:
    first = run(registry)
    (path,) = (work_of(registry) / "index" / "evidence").glob("*.json")
    good = path.read_bytes()
    path.write_bytes(good.replace(b"validation", b"train", 1))
    with pytest.raises(CacheMissing):
        evidence_of(registry, "good")
    assert run(registry).details["teachers"] == first.details["teachers"]
    assert path.read_bytes() == good


def test_training_cases_where_there_is_no_validation_case_said_aloud(
    registry: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def no_validation(data: dict[str, Any]) -> None:
        data["datasets"]["livers"]["split"] = {"validation": 0.0}

    change_registry(registry, no_validation)
    (row,) = run(registry).details["teachers"]
    assert (row["split"], row["num_cases"]) == ("train", 3)
    assert "over-confident" in capsys.readouterr().err


def test_without_any_label_it_cannot_tell_and_says_so(
    registry: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    change_registry(registry, lambda data: data["datasets"].pop("livers"))
    with_teachers(registry, bad=EMPTY)
    report = run(registry)
    assert report.exit_code == 0
    (row,) = report.details["teachers"]
    assert row["flag"] == "not scored: no labelled case"
    assert "not scored: no labelled case" in capsys.readouterr().err


def test_what_is_odd_elsewhere_warns_loudly_and_is_kept_but_does_not_stop(
    registry: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with_teachers(registry, empty={**EMPTY, "admission": {"dice": 0.0}})
    report = run(registry)
    assert report.exit_code == 0
    (row,) = report.details["elsewhere"]
    assert (row["dataset"], row["num_cases"], row["empty"]) == ("spleens", 3, 3)
    assert "IMPLAUSIBLE: no organ found in 3 of 3" in row["flag"]
    assert "no organ found in 3 of 3" in capsys.readouterr().err
    kept = evidence_of(registry, "empty").organs["liver"].elsewhere
    assert [region.region_ml for region in kept] == [0.0, 0.0, 0.0]


def test_a_coarse_dataset_with_shifted_values_is_odd(registry: Path) -> None:
    for n in range(NUM_CASES):
        path = registry.parent / "spleens"
        write_scan(path, f"case_{n:03}", n, spacing_mm=(18.0, 6.0, 6.0))
        image = path / "images" / f"case_{n:03}.nii.gz"
        hu = np.random.default_rng(n).normal(400, 80, SHAPE).astype(np.int16)
        hu[0] = -1000  # can be HU, unlike what is shifted by 1000
        write_image(image, Volume(hu, Grid.axis_aligned(SHAPE, (18.0, 6.0, 6.0))))
    (row,) = run(registry).details["elsewhere"]
    assert (row["odd_spacing"], row["odd_hu"]) == (3, 3)


def test_evidence_holds_what_the_arrays_say(registry: Path) -> None:
    """Against the files, without the code that measured."""
    run(registry)
    found = evidence_of(registry, "good")
    voxel_ml = 6.0**3 / 1000
    sizes = {}
    for n in range(NUM_CASES):
        hu = np.random.default_rng(n).normal(0, 80, SHAPE).astype(np.int16)
        sizes[f"livers/case_{n:03}"] = int((hu > LIVER_HU).sum()) * voxel_ml
    liver = found.organs["liver"]
    assert liver.label_ml == pytest.approx((min(sizes.values()), max(sizes.values())), abs=1e-3)
    assert {s.case: s.region_ml for s in liver.scored} == pytest.approx(
        {case: sizes[case] for case in ("livers/case_002", "livers/case_003")}, abs=1e-3
    )
    assert found.cases["livers/case_002"].spacing_mm == SPACING_MM
    assert liver.calibration is not None
    assert liver.calibration.num_voxels == 2 * np.prod(SHAPE)


def test_temperatures_are_read_without_weights_or_ct(registry: Path) -> None:
    run(registry)
    (registry.parent / "none.pt").unlink()
    for dataset in ("livers", "spleens"):
        (registry.parent / dataset).rename(registry.parent / f"gone-{dataset}")
    loaded = load_registry(registry, files=False)
    found = temperatures(work_of(registry), loaded, ["good"])
    calibration = evidence_of(registry, "good").organs["liver"].calibration
    assert calibration is not None
    assert found == {("good", "liver"): calibration.temperature}


def test_two_registries_over_one_work_folder_do_not_take_turns(registry: Path) -> None:
    run(registry)
    other = registry.with_name("other.yaml")
    other.write_text(registry.read_text())
    change_registry(other, lambda data: data["datasets"].pop("spleens"))
    change_registry(other, lambda data: data["organs"].pop("spleen"))
    run(other)
    assert len(list((work_of(registry) / "index" / "evidence").glob("*.json"))) == 2
    assert evidence_of(registry, "good").organs["liver"].elsewhere
    assert not evidence_of(other, "good").organs["liver"].elsewhere
