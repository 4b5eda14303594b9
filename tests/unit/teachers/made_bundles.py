"""MONAI bundles with seeded random weights, made as those of the model zoo are, and a CT."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import torch
from monai.networks.nets import UNet
from torch import nn

from pipeline.data.entries import TeacherEntry

NETWORK: dict[str, Any] = {
    "spatial_dims": 3,
    "in_channels": 1,
    "out_channels": 3,
    "channels": [4, 8, 8],
    "strides": [2, 2],
    "num_res_units": 0,
    "norm": "instance",
}
TAP = "model.1.submodule.0"
ROI = [16, 24, 8]


def seeded_network(seed: int = 0, **changes: Any) -> nn.Module:
    """A UNet in evaluation mode whose logits are spread about zero."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        network = UNet(**(NETWORK | changes))
        for parameter in network.parameters():
            parameter.data *= 2.0
    return network.eval()


def inference_config(images: Path = Path("images"), output: Path = Path("eval")) -> dict[str, Any]:
    """A typical `configs/inference.json`; everything but the three parts is full of expressions."""
    keys = {"keys": "image"}
    return {
        "imports": ["$import glob", "$import os"],
        "bundle_root": ".",
        "image_key": "image",
        "output_dir": str(output),
        "dataset_dir": str(images),
        "datalist": "$list(sorted(glob.glob(@dataset_dir + '/*.nii*')))",
        "device": "$torch.device('cuda:0' if torch.cuda.is_available() else 'cpu')",
        "network_def": {"_target_": "UNet", **NETWORK},
        "network": "$@network_def.to(@device)",
        "preprocessing": {
            "_target_": "Compose",
            "transforms": [
                {"_target_": "LoadImaged", "keys": "@image_key"},
                {"_target_": "EnsureChannelFirstd", **keys},
                {"_target_": "Orientationd", **keys, "axcodes": "RAS"},
                {"_target_": "Spacingd", **keys, "pixdim": [6, 6, 8], "mode": "bilinear"},
                {
                    "_target_": "ScaleIntensityRanged", **keys,
                    "a_min": -57, "a_max": 164, "b_min": 0, "b_max": 1, "clip": True,
                },
                {"_target_": "EnsureTyped", **keys},
            ],
        },
        "dataset": {
            "_target_": "Dataset",
            "data": "$[{'image': i} for i in @datalist]",
            "transform": "@preprocessing",
        },
        "dataloader": {"_target_": "DataLoader", "dataset": "@dataset", "batch_size": 1},
        "inferer": {
            "_target_": "SlidingWindowInferer",
            "roi_size": ROI, "sw_batch_size": 2, "overlap": 0.5, "mode": "gaussian",
        },
        "postprocessing": {
            "_target_": "Compose",
            "transforms": [
                {
                    "_target_": "Invertd", "keys": "pred", "transform": "@preprocessing",
                    "orig_keys": "image", "nearest_interp": False, "to_tensor": True,
                },
                {"_target_": "AsDiscreted", "keys": "pred", "argmax": True},
                {
                    "_target_": "SaveImaged", "keys": "pred", "output_dir": "@output_dir",
                    "separate_folder": False, "output_postfix": "seg",
                },
            ],
        },
        "evaluator": {
            "_target_": "SupervisedEvaluator",
            "device": "@device", "val_data_loader": "@dataloader", "network": "@network",
            "inferer": "@inferer", "postprocessing": "@postprocessing",
            "val_handlers": [
                {
                    "_target_": "CheckpointLoader",
                    "load_path": "$@bundle_root + '/models/model.pt'",
                    "load_dict": {"model": "@network"},
                }
            ],
        },
        "initialize": ["$monai.utils.set_determinism(seed=123)"],
        "run": ["$@evaluator.run()"],
    }  # fmt: skip


def metadata() -> dict[str, Any]:
    """A typical `configs/metadata.json`, shortened."""
    names = {"0": "background", "1": "liver", "2": "Spleen"}
    return {
        "monai_version": "1.5.0",
        "network_data_format": {
            "inputs": {"image": {"num_channels": 1, "channel_def": {"0": "image"}}},
            "outputs": {"pred": {"num_channels": 3, "channel_def": names}},
        },
    }


def write_bundle(
    folder: Path,
    change: Callable[[dict[str, Any]], object] = lambda config: None,
    *,
    seed: int = 0,
    **paths: Path,
) -> Path:
    """Writes a bundle; `change` may alter its inference config in place."""
    config = inference_config(**paths)
    change(config)
    (folder / "configs").mkdir(parents=True)
    (folder / "models").mkdir()
    (folder / "configs" / "inference.json").write_text(json.dumps(config, indent=1))
    (folder / "configs" / "metadata.json").write_text(json.dumps(metadata()))
    torch.save(seeded_network(seed).state_dict(), folder / "models" / "model.pt")
    return folder


def transform(config: dict[str, Any], name: str) -> dict[str, Any]:
    """One of the preprocessing transforms of a config."""
    found: dict[str, Any] = next(
        t for t in config["preprocessing"]["transforms"] if t["_target_"] == name
    )
    return found


def bundle_entry(**changes: Any) -> TeacherEntry:
    """A registry entry for a bundle that `write_bundle` wrote."""
    values = {"kind": "monai-bundle", "weights": "x", "organs": {"liver": 1, "spleen": 2}}
    return TeacherEntry.model_validate(values | changes)


def exported_entry(**changes: Any) -> TeacherEntry:
    """A registry entry for an export of `seeded_network`."""
    values: dict[str, Any] = {
        "kind": "exported",
        "weights": "x",
        "organs": {"liver": 1, "spleen": 2},
        "orientation": "RAS",
        "spacing_mm": [8, 6, 6],
        "intensity": {"kind": "window", "window_hu": [-57, 164], "scaled_to": [0, 1]},
    }
    return TeacherEntry.model_validate(values | changes)


def write_ct(path: Path, *, seed: int = 0, codes: str = "LIP") -> Path:
    """A smooth, anisotropic, slightly oblique image in whole HU, stored in some orientation."""
    rng = np.random.default_rng(seed)
    shape = (38, 44, 30)
    coarse = torch.from_numpy(rng.normal(40, 220, (1, 1, 7, 8, 6)))
    fine = nn.functional.interpolate(coarse, shape, mode="trilinear")[0, 0].numpy()
    hu = np.rint(fine + rng.normal(0, 10, shape)).clip(-1000, 1000).astype(np.int16)
    turn = np.deg2rad(7)
    rotation = np.array(
        [[np.cos(turn), -np.sin(turn), 0], [np.sin(turn), np.cos(turn), 0], [0, 0, 1]]
    )
    affine = np.eye(4)
    affine[:3, :3] = rotation @ np.diag([4.1, 3.7, 6.5])
    affine[:3, 3] = [-70, 12, 300]
    image = nib.Nifti1Image(hu, affine)
    turned = nib.orientations.ornt_transform(
        nib.orientations.io_orientation(affine), nib.orientations.axcodes2ornt(codes)
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(image.as_reoriented(turned), path)
    return path
