from __future__ import annotations

import errno
import json
import math
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
import yaml

from pipeline.cache.index import read_dataset_index, read_teacher_index
from pipeline.cli import app as cli
from pipeline.consensus.evidence import read_evidence, write_evidence
from pipeline.data.registry import load_registry
from pipeline.errors import (
    CacheMissing,
    CacheStale,
    CheckpointError,
    ConfigError,
    PipelineError,
    WorkFolderError,
)
from pipeline.log import Log
from pipeline.student import training
from pipeline.student.checkpoint import load_student
from pipeline.student.inference import StudentWindows
from pipeline.student.postprocessing import Rule
from pipeline.student.progress import metric_lines
from pipeline.student.settings import Kind
from pipeline.student.speed import TrainingExecution
from stages import train_student
from stages.report import Scope, StageReport
from stages.train_student import TrainStudentConfig
from tests.stages.stage_contract import StageContract, content, snapshot
from tests.tiny import (
    ORGANS,
    ROOT,
    TAP,
    RunCli,
    at_step,
    cache_config,
    change_registry,
    copy_cohort,
    fill_cache,
    in_two_folds,
    run_cache,
    run_python,
    training_settings,
    work_of,
)

# Refuses pipeline.teachers as if it were not installed, then runs the command line.
_WITHOUT_TEACHERS = """
import sys

class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[:2] == ["pipeline", "teachers"]:
            raise ImportError(f"{name} is not on this machine")

sys.meta_path.insert(0, Absent())
try:
    import stages.cache_teachers
except ImportError:
    print("stage one cannot be imported here")
sys.argv = ["pipeline", *sys.argv[1:]]
from pipeline.cli import main
main()
"""

# In the second step says so and waits for a signal, then runs the step.
_INTERRUPTED = """
import signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job begins without it
from pipeline.student import training
real = training.make_step
def awaited(*args):
    if args[-1] == 1:
        print("working", flush=True)
        sys.stdin.readline()
    return real(*args)
training.make_step = awaited
sys.argv = ["pipeline", *sys.argv[1:]]
from pipeline.cli import main
main()
"""


def settings(
    kind: str = "ms_kd", *, features: bool = True, allow_missing: bool = False, **changes: Any
) -> TrainStudentConfig:
    supervision: dict[str, Any] = {"kind": kind}
    if kind == "ms_kd" and features:
        supervision["features"] = {"student_taps": [TAP]}
    training = training_settings(**{"steps": 2, "supervision": supervision} | changes)
    return TrainStudentConfig.model_validate(
        {"run": "student", "allow_missing": allow_missing, "training": training}
    )


def run(
    registry: Path,
    config: TrainStudentConfig | None = None,
    *,
    dry_run: bool = False,
    log: Log | None = None,
) -> StageReport:
    return train_student.run(
        config or settings(),
        Scope(load_registry(registry, files=False), work_of(registry), log or Log(quiet=True)),
        TrainingExecution(device="cpu"),
        dry_run=dry_run,
    )


def arguments(registry: Path, config: TrainStudentConfig | None = None) -> list[str]:
    path = registry.parent / "student.yaml"
    path.write_text(yaml.safe_dump((config or settings()).model_dump(mode="json")))
    return [
        "train-student", "-q", "--device", "cpu",
        "-r", str(registry), "-w", str(work_of(registry)), "-c", str(path),
    ]  # fmt: skip


def run_folder(registry: Path) -> Path:
    return work_of(registry) / "students" / "student"


def units_of(registry: Path, teacher: str) -> list[Path]:
    return sorted((work_of(registry) / "teachers").glob(f"{teacher}@*/*/*.zarr"))


def trained_units(registry: Path, teacher: str) -> list[Path]:
    """Units of a teacher for the four cases that train."""
    known, work = load_registry(registry, files=False), work_of(registry)
    names = {
        (entry.dataset, entry.case)
        for dataset in known.datasets
        for entry in read_dataset_index(work, dataset, known.dataset_key(dataset))
        if entry.split == "train"
    }
    return [p for p in units_of(registry, teacher) if case_of(p) in names]


def case_of(unit: Path) -> tuple[str, str]:
    return unit.parent.name, unit.name.split("@")[0]


def steps_of(registry: Path) -> list[dict[str, Any]]:
    lines = (run_folder(registry) / "metrics.jsonl").read_text().splitlines()
    return [found for line in lines if "loss" in (found := json.loads(line))]


def losses_of(registry: Path) -> list[float]:
    return [line["loss"] for line in steps_of(registry)]


