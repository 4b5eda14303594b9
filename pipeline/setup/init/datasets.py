"""Folders of CTs and labels -> what a registry says of them; no voxel is read.

nnU-Net raw folders, Medical Segmentation Decathlon folders, MONAI datalists; anything else is
looked at as plain files.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path, PurePosixPath
from typing import Any

from pipeline.config import read_json
from pipeline.data.dicom import is_series
from pipeline.data.entries import Pair
from pipeline.data.files import FoundPair, find_pairs, is_absent, match_files, name_of, search_files
from pipeline.data.labels import same_name
from pipeline.data.splits import SPLITS
from pipeline.errors import RegistryError, listed
from pipeline.folder import json_with
from pipeline.setup.init.meanings import Named
from pipeline.teachers.nnunet_folder import channel_names

_SPLIT_OF = {"training": "train", "validation": "validation", "testing": "test", "test": "test"}


@dataclass(frozen=True)
class FoundDataset:
    """A dataset as it lies on the disk.

    Attributes:
        layout: in words, for people.
        images, labels: patterns below root, or None.
        pairs: case -> files below root, instead of patterns.
        names: label values by the names of its JSON file, without background; empty if it has none.
        ignore: label values that the file says mean unknown.
        split: train, validation, test -> cases, where the file says so; empty: it does not.
        licence, source: as the file says.
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

    def image_files(self) -> dict[str, Path]:
        """Case -> image, by name."""
        if self.images is None or self.labels is None:
            return {case: self.root / p.image for case, p in sorted((self.pairs or {}).items())}
        found, _ = find_pairs(self.root, self.images, self.labels)
        return {case: pair.image_path for case, pair in sorted(found.items())}


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
        return _listed(path.parent, read_json(path, RegistryError), path)
    described = path / "dataset.json"
    content = read_json(described, RegistryError) if described.is_file() else None
    if patterns is not None:
        about = _described(content, described) if content is not None else {}
        images, labels = patterns
        return FoundDataset("files as named", path, images, labels, **about)
    if content is None:
        said = {file: json_with(file, "training") or {} for file in sorted(path.glob("*.json"))}
        lists = [file for file, found in said.items() if isinstance(found.get("training"), list)]
        if len(lists) > 1:
            raise RegistryError(
                f"several lists of cases: {', '.join(file.name for file in lists)}.",
                where=path,
                fix="Name the one that is meant instead of the folder.",
            )
        if lists:
            return _listed(path, said[lists[0]], lists[0])
        images, labels = find_plain(path)
        return FoundDataset("plain files", path, images, labels)
    if isinstance(content.get("dataset"), dict) or _is_nnunet(path, content):
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


def _nnunet(path: Path, content: Mapping[str, Any], file: Path) -> FoundDataset:
    ending = str(content.get("file_ending", ".nii.gz"))
    if ending not in (".nii.gz", ".nii"):
        raise RegistryError(
            f"its files end in {ending}, and only NIfTI is read.",
            where=file,
            fix="Convert them to .nii.gz.",
        )
    channel, notes = _ct_channel(content, file)
    about = _described(content, file)
    if not isinstance(content.get("dataset"), dict):
        images, labels = f"imagesTr/{{case}}_{channel:04d}{ending}", f"labelsTr/{{case}}{ending}"
        require_all_taken(path, images, labels)
        return FoundDataset("nnU-Net raw", path, images, labels, notes=notes, **about)
    try:
        pairs = {
            str(case): Pair(image=entry["images"][channel], label=entry["label"])
            for case, entry in content["dataset"].items()
        }
    except (KeyError, IndexError, TypeError, ValueError) as error:
        raise RegistryError(
            f"`dataset` is not what nnU-Net v2 writes ({type(error).__name__}: {error}).",
            where=file,
            fix='It holds {case: {"images": [path, ..], "label": path}}.',
        ) from error
    return FoundDataset("nnU-Net raw", path, pairs=pairs, notes=notes, **about)


