"""Teachers that are trained nnU-Net v2 model folders, run by nnU-Net's own code.

nU-Net prepares the image (crop to non-zero, normalisation, resampling to the plans' spacing) and
runs its own predictor. What is left to this module is where things are: nnU-Net works on arrays in
the order that its image reader gives, and its logits are taken on the grid that it prepared, so
that they are resampled once, onto the student grid, and never onto the CT's own grid, which is what
fills nnU-Net's memory on long scans (MIC-DKFZ/nnUNet #1765).
"""

from __future__ import annotations

import contextlib
import io
import pickle
import pydoc
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from pipeline.data.entries import NnunetOptions, TeacherEntry
from pipeline.data.volume import Grid, Orientation, Volume
from pipeline.errors import TeacherError
from pipeline.teachers.nnunet_folder import (
    READERS,
    ModelFolder,
    check_against_registry,
    read_model_folder,
)
from pipeline.teachers.teacher import Prediction, load_weights


@dataclass
class NnunetTeacher:
    """A model folder, ready to run.

    Attributes:
        orientation: `stored` or letters, with the model's own reader taken into account.
        predictor: nnU-Net's, with network and weights.
        says: folds, configuration and settings; the plans are digested with the weights.
    """

    name: str
    orientation: str
    predictor: Any
    says: Mapping[str, Any]

    @property
    def spacing_mm(self) -> None:
        """None: nnU-Net resamples the image itself."""
        return

    def predict(self, image: Volume) -> Prediction:
        """Int16 HU (D, H, W) in RAS+, on its own grid -> logits where nnU-Net computes them.

        Raises:
            TeacherError: nnU-Net could not sum the logits in half precision, or the image is one
                slice and the configuration sees volumes, or slices across another axis.
        """
        plans, configuration = self.predictor.plans_manager, self.predictor.configuration_manager
        stored = self.orientation == "stored"
        orientation = image.stored if stored else Orientation.from_code(self.orientation)
        seen = orientation.apply(image)
        z, y, x = (int(axis) for axis in plans.transpose_forward)
        transposed = Orientation(axes=(z, y, x))
        slice_axis = transposed.apply(seen).grid.slice_axis
        volumes = len(configuration.patch_size) == 3
        if slice_axis is not None and (slice_axis > 0 or volumes):
            raise TeacherError(
                f"the image is one slice, and configuration {self.says['configuration']} sees "
                f"{'volumes' if volumes else 'slices across another axis'}.",
                where=f"teacher {self.name}",
                fix="Use a model of configuration 2d for such slices, or leave them out.",
            )
        properties: dict[str, Any] = {"spacing": file_spacing(seen.grid)}
        preprocessor = configuration.preprocessor_class(verbose=False)
        # In memory as nnU-Net's readers leave it, so that its sums come to the same.
        array = np.ascontiguousarray(seen.array)[None]
        prepared, _, properties = preprocessor.run_case_npy(
            array, None, properties, plans, configuration, self.predictor.dataset_json
        )
        try:
            logits = self.predictor.predict_logits_from_preprocessed_data(
                torch.from_numpy(np.ascontiguousarray(prepared))
            )
        except RuntimeError as error:
            if "Encountered inf" not in str(error):
                raise
            raise TeacherError(
                "nnU-Net's sums of logits overflow in half precision.",
                where=f"teacher {self.name}",
                fix="Look at this case's intensities; nothing was cached for it.",
            ) from error
        grid = prepared_grid(transposed.apply(seen).grid, properties, prepared.shape[1:])
        on_grid = Volume(logits.float().numpy(), grid)
        return Prediction(orientation.undo(transposed.undo(on_grid)))

    def describe(self) -> Mapping[str, Any]:
        """See `says`."""
        return self.says


def file_spacing(grid: Grid) -> list[float]:
    """The spacing in mm as a NIfTI header holds it, in single precision: nnU-Net rounds sizes, and
    a half must not fall to another side than it does for nnU-Net's own readers."""
    return [float(np.float32(mm)) for mm in grid.spacing_mm]


