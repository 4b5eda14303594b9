from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import yaml

from pipeline.cache.schema import StorageConfig
from pipeline.consensus.cohort import open_case
from pipeline.data.nifti import read_image, read_label
from pipeline.data.registry import load_registry
from pipeline.data.resample import resample
from pipeline.data.volume import Volume
from pipeline.errors import CacheError, CacheMissing, CacheStale, ConfigError, RegistryError
from pipeline.log import Log
from pipeline.review.cached_files import export_nifti, export_nnunet
from stages import cache_teachers
from tests.stages.stage_contract import snapshot
from tests.tiny import change_registry, fill_cache, in_two_folds, run_cache, work_of
from tests.unit.review.damage import rewrite, shard, unit_at

CASE = "multi-ct/case_001"
SLOPE = np.array([1.5, -1.0, 2.0])
"""HU per mm along right, anterior, superior."""


def export(
    registry: Path, tmp_path: Path, *teachers: str, case: str = CASE, **options: Any
) -> dict[str, Path]:
    written = export_nifti(
        work_of(registry), load_registry(registry), case, teachers, tmp_path / "out", **options
    )
    assert all(path.parent == tmp_path / "out" / case for path in written)
    return {path.name: path for path in written}


def test_files_of_others_stay(tiny_cached: Path, tmp_path: Path) -> None:
    """A folder in which somebody keeps label maps; what it wrote itself is replaced."""
    written = export(tiny_cached, tmp_path, "liver", regions=True)
    assert export(tiny_cached, tmp_path, "liver", regions=True) == written
    label = written["regions.nii.gz"]
    shutil.copy(tiny_cached.parent / "data" / "multi-ct" / "labels" / "case_001.nii.gz", label)
    before = snapshot(tmp_path / "out")
    with pytest.raises(ConfigError) as caught:
        export(tiny_cached, tmp_path, "liver", "spleen", regions=True)
    assert f"{label}: `pipeline cache export` did not write this file" in str(caught.value)
    label.write_text("no NIfTI")
    with pytest.raises(ConfigError, match=r"regions\.nii\.gz: `pipeline cache export` did not"):
        export(tiny_cached, tmp_path, "liver", "spleen", regions=True)
    assert set(snapshot(tmp_path / "out")) == set(before)


# --- geometry -------------------------------------------------------------------------------------


def oblique(codes: str) -> np.ndarray[Any, Any]:
    """(x, y, z) voxels of 3 x 4 x 5 mm to RAS+ mm: turned by 11 degrees, stored as `codes`."""
    angle = np.deg2rad(11)
    turn = np.array(
        [[np.cos(angle), -np.sin(angle), 0], [np.sin(angle), np.cos(angle), 0], [0, 0, 1]]
    )
    affine = np.eye(4)
    affine[:3, :3] = turn @ np.diag([3, 4, 5])
    affine[:3, 3] = [-40, 25, 310]
    shape = (24, 20, 16)
    orientation = nib.orientations.axcodes2ornt(tuple(codes))
    return affine @ nib.orientations.inv_ornt_aff(orientation, shape)


def world_of(image: Any) -> np.ndarray[Any, Any]:
    """(x, y, z, 3): RAS+ mm of every voxel's centre."""
    indices = np.stack(np.meshgrid(*(np.arange(n) for n in image.shape), indexing="ij"), axis=-1)
    return np.asarray(nib.affines.apply_affine(image.affine, indices))