def _listed(root: Path, content: Mapping[str, Any], file: Path) -> FoundDataset:
    """Decathlon's dataset.json and MONAI's datalists: lists of {image, label}."""
    if not any(isinstance(content.get(key), list) for key in _SPLIT_OF):
        raise RegistryError(
            "neither nnU-Net's dataset.json nor a list of cases (Decathlon, MONAI): it has no "
            "`channel_names` and no `training`.",
            where=file,
            fix="Name the files yourself with --files NAME=IMAGES,LABELS.",
        )
    _, notes = _ct_channel(content, file)
    if len(channel_names(content)) > 1:  # a file holds them all, and is 4D
        raise RegistryError(
            "images of several channels.", where=file, fix="Save the CT alone as 3D files."
        )
    pairs, split, more = read_lists(content, root, file)
    about = _described(content, file)
    found = FoundDataset(
        "Decathlon" if about.get("names") else "MONAI datalist",
        root, pairs=pairs, split=split, notes=(*notes, *more), **about,
    )  # fmt: skip
    patterns = as_patterns(root, pairs)
    if patterns is None:
        return found
    return replace(found, images=patterns[0], labels=patterns[1], pairs=None)


def _described(content: Mapping[str, Any], file: Path) -> dict[str, Any]:
    """Names, licence and source: what a JSON file says beside its cases."""
    names, ignore = _label_names(content.get("labels", {}), file)
    licence = content.get("licence") or content.get("license") or content.get("licences") or ""
    source = content.get("reference") or content.get("description") or ""
    licence, source = (" ".join(str(text).split())[:200] for text in (licence, source))
    return {"names": names, "ignore": ignore, "licence": licence, "source": source}


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


def _ct_channel(content: Mapping[str, Any], file: Path) -> tuple[int, tuple[str, ...]]:
    """Which input channel is the CT, and what to tell the user of it."""
    names = channel_names(content)
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


# Lists of cases in JSON files (Decathlon, MONAI) -> pairs of files, or patterns that mean them.


def read_lists(
    content: Mapping[str, Any], root: Path, file: Path
) -> tuple[dict[str, Pair], dict[str, tuple[str, ...]] | None, tuple[str, ...]]:
    """Reads `training` and, where they have labels, `validation`, `testing` and `test`.

    Returns:
        case -> files; the split, if more than `training` has labels; what a user should know.
    """
    entries: list[tuple[str, Pair]] = []
    num_without, has_folds = 0, False
    for key, split in _SPLIT_OF.items():
        for index, entry in enumerate(content.get(key) or []):
            pair = _pair(entry, f"{file}: {key}[{index}]")
            has_folds |= isinstance(entry, dict) and "fold" in entry
            num_without += pair is None
            entries += [] if pair is None else [(split, pair)]
    if not entries:
        raise RegistryError(
            "none of its cases has a label.", where=file, fix="Name a list with image and label."
        )
    paths = [path for _, pair in entries for path in (pair.image, pair.label)]
    if absent := [path for path in paths if is_absent(root / path)]:
        raise RegistryError(
            f"{len(absent)} files that it lists do not exist below {root}, the first is "
            f"{absent[0]}.",
            where=file,
            fix="Put the list into the folder that its paths begin at, or correct the paths.",
        )
    names = _case_names([pair for _, pair in entries], file)
    pairs = {name: pair for name, (_, pair) in zip(names, entries, strict=True)}
    of = [split for split, _ in entries]
    splits: dict[str, tuple[str, ...]] = {
        split: tuple(name for name, own in zip(names, of, strict=True) if own == split)
        for split in SPLITS
    }
    notes = [f"{num_without} cases without a label are left out"] if num_without else []
    notes += ["its folds are not used: see `split`"] if has_folds else []
    return pairs, splits if splits["validation"] or splits["test"] else None, tuple(notes)


