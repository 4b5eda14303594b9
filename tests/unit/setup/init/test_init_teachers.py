from __future__ import annotations

import json
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from pipeline.data.registry import Registry, load_registry
from pipeline.errors import PipelineError
from pipeline.setup.init.begin import InitRequest, begin, describe
from pipeline.teachers.bundle_files import contradictions
from pipeline.teachers.checkpoint import read_teacher
from pipeline.teachers.nnunet_folder import check_against_registry, read_model_folder
from tests.blobs import write_blobs
from tests.tiny import change_json

LABELS = {"background": 0, "liver": 1, "cancer": 2}


def model(path: Path, labels: dict[str, Any] | None = None, **dataset: Any) -> Path:
    """A trained nnU-Net's folder without a network in it."""
    (path / "fold_0").mkdir(parents=True)
    (path / "fold_0" / "checkpoint_final.pth").touch()
    plans = {"configurations": {}, "transpose_forward": [0, 1, 2], "image_reader_writer": "x"}
    (path / "plans.json").write_text(json.dumps(plans))
    content = {"channel_names": {"0": "CT"}, "labels": labels or LABELS} | dataset
    (path / "dataset.json").write_text(json.dumps(content))
    return path


def bundle(path: Path, postprocessing: dict[str, Any]) -> Path:
    channels = {"0": "background", "1": "liver", "2": "Left_Kidney", "3": "Right_Kidney"}
    data = {"outputs": {"pred": {"num_channels": 4, "channel_def": channels}}}
    (path / "configs").mkdir(parents=True)
    (path / "configs" / "metadata.json").write_text(json.dumps({"network_data_format": data}))
    config = {"postprocessing": {"_target_": "Compose", "transforms": [postprocessing]}}
    (path / "configs" / "inference.json").write_text(json.dumps(config))
    (path / "models").mkdir()
    (path / "models" / "model.pt").touch()
    return path


def exported(path: Path, *names: str) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        for name in names:
            archive.writestr(f"net/{name}", "")
    return path


TORCHSCRIPT = ("constants.pkl", "code/net.py", "data.pkl")
SOFTMAX = {"_target_": "Activationsd", "keys": "pred", "softmax": True}


def start(
    folder: Path,
    *teachers: str,
    organs: Sequence[str] = ("liver",),
    ask: Callable[[str], str] | None = None,
) -> Registry:
    (folder / "d" / "images").mkdir(parents=True, exist_ok=True)
    (folder / "d" / "labels").mkdir(exist_ok=True)
    for part in ("images", "labels"):
        (folder / "d" / part / "a.nii.gz").touch()
    path = folder / "data_registry.yaml"
    begin(path, InitRequest([f"d={folder}/d:liver=1"], teachers, organs=organs), ask=ask)
    return load_registry(path)


def refused(folder: Path, *teachers: str) -> str:
    with pytest.raises(PipelineError) as caught:
        start(folder, *teachers)
    assert caught.value.exit_code == 2
    assert not (folder / "data_registry.yaml").exists()
    return str(caught.value)


