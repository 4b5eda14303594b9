"""The images that are to be predicted, by the names of their label maps."""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from pipeline.data.dicom import holds_dicom, is_series
from pipeline.data.files import MAGIC, is_absent, name_of, search_files
from pipeline.data.registry import Registry
from pipeline.errors import ConfigError, listed

_NIFTI = re.compile(r"\.nii(\.gz)?$", re.IGNORECASE)
_IMAGE = re.compile(r"\.(nii(\.gz)?|zip)$", re.IGNORECASE)
_PAIR = re.compile(r"\.(hdr|img)(\.gz)?$", re.IGNORECASE)
_NAMED = 3


@dataclass(frozen=True)
class Inputs:
    """Images, and what is known of them.

    Attributes:
        images: name (may hold a slash) -> NIfTI or DICOM series of a CT.
        other_units: names of those that are no CT in HU on purpose.
        by_case: names are those of a registry's cases: another image of one is its new one.
        references: files beside them that are never replaced, whoever wrote them.
    """

    images: Mapping[str, Path]
    other_units: frozenset[str] = frozenset()
    by_case: bool = False
    references: Sequence[Path] = ()


def find_inputs(*given: Path, left: list[str] | None = None) -> dict[str, Path]:
    """NIfTI files and DICOM series by the names that their label maps get; they need not be
    readable.

    Args:
        given: a file (a zip file is a DICOM series), a folder (all files in it but hidden ones; one
            with DICOM files is itself an image, one of such folders gives them all), or a pattern
            such as `scans/*.nii.gz` or `scans/**/ct.nii.gz`. Names are those of files without
            suffix; of a pattern with folders, paths from the first folder that is not spelt out.
        left: gets sentences on what was not taken, and why.

    Raises:
        ConfigError: nothing there, or two files whose label maps would have one name.
    """
    found: dict[str, Path] = {}
    left = [] if left is None else left
    for path in given:
        before = len(left)
        here = _found(path, left)
        if not here:
            raise ConfigError(
                " ".join(["no NIfTI file and no DICOM series there.", *left[before:]]),
                where=path,
                fix="Give a .nii.gz file, a folder of them or of a DICOM series, or a pattern in "
                "quotes.",
            )
        for name, file in here:
            if name in found and found[name] != file:
                raise ConfigError(
                    f"{_told(file, found[name])} would give one label map.",
                    where=path,
                    fix="Rename one of them, move it elsewhere, or give a pattern in quotes: of "
                    "'cases/*/ct.nii.gz' the folders are part of the names.",
                )
            found[name] = file
    return found


def chosen_inputs(
    images: Sequence[Path] | Path | None,
    registry: Registry | None,
    splits: Sequence[str] | None,
    left: list[str] | None = None,
) -> Inputs:
    """The images of files, folders and patterns, or of a registry's cases as `<dataset>/<case>`.

    Args:
        images, left: see `find_inputs`.
        registry: read without its files; instead of `images`.
        splits: of the registry; None: test.

    Raises:
        ConfigError: both or neither are given, or nothing is there.
    """
    if bool(images) == (registry is not None) or (images and splits):
        raise ConfigError(
            "it takes images, or a registry and splits of it.",
            where="pipeline predict",
            fix="Give IMAGES alone, or --registry with --split.",
        )
    if registry is None:
        assert images is not None
        return Inputs(find_inputs(*([images] if isinstance(images, Path) else images), left=left))
    wanted = splits or ["test"]
    known = [case for dataset in registry.datasets for case in registry.cases(dataset)]
    cases = [case for case in known if case.split in wanted]
    if not cases:
        notes = "".join(f"; {note}" for note in registry.empty_splits(wanted))
        raise ConfigError(
            f"no case is in {' or '.join(wanted)}.",
            where=registry.path,
            fix=f"Set `split` in the registry, or give another --split{notes or '.'}",
        )
    other = {name for name, entry in registry.datasets.items() if entry.units == "other"}
    return Inputs(
        {case.name: case.image for case in cases},
        frozenset(case.name for case in cases if case.dataset in other),
        by_case=True,
        references=[file for case in known for file in (case.image, case.label) if file],
    )


def _found(path: Path, left: list[str]) -> list[tuple[str, Path]]:
    if os.path.isdir(path):  # noqa: PTH112 - never raises
        if holds_dicom(path):
            others = sorted(file.name for file in path.iterdir() if _NIFTI.search(file.name))
            if others:
                left.append(
                    f"{path}: a DICOM series; NIfTI files in it are not taken ({_some(others)})."
                )
            return [(name_of(path.resolve().name), path)]
        root, pattern = path, "*"
    elif not is_absent(path):
        return [(_stem(path.name), path)] if _IMAGE.search(path.name) else []
    else:
        parts, root = list(path.parts), Path()
        while len(parts) > 1 and _is_spelt_out(root / parts[0]):
            root /= parts.pop(0)
        pattern = "/".join(parts)
    names, problems = search_files(root, pattern)
    if problems:
        raise ConfigError(problems[0], where=path, fix="Or name the files.")
    names = [n for n in names if not any(part.startswith(".") for part in n.split("/"))]
    images, rest = [], dict[str, list[str] | None]()
    for name in names:
        inside: list[str] = []
        is_folder = os.path.isdir(root / name)  # noqa: PTH112 - never raises
        if _IMAGE.search(name) or (is_folder and is_series(root / name, inside)):
            images.append((_stem(name), root / name))
        else:
            rest[name] = inside if is_folder else None
    left += _left(root, rest)
    return images


def _is_spelt_out(path: Path) -> bool:
    """Whether its last part means itself: it has no wildcard, or is there by that name."""
    return not any(c in path.name for c in MAGIC) or not is_absent(path)


def _left(root: Path, names: Mapping[str, list[str] | None]) -> list[str]:
    """What was not taken, in sentences; of a folder with the names of the files below it."""
    pairs: dict[str, str] = {}
    full, empty, others = [], [], []
    for name, inside in names.items():
        if _PAIR.search(name):
            pairs.setdefault(_PAIR.sub("", name), name)
        elif inside is None:
            others.append(name)
        elif any(map(_NIFTI.search, inside)):
            full.append(name)
        else:
            empty.append(name)
    found = []
    if pairs:
        header = _PAIR.sub(".hdr", next(iter(pairs.values())))
        how = f"`nib-convert {root / header} {root / next(iter(pairs))}.nii.gz` makes one file."
        found.append(f"Pairs of .hdr and .img are not read ({_some(list(pairs))}): {how}")
    if full:
        found.append(
            f"Folders are not looked into ({_some(full)} with NIfTI files): the pattern "
            f"'{root}/**/*.nii*' takes all."
        )
    if others:
        kinds = Counter(Path(name).suffix or "without ending" for name in others)
        each = ", ".join(f"{number} {kind}" for kind, number in sorted(kinds.items()))
        found.append(f"Other files are not taken: {each} ({_some(others)}).")
    if empty:
        found.append(f"Folders without NIfTI files: {_some(empty)}.")
    return [f"{root}: {text}" for text in found]


def _some(names: Sequence[str]) -> str:
    return listed([name_of(name) for name in names], _NAMED)


def _told(one: Path, other: Path) -> str:
    if one.parent == other.parent:
        return f"{one.name} and {other.name}"
    return f"{one} and {other}"


def _stem(name: str) -> str:
    return name_of(_IMAGE.sub("", name))
