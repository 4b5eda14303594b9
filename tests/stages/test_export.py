"""Export: what is written says what the student says, and nothing else is written."""

from __future__ import annotations

import functools
import json
import shutil
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import nibabel as nib
import numpy as np
import pytest
import torch
from scipy import ndimage
from torch import Tensor, nn

from pipeline.cli.stages import FormatName
from pipeline.data.entries import TeacherEntry
from pipeline.data.labels import Intensity
from pipeline.data.nifti import read_image
from pipeline.data.patches import WindowConfig
from pipeline.data.volume import Grid, Volume
from pipeline.errors import CheckpointError, ConfigError
from pipeline.log import Log
from pipeline.networks.by_name import NetworkConfig
from pipeline.student.checkpoint import load_student, save_student
from pipeline.student.export import write
from pipeline.student.export.parity import LabelCount, Tolerance
from pipeline.student.export.write import FORMATS
from pipeline.student.inference import StudentWindows
from pipeline.student.network import build_student
from pipeline.teachers.load import load_teacher
from stages import export, predict
from stages.export import ExportConfig
from stages.report import StageReport
from tests.stages.stage_contract import StageContract, snapshot
from tests.stages.test_predict import record, write_ct
from tests.tiny import GRID_MM, file_limit, work_of
from tests.unit.student.test_networks_by_name import NAMES, NETWORKS

CPU = torch.device("cpu")
NETWORK = {"channels": [4, 8], "strides": [2], "num_res_units": 0, "norm": "instance"}
COARSE = {"spacing_mm": (3.5, 2.5, 2.0)}
LOOSE = ExportConfig(tolerance=Tolerance(bundle_max_differing_fraction=1.0))


def write_spread_student(path: Path, *, head: str = "softmax", **changes: Any) -> Path:
    """Weights large enough that all labels occur and logits lie far apart."""
    network = NetworkConfig(name="UNet", args=NETWORK)
    intensity = Intensity(window_hu=(-1000, 1000))
    values = {"head": head, "network": network, "intensity": intensity, "trained_on": ("a/1",)}
    found = record(**(values | changes))
    torch.manual_seed(0)
    made = build_student(found.network, len(found.organs), found.head)
    for weights in made.parameters():
        nn.init.normal_(weights, std=0.5)
    save_student(path, found, made)
    return path


def run(
    student: Path,
    formats: Sequence[export.Format],
    output: Path,
    config: ExportConfig = LOOSE,
    *,
    dry_run: bool = False,
    **checked_on: Any,
) -> StageReport:
    wanted = export.Wanted(formats, **checked_on)
    return export.run(config, student, wanted, output, log=Log(quiet=True), dry_run=dry_run)


def told(output: Path, form: str) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((output / form / "export.json").read_text())
    return content


@pytest.fixture
def image(tmp_path: Path) -> Path:
    write_ct(tmp_path / "in" / "ct.nii.gz", "PIR", oblique=True)
    return tmp_path / "in" / "ct.nii.gz"


@dataclass(frozen=True)
class Exported:
    """Of a student in every format; nobody changes its files."""

    student: Path
    image: Path
    output: Path
    report: StageReport

    def copied(self, form: export.Format, output: Path) -> Path:
        shutil.copytree(self.output / form, output / form)
        return output


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Exported]:
    """By the name of the student's head; each is written once."""

    @functools.cache
    def of(head: str) -> Exported:
        folder = tmp_path_factory.mktemp(head)
        write_ct(folder / "in" / "ct.nii.gz", "PIR", oblique=True)
        student = write_spread_student(folder / "student.pt", head=head, **COARSE)
        image, output = folder / "in" / "ct.nii.gz", folder / "out"
        report = run(student, export.FORMATS, output, check_on=image)
        return Exported(student, image, output, report)

    return of


