"""Trained networks on the disk -> what a registry says of them; nothing is loaded or run.

Folders of nnU-Net and MONAI bundles say in JSON what their channels are; a checkpoint of
`pipeline train-teachers` says it beside its weights, which is read here without torch.
"""

from __future__ import annotations

import json
import re
import zipfile
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pipeline.config import read_json, read_yaml
from pipeline.data.entries import NnunetOptions, TeacherEntry
from pipeline.data.labels import same_name
from pipeline.data.weights import bundle_config, bundle_weights
from pipeline.errors import CheckpointError, ConfigError, TeacherError
from pipeline.networks.tensor_file import read_beside_tensors
from pipeline.setup.init.meanings import Ask, Named
from pipeline.teachers.bundle_files import (
    entry_of,
    network_output,
    no_ct_inputs,
    no_weights,
    read_metadata,
)
from pipeline.teachers.nnunet_folder import READERS, read_model_folder

_BEST = "checkpoint_best.pth"
_ONE_CT = "Only networks of one CT channel can teach."


@dataclass(frozen=True)
class FoundTeacher:
    """A network as it lies on the disk.

    Attributes:
        names: output channels by name, without background; empty: nothing names them.
        settings: further keys of its entry that the files say.
        trained_on: nnU-Net's name of the dataset whose order of axes is the only one that it knows;
            empty: of none.
    """

    kind: str
    weights: Path
    names: tuple[Named, ...] = ()
    num_channels: int | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    trained_on: str = ""


def look_at_teacher(path: Path) -> FoundTeacher:
    """Finds out of which kind a teacher is and what its files say.

    Raises:
        TeacherError: nothing is there, or nothing that is known.
    """
    if path.is_file():
        return _file(path)
    if not path.is_dir():
        raise TeacherError("there is no such file or folder.", where=path, fix="Check the path.")
    if (path / "plans.json").is_file():
        return _nnunet(path)
    if (config := bundle_config(path)) is not None:
        return _bundle(path, config)
    models = sorted(found.parent for found in path.glob("*__*__*/plans.json"))
    if len(models) == 1:
        return _nnunet(models[0])
    if models:
        raise TeacherError(
            f"several trained models: {', '.join(model.name for model in models)}.",
            where=path,
            fix="Name the one that is to teach.",
        )
    raise TeacherError(
        "neither a trained nnU-Net (plans.json, dataset.json, fold_0) nor a MONAI bundle "
        "(configs/inference.json).",
        where=path,
        fix="Name the folder that holds those; other networks: kind `factory`, docs/registry.md.",
    )


def _nnunet(path: Path) -> FoundTeacher:
    options = NnunetOptions()
    best = not any(path.glob(f"fold_*/{options.checkpoint}")) and any(path.glob(f"fold_*/{_BEST}"))
    if best:
        options = NnunetOptions(checkpoint=_BEST)
    entry = TeacherEntry(kind="nnunet", weights=str(path), organs={"any": (0,)}, nnunet=options)
    folder = read_model_folder(path, entry)
    if folder.no_ct:
        raise TeacherError(f"{folder.no_ct}.", where=path, fix=_ONE_CT)
    folds = ", ".join(folder.checkpoints)
    names = [Named(n, (c,)) for n, c in folder.channels.items() if folder.has_regions or c]
    settings: dict[str, Any] = {"activation": "sigmoid"} if folder.has_regions else {}
    if best:
        settings["nnunet"] = {"checkpoint": _BEST}
    note = f"folds that have a {'best, no final' if best else 'final'} checkpoint: {folds}"
    num_channels = len(set(folder.channels.values()))
    stored = READERS.get(folder.plans["image_reader_writer"]) == "stored"
    trained_on = str(folder.plans.get("dataset_name", "")) if stored else ""
    return FoundTeacher("nnunet", path, tuple(names), num_channels, settings, (note,), trained_on)


def _bundle(path: Path, config: Path) -> FoundTeacher:
    if not bundle_weights(path).is_file():
        raise no_weights(path)
    metadata = read_metadata(path)
    if wrong := no_ct_inputs(metadata):
        raise TeacherError(f"{'; '.join(wrong)}.", where=path, fix=_ONE_CT)
    output = network_output(metadata)
    number = output.get("num_channels")
    names = tuple(
        Named(str(name), (int(channel),))
        for channel, name in entry_of(output, "channel_def").items()
        if str(channel).isdecimal() and not same_name(str(name), "background")
    )
    # YAML reads JSON too, but not JSON with tabs.
    found = _activations(
        read_json(config, TeacherError)
        if config.suffix == ".json"
        else read_yaml(config, error=TeacherError).data
    )
    settings = {"activation": found.pop()} if len(found) == 1 else {}
    number = number if isinstance(number, int) else None
    return FoundTeacher("monai-bundle", path, names, number, settings)


def _activations(config: Any) -> set[str]:
    """What the bundle's own postprocessing applies: `Activationsd` with softmax or sigmoid."""
    found: set[str] = set()
    if isinstance(config, dict):
        if str(config.get("_target_", "")).rpartition(".")[2].startswith("Activations"):
            found |= {name for name in ("softmax", "sigmoid") if config.get(name) is True}
        for value in config.values():
            found |= _activations(value)
    elif isinstance(config, list):
        for value in config:
            found |= _activations(value)
    return found


