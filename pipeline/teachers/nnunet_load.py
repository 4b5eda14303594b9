"""Loading a trained nnU-Net v2 model folder, and holding it against the registry."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from pipeline.errors import TeacherError
from pipeline.teacher_entry import NnunetOptions, TeacherEntry
from pipeline.teachers.nnunet import NnunetTeacher
from pipeline.teachers.nnunet_checkpoint import (
    NnunetCheckpoint,
    build_architecture,
    check_parts,
    read_checkpoint,
)
from pipeline.teachers.nnunet_folder import (
    ModelFolder,
    check_against_registry,
    read_model_folder,
)

# How each of nnU-Net's image readers orders the axes of an array.
_READERS = {
    "SimpleITKIO": "stored",
    "NibabelIO": "stored",
    "SimpleITKIOWithReorient": "RAS",
    "NibabelIOWithReorient": "RAS",
}


def load_nnunet_teacher(
    name: str, entry: TeacherEntry, path: Path, *, device: torch.device
) -> NnunetTeacher:
    """Loads a model folder and holds it against the registry.

    Args:
        name: as in the registry.
        entry: its registry entry.
        path: the model folder.
        device: where it runs.

    Raises:
        TeacherError: nnU-Net is not installed; the folder lacks something or contradicts the
            registry; a checkpoint that would run code or does not fit its plans; a cascade.
    """
    folder = read_model_folder(path, entry)
    check_against_registry(name, entry, folder)
    options = entry.nnunet or NnunetOptions()
    orientation = options.orientation or _reader_orientation(folder)
    version = _installed_version(name)

    from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

    checkpoints = {fold: read_checkpoint(file) for fold, file in folder.checkpoints.items()}
    first = _agreed(name, folder, checkpoints)
    plans = PlansManager(dict(folder.plans))
    configuration = _configuration(folder, plans, first.configuration)
    num_channels = _num_channels(folder, plans)
    network = build_architecture(
        folder, configuration, in_channels=1, out_channels=num_channels
    ).eval()
    for fold, checkpoint in checkpoints.items():
        _check_weights(network, checkpoint, folder.checkpoints[fold], name)
    with _quiet():
        from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor

        predictor = nnUNetPredictor(
            tile_step_size=options.tile_step,
            use_gaussian=True,
            use_mirroring=options.mirroring,
            perform_everything_on_device=device.type == "cuda",
            device=device,
            allow_tqdm=False,
        )
        predictor.manual_initialization(
            network.to(device),
            plans,
            configuration,
            [dict(checkpoint.weights) for checkpoint in checkpoints.values()],
            dict(folder.dataset),
            first.trainer,
            first.mirror_axes,
        )
    return NnunetTeacher(
        name,
        options,
        orientation,
        tuple(folder.checkpoints),
        first.trainer,
        first.configuration,
        version,
        predictor,
    )


def _installed_version(name: str) -> str:
    """Major and minor version: what may change nnU-Net's numbers."""
    try:
        from importlib.metadata import version

        import nnunetv2.inference.predict_from_raw_data  # noqa: F401

        return ".".join(version("nnunetv2").split(".")[:2])
    except ImportError as error:
        raise TeacherError(
            f"a teacher of kind `nnunet` needs the package nnunetv2 ({error}).",
            where=f"teacher {name}",
            fix="Install it: pip install 'organ-distill[nnunet]'.",
        ) from error


def _reader_orientation(folder: ModelFolder) -> str:
    reader = folder.plans["image_reader_writer"]
    if reader not in _READERS:
        raise TeacherError(
            f"it was trained on images read by {reader}, which reads no CT in NIfTI.",
            where=folder.path / "plans.json",
            fix="Set `nnunet.orientation` to say in which order of axes it wants its images: "
            "`stored`, or letters such as LPS.",
        )
    return _READERS[reader]


def _configuration(folder: ModelFolder, plans: Any, name: str) -> Any:
    if name not in folder.plans["configurations"]:
        raise TeacherError(
            f"the checkpoint was trained in configuration {name}, which plans.json does not have.",
            where=folder.path,
            fix="Copy plans.json from the folder that the checkpoint was trained in.",
        )
    try:
        configuration = plans.get_configuration(name)
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise TeacherError(
            f"configuration {name} cannot be read ({type(error).__name__}: {error}).",
            where=folder.path / "plans.json",
            fix="It must be written by nnU-Net v2.",
        ) from error
    if configuration.previous_stage_name is not None:
        raise TeacherError(
            f"{name} is the second stage of a cascade: it needs the segmentation of "
            f"{configuration.previous_stage_name}.",
            where=folder.path,
            fix="Use the folder of 3d_fullres, 3d_lowres or 2d.",
        )
    check_parts(folder, configuration.configuration)
    return configuration


def _num_channels(folder: ModelFolder, plans: Any) -> int:
    try:
        with _quiet():
            count: int = plans.get_label_manager(folder.dataset).num_segmentation_heads
    except (AssertionError, RuntimeError, TypeError, ValueError) as error:
        raise TeacherError(
            f"nnU-Net does not accept its labels ({error}).",
            where=folder.path / "dataset.json",
            fix="Overlapping regions need `regions_class_order`, and `ignore` the highest value.",
        ) from error
    return count


def _agreed(
    name: str, folder: ModelFolder, checkpoints: Mapping[str, NnunetCheckpoint]
) -> NnunetCheckpoint:
    """The first fold; what is not averaged must be the same in all."""
    first, *others = checkpoints.values()
    for other in others:
        if (other.configuration, other.mirror_axes) != (first.configuration, first.mirror_axes):
            raise TeacherError(
                f"its folds are of different trainings: {first.configuration} with mirror axes "
                f"{first.mirror_axes}, {other.configuration} with {other.mirror_axes}.",
                where=f"teacher {name}, {folder.path}",
                fix="Name the folds that belong together in `nnunet.folds`.",
            )
    return first


def _check_weights(
    network: torch.nn.Module, checkpoint: NnunetCheckpoint, path: Path, name: str
) -> None:
    try:
        network.load_state_dict(dict(checkpoint.weights), strict=True)
    except RuntimeError as error:
        first = " ".join(line.strip() for line in str(error).split("\n")[:3])
        raise TeacherError(
            f"the weights do not fit the network of plans.json ({first}).",
            where=f"teacher {name}, {path}",
            fix=f"Its trainer {checkpoint.trainer} may build another network than plans.json says; "
            "such a model needs a teacher of kind `factory`.",
        ) from error
    if any(not bool(torch.isfinite(p).all()) for p in network.parameters()):
        raise TeacherError(
            "the weights hold NaN or infinity.", where=f"teacher {name}, {path}", fix="Train again."
        )


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """nnU-Net prints advice on its settings when it is set up; here they are ours to know."""
    benchmark = torch.backends.cudnn.benchmark
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        # Its predictor switches this on for the whole process, other teachers included.
        torch.backends.cudnn.benchmark = benchmark
