"""Whose an entry of the index is, and whether it speaks of the files that a registry leads to."""

from __future__ import annotations

import json
import os
import shutil
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pipeline.cache.identity import read_teacher, unchecked
from pipeline.cache.index import (
    dataset_entries,
    dataset_folder,
    read_dataset_index,
    read_index,
    read_sealed,
    write_sealed,
)
from pipeline.consensus.cohort import Cohort, open_cohort
from pipeline.data.entries import SplitEntry
from pipeline.data.nifti import read_image, write_image
from pipeline.data.registry import load_registry
from pipeline.data.splits import SPLITS
from pipeline.data.volume import Volume
from pipeline.engine.parts import Part
from pipeline.errors import CacheStale, ConfigError, WorkFolderError
from pipeline.log import Log
from pipeline.review.gc import find_garbage
from pipeline.review.status import status
from pipeline.setup.plan import make_plan
from pipeline.teachers.load import Teachers
from stages import cache_teachers
from tests.faults.small import (
    DATASET,
    TEACHERS,
    build_small,
    cached_copy,
    content,
    run_stage,
    settings,
)
from tests.tiny import as_one_file, change_registry, copy_cohort, run_cache, work_of

CASES = [f"case_{number:03}" for number in range(3)]


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_small(tmp_path_factory.mktemp("identity") / "built")


