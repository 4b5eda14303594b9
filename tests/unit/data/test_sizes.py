from __future__ import annotations

from pathlib import Path

from pipeline.data.entries import CaseFiles
from pipeline.data.nifti import read_image
from pipeline.data.registry import load_registry
from pipeline.data.sizes import CaseSize, case_sizes, two_cases
from pipeline.data.volume import Grid
from pipeline.errors import GeometryError

ALL = ("train", "validation", "test")


def made(dataset: str, case: str, side: int) -> CaseSize:
    source = CaseFiles(dataset, case, Path("image"), Path("label"), "train")
    grid = Grid.axis_aligned((side, side, side), (1, 1, 1))
    return CaseSize(source, grid, grid)


def test_headers_alone_give_the_grids(built_cohort: Path) -> None:
    registry = load_registry(built_cohort)
    sizes, unreadable = case_sizes(registry, ALL)
    assert len(sizes) == 9
    assert not unreadable
    for size in sizes:
        native = read_image(size.source.image).volume.grid
        assert size.native.largest_corner_distance_mm(native) < 1e-3
        assert size.grid.shape == native.with_spacing(registry.grid.spacing_mm).shape
        d, h, w = native.shape
        assert size.native_voxels == d * h * w


def test_splits_are_chosen(built_cohort: Path) -> None:
    sizes, _ = case_sizes(load_registry(built_cohort), ("test",))
    assert {size.source.name for size in sizes} == {"multi-ct/case_001", "multi-ct/case_002"}


def test_an_unreadable_header_is_told_and_left_out(tiny_registry: Path) -> None:
    broken = tiny_registry.parent / "data" / "multi-ct" / "images" / "case_001.nii.gz"
    broken.write_bytes(b"nothing")
    sizes, unreadable = case_sizes(load_registry(tiny_registry), ALL)
    assert len(sizes) == 8
    assert isinstance(unreadable["multi-ct/case_001"], GeometryError)


def test_the_largest_and_the_median_of_another_dataset() -> None:
    ours = [made("a", f"{n}", n) for n in (10, 20, 99)]
    theirs = [made("b", f"{n}", n) for n in (11, 12, 30, 40, 50)]
    chosen = two_cases([*ours, *theirs])
    assert [(c.source.dataset, c.source.case) for c in chosen] == [("b", "30"), ("a", "99")]


def test_one_dataset_and_one_case() -> None:
    cases = [made("a", f"{n}", n) for n in (30, 10, 20, 40)]
    assert [c.source.case for c in two_cases(cases)] == ["20", "40"]
    assert [c.source.case for c in two_cases(cases[:1])] == ["30"]
