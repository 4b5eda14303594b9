"""MONAI bundles say what their own inference workflows say, or are refused with the reason."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from monai.bundle import ConfigWorkflow
from pydantic import ValidationError

from pipeline.data.entries import TeacherEntry
from pipeline.data.labels import log_odds
from pipeline.data.nifti import read_image, read_label
from pipeline.data.resample import resample, same_grid
from pipeline.data.volume import Volume, from_file_array
from pipeline.errors import TeacherError
from pipeline.networks.by_name import tapped
from pipeline.teachers.monai_bundle import BundleTeacher
from tests.unit.teachers.made_bundles import (
    TAP,
    bundle_entry,
    metadata,
    seeded_network,
    transform,
    write_bundle,
    write_ct,
)
from tests.unit.teachers.teacher_contract import (
    StoredNetworkContract,
    opened,
    refusal,
    weights_digest,
)

Data = dict[str, Any]
Change = Callable[[Data], object]


def load(folder: Path, *, trusted: bool = False, **changes: Any) -> BundleTeacher:
    entry = bundle_entry(**changes)
    return opened(BundleTeacher, entry.trusting() if trusted else entry, folder, name="zoo")


def refused(folder: Path, match: str, **changes: Any) -> str:
    return refusal(match, f"teacher zoo, {folder}", lambda: load(folder, **changes))


def run_own_workflow(folder: Path, change: Change = lambda config: None) -> Any:
    """`monai.bundle run` of the bundle's inference config; returns its evaluator."""
    workflow = ConfigWorkflow(
        config_file=str(folder / "configs" / "inference.json"),
        meta_file=str(folder / "configs" / "metadata.json"),
        logging_file=False,
        workflow_type="infer",
        bundle_root=str(folder),
        device=torch.device("cpu"),
    )
    change(workflow.parser)
    workflow.initialize()
    evaluator = workflow.parser.get_parsed_content("evaluator")
    workflow.run()
    return evaluator


def without_orientation(config: Data) -> None:
    config["preprocessing"]["transforms"].remove(transform(config, "Orientationd"))


def late_orientation(config: Data) -> None:
    transforms = config["preprocessing"]["transforms"]
    transforms.append(transforms.pop(transforms.index(transform(config, "Orientationd"))))


def wild_preprocessing(config: Data) -> None:
    """Crops, pads, another order of axes, statistics of the image itself."""
    transform(config, "Orientationd")["axcodes"] = "PLI"
    config["preprocessing"]["transforms"][-1:-1] = [
        {"_target_": "CropForegroundd", "keys": "image", "source_key": "image", "margin": 1},
        {"_target_": "NormalizeIntensityd", "keys": "image", "nonzero": True},
        {"_target_": "DivisiblePadd", "keys": "image", "k": 4},
    ]


@pytest.mark.parametrize(
    "change", [lambda config: None, without_orientation, late_orientation, wild_preprocessing]
)
def test_parity_on_the_networks_own_grid(tmp_path: Path, change: Change) -> None:
    ct = write_ct(tmp_path / "images" / "case.nii.gz", codes="LIP")
    folder = write_bundle(tmp_path / "bundle", change, images=ct.parent)

    def stop_at_logits(config: Data) -> None:
        del config["evaluator"]["postprocessing"]

    theirs = run_own_workflow(folder, stop_at_logits).state.output[0]["pred"]
    expected = from_file_array(theirs.as_tensor().numpy(), theirs.affine)
    native = read_image(ct).volume
    found = load(folder).predict(native).logits
    assert found.array.dtype == np.float32
    assert same_grid(found.grid, expected.grid)
    assert not same_grid(found.grid, native.grid)
    for channel in (1, 2):
        ours, tools = (log_odds(volume.array, [channel], "softmax") for volume in (found, expected))
        assert 0 < (tools > 0).mean() < 1
        assert np.abs(ours - tools).max() < 1e-3
        np.testing.assert_array_equal(ours > 0, tools > 0)


def blurring_network(config: Data) -> None:
    """Two channels whose difference is a blurred CT: regions as smooth as organs."""
    config["network_def"] = {
        "_target_": "torch.nn.Conv3d", "in_channels": 1, "out_channels": 2,
        "kernel_size": 5, "padding": 2,
    }  # fmt: skip


def dice(a: npt.NDArray[np.bool_], b: npt.NDArray[np.bool_]) -> float:
    return float(2 * np.count_nonzero(a & b) / (np.count_nonzero(a) + np.count_nonzero(b)))