@pytest.fixture(params=["RAS", "LPS", "SAL"])
def ramp(tmp_path: Path, request: pytest.FixtureRequest) -> Path:
    """A registry with one oblique CT, linear in world coordinates, and a teacher whose log-odds are
    (HU - 50) / 100, so that every exported voxel says where it believes to be."""
    affine = oblique(request.param)
    orientation = nib.orientations.axcodes2ornt(tuple(request.param))
    shape = nib.orientations.apply_orientation(np.zeros((24, 20, 16)), orientation).shape
    blank = nib.Nifti1Image(np.zeros(shape, dtype=np.int16), affine)
    hu = np.rint((world_of(blank) - [-40, 25, 310]) @ SLOPE).astype(np.int16)
    label = (hu > 50).astype(np.uint8)
    data = tmp_path / "data"
    for name, array in (("image", hu), ("label", label)):
        (data / name).mkdir(parents=True)
        nib.save(nib.Nifti1Image(array, affine), data / name / "c.nii.gz")
    (tmp_path / "w.bin").write_bytes(b"w")
    registry = tmp_path / "data_registry.yaml"
    entry = {
        "kind": "factory",
        "factory": "tests.unit.teachers.made_teachers:threshold",
        "args": {"hu": 50},
        "weights": "w.bin",
        "organs": {"liver": 1},
    }
    registry.write_text(
        yaml.safe_dump(
            {
                "schema_version": 1,
                "organs": {"liver": 7},
                "grid": {"spacing_mm": [6.0, 5.0, 4.0]},
                "datasets": {
                    "ramps": {
                        "root": "data",
                        "images": "image/{case}.nii.gz",
                        "labels": "label/{case}.nii.gz",
                        "annotated": {"liver": 1},
                        "split": {"validation": 0.0},
                    }
                },
                "teachers": {"ramp": entry},
                "admission": {"dice": 0.0},  # a ramp is no liver
            }
        )
    )
    report = run_cache(
        cache_teachers.CacheTeachersConfig(
            storage=StorageConfig(chunk=8, log_odds_bits=10, feature_bits=10)
        ),
        load_registry(registry),
        work_of(registry),
        log=Log(quiet=True),
        device="cpu",
        tables=False,
    )
    assert not report.failed, report.failed
    return registry


def test_every_voxel_lies_where_the_source_image_has_it(ramp: Path, tmp_path: Path) -> None:
    found = export(ramp, tmp_path, "ramp", case="ramps/c", regions=True)
    odds = nib.load(found["ramp_liver.nii.gz"])
    values = np.asanyarray(odds.dataobj)
    assert values.dtype == np.float32
    assert np.allclose(nib.affines.voxel_sizes(odds.affine), [4, 5, 6])
    world = world_of(odds)
    # Between voxel centres; in the outermost half voxel the outermost value holds.
    inner = (slice(2, -2),) * 3
    hu = (world - [-40, 25, 310]) @ SLOPE
    assert np.abs(values * 100 + 50 - hu)[inner].max() < 2
    assert np.ptp(hu[inner]) > 100
    source = nib.load(tmp_path / "data" / "image" / "c.nii.gz")
    corners = [world_of(image).reshape(-1, 3) for image in (source, odds)]
    # The student grid has the field of view of the source: no corner lies outside by half a voxel.
    low, high = (f([c.mean(axis=0) for c in corners], axis=0) for f in (np.min, np.max))
    assert np.abs(high - low).max() < 1e-3
    regions = nib.load(found["regions.nii.gz"])
    assert np.array_equal(regions.affine, odds.affine)
    clear = np.abs(hu - 50)[inner] > 30
    organ = np.asanyarray(regions.dataobj)[inner] == 7
    assert np.array_equal(organ[clear], (hu[inner] > 50)[clear])


# --- contents -------------------------------------------------------------------------------------


def test_log_odds_of_one_teacher_as_they_are_cached(built_cache: Path, tmp_path: Path) -> None:
    found = export(built_cache, tmp_path, "liver")
    assert list(found) == ["liver_liver.nii.gz"]
    from pipeline.cache.reader import Unit

    stored = Unit.open(unit_at(work_of(built_cache), f"liver x {CASE}")).read("log_odds/liver")
    values = np.asanyarray(nib.load(found["liver_liver.nii.gz"]).dataobj)
    assert values.dtype == np.float32
    np.testing.assert_array_equal(values.transpose(2, 1, 0), stored.astype(np.float32))


