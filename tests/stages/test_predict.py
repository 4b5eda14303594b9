from __future__ import annotations

import json
import os
import shlex
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, ClassVar

import nibabel as nib
import numpy as np
import numpy.typing as npt
import pytest
import torch
from nibabel.orientations import axcodes2ornt, inv_ornt_aff, ornt_transform
from torch import Tensor, nn
from typer.testing import CliRunner

from pipeline.cli import app as cli
from pipeline.cli.app import app
from pipeline.config import file_sha256
from pipeline.data.labels import Intensity
from pipeline.data.nifti import read_image
from pipeline.data.registry import load_registry
from pipeline.errors import CheckpointError, ConfigError, GeometryError
from pipeline.log import Log
from pipeline.networks.by_name import NetworkConfig, build_network
from pipeline.student.checkpoint import StudentRecord, save_student
from pipeline.student.inference import StudentWindows
from pipeline.student.network import build_student
from pipeline.student.predicted import write_label_tables
from stages import predict
from stages.predict import Inputs, PredictConfig, PredictExecution
from stages.report import StageReport
from tests.stages.stage_contract import StageContract, content, snapshot
from tests.tiny import GRID_MM, NETWORK, change_registry

THRESHOLD_HU = 100
SHAPE_XYZ = (9, 11, 13)
SPACING_XYZ = (1.5, 2.0, 3.0)
ORGANS = {"spleen": 7, "liver": 3}


class Threshold(nn.Module):
    """Says liver where HU > THRESHOLD_HU and spleen nowhere; a function of the voxel alone."""

    def forward(self, image: Tensor) -> Tensor:
        return torch.cat([image * 0, image - THRESHOLD_HU, image * 0 - 1e6], dim=1)


def record(**changes: Any) -> StudentRecord:
    values: dict[str, Any] = {
        "network": NETWORK,
        "organs": ORGANS,
        "spacing_mm": tuple(reversed(SPACING_XYZ)),
        "intensity": Intensity(kind="raw"),
        "patch": (8, 8, 8),
        "steps": 1,
        "seed": 0,
        "supervision": {},
        "validation_dice": {},
        "teachers": {},
        "trained_on": (),
        "run_digest": "0" * 64,
    }
    return StudentRecord.model_validate(values | changes)


def write_student(path: Path, *, seed: int = 0, **changes: Any) -> Path:
    torch.manual_seed(seed)
    found = record(**changes)
    channels = len(found.organs) + 1
    path.parent.mkdir(parents=True, exist_ok=True)
    save_student(path, found, build_network(NETWORK, in_channels=1, out_channels=channels))
    return path


def oriented(codes: str, *, oblique: bool = False, shear: float = 0.0) -> npt.NDArray[np.float64]:
    """4 x 4 affine (x, y, z) of a file stored in an orientation, with an odd origin."""
    affine = np.diag([*SPACING_XYZ, 1.0])
    affine[:3, 3] = (-31.5, 12.25, 400.0)
    affine[1:3, 2] = SPACING_XYZ[2] * np.array([np.sin(shear), np.cos(shear)])
    if oblique:
        a, b = np.deg2rad(12), np.deg2rad(-7)
        about_x = np.array([[1, 0, 0], [0, np.cos(a), -np.sin(a)], [0, np.sin(a), np.cos(a)]])
        about_z = np.array([[np.cos(b), -np.sin(b), 0], [np.sin(b), np.cos(b), 0], [0, 0, 1]])
        affine[:3, :3] = about_x @ about_z @ affine[:3, :3]
    return np.asarray(affine @ inv_ornt_aff(_from_ras(codes), SHAPE_XYZ))


def file_shape(codes: str) -> tuple[int, ...]:
    """The file's sizes, so that those in RAS are SHAPE_XYZ."""
    goes_to = _from_ras(codes)[:, 0].astype(int).tolist()
    return tuple(SHAPE_XYZ[goes_to.index(axis)] for axis in range(3))


def _from_ras(codes: str) -> npt.NDArray[np.float64]:
    return np.asarray(ornt_transform(axcodes2ornt("RAS"), axcodes2ornt(tuple(codes))))


def write_ct(
    path: Path, codes: str = "RAS", *, seed: int = 0, dtype: str = "int16", **how: Any
) -> npt.NDArray[Any]:
    """Noise in HU, stored in an orientation; returns the array in file order."""
    rng = np.random.default_rng(seed)
    array = rng.integers(-1000, 1000, file_shape(codes)).astype(dtype)
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(nib.Nifti1Image(array, oriented(codes, **how)), path)
    return array


def run(
    student: Path,
    images: Path,
    output: Path,
    config: PredictConfig | None = None,
    *,
    dry_run: bool = False,
) -> StageReport:
    return predict.run(
        config or PredictConfig(),
        student,
        Inputs(predict.find_inputs(images)),
        output,
        PredictExecution("cpu", dry_run=dry_run),
        log=Log(quiet=True),
    )


@pytest.fixture
def student(tmp_path: Path) -> Path:
    return write_student(tmp_path / "student.pt")


