"""The configs of a MONAI bundle: inference.json and metadata.json, as the specification has them.

Network, preprocessing and inferer are plain classes with plain arguments, so that whoever reads the
bundle without trusting it (as this project does) has to run no code of it. What needs expressions
stands in the postprocessing and in the workflow.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from pipeline.exporting.description import AXCODES, INPUT, channel_names, origin
from pipeline.intensity import Intensity
from pipeline.student.checkpoint import StudentRecord
from pipeline.student.inference import SIGMA

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
            "_target_": "SlidingWindowInferer",
            "roi_size": list(record.patch),
            "sw_batch_size": 1,
            "overlap": overlap,
            "mode": "gaussian",
            "sigma_scale": SIGMA,
            "padding_mode": "constant",
            "cval": record.intensity.air,
            "sw_device": "@device",
            "device": "cpu",
        },
        "postprocessing": {"_target_": "Compose", "transforms": _postprocessing(record)},
        "handlers": [
            {
                "_target_": "CheckpointLoader",
                "load_path": "$os.path.join(@bundle_root, 'models', 'model.pt')",
                "load_dict": {"model": "@network"},
                "map_location": "@device",
            },
        ],
        "evaluator": {
            "_target_": "SupervisedEvaluator",
            "device": "@device",
            "val_data_loader": "@dataloader",
            "network": "@network",
            "inferer": "@inferer",
            "postprocessing": "@postprocessing",
            "val_handlers": "@handlers",
            "amp": False,
        },
        "run": ["$@evaluator.run()"],
    }  # fmt: skip


def metadata(record: StudentRecord, *, name: str) -> dict[str, Any]:
    """`configs/metadata.json`.

    Args:
        record: of the student.
        name: of the bundle.
    """
    low, high = (float(v) for v in _range(record.intensity))
    names = bundle_channels(record)
    patch = {"spatial_shape": list(record.patch), "dtype": "float32", "is_patch_data": True}
    trained_on = ", ".join(trained_on_datasets(record))
    return {
        "schema": _SCHEMA,
        "version": "0.1.0",
        "changelog": {"0.1.0": "exported by organ-distill"},
        "monai_version": version("monai"),
        "pytorch_version": version("torch").split("+")[0],
        "numpy_version": version("numpy"),
        "required_packages_version": _versions(),
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
        "network_data_format": {
            "inputs": {
                INPUT: {
                    "type": "image",
                    "format": "hounsfield",
                    "modality": "CT",
                    "num_channels": 1,
                    "value_range": [low, high],
                    "channel_def": {"0": "CT"},
                    **patch,
                }
            },
            "outputs": {
                "pred": {
                    "type": "image",
                    "format": "segmentation",
                    "num_channels": len(names),
                    "value_range": [],
                    "channel_def": {str(n): name for n, name in enumerate(names)},
                    **patch,
                }
            },
        },
        "organ_distill": origin(record),
    }


def trained_on_datasets(record: StudentRecord) -> list[str]:
    """Names of the datasets whose cases the student was trained on."""
    return list(dict.fromkeys(case.split("/")[0] for case in record.trained_on))


def bundle_channels(record: StudentRecord) -> list[str]:
    """Of the bundle's network: MONAI's own has no channel that is always 0."""
    return channel_names(record) if record.head == "softmax" else list(record.label_space.organs)


def teacher_entry(record: StudentRecord, *, folder: str) -> dict[str, Any]:
    """An entry for `teachers` of a data_registry.yaml: the bundle as another student's teacher."""
    names = bundle_channels(record)
    return {
        "kind": "monai-bundle",
        "weights": folder,
        "organs": {organ: names.index(organ) for organ in record.label_space.organs},
        "num_channels": len(names),
        "activation": record.head,
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
    return [
        {
            "_target_": "ScaleIntensityRanged", "keys": INPUT,
            "a_min": low, "a_max": high, "b_min": first, "b_max": last, "clip": True,
        }
    ]  # fmt: skip


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
    if ids != list(range(1, len(ids) + 1)):
        classes = list(range(1, len(ids) + 1))
        steps.append(
            {
                "_target_": "MapLabelValued", **keys,
                "orig_labels": classes, "target_labels": ids, "dtype": "$torch.uint8",
            }
        )  # fmt: skip
    steps.append(
        {
            "_target_": "SaveImaged", **keys,
            "output_dir": "@output_dir", "output_postfix": "", "output_ext": ".nii.gz",
            "output_dtype": "$torch.uint8", "resample": False, "separate_folder": False,
        }
    )  # fmt: skip
    return steps


def _versions() -> Mapping[str, str]:
    found = {}
    for package in _OPTIONAL:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found