@pytest.fixture(scope="module")
def cached(built: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return cached_copy(built, tmp_path_factory.mktemp("identity") / "cached")


@pytest.fixture
def a(cached: Path, tmp_path: Path) -> Path:
    """A project that has been cached; it and its work folder are where they were by then."""
    registry = copy_cohort(cached, tmp_path / "A")
    assert run_stage(registry).done == []
    return registry


@pytest.fixture
def b(built: Path, tmp_path: Path) -> Path:
    """A copy of that project, not cached."""
    return copy_cohort(built, tmp_path / "B")


def files(registry: Path, part: str = "images") -> list[Path]:
    return sorted((registry.parent / "data" / DATASET / part).iterdir())


def repaint(path: Path) -> None:
    volume = read_image(path).volume
    other = 1 - volume.array if path.parent.name == "labels" else volume.array + 7
    write_image(path, Volume(other.astype(volume.array.dtype), volume.grid))


def rename_cases(registry: Path) -> None:
    for part in ("images", "labels"):
        for path in files(registry, part):
            path.rename(path.with_name(path.name.replace("case", "other")))


def remove_case(registry: Path, number: int = 2) -> None:
    for part in ("images", "labels"):
        files(registry, part)[number].unlink()


def add_case(registry: Path) -> None:
    for part in ("images", "labels"):
        first = files(registry, part)[0]
        shutil.copy2(first, first.with_name("case_003.nii.gz"))


def reads(registry: Path, work: Path | None = None) -> Cohort:
    loaded = load_registry(registry, files=False)
    return open_cohort(work or work_of(registry), loaded, teachers=list(loaded.teachers))


def names(cohort: Cohort) -> list[str]:
    assert not cohort.problems
    return [case.name for case in cohort.cases]


def all_done(registry: Path, work: Path) -> bool:
    return set(status(load_registry(registry, files=False), work).units.values()) == {"done"}


def nothing_to_do(registry: Path, work: Path) -> bool:
    report = run_stage(registry, work=work, dry_run=True)
    return (report.done, report.failed) == ([], {})


OTHERS: list[tuple[Callable[[Path], object], str]] = [
    (lambda b: [repaint(path) for path in files(b)], "the image of case_000 has other bytes"),
    (lambda b: repaint(files(b)[1]), "the image of case_001 has other bytes"),
    (lambda b: repaint(files(b, "labels")[2]), "the label of case_002 has other bytes"),
    (rename_cases, "case_000 is no longer in the dataset"),
    (remove_case, "case_002 is no longer in the dataset"),
    (add_case, "case_003 has not been cached"),
]


# The other differences are read by the same comparison: test_files_that_changed_need_stage_one.
@pytest.mark.parametrize(("change", "says"), [OTHERS[0], OTHERS[-1]])
def test_another_project_of_the_same_text_is_refused_before_it_changes_anything(
    a: Path, b: Path, change: Callable[[Path], object], says: str
) -> None:
    change(b)
    work = work_of(a)
    before = content(work)
    for options in ({}, {"part": Part(0, 2)}, {"dry_run": True}):
        with pytest.raises(WorkFolderError) as refused:
            run_stage(b, work=work, **options)
        text = str(refused.value)
        assert text.startswith(f"{b}: dataset {DATASET} of this registry is not the one that")
        assert f"for {a} on " in text
        assert says in text
        assert "Nothing was changed. Give this registry a work folder of its own (--work)" in text
        assert refused.value.exit_code == 2
    config = settings()
    teachers = Teachers(load_registry(b), config.window, config.storage, "cpu")
    with pytest.raises(WorkFolderError, match="is not the one that the work folder"):
        make_plan(teachers, config.splits, work, log=Log(quiet=True))
    assert content(work) == before
    with pytest.raises(CacheStale, match=says) as stale:
        reads(b, work)
    assert f"is in the cache, for {a}, with other cases or files" in str(stale.value)
    assert len(names(reads(a))) == len(CASES)
    assert nothing_to_do(a, work)
    # Kept apart, both go on.
    assert run_stage(b).exit_code == 0
    assert reads(b).cases
    change_registry(b, lambda data: data["datasets"].update(b=data["datasets"].pop(DATASET)))
    assert run_stage(b, work=work).exit_code == 0
    assert reads(b, work).cases
    assert reads(a).cases


def test_who_comes_between_is_seen_when_the_index_is_written(
    a: Path, b: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both began in an empty work folder."""
    repaint(files(b)[0])
    work = work_of(a)
    before = content(work)
    real, asked = cache_teachers.claim_dataset, []

    def not_there_yet(*arguments: Any, **options: Any) -> Any:
        asked.append(1)
        return real(*arguments, **options) if len(asked) > 1 else None

    monkeypatch.setattr(cache_teachers, "claim_dataset", not_there_yet)
    with pytest.raises(WorkFolderError, match=f"dataset {DATASET} of this registry is not"):
        run_stage(b, work=work)
    assert {name for name in content(work) if name.startswith("index/datasets")} == {
        name for name in before if name.startswith("index/datasets")
    }
    assert names(reads(a))


def test_a_copy_may_share_the_cache_and_its_owner_still_go_on(a: Path, b: Path) -> None:
    work = work_of(a)
    assert names(reads(b, work)) == names(reads(a))
    assert run_stage(b, work=work).done == []
    repaint(files(a)[0])
    assert run_stage(a).exit_code == 0
    assert names(reads(a))
    with pytest.raises(CacheStale, match="the image of case_000 has other bytes"):
        reads(b, work)
    with pytest.raises(WorkFolderError, match="the image of case_000 has other bytes"):
        run_stage(b, work=work)


def test_a_link_to_the_registry_of_another_project_is_a_project_of_its_own(
    a: Path, b: Path
) -> None:
    """Paths in a registry begin where it is named, not where a link leads."""
    repaint(files(b)[0])
    b.unlink()
    b.symlink_to(Path("..") / a.parent.name / a.name)
    before = content(work_of(a))
    with pytest.raises(WorkFolderError, match="the image of case_000 has other bytes") as refused:
        run_stage(b, work=work_of(a))
    assert f"for {a} on " in str(refused.value)
    with pytest.raises(CacheStale, match=f"is in the cache, for {a}, with other cases"):
        reads(b, work_of(a))
    assert content(work_of(a)) == before
    garbage = find_garbage(work_of(a), [load_registry(b)], grace_hours=0)
    assert (garbage.units, garbage.index_files, garbage.others) == ((), (), ())
    # Beside the registry it leads to the same files, and through a linked folder, too.
    beside = a.with_name("link.yaml")
    beside.symlink_to(a.name)
    (a.parent.parent / "linked").symlink_to(a.parent)
    repaint(files(a)[0])
    for registry in (beside, a.parent.parent / "linked" / a.name):
        assert run_stage(registry, work=work_of(a)).exit_code == 0
        assert names(reads(a))


def test_two_registries_over_the_same_files_are_one_project(a: Path) -> None:
    other = a.with_name("ablation.yaml")
    shutil.copy(a, other)
    change_registry(other, lambda data: data["teachers"].pop("two"))
    assert run_stage(other, work=work_of(a)).done == []
    repaint(files(a)[0])
    for registry in (other, a):
        assert run_stage(registry, work=work_of(a)).exit_code == 0
        assert names(reads(registry, work_of(a)))


def move_root(registry: Path) -> Path:
    shutil.copytree(registry.parent / "data", registry.parent / "disk2")
    shutil.rmtree(registry.parent / "data")
    return change_registry(
        registry, lambda data: data["datasets"][DATASET].update(root=f"disk2/{DATASET}")
    )


def rename_files(registry: Path) -> Path:
    data = registry.parent / "data" / DATASET
    (data / "images").rename(data / "imagesTr")
    return change_registry(
        registry,
        lambda data: data["datasets"][DATASET].update(images="imagesTr/{case}.nii.gz"),
    )


def move_weights(registry: Path) -> Path:
    weights = registry.parent / "teachers" / "none.pt"
    weights.rename(registry.parent / "moved.pt")
    return change_registry(
        registry, lambda data: [t.update(weights="moved.pt") for t in data["teachers"].values()]
    )


def move_registry(registry: Path) -> Path:
    (registry.parent.parent / "sub").mkdir()
    moved = registry.rename(registry.parent.parent / "sub" / "reg.yaml")

    def change(data: dict[str, Any]) -> None:
        data["datasets"][DATASET]["root"] = f"../A/data/{DATASET}"
        for teacher in data["teachers"].values():
            teacher["weights"] = "../A/teachers/none.pt"

    return change_registry(moved, change)


def move_all(registry: Path) -> Path:
    """Registry, CTs and weights; the work folder stays."""
    there = registry.parent.parent / "there"
    there.mkdir()
    for name in ("data", "teachers", registry.name):
        (registry.parent / name).rename(there / name)
    return there / registry.name


def touch_all(registry: Path) -> Path:
    for path in (*files(registry), *files(registry, "labels"), *registry.parent.glob("teachers/*")):
        os.utime(path, (1, 1))
    return registry


@pytest.mark.parametrize(
    "move",
    [move_root, rename_files, move_weights, move_registry, move_all, touch_all],
)
def test_what_moved_with_the_same_bytes_changes_nothing(
    a: Path, move: Callable[[Path], Path]
) -> None:
    work = work_of(a)
    units = {name: it for name, it in content(work).items() if not name.startswith("index")}
    before = names(reads(a))
    moved = move(a)
    for _ in ("before stage one has run again", "after"):
        assert names(reads(moved, work)) == before
        assert unchecked(work, load_registry(moved), list(TEACHERS)) == []
        assert all_done(moved, work)
        assert nothing_to_do(moved, work)
        garbage = find_garbage(work, [load_registry(moved)], grace_hours=0)
        assert (garbage.units, garbage.index_files) == ((), ())
        assert run_stage(moved, work=work).done == []
    after = {name: it for name, it in content(work).items() if not name.startswith("index")}
    assert after == units


def test_a_project_that_moved_with_its_work_folder_owns_it(a: Path, b: Path) -> None:
    """And so does a copy of both, whatever the first does from then on."""
    copy = copy_cohort(a, a.parent.parent / "copy")
    for registry in (copy, a):
        repaint(files(registry)[0])
        assert run_stage(registry).exit_code == 0
        assert names(reads(registry))
    with pytest.raises(WorkFolderError):
        run_stage(b, work=work_of(copy))


@pytest.mark.parametrize("how", ["removed", "without it"])
def test_a_dataset_that_its_project_gave_up_may_be_taken_over(
    a: Path, b: Path, how: str, capsys: pytest.CaptureFixture[str]
) -> None:
    rename_cases(b)
    if how == "removed":
        a.unlink()
    else:
        change_registry(a, lambda data: data["datasets"][DATASET].update(annotated={"liver": 2}))
    with pytest.raises(CacheStale):
        reads(b, work_of(a))
    loaded, work = load_registry(b), work_of(a)
    report = run_cache(settings(), loaded, work, log=Log(), device="cpu", tables=False)
    assert report.exit_code == 0
    said = capsys.readouterr().err
    assert f"dataset {DATASET} was cached for {a}, which is no longer there or does not" in said
    assert names(reads(b, work)) == [f"{DATASET}/other_{n:03}" for n in range(3)]


def test_a_path_on_another_host_is_believed_if_a_case_is_the_same(
    a: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nodes of a cluster share a path and its files; containers share a path alone."""
    monkeypatch.setattr(socket, "gethostname", lambda: "elsewhere")
    repaint(files(a)[0])
    assert run_stage(a).exit_code == 0
    monkeypatch.setattr(socket, "gethostname", lambda: "third")
    before = content(work_of(a))
    for path in files(a):
        repaint(path)
    with pytest.raises(WorkFolderError, match="on elsewhere: the image of case_000 has other"):
        run_stage(a)
    assert content(work_of(a)) == before


def other_weights(registry: Path) -> None:
    (registry.parent / "teachers" / "none.pt").write_bytes(b"others")


def test_a_teacher_of_the_same_text_with_other_weights_is_refused(a: Path, b: Path) -> None:
    other_weights(b)
    work = work_of(a)
    before = content(work)
    for options in ({}, {"part": Part(1, 2)}, {"dry_run": True}):
        with pytest.raises(WorkFolderError) as refused:
            run_stage(b, work=work, **options)
        text = str(refused.value)
        assert text.startswith(f"{b}: teacher one of this registry is not the one that the work")
        assert f"for {a} on " in text
        weights = [path.parent / "teachers" / "none.pt" for path in (a, b)]
        assert f"{weights[0]} there and {weights[1]} here, with other bytes" in text
        assert "or its teacher another name" in text
    assert content(work) == before
    with pytest.raises(CacheStale, match="teacher one is not in the cache as the registry"):
        reads(b, work)
    assert names(reads(a))


def test_a_teacher_of_the_same_weights_with_other_settings_is_refused(a: Path, b: Path) -> None:
    with pytest.raises(WorkFolderError, match="it is run with other settings of stage one"):
        run_stage(b, work=work_of(a), bits=6)
    assert names(reads(a))
    assert run_stage(a, bits=6).exit_code == 0  # one's own


def test_weights_that_are_retrained_or_named_anew_need_stage_one(a: Path) -> None:
    other_weights(a)
    with pytest.raises(CacheStale) as stale:
        reads(a)
    weights = a.parent / "teachers" / "none.pt"
    assert f"{weights} holds other bytes than the weights that its units were made by" in str(
        stale.value
    )
    assert "pipeline cache-teachers" in stale.value.fix
    assert {s for (_, what, _), s in status(load_registry(a), work_of(a)).units.items()
            if what in TEACHERS} == {"stale"}  # fmt: skip
    assert run_stage(a).exit_code == 0
    assert names(reads(a))
    weights.with_name("v2.pt").write_bytes(b"a second version")
    change_registry(a, lambda data: data["teachers"]["one"].update(weights="teachers/v2.pt"))
    with pytest.raises(CacheStale, match=r"teacher one .*v2\.pt holds other bytes"):
        reads(a)


def test_weights_that_cannot_be_read_are_known_by_their_name(a: Path) -> None:
    shutil.rmtree(a.parent / "teachers")
    change_registry(a, lambda data: data["teachers"]["one"].update(weights="/else/none.pt"))
    assert names(reads(a))
    assert unchecked(work_of(a), load_registry(a), list(TEACHERS)) == [
        "weights that cannot be read here are taken, by their name alone, for those that the "
        "cached units were made by: one (/else/none.pt), two (teachers/none.pt)."
    ]
    change_registry(a, lambda data: data["teachers"]["one"].update(weights="/else/v2.pt"))
    with pytest.raises(CacheStale) as stale:
        read_teacher(work_of(a), load_registry(a), "one")
    assert "its units were made by weights that are named none.pt, and /else/v2.pt, which the" in (
        str(stale.value)
    )
    assert "Run `pipeline cache-teachers` with this registry where the weights are" in str(
        stale.value
    )


def test_a_registry_without_its_files_elsewhere_goes_on_and_says_so(a: Path, b: Path) -> None:
    shutil.rmtree(b.parent / "data")
    assert names(reads(b, work_of(a)))
    (said,) = unchecked(work_of(a), load_registry(b, files=False), [])
    assert said == (
        f"dataset {DATASET} was cached for {a}; its files cannot be read here, so nothing tells "
        "whether it is the dataset that this registry means."
    )
    shutil.rmtree(a.parent / "data")
    assert unchecked(work_of(a), load_registry(a, files=False), []) == []
    assert names(reads(a))


@pytest.mark.parametrize(("change", "says"), [it for it in OTHERS if it[0] is not add_case])
def test_files_that_changed_need_stage_one(
    a: Path, change: Callable[[Path], object], says: str
) -> None:
    change(a)
    with pytest.raises(CacheStale, match=says) as stale:
        reads(a)
    assert f"dataset {DATASET} is in the cache with other cases or files" in str(stale.value)
    assert not all_done(a, work_of(a))
    assert run_stage(a).exit_code == 0
    assert names(reads(a))
    assert all_done(a, work_of(a))


def test_only_splits_that_are_asked_for_must_agree(a: Path) -> None:
    loaded, work = load_registry(a, files=False), work_of(a)
    (validation,) = open_cohort(work, loaded, splits=("validation",)).cases
    repaint(files(a)[CASES.index(validation.name.split("/")[1])])
    assert open_cohort(work, loaded, splits=("train",)).cases
    with pytest.raises(CacheStale):
        open_cohort(work, loaded, splits=("validation",))


def test_cases_that_change_their_split_need_stage_one(
    a: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a split says may lie in a file beside the registry."""
    monkeypatch.setattr(SplitEntry, "assign", lambda _, cases, *__: dict.fromkeys(cases, "test"))
    with pytest.raises(CacheStale, match="case_000 was in split validation and is in test"):
        reads(a)
    assert not all_done(a, work_of(a))
    assert run_stage(a).done == []
    assert all_done(a, work_of(a))


def test_a_case_that_stage_one_could_not_take_makes_nothing_stale(a: Path) -> None:
    broken = files(a)[1]
    broken.write_bytes(broken.read_bytes()[:400])
    report = run_stage(a)
    assert set(report.failed) == {f"{DATASET}/case_001"}
    split = {case.case: case.split for case in load_registry(a).cases(DATASET)}["case_001"]
    others = [name for name in SPLITS if name != split]
    for _ in ("where the files are", "and where they are not"):
        found = reads(a)
        assert [case.name for case in found.cases] == [f"{DATASET}/{CASES[n]}" for n in (0, 2)]
        (lost,) = found.problems
        assert lost == f"{DATASET}/case_001"
        assert str(found.problems[lost]) == (
            f"{lost}, {work_of(a)}: stage one left this case out: it could not be read, or its "
            "split was not asked for. `pipeline cache-teachers` makes it, or says what is wrong "
            "with it."
        )
        assert not open_cohort(work_of(a), load_registry(a, files=False), splits=others).problems
        shutil.rmtree(a.parent / "data", ignore_errors=True)


def test_a_case_that_came_since_is_named_and_hinders_no_other(a: Path) -> None:
    add_case(a)
    found = reads(a)
    assert len(found.cases) == 3
    assert {name: error.what for name, error in found.problems.items()} == {
        f"{DATASET}/case_003": "this case has not been cached."
    }
    assert not all_done(a, work_of(a))
    assert run_stage(a).exit_code == 0
    assert len(names(reads(a))) == 4


def as_version_1(work: Path) -> None:
    """The index as it was written before it knew of places, under other keys."""
    for records in (work / "index" / "datasets").iterdir():
        as_one_file(records)
    for file in read_index(work)[0]:
        old = read_sealed(file.path)
        for name in ("version", "origin", "left_out", "weights"):
            old.pop(name, None)
        for case in old.get("cases", ()):
            del case["image"], case["label"]
        stem, _, _ = file.path.stem.rpartition(".")
        file.path.unlink()
        write_sealed(file.path.with_name(f"{stem}.{'0' * 16}.json"), old)


def test_an_index_of_before_is_refused_and_mended_by_one_command(a: Path) -> None:
    work, loaded = work_of(a), load_registry(a)
    as_version_1(work)
    units = {name: it for name, it in content(work).items() if not name.startswith("index")}
    with pytest.raises(CacheStale) as stale:
        reads(a)
    text = str(stale.value)
    assert "as an older version of organ-distill wrote it (version 1 of the index, now 2)" in text
    assert "The registry need not have changed." in text
    assert "Run `pipeline cache-teachers` with this registry; no unit is made again." in text
    assert set(status(loaded, work).units.values()) == {"stale"}
    with pytest.raises(ConfigError, match="Nothing was removed"):
        find_garbage(work, [loaded], grace_hours=0)
    assert run_stage(a).done == []
    assert names(reads(a))
    garbage = find_garbage(work, [loaded], grace_hours=0)
    assert garbage.units == ()
    assert {path.stem[-16:] for path in garbage.index_files} == {"0" * 16}
    # From here on a registry that stage one has not seen is just that.
    change_registry(a, lambda data: data["datasets"][DATASET].update(annotated={"liver": 2}))
    with pytest.raises(CacheStale, match="not in the cache as the registry describes it now"):
        reads(a)
    assert units.items() <= content(work).items()


def test_an_index_of_one_file_is_found_and_becomes_records_without_a_unit_made_again(
    a: Path,
) -> None:
    work, key = work_of(a), load_registry(a).dataset_key(DATASET)
    before, cohort = content(work), reads(a)
    file = as_one_file(dataset_folder(work, DATASET, key))
    assert dataset_entries(work, DATASET, key) == [file]
    assert names(reads(a)) == names(cohort)
    assert all_done(a, work)
    assert find_garbage(work, [load_registry(a)], grace_hours=0).index_files == ()
    assert run_stage(a).done == []
    assert content(work) == before


def test_a_record_that_is_lost_is_missed_where_no_file_tells_which_cases_there_are(
    a: Path,
) -> None:
    work, key = work_of(a), load_registry(a).dataset_key(DATASET)
    dataset_entries(work, DATASET, key)[1].unlink()
    for here in (True, False):
        if not here:
            (a.parent / "data").rename(a.parent / "elsewhere")
        with pytest.raises(CacheStale, match="records of some of its cases are missing"):
            reads(a)
    (a.parent / "elsewhere").rename(a.parent / "data")
    assert run_stage(a).done == []
    assert len(names(reads(a))) == 3


def test_an_entry_says_for_whom_it_was_written(a: Path) -> None:
    work = work_of(a)
    for file in read_index(work)[0]:
        entry = json.loads(file.path.read_text())
        assert entry["version"] == 2
        assert entry["origin"]["registry"] == [str(a), "../data_registry.yaml"]
    key = load_registry(a).dataset_key(DATASET)
    (first, *_) = read_dataset_index(work, DATASET, key)
    assert first.image is not None
    assert first.image.sha256 == first.image_sha256
    assert first.image.size == files(a)[0].stat().st_size
