"""A student as a MONAI bundle: MONAI runs it, and this project takes it as a teacher."""

from __future__ import annotations

import json
from functools import partial
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from pipeline.config import installed
from pipeline.data.labels import Intensity
from pipeline.data.nifti import read_image, read_label, write_image
from pipeline.data.resample import resample, same_grid
from pipeline.errors import ConfigError
from pipeline.student.checkpoint import StudentRecord
from pipeline.student.export.description import (
    AXCODES,
    INPUT,
    bundle_channels,
    licence,
    origin,
    readme,
    trained_on_datasets,
)
from pipeline.student.export.formats import as_bytes, quiet, write_network
from pipeline.student.export.parity import LabelCount, Parity, ParityError
from pipeline.student.inference import SIGMA, StudentWindows, running_argmax
from pipeline.student.network import OneVsRest

WEIGHTS = Path("models") / "model.pt"
SCRIPTED = Path("models") / "model.ts"
ON_STUDENT_GRID = "run by MONAI on the student grid"
ON_OWN_GRID = "run by MONAI on the image's own grid"
_SAME_PLACE_MM = 0.01
_OTHER_MONAI = (
    "Use another --format, or another version of MONAI: `pipeline info` says which is there."
)


def write_bundle(
    folder: Path, record: StudentRecord, network: nn.Module, *, name: str, overlap: float
) -> None:
    """Writes configs, weights, TorchScript, README and LICENSE. The network is the student's, on
    the CPU, in evaluation mode.

    Raises:
        ConfigError: MONAI's own network gives something else than one tensor.
    """
    plain = network.organs if isinstance(network, OneVsRest) else network
    _check_plain(record, plain)
    for part in ("configs", "models", "docs"):
        (folder / part).mkdir(parents=True)
    _write(folder / "configs" / "inference.json", inference_config(record, overlap=overlap))
    _write(folder / "configs" / "metadata.json", metadata(record, name=name))
    (folder / WEIGHTS).write_bytes(as_bytes(torch.save, plain.state_dict()))
    write_network(folder / SCRIPTED, plain, record.patch, "torchscript", opset=0)
    (folder / "docs" / "README.md").write_text(readme(record, name), encoding="utf-8")
    (folder / "LICENSE").write_text(licence(record), encoding="utf-8")


def all_channels(record: StudentRecord, network: nn.Module) -> nn.Module:
    """A bundle's network with the channels of the student's."""
    return OneVsRest(network) if record.head == "sigmoid" else network


def run_bundle(folder: Path, image: Path, output: Path) -> Path:
    """Runs a bundle on an image on the CPU by MONAI's own transforms and inferer. It is trusted:
    postprocessing is code.

    It does what `python -m monai.bundle run` does, but for ignite's loop over images.
    """
    from monai.bundle import ConfigParser

    parser = ConfigParser()
    parser.read_config(folder / "configs" / "inference.json")
    parser.read_meta(folder / "configs" / "metadata.json")
    parser["bundle_root"], parser["output_dir"] = str(folder), str(output)
    parser["device"] = "$torch.device('cpu')"
    with quiet():
        parts = {
            name: parser.get_parsed_content(name)
            for name in ("network", "preprocessing", "inferer", "postprocessing")
        }
        network: nn.Module = parts["network"]
        network.load_state_dict(torch.load(folder / WEIGHTS, weights_only=True), strict=True)
        data: dict[str, Any] = parts["preprocessing"]({"image": str(image)})
        with torch.inference_mode():
            data["pred"] = parts["inferer"](data["image"][None], network.eval())[0]
        parts["postprocessing"](data)
    written = sorted(output.glob("*.nii.gz"))
    if len(written) != 1:
        raise ParityError(
            f"MONAI wrote {len(written)} label maps of one image.", where=folder, fix=_OTHER_MONAI
        )
    return written[0]


def compare_bundle(
    folder: Path, image: Path, record: StudentRecord, network: nn.Module, *, overlap: float
) -> dict[str, Parity]:
    """Label maps that MONAI makes by the bundle, against those of the student.

    On an image that is resampled to the student grid beforehand they can only be equal. On the
    image itself, where that is another, MONAI resamples in its own way.

    Returns:
        `ON_STUDENT_GRID`, and if the image has another grid `ON_OWN_GRID`.

    Raises:
        ParityError: MONAI's label map lies elsewhere than the image.
    """
    volume = read_image(image).volume
    grid = volume.grid.with_spacing(record.spacing_mm)
    with TemporaryDirectory(prefix="organ-distill-") as scratch:
        resampled = Path(scratch) / "image.nii"
        write_image(resampled, resample(volume, grid, order=1))
        compare = partial(_compare_on, folder, record, network, overlap)
        found = {ON_STUDENT_GRID: compare(resampled)}
        if not same_grid(volume.grid, grid):
            found[ON_OWN_GRID] = compare(image)
    return found