def prepared_grid(grid: Grid, properties: Mapping[str, Any], shape: tuple[int, ...]) -> Grid:
    """Where the voxels lie that nnU-Net prepared.

    It crops, then resizes edge to edge: all of its resampling functions keep the outer faces of the
    first and the last voxel in place, whatever the spacing then comes to.

    Args:
        grid: of the image, axes as nnU-Net transposes them.
        properties: what its preprocessor noted: `bbox_used_for_cropping`.
    """
    box = properties["bbox_used_for_cropping"]
    cropped = grid.crop([begin for begin, _ in box], [end - begin for begin, end in box])
    return cropped.with_shape(shape)


# Loading a trained nnU-Net v2 model folder, and holding it against the registry.


def load_nnunet_teacher(
    name: str, entry: TeacherEntry, path: Path, *, device: torch.device
) -> NnunetTeacher:
    """Loads a model folder and holds it against the registry.

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
    network = build_architecture(folder, configuration, out_channels=num_channels).eval()
    for fold, checkpoint in checkpoints.items():
        where = f"teacher {name}, {folder.checkpoints[fold]}"
        load_weights(network, checkpoint.weights, "of plans.json", where=where)
    with _quiet():
        from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor

        predictor = nnUNetPredictor(
            tile_step_size=options.tile_step, use_gaussian=True, use_mirroring=options.mirroring,
            perform_everything_on_device=device.type == "cuda", device=device, allow_tqdm=False,
        )  # fmt: skip
        predictor.manual_initialization(
            network.to(device), plans, configuration,
            [dict(checkpoint.weights) for checkpoint in checkpoints.values()],
            dict(folder.dataset), first.trainer, first.mirror_axes,
        )  # fmt: skip
    says = {
        "kind": "nnunet",
        "nnunetv2": version,
        "configuration": first.configuration,
        "trainer": first.trainer,
        "folds": list(folder.checkpoints),
        "checkpoint": options.checkpoint,
        "mirror_axes": list((options.mirroring and first.mirror_axes) or ()),
        "tile_step": options.tile_step,
        "orientation": orientation,
        "blending": "nnU-Net's: gaussian, channel logits, float16; folds averaged",
    }
    return NnunetTeacher(name, orientation, predictor, says)


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
    if reader not in READERS:
        raise TeacherError(
            f"it was trained on images read by {reader}, which reads no CT in NIfTI.",
            where=folder.path / "plans.json",
            fix="Set `nnunet.orientation` to say in which order of axes it wants its images: "
            "`stored`, or letters such as LPS.",
        )
    return READERS[reader]


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


# nnU-Net's checkpoints and architectures, opened without running code that a file names.
#
# nnU-Net loads checkpoints with `weights_only=False` and imports whatever class path stands in
# plans.json. Here a checkpoint may hold tensors, plain values and numpy numbers, and plans.json may
# name layers of torch and networks of `dynamic_network_architectures`, nothing else.

_NETWORKS = "dynamic_network_architectures."
_LAYERS = ("torch.nn.", _NETWORKS)
# What else plans.json names, and nnU-Net would look up among its own modules.
_PARTS = {
    "resampling_fn_data": ("resample_data_or_seg_to_shape", "resample_torch_fornnunet"),
    "resampling_fn_seg": ("resample_data_or_seg_to_shape", "resample_torch_fornnunet"),
    "preprocessor_name": ("DefaultPreprocessor",),
}
_NORMALISATIONS = tuple(f"{way}Normalization" for way in ("CT", "No", "RescaleTo01", "ZScore"))


@dataclass(frozen=True)
class NnunetCheckpoint:
    """What is used of a checkpoint.

    Attributes:
        weights: parameter name -> tensor.
        mirror_axes: axes (of the transposed image) that may be mirrored when it is used.
    """

    weights: Mapping[str, Tensor]
    configuration: str
    trainer: str
    mirror_axes: tuple[int, ...] | None


def read_checkpoint(path: Path) -> NnunetCheckpoint:
    """Reads a checkpoint that nnU-Net's trainer saved.

    Raises:
        TeacherError: it cannot be read without running code, or nnU-Net did not write it.
    """
    try:
        with torch.serialization.safe_globals(_numpy_numbers()):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, OSError, ValueError, KeyError) as error:
        raise TeacherError(
            f"not a checkpoint of tensors and plain values ({type(error).__name__}).",
            where=path,
            fix="A file that would run code when loaded is refused. If you trust it, save it again "
            "without its optimiser and logs: docs/teachers.md shows how.",
        ) from error
    try:
        axes = content.get("inference_allowed_mirroring_axes")
        return NnunetCheckpoint(
            weights=dict(content["network_weights"]),
            configuration=str(content["init_args"]["configuration"]),
            trainer=str(content["trainer_name"]),
            mirror_axes=tuple(int(axis) for axis in axes) if axes else None,
        )
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise TeacherError(
            f"a tensor file, but not one that nnU-Net v2 wrote ({type(error).__name__}: {error}).",
            where=path,
            fix="Name the checkpoint that its training saved in `nnunet.checkpoint`.",
        ) from error


def build_architecture(folder: ModelFolder, configuration: Any, *, out_channels: int) -> nn.Module:
    """The network that plans.json describes, without deep supervision; weights are arbitrary."""
    from nnunetv2.utilities.get_network_from_plans import get_network_from_plans

    where = folder.path / "plans.json"
    try:
        name = configuration.network_arch_class_name
        arguments = configuration.network_arch_init_kwargs
        imported = list(configuration.network_arch_init_kwargs_req_import)
        layers = {key: arguments[key] for key in imported if arguments[key] is not None}
    except (KeyError, TypeError, RuntimeError) as error:
        raise TeacherError(
            f"its architecture cannot be read ({type(error).__name__}: {error}).",
            where=where,
            fix="It must be written by nnU-Net v2.",
        ) from error
    _check_class(name, (_NETWORKS,), where)
    for layer in layers.values():
        _check_class(layer, _LAYERS, where)
    try:
        network: nn.Module = get_network_from_plans(
            name, arguments, imported, 1, out_channels,
            allow_init=False, deep_supervision=False,
        )  # fmt: skip
    except (TypeError, ValueError, AssertionError, RuntimeError, IndexError) as error:
        raise TeacherError(
            f"{name} cannot be built from plans.json ({error}).",
            where=where,
            fix="The file was changed, or another version of nnU-Net wrote it.",
        ) from error
    return network


def check_parts(folder: ModelFolder, configuration: Mapping[str, Any]) -> None:
    """Refuses preprocessing that is not nnU-Net's own."""
    labels = folder.plans.get("label_manager", "LabelManager")
    named = [
        *((key, configuration.get(key), allowed) for key, allowed in _PARTS.items()),
        *(
            ("normalization_schemes", scheme, _NORMALISATIONS)
            for scheme in configuration.get("normalization_schemes", ())
        ),
        ("label_manager", labels, ("LabelManager",)),
    ]
    for key, value, allowed in named:
        if value not in allowed:
            raise TeacherError(
                f"{key} is {value!r}, which is not nnU-Net's own.",
                where=folder.path / "plans.json",
                fix=f"Known: {', '.join(allowed)}. For a model with code of its own use a teacher "
                "of kind `factory`.",
            )