class TestNnunet:
    def test_a_training_that_did_not_finish_gives_its_best_checkpoint(self, tmp_path: Path) -> None:
        fold = model(tmp_path / "T__P__3d_fullres") / "fold_0"
        (fold / "checkpoint_final.pth").rename(fold / "checkpoint_best.pth")
        entry = start(tmp_path, f"liver={fold.parent}:background=rest").teachers["liver"]
        assert read_model_folder(fold.parent, entry).checkpoints == {
            "0": fold / "checkpoint_best.pth"
        }
        text = (tmp_path / "data_registry.yaml").read_text()
        assert "nnunet: {checkpoint: checkpoint_best.pth}" in text
        assert "# folds that have a best, no final checkpoint: 0" in text
        _, said, *_ = describe(load_registry(tmp_path / "data_registry.yaml"))
        assert said == "teacher liver (nnunet of checkpoint_best.pth): liver"

    def test_a_model_folder(self, tmp_path: Path) -> None:
        folder = model(tmp_path / "T__P__3d_fullres")
        entry = start(tmp_path, f"msd={folder}:liver=1+2").teachers["msd"]
        assert (entry.kind, entry.organs, entry.num_channels) == ("nnunet", {"liver": (1, 2)}, 3)
        assert entry.activation == "softmax"
        check_against_registry("msd", entry, read_model_folder(folder, entry))

    def test_the_only_model_of_a_dataset(self, tmp_path: Path) -> None:
        results = tmp_path / "Dataset003_Liver"
        model(results / "T__P__3d_fullres")
        entry = start(tmp_path, f"msd={results}:liver=1,background=rest").teachers["msd"]
        assert entry.weights.endswith("T__P__3d_fullres")
        assert entry.organs == {"liver": (1,)}
        model(results / "T__P__2d")
        (tmp_path / "data_registry.yaml").unlink()
        assert "several trained models: T__P__2d" in refused(tmp_path, f"msd={results}:liver=1")

    @pytest.mark.parametrize(
        ("others", "reader", "said"),
        [("IPL", "NibabelIO", "liver"), ("LPS", "NibabelIO", "axes IPL): liver"),
         ("LPS", "NibabelIOWithReorient", "liver")],
    )  # fmt: skip
    def test_it_is_given_the_order_of_axes_that_it_was_trained_in(
        self, tmp_path: Path, others: str, reader: str, said: str
    ) -> None:
        """`other` is stored otherwise, and nnU-Net does not reorient."""
        for name, code in (("Dataset003_Liver", "IPL"), ("other", others)):
            for part in ("images", "labels"):
                write_blobs(tmp_path / name / part / "a.nii.gz", shape=(4, 4, 4), code=code)
        folder = model(tmp_path / "T__P__3d_fullres")
        change_json(
            folder / "plans.json",
            lambda plans: plans.update(dataset_name="Dataset003_Liver", image_reader_writer=reader),
        )
        path = tmp_path / "data_registry.yaml"
        datasets = [f"d={tmp_path}/Dataset003_Liver:liver=1", f"e={tmp_path}/other:liver=1"]
        registry = begin(path, InitRequest(datasets, [f"t={folder}:liver=1+2"]))
        assert said in describe(registry)[2]
        given = registry.teachers["t"].nnunet
        assert (given.orientation if given else None) == ("IPL" if "axes" in said else None)
        assert ("is stored as IPL, others here are not" in path.read_text()) == ("axes" in said)

    def test_regions_are_channels_of_a_sigmoid(self, tmp_path: Path) -> None:
        labels = {"background": 0, "liver": [1, 2], "cancer": 2}
        folder = model(tmp_path / "m", labels, regions_class_order=[1, 2])
        entry = start(tmp_path, f"msd={folder}:background=rest").teachers["msd"]
        assert (entry.activation, entry.organs) == ("sigmoid", {"liver": (0,)})
        check_against_registry("msd", entry, read_model_folder(folder, entry))

    def test_whether_a_tumour_belongs_to_its_organ_is_not_guessed(self, tmp_path: Path) -> None:
        folder = model(tmp_path / "m")
        said = refused(tmp_path, f"msd={folder}:liver=1")
        assert "channel 2 (cancer)" in said
        assert "liver=1+2 or background=2" in said
        assert "ignore" not in said
        assert "liver is channel 1, not 2" in refused(tmp_path, f"msd={folder}:liver=2")

    def test_two_input_channels_are_no_ct(self, tmp_path: Path) -> None:
        folder = model(tmp_path / "m", channel_names={"0": "T1", "1": "T2"})
        assert "2 input channels" in refused(tmp_path, f"msd={folder}:liver=1+2")

    def test_a_channel_of_mr_is_no_ct(self, tmp_path: Path) -> None:
        folder = model(tmp_path / "m", channel_names={"0": "MRI"})
        said = refused(tmp_path, f"msd={folder}:liver=1+2")
        assert "its input channel is MRI, and a teacher is shown CT" in said