def test_conflicts_and_what_nobody_saw_are_no_organ(tiny_cached: Path, tmp_path: Path) -> None:
    """z slices: 0 liver alone, 1 spleen alone, 2 both, 3 unseen by one, the rest neither."""

    def ignored(arrays: dict[str, Any]) -> None:
        arrays["label"][:] = 255

    def claims(organ: str, slices: list[int]) -> Callable[[dict[str, Any]], None]:
        def change(arrays: dict[str, Any]) -> None:
            arrays[f"log_odds/{organ}"][:] = -5
            arrays[f"log_odds/{organ}"][slices] = 5

        return change

    def unseen(arrays: dict[str, Any]) -> None:
        claims("spleen", [1, 2])(arrays)
        arrays["log_odds/spleen"][3] = np.nan

    work, case = work_of(tiny_cached), "liver-ct/case_001"
    rewrite(unit_at(work, case), arrays=ignored)
    rewrite(unit_at(work, f"liver x {case}"), arrays=claims("liver", [0, 2]))
    rewrite(unit_at(work, f"spleen x {case}"), arrays=unseen)
    found = export(tiny_cached, tmp_path, "liver", case=case, regions=True)
    by_slice = {
        name: [set(np.unique(s)) for s in np.moveaxis(np.asanyarray(nib.load(path).dataobj), 2, 0)]
        for name, path in found.items()
    }
    assert by_slice["regions.nii.gz"][:5] == [{1}, {2}, {255}, {255}, {0}]
    assert by_slice["conflict.nii.gz"][:5] == [{0}, {0}, {1}, {0}, {0}]
    assert by_slice["agreed_background.nii.gz"][:5] == [{0}, {0}, {0}, {0}, {1}]


def test_names_that_would_be_one_are_kept_apart(tiny_registry: Path, tmp_path: Path) -> None:
    """Teacher `k` of organ `left_x` and teacher `k_left` of `x`, exported in one call or in two."""
    by_hu = {
        "kind": "factory",
        "factory": "tests.unit.teachers.made_teachers:threshold",
        "weights": "teachers/liver.pt",
    }

    def change(data: dict[str, Any]) -> None:
        data["organs"] = {"left_x": 1, "x": 2, "y": 3}
        data["datasets"] = {"multi-ct": data["datasets"]["multi-ct"]}
        data["datasets"]["multi-ct"]["annotated"] = {"left_x": 1, "x": 2}
        data["teachers"] = {
            "k": {**by_hu, "args": {"hu": 50}, "organs": {"left_x": 1}},
            "k_left": {**by_hu, "args": {"hu": 150}, "organs": {"x": 1}},
            "z": {**by_hu, "args": {"hu": 0}, "organs": {"y": 1}},
        }

    fill_cache(change_registry(tiny_registry, change))
    found = export(tiny_registry, tmp_path, "k", "k_left", "z")
    assert list(found) == ["k=left_x.nii.gz", "k_left=x.nii.gz", "z_y.nii.gz"]
    one, other, _ = (np.asanyarray(nib.load(path).dataobj) for path in found.values())
    assert not np.array_equal(one, other)
    before = snapshot(tmp_path / "out")
    assert [*export(tiny_registry, tmp_path, "k"), *export(tiny_registry, tmp_path, "k_left")] == (
        list(found)[:2]
    )
    assert set(snapshot(tmp_path / "out")) == set(before)


# --- refusals -------------------------------------------------------------------------------------


def test_names_that_do_not_exist(built_cache: Path, tmp_path: Path) -> None:
    with pytest.raises(RegistryError, match="no teacher 'heart'") as caught:
        export(built_cache, tmp_path, "heart")
    assert caught.value.exit_code == 2
    with pytest.raises(RegistryError, match="no dataset 'nowhere'"):
        export(built_cache, tmp_path, "liver", case="nowhere/case_001")
    with pytest.raises(CacheMissing, match="no case 'multi-ct/case_9'"):
        export(built_cache, tmp_path, "liver", case="multi-ct/case_9")
    assert not (tmp_path / "out").exists()


def test_what_is_not_or_no_longer_cached(tiny_cached: Path, tmp_path: Path) -> None:
    work = work_of(tiny_cached)
    shard(unit_at(work, f"liver x {CASE}"), "log_odds/liver").unlink()
    shutil.rmtree(unit_at(work, "liver x multi-ct/case_002"))
    with pytest.raises(CacheError, match="log_odds/liver/c/0/0/0 is missing"):
        export(tiny_cached, tmp_path, "liver")
    with pytest.raises(CacheMissing, match="not in the cache"):
        export(tiny_cached, tmp_path, "liver", case="multi-ct/case_002")
    assert list(export(tiny_cached, tmp_path, "spleen")) == ["spleen_spleen.nii.gz"]
    with pytest.raises(CacheError, match="is missing"):
        export(tiny_cached, tmp_path, "spleen", regions=True)
    change_registry(tiny_cached, lambda data: data["teachers"]["spleen"].update(taps=[]))
    with pytest.raises(CacheStale, match="teacher spleen"):
        export(tiny_cached, tmp_path, "spleen")


