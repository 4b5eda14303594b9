from __future__ import annotations

import hashlib
import json
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from pydantic import ValidationError

from pipeline.data.entries import ORGANS, PhantomSpec, case_names
from pipeline.data.nifti import read_image, read_label
from pipeline.data.phantom.case import PhantomCase, make_case
from pipeline.data.phantom.case import write_dataset as write
from pipeline.data.volume import Grid, Volume
from pipeline.errors import ConfigError, RegistryError

SMALL = (24, 28, 32)


def small_spec(**changes: object) -> PhantomSpec:
    values: dict[str, object] = {"num_cases": 4, "seed": 5, "annotated": ORGANS, "shape": SMALL}
    return PhantomSpec.model_validate(values | changes)


def test_images_of_others_stay(tmp_path: Path) -> None:
    """A `phantom` entry whose root is a folder of CTs."""
    theirs = tmp_path / "images" / "case_002.nii.gz"
    theirs.parent.mkdir()
    theirs.write_text("a CT")
    with pytest.raises(ConfigError) as caught:
        write(tmp_path, small_spec())
    assert str(caught.value) == (
        f"{theirs}: `pipeline phantom` did not write this file and does not replace it. Choose "
        "another root."
    )
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == [theirs]
    assert theirs.read_text() == "a CT"


def digest(case: PhantomCase) -> str:
    h = hashlib.sha256()
    h.update(case.image.array.tobytes())
    h.update(case.label.array.tobytes())
    h.update(json.dumps(case.image.grid.to_json()).encode())
    return h.hexdigest()


def centroid_mm(label: Volume, value: int) -> np.ndarray:
    index = np.argwhere(label.array == value).mean(axis=0)
    return label.grid.matrix[:3, :3] @ index + label.grid.matrix[:3, 3]


def snapshot(root: Path) -> dict[str, tuple[int, str]]:
    return {
        str(p.relative_to(root)): (p.stat().st_mtime_ns, hashlib.sha256(p.read_bytes()).hexdigest())
        for p in sorted(root.rglob("*"))
        if p.is_file()
    }


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, PhantomSpec]:
    root = tmp_path_factory.mktemp("phantom") / "multi"
    spec = small_spec(num_cases=9, shift=0.5)
    write(root, spec)
    return root, spec


# --- the case as a function ---------------------------------------------------------------------


def test_is_deterministic_and_leaves_global_random_state_alone() -> None:
    np.random.seed(3)  # noqa: NPY002
    before = np.random.get_state()[1].copy()  # type: ignore[union-attr,index]  # noqa: NPY002
    assert digest(make_case(small_spec(), 1)) == digest(make_case(small_spec(), 1))
    after = np.random.get_state()[1]  # type: ignore[index]  # noqa: NPY002
    assert np.array_equal(before, after)


@pytest.mark.parametrize("change", [{"seed": 6}, {"shift": 0.5}, {"shape": (24, 28, 36)}])
def test_fields_that_change_numbers(change: dict[str, object]) -> None:
    assert digest(make_case(small_spec(), 0)) != digest(make_case(small_spec(**change), 0))


@pytest.mark.parametrize("change", [{"num_cases": 3}, {"annotated": ("spleen",)}])
def test_fields_that_change_only_scope(change: dict[str, object]) -> None:
    assert digest(make_case(small_spec(), 0)) == digest(make_case(small_spec(**change), 0))


def test_another_index_is_another_case() -> None:
    assert len({digest(make_case(small_spec(), i)) for i in range(4)}) == 4


@pytest.mark.parametrize(
    "change",
    [
        {"annotated": ("heart",)},
        {"annotated": ()},
        {"annotated": ("liver", "liver")},
        {"shift": 1.5},
        {"num_cases": 0},
        {"shape": (4, 4, 4)},
        {"colour": "red"},
    ],
)
def test_refused_specs(change: dict[str, object]) -> None:
    with pytest.raises(ValidationError):
        small_spec(**change)


# --- the anatomy --------------------------------------------------------------------------------