class TestExport(StageContract):
    kill_at = "pipeline.student.export.write:write_json"
    kill_nth = 3  # the bundle's only one; TorchScript writes two
    # Torch numbers the classes in a TorchScript file through all that a process has traced.
    timed: ClassVar[tuple[str, ...]] = ("*.ts", "*/export.json")
    formats: ClassVar[tuple[export.Format, ...]] = ("torchscript", "bundle")

    @pytest.fixture
    def registry(self, tiny_cached: Path) -> Path:
        folder = work_of(tiny_cached) / "students" / "mine"
        folder.mkdir(parents=True)
        write_spread_student(folder / "student.pt", spacing_mm=GRID_MM)
        return tiny_cached

    def run(self, registry: Path, *, dry_run: bool = False) -> StageReport:
        student = work_of(registry) / "students" / "mine"
        return run(student, self.formats, self.output(registry), ExportConfig(), dry_run=dry_run)

    def command(self, registry: Path) -> list[str]:
        formats = [word for form in self.formats for word in ("--format", form)]
        student = work_of(registry) / "students" / "mine" / "student.pt"
        return ["export", "-q", str(student), *formats, "-o", str(self.output(registry))]

    def output(self, registry: Path) -> Path:
        return registry.parent / "exported"

    def units(self, registry: Path) -> set[str]:
        return set(self.formats)

    def remove_one(self, registry: Path) -> str:
        shutil.rmtree(self.output(registry) / "bundle")
        return "bundle"

    def break_one(self, registry: Path) -> Mapping[str, str]:
        """A network that MONAI's own inferers cannot use."""
        args = {"features": [4, 4, 4, 4, 4, 4], "norm": "batch"}
        network = NetworkConfig(name="BasicUNetPlusPlus", args=args)
        student = work_of(registry) / "students" / "mine" / "student.pt"
        write_spread_student(student, spacing_mm=GRID_MM, network=network, patch=(16, 16, 16))
        return {"bundle": "BasicUNetPlusPlus gives a list, not one tensor"}


