"""The bench of real slices, on made-up slices of the same form."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from benchmarks.real_slices.__main__ import main
from benchmarks.real_slices.report import by_patient
from benchmarks.real_slices.slices import OWN, TEST, VALUES, convert, patient_of, read_set
from pipeline.errors import ConfigError

STRONG = Path(__file__).parents[2] / "benchmarks" / "real_slices" / "strong.yaml"
SIDE = 48
# Where organs are, rows and columns of the picture; the liver is on the left of it.
PLACES = {1: (8, 20, 4, 20), 2: (26, 34, 8, 16), 3: (26, 34, 32, 40), 5: (16, 22, 24, 34)}


def write_set(data: Path, name: str, patients: list[str]) -> None:
    """Two slices of each patient; a single-organ set labels its own organ alone."""
    own = [v for organ, there in OWN.items() if there == name for v in VALUES[organ]]
    rng = np.random.default_rng(len(name))
    images, labels, rows = [], [], []
    for patient in patients:
        for number in range(2):
            image = rng.integers(20, 40, (SIDE, SIDE))
            label = np.zeros((SIDE, SIDE), dtype=np.uint8)
            for value, (top, bottom, left, right) in PLACES.items():
                image[top:bottom, left:right] += 30 * value
                if value in own or name == TEST:
                    label[top:bottom, left:right] = value
            images.append(image.astype(np.uint8))
            labels.append(label)
            source = "B_png_label" if patient == "b" else "A_official_label"
            rows.append({"row": len(rows), "patient": patient, "slice_index": number})
            rows[-1]["label_source"] = source
    folder = data / name
    folder.mkdir(parents=True)
    np.savez(folder / "slices.npz", image=np.stack(images), label=np.stack(labels))
    with (folder / "meta.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """A folder of slices."""
    folder = tmp_path / "real_slices"
    for name in OWN.values():
        write_set(folder, name, ["a0", "a1", "a2", "a3", "a4", "a5", "b"])
    write_set(folder, TEST, ["t0", "t1"])
    return folder


def test_no_slices_is_no_failure(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(tmp_path / "none"), str(tmp_path / "bench")]) == 0
    assert "skipped: there are no slices" in capsys.readouterr().err
    assert not (tmp_path / "bench").exists()


def test_a_slice_is_written_as_radiologists_see_it(data: Path, tmp_path: Path) -> None:
    convert(data, tmp_path / "cases")
    image = nib.load(tmp_path / "cases" / TEST / "labels" / "t0.0000.nii.gz")
    ras = np.asarray(nib.as_closest_canonical(image).dataobj)
    liver, kidneys = np.argwhere(ras == 1), np.argwhere(np.isin(ras, [2, 3]))
    assert liver[:, 0].mean() > ras.shape[0] / 2  # right
    assert liver[:, 1].mean() > kidneys[:, 1].mean()  # anterior


def test_part_b_of_kits_is_left_out(data: Path) -> None:
    kits = read_set(data, OWN["kidneys"])
    assert {patient_of(case) for case in kits.cases} == {f"a{n}" for n in range(6)}
    assert len(kits.images) == len(kits.labels) == len(kits.cases) == 12
    assert "b" in {patient_of(case) for case in read_set(data, OWN["liver"]).cases}


def test_another_form_is_refused(data: Path) -> None:
    path = data / TEST / "slices.npz"
    np.savez(path, image=np.zeros((3, 8, 8), np.uint8), label=np.zeros((3, 8, 8), np.uint8))
    with pytest.raises(ConfigError, match="shapes do not agree"):
        read_set(data, TEST)


@pytest.mark.slow
def test_from_slices_to_tables(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "bench"
    wanted = [str(data), str(folder), "--size", "tiny", "--seeds", "1", "--first-seed", "3"]
    wanted += ["--kinds", "marginal,ms_kd", "--training", str(STRONG)]
    assert main(wanted) == 0, capsys.readouterr().err
    assert not list(folder.glob("**/scores_test.json"))
    assert main([*wanted, "--test", "--seconds", "0.2"]) == 0
    out = capsys.readouterr().out
    assert "Dice minus marginal, test, equal steps" in out
    found = json.loads((folder / "results/strong/results.json").read_text())
    splits, terms = ("validation", "test"), ("equal steps", "equal time")
    assert set(found["scores"]) == {f"{t}, {split}" for t in terms for split in splits}
    test = found["scores"]["equal steps, test"]
    assert test["patients"] == ["t0", "t1"]
    assert set(test["estimates"]) == {"marginal", "ms_kd", "its teacher"}
    assert (folder / "results/strong/slices.png").stat().st_size > 0
    assert "![" in (folder / "results/strong/results.md").read_text()
    configs = folder.glob("seed3/work/teachers-in-training/*/config.json")
    presets = {json.loads(p.read_text())["config"]["augment"]["preset"] for p in configs}
    assert presets == {"strong"}

    # Longer, at equal time alone.
    assert main([*wanted, "--only-equal-time"]) == 2
    assert "--only-equal-time: of how many seconds?" in capsys.readouterr().err
    assert main([*wanted, "--only-equal-time", "--seconds", "0.2"]) == 0
    found = json.loads((folder / "results/strong/results.json").read_text())
    assert set(found["scores"]) == {"equal time, validation"}

    # Other patients, without the training sets: nothing is trained again.
    made = {p: p.stat().st_mtime_ns for p in folder.glob("**/*.pt")}
    write_set(tmp_path / "others", TEST, ["u0", "u1", "u2"])
    assert main([str(tmp_path / "others"), *wanted[1:], "--test"]) == 0
    assert {p: p.stat().st_mtime_ns for p in folder.glob("**/*.pt")} == made
    found = json.loads((folder / "results/strong/results.json").read_text())
    assert found["scores"]["equal steps, test"]["patients"] == ["u0", "u1", "u2"]


def test_by_patient() -> None:
    """Slices of a patient are averaged first; a slice without the organ is no score."""

    class OneSeed:
        """Of a comparison what is read of it."""

        configs = ("marginal",)

        def of(self, name: str) -> list[OneSeed]:
            return [self]

        @property
        def rows(self) -> list[dict[str, object]]:
            return ROWS

    scores = by_patient({0: OneSeed()}, {0: ROWS})  # type: ignore[dict-item]
    assert scores.patients == ["p", "q"]
    np.testing.assert_array_equal(
        scores.arrays["marginal"], [[[0.5, np.nan, np.nan], [np.nan, 0.9, np.nan]]]
    )
    assert scores.estimates("marginal")["mean"].mean == pytest.approx(0.7)


ROWS: list[dict[str, object]] = [
    {"case": "x/p.0000", "organ": "liver", "n_ref": 5, "Dice": 0.4},
    {"case": "x/p.0001", "organ": "liver", "n_ref": 5, "Dice": 0.6},
    {"case": "x/p.0002", "organ": "liver", "n_ref": 0, "Dice": 0.0},
    {"case": "x/q.0003", "organ": "kidneys", "n_ref": 5, "Dice": 0.9},
]