@pytest.mark.parametrize("index", range(6))
def test_every_organ_is_there_at_a_plausible_size(index: int) -> None:
    case = make_case(small_spec(num_cases=6, shift=0.5), index)
    assert set(np.unique(case.label.array)) == {0, 1, 2, 3, 4}
    ml = np.bincount(case.label.array.ravel()) * case.label.grid.voxel_ml
    for organ, (low, high) in enumerate(((350, 2600), (25, 600), (60, 900), (12, 180)), start=1):
        assert low < ml[organ] < high, (ORGANS[organ - 1], ml)


def test_hounsfield_units_are_plausible() -> None:
    spec = PhantomSpec(num_cases=6, seed=2, annotated=ORGANS)
    means = []
    for index in range(6):
        case = make_case(spec, index)
        image, label = case.image.array, case.label.array
        assert image.min() >= -1024
        corner = image[:, :3, :3]
        assert abs(float(corner.mean()) + 1000) < 30
        assert (image > 200).mean() > 0.003
        fat = ((image > -150) & (image < -50)).mean()
        assert 0.02 < fat < 0.4
        means.append([float(np.median(image[label == k])) for k in range(1, 5)])
    low, high = np.min(means, axis=0), np.max(means, axis=0)
    assert np.all(low > (-25, 15, 5, -20))
    assert np.all(high < (150, 170, 220, 140))
    assert np.all(high - low > 15)


def test_grows_smoothly_with_the_shape() -> None:
    coarse, fine = (
        make_case(PhantomSpec(num_cases=2, seed=4, annotated=ORGANS, shape=shape), 1)
        for shape in ((32, 36, 40), (64, 72, 80))
    )
    for organ in (1, 2, 3):
        a, b = (
            float((c.label.array == organ).sum()) * c.label.grid.voxel_ml for c in (coarse, fine)
        )
        assert a == pytest.approx(b, rel=0.2)
        apart = centroid_mm(coarse.label, organ) - centroid_mm(fine.label, organ)
        assert float(np.linalg.norm(apart)) < 6


# --- the files ----------------------------------------------------------------------------------


def test_files_read_back_as_made(dataset: tuple[Path, PhantomSpec]) -> None:
    root, spec = dataset
    for index in (0, 1, 5):
        case, name = make_case(spec, index), case_names(spec)[index]
        image = read_image(root / "images" / f"{name}.nii.gz").volume
        label = read_label(root / "labels" / f"{name}.nii.gz").volume
        assert np.array_equal(image.array, case.image.array)
        assert np.array_equal(label.array, case.label.array)
        for grid in (image.grid, label.grid):
            assert grid.largest_corner_distance_mm(case.image.grid) < 1e-2


def test_left_and_right_front_and_back_in_the_files(dataset: tuple[Path, PhantomSpec]) -> None:
    root, spec = dataset
    for name in case_names(spec):
        image = read_image(root / "images" / f"{name}.nii.gz").volume
        label = read_label(root / "labels" / f"{name}.nii.gz").volume
        liver, spleen, kidneys, pancreas = (centroid_mm(label, k) for k in (1, 2, 3, 4))
        assert liver[2] > spleen[2] + 80
        assert kidneys[1] < pancreas[1] - 20
        assert liver[0] > kidneys[0]
        assert abs(kidneys[2] - (liver[2] + spleen[2]) / 2) < 60
        index = np.indices(image.array.shape).reshape(3, -1)
        at = image.grid.matrix[:3, :3] @ index + image.grid.matrix[:3, 3:]
        middle = np.abs(at[2] - kidneys[2]) < 20
        hu = image.array.ravel()[middle]
        spine = at[1, middle][hu >= np.quantile(hu, 0.96)]
        assert np.median(spine) < pancreas[1] - 20


def test_orientations_spacings_and_obliquity_vary(dataset: tuple[Path, PhantomSpec]) -> None:
    root, spec = dataset
    codes, oblique, spacings = [], [], []
    for name in case_names(spec):
        affine = nib.load(root / "images" / f"{name}.nii.gz").affine
        codes.append("".join(nib.aff2axcodes(affine)))
        oblique.append(float(np.degrees(nib.affines.obliquity(affine)).max()) > 2)
        grid: Grid = read_image(root / "images" / f"{name}.nii.gz").volume.grid
        spacings.append(grid.spacing_mm)
    assert len(set(codes)) >= 6
    assert any(oblique[:3])
    assert not all(oblique[:3])
    ratio = np.max(spacings, axis=1) / np.min(spacings, axis=1)
    assert np.all(ratio > 1.02)
    assert len(set(spacings)) == len(spacings)