def as_patterns(root: Path, pairs: Mapping[str, Pair]) -> tuple[str, str] | None:
    """Patterns that find exactly these cases by these names, or None if there are none."""
    case, first = next(iter(pairs.items()))
    if first.image.count(case) != 1 or first.label.count(case) != 1:
        return None
    images, labels = (path.replace(case, "{case}") for path in (first.image, first.label))
    if PurePosixPath(images).is_absolute() or PurePosixPath(labels).is_absolute():
        return None
    found, problems = find_pairs(root, images, labels)
    wanted = {name: FoundPair(root / p.image, root / p.label) for name, p in pairs.items()}
    return (images, labels) if found == wanted and not problems else None


def _pair(entry: Any, where: str) -> Pair | None:
    """The files of an entry; None if it has no label."""
    if isinstance(entry, str) or (isinstance(entry, dict) and not entry.get("label")):
        return None
    try:
        image, label = entry["image"], entry["label"]
        if not isinstance(image, str) or not isinstance(label, str):
            raise TypeError("image and label are one path each")
        return Pair(image=str(PurePosixPath(image)), label=str(PurePosixPath(label)))
    except (KeyError, TypeError, ValueError) as error:
        raise RegistryError(
            f"not a case ({type(error).__name__}: {error}).",
            where=where,
            fix='A case is {"image": path, "label": path}; images of several files are not read.',
        ) from error


def _case_names(pairs: list[Pair], file: Path) -> list[str]:
    """By the label's name; by the whole path where that is not enough to tell them apart."""
    for part in (slice(-1, None), slice(None)):
        paths = ["/".join(PurePosixPath(pair.label).parts[part]) for pair in pairs]
        plain = (re.sub(r"\.nii(\.gz)?$", "", path) for path in paths)
        names = [re.sub(r"[^A-Za-z0-9_.-]+", "-", n).lstrip("_.-") or "case" for n in plain]
        if len(set(names)) == len(names):
            return names
    raise RegistryError(
        "a label is listed more than once.", where=file, fix="List each case once, in one split."
    )


# Folders without a JSON file: images and labels told apart by the names people give them.

_ENDING = re.compile(r"\.nii(\.gz)?$", re.IGNORECASE)
_CHANNEL = re.compile(r"(_\d{4})?\.nii(\.gz)?$", re.IGNORECASE)
_NAMED = 3
_IMAGE_FOLDERS = ("imagesTr", "images", "image", "imgs", "img", "ct", "CT", "scans", "volumes",
                  "dicom", "DICOM")  # fmt: skip
_LABEL_FOLDERS = ("labelsTr", "labels", "label", "masks", "mask", "segmentations", "segmentation",
                  "segs", "seg", "gt")  # fmt: skip
_IN_FOLDERS = (
    ("{case}_0000", "{case}"),
    ("{case}", "{case}"),
    ("{case}", "{case}_seg"),
    ("{case}", "{case}_label"),
    ("{case}", "{case}_mask"),
    ("{case}_ct", "{case}_seg"),
    ("img{case}", "label{case}"),
    ("image{case}", "label{case}"),
    ("volume-{case}", "segmentation-{case}"),
)
_IMAGE_OF_CASE = ("imaging", "image", "img", "ct", "CT", "volume", "dicom", "DICOM")
_LABEL_OF_CASE = ("segmentation", "label", "labels", "seg", "mask", "gt")
_SIDE_BY_SIDE = (
    ("volume-{case}", "segmentation-{case}"),
    ("{case}_image", "{case}_label"),
    ("{case}_ct", "{case}_seg"),
    ("{case}_0000", "{case}_seg"),
    ("{case}", "{case}_seg"),
    ("{case}", "{case}_label"),
    ("{case}", "{case}_mask"),
)