@pytest.mark.parametrize("spacing_mm", [(2.0, 2.0, 2.0), (6.5, 3.7, 4.1), (3.0, 1.5, 1.5)])
def test_parity_across_grids(tmp_path: Path, spacing_mm: tuple[float, float, float]) -> None:
    """Ours on a student grid against the tool's segmentation, inverted to the file's grid."""
    ct = write_ct(tmp_path / "images" / "case.nii.gz", codes="PSR")
    folder = write_bundle(
        tmp_path / "bundle", blurring_network, images=ct.parent, output=tmp_path / "out"
    )
    weight = torch.zeros(2, 1, 5, 5, 5)
    weight[1] = 1 / 20
    torch.save(
        {"weight": weight, "bias": torch.tensor([0.0, -3.0])}, folder / "models" / "model.pt"
    )
    change_metadata(folder, lambda data: data["network_data_format"].pop("outputs"))
    run_own_workflow(folder)
    tools = read_label(tmp_path / "out" / "case_seg.nii.gz").volume
    native = read_image(ct).volume
    assert same_grid(tools.grid, native.grid)
    logits = load(folder, organs={"liver": 1}).predict(native).logits
    odds = Volume(log_odds(logits.array, [1], "softmax"), logits.grid)
    student = resample(odds, native.grid.with_spacing(spacing_mm), order=1)
    region = resample(student, native.grid, order=1).array > 0
    assert 0.1 < region.mean() < 0.9
    assert dice(region, tools.array == 1) >= 0.995


def test_features_lie_where_the_logits_lie(tmp_path: Path) -> None:
    """A window that holds the whole image: then a feature is the layer's output, cell by cell."""
    ct = read_image(write_ct(tmp_path / "case.nii.gz", codes="LIP")).volume

    def one_window(config: Data) -> None:
        transform(config, "Spacingd")["pixdim"] = [9, 9, 12]
        config["inferer"]["roi_size"] = [32, 32, 32]

    teacher = load(write_bundle(tmp_path / "bundle", one_window), taps=[TAP])
    prediction = teacher.predict(ct)
    feature = prediction.features[TAP]
    assert feature.grid == prediction.logits.grid.coarsen(teacher.taps[TAP][1])
    array, _ = teacher._preprocess(ct)
    padded = torch.full((1, 1, 32, 32, 32), float(array.min()))
    i, j, k = array.shape[1:]
    padded[0, 0, :i, :j, :k] = array[0]
    with torch.inference_mode(), tapped(teacher.parts.network, [TAP]) as layers:
        teacher.parts.network(padded)
    expected = layers[TAP][0].numpy().transpose(0, 3, 2, 1)
    d, h, w = feature.array.shape[1:]
    np.testing.assert_allclose(feature.array, expected[:, :d, :h, :w], atol=1e-5)


def test_one_slice_needs_windows_of_one_slice(tmp_path: Path) -> None:
    ct = read_image(write_ct(tmp_path / "case.nii.gz")).volume
    one = Volume(ct.array[5:6], ct.grid.crop((5, 0, 0), (1, *ct.grid.shape[1:])))
    with pytest.raises(TeacherError, match="one slice, and the inferer's windows have"):
        load(write_bundle(tmp_path / "bundle"), taps=[]).predict(one)


def test_taps_need_windows(tmp_path: Path) -> None:
    simple: Change = lambda config: config.update(inferer={"_target_": "SimpleInferer"})  # noqa: E731
    folder = write_bundle(tmp_path / "bundle", simple)
    refused(folder, "SimpleInferer has no windows", taps=[TAP])
    refused(write_bundle(tmp_path / "other"), "no layer 'nowhere'", taps=["nowhere"])


class TestBundle(StoredNetworkContract):
    tap = TAP
    no_weights = "not a plain tensor file"
    numbers = ({"taps": [TAP]},)

    @pytest.fixture
    def path(self, tmp_path: Path) -> Path:
        return write_bundle(tmp_path / "bundle")

    def entry(self, **changes: Any) -> TeacherEntry:
        return bundle_entry(**changes)

    def weights_file(self, path: Path) -> Path:
        return path / "models" / "model.pt"

    def put_nan(self, path: Path) -> None:
        state = seeded_network().state_dict()
        next(iter(state.values())).view(-1)[0] = torch.nan
        torch.save(state, self.weights_file(path))


# --- weights ------------------------------------------------------------------------------------