# --- as a raw dataset of nnU-Net ------------------------------------------------------------------


def export_raw(registry: Path, output: Path, *teachers: str) -> dict[str, Any]:
    known = load_registry(registry)
    export_nnunet(work_of(registry), known, teachers or list(known.teachers), output, Log())
    return dict(json.loads((output / "dataset.json").read_text("utf-8")))


def expected_label(registry: Path, case: str, teachers: Sequence[str], ignore: int) -> Any:
    """The whole volume at once, voxel by voxel as the docstring says."""
    known = load_registry(registry)
    dataset, _, name = case.partition("/")
    [source] = [one for one in known.cases(dataset) if one.case == name]
    found = open_case(work_of(registry), known, case, teachers)
    image, label = read_image(source.image), read_label(source.label).volume.array
    annotated = known.datasets[dataset].annotated
    odds, speaks = [], []
    for organ in known.label_space.organs:
        who = [t for t in found.experts.get(organ, ()) if t in teachers]
        each = [
            resample(
                Volume(found.log_odds(t, organ).astype(np.float32), found.grid),
                image.volume.grid, order=1, outside=np.nan,
            ).array
            for t in who
        ]  # fmt: skip
        d = np.nanmean(each, axis=0) if each else np.full(label.shape, np.nan, np.float32)
        if organ in annotated:
            is_organ = np.isin(label, annotated[organ])
            strong = np.fmax(np.abs(d), 6)
            d = np.where(is_organ, strong, -strong)
        odds.append(d)
        speaks.append(bool(who) or organ in annotated)
    for organ in annotated:
        k = known.label_space.organs.index(organ)
        here = odds[k] > 0
        others = [j for j in range(len(odds)) if j != k and speaks[j]]
        for j in others:
            odds[j] = np.where(here, -np.fmax(np.abs(odds[j]), 6), odds[j])
    stack = np.stack(odds)
    best = np.where(np.isnan(stack), -np.inf, stack)
    out = np.where(best.max(axis=0) > 0, best.argmax(axis=0) + 1, 0)
    out[(out == 0) & np.isnan(stack).any(axis=0)] = ignore
    return out, image


@pytest.mark.parametrize("teachers", [(), ("liver",)], ids=["all", "liver alone"])
def test_labels_and_experts_together_are_a_dataset_of_nnunet(
    tiny_cached: Path, tmp_path: Path, teachers: tuple[str, ...]
) -> None:
    output = tmp_path / "nnUNet_raw" / "Dataset501_Organs"
    dataset = export_raw(tiny_cached, output, *teachers)
    known = load_registry(tiny_cached)
    organs = known.label_space.organs
    ignored = {"ignore": len(organs) + 1} if teachers else {}  # only where somebody is silent
    named = {organ: k + 1 for k, organ in enumerate(organs)}
    assert dataset["labels"] == {"background": 0, **named, **ignored}
    cases = [c for d in known.datasets for c in known.cases(d)]
    training = [c for c in cases if c.split != "test"]
    assert dataset["numTraining"] == len(training)
    assert dataset["overwrite_image_reader_writer"] == "NibabelIOWithReorient"
    for case in cases:
        short = case.name.replace("/", "__")
        image = (
            output / ("imagesTs" if case.split == "test" else "imagesTr") / f"{short}_0000.nii.gz"
        )
        assert image.is_symlink()
        assert image.resolve() == case.image.resolve()
        path = output / "labelsTr" / f"{short}.nii.gz"
        assert path.exists() == (case.split != "test")
    for case in (training[0], training[-1]):
        wanted, image = expected_label(
            tiny_cached, case.name, teachers or list(known.teachers), len(organs) + 1
        )
        path = output / "labelsTr" / f"{case.name.replace('/', '__')}.nii.gz"
        written = read_label(path)
        assert written.volume.grid == image.volume.grid
        assert np.array_equal(written.volume.array, wanted)
    [fold] = json.loads((output / "splits_final.json").read_text("utf-8"))
    assert [len(fold["train"]), len(fold["val"])] == [
        sum(c.split == split for c in cases) for split in ("train", "validation")
    ]


