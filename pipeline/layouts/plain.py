"""Folders without a JSON file: images and labels told apart by the names people give them."""

from __future__ import annotations

import re
from collections.abc import Iterator
from itertools import product
from pathlib import Path

from pipeline.data.files import FoundPair, find_pairs, match_files, name_of, search_files
from pipeline.errors import RegistryError

_ENDING = re.compile(r"\.nii(\.gz)?$", re.IGNORECASE)
_CHANNEL = re.compile(r"(_\d{4})?\.nii(\.gz)?$", re.IGNORECASE)
_NAMED = 3
_IMAGE_FOLDERS = ("imagesTr", "images", "image", "imgs", "img", "ct", "CT", "scans", "volumes")
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
_IMAGE_OF_CASE = ("imaging", "image", "img", "ct", "CT", "volume")
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
    """Patterns of images and labels below a folder.

    Raises:
        RegistryError: nothing is found, or more than one reading is possible.
    """
    fitting: dict[tuple[FoundPair, ...], tuple[str, str]] = {}
    for images, labels in _candidates(root):
        found, _ = find_pairs(root, images, labels, None)
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
        more = f" and {len(left) - _NAMED} more" if len(left) > _NAMED else ""
        raise RegistryError(
            f"{images} with {labels} leaves out {', '.join(left[:_NAMED])}{more}.",
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
    for ending in endings:
        for images, labels in _SIDE_BY_SIDE:
            # One folder, or batches of it: ** stands for no folder too.
            yield f"**/{images}{ending}", f"**/{labels}{ending}"
    if folders:
        for image, label, ending in product(_IMAGE_OF_CASE, _LABEL_OF_CASE, endings):
            yield f"{{case}}/{image}{ending}", f"{{case}}/{label}{ending}"
