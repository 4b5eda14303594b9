"""From two files to a case in the cache: right values, an honest digest, nothing done twice."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import numpy.typing as npt
import pytest

from pipeline.cache.cases import CaseToGrid, centres, prepare_case
from pipeline.cache.index import IndexedCase, case_path
from pipeline.cache.reader import CachedCase, Unit
from pipeline.cache.receipt import Receipt, verify_unit, write_receipt
from pipeline.cache.schema import IMAGE, LABEL, StorageConfig
from pipeline.data.entries import CaseFiles
from pipeline.data.nifti import read_image
from pipeline.data.registry import Registry
from pipeline.data.volume import Grid
from pipeline.errors import GeometryError

Array = npt.NDArray[Any]
SHAPE_XYZ = (8, 10, 12)
SPACING_MM = (2.0, 2.0, 2.0)
AFFINE = np.diag([-2.0, -2.0, 2.0, 1.0])


def registry(path: Path, **changes: Any) -> Registry:
    """One dataset with two organs, whose values are not the registry's ids."""
    dataset: dict[str, Any] = {
        "root": "data",
        "images": "images/{case}.nii.gz",
        "labels": "labels/{case}.nii.gz",
        "annotated": {"liver": [5, 6], "spleen": 1},
        "ignore_values": [9],
        "background_values": [3],
    }
    data: dict[str, Any] = {
        "schema_version": 1,
        "organs": {"liver": 1, "spleen": 2, "pancreas": 3},
        "grid": {"spacing_mm": SPACING_MM},
        "datasets": {"ct": dataset | changes.pop("dataset", {})},
        "teachers": {"p": {"kind": "checkpoint", "weights": "p.pt", "organs": {"pancreas": 1}}},
    }
    found = Registry.model_validate(data | changes)
    found._path = path / "registry.yaml"
    return found


def ct() -> Array:
    return np.random.default_rng(0).integers(-1000, 1000, SHAPE_XYZ).astype(np.int16)


def labels() -> Array:
    label = np.zeros(SHAPE_XYZ, dtype=np.uint8)
    label[1:4, 1:5, 1:6] = 5
    label[1:4, 1:5, 6] = 6
    label[5:7, 2:8, 2:9] = 1
    label[0, 0, :] = 9
    label[7, 9, :] = 3
    return label


def put(path: Path, array: Array, affine: Array = AFFINE) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(nib.Nifti1Image(array, affine), path)


@pytest.fixture
def source(tmp_path: Path) -> CaseFiles:
    image, label = tmp_path / "data/images/a.nii.gz", tmp_path / "data/labels/a.nii.gz"
    put(image, ct())
    put(label, labels())
    return CaseFiles("ct", "a", image, label, "train")


Prepare = Callable[..., tuple[IndexedCase, int | None]]


@pytest.fixture
def told() -> list[str]:
    """What a user heard."""
    return []


@pytest.fixture
def run(tmp_path: Path, source: CaseFiles, told: list[str]) -> Prepare:
    def run(
        spacing_mm: tuple[float, float, float] = SPACING_MM,
        storage: StorageConfig | None = None,
        work: str = "work",
        dry_run: bool = False,
        **changes: Any,
    ) -> tuple[IndexedCase, int | None]:
        to_grid = CaseToGrid(
            registry(tmp_path, **changes), tmp_path / work,
            StorageConfig() if storage is None else storage, spacing_mm, dry_run,
        )  # fmt: skip
        stored = prepare_case(to_grid, source, warn=told.append)
        return stored.indexed, stored.num_bytes

    return run


def test_a_case_is_written_with_the_right_values(run: Prepare, tmp_path: Path) -> None:
    indexed, num_bytes = run()
    unit = Unit.open(case_path(tmp_path / "work", indexed), expect=indexed.digest)
    # The file is LPS: x and y are mirrored on the way to RAS.
    image, label = unit.read(IMAGE), unit.read(LABEL)
    np.testing.assert_array_equal(image, ct()[::-1, ::-1].transpose(2, 1, 0))
    expected = np.array([0, 2, 0, 0, 0, 1, 1, 0, 0, 255])[labels()]
    np.testing.assert_array_equal(label, expected[::-1, ::-1].transpose(2, 1, 0))
    assert image.dtype == np.int16
    assert label.dtype == np.uint8
    assert num_bytes is not None
    assert num_bytes > 0
    assert (indexed.name, indexed.split) == ("ct/a", "train")


def test_what_stands_beside_the_arrays(run: Prepare, source: CaseFiles, tmp_path: Path) -> None:
    indexed, _ = run(spacing_mm=(4.0, 4.0, 4.0))
    path = case_path(tmp_path / "work", indexed)
    unit = Unit.open(path)
    label, attributes = unit.read(LABEL), unit.attributes
    original = read_image(source.image).volume.grid
    assert Grid.from_json(attributes["source_grid"]) == original
    assert Grid.from_json(attributes["grid"]) == original.with_spacing((4.0, 4.0, 4.0))
    assert label.shape == (6, 5, 4)
    assert attributes["organ_ids"] == {"liver": 1, "spleen": 2}
    assert attributes["source"] == {"image": "a.nii.gz", "label": "a.nii.gz"}
    counts = {"liver": int((label == 1).sum()), "spleen": int((label == 2).sum())}
    assert Unit.open(path).attributes["organ_voxels"] == counts
    assert min(counts.values()) > 0
    for organ, organ_id in attributes["organ_ids"].items():
        found = np.array(attributes["centres"][organ])
        assert len(found) == min(20, counts[organ])
        assert (label[tuple(found.T)] == organ_id).all()


