"""Trained nnU-Net model folders, made by nnU-Net itself: fingerprint, plans, trainer, checkpoint.

Images are blobs in soft tissue; the networks see a few dozen windows of them, which is enough for
smooth regions. The fixture `nnunet_models` of `tests/conftest.py` makes them once per session; who
wants to damage one copies it with `copy_model`.
"""

from __future__ import annotations

import contextlib
import io
import json
import multiprocessing.dummy
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch
from torch.nn import functional as F

from tests.blobs import write_blobs

LABELS = {"background": 0, "liver": 1, "spleen": 2}


@dataclass(frozen=True)
class Recipe:
    """What a model folder is trained on.

    Attributes:
        number: of the dataset.
        name: of the dataset, behind its number.
        spacing: of its images along (i, j, k) of the file.
        code: where the axes i, j, k of its files point to.
        labels: as in dataset.json.
        regions_class_order: for overlapping regions.
        num_folds: folds to train.
        configurations: of the plans, one model folder each.
        values: label value of soft tissue, of the bright and of the dark organ, and of a third.
        num_steps: of training, per fold.
    """

    number: int
    name: str = "Blobs"
    spacing: tuple[float, float, float] = (2.0, 2.0, 2.0)
    code: str = "LPS"
    labels: Mapping[str, Any] = field(default_factory=lambda: dict(LABELS))
    regions_class_order: Sequence[int] | None = None
    num_folds: int = 1
    configurations: tuple[str, ...] = ("3d_fullres",)
    values: tuple[int, ...] = (0, 1, 2)
    num_steps: int = 40


RECIPES = {
    # Labels, two folds; the axes of its files need no transposing.
    "labels": Recipe(1, num_folds=2, configurations=("3d_fullres", "2d")),
    # Overlapping regions; anisotropic with its first axis the coarsest, so nnU-Net transposes.
    "regions": Recipe(
        2,
        spacing=(4.0, 1.6, 2.0),
        labels={"background": 0, "both": [1, 2], "spleen": 2},
        regions_class_order=(1, 2),
    ),
}
# What a registry says of them.
_OF_LABELS = {"organs": {"liver": 1, "spleen": 2}, "num_channels": 3}
ORGANS: Mapping[str, Mapping[str, Any]] = {
    "labels": _OF_LABELS,
    "2d": _OF_LABELS,
    "regions": {"organs": {"both": 0, "spleen": 1}, "activation": "sigmoid"},
}


def build_models(folder: Path) -> dict[str, Path]:
    """All model folders, by name: labels, 2d, regions."""
    found = {}
    for name, recipe in RECIPES.items():
        first, *others = build_model(recipe, folder)
        found[name] = first
        found.update({other.name.rsplit("__", 1)[1]: other for other in others})
    return found


def copy_model(model: Path, folder: Path) -> Path:
    """A copy to be damaged."""
    return Path(shutil.copytree(model, folder / model.name))


def build_model(recipe: Recipe, folder: Path) -> list[Path]:
    """Fingerprint, plans, folds; returns the model folder of each configuration.

    Args:
        recipe: see there.
        folder: nnUNet_raw, nnUNet_preprocessed and nnUNet_results come into it.
    """
    name = f"Dataset{recipe.number:03d}_{recipe.name}"
    raw = folder / "nnUNet_raw" / name
    dataset = {
        "channel_names": {"0": "CT"},
        "labels": dict(recipe.labels),
        "numTraining": 2,
        "file_ending": ".nii.gz",
    }
    if recipe.regions_class_order:
        dataset["regions_class_order"] = list(recipe.regions_class_order)
    for case in range(2):
        image = raw / "imagesTr" / f"case_{case}_0000.nii.gz"
        label = write_blobs(
            image,
            spacing=recipe.spacing,
            code=recipe.code,
            seed=case,
            organs=len(recipe.values) - 1,
        )
        label = np.array(recipe.values, np.uint8)[label]
        target = raw / "labelsTr" / f"case_{case}.nii.gz"
        target.parent.mkdir(parents=True, exist_ok=True)
        nib.save(nib.Nifti1Image(label, nib.load(image).affine), target)
    (raw / "dataset.json").write_text(json.dumps(dataset), encoding="utf-8")
    with nnunet_folders(folder), pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fork", _no_fork)
        _plan(recipe, patch)
        return [_train(recipe, folder, name, dataset, c) for c in recipe.configurations]


def _no_fork() -> int:
    raise AssertionError("making models forks: see `_plan`")


def _plan(recipe: Recipe, patch: pytest.MonkeyPatch) -> None:
    """nnU-Net's own fingerprint and planner, told that memory is small."""
    from nnunetv2.experiment_planning.dataset_fingerprint import fingerprint_extractor
    from nnunetv2.experiment_planning.experiment_planners.default_experiment_planner import (
        ExperimentPlanner,
    )
    from nnunetv2.utilities import utils

    # Threads for its processes: two tiny images are not worth one, and a fork of a process in which
    # Dask or fsspec have threads may wait for ever for a lock that one of them held.
    threads = SimpleNamespace(get_context=lambda kind: multiprocessing.dummy)
    patch.setattr(fingerprint_extractor, "multiprocessing", threads)
    patch.setattr(utils, "Pool", multiprocessing.dummy.Pool)
    extractor = fingerprint_extractor.DatasetFingerprintExtractor(recipe.number, 1)
    extractor.num_foreground_voxels_for_intensitystats = 10_000  # as given, 100 million
    extractor.run()
    planner = ExperimentPlanner(recipe.number, gpu_memory_target_in_gb=0.01)
    planner.UNet_base_num_features, planner.UNet_max_features_3d = 4, 8
    planner.UNet_max_features_2d = 8
    planner.UNet_blocks_per_stage_encoder = planner.UNet_blocks_per_stage_decoder = (1,) * 8
    planner.plan_experiment()