def _compare_on(
    folder: Path, record: StudentRecord, network: nn.Module, overlap: float, image: Path
) -> Parity:
    volume = read_image(image).volume
    windows = StudentWindows(network, record.intensity, record.patch, overlap=overlap)
    rows = windows.rows(volume, record.spacing_mm)
    ours = np.concatenate([running_argmax(iter(logits)) for _, logits in rows])
    with TemporaryDirectory(prefix="organ-distill-") as output:
        theirs = read_label(run_bundle(folder, image, Path(output))).volume
    apart = float("inf")
    if theirs.grid.shape == volume.grid.shape:
        apart = theirs.grid.largest_corner_distance_mm(volume.grid)
    if not apart < _SAME_PLACE_MM:
        raise ParityError(
            f"MONAI's label map has {theirs.grid.shape} voxels and lies {apart:.3g} mm beside the "
            f"image's {volume.grid.shape}.",
            where=folder,
            fix=_OTHER_MONAI,
        )
    count = LabelCount(record)
    count.add(ours, record.label_space.to_classes(theirs.array.astype(np.uint8)))
    return count.parity()


def _check_plain(record: StudentRecord, network: nn.Module) -> None:
    """Whether MONAI's network alone gives one tensor: what makes it so here is no part of it."""
    from monai.networks import nets

    name, why = record.network.name, "is none of MONAI's networks"
    if hasattr(nets, name):
        arguments = {k: v for k, v in network_def(record).items() if k != "_target_"}
        bare: nn.Module = getattr(nets, name)(**arguments)
        bare.load_state_dict(network.state_dict(), strict=True)
        with torch.inference_mode():
            out = bare.eval()(torch.zeros(1, 1, *record.patch))
        found = tuple(out.shape) if isinstance(out, Tensor) else f"a {type(out).__name__}"
        if found[1:] == (len(bundle_channels(record)), *record.patch):
            return
        why = f"gives {found}, not one tensor of full-size logits"
    raise ConfigError(
        f"{name} {why}, so MONAI's inferers cannot use it.",
        where="--format bundle",
        fix="Export it as torchscript, torch-export or onnx.",
    )


