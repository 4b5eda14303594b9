"""Loading model folders: what is refused, what is said of them, and that nothing is run."""

from __future__ import annotations

import builtins
import textwrap
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pipeline.data.entries import TeacherEntry
from pipeline.data.nifti import read_image
from pipeline.data.volume import Grid, Volume
from pipeline.errors import OutputsError, TeacherError
from pipeline.teachers import nnunet
from pipeline.teachers.nnunet import read_checkpoint
from pipeline.teachers.teacher import organ_log_odds
from tests.blobs import write_blobs
from tests.nnunet_models import copy_model
from tests.tiny import change_json
from tests.unit.teachers.teacher_contract import StoredNetworkContract, refusal
from tests.unit.teachers.test_nnunet_parity import entry_of, load

# Making the model folders takes more than ten seconds.
pytestmark = pytest.mark.slow


@pytest.fixture
def model(nnunet_models: Mapping[str, Path], tmp_path: Path) -> Path:
    """A copy of the folder of two folds, to be damaged."""
    return copy_model(nnunet_models["labels"], tmp_path)


def refused(model: Path, match: str, **changes: Any) -> str:
    return refusal(match, str(model), lambda: load(model, entry_of("labels", **changes)))


def change_checkpoint(
    model: Path, change: Callable[[dict[str, Any]], object], fold: int = 0
) -> None:
    path = model / f"fold_{fold}" / "checkpoint_final.pth"
    content = torch.load(path, weights_only=False)
    change(content)
    torch.save(content, path)


