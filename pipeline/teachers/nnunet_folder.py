"""A trained nnU-Net v2 model folder: its files, and what they say. nnU-Net itself is not needed.

nnUNetTrainer__nnUNetPlans__3d_fullres/
    plans.json          preprocessing, windows, architecture
    dataset.json        input channels, labels
    fold_0 .. fold_all  checkpoint_final.pth, checkpoint_best.pth
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.config import read_json
from pipeline.data.entries import NnunetOptions, TeacherEntry
from pipeline.data.labels import is_ct, plain_name
from pipeline.data.weights import nnunet_checkpoints
from pipeline.errors import TeacherError, TeacherWarning

# How each of nnU-Net's image readers orders the axes of an array.
READERS = {
    "SimpleITKIO": "stored",
    "NibabelIO": "stored",
    "SimpleITKIOWithReorient": "RAS",
    "NibabelIOWithReorient": "RAS",
}


@dataclass(frozen=True)
class ModelFolder:
    """What is in a model folder.

    Attributes:
        checkpoints: fold ("0" .. or "all") -> checkpoint file, in the order they are averaged in.
    """

    path: Path
    plans: Mapping[str, Any]
    dataset: Mapping[str, Any]
    checkpoints: Mapping[str, Path]

    @property
    def inputs(self) -> tuple[str, ...]:
        """What its input channels are called, in order."""
        return tuple(channel_names(self.dataset))

    @property
    def no_ct(self) -> str:
        """What keeps its input from being one channel of CT; empty: nothing."""
        names = self.inputs
        if len(names) != 1:
            return f"it takes {len(names)} input channels ({', '.join(names)}), and a CT is one"
        if is_ct(names[0]) is False:
            return f"its input channel is {names[0]}, and a teacher is shown CT"
        return ""

    @property
    def has_regions(self) -> bool:
        """Trained on overlapping regions: sigmoid outputs, one per region."""
        return any(isinstance(v, list) and len(v) > 1 for v in self.dataset["labels"].values())

    @property
    def channels(self) -> Mapping[str, int]:
        """Label or region -> output channel, as nnU-Net numbers them."""
        labels: Mapping[str, Any] = self.dataset["labels"]
        if self.has_regions:
            regions = [n for n, v in labels.items() if n != "ignore" and v not in (0, [0])]
            return {name: channel for channel, name in enumerate(regions)}
        values = {n: v[0] if isinstance(v, list) else v for n, v in labels.items() if n != "ignore"}
        order = sorted({int(v) for v in values.values()})
        return {name: order.index(int(v)) for name, v in values.items()}


def channel_names(dataset: Mapping[str, Any]) -> list[str]:
    """What a dataset.json calls the channels of its images, in order; Decathlon's, too."""
    said = dataset.get("channel_names") or dataset.get("modality") or {}
    said = {"0": said} if isinstance(said, str) else said
    return [str(name) for name in (said.values() if isinstance(said, dict) else said)]


def read_model_folder(path: Path, entry: TeacherEntry) -> ModelFolder:
    """What a model folder, `.../TRAINER__PLANS__CONFIGURATION`, says; no checkpoint is opened."""
    files = (path / "plans.json", path / "dataset.json")
    plans, dataset = (read_json(file, TeacherError) for file in files)
    _require(plans, ("configurations", "transpose_forward", "image_reader_writer"), path, "plans")
    _require(dataset, ("labels",), path, "dataset")
    if not _are_labels(dataset["labels"]):
        raise TeacherError(
            "`labels` in dataset.json is not what nnU-Net v2 writes: {name: value}, with "
            "background among them.",
            where=path / "dataset.json",
            fix="Models of nnU-Net v1 cannot be used.",
        )
    options = entry.nnunet or NnunetOptions()
    return ModelFolder(path, plans, dataset, nnunet_checkpoints(path, options))


def _are_labels(labels: Any) -> bool:
    if not isinstance(labels, dict) or "background" not in labels:
        return False
    values = [v if isinstance(v, list) else [v] for v in labels.values()]
    return all(v and all(isinstance(n, int) for n in v) for v in values)


def check_against_registry(name: str, entry: TeacherEntry, folder: ModelFolder) -> None:
    """Holds a registry entry against dataset.json.

    Raises:
        TeacherError: lists every contradiction: several input channels, another activation,
            another number of channels, background as an organ, an organ at another channel than
            dataset.json has its name at, an input channel that is no CT.
    """
    wrong = [folder.no_ct] if folder.no_ct else []
    if not wrong and is_ct(folder.inputs[0]) is None:
        # nnU-Net normalises by this name alone, and only one called CT in Hounsfield units.
        warnings.warn(
            f"teacher {name}: its dataset.json calls its input channel {folder.inputs[0]!r}, so "
            "nnU-Net does not normalise it as a CT. It must have been trained on CT in Hounsfield "
            "units all the same.",
            TeacherWarning,
            stacklevel=2,
        )
    activation = "sigmoid" if folder.has_regions else "softmax"
    if entry.activation != activation:
        why = "regions overlap" if folder.has_regions else "labels exclude each other"
        wrong.append(f"its {why}, so `activation` must be {activation}, not {entry.activation}")
    num_channels = len(set(folder.channels.values()))
    if entry.num_channels not in (None, num_channels):
        wrong.append(f"num_channels is {num_channels} in the folder but {entry.num_channels}")
    wrong += _channel_problems(entry, folder.channels, num_channels, folder.has_regions)
    if wrong:
        table = ", ".join(f"{channel} is {label}" for label, channel in folder.channels.items())
        raise TeacherError(
            f"the registry contradicts dataset.json: {'; '.join(wrong)}.",
            where=f"teacher {name}, {folder.path}",
            fix=f"Correct the registry, or name the right folder. Output channels there: {table}.",
        )


def _channel_problems(
    entry: TeacherEntry, channels: Mapping[str, int], num_channels: int, has_regions: bool
) -> list[str]:
    wrong = []
    label_of = {channel: label for label, channel in channels.items()}
    channel_of = {plain_name(label): channel for label, channel in channels.items()}
    named = {plain_name(organ): organ for organ in entry.organs}
    for organ, wanted in entry.organs.items():
        beyond = [c for c in wanted if c >= num_channels]
        if beyond:
            wrong.append(f"organs.{organ} is {beyond[0]}, but there are {num_channels} channels")
        if not has_regions and 0 in wanted:
            wrong.append(f"organs.{organ} is 0, which is background")
        own = channel_of.get(plain_name(organ))
        if own is not None and own not in wanted:
            wrong.append(f"organs.{organ} is {list(wanted)}, but {organ} is channel {own}")
        for channel in wanted:
            other = named.get(plain_name(label_of.get(channel, "")))
            if other is not None and other != organ:
                wrong.append(f"organs.{organ} is {list(wanted)}, but {channel} is {other}")
    return wrong


def _require(content: Mapping[str, Any], keys: tuple[str, ...], path: Path, name: str) -> None:
    missing = [key for key in keys if key not in content]
    if missing:
        raise TeacherError(
            f"{name}.json lacks {', '.join(missing)}.",
            where=path / f"{name}.json",
            fix="It must be written by nnU-Net v2; models of nnU-Net v1 cannot be used.",
        )