def test_a_single_organ_dataset_writes_its_organ_as_one(tmp_path: Path) -> None:
    spec = small_spec(num_cases=1, annotated=("kidneys",))
    write(tmp_path, spec)
    label = read_label(tmp_path / "labels" / "case_000.nii.gz").volume.array
    assert np.array_equal(label, make_case(spec, 0).label.array == 3)


def test_several_organs_keep_their_values(tmp_path: Path) -> None:
    spec = small_spec(num_cases=1, annotated=("pancreas", "spleen"))
    write(tmp_path, spec)
    label = read_label(tmp_path / "labels" / "case_000.nii.gz").volume.array
    assert set(np.unique(label)) == {0, 2, 4}


def test_a_second_write_does_nothing(tmp_path: Path) -> None:
    spec, seen = small_spec(num_cases=2), []
    write(tmp_path, spec)
    before = snapshot(tmp_path)
    write(tmp_path, spec, on_case=seen.append)
    assert snapshot(tmp_path) == before
    assert seen == ["case_000", "case_001"]


@pytest.mark.parametrize("damage", ["delete", "truncate"])
def test_a_second_write_repairs_only_what_is_broken(tmp_path: Path, damage: str) -> None:
    spec = small_spec(num_cases=2)
    write(tmp_path, spec)
    before = snapshot(tmp_path)
    broken = tmp_path / "labels" / "case_001.nii.gz"
    if damage == "delete":
        broken.unlink()
    else:
        broken.write_bytes(broken.read_bytes()[:200])
    write(tmp_path, spec)
    after = snapshot(tmp_path)
    assert {k: v[1] for k, v in after.items()} == {k: v[1] for k, v in before.items()}
    assert after["images/case_000.nii.gz"] == before["images/case_000.nii.gz"]


def test_a_write_that_was_interrupted_completes(tmp_path: Path) -> None:
    class Killed(Exception):
        pass

    def kill(case: str) -> None:
        if case == "case_001":
            raise Killed

    spec = small_spec(num_cases=3)
    with pytest.raises(Killed):
        write(tmp_path / "a", spec, on_case=kill)
    first = snapshot(tmp_path / "a")
    assert "images/case_002.nii.gz" not in first
    write(tmp_path / "a", spec)
    write(tmp_path / "b", spec)
    whole = snapshot(tmp_path / "a")
    assert whole["images/case_000.nii.gz"] == first["images/case_000.nii.gz"]
    assert {k: v[1] for k, v in whole.items()} == {
        k: v[1] for k, v in snapshot(tmp_path / "b").items()
    }


@pytest.mark.parametrize(
    "change", [{"seed": 6}, {"num_cases": 2}, {"shift": 0.1}, {"annotated": ("liver",)}]
)
def test_another_spec_is_refused(tmp_path: Path, change: dict[str, object]) -> None:
    write(tmp_path, small_spec(num_cases=1, shape=(16, 16, 16)))
    before = snapshot(tmp_path)
    with pytest.raises(RegistryError, match="Remove the folder, or choose another root"):
        write(tmp_path, small_spec(**({"num_cases": 1, "shape": (16, 16, 16)} | change)))
    assert snapshot(tmp_path) == before


def test_another_format_version_is_refused(tmp_path: Path) -> None:
    spec = small_spec(num_cases=1, shape=(16, 16, 16))
    write(tmp_path, spec)
    marker = tmp_path / "phantom.json"
    marker.write_text(json.dumps({**json.loads(marker.read_text()), "format_version": 1}))
    with pytest.raises(RegistryError, match="format version"):
        write(tmp_path, spec)


def test_an_unreadable_marker_is_refused(tmp_path: Path) -> None:
    (tmp_path / "phantom.json").write_text("{")
    with pytest.raises(RegistryError, match="Remove the folder"):
        write(tmp_path, small_spec())
