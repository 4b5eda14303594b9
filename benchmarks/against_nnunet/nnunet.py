"""nnU-Net 2 itself, on the words in the cache: its dataset, its planner and preprocessing, its
trainer for so many seconds, its predictor. Each part runs in a process of its own."""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np

from benchmarks.against_nnunet.cohorts import Place, Size
from pipeline.cache.store import write_json
from pipeline.log import Log
from pipeline.review.cached_files import export_nnunet
from pipeline.student.settings import OptimiserConfig, build_optimiser

# By what is written where nobody knows: background, or nnU-Net's ignore label.
DATASETS: Mapping[str, str] = {"hard": "Dataset501_Hard", "ignore": "Dataset502_Ignore"}
# Where these stand, nnU-Net makes samples in the process that trains, and no other.
ONE_CORE = {"nnUNet_n_proc_DA": "0", "nnUNet_def_n_proc": "1", "nnUNet_compile": "f"}
OURS = OptimiserConfig()
_FOLDERS = ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results")


def _root(place: Place) -> Path:
    """nnU-Net's three folders of a setting."""
    return place.folder / "nnunet" / place.setting


def raw(place: Place, labels: str) -> Path:
    """A raw dataset."""
    return _root(place) / "nnUNet_raw" / DATASETS[labels]


@dataclass(frozen=True)
class Model:
    """One of nnU-Net's.

    Attributes:
        labels: of `DATASETS`.
        our_optimiser: AdamW with a cosine, as `train-student` has by default, for its SGD.
    """

    labels: str
    our_optimiser: bool = False

    def path(self, place: Place) -> Path:
        """Where it is kept."""
        return _root(place) / f"{self.labels}{'-adamw' if self.our_optimiser else ''}.pth"


def plan_of(place: Place, size: Size) -> dict[str, Any]:
    """What nnU-Net chose for hard labels: `patch_size`, `batch_size`, `architecture`, .."""
    plans, _ = _plans(place, "hard")
    return dict(plans["configurations"][size.configuration])


def kinds_of_labels(place: Place) -> list[str]:
    """Both, or `hard` alone where everybody speaks everywhere, so that they are the same."""
    told = json.loads((raw(place, "ignore") / "dataset.json").read_text(encoding="utf-8"))
    return ["hard", "ignore"] if "ignore" in told["labels"] else ["hard"]


def write_datasets(place: Place, log: Log) -> None:
    """`cache export --to nnunet`, and the same with background where nobody knows."""
    registry = place.registry()
    ours, hard = raw(place, "ignore"), raw(place, "hard")
    export_nnunet(place.work, registry, list(registry.teachers), ours, log)
    told = json.loads((ours / "dataset.json").read_text(encoding="utf-8"))
    ignore = told["labels"].pop("ignore", None)
    (hard / "labelsTr").mkdir(parents=True, exist_ok=True)
    if not (hard / "imagesTr").exists():
        (hard / "imagesTr").symlink_to(os.path.relpath(ours / "imagesTr", hard))
    for path in sorted((ours / "labelsTr").iterdir()):
        image: Any = nib.load(path)
        classes = np.asarray(image.dataobj)
        classes[classes == (ignore or 255)] = 0
        nib.save(
            nib.Nifti1Image(classes, image.affine, image.header), hard / "labelsTr" / path.name
        )
    shutil.copy(ours / "splits_final.json", hard)
    write_json(hard / "dataset.json", told)


def _enter(place: Place) -> None:
    """Sets what nnU-Net reads when it is imported."""
    folders = {name: str(_root(place) / name) for name in _FOLDERS}
    os.environ.update({**ONE_CORE, **folders})


def prepare(place: Place, size: Size) -> None:
    """Fingerprints, plans and preprocessing, as `nnUNetv2_plan_and_preprocess` does them."""
    _enter(place)
    os.environ |= {"nnUNet_n_proc_DA": "1"}  # its planner asks torch for so many threads
    from nnunetv2.experiment_planning import plan_and_preprocess_api as api
    from nnunetv2.experiment_planning.experiment_planners.default_experiment_planner import (
        ExperimentPlanner,
    )

    class Narrow(ExperimentPlanner):  # type: ignore[misc]
        """Its own planner with fewer features, for one core of a CPU."""

        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            self.UNet_base_num_features = size.base_features

    for labels in kinds_of_labels(place):
        number = int(DATASETS[labels][7:10])
        api.extract_fingerprint_dataset(number, num_processes=1)
        api.plan_experiment_dataset(
            number, Narrow, gpu_memory_target_in_gb=size.memory_gb,
            overwrite_target_spacing=size.grid_mm,
        )  # fmt: skip
        api.preprocess_dataset(number, configurations=(size.configuration,), num_processes=(1,))