def test_an_image_with_a_fourth_axis_is_written_with_three(
    tiny_cached: Path, tmp_path: Path
) -> None:
    """nnU-Net's reader refuses it, and so all of `nnUNetv2_plan_and_preprocess`."""
    path = load_registry(tiny_cached).cases("liver-ct")[0].image
    image = nib.load(path)
    voxels = np.asarray(image.dataobj)
    nib.save(nib.Nifti1Image(voxels[..., None], image.affine), path)
    fill_cache(tiny_cached)
    export_raw(tiny_cached, tmp_path / "Dataset501_Organs")
    [made] = (tmp_path / "Dataset501_Organs").glob("images*/liver-ct__case_000_0000.nii.gz")
    written = nib.load(made)
    np.testing.assert_array_equal(np.asarray(written.dataobj), voxels)
    np.testing.assert_array_equal(written.affine, image.affine)


def test_folds_are_those_of_nnunet(tiny_cached: Path, tmp_path: Path) -> None:
    fill_cache(in_two_folds(tiny_cached))
    output = tmp_path / "Dataset501_Organs"
    export_raw(tiny_cached, output)
    known = load_registry(tiny_cached)
    cases = [c for d in known.datasets for c in known.cases(d) if c.fold is not None]
    names = [{c.name.replace("/", "__") for c in cases if c.fold == k} for k in (0, 1)]
    folds = json.loads((output / "splits_final.json").read_text("utf-8"))
    assert [set(fold["val"]) for fold in folds] == names
    assert [set(fold["train"]) for fold in folds] == names[::-1]


def test_label_maps_that_are_there_are_kept_and_others_files_stay(
    tiny_cached: Path, tmp_path: Path
) -> None:
    output = tmp_path / "Dataset501_Organs"
    export_raw(tiny_cached, output)
    first = sorted((output / "labelsTr").iterdir())[0]
    before = first.stat().st_mtime_ns
    (output / "dataset.json").unlink()  # as if it had been killed
    export_raw(tiny_cached, output)
    assert first.stat().st_mtime_ns == before
    export_raw(tiny_cached, output, "liver")
    assert first.stat().st_mtime_ns != before
    with pytest.raises(ConfigError, match="nnU-Net takes folders named Dataset123_Name"):
        export_raw(tiny_cached, tmp_path / "mine")
    other = tmp_path / "Dataset502_Mine"
    other.mkdir()
    (other / "dataset.json").write_text("{}")
    with pytest.raises(ConfigError, match="did not write this file and does not replace it"):
        export_raw(tiny_cached, other)
    assert [path.name for path in other.iterdir()] == ["dataset.json"]


@pytest.mark.slow
def test_nnunet_takes_the_dataset_as_it_is(tiny_cached: Path, tmp_path: Path) -> None:
    pytest.importorskip("nnunetv2")
    export_raw(tiny_cached, tmp_path / "nnUNet_raw" / "Dataset501_Organs", "liver")
    folders = {name: str(tmp_path / name) for name in ("nnUNet_raw", "nnUNet_preprocessed")}
    command = ["nnUNetv2_plan_and_preprocess", "-d", "501", "--verify_dataset_integrity"]
    one_process = ["-npfp", "1", "-np", "1"]  # each of its own imports nnU-Net
    done = subprocess.run(
        [Path(sys.executable).parent / command[0], *command[1:], "-c", "3d_fullres", *one_process],
        env={**os.environ, **folders, "nnUNet_results": str(tmp_path / "results")},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    made = tmp_path / "nnUNet_preprocessed" / "Dataset501_Organs" / "nnUNetPlans_3d_fullres"
    known = load_registry(tiny_cached)
    cases = [c for d in known.datasets for c in known.cases(d) if c.split != "test"]
    assert len(list(made.glob("*.pkl"))) == len(cases)
