"""Predict: several devices, patterns of files, probabilities, and a case of any length."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any, ClassVar

import nibabel as nib
import numpy as np
import pytest
import torch
from nibabel.cmdline import convert
from scipy.special import softmax

from pipeline.config import file_sha256
from pipeline.data.labels import Intensity
from pipeline.data.nifti import read_image
from pipeline.errors import ConfigError
from pipeline.log import Log
from pipeline.student.checkpoint import load_student, save_student
from pipeline.student.ensemble import averaged
from pipeline.student.inference import StudentWindows
from pipeline.student.network import build_student
from pipeline.student.predicted import Probabilities
from stages import predict
from stages.predict import PredictConfig
from stages.report import StageReport
from tests.stages.stage_contract import content, snapshot
from tests.stages.test_predict import SPACING_XYZ, record, write_ct, write_student
from tests.tiny import RunCli, file_limit, run_python

CPU = torch.device("cpu")


def run(student: Path, images: Path, output: Path, **options: Any) -> StageReport:
    return predict.run(
        PredictConfig(), student, predict.chosen_inputs(images, None, None), output,
        predict.PredictExecution(**{"device": "cpu", **options}), log=Log(quiet=True),
    )  # fmt: skip


@pytest.fixture
def student(tmp_path: Path) -> Path:
    return write_student(tmp_path / "student.pt")


@pytest.mark.slow  # each process imports torch and MONAI
class TestSeveralDevices:
    def test_the_same_files_come_out(self, student: Path, tmp_path: Path) -> None:
        for number in range(5):
            write_ct(tmp_path / "in" / f"{number}.nii.gz", seed=number)
        kept = Probabilities("float16")
        one = run(student, tmp_path / "in", tmp_path / "one", probabilities=kept)
        two = run(student, tmp_path / "in", tmp_path / "two", probabilities=kept, device="cpu,cpu")
        assert set(two.done) == set(one.done) == set("01234")
        assert two.num_bytes == one.num_bytes
        assert content(tmp_path / "two") == content(tmp_path / "one")
        before = snapshot(tmp_path / "two")
        again = run(student, tmp_path / "in", tmp_path / "two", probabilities=kept)
        assert (again.done, set(again.skipped)) == ([], set("01234"))
        assert snapshot(tmp_path / "two") == before


def test_one_file_of_probabilities_is_none_without_probabilities(
    tmp_path: Path, run_cli: RunCli
) -> None:
    asked = ("predict", "s.pt", "ct.nii.gz", "-o", str(tmp_path), "--probabilities-4d")
    code, _, said = run_cli(*asked)
    assert (code, list(tmp_path.iterdir())) == (2, [])
    assert "Add --probabilities float16." in said


class TestPatterns:
    def test_folders_from_the_first_wildcard_on_are_part_of_names(self, tmp_path: Path) -> None:
        for name in ("p1/ct.nii.gz", "p2/ct.nii.gz", "p2/.hidden/ct.nii.gz", "p3/mr.nii"):
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).write_bytes(b"")
        found = predict.find_inputs(tmp_path / "*" / "ct.nii.gz")
        assert list(found) == ["p1/ct", "p2/ct"]
        assert set(predict.find_inputs(tmp_path / "**" / "*.nii*")) == {"p1/ct", "p2/ct", "p3/mr"}
        assert list(predict.find_inputs(tmp_path / "p?" / "m*.nii")) == ["p3/mr"]
        with pytest.raises(ConfigError, match="no NIfTI file and no DICOM series there"):
            predict.find_inputs(tmp_path / "*" / "pet.nii.gz")

    def test_what_a_shell_made_of_a_pattern(self, tmp_path: Path) -> None:
        for name in ("p1/ct.nii.gz", "p2/ct.nii.gz", "p2/other.nii.gz"):
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).write_bytes(b"")
        one, two, other = (
            tmp_path / n for n in ("p1/ct.nii.gz", "p2/ct.nii.gz", "p2/other.nii.gz")
        )
        assert predict.find_inputs(one, other, one) == {"ct": one, "other": other}
        with pytest.raises(ConfigError, match=r"p2/ct.nii.gz and .*p1/ct.nii.gz would give one"):
            predict.find_inputs(one, two)

    def test_a_name_with_brackets_is_a_file_if_it_is_there(self, tmp_path: Path) -> None:
        (tmp_path / "ct[1].nii.gz").write_bytes(b"")
        assert list(predict.find_inputs(tmp_path / "ct[1].nii.gz")) == ["ct[1]"]


class TestWhatIsTaken:
    def test_endings_in_capitals(self, tmp_path: Path) -> None:
        for name in ("a.NII.GZ", "b.Nii"):
            path = tmp_path / name.lower()
            nib.save(nib.Nifti1Image(np.zeros((3, 3, 3), np.int16), np.eye(4)), path)
            path.rename(tmp_path / name)
        found = predict.find_inputs(tmp_path)
        assert {name: path.name for name, path in found.items()} == {"a": "a.NII.GZ", "b": "b.Nii"}
        assert all(read_image(path).volume.array.shape == (3, 3, 3) for path in found.values())

    def test_what_is_left_is_told(self, tmp_path: Path) -> None:
        images = tmp_path / "in"
        for name in ("a.nii", "a.json", "b.json", "notes", "deep/er/x.nii.gz", "none/x.dcm"):
            (images / name).parent.mkdir(parents=True, exist_ok=True)
            (images / name).touch()
        nib.save(nib.Nifti1Pair(np.zeros((3, 3, 3), np.int16), np.eye(4)), images / "old.hdr")
        left: list[str] = []
        assert list(predict.find_inputs(images, left=left)) == ["a"]
        assert left == [
            f"{images}: {text}"
            for text in (
                f"Pairs of .hdr and .img are not read (old): `nib-convert {images}/old.hdr "
                f"{images}/old.nii.gz` makes one file.",
                f"Folders are not looked into (deep with NIfTI files): the pattern "
                f"'{images}/**/*.nii*' takes all.",
                "Other files are not taken: 2 .json, 1 without ending (a.json, b.json, notes).",
                "Folders without NIfTI files: none.",
            )
        ]
        # What it says works.
        convert.main([str(images / "old.hdr"), str(images / "old.nii.gz")])
        assert read_image(images / "old.nii.gz").volume.array.shape == (3, 3, 3)
        assert list(predict.find_inputs(Path(f"{images}/**/*.nii*"))) == ["a", "deep/er/x", "old"]

    def test_a_folder_without_any_says_what_is_there(self, tmp_path: Path) -> None:
        (tmp_path / "slice.dcm").touch()
        told = r"no NIfTI file and no DICOM series there. .*not taken: 1 .dcm"
        with pytest.raises(ConfigError, match=told):
            predict.find_inputs(tmp_path)

    def test_a_name_that_cannot_be_opened_fails_alone_and_what_is_left_is_warned_of(
        self, student: Path, tmp_path: Path, run_cli: RunCli
    ) -> None:
        images, report = tmp_path / "in", tmp_path / "run.json"
        write_ct(images / "a.nii.gz")
        (images / "b.nii.gz").symlink_to("none")
        (images / "c.nii.gz").mkdir()
        (images / os.fsdecode(b"\xfc.nii")).touch()
        (images / "notes.txt").touch()
        code, _, said = run_cli(
            "predict", str(student), str(images), "-o", str(tmp_path / "out"), "-q", "--device",
            "cpu", "--report", str(report)
        )  # fmt: skip
        assert (code, (tmp_path / "out" / "a.nii.gz").is_file()) == (2, True)
        assert "Other files are not taken: 1 .txt (notes.txt)." in said
        (stage,) = json.loads(report.read_text())["stages"]
        assert (stage["done"], len(stage["not_taken"])) == (["a"], 1)
        assert {name: why.split("(")[1].split(")")[0] for name, why in stage["failed"].items()} == {
            "b": "No such file or directory; it is a link to none",
            "c": "it is a folder",
            r"\xfc": "its name is not UTF-8",
        }

    def test_a_folder_whose_name_has_wildcards(self, tmp_path: Path) -> None:
        for name in ("ct[x]/a.nii.gz", "ctx/b.nii.gz", "ct[x]/?/c.nii.gz", "ct[x]/d/e.nii.gz"):
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).touch()
        assert list(predict.find_inputs(tmp_path / "ct[x]" / "*.nii.gz")) == ["a"]
        assert list(predict.find_inputs(tmp_path / "ct[x]" / "?" / "*.nii.gz")) == ["c"]
        assert list(predict.find_inputs(tmp_path / "ct[a-z]" / "*.nii.gz")) == ["ctx/b"]
        assert list(predict.find_inputs(tmp_path / "*" / "d" / "**.nii.gz")) == ["ct[x]/d/e"]
        with pytest.raises(ConfigError, match="no NIfTI file and no DICOM series there"):
            predict.find_inputs(tmp_path / "ct[x]" / "none.nii.gz")

    def test_linked_folders_are_followed_and_a_circle_is_an_error(self, tmp_path: Path) -> None:
        (tmp_path / "elsewhere").mkdir()
        (tmp_path / "elsewhere" / "b.nii.gz").touch()
        (tmp_path / "in").mkdir()
        (tmp_path / "in" / "batch").symlink_to("../elsewhere")
        pattern = tmp_path / "in" / "**" / "*.nii.gz"
        assert list(predict.find_inputs(pattern)) == ["batch/b"]
        (tmp_path / "elsewhere" / "up").symlink_to("../in")
        with pytest.raises(ConfigError, match=r"the link \S+/batch/up leads in a circle"):
            predict.find_inputs(pattern)


class TestProbabilities:
    @pytest.mark.parametrize("head", ["softmax", "sigmoid"])
    def test_each_organs_in_the_geometry_of_the_file(self, tmp_path: Path, head: str) -> None:
        """Against the logits, made whole: on the student's own grid nothing is resampled."""
        path = tmp_path / "student.pt"
        found = record(head=head)
        torch.manual_seed(0)
        save_student(path, found, build_student(found.network, len(found.organs), found.head))
        image = tmp_path / "in" / "ct.nii.gz"
        write_ct(image, "PIR", oblique=True)
        run(path, image, tmp_path / "out", probabilities=Probabilities("float32"))
        whole = tmp_path / "whole"
        run(path, image, whole, probabilities=Probabilities("float16", "4d"))
        record_, network = load_student(path)
        windows = StudentWindows(network, record_.intensity, record_.patch)
        logits = windows.logits(read_image(image).volume.array)
        if head == "softmax":
            expected = softmax(logits.astype(np.float64), axis=0)[1:]
        else:
            expected = 1 / (1 + np.exp(-logits[1:].astype(np.float64)))
        fourth = nib.load(whole / "ct.probabilities.nii.gz")
        source = nib.load(image)
        assert fourth.shape == (*source.shape, 2)
        for number, organ in enumerate(["liver", "spleen"]):
            file = tmp_path / "out" / "ct.probabilities" / f"{organ}.nii.gz"
            found_ = read_float(file)
            assert np.allclose(found_, expected[number], atol=1e-6)
            assert expected[number].std() > 1e-3
            loaded = nib.load(file)
            assert np.array_equal(loaded.affine, source.affine)
            assert loaded.get_data_dtype() == np.float32
            exact = np.asarray(loaded.dataobj)
            rounded = np.asarray(fourth.dataobj)[..., number]
            assert np.array_equal(rounded, exact.astype(np.float16).astype(np.float32))

    def test_they_agree_with_the_label_map_on_another_grid(
        self, student: Path, tmp_path: Path
    ) -> None:
        write_student(student, spacing_mm=(2.0, 2.5, 2.0))
        image = tmp_path / "in" / "ct.nii.gz"
        write_ct(image)
        run(student, image, tmp_path / "out", probabilities=Probabilities("float32"))
        labels = np.asarray(nib.load(tmp_path / "out" / "ct.nii.gz").dataobj)
        liver, spleen = (
            np.asarray(nib.load(tmp_path / f"out/ct.probabilities/{organ}.nii.gz").dataobj)
            for organ in ("liver", "spleen")
        )
        background = 1 - liver - spleen
        assert np.array_equal(labels == 3, (liver > background) & (liver >= spleen))
        assert np.array_equal(labels == 7, (spleen > background) & (spleen > liver))

    def test_asked_for_later_they_are_made_and_of_an_old_student_they_go(
        self, student: Path, tmp_path: Path
    ) -> None:
        image, out = tmp_path / "in" / "ct.nii.gz", tmp_path / "out"
        write_ct(image)
        run(student, image, out)
        kept = Probabilities("float16")
        assert run(student, image, out, probabilities=kept).done == ["ct"]
        assert run(student, image, out, probabilities=kept).skipped == ["ct"]
        assert run(student, image, out).skipped == ["ct"]
        (out / "ct.probabilities" / "liver.nii.gz").unlink()
        assert run(student, image, out, probabilities=kept).done == ["ct"]
        again = run(student, image, out, probabilities=Probabilities("float32"))
        assert again.details == {"replaced": {"ct": "with other probabilities"}}
        write_student(student, seed=1)
        again = run(student, image, out)
        gone = "of another student, whose probabilities are removed"
        assert again.details == {"replaced": {"ct": gone}}
        assert sorted(p.name for p in out.iterdir()) == [
            "ct.json", "ct.nii.gz", "labels.ctbl", "labels.itksnap.txt",
        ]  # fmt: skip

    def test_a_failure_leaves_no_scratch(self, student: Path, tmp_path: Path) -> None:
        write_ct(tmp_path / "in" / "ct.nii.gz")
        kept = Probabilities("float16")
        with file_limit(2000):
            report = run(student, tmp_path / "in", tmp_path / "out", probabilities=kept)
        assert set(report.failed) == {"ct"}
        assert [p for p in (tmp_path / "out").rglob("*") if p.suffix != ".txt"] == [
            tmp_path / "out" / "labels.ctbl"
        ]