class TestWhatIsExported:
    @pytest.mark.parametrize("head", ["softmax", "sigmoid"])
    @pytest.mark.parametrize("form", ["torchscript", "torch-export", "onnx"])
    def test_says_what_predict_says(
        self, exported: Callable[[str], Exported], form: export.Format, head: str
    ) -> None:
        report = exported(head).report
        assert (form in report.done, report.exit_code) == (True, 0)
        (parity,) = told(exported(head).output, form)["parity"].values()
        assert parity["organ_voxels"] > 100
        assert parity["differing_voxels"] == 0
        assert 0 <= parity["max_logit_difference"] < 1e-4
        assert parity == next(iter(report.details[form].values()))

    @pytest.mark.parametrize("head", ["softmax", "sigmoid"])
    def test_a_bundle_says_it_in_monais_own_hands(
        self, exported: Callable[[str], Exported], head: str
    ) -> None:
        """The label map is read from what MONAI wrote: ids 3 and 7, the file's geometry."""
        output, report = exported(head).output, exported(head).report
        assert "bundle" in report.done, report.failed
        found = told(output, "bundle")["parity"]
        assert set(found) == {
            "models/model.ts", "run by MONAI on the student grid",
            "run by MONAI on the image's own grid",
        }  # fmt: skip
        exact = found["run by MONAI on the student grid"]
        assert exact["organ_voxels"] > 100
        assert exact["differing_voxels"] == 0
        assert all(dice == 1.0 for dice in exact["dice"].values())
        own = found["run by MONAI on the image's own grid"]
        assert own["voxels"] == read_image(exported(head).image).volume.array.size
        assert 0 < own["differing_fraction"] < 0.6
        assert (output / "bundle" / "LICENSE").read_text().count("  - a\n") == 1

    def test_a_network_of_nnunets_library_is_no_bundle_and_anything_else(
        self, tmp_path: Path, exported: Callable[[str], Exported]
    ) -> None:
        args = NETWORKS[NAMES.index("PlainConvUNet")][1]
        network = NetworkConfig(name="PlainConvUNet", args=args)
        student = write_spread_student(tmp_path / "student.pt", network=network, **COARSE)
        image = exported("softmax").image
        report = run(student, FORMATS, tmp_path / "out", check_on=image)
        assert report.done == ["torchscript", "torch-export", "onnx"], report.failed
        for form in report.done:
            (parity,) = told(tmp_path / "out", form)["parity"].values()
            assert parity["differing_voxels"] == 0
        (error,) = report.failed.values()
        assert "PlainConvUNet is none of MONAI's networks" in str(error)

    def test_a_file_that_is_gone_is_made_again(
        self, tmp_path: Path, exported: Callable[[str], Exported]
    ) -> None:
        student, image = exported("softmax").student, exported("softmax").image
        out = exported("softmax").copied("torchscript", tmp_path / "out")
        for name in ("student.ts", "student.json"):
            (out / "torchscript" / name).unlink()
            assert run(student, ["torchscript"], out, check_on=image).done == ["torchscript"]
        assert run(student, ["torchscript"], out, check_on=image).skipped == ["torchscript"]

    def test_what_it_did_not_write_or_somebody_changed_is_not_replaced(
        self, tmp_path: Path, exported: Callable[[str], Exported]
    ) -> None:
        """Nor removed with the folder; and nothing is computed."""
        student, image = exported("softmax").student, exported("softmax").image
        out = exported("softmax").copied("torchscript", tmp_path / "out")
        folder, again = out / "torchscript", ExportConfig(overlap=0.25)
        whole = {path: path.read_bytes() for path in folder.iterdir()}

        def refused(said: str) -> None:
            before = snapshot(tmp_path)
            for config in (LOOSE, again):
                with pytest.raises(ConfigError) as caught:
                    run(student, ["torch-export", "torchscript"], out, config, check_on=image)
                assert said in str(caught.value)
            assert snapshot(tmp_path) == before

        (folder / "eval").mkdir()
        (folder / "eval" / "labels.nii.gz").write_text("of a user")
        refused(f"{folder / 'eval' / 'labels.nii.gz'}: `pipeline export` did not write this file")
        shutil.rmtree(folder / "eval")
        for name in ("student.ts", "student.json"):
            data = bytearray(whole[folder / name])
            data[-1] ^= 1
            for spoilt in (bytes(data), bytes(data[:-1])):
                (folder / name).write_bytes(spoilt)
                refused(f"{folder / name}: it was changed since `pipeline export` wrote it")
            (folder / name).write_bytes(whole[folder / name])
        (folder / "export.json").unlink()
        refused("student.json: `pipeline export` did not write this file")
        refused("does not replace it, nor student.ts. Move away what is there, or name another")

    def test_the_record_of_an_older_version_has_sizes_alone(
        self, tmp_path: Path, exported: Callable[[str], Exported]
    ) -> None:
        student, image = exported("softmax").student, exported("softmax").image
        out = exported("softmax").copied("torchscript", tmp_path / "out")
        record = told(out, "torchscript")
        del record["sha256"]
        (out / "torchscript" / "export.json").write_text(json.dumps(record))
        assert run(student, ["torchscript"], out, check_on=image).skipped == ["torchscript"]
        again = ExportConfig(overlap=0.25)
        assert run(student, ["torchscript"], out, again, check_on=image).done == ["torchscript"]
        assert "sha256" in told(out, "torchscript")

    @pytest.mark.parametrize("form", ["torchscript", "torch-export", "bundle", "onnx"])
    def test_a_disk_that_refuses_it_fails_that_format_alone(
        self, tmp_path: Path, exported: Callable[[str], Exported], form: export.Format
    ) -> None:
        """As a full disk does: by a limit on the size of files, below that of the network's."""
        student, image = exported("softmax").student, exported("softmax").image
        out = exported("softmax").copied(form, tmp_path / "out")
        before = snapshot(out)
        with file_limit(1024):
            report = run(student, [form, form], out, ExportConfig(overlap=0.25), check_on=image)
        assert (report.done, set(report.failed), report.exit_code) == ([], {form}, 2)
        assert str(report.failed[form]) == (
            f"{out / form}: it cannot be written (File too large). Check free space, quota and "
            "permissions, then run the same command again."
        )
        assert snapshot(out) == before

    def test_the_json_beside_an_onnx_file_is_enough(
        self, tmp_path: Path, exported: Callable[[str], Exported]
    ) -> None:
        """A program that knows nothing else gets the label map of `pipeline predict`."""
        student, image = exported("softmax").student, exported("softmax").image
        predicted = predict.run(
            predict.PredictConfig(), student, predict.chosen_inputs(image, None, None),
            tmp_path / "labels", predict.PredictExecution("cpu"), log=Log(quiet=True),
        )  # fmt: skip
        assert predicted.done == ["ct"]
        found = by_the_json(exported("softmax").output / "onnx" / "student.json", image)
        expected = nib.as_closest_canonical(nib.load(tmp_path / "labels" / "ct.nii.gz"))
        labels = np.asarray(expected.dataobj).transpose(2, 1, 0)
        assert set(np.unique(labels)) == {0, 3, 7}
        assert np.array_equal(found, labels)