@pytest.fixture
def threshold_of(student: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Called with what its record says, the student becomes one with `Threshold` as its network."""

    def put(**changes: Any) -> None:
        write_student(student, **changes)
        loaded = record(**changes), Threshold()
        monkeypatch.setattr(predict, "load_student", lambda path: loaded)

    return put


@pytest.fixture
def threshold(threshold_of: Callable[..., None]) -> None:
    """The student's network is replaced by `Threshold`."""
    threshold_of()


def test_parts_are_removed_as_the_student_learnt_it(
    tmp_path: Path, threshold_of: Callable[..., None]
) -> None:
    """Two bright blobs are liver to this network; the rule keeps the larger one."""
    image = np.full(file_shape("RAS"), -500, dtype=np.int16)
    image[1:6, 1:6, 1:6], image[7:9, 8:10, 9:11] = 900, 900
    nib.save(nib.Nifti1Image(image, oriented("RAS")), tmp_path / "ct.nii.gz")
    threshold_of(postprocessing={"liver": "largest"})
    maps = {}
    for kept in (True, False):
        output = tmp_path / str(kept)
        config = PredictConfig(postprocessing=kept)
        assert run(tmp_path / "student.pt", tmp_path / "ct.nii.gz", output, config).exit_code in (
            0,
            2,
        )
        maps[kept] = nib.load(output / "ct.nii.gz").get_fdata() == ORGANS["liver"]
        beside = json.loads((output / "ct.json").read_text("utf-8"))
        voxel_ml = float(np.prod(SPACING_XYZ)) / 1000
        told = {"rules": {"liver": "largest"}, "removed_ml": {"liver": round(8 * voxel_ml, 3)}}
        assert beside.get("postprocessing") == (told if kept else None)
    assert maps[False].sum() == 125 + 8
    assert maps[True].sum() == 125
    assert not (maps[True] & ~maps[False]).any()


class TestPredict(StageContract):
    kill_at = "pipeline.student.predict:write_like"
    # The command line is given the dataset's folder, so that its tables are there.
    timed: ClassVar[tuple[str, ...]] = ("multi-ct/labels.*",)

    @pytest.fixture
    def registry(self, tiny_registry: Path) -> Path:
        write_student(
            tiny_registry.parent / "student.pt", spacing_mm=GRID_MM, intensity=Intensity()
        )
        return tiny_registry

    def _inputs(self, registry: Path) -> dict[str, Path]:
        cases = load_registry(registry, files=False).cases("multi-ct")
        return {case.name: case.image for case in cases}

    def run(self, registry: Path, *, dry_run: bool = False) -> StageReport:
        return predict.run(
            PredictConfig(),
            registry.parent / "student.pt",
            Inputs(self._inputs(registry)),
            self.output(registry),
            PredictExecution("cpu", dry_run=dry_run),
            log=Log(quiet=True),
        )

    def command(self, registry: Path) -> list[str]:
        # The command line names label maps by file; the stage, by case.
        folder = next(iter(self._inputs(registry).values())).parent
        return [
            "predict", "-q", "--device", "cpu", str(registry.parent / "student.pt"), str(folder),
            "-o", str(self.output(registry) / "multi-ct"),
        ]  # fmt: skip

    def output(self, registry: Path) -> Path:
        return registry.parent / "predictions"

    def units(self, registry: Path) -> set[str]:
        return set(self._inputs(registry))

    def remove_one(self, registry: Path) -> str:
        name = sorted(self.units(registry))[1]
        (self.output(registry) / f"{name}.nii.gz").unlink()
        (self.output(registry) / f"{name}.json").unlink()
        return name

    def break_one(self, registry: Path) -> Mapping[str, str]:
        name, path = sorted(self._inputs(registry).items())[1]
        path.write_bytes(path.read_bytes()[:1000])
        return {name: "not a readable NIfTI file"}


class TestGeometry:
    @pytest.mark.usefixtures("threshold")
    @pytest.mark.parametrize(
        "how",
        [{}, {"oblique": True}, {"shear": 0.44}, {"oblique": True, "shear": -0.3}],
        ids=["straight", "oblique", "sheared", "oblique and sheared"],
    )
    @pytest.mark.parametrize("codes", ["RAS", "LPS", "PIR", "LIA"])
    def test_every_voxel_stays_where_the_file_has_it(
        self, student: Path, tmp_path: Path, codes: str, how: dict[str, Any]
    ) -> None:
        image = tmp_path / "in" / "ct.nii.gz"
        array = write_ct(image, codes, **how)
        assert run(student, image, tmp_path / "out").done == ["ct"]
        found = nib.load(tmp_path / "out" / "ct.nii.gz")
        expected = np.where(array > THRESHOLD_HU, ORGANS["liver"], 0)
        assert 0 < expected.mean() < ORGANS["liver"]
        assert np.array_equal(np.asarray(found.dataobj), expected)
        assert found.get_data_dtype() == np.uint8
        source = nib.load(image)
        assert np.array_equal(found.affine, source.affine)
        assert nib.aff2axcodes(found.affine) == tuple(codes)
        assert found.header.get_zooms() == source.header.get_zooms()
        for code in ("qform_code", "sform_code"):
            assert found.header[code] == source.header[code]

    @pytest.mark.parametrize("shear", [0.0, 0.44])
    @pytest.mark.parametrize("codes", ["RAS", "PIR"])
    def test_another_grid_moves_no_organ(
        self,
        student: Path,
        tmp_path: Path,
        threshold_of: Callable[..., None],
        codes: str,
        shear: float,
    ) -> None:
        threshold_of(spacing_mm=(2.0, 2.5, 2.0))
        image = tmp_path / "in" / "ct.nii.gz"
        write_ct(image, codes, shear=shear)
        source = nib.load(image)
        array = np.full(source.shape, -500, dtype=np.int16)
        block = tuple(slice(1, n // 2 + 1) for n in array.shape)
        array[block] = 700
        nib.save(nib.Nifti1Image(array, source.affine), image)
        run(student, image, tmp_path / "out")
        found = np.asarray(nib.load(tmp_path / "out" / "ct.nii.gz").dataobj) > 0
        both = 2 * np.count_nonzero(found & (array > 0))
        assert both / (np.count_nonzero(found) + np.count_nonzero(array > 0)) > 0.85
        middle = np.argwhere(found).mean(axis=0) - np.argwhere(array > 0).mean(axis=0)
        assert np.abs(middle).max() < 0.5


class TestSigmoidStudent:
    def test_the_likeliest_organ_wins_and_background_where_none_is_likely(
        self, tmp_path: Path
    ) -> None:
        """Through a file of weights: one channel per organ, none for background."""
        args = {"channels": [4, 8], "strides": [1], "num_res_units": 0, "norm": None}
        network = build_student(NetworkConfig(name="UNet", args=args), 2, "sigmoid")
        torch.manual_seed(0)
        for weights in network.parameters():
            nn.init.normal_(weights, std=0.3)
        found = record(head="sigmoid", network=NetworkConfig(name="UNet", args=args))
        found = found.model_copy(update={"intensity": Intensity(window_hu=(-1000, 1000))})
        save_student(tmp_path / "student.pt", found, network)
        image = tmp_path / "in" / "ct.nii.gz"
        write_ct(image)
        assert run(tmp_path / "student.pt", image, tmp_path / "out").done == ["ct"]
        labels = np.asarray(nib.load(tmp_path / "out" / "ct.nii.gz").dataobj)
        volume = read_image(image).volume
        windows = StudentWindows(network.eval(), found.intensity, found.patch)
        logits = windows.logits(volume.array)
        assert not logits[0].any()
        organs = found.label_space.to_ids(
            np.where(logits[1:].max(axis=0) > 0, logits[1:].argmax(axis=0) + 1, 0).astype(np.uint8)
        )
        assert set(np.unique(organs)) == {0, 3, 7}
        assert np.array_equal(labels.transpose(2, 1, 0), organs)


@pytest.mark.usefixtures("threshold")
class TestNames:
    def test_in_the_header_extension_and_beside(self, student: Path, tmp_path: Path) -> None:
        image = tmp_path / "in" / "patient.7.nii.gz"
        write_ct(image)
        run(student, image, tmp_path / "out")
        beside = json.loads((tmp_path / "out" / "patient.7.json").read_text())
        assert beside["organs"] == ORGANS
        assert beside["image"] == "patient.7.nii.gz"
        extensions = nib.load(tmp_path / "out" / "patient.7.nii.gz").header.extensions
        (comment,) = (e for e in extensions if e.get_code() == 6)
        text = comment.get_content()
        labels = json.loads(text if isinstance(text, str) else text.decode())["labels"]
        assert labels == {"7": "spleen", "3": "liver"}

    def test_total_segmentator_reads_the_names(self, student: Path, tmp_path: Path) -> None:
        """As its `load_multilabel_nifti` does: the first extension, by xmltodict."""
        xmltodict = pytest.importorskip("xmltodict")
        write_ct(tmp_path / "in" / "a.nii.gz")
        run(student, tmp_path / "in", tmp_path / "out")
        content = nib.load(tmp_path / "out" / "a.nii.gz").header.extensions[0].get_content()
        table = xmltodict.parse(content)["CaretExtension"]["VolumeInformation"]["LabelTable"]
        assert {int(e["@Key"]): e["#text"] for e in table["Label"]} == {7: "spleen", 3: "liver"}

    def test_tables_for_itksnap_and_slicer(self, student: Path, tmp_path: Path) -> None:
        write_ct(tmp_path / "in" / "a.nii.gz")
        run(student, tmp_path / "in", tmp_path / "out")
        lines = (tmp_path / "out" / "labels.itksnap.txt").read_text().splitlines()
        assert "# ITK-SnAP Label Description File" in lines
        snap = [shlex.split(line) for line in lines if not line.startswith("#")]
        assert [(row[0], row[-1]) for row in snap] == [
            ("0", "Clear Label"), ("3", "liver"), ("7", "spleen"),
        ]  # fmt: skip
        lines = (tmp_path / "out" / "labels.ctbl").read_text().splitlines()
        assert lines[0] == "# Color table file labels.ctbl"
        slicer = [line.split() for line in lines[2:]]
        assert [row[:2] for row in slicer] == [["0", "background"], ["3", "liver"], ["7", "spleen"]]
        assert [row[2:5] for row in slicer[1:]] == [row[1:4] for row in snap[1:]]


@pytest.mark.usefixtures("threshold")
class TestWhatIsDone:
    def _run(self, student: Path, tmp_path: Path, **config: Any) -> StageReport:
        return run(student, tmp_path / "in", tmp_path / "out", PredictConfig(**config))

    def test_another_student_or_other_settings_are_done_again_and_told(
        self, student: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        """Once for all cases; and of a JSON that does not say whose it is, that nobody knows."""
        for name in "ab":
            write_ct(tmp_path / "in" / f"{name}.nii.gz", seed=ord(name))

        def again(replaced: str, **config: Any) -> None:
            for dry_run in (True, False):
                report = run(
                    student, tmp_path / "in", tmp_path / "out", PredictConfig(**config),
                    dry_run=dry_run,
                )  # fmt: skip
                assert (report.done, report.exit_code) == (["a", "b"], 0)
                assert report.details["replaced"] == {"a": replaced, "b": replaced}
                told = f"replaced: what was there {replaced} (2 of 2 cases: a, b)\n"
                assert told in capsys.readouterr().err

        first = self._run(student, tmp_path)
        assert "replaced" not in {*first.details, *capsys.readouterr().err.split()}
        write_student(student, seed=1)
        again("of another student")
        again("of other settings", overlap=0.25)
        assert self._run(student, tmp_path, overlap=0.25).done == []
        for beside in (tmp_path / "out").glob("*.json"):
            told = json.loads(beside.read_text())
            kept = {k: v for k, v in told.items() if k not in ("image_sha256", "student_sha256")}
            beside.write_text(json.dumps(kept))
        assert self._run(student, tmp_path, overlap=0.25).done == []
        again("of another student, image or settings")

    def test_another_image_of_the_same_name_is_an_error_of_its_case(
        self, student: Path, tmp_path: Path
    ) -> None:
        """A loop over patients whose CTs are all called ct.nii.gz."""
        for name in ("A/ct", "B/ct", "B/other"):
            write_ct(tmp_path / "in" / f"{name}.nii.gz", seed=ord(name[0]))
        path, out = tmp_path / "out" / "ct.nii.gz", tmp_path / "out"
        assert run(student, tmp_path / "in" / "A" / "ct.nii.gz", out).done == ["ct"]
        before = snapshot(out, without=["other.*"])
        a, b = (tmp_path / "in" / name / "ct.nii.gz" for name in "AB")
        for dry_run in (True, False):
            report = run(student, tmp_path / "in" / "B", out, dry_run=dry_run)
            assert (report.exit_code, set(report.failed)) == (2, {"ct"})
            assert report.done == ["other"]
            assert str(report.failed["ct"]) == (
                f"{path}: this is of another image of the same name: of ct.nii.gz whose SHA-256 "
                f"begins with {file_sha256(a)[:12]}; that of {b} begins with "
                f"{file_sha256(b)[:12]}. Name another --output, or give all images in one call by "
                "a pattern in quotes, 'cases/*/ct.nii.gz'. If the image is a new version of that "
                "one, remove this file."
            )
            assert snapshot(out, without=["other.*"]) == before
        path.unlink()
        assert run(student, b, out).done == ["ct"]

    def test_another_image_of_a_case_is_its_new_one(
        self, student: Path, tiny_registry: Path, tmp_path: Path, threshold_of: Callable[..., None]
    ) -> None:
        """Of a registry's, on the command line."""
        threshold_of(spacing_mm=GRID_MM)
        options = ["-r", str(tiny_registry), "--device", "cpu", "-q", "-o", str(tmp_path / "out")]
        result = CliRunner().invoke(cli.app, ["predict", str(student), *options])
        assert (result.exit_code, "replaced" in result.stderr) == (0, False)
        image = tiny_registry.parent / "data" / "multi-ct" / "images" / "case_002.nii.gz"
        source = nib.load(image)
        nib.save(nib.Nifti1Image(np.asarray(source.dataobj)[::-1], source.affine), image)
        result = CliRunner().invoke(cli.app, ["predict", str(student), *options])
        told = "replaced: what was there of another image (1 of 2 cases: multi-ct/case_002)\n"
        assert (result.exit_code, told in result.stderr) == (0, True)
        beside = json.loads((tmp_path / "out" / "multi-ct" / "case_002.json").read_text())
        assert beside["image_sha256"] == file_sha256(image)

    def test_a_label_map_that_is_gone_is_not_done(self, student: Path, tmp_path: Path) -> None:
        write_ct(tmp_path / "in" / "a.nii.gz")
        self._run(student, tmp_path)
        (tmp_path / "out" / "a.nii.gz").unlink()
        assert self._run(student, tmp_path).done == ["a"]

    @pytest.mark.parametrize("checksums", [True, False])
    def test_a_truncated_label_map_is_made_again_and_told(
        self, student: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], checksums: bool
    ) -> None:
        """Also beside a JSON of a version that kept no checksums."""
        write_ct(tmp_path / "in" / "a.nii.gz")
        self._run(student, tmp_path)
        path, whole = tmp_path / "out" / "a.nii.gz", content(tmp_path / "out")
        if not checksums:
            without_checksums(path.with_name("a.json"))
            assert self._run(student, tmp_path).skipped == ["a"]
        path.write_bytes(path.read_bytes()[:-20])
        report = predict.run(
            PredictConfig(), student, Inputs(predict.find_inputs(tmp_path / "in")),
            tmp_path / "out", PredictExecution("cpu"), log=Log(),
        )  # fmt: skip
        assert report.done == ["a"]
        assert "a: made again, because it cannot be read: a.nii.gz" in capsys.readouterr().err
        assert content(tmp_path / "out") == whole

    def test_a_label_map_that_may_not_be_read_is_an_error_of_its_case(
        self, student: Path, tmp_path: Path
    ) -> None:
        for name in "ab":
            write_ct(tmp_path / "in" / f"{name}.nii.gz", seed=ord(name))
        self._run(student, tmp_path)
        path = tmp_path / "out" / "a.nii.gz"
        path.unlink()
        path.mkdir()
        before = content(tmp_path / "out")
        report = self._run(student, tmp_path)
        assert (report.exit_code, set(report.failed), report.skipped) == (2, {"a"}, ["b"])
        assert str(report.failed["a"]) == (
            f"{path}: what is there cannot be read (Is a directory). Check its permissions, or "
            "name another --output."
        )
        assert content(tmp_path / "out") == before

    def test_a_label_map_that_was_corrected_by_hand_is_neither_taken_nor_replaced(
        self, student: Path, tmp_path: Path
    ) -> None:
        for name in "ab":
            write_ct(tmp_path / "in" / f"{name}.nii.gz", seed=ord(name))
        self._run(student, tmp_path)
        path = tmp_path / "out" / "a.nii.gz"
        found = nib.load(path)
        array = np.asarray(found.dataobj).copy()
        array[0] = 7
        nib.save(nib.Nifti1Image(array, found.affine), path)
        before = content(tmp_path / "out", without=["b.*"])
        for overlap in (0.5, 0.25):  # of the same settings, and of others
            report = self._run(student, tmp_path, overlap=overlap)
            assert (report.exit_code, set(report.failed)) == (2, {"a"})
            assert str(report.failed["a"]) == (
                f"{path}: it was changed since `pipeline predict` wrote it: it is neither taken "
                "for what was written nor replaced. Move it away, or name another --output."
            )
            assert "b" in (*report.done, *report.skipped)
            assert content(tmp_path / "out", without=["b.*"]) == before
        path.rename(tmp_path / "mine.nii.gz")
        assert self._run(student, tmp_path).done == ["a", "b"]


@pytest.mark.usefixtures("threshold")
class TestInputs:
    def test_a_bad_file_is_reported_and_the_others_are_done(
        self, student: Path, tmp_path: Path
    ) -> None:
        folder = tmp_path / "in"
        for name in ("a", "cut", "z"):
            write_ct(folder / f"{name}.nii.gz")
        (folder / "cut.nii.gz").write_bytes((folder / "cut.nii.gz").read_bytes()[:200])
        nib.save(nib.Nifti1Image(np.zeros((4, 4, 4, 3), np.int16), np.eye(4)), folder / "4d.nii.gz")
        (folder / "notes.txt").write_text("no image")
        report = run(student, folder, tmp_path / "out")
        assert report.done == ["a", "z"]
        assert set(report.failed) == {"cut", "4d"}
        assert all(isinstance(error, GeometryError) for error in report.failed.values())
        assert report.exit_code == 2
        names = sorted(p.name for p in (tmp_path / "out").iterdir())
        tables = ["labels.ctbl", "labels.itksnap.txt"]
        assert names == ["a.json", "a.nii.gz", *tables, "z.json", "z.nii.gz"]

    def test_what_is_not_hu_is_predicted_with_a_warning_that_stays(
        self, student: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        hu = write_ct(tmp_path / "in" / "fine.nii.gz")
        write_ct(tmp_path / "in" / "offset.nii.gz")
        offset = nib.Nifti1Image((hu // 4 + 1024).astype(np.int16), oriented("RAS"))
        nib.save(offset, tmp_path / "in" / "offset.nii.gz")
        report = run(student, tmp_path / "in", tmp_path / "out")
        assert sorted(report.done) == ["fine", "offset"]
        assert (report.failed, report.to_mend, report.exit_code) == ({}, ["offset"], 2)
        assert "offset: values lie about 1000 too high" in capsys.readouterr().err
        assert "too high" in report.to_json()["warnings"]["offset"][0]
        (kept,) = json.loads((tmp_path / "out" / "offset.json").read_text())["warnings"]
        assert kept["severity"] == "error"
        assert "subtract 1024" in kept["fix"]
        assert "warnings" not in json.loads((tmp_path / "out" / "fine.json").read_text())
        # One that is there is no better for it.
        again = run(student, tmp_path / "in", tmp_path / "out")
        assert (again.done, again.warnings, again.exit_code) == ([], report.warnings, 2)
        assert "offset: values lie about 1000 too high" in capsys.readouterr().err

    def test_what_is_improbable_alone_is_told_and_ends_well(
        self, student: Path, tmp_path: Path
    ) -> None:
        hu = write_ct(tmp_path / "in" / "a.nii.gz")
        windowed = nib.Nifti1Image(np.clip(hu, -160, 240), oriented("RAS"))
        nib.save(windowed, tmp_path / "in" / "a.nii.gz")
        report = run(student, tmp_path / "in", tmp_path / "out")
        assert "the image was windowed" in report.warnings["a"][0]
        assert report.exit_code == 0
        (kept,) = json.loads((tmp_path / "out" / "a.json").read_text())["warnings"]
        assert kept["severity"] == "warning"

    def test_datasets_of_other_units_are_not_asked(
        self, student: Path, tiny_registry: Path, tmp_path: Path, threshold_of: Callable[..., None]
    ) -> None:
        threshold_of(spacing_mm=GRID_MM)
        for path in (tiny_registry.parent / "data" / "multi-ct" / "images").iterdir():
            image = nib.load(path)
            shifted = (np.asarray(image.dataobj) + 1024).astype(np.int16)
            nib.save(nib.Nifti1Image(shifted, image.affine), path)
        command = ["predict", "-q", str(student), "-r", str(tiny_registry), "--device", "cpu", "-o"]
        result = CliRunner().invoke(cli.app, [*command, str(tmp_path / "out")])
        assert result.exit_code == 2
        assert "to mend: multi-ct/case_001: values lie about 1000 too high" in result.stderr
        change_registry(
            tiny_registry, lambda data: data["datasets"]["multi-ct"].update(units="other")
        )
        result = CliRunner().invoke(cli.app, [*command, str(tmp_path / "other")])
        assert (result.exit_code, "warning" in result.stderr) == (0, False)

    def test_an_input_is_never_overwritten(self, student: Path, tmp_path: Path) -> None:
        write_ct(tmp_path / "in" / "a.nii.gz")
        write_ct(tmp_path / "in" / "b.nii")
        before = (tmp_path / "in" / "a.nii.gz").read_bytes()
        with pytest.raises(ConfigError, match=r"a\.nii\.gz: the label map would overwrite this"):
            run(student, tmp_path / "in", tmp_path / "in" / ".." / "in")
        assert (tmp_path / "in" / "a.nii.gz").read_bytes() == before
        assert sorted(path.name for path in (tmp_path / "in").iterdir()) == ["a.nii.gz", "b.nii"]

    def test_names_of_files_and_folders(self, tmp_path: Path) -> None:
        for name in (
            "b.nii.gz",
            "a.nii",
            "._b.nii.gz",
            ".b.nii.gz.12.nii.gz",
            "c.txt",
            "d.nii.txt",
        ):
            (tmp_path / name).write_bytes(b"")
        (tmp_path / "folder.nii.gz").mkdir()  # fails by name when it is opened
        assert list(predict.find_inputs(tmp_path)) == ["a", "b", "folder"]
        assert predict.find_inputs(tmp_path / "a.nii") == {"a": tmp_path / "a.nii"}

    def test_cases_of_a_registry_are_named_by_dataset(self, built_cohort: Path) -> None:
        registry = load_registry(built_cohort, files=False)
        found = predict.chosen_inputs(None, registry, None).images
        folder = built_cohort.parent / "data" / "multi-ct" / "images"
        assert found == {
            f"multi-ct/{case}": folder / f"{case}.nii.gz" for case in ("case_001", "case_002")
        }
        assert len(predict.chosen_inputs(None, registry, ["train", "test"]).images) == 6

    def test_images_or_a_registry_but_not_both(self, built_cohort: Path, tmp_path: Path) -> None:
        registry = load_registry(built_cohort, files=False)
        for images, known, splits in (
            (None, None, None),
            (tmp_path, registry, None),
            (tmp_path, None, ["test"]),
        ):
            with pytest.raises(ConfigError, match="images, or a registry"):
                predict.chosen_inputs(images, known, splits)
        with pytest.raises(ConfigError, match="no case is in none"):
            predict.chosen_inputs(None, registry, ["none"])

    def test_two_files_of_one_name_are_refused(self, tmp_path: Path) -> None:
        for name in ("a.nii.gz", "a.nii"):
            (tmp_path / name).write_bytes(b"")
        with pytest.raises(ConfigError, match=r"a\.nii\.gz and a\.nii would give one label map"):
            predict.find_inputs(tmp_path)

    @pytest.mark.parametrize("name", ["absent.nii.gz", "absent", "empty", "text.txt"])
    def test_nothing_there_is_an_error(self, tmp_path: Path, name: str) -> None:
        (tmp_path / "empty").mkdir()
        (tmp_path / "text.txt").write_text("")
        with pytest.raises(ConfigError, match="no NIfTI file and no DICOM series there"):
            predict.find_inputs(tmp_path / name)


def test_digests_of_label_maps_that_are_there_hold() -> None:
    """A younger setting counts where somebody sets it."""
    assert PredictConfig().digested() == {"overlap": 0.5}
    assert PredictConfig(postprocessing=False).digested() == {
        "overlap": 0.5, "postprocessing": False,
    }  # fmt: skip


def test_other_ids_are_another_prediction(student: Path, tmp_path: Path) -> None:
    """Of the same weights; and where somebody wrote other ids into the JSON."""
    write_ct(tmp_path / "in" / "a.nii.gz")
    run(student, tmp_path / "in", tmp_path / "out")
    beside = tmp_path / "out" / "a.json"
    first = json.loads(beside.read_text())
    beside.write_text(json.dumps({**first, "organs": {"spleen": 3, "liver": 7}}))
    assert run(student, tmp_path / "in", tmp_path / "out").done == ["a"]
    assert json.loads(beside.read_text()) == first
    write_student(student, organs={"spleen": 3, "liver": 7})
    assert run(student, tmp_path / "in", tmp_path / "out").done == ["a"]
    again = json.loads(beside.read_text())
    assert again["organs"] == {"spleen": 3, "liver": 7}
    assert again["digest"] != first["digest"]


def without_checksums(beside: Path) -> None:
    """As versions before them wrote the JSON."""
    content = json.loads(beside.read_text())
    del content["files"]
    beside.write_text(json.dumps(content))


@pytest.mark.usefixtures("threshold")
class TestFilesOfOthers:
    """Nothing is computed, and all are named at once."""

    def _refused(self, student: Path, tmp_path: Path, *said: str, **known: Any) -> None:
        before = snapshot(tmp_path)
        inputs = Inputs(
            predict.find_inputs(tmp_path / "in"), references=known.pop("references", ())
        )
        for dry_run in (True, False):
            with pytest.raises(ConfigError) as caught:
                predict.run(
                    PredictConfig(), student, inputs, tmp_path / "out",
                    PredictExecution("cpu", dry_run=dry_run, **known), log=Log(quiet=True),
                )  # fmt: skip
            for text in said:
                assert text in str(caught.value)
        assert snapshot(tmp_path) == before

    def test_a_json_of_dcm2niix(self, student: Path, tmp_path: Path) -> None:
        write_ct(tmp_path / "in" / "ct.nii")
        write_ct(tmp_path / "in" / "a.nii")
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "ct.json").write_text('{"ConversionSoftware": "dcm2niix"}')
        (tmp_path / "out" / "ct.nii.gz").symlink_to("not-fetched")
        self._refused(
            student, tmp_path, f"{tmp_path / 'out' / 'ct.json'}: `pipeline predict` did not write "
            "this file and does not replace it, nor ct.nii.gz. Move away what is there, or name "
            "another --output.",
        )  # fmt: skip

    def test_a_json_that_names_organs_alone(self, student: Path, tmp_path: Path) -> None:
        write_ct(tmp_path / "in" / "ct.nii")
        write_ct(tmp_path / "out" / "ct.nii.gz")
        (tmp_path / "out" / "ct.json").write_text(json.dumps({"organs": ORGANS}))
        self._refused(student, tmp_path, "ct.json", "nor ct.nii.gz")

    def test_probabilities_and_tables(self, student: Path, tmp_path: Path) -> None:
        write_ct(tmp_path / "in" / "ct.nii.gz")
        write_ct(tmp_path / "out" / "ct.probabilities" / "liver.nii.gz")
        kept = predict.Probabilities("float16")
        self._refused(student, tmp_path, "liver.nii.gz: `pipeline pred", probabilities=kept)
        shutil.rmtree(tmp_path / "out")
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "labels.ctbl").write_bytes(b"1 Leber 0 0 0 255\n\xff")
        self._refused(student, tmp_path, "labels.ctbl: `pipeline predict` did not write this file")

    @pytest.mark.parametrize(
        ("layout", "other", "file"),
        [
            ("4d", "ct.probabilities", "ct.probabilities.nii.gz"),
            ("per-organ", "ct.probabilities/liver", "ct.probabilities/liver.nii.gz"),
        ],
    )
    def test_two_cases_of_one_file(
        self, student: Path, tmp_path: Path, layout: Any, other: str, file: str
    ) -> None:
        for name in ("ct", other):
            write_ct(tmp_path / "in" / f"{name}.nii.gz")
        inputs = predict.find_inputs(tmp_path / "in" / "**" / "*.nii.gz")
        kept = predict.Probabilities("float16", layout)
        with pytest.raises(ConfigError) as caught:
            predict.run(
                PredictConfig(), student, Inputs(inputs), tmp_path / "out",
                PredictExecution("cpu", probabilities=kept), log=Log(quiet=True),
            )  # fmt: skip
        assert f"{tmp_path / 'out' / file}: ct and {other} would both" in str(caught.value)
        assert not (tmp_path / "out").exists()

    def test_notes_within_the_folder_of_probabilities_stay(
        self, student: Path, tmp_path: Path
    ) -> None:
        write_ct(tmp_path / "in" / "ct.nii.gz")
        kept = predict.Probabilities("float16")
        how, log = PredictExecution("cpu", probabilities=kept), Log(quiet=True)
        inputs, out = Inputs(predict.find_inputs(tmp_path / "in")), tmp_path / "out"
        predict.run(PredictConfig(), student, inputs, out, how, log=log)
        (out / "ct.probabilities" / "notes.txt").write_text("mine")
        write_student(student, organs={"spleen": 7, "kidney": 3}, seed=1)
        assert predict.run(PredictConfig(), student, inputs, out, how, log=log).done == ["ct"]
        assert run(student, tmp_path / "in", out, PredictConfig(overlap=0.25)).done == ["ct"]
        assert [p.name for p in (out / "ct.probabilities").iterdir()] == ["notes.txt"]

    def test_references_and_images_by_whatever_name(self, student: Path, tmp_path: Path) -> None:
        """Even beside a JSON that says that `predict` wrote them."""
        write_ct(tmp_path / "in" / "ct.nii.gz")
        run(student, tmp_path / "in", tmp_path / "out")
        made = tmp_path / "out" / "ct.nii.gz"
        (tmp_path / "labels").mkdir()
        os.link(made, tmp_path / "labels" / "ct.nii.gz")
        said = f"{made}: the label map would overwrite this image or reference. Name another"
        references = [tmp_path / "absent.nii.gz", tmp_path / "labels" / "ct.nii.gz"]
        self._refused(student, tmp_path, said, references=references)
        made.unlink()
        made.symlink_to(tmp_path / "in" / "ct.nii.gz")
        self._refused(student, tmp_path, said)

    def test_labels_of_a_registry_on_the_command_line(
        self, student: Path, tiny_registry: Path, tmp_path: Path
    ) -> None:
        labels = tiny_registry.parent / "data" / "multi-ct" / "labels"
        target = tmp_path / "out" / "multi-ct" / "case_002.nii.gz"
        target.parent.mkdir(parents=True)
        os.link(labels / target.name, target)
        before = snapshot(tmp_path)
        command = ["predict", str(student), "-r", str(tiny_registry), "-o", str(tmp_path / "out")]
        result = CliRunner().invoke(app, [*command, "--device", "cpu", "-q"])
        assert isinstance(result.exception, ConfigError)
        assert f"{target}: the label map would overwrite this image or" in str(result.exception)
        assert snapshot(tmp_path) == before

    def test_a_json_may_name_no_file_of_another_case(self, student: Path, tmp_path: Path) -> None:
        write_ct(tmp_path / "in" / "ct.nii.gz")
        run(student, tmp_path / "in", tmp_path / "out")
        beside = tmp_path / "out" / "ct.json"
        for name in ("ct.probabilities/../../in/ct.nii.gz", "labels.ctbl"):
            beside.write_text(json.dumps({**json.loads(beside.read_text()), "files": {name: ""}}))
            self._refused(student, tmp_path, "ct.json: `pipeline predict` did not write")

    def test_a_table_in_other_colours_stays_and_one_of_another_student_goes(
        self, student: Path, tmp_path: Path, threshold_of: Callable[..., None]
    ) -> None:
        write_ct(tmp_path / "in" / "ct.nii.gz")
        run(student, tmp_path / "in", tmp_path / "out")
        tables = [tmp_path / "out" / name for name in ("labels.ctbl", "labels.itksnap.txt")]
        for path in tables:
            path.write_text(path.read_text().replace(" 242 ", " 1 ").replace("7 ", "7  "))
        before = [path.read_text() for path in tables]
        run(student, tmp_path / "in", tmp_path / "out")
        assert [path.read_text() for path in tables] == before
        threshold_of(organs={"left kidney": 4})
        self._refused(student, tmp_path, "labels.itksnap.txt: `pipeline predict` did not write")
        for path in tables:
            path.unlink()
        write_label_tables(tmp_path / "out", record(organs={"spleen": 2}))
        write_label_tables(tmp_path / "out", record(organs={"left kidney": 4}))
        assert all("kidney" in path.read_text() for path in tables)


def test_a_student_that_is_none_stops_before_anything_is_written(tmp_path: Path) -> None:
    write_ct(tmp_path / "in" / "a.nii.gz")
    (tmp_path / "student.pt").write_text("no")
    with pytest.raises(CheckpointError, match=r"student\.pt"):
        run(tmp_path / "student.pt", tmp_path / "in", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_cases_that_the_student_was_trained_on_are_told(
    tiny_registry: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Another split than the student's own, say: scores of its training cases are no test."""
    student = write_student(
        tmp_path / "student.pt",
        spacing_mm=GRID_MM, intensity=Intensity(), trained_on=("multi-ct/case_001", "a/case_002"),
    )  # fmt: skip
    inputs = predict.chosen_inputs(None, load_registry(tiny_registry), ["test"])
    predict.run(
        PredictConfig(), student, inputs, tmp_path / "out",
        PredictExecution("cpu", dry_run=True), log=Log(quiet=True),
    )  # fmt: skip
    assert " ".join(capfd.readouterr().err.split())[8:] == (
        " warning: this student was trained on multi-ct/case_001: scores of them say nothing about "
        "new patients."
    )


def test_a_registry_whose_test_cases_the_hash_leaves_out(tiny_registry: Path) -> None:
    few = {"validation": 0.2, "test": 0.1}
    for name in ("liver-ct", "spleen-ct", "multi-ct"):
        change_registry(tiny_registry, lambda d, n=name: d["datasets"][n].update(split=few))
    with pytest.raises(ConfigError, match=r"no case is in test\.") as caught:
        predict.chosen_inputs(None, load_registry(tiny_registry), None)
    assert "another --split; dataset liver-ct: none of its 3 cases falls into" in str(caught.value)