def read_float(path: Path) -> Any:
    """(D, H, W) in RAS+, unrounded."""
    image = nib.as_closest_canonical(nib.load(path))
    return np.asarray(image.dataobj).transpose(2, 1, 0)


_PEAK = """
import resource, sys
from pathlib import Path
from pipeline.log import Log
from stages import predict
from tests.tiny import RunCli
student, image, output = map(Path, sys.argv[1:])
report = predict.run(
    predict.PredictConfig(overlap=0.25), student, predict.chosen_inputs(image, None, None), output,
    predict.PredictExecution("cpu"), log=Log(quiet=True))
assert report.done == ["ct"], report.failed
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


@pytest.mark.slow
def test_a_case_five_times_as_long_takes_little_more_memory(
    tmp_path: Path, record_property: Any
) -> None:
    """38 classes: held whole, the logits of the long case alone would take 0.8 GB."""
    organs = {f"organ {n}": n for n in range(1, 38)}
    student = write_student(
        tmp_path / "student.pt", organs=organs, patch=(16, 96, 96), spacing_mm=(3.0, 2.0, 1.5)
    )
    peaks = []
    for times in (1, 5):
        image = tmp_path / str(times) / "ct.nii.gz"
        image.parent.mkdir()
        array = np.random.default_rng(0).integers(-1000, 1000, (96, 96, 120 * times))
        nib.save(nib.Nifti1Image(array.astype(np.int16), np.diag([*SPACING_XYZ, 1.0])), image)
        done = run_python("-c", _PEAK, student, image, tmp_path / f"o{times}", timeout=300)
        assert done.returncode == 0, done.stderr
        peaks.append(int(done.stdout) / 1024)
    voxels = 96 * 96 * 600
    logits_mib = 38 * 4 * voxels / 2**20
    record_property("peaks and logits in MiB", (*peaks, logits_mib))
    assert logits_mib > 750
    # The image (bytes, int16), its label map (uint8) and a compressed copy: some bytes per voxel.
    assert peaks[1] - peaks[0] < 16 * voxels / 2**20


class TestEnsembles:
    """On the student's own grid, where nothing is resampled and a window holds the whole image."""

    WHOLE: ClassVar[dict[str, Any]] = {"patch": (16, 16, 16)}

    def logits(self, student: Path, image: Path, *, axes: tuple[int, ...] = ()) -> Any:
        found, network = load_student(student)
        array = found.intensity.apply(read_image(image).volume.array)
        missing = [(m - n, (m - n) // 2) for m, n in zip(found.patch, array.shape, strict=True)]
        pads = [(before, both - before) for both, before in missing]
        window = np.flip(np.pad(array, pads, constant_values=found.intensity.air), axes)
        with torch.inference_mode():
            out = network(torch.from_numpy(window.copy())[None, None])[0].numpy()
        inside = [slice(b, n - a) for (b, a), n in zip(pads, found.patch, strict=True)]
        return np.flip(out, tuple(axis + 1 for axis in axes))[(slice(None), *inside)]

    def _probabilities(self, folder: Path) -> Any:
        organs = ("liver", "spleen")
        return np.stack([read_float(folder / "ct.probabilities" / f"{o}.nii.gz") for o in organs])

    @pytest.mark.parametrize("mirror", [False, True])
    def test_logits_of_students_and_mirror_images_are_averaged(
        self, tmp_path: Path, mirror: bool
    ) -> None:
        image, out = tmp_path / "in" / "ct.nii.gz", tmp_path / "out"
        write_ct(image)
        mirrored = ((0, 2), (0, 1, 2))  # what both saw is taken
        students = [
            write_student(tmp_path / f"{n}.pt", seed=n, mirrored=mirrored[n], **self.WHOLE)
            for n in (0, 1)
        ]
        inputs = predict.chosen_inputs(image, None, None)
        how = predict.PredictExecution("cpu", probabilities=Probabilities("float32"))
        config = PredictConfig(mirror=mirror)
        report = predict.run(config, students, inputs, out, how, log=Log(quiet=True))
        assert report.done == ["ct"]
        flips: list[tuple[int, ...]] = [(), (0,), (2,), (0, 2)] if mirror else [()]
        each = [self.logits(one, image, axes=flip) for one in students for flip in flips]
        expected = softmax(np.mean(each, axis=0, dtype=np.float64), axis=0)[1:]
        assert np.allclose(self._probabilities(out), expected, atol=1e-5)
        alone = softmax(each[0].astype(np.float64), axis=0)[1:]
        assert not np.allclose(alone, expected, atol=1e-3)
        told = json.loads((out / "ct.json").read_text())
        assert told["averaged_with"] == [file_sha256(students[1])]
        assert told["settings"].get("mirror", False) is mirror
        assert predict.run(config, students, inputs, out, how, log=Log(quiet=True)).skipped
        again = predict.run(config, students[0], inputs, out, how, log=Log(quiet=True))
        assert again.details["replaced"] == {"ct": "of another student"}

    def test_rules_are_those_of_all_and_cases_those_of_any(self, tmp_path: Path) -> None:
        rules: list[dict[str, Any]] = [{"liver": "largest", "spleen": 2.0}, {"liver": "largest"}]
        both = {
            tmp_path / str(n): (
                record(postprocessing=rules[n], trained_on=[f"d/{n}"]), torch.nn.Identity(),
            )
            for n in (0, 1)
        }  # fmt: skip
        common, _ = averaged(both, mirror=False)
        assert common.postprocessing == {"liver": "largest"}
        assert common.trained_on == ("d/0", "d/1")

    @pytest.mark.parametrize(
        ("changes", "said"),
        [
            ({"organs": {"spleen": 7, "kidney": 3}}, "organs"),
            ({"spacing_mm": (1.0, 1.0, 1.0)}, "spacing in mm"),
            ({"head": "sigmoid"}, "head"),
            ({"intensity": Intensity()}, "intensity"),
            ({"patch": (16, 16, 16)}, "patch"),
        ],
        ids=["organs", "spacing", "head", "intensity", "patch"],
    )
    def test_students_that_differ_are_refused_by_name(
        self, tmp_path: Path, changes: dict[str, Any], said: str
    ) -> None:
        students = {
            tmp_path / "a.pt": (record(), torch.nn.Identity()),
            tmp_path / "b.pt": (record(**changes), torch.nn.Identity()),
        }
        with pytest.raises(ConfigError) as caught:
            averaged(students, mirror=False)
        assert f"{tmp_path / 'b.pt'}: it differs from {tmp_path / 'a.pt'} in {said}: " in str(
            caught.value
        )

    @pytest.mark.parametrize(
        ("one", "other", "said"),
        [
            ({"mirrored": (0,)}, {}, "b.pt: this student was not trained with mirrored patches"),
            ({"mirrored": (0,)}, {"mirrored": (1,)}, "a.pt: the students were mirrored along diff"),
            (
                {"mirrored": (1, 2), "organs": {"kidney_left": 1, "kidney_right": 2}},
                {"mirrored": (1, 2), "organs": {"kidney_left": 1, "kidney_right": 2}},
                "a.pt: a mirrored patient has left for right, which the student tells apart: "
                "kidney_left, kidney_right.",
            ),
        ],
        ids=["not mirrored", "other axes", "sides"],
    )
    def test_mirror_images_that_a_student_does_not_know_are_refused(
        self, tmp_path: Path, one: dict[str, Any], other: dict[str, Any], said: str
    ) -> None:
        students = {
            tmp_path / "a.pt": (record(**one), torch.nn.Identity()),
            tmp_path / "b.pt": (record(**other), torch.nn.Identity()),
        }
        with pytest.raises(ConfigError) as caught:
            averaged(students, mirror=True)
        assert said in str(caught.value)

    def test_on_the_command_line(self, student: Path, tmp_path: Path, run_cli: RunCli) -> None:
        other = write_student(tmp_path / "other.pt", seed=1)
        write_ct(tmp_path / "in" / "ct.nii.gz")
        command = ["predict", str(student), str(tmp_path / "in"), "-o", str(tmp_path / "out"), "-q",
                   "--device", "cpu", "--with"]  # fmt: skip
        code, _, said = run_cli(*command, str(other), "--mirror")
        assert (code, "not trained with mirrored patches" in said) == (2, True)
        code, _, said = run_cli(*command, str(student))
        assert (code, "this student is given twice" in said) == (2, True)
        assert not (tmp_path / "out").exists()
        assert run_cli(*command, str(other))[0] == 0
        told = json.loads((tmp_path / "out" / "ct.json").read_text())
        assert told["averaged_with"] == [file_sha256(other)]