def _file(path: Path) -> FoundTeacher:
    try:
        with zipfile.ZipFile(path) as archive:
            members = {name.partition("/")[2] for name in archive.namelist()}
            if "constants.pkl" in members and any(name.startswith("code/") for name in members):
                return FoundTeacher("exported", path, notes=("TorchScript",))
            if "archive_format" in members:
                return FoundTeacher("exported", path, notes=("torch.export",))
    except (OSError, zipfile.BadZipFile) as error:
        raise TeacherError(
            f"no file of a network that is known ({error}).",
            where=path,
            fix="Save the network as TorchScript or with torch.export.",
        ) from error
    record = _record(path)
    if record is None:
        raise TeacherError(
            "weights alone (`torch.save`), which say nothing of the network.",
            where=path,
            fix="Name the nnU-Net or bundle folder they belong to, save the network as "
            "TorchScript or with torch.export, or describe it by kind `factory`.",
        )
    names = tuple(Named(str(n), tuple(v)) for n, v in entry_of(record, "channels").items())
    settings = {key: value for key, value in record.items() if key in ("spacing_mm", "intensity")}
    note = f"trained on {' '.join(str(record.get('trained_on', '?')).split())}"
    number = record.get("num_channels")
    return FoundTeacher("checkpoint", path, names, number, settings, (note,))


def _record(path: Path) -> dict[str, Any] | None:
    """The record of `pipeline train-teachers`, if it wrote the file."""
    with suppress(CheckpointError, ValueError, KeyError, TypeError):
        record = json.loads(read_beside_tensors(path)["record"])
        return record if isinstance(record, dict) and "channels" in record else None
    return None


# What a teacher's entry says beside its channels: from its files, or from the user's flag.

_NUMBER = r"-?\d+(?:\.\d+)?"
_SPACING = re.compile(rf"({_NUMBER})x({_NUMBER})x({_NUMBER})")
_WINDOW = re.compile(rf"({_NUMBER})\.\.({_NUMBER})")


# What a flag calls it -> the entry's field, and an example.
_SETTINGS = {
    "activation": ("activation", "softmax or sigmoid"),
    "spacing": ("spacing_mm", "1.5x1.5x1.5, z y x in mm, of what it was trained at"),
    "orientation": (
        "orientation", "RAS, where the axes of its array point to, the first axis first"
    ),
    "window": ("intensity", "-160..240, the HU that it saw as -1 and as 1"),
}  # fmt: skip


def settings_of(
    found: FoundTeacher, parts: dict[str, str], *, ask: Ask | None, where: str
) -> tuple[dict[str, Any], list[str]]:
    """Takes `activation`, `spacing`, `orientation` and `window` out of a flag's parts.

    Args:
        parts: of the flag; what is used is taken out.

    Returns:
        further keys of the teacher's entry, and what is not known, in words for the user.

    Raises:
        ConfigError: a setting that cannot be read, or that this kind does not take.
    """
    settings = dict(found.settings)
    # What decides numbers and stands in no file of that kind.
    wanted = {"exported": tuple(_SETTINGS), "monai-bundle": ("activation",)}.get(found.kind, ())
    for key in [key for key in _SETTINGS if key in parts]:
        text = parts.pop(key)
        if key not in wanted or settings.get(_SETTINGS[key][0], text) != text:
            raise ConfigError(
                f"{key}={text} is not for this teacher of kind {found.kind}: its own files say it.",
                where=where,
                fix="Leave it out.",
            )
        settings[_SETTINGS[key][0]] = _setting(key, text, where)
    lacking = [key for key in wanted if _SETTINGS[key][0] not in settings]
    if ask is not None:
        for key in lacking:
            settings[_SETTINGS[key][0]] = _ask_setting(key, ask, where)
        return settings, []
    if not lacking:
        return settings, []
    examples = "; ".join(f"{key}: {_SETTINGS[key][1]}" for key in lacking)
    flag = ",".join(f"{key}={_SETTINGS[key][1].split(',')[0].split(' ')[0]}" for key in lacking)
    return settings, [
        f"{where}: its files do not say {', '.join(lacking)} ({examples}). Add to the flag, as it "
        f"was trained, for example {flag}."
    ]


def _ask_setting(key: str, ask: Ask, where: str) -> Any:
    hint = ""
    while True:
        try:
            return _setting(key, ask(f"{hint}{where}: {key} ({_SETTINGS[key][1]})").strip(), where)
        except ConfigError as error:
            hint = f"{error.what} "


def _setting(key: str, text: str, where: str) -> Any:
    if key == "activation" and text in ("softmax", "sigmoid"):
        return text
    if key == "orientation" and re.fullmatch("[LRAPSI]{3}", text):
        return text
    if key == "spacing" and (match := _SPACING.fullmatch(text)):
        return [float(number) for number in match.groups()]
    if key == "window" and (match := _WINDOW.fullmatch(text)):
        return {"kind": "window", "window_hu": [float(number) for number in match.groups()]}
    raise ConfigError(
        f"{key}={text} cannot be read.", where=where, fix=f"Write {key}: {_SETTINGS[key][1]}."
    )