def _write(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


# The configs of a MONAI bundle: inference.json and metadata.json, as the specification has them.
#
# Network, preprocessing and inferer are plain classes with plain arguments, so that whoever reads
# the bundle without trusting it (as this project does) has to run no code of it. What needs
# expressions stands in the postprocessing and in the workflow.

_SCHEMA = (
    "https://github.com/Project-MONAI/MONAI-extra-test-data/releases/download/0.8.1/"
    "meta_schema_20240725.json"
)
_OPTIONAL = ("nibabel", "pytorch-ignite", "fire", "jsonschema")


def inference_config(record: StudentRecord, *, overlap: float) -> dict[str, Any]:
    """`configs/inference.json`: `python -m monai.bundle run` writes a label map per image."""
    return {
        "imports": ["$import glob", "$import os", "$import torch"],
        "bundle_root": ".",
        "dataset_dir": "$os.path.join(@bundle_root, 'images')",
        "output_dir": "$os.path.join(@bundle_root, 'labels')",
        "datalist": "$sorted(glob.glob(os.path.join(@dataset_dir, '*.nii*')))",
        "device": "$torch.device('cuda' if torch.cuda.is_available() else 'cpu')",
        "network_def": network_def(record),
        "network": "$@network_def.to(@device)",
        "preprocessing": {"_target_": "Compose", "transforms": _preprocessing(record)},
        "dataset": {
            "_target_": "Dataset",
            "data": "$[{'image': path} for path in @datalist]",
            "transform": "@preprocessing",
        },
        "dataloader": {
            "_target_": "DataLoader",
            "dataset": "@dataset", "batch_size": 1, "shuffle": False, "num_workers": 0,
        },
        "inferer": {
            "_target_": "SlidingWindowInferer", "roi_size": list(record.patch),
            "sw_batch_size": 1, "overlap": overlap, "mode": "gaussian", "sigma_scale": SIGMA,
            "padding_mode": "constant", "cval": record.intensity.air,
            "sw_device": "@device", "device": "cpu",
        },
        "postprocessing": {"_target_": "Compose", "transforms": _postprocessing(record)},
        "handlers": [{
            "_target_": "CheckpointLoader",
            "load_path": "$os.path.join(@bundle_root, 'models', 'model.pt')",
            "load_dict": {"model": "@network"}, "map_location": "@device",
        }],
        "evaluator": {
            "_target_": "SupervisedEvaluator", "device": "@device",
            "val_data_loader": "@dataloader", "network": "@network", "inferer": "@inferer",
            "postprocessing": "@postprocessing", "val_handlers": "@handlers", "amp": False,
        },
        "run": ["$@evaluator.run()"],
    }  # fmt: skip


def metadata(record: StudentRecord, *, name: str) -> dict[str, Any]:
    """`configs/metadata.json`."""
    low, high = (float(v) for v in _range(record.intensity))
    names = bundle_channels(record)
    patch = {"spatial_shape": list(record.patch), "dtype": "float32", "is_patch_data": True}
    image = {
        "type": "image", "format": "hounsfield", "modality": "CT", "num_channels": 1,
        "value_range": [low, high], "channel_def": {"0": "CT"}, **patch,
    }  # fmt: skip
    logits = {
        "type": "image", "format": "segmentation", "num_channels": len(names), "value_range": [],
        "channel_def": {str(n): name for n, name in enumerate(names)}, **patch,
    }  # fmt: skip
    trained_on = ", ".join(trained_on_datasets(record))
    return {
        "schema": _SCHEMA,
        "version": "0.1.0",
        "changelog": {"0.1.0": "exported by organ-distill"},
        "monai_version": version("monai"),
        "pytorch_version": version("torch").split("+")[0],
        "numpy_version": version("numpy"),
        "required_packages_version": installed(_OPTIONAL),
        "name": name,
        "task": f"Segmentation of {', '.join(record.label_space.organs)} in CT",
        "description": f"A {record.network.name} that was distilled from "
        f"{len(record.teachers)} single-organ networks for {record.steps} steps.",
        "authors": "see LICENSE",
        "copyright": "see LICENSE",
        "data_source": f"trained on {trained_on}" if trained_on else "not recorded",
        "data_type": "nibabel",
        "image_classes": "CT in Hounsfield units",
        "label_classes": "; ".join(f"{i} is {o}" for o, i in record.label_space.ids.items()),
        "pred_classes": f"{len(names)} channels of logits, {record.head}",
        "eval_metrics": {
            f"validation_dice_{organ}": dice
            for organ, dice in record.validation_dice.items()
            if dice is not None
        },
        "intended_use": "Research only; not for diagnosis or treatment.",
        "references": [],
        "network_data_format": {"inputs": {INPUT: image}, "outputs": {"pred": logits}},
        "organ_distill": origin(record),
    }


def network_def(record: StudentRecord) -> dict[str, Any]:
    """The network as MONAI builds it."""
    return {
        "_target_": f"monai.networks.nets.{record.network.name}",
        "spatial_dims": 3,
        "in_channels": 1,
        "out_channels": len(bundle_channels(record)),
        **record.network.args,
    }


def _preprocessing(record: StudentRecord) -> list[dict[str, Any]]:
    keys = {"keys": INPUT}
    return [
        {"_target_": "LoadImaged", **keys},
        {"_target_": "EnsureChannelFirstd", **keys},
        {"_target_": "Orientationd", **keys, "axcodes": AXCODES},
        {
            "_target_": "Spacingd", **keys,
            "pixdim": list(record.spacing_mm), "mode": "bilinear", "padding_mode": "border",
            "align_corners": True,
            # Keeps the size of the field of view, and its middle to a quarter of a voxel.
            "scale_extent": True,
        },
        *_scaling(record.intensity),
        {"_target_": "EnsureTyped", **keys},
    ]  # fmt: skip


def _scaling(intensity: Intensity) -> list[dict[str, Any]]:
    if intensity.kind == "raw":
        return []
    (low, high), (first, last) = intensity.window_hu, _range(intensity)
    ends = {"a_min": low, "a_max": high, "b_min": first, "b_max": last}
    return [{"_target_": "ScaleIntensityRanged", "keys": INPUT, **ends, "clip": True}]


def _range(intensity: Intensity) -> tuple[float, float]:
    """What the ends of the window become, in the network's units."""
    low, high = intensity.window_hu
    match intensity.kind:
        case "window":
            return intensity.scaled_to
        case "zscore":
            return tuple((v - intensity.mean_hu) / intensity.std_hu for v in (low, high))  # type: ignore[return-value]
        case "raw":
            return -1024.0, 3071.0


def _postprocessing(record: StudentRecord) -> list[dict[str, Any]]:
    keys = {"keys": "pred"}
    ids = list(record.label_space.ids.values())
    steps: list[dict[str, Any]] = [
        {
            "_target_": "Invertd", **keys,
            "transform": "@preprocessing", "orig_keys": INPUT, "nearest_interp": False,
            "to_tensor": True,
        },
    ]  # fmt: skip
    if record.head == "sigmoid":  # background where no organ's logit is positive
        background = "$lambda logits: torch.cat([torch.zeros_like(logits[:1]), logits])"
        steps.append({"_target_": "Lambdad", **keys, "func": background})
    steps.append({"_target_": "AsDiscreted", **keys, "argmax": True})
    classes = list(range(1, len(ids) + 1))
    if ids != classes:
        mapped = {"orig_labels": classes, "target_labels": ids, "dtype": "$torch.uint8"}
        steps.append({"_target_": "MapLabelValued", **keys, **mapped})
    saved = {
        "output_dir": "@output_dir", "output_postfix": "", "output_ext": ".nii.gz",
        "output_dtype": "$torch.uint8", "resample": False, "separate_folder": False,
    }  # fmt: skip
    return [*steps, {"_target_": "SaveImaged", **keys, **saved}]