def change_plans(model: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Changes the configuration 3d_fullres."""
    change_json(model / "plans.json", lambda p: change(p["configurations"]["3d_fullres"]))


class TestNnunet(StoredNetworkContract):
    spacing_mm = (2, 2, 2)
    shape = (24, 28, 26)
    no_weights = "not a checkpoint of tensors"
    numbers = tuple(
        {"nnunet": options}
        for options in (
            {"folds": [0, 1]},
            {"folds": [0]},
            {"folds": [0], "tile_step": 0.7},
            {"folds": [0], "mirroring": False, "orientation": "LPS"},
        )
    )

    @pytest.fixture
    def path(self, model: Path) -> Path:
        return model

    def entry(self, **changes: Any) -> TeacherEntry:
        return entry_of("labels", **{"nnunet": {"folds": [0], "mirroring": False}, **changes})

    def weights_file(self, path: Path) -> Path:
        return path / "fold_0" / "checkpoint_final.pth"

    def put_nan(self, path: Path) -> None:
        def nan(content: dict[str, Any]) -> None:
            next(iter(content["network_weights"].values())).view(-1)[0] = torch.nan

        change_checkpoint(path, nan)


def test_what_it_says_of_itself(model: Path) -> None:
    said = load(model, entry_of("labels")).describe()
    assert said["configuration"] == "3d_fullres"
    assert said["folds"] == ["0", "1"]
    assert said["mirror_axes"] == [0, 1, 2]
    assert said["orientation"] == "stored"
    assert said["nnunetv2"] == "2.8"
    # Said and left out mean the same.
    spelt = {"folds": [0, 1], "mirroring": True, "orientation": "stored"}
    assert load(model, entry_of("labels", nnunet=spelt)).describe() == said


def test_a_network_that_ends_in_a_softmax_is_noticed(model: Path, tmp_path: Path) -> None:
    """As a network class that plans.json names might; nnU-Net's own do not."""
    entry = entry_of("labels")
    teacher = load(model, entry)
    write_blobs(tmp_path / "scan.nii.gz", shape=(30, 36, 34))
    image = read_image(tmp_path / "scan.nii.gz").volume
    organ_log_odds(teacher.predict(image), entry, where="x")
    teacher.predictor.network.register_forward_hook(
        lambda network, inputs, out: torch.softmax(out, 1)
    )
    with pytest.raises(OutputsError, match="are probabilities, not logits") as caught:
        organ_log_odds(teacher.predict(image), entry, where="x")
    assert "use a teacher of kind `factory`, with" in caught.value.fix


def test_checkpoints_are_read_without_running_code(model: Path) -> None:
    path = model / "fold_0" / "checkpoint_final.pth"
    content = torch.load(path, weights_only=False)
    # It holds what torch alone would refuse.
    assert isinstance(content["_best_ema"], np.float64)
    with pytest.raises(Exception, match="Weights only load failed"):
        torch.load(path, weights_only=True)
    read = read_checkpoint(path)
    assert read.configuration == "3d_fullres"
    assert read.trainer == "nnUNetTrainer"
    for name, tensor in content["network_weights"].items():
        assert torch.equal(read.weights[name], tensor)


def test_a_checkpoint_saved_again_as_the_documentation_shows(model: Path) -> None:
    text = Path("docs/teachers.md").read_text(encoding="utf-8")
    snippet = text.split("```python")[1].split("```")[0].replace("fold_0", str(model / "fold_0"))
    exec(textwrap.dedent(snippet), {})
    plain = entry_of("labels", nnunet={"checkpoint": "checkpoint_plain.pth"})
    again, first = load(model, plain), load(model, entry_of("labels", nnunet={"folds": [0]}))
    (weights,), (wanted,) = (t.predictor.list_of_parameters for t in (again, first))
    assert all(torch.equal(weights[name], wanted[name]) for name in wanted)
    assert again.describe()["mirror_axes"] == first.describe()["mirror_axes"]


@pytest.mark.parametrize("content", [[1], {"state_dict": {}}, {"network_weights": {}}])
def test_a_tensor_file_from_elsewhere(content: object, model: Path) -> None:
    torch.save(content, model / "fold_0" / "checkpoint_final.pth")
    refused(model, "not one that nnU-Net v2 wrote")


def test_weights_that_do_not_fit(model: Path) -> None:
    change_checkpoint(model, lambda c: c["network_weights"].popitem(), fold=1)
    assert "built by code of its own" in refused(model, "do not fit the network")


def test_folds_of_different_trainings(model: Path) -> None:
    change_checkpoint(model, lambda c: c.update(inference_allowed_mirroring_axes=(0,)), fold=1)
    refused(model, "different trainings")
    load(model, entry_of("labels", nnunet={"folds": [1]}))


def test_a_trainer_without_mirroring(model: Path) -> None:
    for fold in (0, 1):
        change_checkpoint(
            model, lambda c: c.update(inference_allowed_mirroring_axes=None), fold=fold
        )
    assert load(model, entry_of("labels")).describe()["mirror_axes"] == []


@pytest.mark.parametrize(
    "name",
    [
        "os.system",
        "builtins.eval",
        "torch.nn.modules.module.os.system",
        "torch.nn.init",
        "torch.nn._reduction.warnings.warn",
        "torch.hub.load",
        "dynamic_network_architectures.nothing.Here",
        "tests.unit.teachers.made_teachers.Payload",
        7,
    ],
)
@pytest.mark.parametrize("place", ["network_class_name", "conv_op"])
def test_code_that_plans_name_is_not_run(place: str, name: Any, model: Path) -> None:
    def change(configuration: dict[str, Any]) -> None:
        architecture = configuration["architecture"]
        part = architecture if place == "network_class_name" else architecture["arch_kwargs"]
        part[place] = name

    change_plans(model, change)
    assert "factory" in refused(model, "as a part of the network")


@pytest.mark.parametrize("place", ["network_class_name", "conv_op"])
def test_a_module_that_plans_name_is_not_even_imported(
    place: str, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    marker = tmp_path / "imported"
    (tmp_path / f"trap_{place}.py").write_text(f"open({str(marker)!r}, 'w').close()\nNet = 1\n")
    monkeypatch.syspath_prepend(str(tmp_path))

    def change(configuration: dict[str, Any]) -> None:
        architecture = configuration["architecture"]
        part = architecture if place == "network_class_name" else architecture["arch_kwargs"]
        part[place] = f"trap_{place}.Net"

    change_plans(model, change)
    refused(model, "as a part of the network")
    assert not marker.exists()


@pytest.mark.parametrize(
    "name", ["torch.nn.Identity", "dynamic_network_architectures.architectures.unet.nn.Identity"]
)
def test_a_network_of_torch_is_no_network_of_nnunet(name: str, model: Path) -> None:
    change_plans(model, lambda c: c["architecture"].update(network_class_name=name))
    refused(model, "not a layer of dynamic_network_architectures")


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("preprocessor_name", "MyPreprocessor"),
        ("resampling_fn_data", "deepcopy"),
        ("normalization_schemes", ["MyNormalization"]),
    ],
)
def test_preprocessing_that_is_not_nnunets_own(key: str, value: Any, model: Path) -> None:
    change_plans(model, lambda c: c.update({key: value}))
    assert "plans.json" in refused(model, f"{key} is .* not nnU-Net's own")


