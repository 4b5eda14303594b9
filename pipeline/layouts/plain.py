"""Folders without a JSON file: images and labels told apart by the names people give them."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product
from pathlib import Path

from pipeline.data.files import FoundPair, find_pairs
from pipeline.errors import RegistryError

_ENDINGS = (".nii.gz", ".nii")
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
    if len(fitting) == 1:
        return next(iter(fitting.values()))
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


def _candidates(root: Path) -> Iterator[tuple[str, str]]:
    folders = {path.name for path in root.iterdir() if path.is_dir()}
    image_folders = [name for name in _IMAGE_FOLDERS if name in folders]
    label_folders = [name for name in _LABEL_FOLDERS if name in folders]
    for image, label, ending in product(image_folders, label_folders, _ENDINGS):
        for images, labels in _IN_FOLDERS:
            yield f"{image}/{images}{ending}", f"{label}/{labels}{ending}"
    for ending in _ENDINGS:
        for images, labels in _SIDE_BY_SIDE:
            # One folder, or batches of it: ** stands for no folder too.
            yield f"**/{images}{ending}", f"**/{labels}{ending}"
    if folders:
        for image, label, ending in product(_IMAGE_OF_CASE, _LABEL_OF_CASE, _ENDINGS):
            yield f"{{case}}/{image}{ending}", f"{{case}}/{label}{ending}"