def nothing_written(work: Path) -> bool:
    return not any(p.is_file() for p in work.rglob("*")) if work.exists() else True


def test_another_shape_is_refused(run: Prepare, source: CaseFiles, tmp_path: Path) -> None:
    put(source.label, labels()[:, :, :-1])
    with pytest.raises(GeometryError) as caught:
        run()
    message = str(caught.value)
    assert message.startswith(f"ct/a, {source.label}: ")
    assert "(11, 10, 8) (z, y, x), the image (12, 10, 8)" in message
    assert "resample the label" in message
    assert nothing_written(tmp_path / "work")


@pytest.mark.parametrize(
    ("change", "apart"),
    [
        (np.eye(4, k=3) * 0.5, "0.50 mm"),
        (np.diag([0.1, 0, 0, 0]), "0.70 mm"),
        (np.diag([4.0, 4.0, 0, 0]), "22.80 mm"),
    ],
    ids=["shifted", "stretched", "LPS against RAS"],
)
def test_another_affine_is_refused_with_the_tolerance_in_mm(
    change: Array, apart: str, run: Prepare, source: CaseFiles, tmp_path: Path
) -> None:
    put(source.label, labels(), AFFINE + change)
    with pytest.raises(GeometryError) as caught:
        run()
    message = str(caught.value)
    assert message.startswith(f"ct/a, {source.label}: ")
    assert "(tolerance 0.1 mm)" in message
    assert f"up to {apart} away" in message
    assert "copy the image's affine" in message
    assert caught.value.exit_code == 2
    assert nothing_written(tmp_path / "work")


@pytest.mark.parametrize("size", [1e-5, 2e-3])
def test_noise_in_the_affine_is_accepted(size: float, run: Prepare, source: CaseFiles) -> None:
    noise = np.random.default_rng(0).uniform(-size, size, (4, 4))
    noise[3] = 0
    put(source.label, labels(), AFFINE + noise)
    assert run()[1] is not None


@pytest.mark.parametrize("which", ["image", "label"])
def test_an_absent_or_broken_file_is_refused_by_its_path(
    which: str, run: Prepare, source: CaseFiles, tmp_path: Path
) -> None:
    path: Path = getattr(source, which)
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(GeometryError, match="not a readable NIfTI") as caught:
        run()
    assert str(path) in str(caught.value)
    path.unlink()
    with pytest.raises(GeometryError, match="cannot be read") as caught:
        run()
    assert str(path) in str(caught.value)
    assert "ct/a" in str(caught.value)
    assert nothing_written(tmp_path / "work")


# --- what is no CT in HU ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda hu: hu // 4 + 1024, "about 1000 too high"),
        (lambda hu: (hu + 1000) / 2000, "normalised"),
        (lambda hu: (hu + 1000) // 16, "grey levels"),
        (lambda hu: np.clip(hu, -200, 400) + 200, "no value is below 0"),
    ],
)
def test_what_is_no_ct_in_hu_is_refused_unless_its_dataset_says_so(
    change: Callable[[Array], Array], says: str, run: Prepare, source: CaseFiles, tmp_path: Path
) -> None:
    put(source.image, change(ct().astype(np.float32)))
    with pytest.raises(GeometryError) as caught:
        run()
    message = str(caught.value)
    assert message.startswith(f"ct/a, {source.image}: it cannot be CT in HU: ")
    assert says in message
    assert "say `units: other` there in the registry" in message
    assert caught.value.exit_code == 2
    assert nothing_written(tmp_path / "work")
    indexed, num_bytes = run(dataset={"units": "other"})
    assert num_bytes is not None
    receipt = Unit.open(case_path(tmp_path / "work", indexed)).receipt
    assert receipt.inputs["units"] == "other"
    assert run(dataset={"units": "other"}) == (indexed, None)


def test_units_are_in_no_digest_by_default(run: Prepare, tmp_path: Path) -> None:
    first, _ = run()
    assert "units" not in Unit.open(case_path(tmp_path / "work", first)).receipt.inputs
    assert run(dataset={"units": "hu"}) == (first, None)
    keys = [registry(tmp_path, dataset=d).dataset_key("ct") for d in ({}, {"units": "hu"})]
    assert keys[0] == keys[1] != registry(tmp_path, dataset={"units": "other"}).dataset_key("ct")


