"""The images that are to be predicted, by the names of their label maps."""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

from pipeline.data.files import MAGIC, is_absent, name_of, search_files
from pipeline.data.registry import Registry
from pipeline.errors import ConfigError

_NIFTI = re.compile(r"\.nii(\.gz)?$", re.IGNORECASE)
_PAIR = re.compile(r"\.(hdr|img)(\.gz)?$", re.IGNORECASE)
_NAMED = 3


def find_inputs(*given: Path, left: list[str] | None = None) -> dict[str, Path]:
    """NIfTI files by the names that their label maps get; they need not be readable.

    Args:
        given: a file, a folder (all files in it but hidden ones), or a pattern such as
            `scans/*.nii.gz` or `scans/**/ct.nii.gz`. Names are those of files without suffix; of
            a pattern with folders, paths from the first folder that is not spelt out.
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
                " ".join(["no NIfTI file there.", *left[before:]]),
                where=path,
                fix="Give a .nii.gz file, a folder of them, or a pattern in quotes.",
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
) -> dict[str, Path]:
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
        return find_inputs(*([images] if isinstance(images, Path) else images), left=left)
    wanted = splits or ["test"]
    cases = [c for d in registry.datasets for c in registry.cases(d) if c.split in wanted]
    if not cases:
        notes = "".join(f"; {note}" for note in registry.empty_splits(wanted))
        raise ConfigError(
            f"no case is in {' or '.join(wanted)}.",
            where=registry.path,
            fix=f"Set `split` in the registry, or give another --split{notes or '.'}",
        )
    return {case.name: case.image for case in cases}


def _found(path: Path, left: list[str]) -> list[tuple[str, Path]]:
    if os.path.isdir(path):  # noqa: PTH112 - never raises
        root, pattern = path, "*"
    elif not is_absent(path):
        return [(_stem(path.name), path)] if _NIFTI.search(path.name) else []
    else:
        parts, root = list(path.parts), Path()
        while len(parts) > 1 and _is_spelt_out(root / parts[0]):
            root /= parts.pop(0)
        pattern = "/".join(parts)
    names, problems = search_files(root, pattern)
    if problems:
        raise ConfigError(problems[0], where=path, fix="Or name the files.")
    names = [n for n in names if not any(part.startswith(".") for part in n.split("/"))]
    left += _left(root, [name for name in names if not _NIFTI.search(name)])
    return [(_stem(name), root / name) for name in names if _NIFTI.search(name)]


def _is_spelt_out(path: Path) -> bool:
    """Whether its last part means itself: it has no wildcard, or is there by that name."""
    return not any(c in path.name for c in MAGIC) or not is_absent(path)


def _left(root: Path, names: Iterable[str]) -> list[str]:
    """What was not taken, in sentences."""
    pairs: dict[str, str] = {}
    full, empty, others = [], [], []
    for name in names:
        if _PAIR.search(name):
            pairs.setdefault(_PAIR.sub("", name), name)
        elif not os.path.isdir(root / name):  # noqa: PTH112 - never raises
            others.append(name)
        elif any(_NIFTI.search(file) for _, _, files in os.walk(root / name) for file in files):
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
    shown = ", ".join(name_of(name) for name in names[:_NAMED])
    return f"{shown} and {len(names) - _NAMED} more" if len(names) > _NAMED else shown


def _told(one: Path, other: Path) -> str:
    if one.parent == other.parent:
        return f"{one.name} and {other.name}"
    return f"{one} and {other}"


def _stem(name: str) -> str:
    return name_of(_NIFTI.sub("", name))