@pytest.mark.parametrize("key", ["model", "state_dict"])
def test_weights_under_a_name(tmp_path: Path, key: str) -> None:
    folder = write_bundle(tmp_path / "bundle")
    path = folder / "models" / "model.pt"
    torch.save({key: torch.load(path), "epoch": 3}, path)
    load(folder)


def test_no_weights(tmp_path: Path) -> None:
    folder = write_bundle(tmp_path / "bundle")
    (folder / "models" / "model.pt").unlink()
    assert "large_files.yml" in refused(folder, "model.pt does not exist")
    (folder / "models" / "model.ts").touch()
    assert "kind `exported`" in refused(folder, "model.pt does not exist")


def test_weights_that_do_not_fit(tmp_path: Path) -> None:
    folder = write_bundle(tmp_path / "bundle")
    path = folder / "models" / "model.pt"
    torch.save(seeded_network(out_channels=2).state_dict(), path)
    refused(folder, "do not fit the network of network_def .*size mismatch")
    torch.save({"elsewhere": torch.zeros(1)}, path)
    refused(folder, "do not fit the network of network_def .*Missing key")
    torch.save([1, 2], path)
    refused(folder, "holds no state dict")


def test_what_the_digest_is_of(tmp_path: Path) -> None:
    entry, folder = bundle_entry(), write_bundle(tmp_path / "bundle")
    first = weights_digest(entry, folder)
    assert weights_digest(entry, folder.rename(tmp_path / "moved")) == first
    folder = tmp_path / "moved"
    (folder / "configs" / "train.json").write_text("{}")
    change_metadata(folder, lambda data: data.update(version="2"))
    assert weights_digest(entry, folder) == first
    seen = {first}
    torch.save(seeded_network(1).state_dict(), folder / "models" / "model.pt")
    seen.add(weights_digest(entry, folder))
    with (folder / "configs" / "inference.json").open("a") as file:
        file.write("\n")
    seen.add(weights_digest(entry, folder))
    (folder / "scripts").mkdir()
    (folder / "scripts" / "net.py").touch()
    seen.add(weights_digest(entry, folder))
    assert len(seen) == 4
    (folder / "models" / "model.pt").unlink()
    with pytest.raises(TeacherError, match="cannot be read"):
        weights_digest(entry, folder)


# --- files and metadata -------------------------------------------------------------------------


def change_metadata(folder: Path, change: Change) -> Path:
    data = metadata()
    change(data)
    (folder / "configs" / "metadata.json").write_text(json.dumps(data))
    return folder


def test_folders_that_are_no_bundle(tmp_path: Path) -> None:
    refused(tmp_path / "none", "no such folder")
    refused(tmp_path, "configs/ has none of inference.json")
    folder = write_bundle(tmp_path / "bundle")
    (folder / "configs" / "metadata.json").unlink()
    refused(folder, "there is no metadata.json")


@pytest.mark.parametrize("content", ["", "{", "[1]"])
def test_a_config_that_cannot_be_read(tmp_path: Path, content: str) -> None:
    folder = write_bundle(tmp_path / "bundle")
    (folder / "configs" / "inference.json").write_text(content)
    refused(folder, "inference.json (cannot be read|is no mapping)")


def test_a_config_in_yaml(tmp_path: Path) -> None:
    folder = write_bundle(tmp_path / "bundle")
    config = folder / "configs" / "inference.json"
    config.rename(config.with_suffix(".yaml"))  # JSON is YAML
    load(folder)


def test_the_bundle_owns_its_preprocessing() -> None:
    for name, value in (("spacing_mm", [1, 1, 1]), ("intensity", {"kind": "raw"})):
        with pytest.raises(ValidationError, match=f"leave out .*{name}"):
            bundle_entry(**{name: value})


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"organs": {"liver": 2}}, "channel 2 is 'Spleen' there, but liver in the registry"),
        ({"organs": {"liver": 0}}, "channel 0 is 'background' there"),
        ({"organs": {"liver": [0, 1]}}, "'background'"),
        ({"organs": {"liver": 3}}, "liver is channel 3, and there are 3"),
        ({"num_channels": 2, "organs": {"liver": 1}}, "num_channels is 3 there but 2"),
    ],
)
def test_a_registry_that_contradicts_the_metadata(
    tmp_path: Path, changes: Data, match: str
) -> None:
    message = refused(write_bundle(tmp_path / "bundle"), match, **changes)
    assert "channel_def" in message