def find_plain(root: Path) -> tuple[str, str]:
    """Patterns of images and labels below a folder."""
    fitting: dict[tuple[FoundPair, ...], tuple[str, str]] = {}
    for images, labels in _candidates(root):
        found, _ = find_pairs(root, images, labels)
        if found:
            fitting.setdefault(tuple(found.values()), (images, labels))
    for pairs, patterns in fitting.items():
        if all(set(other) <= set(pairs) for other in fitting):
            require_all_taken(root, *patterns)
            return patterns
    fix = (
        "Name the files with --files NAME=IMAGES,LABELS, for example "
        "--files 'NAME=ct/{case}.nii.gz,seg/{case}.nii.gz'."
    )
    if fitting:
        read = "; or ".join(f"{images} with {labels}" for images, labels in fitting.values())
        raise RegistryError(
            f"more than one way to pair images and labels: {read}.", where=root, fix=fix
        )
    if any(root.glob("*/segmentations/*.nii*")):
        raise RegistryError(
            "each structure is a file of its own (*/segmentations/), and a case has one label map.",
            where=root,
            fix="Combine the files of a case into one NIfTI with a value per structure.",
        )
    raise RegistryError(
        "no dataset.json, no list of cases, and no images with labels under names that are known.",
        where=root,
        fix=fix,
    )


def require_all_taken(root: Path, images: str, labels: str) -> None:
    """A layout holds for all names: nothing that lies among the images may be left out unsaid.

    Raises:
        RegistryError: NIfTI files beside the images, or folders of cases, that no pattern takes;
            further channels of an image are none of these.
    """
    taken, label_files = (match_files(root, pattern, []) for pattern in (images, labels))
    if "{case}/" in images:
        known = {path.relative_to(root).parts[0] for path in taken.values()}
        places, _ = search_files(root, "*/*")
        names = [name.split("/")[0] for name in places if _ENDING.search(name)]
        left = [name for name in dict.fromkeys(names) if name not in known]
    else:
        stems = {_CHANNEL.sub("", str(path)) for path in taken.values()}
        found = {path for folder in {p.parent for p in taken.values()} for path in folder.iterdir()}
        others = sorted(found - {*taken.values(), *label_files.values()})
        left = [
            path.relative_to(root).as_posix() for path in others
            if _ENDING.search(path.name) and _CHANNEL.sub("", str(path)) not in stems
        ]  # fmt: skip
    left = [name_of(name) for name in left if not name.rpartition("/")[2].startswith(".")]
    if left:
        raise RegistryError(
            f"{images} with {labels} leaves out {listed(left, _NAMED)}.",
            where=root,
            fix="Name them like the others, move them elsewhere, or say with --files "
            f"'NAME={images},{labels}' that this is meant.",
        )


def _candidates(root: Path) -> Iterator[tuple[str, str]]:
    files, _ = search_files(root, "**/*.[nN][iI][iI]*")
    endings = sorted({match[0] for match in map(_ENDING.search, files) if match})
    endings += [".nii*"] if len(endings) > 1 else []
    folders = {path.name for path in root.iterdir() if path.is_dir()}
    image_folders = [name for name in _IMAGE_FOLDERS if name in folders]
    label_folders = [name for name in _LABEL_FOLDERS if name in folders]
    for image, label, ending in product(image_folders, label_folders, endings):
        for images, labels in _IN_FOLDERS:
            yield f"{image}/{images}{ending}", f"{label}/{labels}{ending}"
            if _holds_series(root, f"{image}/*"):
                yield f"{image}/{{case}}", f"{label}/{labels}{ending}"
    for ending in endings:
        for images, labels in _SIDE_BY_SIDE:
            # One folder, or batches of it: ** stands for no folder too.
            yield f"**/{images}{ending}", f"**/{labels}{ending}"
    if folders:
        for image, label, ending in product(_IMAGE_OF_CASE, _LABEL_OF_CASE, endings):
            yield f"{{case}}/{image}{ending}", f"{{case}}/{label}{ending}"
            if _holds_series(root, f"*/{image}"):
                yield f"{{case}}/{image}", f"{{case}}/{label}{ending}"


def _holds_series(root: Path, pattern: str) -> bool:
    """Whether the first folder that a pattern finds is a DICOM series."""
    first = next((path for path in sorted(root.glob(pattern)) if path.is_dir()), None)
    return first is not None and is_series(first)
