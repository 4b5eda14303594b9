"""The files of a MONAI bundle's folder: config, metadata, weights."""

from __future__ import annotations

import pickle
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.config import read_json
from pipeline.data.entries import TeacherEntry
from pipeline.data.labels import is_ct
from pipeline.data.weights import BUNDLE_CONFIGS, bundle_config, bundle_weights
from pipeline.errors import TeacherError

if TYPE_CHECKING:  # digests are made where no network is loaded
    from torch import Tensor

_STATE_KEYS = ("model", "network", "net", "state_dict", "model_state_dict")
_GENERIC = {"foreground", "label", "organ", "object", "mask", "class", "target", "lesion", "tumor",
            "tumour", "cancer", "channel"}  # fmt: skip


@dataclass(frozen=True)
class BundleFiles:
    """A bundle as it lies on the disk.

    Attributes:
        config: the inference config, with the metadata as `_meta_`; nothing in it is resolved.
    """

    config: Mapping[str, Any]
    metadata: Mapping[str, Any]
    state: Mapping[str, Tensor]

    @property
    def image_key(self) -> str:
        """What the config calls its one input."""
        inputs = entry_of(self.metadata, "network_data_format", "inputs")
        return next(iter(inputs)) if len(inputs) == 1 else "image"


def read_bundle(folder: Path, *, where: str) -> BundleFiles:
    """Reads a bundle's files; nothing in them is run.

    Raises:
        TeacherError: a file that is absent or cannot be read, or weights that are no plain tensors.
    """
    path = bundle_config(folder)
    if path is None:
        raise TeacherError(
            f"configs/ has none of {', '.join(BUNDLE_CONFIGS)}.",
            where=where,
            fix="Name the folder that holds `configs` and `models`.",
        )
    metadata = read_metadata(folder)
    config = {**_read_config(path, where), "_meta_": metadata}
    if not bundle_weights(folder).is_file():
        raise no_weights(folder)
    return BundleFiles(config, metadata, _read_state(bundle_weights(folder), where))


def read_metadata(folder: Path) -> dict[str, Any]:
    """What a bundle says of itself.

    Raises:
        TeacherError: it cannot be read.
    """
    return read_json(folder / "configs" / "metadata.json", TeacherError)


def no_weights(folder: Path) -> TeacherError:
    """The error for a bundle without weights."""
    exported = sorted(str(file) for file in bundle_weights(folder).parent.glob("*.ts"))
    return TeacherError(
        "models/model.pt does not exist.",
        where=folder,
        fix=f"Use {exported[0]} with kind `exported`."
        if exported
        else "Fetch the weights: where they are is often said in `large_files.yml`.",
    )


def _read_config(path: Path, where: str) -> dict[str, Any]:
    from monai.bundle import ConfigParser

    try:
        content = ConfigParser.load_config_file(path)
    except Exception as error:  # JSON, YAML, encodings, keys written twice
        raise TeacherError(
            f"configs/{path.name} cannot be read ({type(error).__name__}: {error}).",
            where=where,
            fix="Fetch the bundle again.",
        ) from error
    if not isinstance(content, dict):
        raise TeacherError(
            f"configs/{path.name} is no mapping.", where=where, fix="Fetch it again."
        )
    return content


def _read_state(path: Path, where: str) -> dict[str, Tensor]:
    import torch

    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, OSError, ValueError, KeyError) as error:
        raise TeacherError(
            f"models/model.pt is not a plain tensor file ({type(error).__name__}).",
            where=where,
            fix="A file that would run code when loaded is refused: save the state dict alone.",
        ) from error
    for key in _STATE_KEYS:
        if isinstance(content, dict) and isinstance(content.get(key), dict):
            content = content[key]
            break
    if not isinstance(content, dict) or not all(
        isinstance(v, torch.Tensor) for v in content.values()
    ):
        raise TeacherError(
            "models/model.pt holds no state dict.",
            where=where,
            fix=f"It must be one, alone or under one of the names {', '.join(_STATE_KEYS)}.",
        )
    return content


def no_ct_inputs(metadata: Mapping[str, Any]) -> list[str]:
    """What the metadata says of inputs that are not one channel of CT, which is all there is."""
    found = []
    for name, image in entry_of(metadata, "network_data_format", "inputs").items():
        said = image if isinstance(image, dict) else {}
        number, modality = said.get("num_channels", 1), str(said.get("modality", ""))
        if number != 1:
            found.append(f"its input {name} has {number} channels, and a CT has 1")
        if is_ct(modality) is False:
            found.append(f"its input {name} is {modality}, and a teacher is shown CT")
    return found


def network_output(metadata: Mapping[str, Any]) -> Mapping[str, Any]:
    """What the metadata says of the network's output; empty if it says nothing."""
    outputs = entry_of(metadata, "network_data_format", "outputs")
    named = outputs.get("pred", next(iter(outputs.values())) if len(outputs) == 1 else {})
    return named if isinstance(named, dict) else {}


def contradictions(entry: TeacherEntry, metadata: Mapping[str, Any]) -> list[str]:
    """What the registry says of channels against what the bundle's metadata says.

    Names agree if they share a word: "liver" with "Liver", "liver and tumor" or "left_liver". Where
    several channels mean an organ, one of them must agree. Names such as "foreground" say nothing.
    """
    found, output = no_ct_inputs(metadata), network_output(metadata)
    number = output.get("num_channels")
    if isinstance(number, int) and entry.num_channels not in (None, number):
        found.append(f"num_channels is {number} there but {entry.num_channels} in the registry")
    names = {str(k): str(v) for k, v in entry_of(output, "channel_def").items()}
    for organ, channels in entry.organs.items():
        if isinstance(number, int) and max(channels) >= number:
            found.append(f"{organ} is channel {max(channels)}, and there are {number} (from 0)")
        elif names and not _agrees(organ, [names.get(str(c), "") for c in channels]):
            said = ", ".join(f"{c} is {names.get(str(c), 'not there')!r}" for c in channels)
            found.append(f"channel {said} there, but {organ} in the registry")
    return found


def _agrees(organ: str, names: list[str]) -> bool:
    if any("background" in name.lower() for name in names):
        return False
    telling = [name for name in names if _words(name) - _GENERIC]
    ours = _letters(organ)
    return not telling or any(
        _words(organ) & _words(name) or ours in _letters(name) or _letters(name) in ours
        for name in telling
    )


def _words(name: str) -> set[str]:
    """Lower-case words without numbers and without a plural's s."""
    return {word.removesuffix("s") for word in re.findall(r"[^\W\d_]+", name.lower())}


def _letters(name: str) -> str:
    return "".join(re.findall(r"[^\W\d_]", name.lower())).removesuffix("s")


def entry_of(data: Mapping[str, Any], *names: str) -> Mapping[str, Any]:
    """The mapping at `data[a][b]`; empty if there is none."""
    for name in names:
        value = data.get(name)
        data = value if isinstance(value, dict) else {}
    return data
