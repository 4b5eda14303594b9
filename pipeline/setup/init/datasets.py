"""Folders of CTs and labels -> what a registry says of them; no voxel is read.

nnU-Net raw folders, Medical Segmentation Decathlon folders, MONAI datalists; anything else is
looked at as plain files (`plain`).
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pipeline.data.files import Pair, find_pairs, is_absent, search_files
from pipeline.errors import RegistryError
from pipeline.layouts.lists import as_patterns, read_lists
from pipeline.layouts.meanings import Named, same_name
from pipeline.layouts.plain import find_plain, require_all_taken

_LISTS = ("training", "validation", "testing", "test")


@dataclass(frozen=True)
class FoundDataset:
    """A dataset as it lies on the disk.

    Attributes:
        layout: in words, for people.
        root: its folder.
        images, labels: patterns below root, or None.
        pairs: case -> files below root, instead of patterns.
        names: label values by the names of its JSON file, without background; empty if it has none.
        ignore: label values that the file says mean unknown.
        split: train, validation, test -> cases, where the file says so; empty: it does not.
        licence, source: as the file says.
        notes: what a user should know.
    """

    layout: str
    root: Path
    images: str | None = None
    labels: str | None = None
    pairs: Mapping[str, Pair] | None = None
    names: tuple[Named, ...] = ()
    ignore: tuple[int, ...] = ()
    split: Mapping[str, tuple[str, ...]] | None = None
    licence: str = ""
    source: str = ""
    notes: tuple[str, ...] = ()

    def cases(self) -> list[str]:
        """Names of the cases."""
        return sorted(find_pairs(self.root, self.images, self.labels, self.pairs)[0])

    def image_files(self) -> list[Path]:
        """The images, by case."""
        found, _ = find_pairs(self.root, self.images, self.labels, self.pairs)
        return [pair.image_path for _, pair in sorted(found.items())]


def look_at_dataset(path: Path, patterns: tuple[str, str] | None = None) -> FoundDataset:
    """Finds out how a dataset is laid out.

    Args:
        path: its folder, or a JSON file that lists it.
        patterns: of images and labels below the folder, if the user says them.

    Raises:
        RegistryError: no such folder, a layout that is not known or is ambiguous, no CT.
    """
    if not path.exists():
        raise RegistryError("there is no such folder or file.", where=path, fix="Check the path.")
    if path.is_file():
        return _listed(path.parent, _read_json(path), path)
    described = path / "dataset.json"
    content = _read_json(described) if described.is_file() else None
    if patterns is not None:
        about = _described(path, content, described) if content is not None else {}
        images, labels = patterns
        return FoundDataset("files as named", path, images, labels, **about)
    if content is None:
        lists = [file for file in sorted(path.glob("*.json")) if _is_list(file)]
        if len(lists) > 1:
            raise RegistryError(
                f"several lists of cases: {', '.join(file.name for file in lists)}.",
                where=path,
                fix="Name the one that is meant instead of the folder.",
            )
        if lists:
            return _listed(path, _read_json(lists[0]), lists[0])
        images, labels = find_plain(path)
        return FoundDataset("plain files", path, images, labels)
    if isinstance(content.get("dataset"), dict):
        return _nnunet_pairs(path, content, described)
    if _is_nnunet(path, content):
        return _nnunet(path, content, described)
    return _listed(path, content, described)


def _is_nnunet(path: Path, content: Mapping[str, Any]) -> bool:
    """nnU-Net's files carry the channel in their names, whatever version wrote dataset.json: all
    of them, and labels do not."""
    if "channel_names" in content:
        return True
    ending = str(content.get("file_ending", ".nii.gz"))
    names, _ = search_files(path, f"imagesTr/[!.]*{ending}")
    channel = re.compile(rf"imagesTr/(.+)_\d{{4}}{re.escape(ending)}")
    found = [match[1] if (match := channel.fullmatch(name)) else None for name in names]
    labels = (path / "labelsTr" / f"{case}{ending}" for case in found)
    return bool(found) and None not in found and not all(map(is_absent, labels))


def _nnunet(path: Path, content: Mapping[str, Any], described: Path) -> FoundDataset:
    ending = str(content.get("file_ending", ".nii.gz"))
    _require_nifti(ending, described)
    channel, notes = _ct_channel(content, described)
    about = _described(path, content, described)
    images, labels = f"imagesTr/{{case}}_{channel:04d}{ending}", f"labelsTr/{{case}}{ending}"
    require_all_taken(path, images, labels)
    return FoundDataset("nnU-Net raw", path, images, labels, notes=notes, **about)


def _nnunet_pairs(path: Path, content: Mapping[str, Any], described: Path) -> FoundDataset:
    _require_nifti(str(content.get("file_ending", ".nii.gz")), described)
    channel, notes = _ct_channel(content, described)
    about = _described(path, content, described)
    try:
        pairs = {
            str(case): Pair(image=entry["images"][channel], label=entry["label"])
            for case, entry in content["dataset"].items()
        }
    except (KeyError, IndexError, TypeError, ValueError) as error:
        raise RegistryError(
            f"`dataset` is not what nnU-Net v2 writes ({type(error).__name__}: {error}).",
            where=described,
            fix='It holds {case: {"images": [path, ..], "label": path}}.',
        ) from error
    return FoundDataset("nnU-Net raw", path, pairs=pairs, notes=notes, **about)


def _listed(root: Path, content: Mapping[str, Any], file: Path) -> FoundDataset:
    """Decathlon's dataset.json and MONAI's datalists: lists of {image, label}."""
    if not any(isinstance(content.get(key), list) for key in _LISTS):
        raise RegistryError(
            "neither nnU-Net's dataset.json nor a list of cases (Decathlon, MONAI): it has no "
            "`channel_names` and no `training`.",
            where=file,
            fix="Name the files yourself with --files NAME=IMAGES,LABELS.",
        )
    _, notes = _ct_channel(content, file)
    if len(_channel_names(content)) > 1:  # a file holds them all, and is 4D
        raise RegistryError(
            "images of several channels.", where=file, fix="Save the CT alone as 3D files."
        )
    pairs, split, more = read_lists(content, root, file)
    about = _described(root, content, file)
    found = FoundDataset(
        "Decathlon" if about.get("names") else "MONAI datalist",
        root, pairs=pairs, split=split, notes=(*notes, *more), **about,
    )  # fmt: skip
    patterns = as_patterns(root, pairs)
    if patterns is None:
        return found
    return replace(found, images=patterns[0], labels=patterns[1], pairs=None)


def _described(path: Path, content: Mapping[str, Any], file: Path) -> dict[str, Any]:
    """Names, licence and source: what a JSON file says beside its cases."""
    names, ignore = _label_names(content.get("labels", {}), file)
    licence = content.get("licence") or content.get("license") or content.get("licences") or ""
    source = content.get("reference") or content.get("description") or ""
    return {
        "names": names,
        "ignore": ignore,
        "licence": _one_line(licence),
        "source": _one_line(source),
    }


def _label_names(labels: Any, file: Path) -> tuple[tuple[Named, ...], tuple[int, ...]]:
    """{name: value or values} of nnU-Net v2, or {"value": name} of Decathlon and nnU-Net v1."""
    found: dict[str, tuple[int, ...]] = {}
    try:
        for key, value in dict(labels).items():
            if isinstance(value, str):
                found[value] = (*found.get(value, ()), int(key))
            else:
                values = value if isinstance(value, list) else [value]
                found[str(key)] = tuple(int(v) for v in values)
    except (TypeError, ValueError) as error:
        raise RegistryError(
            f"`labels` cannot be read ({error}).",
            where=file,
            fix='It is {"background": 0, "liver": 1} or {"0": "background", "1": "liver"}.',
        ) from error
    # The one name that nnU-Net itself gives a meaning to.
    ignore = tuple(v for name, values in found.items() if name == "ignore" for v in values)
    names = tuple(
        Named(name, tuple(v for v in values if v))
        for name, values in found.items()
        if name != "ignore" and any(values) and not same_name(name, "background")
    )
    return names, ignore


def _channel_names(content: Mapping[str, Any]) -> list[str]:
    said = content.get("channel_names") or content.get("modality") or {}
    if isinstance(said, str):
        said = {"0": said}
    return [str(name) for name in (said.values() if isinstance(said, dict) else said)]


def _ct_channel(content: Mapping[str, Any], file: Path) -> tuple[int, tuple[str, ...]]:
    """Which input channel is the CT, and what to tell the user of it."""
    names = _channel_names(content)
    cts = [index for index, name in enumerate(names) if same_name(name, "CT")]
    if len(cts) == 1:
        return cts[0], (f"only channel {cts[0]} (CT) is used",) if len(names) > 1 else ()
    if len(names) > 1 or any(name.upper().startswith("MR") for name in names):
        raise RegistryError(
            f"its channels are {', '.join(names)}, and none or several of them are CT.",
            where=file,
            fix="Students are trained on CT in Hounsfield units: use a dataset of one CT channel.",
        )
    if names:
        return 0, (f"the file calls its channel {names[0]!r}: it must be CT in Hounsfield units",)
    return 0, ()


def _require_nifti(ending: str, file: Path) -> None:
    if ending not in (".nii.gz", ".nii"):
        raise RegistryError(
            f"its files end in {ending}, and only NIfTI is read.",
            where=file,
            fix="Convert them to .nii.gz.",
        )


def _is_list(file: Path) -> bool:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(content, dict) and isinstance(content.get("training"), list)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise RegistryError(
            f"not a readable JSON file ({error}).", where=path, fix="Correct it, or copy it again."
        ) from error
    if not isinstance(content, dict):
        raise RegistryError(
            "not a JSON object.", where=path, fix='A list of cases begins with {"training": [.'
        )
    return content


def _one_line(text: Any) -> str:
    return " ".join(str(text).split())[:200]