@pytest.fixture(scope="module")
def built_run(built_cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cached cohort with a finished run, never to be changed; use `trained`."""
    registry = copy_cohort(built_cache, tmp_path_factory.mktemp("trained") / "cohort")
    assert run(registry).done == ["student"]
    return registry


@pytest.fixture
def trained(built_run: Path, tmp_path: Path) -> Path:
    """A copy of it."""
    return copy_cohort(built_run, tmp_path / "cohort")


def test_a_student_of_a_fold(tiny_cached: Path, run_cli: RunCli) -> None:
    in_two_folds(tiny_cached)
    units = {path for teacher in ORGANS for path in units_of(tiny_cached, teacher)}
    fill_cache(tiny_cached)
    assert {path for teacher in ORGANS for path in units_of(tiny_cached, teacher)} == units
    with pytest.raises(ConfigError, match=r"in 2 folds, .* Give --fold, 0 to 1"):
        run(tiny_cached)
    command = arguments(tiny_cached)
    code, _, said = run_cli(*command, "--fold", "1")
    assert code == 0, said
    folder = work_of(tiny_cached) / "students" / "student-fold1"
    inputs = json.loads((folder / "config.json").read_text())["inputs"]
    known = load_registry(tiny_cached)
    cases = [case for dataset in known.datasets for case in known.cases(dataset)]
    assert inputs["fold"] == 1
    assert set(inputs["validation"]) == {c.name for c in cases if c.fold == 1}
    assert set(inputs["cases"]) == {c.name for c in cases if c.fold == 0}
    assert load_student(folder / "student.pt")[0].trained_on == tuple(inputs["cases"])
    assert "1 already there" in run_cli(*command, "--fold", "1")[2]
    # Under the name of the other fold it is none of its checkpoints.
    folder.rename(folder.with_name("student-fold0"))
    code, _, said = run_cli(*command, "--fold", "0")
    assert code == 2
    assert "this run was started with other settings: inputs.fold: 1 -> 0; " in said
    # One case less, and others are in other folds than the cache has them in.
    for part in ("images", "labels"):
        gone = next(c.case for c in known.cases("liver-ct") if c.fold == 1)
        (tiny_cached.parent / f"data/liver-ct/{part}/{gone}.nii.gz").unlink()
    code, _, said = run_cli(*command, "--fold", "1")
    assert code == 1
    assert f"{gone} is no longer in the dataset" in said


def test_no_folds(tiny_cached: Path, run_cli: RunCli) -> None:
    code, _, said = run_cli(*arguments(tiny_cached), "--fold", "0")
    assert code == 2
    assert "no dataset is in folds. Write `split: {folds: 5}`." in said
    code, _, said = run_cli(*arguments(tiny_cached), "--fold", "0", "--self-test")
    assert code == 2
    assert "a self-test is of no fold. Leave one of them out." in said


class TestTrainStudent(StageContract):
    kill_at = "pipeline.student.training:make_step"
    timed: ClassVar[tuple[str, ...]] = ("*/progress.png",)

    @pytest.fixture
    def registry(self, tiny_cached: Path) -> Path:
        return tiny_cached

    def run(self, registry: Path, *, dry_run: bool = False) -> StageReport:
        return run(registry, dry_run=dry_run)

    def command(self, registry: Path) -> list[str]:
        return arguments(registry)

    def output(self, registry: Path) -> Path:
        return work_of(registry) / "students"

    def units(self, registry: Path) -> set[str]:
        return {"student"}

    def remove_one(self, registry: Path) -> str:
        (run_folder(registry) / "finished.json").unlink()
        (run_folder(registry) / "student.pt").unlink()
        return "student"

    def break_one(self, registry: Path) -> Mapping[str, str]:
        raise NotImplementedError("there is one unit; see the tests of a missing unit")

    def test_a_failing_unit_is_named_and_the_others_are_done(self, registry: Path) -> None:
        """One unit: what stops it is raised, and named; see below."""
        shutil.rmtree(trained_units(registry, "liver")[0])
        with pytest.raises(CacheMissing, match="missing or damaged: teacher liver in 1 case"):
            self.run(registry)
        assert not self.output(registry).exists()


class TestTheCacheIsTheOnlyDoor:
    def test_it_trains_where_no_teacher_weights_and_no_ct_are(self, tiny_cached: Path) -> None:
        shutil.rmtree(tiny_cached.parent / "data")
        shutil.rmtree(tiny_cached.parent / "teachers")
        done = run_python("-c", _WITHOUT_TEACHERS, *arguments(tiny_cached))
        assert done.returncode == 0, done.stderr
        assert "stage one cannot be imported here" in done.stdout
        assert "are taken, by their name alone, for those that the cached units" in done.stderr
        assert "liver (teachers/liver.pt), spleen (teachers/spleen.pt)" in done.stderr
        record, _ = load_student(run_folder(tiny_cached) / "student.pt")
        assert tuple(record.organs) == ORGANS
        assert set(record.teachers) == set(ORGANS)
        assert record.supervision["kind"] == "ms_kd"
        assert len(record.trained_on) == 4


class TestSupervision:
    @pytest.mark.parametrize(
        "kind", ["naive", "marginal", "marginal_exclusion", "pseudo_label", "masked_bce", "ms_kd"]
    )
    def test_every_kind_trains(self, tiny_cached: Path, kind: Kind) -> None:
        report = run(tiny_cached, settings(kind))
        assert report.exit_code == 0
        assert report.details["finished"]
        losses = losses_of(tiny_cached)
        assert len(losses) == 2
        assert all(math.isfinite(loss) for loss in losses)
        assert set(report.details["validation_dice"]) == set(ORGANS)
        record, _ = load_student(run_folder(tiny_cached) / "student.pt")
        assert record.head == ("sigmoid" if kind == "masked_bce" else "softmax")

    def test_who_is_believed_stands_in_the_metrics(self, tiny_cached: Path) -> None:
        supervision = {"kind": "ms_kd", "reliability": {"agree_after": 0.0}}
        run(tiny_cached, settings(supervision=supervision))
        first, second = steps_of(tiny_cached)
        assert set(first["believed"]) == set(ORGANS)
        assert all(s is None or 0 <= s <= 1 for s in first["believed"].values())
        assert "believed" not in second  # every twentieth step

    def test_full_trains_on_fully_labelled_cases_alone(self, tiny_cached: Path) -> None:
        def move(data: dict[str, Any]) -> None:
            data["datasets"]["multi-ct"]["split"] = {
                "train": ["case_001"],
                "validation": ["case_000"],
                "test": ["case_002"],
            }

        fill_cache(change_registry(tiny_cached, move))
        run(tiny_cached, settings("full"))
        record, _ = load_student(run_folder(tiny_cached) / "student.pt")
        assert record.trained_on == ("multi-ct/case_001",)
        assert record.teachers == {}
        assert all(math.isfinite(loss) for loss in losses_of(tiny_cached))

    def test_full_without_fully_labelled_cases_is_refused(self, tiny_cached: Path) -> None:
        with pytest.raises(ConfigError, match="every organ is annotated") as caught:
            run(tiny_cached, settings("full"))
        assert caught.value.exit_code == 2
        assert not run_folder(tiny_cached).exists()

    def test_teachers_are_asked_for_where_the_registry_has_none(self, tiny_cached: Path) -> None:
        change_registry(tiny_cached, lambda data: data.pop("teachers"))
        with pytest.raises(ConfigError, match="ms_kd needs teachers"):
            run(tiny_cached)

    def test_labels_alone_need_no_teachers(self, tiny_cached: Path) -> None:
        shutil.rmtree(work_of(tiny_cached) / "teachers")
        assert run(tiny_cached, settings("marginal")).exit_code == 0

    def test_taps_of_two_strides_against_two_layers(self, tiny_registry: Path) -> None:
        fine = "model.0"  # 2 voxels a cell; TAP has 4

        def with_both(data: dict[str, Any]) -> None:
            for teacher in data["teachers"].values():
                teacher["taps"] = [TAP, fine]

        fill_cache(change_registry(tiny_registry, with_both))
        found = {}
        for name, taps in {
            "listed": [fine, TAP],
            "mapped": {TAP: TAP, fine: fine},
            "some": {TAP: TAP},
        }.items():
            supervision = {"kind": "ms_kd", "features": {"student_taps": taps, "ramp": 0}}
            config = settings(supervision=supervision).model_copy(update={"run": name})
            assert run(tiny_registry, config).exit_code == 0
            lines = work_of(tiny_registry) / "students" / name / "metrics.jsonl"
            found[name] = json.loads(lines.read_text().splitlines()[0])["terms"]["features"]
        assert found["listed"] == found["mapped"] != found["some"]
        with pytest.raises(
            ConfigError, match=r"student_taps: .*'model\.0' of teacher liver is cached"
        ):
            run(tiny_registry, settings())

    def test_features_that_nobody_cached_are_refused(self, tiny_registry: Path) -> None:
        def without_taps(data: dict[str, Any]) -> None:
            for teacher in data["teachers"].values():
                teacher["taps"] = []

        fill_cache(change_registry(tiny_registry, without_taps))
        with pytest.raises(ConfigError, match="the cache holds none"):
            run(tiny_registry)
        assert run(tiny_registry, settings(features=False)).exit_code == 0


class TestMissingUnits:
    def test_they_are_named_by_teacher_and_so_is_the_way_out(self, tiny_cached: Path) -> None:
        gone = {"liver": trained_units(tiny_cached, "liver")[:2]}
        gone["spleen"] = trained_units(tiny_cached, "spleen")[-1:]
        for path in [*gone["liver"], *gone["spleen"]]:
            shutil.rmtree(path)
        with pytest.raises(CacheMissing) as caught:
            run(tiny_cached)
        text = str(caught.value)
        assert "3 units are missing" in text
        for teacher, paths in gone.items():
            names = ", ".join("/".join(case_of(path)) for path in paths)
            number = f"{len(paths)} case{'s' if len(paths) > 1 else ''}"
            assert f"teacher {teacher} in {number} ({names})" in text
        assert "--allow-missing" in text
        assert "pipeline cache-teachers" in text

    def test_a_damaged_unit_is_named_with_its_reason(self, tiny_cached: Path) -> None:
        unit = trained_units(tiny_cached, "spleen")[0]
        largest = max((p for p in unit.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)
        largest.write_bytes(b"")
        with pytest.raises(CacheMissing, match="has 0 bytes"):
            run(tiny_cached)

    def test_units_that_nobody_reads_are_not_missed(self, trained: Path) -> None:
        unread = set(units_of(trained, "liver")) - set(trained_units(trained, "liver"))
        assert unread
        for path in unread:
            shutil.rmtree(path)
        assert run(trained).skipped == ["student"]

    @pytest.mark.parametrize("teacher", ["liver", "spleen"])
    def test_they_may_be_left_out(
        self, tiny_cached: Path, capsys: pytest.CaptureFixture[str], teacher: str
    ) -> None:
        for path in trained_units(tiny_cached, teacher)[:-1]:
            shutil.rmtree(path)
        report = run(tiny_cached, settings(allow_missing=True))
        assert report.exit_code == 0
        assert all(math.isfinite(loss) for loss in losses_of(tiny_cached))
        assert f"left out: teacher {teacher} in 3 cases" in capsys.readouterr().err

    def test_a_cache_that_is_whole_again_makes_another_run(
        self, tiny_cached: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        gone = trained_units(tiny_cached, "spleen")[0]
        name = "/".join(case_of(gone))
        shutil.rmtree(gone)
        command = ["pipeline", *arguments(tiny_cached), "--allow-missing"]
        with pytest.MonkeyPatch.context() as context:
            context.setattr(sys, "argv", command)
            with pytest.raises(SystemExit) as ended:
                cli.main()
        assert ended.value.code in (0, None)
        written = json.loads((run_folder(tiny_cached) / "config.json").read_text())
        assert written["inputs"]["missing_units"] == {"spleen": [name]}
        assert run(tiny_cached, settings(allow_missing=True)).skipped == ["student"]
        fill_cache(tiny_cached)
        before = snapshot(run_folder(tiny_cached))
        with pytest.raises(CheckpointError, match="units that the cache has by now") as caught:
            run(tiny_cached)
        assert f"teacher spleen in 1 case ({name})" in str(caught.value)
        assert "Name another `run`" in str(caught.value)
        assert snapshot(run_folder(tiny_cached)) == before

    def test_a_run_does_not_go_on_with_fewer_units(self, trained: Path) -> None:
        (run_folder(trained) / "finished.json").unlink()
        shutil.rmtree(trained_units(trained, "liver")[1])
        with pytest.raises(CheckpointError, match="no longer has: teacher liver in 1 case"):
            run(trained, settings(allow_missing=True))

    def test_without_any_teachers_unit_there_is_nothing_to_distil(self, tiny_cached: Path) -> None:
        for teacher in ORGANS:
            for path in trained_units(tiny_cached, teacher):
                shutil.rmtree(path)
        with pytest.raises(CacheMissing, match="no training case has a unit of any teacher"):
            run(tiny_cached, settings(allow_missing=True))

    def test_a_work_folder_without_cache_says_what_to_run(self, tiny_registry: Path) -> None:
        for kind in ("ms_kd", "marginal"):
            with pytest.raises(CacheMissing, match="`pipeline cache-teachers` has not run") as e:
                run(tiny_registry, settings(kind))
            assert str(work_of(tiny_registry)) in str(e.value)
        assert not work_of(tiny_registry).exists()

    @pytest.mark.parametrize("split", ["train", "validation"])
    def test_a_case_that_stage_one_could_not_take_is_one_of_them(
        self, tiny_cached: Path, capsys: pytest.CaptureFixture[str], split: str
    ) -> None:
        """Like a unit that somebody removed: whether its CT is here or not."""
        lost = next(c for c in load_registry(tiny_cached).cases("liver-ct") if c.split == split)
        lost.image.write_text("x\n")
        with pytest.raises(CacheStale, match=f"the image of {lost.case} has other bytes"):
            run(tiny_cached, settings(allow_missing=True))
        report = run_cache(
            cache_config(), load_registry(tiny_cached), work_of(tiny_cached),
            log=Log(quiet=True), device="cpu", window_batch=8, tables=False,
        )  # fmt: skip
        assert (set(report.failed), report.exit_code) == ({lost.name}, 2)
        for _ in ("with CTs", "without"):
            with pytest.raises(CacheMissing) as caught:
                run(tiny_cached)
            text = str(caught.value)
            assert f"1 case on the student grid ({lost.name})" in text
            assert "stage one left this case out: it could not be read" in text
            assert "--allow-missing" in text
            assert not run_folder(tiny_cached).exists()
            shutil.rmtree(tiny_cached.parent / "data", ignore_errors=True)
        capsys.readouterr()
        report = run(tiny_cached, settings(allow_missing=True))
        assert (report.done, list(report.warnings)) == (["student"], [lost.name])
        assert f"left out: 1 case on the student grid ({lost.name})" in capsys.readouterr().err
        inputs = json.loads((run_folder(tiny_cached) / "config.json").read_text())["inputs"]
        assert inputs["missing_cases"] == [lost.name]
        assert lost.name not in {**inputs["cases"], **inputs["validation"]}

    def test_a_dataset_that_stage_one_has_not_come_to(
        self, tiny_cached: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        shutil.rmtree(next((work_of(tiny_cached) / "index" / "datasets").glob("liver-ct.*")))
        with pytest.raises(CacheMissing, match=r"this case has not been cached") as caught:
            run(tiny_cached)
        named = re.findall(r"liver-ct/case_\d+", str(caught.value))
        assert named
        report = run(tiny_cached, settings(allow_missing=True))
        assert report.done == ["student"]
        assert set(report.warnings) == {*named}
        assert "left out: " in capsys.readouterr().err

    def test_a_cache_of_another_registry_is_stale(self, tiny_cached: Path) -> None:
        change_registry(tiny_cached, lambda data: data["grid"].update(spacing_mm=[9, 9, 9]))
        with pytest.raises(CacheStale, match="not in the cache as the registry describes it now"):
            run(tiny_cached)


class TestTheRun:
    @pytest.fixture(scope="class")
    def undisturbed(
        self, built_cache: Path, tmp_path_factory: pytest.TempPathFactory
    ) -> Mapping[str, str]:
        """What a run leaves that nothing disturbs."""
        whole = copy_cohort(built_cache, tmp_path_factory.mktemp("whole") / "cohort")
        run(whole, settings(seed=4))
        return content(run_folder(whole))

    @pytest.mark.parametrize("left", ["all", "student.pt", "best.pt", "finished.json"])
    def test_a_student_of_other_settings_is_not_replaced(self, trained: Path, left: str) -> None:
        """Whatever tells of it, once its checkpoints have been removed."""
        shutil.rmtree(run_folder(trained) / "checkpoints")
        for name in {"student.pt", "best.pt", "finished.json"} - {left} if left != "all" else ():
            (run_folder(trained) / name).unlink()
        before = snapshot(run_folder(trained))
        with pytest.raises(CheckpointError) as caught:
            run(trained, settings(seed=1))
        assert str(caught.value) == (
            f"{run_folder(trained) / (left if left != 'all' else 'student.pt')}: it is of a "
            "student that was trained with other settings or on other data, or it was changed "
            "since. It is not replaced. Name another `run` in the settings, or move away what is "
            "there."
        )
        assert caught.value.exit_code == 2
        assert snapshot(run_folder(trained)) == before

    def test_a_finished_run_without_checkpoints_is_done_as_long_as_its_student_is_there(
        self, trained: Path
    ) -> None:
        shutil.rmtree(run_folder(trained) / "checkpoints")
        student = run_folder(trained) / "student.pt"
        whole = student.read_bytes()
        assert run(trained).skipped == ["student"]
        student.unlink()
        assert run(trained).done == ["student"]
        assert student.read_bytes() == whole
        # Nor is one replaced that somebody else put there, though checkpoints are the run's own.
        (run_folder(trained) / "finished.json").unlink()
        student.write_bytes(b"of somebody else")
        with pytest.raises(CheckpointError, match=r"student\.pt: it is of a student that"):
            run(trained)
        assert student.read_bytes() == b"of somebody else"

    @pytest.mark.parametrize("config", [None, "{}"])
    def test_files_that_no_training_wrote_stay(self, tiny_cached: Path, config: str | None) -> None:
        folder = run_folder(tiny_cached)
        folder.mkdir(parents=True)
        for name in ("student.pt", "metrics.jsonl", "progress.png"):
            (folder / name).write_text("mine")
        if config is not None:
            (folder / "config.json").write_text(config)
        before = snapshot(folder)
        with pytest.raises(ConfigError) as caught:
            run(tiny_cached)
        text = str(caught.value)
        assert text.startswith(f"{folder / 'student.pt'}: `pipeline train-student` did not write")
        assert "metrics.jsonl, progress.png" in text
        assert "Name another `run` in the settings, or move away what is there." in text
        assert snapshot(folder) == before

    @pytest.mark.parametrize(
        "name", ["config.json", "metrics.jsonl", "best.pt", "checkpoints", "student.pt"]
    )
    def test_a_full_disk_is_one_sentence_and_the_run_goes_on(
        self,
        tiny_cached: Path,
        undisturbed: Mapping[str, str],
        monkeypatch: pytest.MonkeyPatch,
        name: str,
    ) -> None:
        real = Path.open

        def full(path: Path, mode: str = "r", **more: Any) -> Any:
            if "r" not in mode and f"/{name}" in str(path).replace("/.", "/"):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return real(path, mode, **more)

        with monkeypatch.context() as context:
            context.setattr(Path, "open", full)
            with pytest.raises(WorkFolderError) as caught:
                run(tiny_cached, settings(seed=4))
        text = str(caught.value)
        assert text.startswith(f"{run_folder(tiny_cached)}/{name}")
        assert "written (No space left on device). Check free space, quota and perm" in text
        assert caught.value.exit_code == 2
        assert [p.name for p in run_folder(tiny_cached).rglob("*.tmp")] == []
        assert not (run_folder(tiny_cached) / "finished.json").exists()
        assert run(tiny_cached, settings(seed=4)).done == ["student"]
        found = content(run_folder(tiny_cached))
        for same in ("student.pt", "best.pt", "metrics.jsonl"):
            assert found[same] == undisturbed[same]

    def test_a_run_that_a_signal_stopped_is_not_done(self, tiny_cached: Path) -> None:
        with at_step(1, lambda: os.kill(os.getpid(), signal.SIGTERM)):
            report = run(tiny_cached)
        assert (report.done, report.skipped) == ([], [])
        assert isinstance(report.failed["student"], PipelineError)
        assert "stopped at step 1 of 2" in str(report.failed["student"])
        assert report.exit_code == 1
        assert not (run_folder(tiny_cached) / "finished.json").exists()
        assert run(tiny_cached).done == ["student"]

    def test_ctrl_c_leaves_a_checkpoint_and_a_sentence(self, tiny_cached: Path) -> None:
        """Sent to all processes of the terminal, as the key does: loaders keep silent."""
        command = [*arguments(tiny_cached, settings(steps=3)), "--workers", "1"]
        with subprocess.Popen(
            [sys.executable, "-c", _INTERRUPTED, *command],
            cwd=ROOT,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        ) as process:
            assert process.stdout is not None
            assert process.stdout.readline() == "working\n"
            os.killpg(process.pid, signal.SIGINT)
            _, said = process.communicate("\n", timeout=100)
        assert process.returncode == 1, said
        assert "Ctrl-C: stopping after this step, with a checkpoint." in said
        assert "stopped at step 2 of 3. Run the same command again: it goes on from there." in said
        assert "Traceback" not in said
        assert "KeyboardInterrupt" not in said
        checkpoints = run_folder(tiny_cached) / "checkpoints"
        assert [path.name for path in checkpoints.iterdir()] == ["step_00000002.pt"]
        assert run(tiny_cached, settings(steps=3)).done == ["student"]

    @pytest.mark.parametrize("lr", [0.05, 1e-30])
    def test_the_best_student_is_beside_the_last_and_predicts(
        self, tiny_cached: Path, lr: float
    ) -> None:
        """The first of equals, also where a stop lies between them."""
        config = settings(steps=4, validate_every=1, optimiser={"lr": lr})
        with at_step(2, lambda: os.kill(os.getpid(), signal.SIGTERM)):
            assert not run(tiny_cached, config).done
        assert run(tiny_cached, config).done == ["student"]
        best, of_best = load_student(run_folder(tiny_cached) / "best.pt")
        last, of_last = load_student(run_folder(tiny_cached) / "student.pt")
        lines = metric_lines(run_folder(tiny_cached) / "metrics.jsonl")
        dice = {line["step"]: line["validation_dice"] for line in lines if "loss" not in line}
        first = max(dice, key=lambda step: sum(dice[step].values()))
        assert first == (2 if lr == 0.05 else 1)
        assert (best.steps, best.validation_dice) == (first, dice[first])
        assert (last.steps, last.validation_dice) == (4, dice[4])
        assert best.run_digest == last.run_digest
        weights = zip(of_best.state_dict().values(), of_last.state_dict().values(), strict=True)
        assert all(torch.equal(a, b) for a, b in weights) == (lr == 1e-30)

    def test_rules_are_learnt_by_the_last_validation_itself(
        self, tiny_cached: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """A run that was killed before its student was written predicts once more."""
        predicted, tried = [], []
        logits = StudentWindows.logits

        def best(rules: list[Rule], dice: list[list[float]]) -> Rule:
            tried.append((rules, dice))
            return rules[1]

        def counted(self: StudentWindows, hu: Any) -> Any:
            predicted.append(hu.shape)
            return logits(self, hu)

        monkeypatch.setattr(training, "best_rule", best)
        monkeypatch.setattr(StudentWindows, "logits", counted)
        run(tiny_cached)
        student = run_folder(tiny_cached) / "student.pt"
        before, whole, cases = student.read_bytes(), list(tried), len(predicted)
        rules = load_student(student)[0].postprocessing
        assert list(rules) == list(ORGANS)
        assert [rules[organ] for organ in ORGANS] == [found[1] for found, _ in whole]
        assert {len(dice) for _, of_cases in whole for dice in of_cases} == {3}
        assert cases == 3  # all that validate, once
        for name in ("student.pt", "finished.json"):
            (run_folder(tiny_cached) / name).unlink()
        run(tiny_cached)
        assert student.read_bytes() == before
        assert (len(predicted), tried) == (2 * cases, whole * 2)

    def test_the_record_says_what_it_was_made_from(self, tiny_cached: Path) -> None:
        run(tiny_cached, settings(augment={"flip_axes": [0, 2]}))
        record, network = load_student(run_folder(tiny_cached) / "student.pt")
        marker = json.loads((run_folder(tiny_cached) / "finished.json").read_text())
        assert record.run_digest == marker["run_digest"]
        assert record.mirrored == (0, 2)
        assert record.spacing_mm == (12.0, 12.0, 12.0)
        assert record.steps == marker["steps"] == 2
        assert not any("adapter" in name for name in network.state_dict())


class TestCalibrated:
    """`supervision.calibrated`: temperatures come from the cache and are part of the run."""

    def settings(self, *, calibrated: bool = True, kind: str = "ms_kd") -> TrainStudentConfig:
        # No teacher of the tiny cohort is good: all are believed, or none would teach.
        return settings(supervision={"kind": kind, "calibrated": calibrated, "reliability": None})

    def inputs_of(self, registry: Path) -> dict[str, Any]:
        content = json.loads((run_folder(registry) / "config.json").read_text())
        inputs: dict[str, Any] = content["inputs"]
        return inputs

    def records(self, registry: Path) -> list[Path]:
        return sorted((work_of(registry) / "index" / "evidence").glob("*.json"))

    def warm(self, registry: Path, factor: float) -> None:
        """Rewrites what stage one measured, with other temperatures."""
        loaded, work = load_registry(registry, files=False), work_of(registry)
        for number, name in enumerate(ORGANS):
            teacher = read_teacher_index(work, name, loaded.teacher_key(name))
            known = read_evidence(work, loaded, teacher)
            (organ,) = known.organs.values()
            assert organ.calibration is not None
            value = factor + number
            calibration = organ.calibration.model_copy(update={"temperature": value})
            organs = {name: organ.model_copy(update={"calibration": calibration})}
            known = known.model_copy(update={"organs": organs})
            write_evidence(work, loaded, teacher, [], known)

    def test_the_students_log_odds_are_divided(self, tiny_cached: Path) -> None:
        self.warm(tiny_cached, 2.0)
        assert run(tiny_cached, self.settings(calibrated=False)).exit_code == 0
        plain = losses_of(tiny_cached)
        shutil.rmtree(run_folder(tiny_cached))
        assert run(tiny_cached, self.settings()).exit_code == 0
        assert losses_of(tiny_cached) != plain
        assert self.inputs_of(tiny_cached)["temperatures"] == {
            "liver: liver": 2.0,
            "spleen: spleen": 3.0,
        }

    def test_other_temperatures_are_another_run(self, tiny_cached: Path) -> None:
        self.warm(tiny_cached, 2.0)
        run(tiny_cached, self.settings())
        assert run(tiny_cached, self.settings()).skipped == ["student"]
        self.warm(tiny_cached, 2.5)
        with pytest.raises(CheckpointError, match="temperatures"):
            run(tiny_cached, self.settings())

    @pytest.mark.parametrize(("kind", "calibrated"), [("pseudo_label", False), ("marginal", True)])
    def test_who_does_not_use_them_does_not_depend_on_them(
        self, tiny_cached: Path, kind: str, calibrated: bool
    ) -> None:
        config = self.settings(kind=kind, calibrated=calibrated)
        run(tiny_cached, config)
        assert "temperatures" not in self.inputs_of(tiny_cached)
        for record in self.records(tiny_cached):
            record.unlink()
        assert run(tiny_cached, config).skipped == ["student"]

    def test_without_a_record_it_says_to_run_stage_one(self, tiny_cached: Path) -> None:
        self.records(tiny_cached)[0].unlink()
        with pytest.raises(CacheMissing, match="temperature") as caught:
            run(tiny_cached, self.settings())
        assert "pipeline cache-teachers" in str(caught.value)
        assert not run_folder(tiny_cached).exists()
        fill_cache(tiny_cached)
        assert run(tiny_cached, self.settings()).exit_code == 0


class TestReliability:
    """After eight steps no teacher finds its organ, so each is doubted."""

    def doubted(self, registry: Path) -> Any:
        return json.loads((run_folder(registry) / "config.json").read_text())["inputs"]["doubted"]

    def test_who_is_doubted_is_told_recorded_and_part_of_the_run(
        self, tiny_cached: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        run(tiny_cached, settings(steps=1), log=Log())
        assert "adds nothing here" in capsys.readouterr().err
        doubted = self.doubted(tiny_cached)
        (work_of(tiny_cached) / "index" / "evidence").rename(tiny_cached.parent / "elsewhere")
        with pytest.raises(CheckpointError, match="doubted"):
            run(tiny_cached, settings(steps=1))
        # Without labels' witness plausibility is left.
        run(tiny_cached, settings(steps=1).model_copy(update={"run": "other"}), log=Log())
        assert "believed wherever it is plausible" in capsys.readouterr().err
        assert doubted

    @pytest.mark.parametrize(
        "supervision", [{"kind": "pseudo_label"}, {"kind": "ms_kd", "reliability": None}]
    )
    def test_who_does_not_ask_does_not_doubt(
        self, tiny_cached: Path, supervision: dict[str, Any]
    ) -> None:
        run(tiny_cached, settings(steps=1, supervision=supervision))
        found = json.loads((run_folder(tiny_cached) / "config.json").read_text())["inputs"]
        assert "doubted" not in found


@pytest.mark.slow
def test_torchrun_trains_one_student_in_two_processes(tiny_cached: Path) -> None:
    config = tiny_cached.parent / "student.yaml"
    config.write_text(yaml.safe_dump(settings(batch_size=2, steps=3).model_dump(mode="json")))
    torchrun = ["torch.distributed.run", "--max-restarts", "0", "--nproc-per-node", "2"]
    done = run_python(
        "-m", *torchrun, "--master-port", _free_port(),
        "-m", "pipeline.cli", "train-student", "--device", "cpu",
        "-r", tiny_cached, "-w", work_of(tiny_cached), "-c", config, timeout=200,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    # The first process speaks, the other keeps silent.
    assert done.stderr.count("3 steps in 2 processes") == 1
    assert done.stderr.count("train-student: 1 done") == 1
    record, _ = load_student(run_folder(tiny_cached) / "student.pt")
    assert record.steps == 3
    assert len(losses_of(tiny_cached)) == 3
    assert run(tiny_cached, settings(batch_size=2, steps=3)).skipped == ["student"]


def _free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])