def test_doubts_are_told_and_kept_in_the_receipt(
    run: Prepare, source: CaseFiles, told: list[str], tmp_path: Path
) -> None:
    put(source.image, np.clip(ct(), -160, 240))
    label = labels().astype(np.float32)
    label[0] += np.float32(1e-4)
    put(source.label, label)
    indexed, _ = run()
    first = list(told)
    assert len(first) == 2
    assert first[0].startswith("ct/a: a.nii.gz: label values lie up to 0.0001 from whole numbers")
    assert first[1].startswith("ct/a: the image was windowed")
    notes = Unit.open(case_path(tmp_path / "work", indexed)).receipt.notes
    assert [f"ct/a: {text}" for text in notes["warnings"]] == first
    assert run()[1] is None
    assert told == first * 2  # of a case that is there, too


# --- organs that the grid swallows ----------------------------------------------------------------

COARSE = (8.0, 8.0, 8.0)


def tiny_spleen(source: CaseFiles) -> None:
    label = labels()
    label[label == 1] = 0
    label[4, 4, 4] = 1
    put(source.label, label)


def receipt_of(work: Path, indexed: IndexedCase) -> Receipt:
    return Unit.open(case_path(work, indexed), expect=indexed.digest).receipt


def test_an_organ_that_the_grid_swallows_is_noted_and_told(
    run: Prepare, source: CaseFiles, told: list[str], tmp_path: Path
) -> None:
    tiny_spleen(source)
    indexed, _ = run(spacing_mm=COARSE)
    receipt = receipt_of(tmp_path / "work", indexed)
    assert receipt.notes["file_voxels"] == {"spleen": 1}
    assert receipt.swallowed == ("spleen",)
    assert any(
        "spleen has 1 voxel in the label's file and none on the student grid: here it counts as "
        "not annotated, not as absent." in text
        for text in told
    )
    unit = Unit.open(case_path(tmp_path / "work", indexed))
    case = CachedCase("ct/a", "train", ("liver", "spleen"), unit, {}, {})
    assert case.annotated == ("liver",)


def test_an_organ_that_the_file_lacks_is_absent(
    run: Prepare, source: CaseFiles, told: list[str], tmp_path: Path
) -> None:
    put(source.label, np.where(labels() == 1, 0, labels()).astype(np.uint8))
    indexed, _ = run(spacing_mm=COARSE)
    receipt = receipt_of(tmp_path / "work", indexed)
    assert receipt.notes["file_voxels"] == {"spleen": 0}
    assert receipt.swallowed == ()
    assert not any("spleen" in text for text in told)
    unit = Unit.open(case_path(tmp_path / "work", indexed))
    assert CachedCase("ct/a", "train", ("spleen",), unit, {}, {}).annotated == ("spleen",)


def test_a_few_voxels_that_are_left_are_told(
    run: Prepare, source: CaseFiles, told: list[str], tmp_path: Path
) -> None:
    indexed, _ = run(spacing_mm=(4.0, 4.0, 4.0))
    attributes = Unit.open(case_path(tmp_path / "work", indexed)).attributes
    left = attributes["organ_voxels"]["liver"]
    assert 0 < left < 10
    in_file = int(np.isin(labels(), (5, 6)).sum())
    assert f"ct/a: liver keeps {left} of {in_file} voxels on the student grid." in told
    assert "file_voxels" not in receipt_of(tmp_path / "work", indexed).notes


@pytest.mark.parametrize("organ_in_file", [True, False])
def test_a_receipt_of_before_gets_its_note_and_the_unit_stays(
    organ_in_file: bool, run: Prepare, source: CaseFiles, told: list[str], tmp_path: Path
) -> None:
    tiny_spleen(source)
    if not organ_in_file:
        put(source.label, np.where(labels() == 1, 0, labels()).astype(np.uint8))
    indexed, _ = run(spacing_mm=COARSE)
    path = case_path(tmp_path / "work", indexed)
    now = receipt_of(tmp_path / "work", indexed)
    (path / "receipt.json").write_text(write_receipt(replace(now, notes={})))
    times = {p: p.stat().st_mtime_ns for p in path.rglob("*") if p.name != "receipt.json"}
    told.clear()
    assert run(spacing_mm=COARSE, dry_run=True) == (indexed, None)
    assert receipt_of(tmp_path / "work", indexed).notes == {}
    assert run(spacing_mm=COARSE) == (indexed, None)
    noted = verify_unit(path, expect=indexed.digest)
    assert noted.notes == {"file_voxels": {"spleen": int(organ_in_file)}}
    assert any("spleen" in text for text in told) == organ_in_file
    assert {p: p.stat().st_mtime_ns for p in times} == times


def test_centres_lie_inside_are_distinct_and_follow_the_seed_alone() -> None:
    mask = np.random.default_rng(0).random((6, 7, 8)) > 0.7
    found = centres(mask, seed="a", most=30)
    assert len({tuple(c) for c in found}) == 30
    assert all(mask[tuple(c)] for c in found)
    assert centres(mask.copy(), seed="a", most=30) == found
    assert centres(mask, seed="b", most=30) != found
    # Fewer are the beginning of more, so that a setting that grows keeps what it had.
    assert centres(mask, seed="a", most=10) == found[:10]
    everything = centres(mask, seed="a", most=10_000)
    assert sorted(everything) == np.argwhere(mask).tolist()
    assert everything != sorted(everything)
    assert centres(np.zeros((3, 3, 3), np.bool_), seed="a") == []