def by_the_json(path: Path, image: Path) -> Any:
    """Numpy, SciPy, nibabel and onnxruntime, at the description's word. (D, H, W) in RAS+."""
    import onnxruntime

    says = json.loads(path.read_text())
    assert says["axes"]["axcodes"] == "SAR"
    source = nib.as_closest_canonical(nib.load(image))
    hu = np.asarray(source.dataobj).transpose(2, 1, 0).astype(np.float32)
    old = np.linalg.norm(source.affine[:3, :3], axis=0)[::-1]
    new = np.array(says["spacing_mm"])
    shape = np.maximum(1, np.rint(np.array(hu.shape) * old / new)).astype(int)
    step = new / old
    first = (np.array(hu.shape) - 1) / 2 - step * (shape - 1) / 2

    def linear(array: Any, factor: Any, offset: Any, shape: Any) -> Any:
        return ndimage.affine_transform(
            array, factor, offset=offset, output_shape=tuple(shape), order=1, mode="nearest"
        )

    hu = np.rint(linear(np.rint(hu), step, first, shape))
    low, high = says["intensity"]["window_hu"]
    begin, end = says["intensity"]["scaled_to"]
    scaled = (np.clip(hu, low, high) - low) * ((end - begin) / (high - low)) + begin
    window = says["windows"]["shape"]
    lack = np.maximum(0, np.array(window) - shape)
    pads = [(n // 2, n - n // 2) for n in lack]
    padded = np.pad(scaled, pads, constant_values=says["intensity"]["air"]).astype(np.float32)
    starts = []
    for size, n in zip(padded.shape, window, strict=True):
        every = max(1, int(n * (1 - says["windows"]["overlap"])))
        starts.append([*range(0, size - n, every), size - n])
    axes = [
        np.exp(-((np.arange(n) - (n - 1) / 2) ** 2) / (2 * (says["windows"]["sigma"] * n) ** 2))
        for n in window
    ]
    weight = axes[0][:, None, None] * axes[1][:, None] * axes[2]
    weight = np.maximum(weight, max(weight.min(), 1e-3))
    session = onnxruntime.InferenceSession(str(path.with_name(says["network_file"])))
    num = len(says["output"]["channels"])
    total, norm = np.zeros((num, *padded.shape)), np.zeros(padded.shape)
    for z in starts[0]:
        for y in starts[1]:
            for x in starts[2]:
                box = tuple(slice(a, a + n) for a, n in zip((z, y, x), window, strict=True))
                fed = {says["input"]["name"]: padded[box][None, None]}
                (out,) = session.run([says["output"]["name"]], fed)
                total[(slice(None), *box)] += weight * out[0]
                norm[box] += weight
    inner = tuple(slice(a, a + n) for (a, _), n in zip(pads, shape, strict=True))
    logits = (total / norm)[(slice(None), *inner)]
    target = source.shape[::-1]
    classes = np.argmax([linear(c, 1 / step, -first / step, target) for c in logits], axis=0)
    ids = np.array([says["labels"][name] for name in says["output"]["channels"]])
    return ids[classes]


class TestAsATeacher:
    """Of the next student: the entry in export.json is all that a registry needs."""

    @pytest.mark.parametrize("head", ["softmax", "sigmoid"])
    @pytest.mark.parametrize("form", ["torchscript", "torch-export", "bundle"])
    def test_it_is_loaded_without_trust_and_says_the_same(
        self, exported: Callable[[str], Exported], form: export.Format, head: str
    ) -> None:
        output = exported(head).output
        entry = TeacherEntry.model_validate(told(output, form)["teacher_entry"])
        path = output / entry.weights
        found, network = load_student(exported(head).student)
        window = WindowConfig(shape=found.patch, overlap=0.5)
        teacher = load_teacher("old", entry, path, window=window, batch_size=1, device=CPU)
        array = read_image(exported(head).image).volume.array
        volume = Volume(array, Grid.axis_aligned(array.shape, COARSE["spacing_mm"]))
        said = teacher.predict(volume).logits.array
        logits = StudentWindows(network, found.intensity, found.patch).logits(volume.array)
        for number, organ in enumerate(found.label_space.organs, start=1):
            (channel,) = entry.organs[organ]
            assert logits[number].std() > 0.1
            assert np.abs(said[channel] - logits[number]).max() < 1e-3


class Wrong(nn.Module):
    """The student, but for a little."""

    def __init__(self, network: nn.Module, by: float) -> None:
        super().__init__()
        self.network, self.by = network, by

    def forward(self, image: Tensor) -> Tensor:
        out: Tensor = self.network(image)
        return torch.cat([out[:, :1] + self.by, out[:, 1:]], dim=1)


@pytest.fixture
def written_as(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[..., nn.Module]], None]:
    """Called with what to make of the student's network, another network is written than it."""
    opened = write.open_network

    def put(change: Callable[..., nn.Module]) -> None:
        monkeypatch.setattr(write, "open_network", lambda *a: change(opened(*a)))

    return put


class TestParityIsDemanded:
    @pytest.mark.parametrize("by", [0.5, float("nan")])
    def test_what_is_worse_than_tolerated_is_not_written(
        self, tmp_path: Path, exported: Callable[[str], Exported], written_as: Any, by: float
    ) -> None:
        student, image = exported("softmax").student, exported("softmax").image
        out = exported("softmax").copied("torchscript", tmp_path / "out")
        before = snapshot(out)
        written_as(lambda network: Wrong(network, by))
        again = ExportConfig(overlap=0.25)
        report = run(student, ["torchscript", "onnx"], out, again, check_on=image)
        assert set(report.failed) == {"torchscript", "onnx"}
        assert report.exit_code == 1
        assert "logits differ by up to" in str(report.failed["onnx"])
        assert "Nothing was written" in str(report.failed["onnx"])
        assert snapshot(out) == before

    def test_logits_alone_and_labels_alone_can_fail(
        self, tmp_path: Path, image: Path, written_as: Any
    ) -> None:
        student = write_spread_student(tmp_path / "student.pt", **COARSE)
        written_as(lambda network: Wrong(network, 0.5))
        logits, labels = "logits differ by up to 0.5", "organ voxels differ"
        for tolerance, said, unsaid in (
            (Tolerance(max_differing_fraction=1.0), logits, labels),
            (Tolerance(max_logit_difference=1.0), labels, logits),
        ):
            config = ExportConfig(tolerance=tolerance)
            report = run(student, ["torchscript"], tmp_path / "out", config, check_on=image)
            assert said in str(report.failed["torchscript"])
            assert unsaid not in str(report.failed["torchscript"])
        lax = ExportConfig(tolerance=Tolerance(max_differing_fraction=1, max_logit_difference=1))
        report = run(student, ["torchscript"], tmp_path / "out", lax, check_on=image)
        assert report.done == ["torchscript"]
        assert told(tmp_path / "out", "torchscript")["parity"]["student.ts"]["differing_voxels"] > 0

    def test_a_bundle_of_other_weights_is_refused(
        self, tmp_path: Path, image: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        student = write_spread_student(tmp_path / "student.pt", **COARSE)

        def spoilt(folder: Path, *args: Any, **kwargs: Any) -> None:
            whole(folder, *args, **kwargs)
            config = json.loads((folder / "configs" / "inference.json").read_text())
            transforms = config["preprocessing"]["transforms"]
            transforms[2]["axcodes"] = "SPR"
            (folder / "configs" / "inference.json").write_text(json.dumps(config))

        whole = write.write_bundle
        monkeypatch.setattr(write, "write_bundle", spoilt)
        report = run(student, ["bundle"], tmp_path / "out", check_on=image)
        assert "on the student grid: it does not say" in str(report.failed["bundle"])
        assert list((tmp_path / "out").iterdir()) == []

    def test_a_network_of_fewer_channels_is_refused(
        self, tmp_path: Path, image: Path, written_as: Any
    ) -> None:
        student = write_spread_student(tmp_path / "student.pt", **COARSE)
        written_as(lambda network: nn.Identity())
        report = run(student, ["torchscript"], tmp_path / "out", check_on=image)
        assert "it gives (1, 1, " in str(report.failed["torchscript"])
        assert list((tmp_path / "out").iterdir()) == []

    @pytest.mark.parametrize(
        ("number", "said"), [(0, "MONAI wrote 0 label maps"), (1, "has (2, 2, 2) voxels and lies")]
    )
    def test_what_monai_writes_must_be_of_the_image(
        self,
        tmp_path: Path,
        image: Path,
        monkeypatch: pytest.MonkeyPatch,
        number: int,
        said: str,
    ) -> None:
        from monai.bundle import ConfigParser

        real = ConfigParser.get_parsed_content

        def parsed(parser: Any, name: str, **options: Any) -> Any:
            def save(data: Any) -> None:
                for n in range(number):
                    labels = nib.Nifti1Image(np.zeros((2, 2, 2), dtype=np.uint8), np.eye(4))
                    nib.save(labels, Path(parser["output_dir"]) / f"{n}.nii.gz")

            return save if name == "postprocessing" else real(parser, name, **options)

        student = write_spread_student(tmp_path / "student.pt", **COARSE)
        monkeypatch.setattr(ConfigParser, "get_parsed_content", parsed)
        report = run(student, ["bundle"], tmp_path / "out", check_on=image)
        assert said in str(report.failed["bundle"])
        assert list((tmp_path / "out").iterdir()) == []

    def test_counts_against_numpy(self) -> None:
        rng = np.random.default_rng(0)
        ours, theirs = (rng.integers(0, 3, (5, 6, 7)).astype(np.uint8) for _ in range(2))
        count = LabelCount(record())
        for row in range(5):
            count.add(ours[row], theirs[row])
        parity = count.parity(0.5)
        assert parity.voxels == ours.size
        assert parity.organ_voxels == np.count_nonzero((ours > 0) | (theirs > 0))
        assert parity.differing_voxels == np.count_nonzero(ours != theirs)
        liver, other = ours == 1, theirs == 1
        assert parity.dice["liver"] == 2 * (liver & other).sum() / (liver.sum() + other.sum())


class TestInput:
    def test_without_an_image_nothing_is_written(self, tmp_path: Path) -> None:
        student = write_spread_student(tmp_path / "student.pt")
        with pytest.raises(ConfigError, match="an export is not written unchecked"):
            run(student, ["torchscript"], tmp_path / "out")
        with pytest.raises(ConfigError, match=r"nowhere\.nii: no such file"):
            run(student, ["torchscript"], tmp_path / "out", check_on=tmp_path / "nowhere.nii")

    def test_without_the_packages_of_onnx_the_others_are_written(
        self, tmp_path: Path, image: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        student = write_spread_student(tmp_path / "student.pt", **COARSE)
        monkeypatch.setitem(sys.modules, "onnxruntime", None)
        report = run(student, ["onnx", "torchscript"], tmp_path / "out", check_on=image)
        assert report.done == ["torchscript"]
        assert "not installed (onnxruntime)" in str(report.failed["onnx"])
        assert report.exit_code == 2

    def test_a_compiler_that_fails_is_told_in_a_line(
        self, tmp_path: Path, image: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def fails(*_: Any, **__: Any) -> None:
            raise RuntimeError("no such operator\nand a page of C++")

        student = write_spread_student(tmp_path / "student.pt", **COARSE)
        monkeypatch.setattr(torch.jit, "trace", fails)
        report = run(student, ["torchscript"], tmp_path / "out", check_on=image)
        told = str(report.failed["torchscript"])
        assert "cannot be written as torchscript (RuntimeError: no such operator)." in told
        assert "C++" not in told
        assert report.exit_code == 1

    def test_a_case_of_the_cache_by_name(self, tiny_cached: Path) -> None:
        folder = work_of(tiny_cached) / "students" / "a" / "b"
        folder.mkdir(parents=True)
        student = write_spread_student(folder / "student.pt", spacing_mm=GRID_MM)
        out = tiny_cached.parent / "out"
        run(student, ["torchscript"], out, case="multi-ct/case_001")
        assert told(out, "torchscript")["checked_on"]["name"] == "multi-ct/case_001"
        with pytest.raises(ConfigError, match="no case multi-ct/case_009 is cached"):
            run(student, ["torchscript"], out, case="multi-ct/case_009")
        with pytest.raises(ConfigError, match="--check-on and --case are given"):
            run(student, ["torchscript"], out, case="a/b", check_on=Path("x.nii"))

    def test_a_student_that_is_none(self, tmp_path: Path, image: Path) -> None:
        (tmp_path / "run").mkdir()
        with pytest.raises(CheckpointError, match=r"student\.pt"):
            run(tmp_path / "run", ["onnx"], tmp_path / "out", check_on=image)
        assert not (tmp_path / "out").exists()

    def test_the_command_line_knows_the_formats(self) -> None:
        assert tuple(form.value for form in FormatName) == export.FORMATS


# What the bundle specification asks of metadata.json; MONAI's own schema is fetched from the web.
SCHEMA = {
    "type": "object",
    "properties": {
        "version": {"type": "string"},
        "required_packages_version": {"type": "object"},
        "network_data_format": {
            "type": "object",
            "properties": {
                side: {
                    "type": "object",
                    "additionalProperties": {
                        "type": "object",
                        "properties": {
                            "spatial_shape": {"type": "array", "items": {"type": "integer"}},
                            "value_range": {"type": "array", "items": {"type": "number"}},
                            "channel_def": {"type": "object"},
                            "is_patch_data": {"type": "boolean"},
                        },
                        "required": [
                            "type", "format", "num_channels", "spatial_shape", "dtype",
                            "value_range", "is_patch_data", "channel_def",
                        ],
                    },
                }
                for side in ("inputs", "outputs")
            },
            "required": ["inputs", "outputs"],
        },
    },
    "required": [
        "schema", "version", "changelog", "monai_version", "pytorch_version", "numpy_version",
        "required_packages_version", "task", "description", "authors", "copyright",
        "network_data_format",
    ],
}  # fmt: skip


def test_monais_own_commands_take_the_bundle(tmp_path: Path) -> None:
    """`verify_metadata`, `verify_net_in_out`, `ckpt_export` and `run` of `monai.bundle`."""
    from monai import bundle

    image = tmp_path / "in" / "ct.nii.gz"
    write_ct(image, "LPS")
    student = write_spread_student(tmp_path / "student.pt")
    run(student, ["bundle"], tmp_path / "out", check_on=image)
    folder = tmp_path / "out" / "bundle"
    meta, config = (str(folder / "configs" / f"{n}.json") for n in ("metadata", "inference"))
    (tmp_path / "schema.json").write_text(json.dumps(SCHEMA))
    bundle.verify_metadata(meta_file=meta, filepath=str(tmp_path / "schema.json"))
    bundle.verify_net_in_out(net_id="network_def", meta_file=meta, config_file=config, device="cpu")
    bundle.ckpt_export(
        net_id="network_def", filepath=str(tmp_path / "model.ts"), meta_file=meta,
        ckpt_file=str(folder / "models" / "model.pt"), config_file=config,
    )  # fmt: skip
    assert (tmp_path / "model.ts").stat().st_size > 1000
    bundle.run(
        run_id="run", config_file=config, meta_file=meta, bundle_root=str(folder),
        dataset_dir=str(image.parent), output_dir=str(tmp_path / "labels"),
    )  # fmt: skip
    predict.run(
        predict.PredictConfig(), student, predict.chosen_inputs(image, None, None),
        tmp_path / "ours", predict.PredictExecution("cpu"), log=Log(quiet=True),
    )  # fmt: skip
    theirs, ours = (nib.load(tmp_path / f / "ct.nii.gz") for f in ("labels", "ours"))
    assert np.array_equal(np.asarray(theirs.dataobj), np.asarray(ours.dataobj))
    assert np.allclose(theirs.affine, ours.affine)
    assert set(np.unique(np.asarray(ours.dataobj))) == {0, 3, 7}
