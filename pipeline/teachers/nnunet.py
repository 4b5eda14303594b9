"""nnU-Net's checkpoints and architectures, opened without running code that a file names.

nnU-Net loads checkpoints with `weights_only=False` and imports whatever class path stands in
plans.json. Here a checkpoint may hold tensors, plain values and numpy numbers, and plans.json may
name layers of torch and networks of `dynamic_network_architectures`, nothing else.
"""

from __future__ import annotations

import pickle
import pydoc
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from pipeline.errors import TeacherError
from pipeline.teachers.nnunet_folder import ModelFolder

_NETWORKS = "dynamic_network_architectures."
_LAYERS = ("torch.nn.", _NETWORKS)
# What else plans.json names, and nnU-Net would look up among its own modules.
_PARTS = {
    "resampling_fn_data": ("resample_data_or_seg_to_shape", "resample_torch_fornnunet"),
    "resampling_fn_seg": ("resample_data_or_seg_to_shape", "resample_torch_fornnunet"),
    "preprocessor_name": ("DefaultPreprocessor",),
}
_NORMALISATIONS = (
    "CTNormalization",
    "NoNormalization",
    "RescaleTo01Normalization",
    "ZScoreNormalization",
)


@dataclass(frozen=True)
class NnunetCheckpoint:
    """What is used of a checkpoint.

    Attributes:
        weights: parameter name -> tensor.
        configuration: which of the plans' configurations it was trained in.
        trainer: class name of its trainer.
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


def build_architecture(
    folder: ModelFolder, configuration: Any, *, in_channels: int, out_channels: int
) -> nn.Module:
    """The network that plans.json describes, without deep supervision; weights are arbitrary.

    Args:
        folder: named in errors.
        configuration: nnU-Net's ConfigurationManager.
        in_channels: of the image.
        out_channels: labels or regions.

    Raises:
        TeacherError: plans.json names code that is not nnU-Net's own, or that does not exist.
    """
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
            name,
            arguments,
            imported,
            in_channels,
            out_channels,
            allow_init=False,
            deep_supervision=False,
        )
    except (TypeError, ValueError, AssertionError, RuntimeError, IndexError) as error:
        raise TeacherError(
            f"{name} cannot be built from plans.json ({error}).",
            where=where,
            fix="The file was changed, or another version of nnU-Net wrote it.",
        ) from error
    return network


def check_parts(folder: ModelFolder, configuration: Mapping[str, Any]) -> None:
    """Refuses preprocessing that is not nnU-Net's own.

    Raises:
        TeacherError: plans.json names another preprocessor, resampling or normalisation.
    """
    named = [(key, configuration.get(key), allowed) for key, allowed in _PARTS.items()]
    for scheme in configuration.get("normalization_schemes", ()):
        named.append(("normalization_schemes", scheme, _NORMALISATIONS))
    named.append(
        ("label_manager", folder.plans.get("label_manager", "LabelManager"), ("LabelManager",))
    )
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
    if isinstance(name, str) and name.startswith(allowed) and not _has_hidden_part(name):
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


def _has_hidden_part(name: str) -> bool:
    return any(not part.isidentifier() or part.startswith("_") for part in name.split("."))


def _numpy_numbers() -> list[Callable[..., Any] | tuple[Callable[..., Any], str]]:
    """What pickles of numpy numbers and arrays name, as numpy 1 and numpy 2 spell it: nnU-Net's
    log of Dice scores is made of them. None of it can run anything."""
    import _codecs

    from numpy._core import multiarray

    allowed: list[Callable[..., Any] | tuple[Callable[..., Any], str]] = [
        np.dtype,
        np.ndarray,
        _codecs.encode,
    ]
    for function in ("scalar", "_reconstruct"):
        for package in ("numpy.core", "numpy._core"):
            allowed.append((getattr(multiarray, function), f"{package}.multiarray.{function}"))
    plain = ("f2", "f4", "f8", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", "?", "U1")
    return allowed + [type(np.dtype(t)) for t in plain]