def _train(
    recipe: Recipe, folder: Path, name: str, dataset: dict[str, Any], configuration: str
) -> Path:
    from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer

    saved = folder / "nnUNet_preprocessed" / name / "nnUNetPlans.json"
    for fold in range(recipe.num_folds):
        torch.manual_seed(recipe.number + 10 * fold)
        trainer = nnUNetTrainer(
            {**json.loads(saved.read_text(encoding="utf-8")), "continue_training": False},
            configuration,
            fold,
            dataset,
            torch.device("cpu"),
        )
        images = _prepare(folder, name, trainer)
        trainer.initialize()
        trainer.configure_rotation_dummyDA_mirroring_and_inital_patch_size()
        _fit(trainer, images, recipe.num_steps)
        # Its log of scores is of numpy numbers, and so is what it saves.
        trainer._best_ema = np.float64(0.5)
        trainer.logger.log("ema_fg_dice", np.float32(0.5), 0)
        trainer.logger.log("dice_per_class_or_region", [np.float64(0.5)], 0)
        trainer.save_checkpoint(str(Path(trainer.output_folder) / "checkpoint_final.pth"))
    model = Path(trainer.output_folder_base)
    (model / "plans.json").write_text(json.dumps(trainer.plans_manager.plans), encoding="utf-8")
    (model / "dataset.json").write_text(json.dumps(dataset), encoding="utf-8")
    return model


def _prepare(folder: Path, name: str, trainer: Any) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Runs nnU-Net's preprocessor, and leaves its output where its trainer looks for it."""
    raw, out = folder / "nnUNet_raw" / name, Path(trainer.preprocessed_dataset_folder)
    out.mkdir(parents=True, exist_ok=True)
    (out / "case_0.b2nd").touch()
    preprocessor = trainer.configuration_manager.preprocessor_class(verbose=False)
    pairs = []
    for case in range(2):
        data, seg, _ = preprocessor.run_case(
            [str(raw / "imagesTr" / f"case_{case}_0000.nii.gz")],
            str(raw / "labelsTr" / f"case_{case}.nii.gz"),
            trainer.plans_manager,
            trainer.configuration_manager,
            trainer.dataset_json,
        )
        pairs.append((torch.from_numpy(data).float(), torch.from_numpy(seg[0].astype(np.int64))))
    return pairs


def _fit(trainer: Any, images: Sequence[tuple[torch.Tensor, torch.Tensor]], steps: int) -> None:
    network, labels = trainer.network, trainer.label_manager
    trainer.set_deep_supervision_enabled(False)
    patch = tuple(trainer.configuration_manager.patch_size)
    network.train()
    optimiser = torch.optim.Adam(network.parameters(), lr=1e-2)
    rng = np.random.default_rng(trainer.fold)
    for _ in range(steps):
        data, seg = images[rng.integers(len(images))]
        start = [
            int(rng.integers(0, max(1, n - p + 1)))
            for n, p in zip(seg.shape[-len(patch) :], patch, strict=True)
        ]
        box = tuple(slice(s, s + p) for s, p in zip(start, patch, strict=True))
        if len(patch) == 2:
            layer = int(rng.integers(seg.shape[0]))
            data, seg = data[:, layer], seg[layer]
        x, y = data[(slice(None), *box)][None], seg[box].clamp(min=0)[None]
        pad = [(0, p - n) for n, p in zip(y.shape[1:], patch, strict=True)]
        widths = [w for pair in reversed(pad) for w in pair]
        x, y = F.pad(x, widths), F.pad(y, widths)
        out = network(x)
        if labels.has_regions:
            target = torch.stack(
                [torch.isin(y, torch.tensor(r)) for r in labels.foreground_regions], 1
            )
            loss = F.binary_cross_entropy_with_logits(out, target.float())
        else:
            loss = F.cross_entropy(out, y, torch.tensor([1.0, 2.0, 4.0])[: out.shape[1]])
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    trainer.set_deep_supervision_enabled(True)
    with torch.no_grad():  # as sure of itself as after a thousand epochs
        for parameter in network.decoder.seg_layers.parameters():
            parameter *= 4


@contextlib.contextmanager
def nnunet_folders(folder: Path) -> Iterator[None]:
    """nnU-Net's folders, and its chatter kept to itself."""
    with pytest.MonkeyPatch.context() as patch, torch.random.fork_rng():
        for variable in ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results"):
            (folder / variable).mkdir(parents=True, exist_ok=True)
            patch.setenv(variable, str(folder / variable))
        patch.setenv("nnUNet_compile", "false")
        with contextlib.redirect_stdout(io.StringIO()):
            yield