def _check_class(name: Any, allowed: tuple[str, ...], where: Path) -> None:
    """The name must be that of a layer class, defined where it says: `pydoc.locate` would import
    any module, and hand back any of its attributes."""
    found = None
    if isinstance(name, str) and name.startswith(allowed):
        parts = name.split(".")
        if all(part.isidentifier() and not part.startswith("_") for part in parts):
            found = pydoc.locate(name)
    is_layer = isinstance(found, type) and issubclass(found, nn.Module)
    if not is_layer or not str(found.__module__).startswith(allowed):
        raise TeacherError(
            f"it names {name!r} as a part of the network, which is not a layer of "
            f"{' or '.join(a.rstrip('.') for a in allowed)}.",
            where=where,
            fix="Code that a file names is not run. For a network of your own use a teacher of "
            "kind `factory`.",
        )


def _numpy_numbers() -> list[Any]:
    """What pickles of numpy numbers and arrays name, as numpy 1 and numpy 2 spell it: nnU-Net's
    log of Dice scores is made of them. None of it can run anything."""
    import _codecs

    from numpy._core import multiarray

    allowed: list[Any] = [np.dtype, np.ndarray, _codecs.encode]
    for function in ("scalar", "_reconstruct"):
        for package in ("numpy.core", "numpy._core"):
            allowed.append((getattr(multiarray, function), f"{package}.multiarray.{function}"))
    plain = ("f2", "f4", "f8", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", "?", "U1")
    return allowed + [type(np.dtype(t)) for t in plain]