def train(place: Place, model: Model, size: Size, seconds: float, seed: int) -> dict[str, Any]:
    """nnU-Net's own trainer, until `seconds` of this process's CPU time are over.

    Returns:
        `steps`, `seconds` and `seconds_per_step`; the model is kept.
    """
    _enter(place)
    import torch
    from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer

    class Timed(nnUNetTrainer):  # type: ignore[misc]
        """Its schedule runs along the seconds; no pseudo-validation between epochs."""

        def configure_optimizers(self) -> Any:
            if not model.our_optimiser:
                return super().configure_optimizers()
            return build_optimiser(OURS, self.network), None

        def run_training(self) -> dict[str, Any]:
            self.on_train_start()
            self.network.train()
            steps, began = 0, time.process_time()
            while (spent := time.process_time() - began) < seconds:
                lr = self.initial_lr * (1 - spent / seconds) ** 0.9
                if model.our_optimiser:
                    lr = OURS.lr_at(int(1e6 * spent / seconds), 10**6)
                for group in self.optimizer.param_groups:
                    group["lr"] = lr
                self.train_step(next(self.dataloader_train))
                steps += 1
            self.on_train_end()
            return {"steps": steps, "seconds": spent, "seconds_per_step": spent / steps}

    torch.manual_seed(seed)
    np.random.seed(seed)  # noqa: NPY002  # its loaders draw from this one
    plans, dataset = _plans(place, model.labels)
    trainer = Timed(
        {**plans, "continue_training": False}, size.configuration, 0, dataset, torch.device("cpu")
    )
    told: dict[str, Any] = trainer.run_training()
    made = Path(trainer.output_folder) / "checkpoint_final.pth"
    made.replace(model.path(place))
    parts = [model.path(place), *_plan_files(place, model.labels)]
    return told | {"bytes_kept": sum(part.stat().st_size for part in parts)}


def predict(
    place: Place, model: Model, size: Size, output: Path, *, mirror: bool
) -> dict[str, float]:
    """nnU-Net's own predictor, `output/<dataset>/<case>.nii.gz`."""
    _enter(place)
    import torch
    from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor
    from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
    from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

    plans, dataset = _plans(place, model.labels)
    manager = PlansManager(plans)
    configuration = manager.get_configuration(size.configuration)
    kept = torch.load(model.path(place), weights_only=False)
    outputs = manager.get_label_manager(dataset).num_segmentation_heads
    network = nnUNetTrainer.build_network_architecture(manager, configuration, 1, outputs, False)
    network.load_state_dict(kept["network_weights"])
    predictor = nnUNetPredictor(
        use_mirroring=mirror, perform_everything_on_device=False, device=torch.device("cpu"),
        allow_tqdm=False,
    )  # fmt: skip
    predictor.manual_initialization(
        network, manager, configuration, [kept["network_weights"]], dataset, "nnUNetTrainer",
        kept["inference_allowed_mirroring_axes"],
    )  # fmt: skip
    _, cases, _ = place.scored()
    for case in cases:
        (output / case.dataset).mkdir(parents=True, exist_ok=True)
    began = time.process_time()
    predictor.predict_from_files_sequential(
        [[str(case.image)] for case in cases], [str(output / case.name) for case in cases]
    )
    return {"seconds_per_case": (time.process_time() - began) / len(cases)}


def _plan_files(place: Place, labels: str) -> tuple[Path, Path]:
    preprocessed = _root(place) / "nnUNet_preprocessed" / DATASETS[labels]
    return preprocessed / "nnUNetPlans.json", preprocessed / "dataset.json"


def _plans(place: Place, labels: str) -> tuple[dict[str, Any], dict[str, Any]]:
    plans, dataset = (
        json.loads(path.read_text(encoding="utf-8")) for path in _plan_files(place, labels)
    )
    return plans, dataset


def same_network(plan: Mapping[str, Any], size: Size) -> dict[str, Any]:
    """MONAI's DynUNet of the topology that nnU-Net planned: `network`, `patch`, `batch_size`."""
    flat = [1] if size.configuration == "2d" else []
    told = plan["architecture"]["arch_kwargs"]
    kernels, strides = ([[*flat, *n] for n in told[name]] for name in ("kernel_sizes", "strides"))
    args = {
        "kernel_size": kernels, "strides": strides, "upsample_kernel_size": strides[1:],
        "filters": list(told["features_per_stage"]), "norm_name": ["INSTANCE", {"affine": True}],
        "trans_bias": True,
    }  # fmt: skip
    return {
        "network": {"name": "DynUNet", "args": args},
        "patch": [*flat, *plan["patch_size"]],
        "batch_size": plan["batch_size"],
    }