def test_a_label_manager_that_is_not_nnunets_own(model: Path) -> None:
    change_json(model / "plans.json", lambda p: p.update(label_manager="Mine"))
    refused(model, "label_manager is 'Mine'")


def test_an_architecture_that_cannot_be_built(model: Path) -> None:
    change_plans(model, lambda c: c["architecture"]["arch_kwargs"].update(n_stages=2))
    refused(model, "cannot be built from plans.json")
    change_plans(model, lambda c: c["architecture"].pop("arch_kwargs"))
    refused(model, "architecture cannot be read")


def test_a_configuration_that_cannot_be_used(model: Path) -> None:
    change_plans(model, lambda c: c.update(previous_stage="3d_lowres"))
    refused(model, "second stage of a cascade")
    change_json(model / "plans.json", lambda p: p["configurations"].pop("3d_fullres"))
    refused(model, "configuration 3d_fullres, which plans.json does not have")


def test_a_configuration_that_inherits_from_nothing(model: Path) -> None:
    change_plans(model, lambda c: c.update(inherits_from="3d_highres"))
    refused(model, "configuration 3d_fullres cannot be read")


def test_labels_that_nnunet_does_not_accept(model: Path) -> None:
    change_json(model / "dataset.json", lambda d: d["labels"].update(ignore=7))
    refused(model, "does not accept its labels")


def test_an_image_reader_of_microscopes(model: Path) -> None:
    change_json(model / "plans.json", lambda p: p.update(image_reader_writer="Tiff3DIO"))
    refused(model, "read by Tiff3DIO")
    load(model, entry_of("labels", nnunet={"orientation": "LPS"}))


def test_without_nnunet_it_says_what_to_install(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = builtins.__import__

    def absent(name: str, *args: Any, **kwargs: Any) -> Any:
        if name.startswith("nnunetv2"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", absent)
    with pytest.raises(TeacherError, match="needs the package nnunetv2") as caught:
        load(model, entry_of("labels"))
    assert "pip install 'organ-distill[nnunet]'" in caught.value.fix
    assert caught.value.exit_code == 2


def test_nothing_is_printed_and_nothing_is_left_switched(
    nnunet_models: Mapping[str, Path],
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for variable in ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results"):
        monkeypatch.delenv(variable, raising=False)
    write_blobs(tmp_path / "scan.nii.gz", shape=(30, 36, 34))
    threads = torch.get_num_threads()
    teacher = load(nnunet_models["2d"], entry_of("2d", nnunet={"mirroring": False}))
    said = teacher.predict(read_image(tmp_path / "scan.nii.gz").volume)
    assert capfd.readouterr() == ("", "")
    assert torch.get_num_threads() == threads
    assert not torch.backends.cudnn.benchmark
    assert said.logits.array.dtype == np.float32


def test_sums_that_overflow_name_the_teacher(model: Path) -> None:
    def huge(content: dict[str, Any]) -> None:
        for name in content["network_weights"]:
            if "seg_layers" in name:
                content["network_weights"][name] *= 1e6

    for fold in (0, 1):
        change_checkpoint(model, huge, fold=fold)
    teacher = load(model, entry_of("labels", nnunet={"mirroring": False}))
    grid = Grid.axis_aligned((32, 32, 32), (2, 2, 2))
    image = np.random.default_rng(0).integers(-100, 300, grid.shape).astype(np.int16)
    with pytest.raises(TeacherError, match="overflow in half precision") as caught:
        teacher.predict(Volume(image, grid))
    assert "teacher mine" in str(caught.value)


def test_spacing_is_in_single_precision_as_in_the_file() -> None:
    grid = Grid.axis_aligned((4, 4, 4), (0.7, 1.1, 3.0))
    assert nnunet.file_spacing(grid) == [float(np.float32(mm)) for mm in (0.7, 1.1, 3.0)]