class TestBundle:
    def test_a_network_for_mr(self, tmp_path: Path) -> None:
        folder = bundle(tmp_path / "b", SOFTMAX)
        metadata = folder / "configs" / "metadata.json"
        data = json.loads(metadata.read_text())
        data["network_data_format"]["inputs"] = {"image": {"num_channels": 1, "modality": "MR"}}
        metadata.write_text(json.dumps(data))
        assert "its input image is MR, and a teacher is shown CT" in refused(
            tmp_path, f"b={folder}:kidneys=2+3"
        )

    def test_its_metadata_and_its_own_postprocessing(self, tmp_path: Path) -> None:
        folder = bundle(tmp_path / "b", SOFTMAX)
        found = start(tmp_path, f"b={folder}:kidneys=2+3").teachers["b"]
        assert found.organs == {"kidneys": (2, 3), "liver": (1,)}
        assert (found.kind, found.num_channels) == ("monai-bundle", 4)
        metadata = json.loads((folder / "configs" / "metadata.json").read_text())
        assert contradictions(found, metadata) == []

    def test_an_activation_that_nothing_says(self, tmp_path: Path) -> None:
        folder = bundle(tmp_path / "b", {"_target_": "AsDiscreted", "argmax": True})
        assert "activation=softmax" in refused(tmp_path, f"b={folder}:background=rest")
        flag = f"b={folder}:background=rest,activation=sigmoid"
        assert start(tmp_path, flag).teachers["b"].activation == "sigmoid"

    def test_what_its_files_say_is_not_said_otherwise(self, tmp_path: Path) -> None:
        folder = bundle(tmp_path / "b", SOFTMAX)
        said = refused(tmp_path, f"b={folder}:background=rest,activation=sigmoid")
        assert "its own files say it" in said

    def test_a_bundle_without_weights(self, tmp_path: Path) -> None:
        folder = bundle(tmp_path / "b", SOFTMAX)
        (folder / "models" / "model.pt").rename(folder / "models" / "model.ts")
        assert "model.ts with kind `exported`" in refused(tmp_path, f"b={folder}")


class TestFiles:
    @pytest.mark.parametrize("names", [TORCHSCRIPT, ("archive_format", "models/model.json")])
    def test_an_exported_file_says_nothing_of_its_preprocessing(
        self, tmp_path: Path, names: tuple[str, ...]
    ) -> None:
        file = exported(tmp_path / "net.pt", *names)
        said = refused(tmp_path, f"x={file}")
        assert "nothing names its output channels" in said
        assert "activation=softmax,spacing=1.5x1.5x1.5,orientation=RAS,window=-160..240" in said
        entry = start(
            tmp_path,
            f"x={file}:liver=1,activation=softmax,spacing=3x1.5x1,orientation=LPS,window=-100..300",
        ).teachers["x"]
        assert (entry.kind, entry.spacing_mm, entry.orientation) == ("exported", (3, 1.5, 1), "LPS")
        assert entry.intensity.window_hu == (-100, 300)

    def test_questions_are_put_until_they_are_answered(self, tmp_path: Path) -> None:
        file = exported(tmp_path / "net.pt", *TORCHSCRIPT)
        answers = iter(["soft", "sigmoid", "2x2x2", "RAS", "-100..200", "liver=0"])
        entry = start(tmp_path, f"x={file}", ask=lambda question: next(answers)).teachers["x"]
        assert (entry.activation, entry.spacing_mm) == ("sigmoid", (2, 2, 2))
        assert entry.organs == {"liver": (0,)}

    def test_our_own_checkpoint_says_all(self, tiny_registry: Path, tmp_path: Path) -> None:
        file = tiny_registry.parent / "teachers" / "liver.pt"
        record, _ = read_teacher(file)
        entry = start(tmp_path, f"liver={file}").teachers["liver"]
        assert (entry.kind, entry.organs) == ("checkpoint", record.channels)
        assert entry.num_channels == record.num_channels
        assert (entry.spacing_mm, entry.intensity) == (record.spacing_mm, record.intensity)
        text = (tmp_path / "data_registry.yaml").read_text()
        assert f"# trained on {record.trained_on}" in text
        assert "taps: []" in text
        # It is trained: an entry that names its dataset would be trained again.
        assert entry.trained_on is None

    def test_weights_alone_and_other_things(self, tmp_path: Path) -> None:
        weights = exported(tmp_path / "w.pt", "data.pkl")
        assert "weights alone" in refused(tmp_path, f"x={weights}")
        (tmp_path / "t.txt").write_text("hello")
        assert "no file of a network" in refused(tmp_path, f"x={tmp_path}/t.txt")
        assert "neither a trained nnU-Net" in refused(tmp_path, f"x={tmp_path}/d")
        assert "no such file" in refused(tmp_path, f"x={tmp_path}/nowhere")