@pytest.mark.parametrize(
    ("organ", "names"),
    [
        ("liver", {"1": "liver and tumor"}),
        ("kidneys", {"1": "left_kidney"}),
        ("gallbladder", {"1": "gall bladder"}),
        ("kidney_left", {"1": "Left Kidney"}),
        ("liver", {"1": "foreground"}),
        ("liver", {"1": "label 1"}),
        ("liver", {}),
    ],
)
def test_names_that_agree_or_say_nothing(tmp_path: Path, organ: str, names: Data) -> None:
    folder = change_metadata(
        write_bundle(tmp_path / "bundle"),
        lambda data: data["network_data_format"]["outputs"]["pred"].update(channel_def=names),
    )
    load(folder, organs={organ: 1})


def test_one_agreeing_channel_of_several_is_enough(tmp_path: Path) -> None:
    folder = change_metadata(
        write_bundle(tmp_path / "bundle"),
        lambda data: data["network_data_format"]["outputs"]["pred"].update(
            channel_def={"0": "background", "1": "liver", "2": "hepatic lesion"}
        ),
    )
    load(folder, organs={"liver": [1, 2]})
    refused(folder, "'hepatic lesion'", organs={"liver": 2})


def test_a_network_for_several_images(tmp_path: Path) -> None:
    folder = change_metadata(
        write_bundle(tmp_path / "bundle"),
        lambda data: data["network_data_format"]["inputs"]["image"].update(num_channels=4),
    )
    refused(folder, "4 channels, and a CT has 1")


@pytest.mark.parametrize("modality", ["MR", "mri", "PET"])
def test_a_network_for_other_images(tmp_path: Path, modality: str) -> None:
    folder = change_metadata(
        write_bundle(tmp_path / "bundle"),
        lambda data: data["network_data_format"]["inputs"]["image"].update(modality=modality),
    )
    message = refused(folder, f"its input image is {modality}, and a teacher is shown CT")
    assert "cannot teach" in message


@pytest.mark.parametrize("modality", ["CT", "CT, MR", "n/a"])
def test_a_network_for_ct_or_for_nobody_knows_what(tmp_path: Path, modality: str) -> None:
    folder = change_metadata(
        write_bundle(tmp_path / "bundle"),
        lambda data: data["network_data_format"]["inputs"]["image"].update(modality=modality),
    )
    load(folder)


# --- what fails while it runs -------------------------------------------------------------------


def fails(folder: Path, tmp_path: Path, match: str) -> None:
    native = read_image(write_ct(tmp_path / "case.nii.gz")).volume
    with pytest.raises(TeacherError, match=f"teacher zoo.*{match}"):
        load(folder).predict(native)


def test_preprocessing_that_fails_or_loses_the_geometry(tmp_path: Path) -> None:
    def other_key(config: Data) -> None:
        for step in config["preprocessing"]["transforms"]:
            step["keys"] = "ct"

    fails(write_bundle(tmp_path / "a", other_key), tmp_path, "preprocessing failed .*ct")

    def plain(config: Data) -> None:
        transform(config, "EnsureTyped")["track_meta"] = False

    fails(write_bundle(tmp_path / "b", plain), tmp_path, "keep MONAI's meta data")

    def flat(config: Data) -> None:
        transform(config, "EnsureChannelFirstd")["channel_dim"] = 0

    fails(write_bundle(tmp_path / "c", flat), tmp_path, "preprocessing")


def test_an_inferer_that_cannot_run_the_network(tmp_path: Path) -> None:
    def odd(config: Data) -> None:
        config["inferer"] = {"_target_": "SimpleInferer"}

    fails(write_bundle(tmp_path / "bundle", odd), tmp_path, "inferer")
    refused(
        write_bundle(tmp_path / "other", lambda c: c["inferer"].update(roi_size=[14, 24, 8])),
        "cannot run windows of",
    )


def test_out_of_memory_means_fewer_windows_at_a_time(tmp_path: Path) -> None:
    native = read_image(write_ct(tmp_path / "case.nii.gz")).volume
    folder = write_bundle(tmp_path / "bundle", lambda c: c["inferer"].update(sw_batch_size=8))
    teacher = load(folder)
    expected = teacher.predict(native).logits.array
    limit = 2

    def scarce(module: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        if len(inputs[0]) > limit:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")

    teacher.parts.network.register_forward_pre_hook(scarce)
    np.testing.assert_allclose(teacher.predict(native).logits.array, expected, atol=1e-5)
    assert teacher.parts.inferer.sw_batch_size == 2
    limit = 0
    with pytest.raises(TeacherError, match="teacher zoo: out of memory with one window"):
        teacher.predict(native)
